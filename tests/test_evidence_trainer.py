import json
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from pydantic import ValidationError

import evidence_ft
from evidence_ft import EvidenceModel, EvidenceTrainer, EvidenceTrainingArguments, trackers
from evidence_ft.alignments import outside_mass
from evidence_ft.backbones import open_clip as backbone
from evidence_ft.classifier import own_score
from evidence_ft.config import ConfigError
from evidence_ft.encoder import CheckpointError
from evidence_ft.files import RunFileError
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.images import DataError
from evidence_ft.methods import lp
from evidence_ft.trainer import TrainerCallback
from evidence_ft.training import TrainingError
from tests.conftest import build_encoder
from tests.in_memory import InMemory
from tests.test_wrapped_datasets import table

IMAGES = 12


def data(n=IMAGES):
    return InMemory(n, size=(48, 32))


def arguments(tmp_path, **changes):
    settings = {"output_dir": tmp_path / "out", "epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu"}
    return EvidenceTrainingArguments(**settings | changes)


def trainer(tmp_path, *, model=None, method="lp", train=None, test=None, settings=(), **options):
    return EvidenceTrainer(
        model or build_encoder("native"),
        arguments(tmp_path, **dict(settings)),
        data() if train is None else train,
        data(6) if test is None else test,
        method=method,
        **options,
    )


def steps_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]


def test_the_public_face_is_what_it_says():
    assert set(evidence_ft.__all__) <= set(dir(evidence_ft))
    for name in evidence_ft.__all__:
        getattr(evidence_ft, name)
    with pytest.raises(AttributeError, match="no attribute 'EvidenceTrianer'"):
        _ = evidence_ft.EvidenceTrianer


def test_training_evaluating_saving_and_loading_go_together(tmp_path):
    fine_tuning = trainer(tmp_path, method="flcp")
    start = fine_tuning.base.sha256
    fitted = fine_tuning.train()
    assert fitted.steps == 3
    assert fine_tuning.tuning.encoder.fingerprint() != start
    metrics = fine_tuning.evaluate()
    assert metrics["n"] == 6
    assert {"accuracy", "PT", "IR", "swapped_accuracy"} <= set(metrics)
    folder = fine_tuning.save_model()
    assert folder == tmp_path / "out/model"
    model = EvidenceModel.from_pretrained(folder)
    images = [data()[row].image for row in range(6)]
    expected = fine_tuning.predict(data(6)).table.to_pydict()
    found = model.predict(images)
    assert found.labels.tolist() == expected["prediction"]
    assert found.probabilities.max(dim=1).values.tolist() == pytest.approx(expected["confidence"], rel=1e-5)
    assert model.explain(images[0]).shape == (1, 4, 6)


def test_evidence_is_trained_through_by_default(tmp_path):
    fine_tuning = trainer(tmp_path, method="flcp")
    fitted = fine_tuning.train()
    assert fitted.first_probe.evidence > 0
    assert all("evidence_loss" in step for step in steps_of(tmp_path))


def test_the_evidence_loss_changes_what_is_learnt_and_its_weight_decides(tmp_path):
    weights = []
    for weight in (0.0, 1.0):
        fine_tuning = trainer(tmp_path / str(weight), method="flcp", settings={"evidence_weight": weight})
        fine_tuning.train()
        weights.append(fine_tuning.tuning.encoder.fingerprint())
    assert weights[0] != weights[1]


def test_a_heatmap_and_a_loss_of_ones_own_take_part_in_training(tmp_path):
    calls = {"heatmap": 0, "alignment": 0}

    def heatmap(trace, score, *, create_graph):
        calls["heatmap"] += 1
        return gradient_attention.heatmap(trace, score, create_graph=create_graph).square()

    def alignment(heatmaps, masks):
        calls["alignment"] += 1
        return outside_mass.loss(heatmaps, masks).square()

    fine_tuning = trainer(tmp_path, method="flcp", heatmap=heatmap, alignment=alignment)
    assert fine_tuning.train().first_probe.evidence > 0
    assert calls["heatmap"] == calls["alignment"] == 4  # three steps and the probe
    model = EvidenceModel.from_pretrained(fine_tuning.save_model())
    image = data()[0].image
    with pytest.raises(ValueError, match=r"explained by .*heatmap, which is not part of evidence_ft; .* heatmap="):
        model.explain(image)
    torch.testing.assert_close(
        model.explain(image, heatmap=heatmap), model.explain(image, heatmap=gradient_attention.heatmap).square()
    )


def test_an_objective_of_ones_own_replaces_the_methods(tmp_path):
    def smoothed(tuning):
        def objective(features, labels):
            logits = tuning.head(features)
            return F.cross_entropy(logits, labels, label_smoothing=0.3), own_score(tuning.head, labels)

        return objective

    plain = trainer(tmp_path / "plain", settings={"evidence_weight": 0.0})
    plain.train()
    own = trainer(tmp_path / "own", objective=smoothed, settings={"evidence_weight": 0.0})
    own.train()
    assert steps_of(tmp_path / "own")[0]["task_loss"] > steps_of(tmp_path / "plain")[0]["task_loss"]
    assert not torch.equal(own.tuning.head.weight, plain.tuning.head.weight)


def test_the_order_of_the_images_can_be_given(tmp_path):
    opened = []

    class Watched(InMemory):
        def __getitem__(self, row):
            opened.append(row)
            return super().__getitem__(row)

    fine_tuning = trainer(
        tmp_path, train=Watched(IMAGES, size=(48, 32)), sampler=lambda epoch: [5, 1, 1, 0, 7, 2, 2, 3]
    )
    opened.clear()
    fine_tuning.train()
    assert opened == [5, 1, 1, 0, 7, 2, 2, 3]


def test_callbacks_hear_of_every_step(tmp_path):
    class Heard(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, step, record):
            self.steps.append((step, record["task_loss"]))

    heard = Heard()
    trainer(tmp_path, callbacks=[heard]).train()
    assert heard.steps == [(step["step"], step["task_loss"]) for step in steps_of(tmp_path)]


def test_an_interrupted_training_is_resumed(tmp_path):
    class Stop(TrainerCallback):
        def on_save(self, step, checkpoint):
            raise KeyboardInterrupt

    settings = {"checkpoint_every": 2}
    whole = trainer(tmp_path / "whole", method="flcp", settings=settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "halves", method="flcp", settings=settings, callbacks=[Stop()]).train()
    second = trainer(tmp_path / "halves", method="flcp", settings=settings)
    second.train(resume_from_checkpoint=True)
    assert second.tuning.encoder.fingerprint() == whole.tuning.encoder.fingerprint()
    third = trainer(tmp_path / "halves", method="flcp", settings=settings)
    third.train(resume_from_checkpoint=str(tmp_path / "halves/out/checkpoints/step-00000002"))
    assert third.tuning.encoder.fingerprint() == whole.tuning.encoder.fingerprint()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"method": 3}, "method: found int, expected a name, a module or a function"),
        ({"alignment": 3}, "alignment: found int, expected a function or a name"),
        ({"sampler": [1, 2]}, "sampler: found list, expected a function"),
        ({"callbacks": print}, "callbacks: found builtin_function_or_method, expected a list of objects"),
        ({"callbacks": [TrainerCallback]}, "callbacks: found type, expected"),
    ],
)
def test_a_part_of_the_wrong_kind_is_named(tmp_path, part, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **part)


def other_objective(tuning):
    return tuning.objective


def backwards(epoch):
    return list(reversed(range(IMAGES)))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"objective": other_objective}, "objective"),
        ({"sampler": backwards}, "data.order"),
        ({"settings": {"threshold": 0.9}}, "judged.threshold"),
        ({"test": data(7)}, "judged.data.test"),
    ],
)
def test_a_training_that_another_would_continue_is_refused(tmp_path, options, key):
    settings = {"checkpoint_every": 2, "evaluate_every": 2}
    trainer(tmp_path, settings=settings).train()
    options = options | {"settings": settings | options.get("settings", {})}
    with pytest.raises(RunFileError, match=key):
        trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_how_a_training_is_judged_may_change_where_it_follows_no_evaluation(tmp_path):
    trainer(tmp_path, settings={"checkpoint_every": 2}).train()
    again = trainer(tmp_path, settings={"checkpoint_every": 2, "threshold": 0.9})
    assert again.train(resume_from_checkpoint=True).steps == 3


def test_an_accelerator_of_ones_own_must_do_what_is_asked_for(tmp_path, monkeypatch):
    args = arguments(tmp_path).model_copy(update={"report_to": ("tensorboard",)})  # which need not be installed
    with pytest.raises(ConfigError, match=r"report_to = 'tensorboard', but the accelerator .* logs with none"):
        EvidenceTrainer(build_encoder("native"), args, data(), accelerator=Accelerator(cpu=True))
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    with pytest.raises(TrainingError, match="fp16 underflows"):
        trainer(tmp_path, accelerator=accelerator)


def test_what_is_missing_or_of_another_training_is_not_resumed(tmp_path):
    with pytest.raises(RunFileError, match=r"no checkpoint .*step-00000009; there is no folder .*checkpoints either"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "out/checkpoints/step-00000009"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 1, "task_loss": 2.0}\n')
    with pytest.raises(
        RunFileError, match=r"no checkpoint in .* to resume from, and .*metrics\.jsonl may be of another"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    assert (tmp_path / "out/metrics.jsonl").read_text() == '{"step": 1, "task_loss": 2.0}\n'


def test_a_finished_training_can_be_resumed_until_its_model_is_saved(tmp_path):
    first = trainer(tmp_path)
    first.train()
    second = trainer(tmp_path)
    assert second.train(resume_from_checkpoint=True).steps == 3
    assert len(steps_of(tmp_path)) == 3
    assert torch.equal(first.tuning.head.weight, second.tuning.head.weight)
    second.save_model()
    assert not (tmp_path / "out/checkpoints").exists()


def test_a_sampler_may_repeat_images_to_fill_a_batch(tmp_path):
    few = data(2)
    fitted = trainer(tmp_path, train=few, sampler=lambda epoch: [0, 1, 0, 1]).train()
    assert fitted.steps == 1


def test_a_class_that_no_training_image_shows_is_named(tmp_path, caplog):
    cats = data(8)
    cats.labels = [0] * 8
    trainer(tmp_path, train=cats).train()
    assert caplog.text.count("no image shows 'dog'") == 1


def test_with_one_class_in_the_test_images_swapped_accuracy_is_not_defined(tmp_path):
    dogs = data(6)
    dogs.labels = [1] * 6
    metrics = trainer(tmp_path, test=dogs).evaluate()
    assert (metrics["n"], metrics["swapped_n"]) == (6, 0)
    assert math.isnan(metrics["swapped_accuracy"])


def test_the_best_evaluation_can_be_kept(tmp_path):
    settings = {"evaluate_every": 1, "early_stopping": {"metric": "mean_RMA", "patience": 1}, "epochs": 3}
    fitted = trainer(tmp_path, method="flcp", settings=settings).train()
    assert fitted.best_step is not None
    assert "eval_mean_RMA" in steps_of(tmp_path)[0]


def test_several_evaluation_sets_are_told_apart(tmp_path):
    fine_tuning = trainer(tmp_path, test={"easy": data(6), "hard": data(4)})
    metrics = fine_tuning.evaluate()
    assert (metrics["easy/n"], metrics["hard/n"]) == (6, 4)
    assert fine_tuning.evaluate(data(8))["n"] == 8


@pytest.mark.parametrize("method", ["zero_shot", "tip_adapter"])
def test_methods_without_gradients_are_evaluated(method, tmp_path):
    fine_tuning = trainer(tmp_path, method=method)
    if method == "zero_shot":
        with pytest.raises(ConfigError, match="'zero_shot' trains nothing; evaluate it"):
            fine_tuning.train()
    else:
        assert fine_tuning.train().steps == 0
        assert len(fine_tuning.tuning.head.keys) == IMAGES
    assert fine_tuning.evaluate()["n"] == 6


def test_a_method_is_a_name_a_module_or_a_function(tmp_path):
    def prepare(encoder, class_names):
        return lp.prepare(encoder, class_names, lp.Config(head="random"))

    assert trainer(tmp_path, method="lp", method_config={"head": "random"}).method_config["head"] == "random"
    assert trainer(tmp_path, method=lp, method_config=lp.Config(head="random")).method_config["head"] == "random"
    own = trainer(tmp_path, method=prepare)
    assert own.method_config["name"].endswith("prepare")
    folder = own.save_model()
    with pytest.raises(CheckpointError, match="not part of evidence_ft"):
        EvidenceModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lpp"}, "no methods named 'lpp'; did you mean 'lp'"),
        ({"method_config": {"heat": 1}}, "unknown key .method_config.heat."),
        ({"heatmap": "gradcam"}, "no heatmaps named 'gradcam'"),
        ({"alignment": "inside"}, "no alignments named 'inside'"),
        ({"method": build_encoder, "method_config": {"a": 1}}, "a function takes no method_config"),
        ({"method_config": {"templates": "a photo"}}, "method_config.templates.*exactly one"),
        ({"method": "clip_adapter", "method_config": {"reduction": 99}}, "method 'clip_adapter': reduction = 99"),
        ({"settings": {"layers": (7,)}}, "args.layers = .7., but the image tower has 3 blocks"),
        ({"model": torch.nn.Linear(2, 2)}, "model of type Linear, expected a checkpoint id.* architecture='ViT-B-32'"),
        ({"model": torch.nn.Linear(2, 2), "architecture": "ViT-B-33"}, "no architecture 'ViT-B-33'"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_trained(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **options)


def test_unknown_settings_and_trackers_are_refused():
    with pytest.raises(ValidationError, match="learning_rat"):
        EvidenceTrainingArguments(learning_rat=1.0)
    with pytest.raises(ValidationError, match=r"no tracker 'tensorbord'; did you mean 'tensorboard'"):
        EvidenceTrainingArguments(report_to="tensorbord")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(ValidationError, match="tracker 'wandb' is not installed: pip install wandb"):
        EvidenceTrainingArguments(report_to=["wandb"])


def test_trackers_are_told_settings_steps_and_results(tmp_path, monkeypatch):
    told = {}

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "told", False, None

        def __init__(self, project, **_options):
            super().__init__()
            told["project"] = project

        def store_init_configuration(self, values):
            told["settings"] = values

        def log(self, values, step, **_options):
            told.setdefault("logged", []).append((step, set(values)))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "told", Tracker)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["told"])
    fine_tuning = trainer(tmp_path, settings={"report_to": "told", "project": "cats"})
    fine_tuning.train()
    fine_tuning.evaluate()
    assert told["project"] == "cats"
    assert told["settings"]["batch_size"] == 4
    assert told["settings"]["method.name"] == "lp"
    assert [step for step, _ in told["logged"]] == [1, 2, 3, 3]
    assert "task_loss" in told["logged"][0][1]
    assert "final_accuracy" in told["logged"][-1][1]


def test_data_sets_of_other_libraries_are_wrapped(tmp_path):
    fine_tuning = trainer(tmp_path, train=table(), test=table(), settings={"batch_size": 2})
    assert fine_tuning.class_names == ("no", "yes")
    assert fine_tuning.train().steps == 1


def test_evidence_without_masks_is_refused(tmp_path):
    bare = data()
    bare.mask_sources = ["none"] * IMAGES

    class Bare(InMemory):
        def __getitem__(self, row):
            return super().__getitem__(row)._replace(mask=None)

    bare.__class__ = Bare
    with pytest.raises(DataError, match=r"nothing to align evidence with; .* evidence_weight to 0"):
        trainer(tmp_path, train=bare).train()


def test_bad_samples_stop_or_are_left_out(tmp_path):
    class Broken(InMemory):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            return sample._replace(mask=np.zeros_like(sample.mask)) if row == 3 else sample

    with pytest.raises(DataError, match="without a single object pixel"):
        trainer(tmp_path, train=Broken(IMAGES, size=(48, 32)))
    kept = trainer(tmp_path, train=Broken(IMAGES, size=(48, 32)), settings={"on_bad_sample": "skip"})
    assert len(kept.train_dataset) == IMAGES - 1


def test_data_sets_with_other_classes_are_refused(tmp_path):
    other = data(6)
    other.class_names = ("dog", "cat")
    with pytest.raises(DataError, match="train_dataset and test have different classes: 'cat', 'dog' and 'dog', 'cat'"):
        trainer(tmp_path, test=other)


def test_data_with_other_classes_is_not_judged_by_their_numbers(tmp_path):
    other = data(6)
    other.class_names = ("dog", "cat")
    fine_tuning = trainer(tmp_path)
    with pytest.raises(DataError, match="predict has classes 'dog', 'cat', but the model knows 'cat', 'dog'"):
        fine_tuning.predict(other)


def test_data_is_needed_for_what_needs_it(tmp_path):
    with pytest.raises(DataError, match="neither train_dataset nor eval_dataset"):
        EvidenceTrainer(build_encoder(), arguments(tmp_path))
    judge = EvidenceTrainer(build_encoder(), arguments(tmp_path), eval_dataset=data(6), method="zero_shot")
    assert judge.evaluate()["n"] == 6
    with pytest.raises(DataError, match="no train_dataset"):
        judge.train()
    fitter = EvidenceTrainer(build_encoder(), arguments(tmp_path), data(), method="lp")
    with pytest.raises(DataError, match="no eval_dataset"):
        fitter.evaluate()


def test_a_model_of_open_clip_is_taken_as_it_is(tmp_path):
    build_encoder("native").save(tmp_path / "tiny")
    name = f"local-dir:{tmp_path / 'tiny'}"
    model = open_clip.create_model(name)
    fine_tuning = trainer(tmp_path, model=model, architecture=name, method="flcp")
    fine_tuning.train()
    assert fine_tuning.tuning.encoder.model is model
    loaded = EvidenceModel.from_pretrained(fine_tuning.save_model())  # whole: there is no base to load
    image = data()[0].image
    assert loaded.predict(image).names == fine_tuning.to_model().predict(image).names


def test_a_checkpoint_is_taken_by_its_name(tmp_path):
    build_encoder("native").save(tmp_path / "tiny")
    fine_tuning = trainer(tmp_path, model=f"local-dir:{tmp_path / 'tiny'}")
    assert fine_tuning.base.checkpoint == f"local-dir:{tmp_path / 'tiny'}"
    assert fine_tuning.base.sha256 == build_encoder("native").fingerprint()


@pytest.mark.parametrize("method", ["lp", "lora"])
def test_an_encoder_that_was_tuned_before_is_not_taken_for_its_checkpoint(method, tmp_path):
    build_encoder("native").save(tmp_path / "tiny")
    encoder = backbone.load(f"local-dir:{tmp_path / 'tiny'}")
    untouched = trainer(tmp_path, model=encoder)
    assert untouched.base.checkpoint == encoder.checkpoint
    with torch.no_grad():
        next(encoder.image_tower.parameters()).mul_(1.5)
    fine_tuning = trainer(tmp_path, model=encoder, method=method)
    fine_tuning.train()
    loaded = EvidenceModel.from_pretrained(fine_tuning.save_model())
    image = data()[0].image
    torch.testing.assert_close(loaded.predict(image).probabilities, fine_tuning.to_model().predict(image).probabilities)


def test_the_last_evaluation_goes_onto_the_card(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(
        EvidenceModel, "push_to_hub", lambda self, repo_id, **options: told.update(options) or "address"
    )
    fine_tuning = trainer(tmp_path)
    accuracy = fine_tuning.evaluate()["accuracy"]
    baseline = {"baseline": {"accuracy": 0.5}}
    assert fine_tuning.push_to_hub("me/cats", private=True, metrics=baseline) == "address"
    assert told["metrics"]["test"]["accuracy"] == accuracy
    assert told["metrics"]["baseline"] == {"accuracy": 0.5}
    assert told["details"]["alignment"] == "outside_mass"
    assert told["private"] is True
