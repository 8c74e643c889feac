import json
import logging
import signal
import sys

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from PIL import Image

from evidence_ft import checkpoints, experiment, trackers
from evidence_ft.backbones import timm_vit
from evidence_ft.config import ConfigError, parse
from evidence_ft.datasets import shapes
from evidence_ft.experiment import arm_config, arm_state, hold_out, main, run, run_arms
from evidence_ft.files import RunFileError
from evidence_ft.images import DataError
from evidence_ft.interruption import Interrupted
from evidence_ft.model import EvidenceModel
from evidence_ft.runs import RunRecord, read_steps
from evidence_ft.training import TrainingError, TrainingStep
from evidence_ft.transforms import ModelInputs

ARMS = ("zero_shot", "baseline", "evidence", "swap", "evidence_swap")
SMALL = {
    "run": {"name": "small", "device": "cpu"},
    "data": {"format": "shapes", "train_images": 32, "test_images": 24, "test_splits": ["test"]},
    "training": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 16},
    "evaluation": {"gallery": 2},
}


def small(tmp_path, **sections):
    tree = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in {*SMALL, *sections}}
    tree["run"] = {**tree["run"], "directory": str(tmp_path)}
    return parse(tree)


def test_where_the_method_has_none_of_the_arms_nothing_passes_for_a_result(tmp_path):
    run(small(tmp_path, method={"name": "zero_shot"}, run={"arms": ["zero_shot"]}))
    with pytest.raises(ConfigError, match="nothing was run, because method zero_shot trains nothing"):
        run(small(tmp_path, method={"name": "zero_shot"}, run={"arms": ["evidence"]}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return run(small(directory, run={"arms": ARMS}))


def test_five_arms_leave_everything_a_report_needs(finished):
    for arm in ARMS:
        record = RunRecord.read(finished / arm)
        assert record.read_outcomes(finished / arm, "test").n == 24
        assert record.data["test"].annotated == 24
        assert (finished / arm / "config.yaml").is_file()
        assert (finished / arm / "gallery" / "test.safetensors").is_file()
    for name in ("comparison.json", "comparison.md", "comparison.html"):
        assert (finished / name).stat().st_size > 0
    numbers = json.loads((finished / "comparison.json").read_text())["arms"]
    assert list(numbers) == list(ARMS)
    keys = {"n", "accuracy", "PT", "IR", "RR", "mean_RMA", "empty_heatmaps", "swapped_accuracy"}
    assert keys <= set(numbers["evidence_swap"]["test"])
    assert "Warning" not in (finished / "comparison.md").read_text()


def test_all_arms_start_from_the_same_weights_and_end_at_different_ones(finished):
    records = {arm: RunRecord.read(finished / arm) for arm in ARMS}
    assert len({record.model["sha256"] for record in records.values()}) == 1
    trained = {records[arm].model["fine_tuned_sha256"] for arm in ARMS if arm != "zero_shot"}
    assert len(trained | {records["zero_shot"].model["sha256"]}) == 5


@pytest.mark.parametrize("arm", ["zero_shot", "evidence"])
def test_the_saved_model_is_the_one_that_was_judged(finished, arm):
    outcomes = RunRecord.read(finished / arm).read_outcomes(finished / arm, "test")
    model = EvidenceModel.from_pretrained(finished / arm / "model")
    images = [sample.image for sample in (shapes.Shapes("test", 24)[row] for row in range(24))]
    found = model.predict(images)
    assert found.labels.tolist() == outcomes.predictions.tolist()
    torch.testing.assert_close(found.probabilities.max(dim=1).values, outcomes.confidence)


def test_the_record_says_that_the_loss_was_alive(finished):
    for arm in ("evidence", "evidence_swap"):
        assert RunRecord.read(finished / arm).training["first_evidence_to_task_gradient_ratio"] > 0
    for arm in ("baseline", "swap"):
        assert RunRecord.read(finished / arm).training["first_evidence_to_task_gradient_ratio"] is None
    assert RunRecord.read(finished / "zero_shot").training is None


def test_the_config_of_an_arm_reproduces_it_bit_for_bit(finished, tmp_path):
    record = RunRecord.read(finished / "evidence_swap")
    again = run_arms(parse({**record.config, "run": {**record.config["run"], "directory": str(tmp_path)}}))
    assert RunRecord.read(again / "evidence_swap").model == record.model
    assert RunRecord.read(again / "evidence_swap").results == record.results


def test_an_arm_that_is_run_again_replaces_nothing_that_was_written(finished):
    before = (finished / "zero_shot" / "run.json").read_bytes()
    run(small(finished.parent, run={"arms": ["zero_shot"]}))
    assert (finished / "replaced" / "zero_shot-1" / "run.json").read_bytes() == before
    assert list(json.loads((finished / "comparison.json").read_text())["arms"]) == list(ARMS)


def test_arms_differ_in_nothing_but_what_makes_them(tmp_path):
    config = small(tmp_path, evidence={"weight": 2.0}, training={"background_swap": 0.25})
    expected = {"baseline": (0, 0), "evidence": (2, 0), "swap": (0, 0.25), "evidence_swap": (2, 0.25)}
    rest = []
    for arm, (weight, swap) in expected.items():
        tree = arm_config(config, arm).model_dump()
        assert tree["evidence"].pop("weight") == weight
        assert tree["training"].pop("background_swap") == swap
        assert tree["run"].pop("arms") == (arm,)
        rest.append(tree)
    assert rest == [rest[0]] * 4
    zero_shot = arm_config(config, "zero_shot")
    assert zero_shot.method.model_dump() == {"name": "zero_shot", "templates": ("a photo of a {}",)}


def test_swap_arms_swap_half_of_the_backgrounds_unless_told_otherwise(tmp_path):
    assert arm_config(small(tmp_path), "swap").training.background_swap == 0.5
    assert arm_config(small(tmp_path), "evidence_swap").training.background_swap == 0.5


class TestMethodsThatTrainNothing:
    def test_have_no_arm_with_a_loss(self, tmp_path, caplog):
        method = {"name": "tip_adapter", "shots": 2}
        directory = run_arms(small(tmp_path, method=method, run={"arms": ["baseline", "evidence", "swap"]}))
        assert [path.parent.name for path in directory.glob("*/run.json")] == ["baseline"]
        assert "evidence: skipped, because method tip_adapter trains nothing" in caplog.text
        record = RunRecord.read(directory / "baseline")
        assert record.training["steps"] == 0
        assert record.model["checkpoint"] == "toy_clip"

    def test_read_the_training_images_and_save_what_they_remember(self, tmp_path):
        method = {"name": "tip_adapter", "shots": 2}
        directory = run_arms(small(tmp_path, method=method, run={"arms": ["baseline"]}))
        model = EvidenceModel.from_pretrained(directory / "baseline" / "model")
        assert model.tuning.head.keys.shape[0] == 2 * 8
        outcomes = RunRecord.read(directory / "baseline").read_outcomes(directory / "baseline", "test")
        images = [sample.image for sample in (shapes.Shapes("test", 24)[row] for row in range(24))]
        assert model.predict(images).labels.tolist() == outcomes.predictions.tolist()

    def test_zero_shot_is_a_method_too(self, tmp_path):
        directory = run_arms(small(tmp_path, method={"name": "zero_shot"}, run={"arms": ["baseline"]}))
        assert RunRecord.read(directory / "baseline").training is None


def predictions(directory, arm):
    return RunRecord.read(directory / arm).read_outcomes(directory / arm, "test").confidence


def test_without_any_share_of_the_tuned_weights_zero_shot_is_left(tmp_path):
    arms = {"arms": ["zero_shot", "baseline"]}
    back = run_arms(small(tmp_path / "0", method={"name": "ft"}, run=arms, evaluation={"interpolation": 0.0}))
    torch.testing.assert_close(predictions(back, "baseline"), predictions(back, "zero_shot"))
    tuned = run_arms(small(tmp_path / "1", method={"name": "ft"}, run=arms))
    assert not torch.allclose(predictions(tuned, "baseline"), predictions(tuned, "zero_shot"))
    model = EvidenceModel.from_pretrained(back / "baseline" / "model")
    images = [sample.image for sample in (shapes.Shapes("test", 24)[row] for row in range(24))]
    torch.testing.assert_close(model.predict(images).probabilities.max(dim=1).values, predictions(back, "zero_shot"))


THREE_EPOCHS = {"run": {"arms": ["baseline", "evidence"]}, "training": {"epochs": 3, "checkpoint_every": 1}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_arms(small(tmp_path_factory.mktemp("whole"), **THREE_EPOCHS))


class TestResuming:
    """Interrupted runs continue; what has finished is kept."""

    def settings(self, tmp_path, **more):
        return small(tmp_path, run=THREE_EPOCHS["run"] | more, training=THREE_EPOCHS["training"])

    def stop_in_epoch(self, monkeypatch, epoch, act):
        own = ModelInputs.set_epoch

        def set_epoch(inputs, number):
            if number == epoch:
                act()
            own(inputs, number)

        monkeypatch.setattr(ModelInputs, "set_epoch", set_epoch)

    def test_an_interrupted_arm_goes_on_where_it_was_and_ends_where_it_would_have(
        self, tmp_path, monkeypatch, uninterrupted
    ):
        with monkeypatch.context() as patched:
            self.stop_in_epoch(patched, 1, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted):
                run(self.settings(tmp_path))
        config = self.settings(tmp_path, resume=True)
        assert [arm_state(config, arm) for arm in ("baseline", "evidence")] == ["interrupted", "new"]
        assert checkpoints.all_in(tmp_path / "small" / "baseline" / "checkpoints")[-1].name == "step-00000003"
        directory = run_arms(config)
        for arm in ("baseline", "evidence"):
            ours, theirs = RunRecord.read(directory / arm), RunRecord.read(uninterrupted / arm)
            assert (ours.model, ours.results) == (theirs.model, theirs.results)
            steps = [step["step"] for step in read_steps(directory / arm / "metrics.jsonl")]
            assert steps == [1, 2, 3, 4, 5, 6]
        assert not (directory / "replaced").exists()

    def test_a_finished_arm_is_kept(self, tmp_path, monkeypatch, caplog):
        caplog.set_level(logging.INFO)

        def fails(directory, *_, **__):
            if "evidence" in directory.parts:
                raise RuntimeError("no space left")

        with monkeypatch.context() as patched:
            patched.setattr(experiment, "save_model", fails)
            with pytest.raises(RuntimeError, match="no space left"):
                run_arms(self.settings(tmp_path))
        before = (tmp_path / "small" / "baseline" / "run.json").read_bytes()
        config = self.settings(tmp_path, resume=True)
        assert [arm_state(config, arm) for arm in ("baseline", "evidence")] == ["finished", "interrupted"]
        run_arms(config)
        assert (tmp_path / "small" / "baseline" / "run.json").read_bytes() == before
        assert "baseline: has finished; kept" in caplog.text
        assert arm_state(config, "evidence") == "finished"

    def test_a_training_that_has_finished_is_not_repeated_when_the_evaluation_failed(self, tmp_path, monkeypatch):
        def broken(*_arguments, **_options):
            raise RuntimeError("out of memory")

        config = small(tmp_path, run={"arms": ["baseline"]})
        with monkeypatch.context() as patched:
            patched.setattr(experiment, "evaluate", broken)
            with pytest.raises(RuntimeError, match="out of memory"):
                run_arms(config)
        arm = tmp_path / "small" / "baseline"
        steps = (arm / "metrics.jsonl").read_bytes()
        monkeypatch.setattr(TrainingStep, "forward", lambda *_, **__: pytest.fail("trained again"))
        run_arms(small(tmp_path, run={"arms": ["baseline"], "resume": True}))
        assert (arm / "metrics.jsonl").read_bytes() == steps
        assert RunRecord.read(arm).training["steps"] == 2
        assert not (arm / "checkpoints").exists()

    def test_other_settings_are_refused(self, uninterrupted):
        config = self.settings(uninterrupted.parent, resume=True, seed=1)
        assert arm_state(config, "baseline") == "other"
        with pytest.raises(
            ConfigError, match=r"baseline was begun with other settings: run\.seed was 0, is 1\. Resume"
        ):
            run(config)

    def test_what_does_not_decide_the_result_may_differ(self, uninterrupted):
        config = small(uninterrupted.parent, run=THREE_EPOCHS["run"], training={"epochs": 3, "checkpoint_every": 5})
        assert arm_state(config, "baseline") == "finished"

    def test_something_else_in_an_arms_folder_is_no_interrupted_arm(self, tmp_path):
        (tmp_path / "small" / "baseline").mkdir(parents=True)
        assert arm_state(self.settings(tmp_path), "baseline") == "other"

    def test_the_command_line_ends_with_75_and_says_how_to_resume(self, tmp_path, monkeypatch, capsys, caplog):
        file = tmp_path / "small.yaml"
        file.write_text(json.dumps(self.settings(tmp_path).model_dump(mode="json")))
        monkeypatch.setattr(sys, "argv", ["recipe.py"])
        self.stop_in_epoch(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit) as stopped:
            main(file, "A recipe.")
        assert stopped.value.code == 75
        assert "interrupted after step 3" in caplog.text
        assert "the same command with --run.resume continues" in caplog.text


class TestHoldingOut:
    def test_takes_the_same_share_of_each_class_and_never_all_of_one(self):
        labels = [0] * 40 + [1] * 10 + [2]
        kept, held_out = hold_out(labels, 0.25, seed=0)
        assert sorted(kept + held_out) == list(range(51))
        assert [sum(labels[row] == label for row in held_out) for label in range(3)] == [10, 2, 0]
        assert hold_out(labels, 0.25, seed=0) == (kept, held_out)
        assert hold_out(labels, 0.25, seed=1) != (kept, held_out)
        assert hold_out([0, 0], 0.9, seed=0)[0]

    def test_gives_early_stopping_its_images_and_training_the_others(self, tmp_path):
        training = {"epochs": 4, "evaluate_every": 1, "early_stopping": {"metric": "accuracy", "patience": 1}}
        config = small(
            tmp_path, run={"arms": ["baseline"], "validation_share": 0.25}, training=training | {"batch_size": 8}
        )
        directory = run_arms(config)
        record = RunRecord.read(directory / "baseline")
        assert (record.data["train"].n, record.data["held out"].n) == (24, 8)
        steps = read_steps(directory / "baseline" / "metrics.jsonl")
        accuracies = {step["step"]: step["eval_accuracy"] for step in steps}
        assert record.training["best_step"] == max(accuracies, key=accuracies.get)
        assert record.training["steps"] == len(accuracies)

    def test_is_asked_for_where_it_is_needed(self, tmp_path):
        with pytest.raises(ConfigError, match=r"training\.evaluate_every = 2, but no images are held out.*run\.valid"):
            run(small(tmp_path, training={"evaluate_every": 2}))

    def test_holds_out_something(self, tmp_path):
        with pytest.raises(ConfigError, match=r"validation_share = 0\.01 of each class holds out none of 32"):
            run(small(tmp_path, run={"validation_share": 0.01}))


def test_a_swap_that_no_arm_would_see_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"background_swap = 0\.5, but none of run\.arms = .*add swap or evidence_"):
        run(small(tmp_path, training={"background_swap": 0.5}))


class TestTrackers:
    def test_that_are_not_installed_are_named(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"run\.report_to: no tracker 'tensorbored'; did you mean 'tensorboard'\?"
        ):
            run(small(tmp_path, run={"report_to": ["tensorbored"]}))

    def test_hear_of_every_step_of_every_arm(self, tmp_path, monkeypatch):
        told = []

        class Tracker(tracking.GeneralTracker):
            name = "wandb"
            requires_logging_directory = False

            def __init__(self, run_name, **options):
                super().__init__()
                self.arm = options["name"]
                assert run_name == "small"

            def start(self):
                told.append((self.arm, "start"))

            @property
            def tracker(self):
                return self

            def store_init_configuration(self, values):
                assert values["run.name"] == "small"

            def log(self, values, step, **_):
                told.append((self.arm, step, values["task_loss"]))

            def finish(self):
                told.append((self.arm, "finish"))

        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
        for module in (tracking, trackers):
            monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.WANDB])
        directory = run_arms(small(tmp_path, run={"report_to": ["wandb"], "arms": ["zero_shot", "baseline", "swap"]}))
        expected = []
        for arm in ("baseline", "swap"):
            steps = read_steps(directory / arm / "metrics.jsonl")
            logged = [(arm, step["step"], step["task_loss"]) for step in steps]
            expected += [(arm, "start"), *logged, (arm, "finish")]
        assert told == expected


def test_one_class_alone_has_no_other_background_and_the_report_says_so(tmp_path, caplog):
    generator = np.random.default_rng(0)
    rows = ["sample_id,image,mask,label,split"]
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(f"{number},{number}.png,mask.png,star,{'train' if number < 4 else 'test'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    data = {"format": "manifest", "file": str(tmp_path / "labels.csv"), "classes": ["ring", "star"]}
    where = {"name": "one", "device": "cpu", "directory": str(tmp_path), "arms": ["zero_shot", "baseline"]}
    directory = run(parse({"run": where, "data": data, "training": {"batch_size": 4, "epochs": 1}}))
    numbers = json.loads((directory / "comparison.json").read_text())["arms"]["baseline"]["test"]
    assert (numbers["swapped_accuracy"], numbers["swapped_n"]) == (None, 0)
    report = (directory / "comparison.md").read_text()
    assert "accuracy on swapped backgrounds is not defined" in report
    assert "No image of train shows 'ring'" in report
    assert caplog.text.count("no image of split 'train' shows 'ring'") == 1


class TestBadInput:
    """One clear error each, before any weights are loaded and before training starts."""

    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch):
        from evidence_ft.backbones import open_clip as backbone

        def load(_checkpoint):
            raise AssertionError("weights were loaded before the input was checked")

        monkeypatch.setattr(backbone, "load", load)

    def manifest(self, tmp_path, rows, **settings):
        for name in ("a.png", "b.png"):
            Image.fromarray(np.full((16, 16, 3), 100, np.uint8)).save(tmp_path / name)
            mask = np.zeros((16, 16), np.uint8)
            mask[4:8, 4:8] = 255
            Image.fromarray(mask).save(tmp_path / f"mask_{name}")
        header = "sample_id,image,mask,label,split"
        file = tmp_path / "labels.csv"
        file.write_text("\n".join([header, *rows]) + "\n")
        data = {"format": "manifest", "file": str(file), **settings}
        where = SMALL["run"] | {"directory": str(tmp_path / "runs")}
        return parse({"run": where, "data": data, "training": {"batch_size": 2}})

    GOOD = ("1,a.png,mask_a.png,cat,train", "2,b.png,mask_b.png,dog,train", "3,a.png,mask_a.png,cat,test")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("4,nowhere.png,,cat,test", r"nowhere\.png"),
            ("3,b.png,mask_b.png,dog,test", "'3'"),
            ("4,a.png,mask_a.png,,test", r"line 5\b.*label"),
        ],
    )
    def test_a_manifest_that_contradicts_itself(self, tmp_path, row, message):
        with pytest.raises(DataError, match=message):
            run(self.manifest(tmp_path, [*self.GOOD, row]))

    def test_an_unknown_class(self, tmp_path):
        with pytest.raises(DataError, match="'dog'"):
            run(self.manifest(tmp_path, self.GOOD, classes=["cat", "dogs"]))

    def test_a_corrupt_image_and_how_to_skip_it(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        rows = [*self.GOOD, "4,broken.png,,cat,test"]
        with pytest.raises(DataError, match=r"(?s)broken\.png.*--data\.on-bad-sample skip"):
            run(self.manifest(tmp_path, rows))

    def test_a_mask_of_another_size(self, tmp_path):
        Image.fromarray(np.full((8, 16), 255, np.uint8)).save(tmp_path / "small.png")
        with pytest.raises(DataError, match="sample '4': found a mask of 16x8 pixels"):
            run(self.manifest(tmp_path, [*self.GOOD, "4,a.png,small.png,cat,test"]))

    def test_a_run_folder_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "runs").write_text("")
        with pytest.raises(RunFileError, match=r"runs/.* cannot be written to"):
            run(small(tmp_path / "runs"))

    def test_a_mask_without_foreground(self, tmp_path):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "empty.png")
        with pytest.raises(DataError, match=r"reaches|foreground"):
            run(self.manifest(tmp_path, [*self.GOOD, "4,a.png,empty.png,cat,test"]))

    def test_no_mask_in_training_but_an_evidence_loss(self, tmp_path):
        rows = ["1,a.png,,cat,train", "2,b.png,,dog,train", "3,a.png,,cat,test"]
        with pytest.raises(DataError, match=r"no image of split 'train' has a mask"):
            run(self.manifest(tmp_path, rows))

    def test_fewer_training_images_than_a_batch(self, tmp_path):
        config = self.manifest(tmp_path, self.GOOD)
        tree = config.model_dump()
        tree["training"]["batch_size"] = 32
        with pytest.raises(TrainingError, match=r"training\.batch_size to at most 2"):
            run(parse(tree))

    def test_swapped_backgrounds_without_masks_to_swap(self, tmp_path):
        rows = ["1,a.png,mask_a.png,cat,train", "2,b.png,,dog,train", "3,a.png,,cat,test"]
        config = self.manifest(tmp_path, rows)
        with pytest.raises(DataError, match=r"1 of 2 images of split 'train' have a mask or box.*swap"):
            run(parse(config.model_dump() | {"run": config.run.model_dump() | {"arms": ["swap"]}}))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_a_gpu_where_there_is_none(self, tmp_path):
        with pytest.raises(ConfigError, match=r"run\.device = 'cuda', but torch sees no GPU"):
            run(small(tmp_path, run={"device": "cuda"}))


def test_layers_that_do_not_exist_are_named_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.layers = \[7\], but the image tower has 4 blocks"):
        run(small(tmp_path, evaluation={"layers": [7]}))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_arms_that_were_judged_otherwise_are_refused_before_training(finished):
    with pytest.raises(ConfigError, match=r"baseline holds an arm that was judged .* choose another run\.name"):
        run(small(finished.parent, run={"arms": ["evidence"]}, evaluation={"threshold": 0.7}))


def test_bad_samples_are_skipped_counted_and_listed(tmp_path):
    generator = np.random.default_rng(0)
    rows = ["sample_id,image,mask,label,split"]
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{number}.png")
        label, split = "star" if number % 2 else "ring", "train" if number < 4 else "test"
        rows.append(f"{number},{number}.png,mask.png,{label},{split}")
    (tmp_path / "7.png").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    data = {"format": "manifest", "file": str(tmp_path / "labels.csv"), "on_bad_sample": "skip"}
    run_section = {"name": "skipping", "device": "cpu", "directory": str(tmp_path), "arms": ["zero_shot"]}
    directory = run(parse({"run": run_section, "data": data}))
    record = RunRecord.read(directory / "zero_shot")
    assert record.data["test"].n == 3
    assert [sample.sample_id for sample in record.data["test"].skipped] == ["7"]
    assert "7" not in record.read_outcomes(directory / "zero_shot", "test").sample_ids


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return {"backbone": "timm_vit", "checkpoint": timm_vit.tiny(tmp_path_factory.mktemp("tiny"))}


@pytest.fixture(scope="module")
def plain_model_of_shapes(plain_model, tmp_path_factory):
    """The same, its eight classes called like those of the data."""
    encoder = timm_vit.load(plain_model["checkpoint"])
    encoder.model.reset_classifier(8)
    torch.nn.init.normal_(encoder.model.head.weight)
    encoder.model.pretrained_cfg["label_names"] = list(shapes.CLASS_NAMES)
    folder = tmp_path_factory.mktemp("of shapes")
    encoder.save(folder)
    return {"backbone": "timm_vit", "checkpoint": f"local-dir:{folder}"}


class TestAModelWithoutATextTower:
    @pytest.fixture
    def _unread(self, monkeypatch):
        def read(_self, _row):
            raise AssertionError("an image was read")

        monkeypatch.setattr(shapes.Shapes, "__getitem__", read)

    def test_runs_three_arms_from_its_own_head(self, plain_model_of_shapes, tmp_path):
        finished = run(small(tmp_path, model=plain_model_of_shapes, method={"name": "ft", "head": "own"}))
        for arm in ("zero_shot", "baseline", "evidence"):
            assert RunRecord.read(finished / arm).read_outcomes(finished / arm, "test").n == 24
        images = [shapes.Shapes("test", 24)[row].image for row in range(4)]
        found = EvidenceModel.from_pretrained(finished / "zero_shot" / "model").predict(images)
        outcomes = RunRecord.read(finished / "zero_shot").read_outcomes(finished / "zero_shot", "test")
        assert found.labels.tolist() == outcomes.predictions.tolist()[:4]

    def test_runs_baseline_and_evidence_from_a_random_head(self, plain_model, tmp_path):
        run_arms(
            small(
                tmp_path,
                model=plain_model,
                method={"name": "lora", "objective": "ft", "head": "random"},
                run={"arms": ["baseline", "evidence"]},
            )
        )
        assert RunRecord.read(tmp_path / "small" / "evidence").training["first_evidence_to_task_gradient_ratio"] > 0

    @pytest.mark.usefixtures("_unread")
    def test_zero_shot_without_its_classes_is_refused_before_images_are_read(self, plain_model, tmp_path):
        config = small(tmp_path, model=plain_model, method={"name": "ft", "head": "random"})
        with pytest.raises(ConfigError, match=r"no class named 'circle'.*set run\.arms to baseline and evidence"):
            run_arms(config)

    @pytest.mark.usefixtures("_unread")
    def test_a_method_that_needs_texts_is_refused_before_images_are_read(self, plain_model, tmp_path):
        config = small(tmp_path, model=plain_model, run={"arms": ["baseline", "evidence"]})
        with pytest.raises(ConfigError, match=r"method\.name = 'flcp': method flcp needs a text tower"):
            run_arms(config)


def test_torch_computes_with_the_threads_of_the_settings_for_that_long(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(experiment, "_run_arms", lambda config: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    experiment.run_arms(small(tmp_path, run={"threads": before + 1}))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
