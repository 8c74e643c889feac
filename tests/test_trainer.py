import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import ValidationError

from evidence_ft import checkpoints
from evidence_ft.alignments import outside_mass
from evidence_ft.checkpoints import ResumeError
from evidence_ft.evidence import relevance_mass_accuracy
from evidence_ft.files import RunFileError
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.interruption import Interrupted
from evidence_ft.outcomes import Gallery
from evidence_ft.trainer import Trainer, TrainerCallback, is_flat, shuffled
from evidence_ft.trainer_config import TrainerConfig
from evidence_ft.training import InertEvidenceError, TrainingError
from evidence_ft.transforms import Augmentation, collate
from tests.conftest import build_encoder
from tests.noise import (
    Stop,
    contrastive_tuning,
    cross_entropy_tuning,
    in_double,
    make_batch,
    make_inputs,
    make_step,
    weights_of,
)


def trainer(directory=None, callbacks=(), **settings):
    config = TrainerConfig(**{"learning_rate": 1e-3, "epochs": 2, "batch_size": 4, "augmentation": None, **settings})
    return Trainer(config, Accelerator(cpu=True), directory, callbacks)


def fit(step, directory=None, images=12, resume=False, callbacks=(), seed=0, inputs=None, **settings):
    """Two epochs of three steps, unless told otherwise."""
    options = {name: settings.pop(name) for name in ("evaluate", "panel", "sampler", "settings") if name in settings}
    inputs = inputs or make_inputs(step.encoder, settings.get("augmentation"), images)
    return trainer(directory, callbacks, **settings).fit(step, inputs, seed=seed, resume=resume, **options)


def records_in(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(first, second):
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


# What is learnt


def test_weight_zero_is_a_plain_loop_bit_for_bit():
    step = make_step(weight=0.0)
    fit(step, epochs=2, learning_rate=1e-3)
    plain = build_encoder("native")
    tuning = contrastive_tuning(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    inputs, order = make_inputs(plain), shuffled(12, seed=0)
    for rows in (*np.split(np.array(order(0)), 3), *np.split(np.array(order(1)), 3)):
        batch = collate([inputs[row] for row in rows])
        # The same explicit attention, and nothing else of the evidence.
        loss, _ = tuning.objective(plain.image_tower.trace(batch.images).features, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), float("inf"))
        optimizer.step()
        plain.constrain()
    for one, other in zip(step.encoder.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), make_step().parameters(), strict=False))


def test_at_weight_zero_neither_heatmap_nor_weighting_matter():
    def elsewhere(trace, score, *, create_graph):
        return torch.ones(len(trace.features), *trace.grid)

    first, second = make_step(weight=0.0), make_step(weight=0.0, heatmap=elsewhere)
    fit(first)
    fit(second, weighting={"kind": "rma_bound", "target": 0.9}, probe_every=1)
    assert_same_weights(first, second)


def test_the_evidence_loss_changes_what_is_learnt():
    baseline, regularised = make_step(weight=0.0), make_step(weight=1.0)
    fit(baseline)
    fit(regularised)
    batch = make_batch(baseline, rows=range(12))
    with torch.no_grad():
        before = make_step()(batch).evidence
        assert regularised(batch).evidence < min(baseline(batch).evidence, before)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    first, second, third = make_step(), make_step(), make_step()
    fit(first)
    torch.manual_seed(7)  # nothing draws from it
    fit(second)
    fit(third, seed=1)
    assert_same_weights(first, second)
    assert not torch.equal(first.encoder.logit_scale, third.encoder.logit_scale)


def test_frozen_parameters_are_untouched():
    step = make_step(tune=cross_entropy_tuning)
    before = weights_of(step)
    fit(step, weight_decay=0.1, ema=0.5)
    for name, value in step.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name


class TestOrder:
    """Which rows a step sees."""

    def test_it_is_a_permutation_that_depends_on_seed_and_epoch_alone(self):
        order = shuffled(50, seed=3)
        assert sorted(order(0)) == list(range(50))
        torch.manual_seed(1)
        assert order(1) == shuffled(50, seed=3)(1)
        assert len({tuple(shuffled(50, seed)(epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4

    def test_what_does_not_fill_a_step_is_left_out(self):
        step = make_step()
        inputs = make_inputs(step.encoder, images=14)
        assert fit(step, inputs=inputs, epochs=1).steps == 3
        assert inputs.dataset.opened == shuffled(14, seed=0)(0)[:12]

    def test_a_sampler_of_ones_own_is_followed(self):
        step = make_step()
        inputs = make_inputs(step.encoder)
        fitted = fit(step, inputs=inputs, sampler=lambda epoch: [epoch, 3, 3, 4, 6, 7, 9, 10])
        assert inputs.dataset.opened == [0, 3, 3, 4, 6, 7, 9, 10, 1, 3, 3, 4, 6, 7, 9, 10]
        assert (fitted.steps, fitted.annotated) == (4, 1.0)

    def test_a_sampler_whose_epochs_differ_in_length_is_refused(self):
        with pytest.raises(TrainingError, match="gives 8 rows for epoch 1 and gave 4 for epoch 0"):
            fit(make_step(), sampler=lambda epoch: range(4 * (epoch + 1)))

    @pytest.mark.parametrize("row", [12, -1])
    def test_a_sampler_that_gives_a_row_that_is_not_there_is_refused(self, row):
        with pytest.raises(TrainingError, match=rf"gives row {row} for epoch 0, but there are 12 .* from 0 to 11"):
            fit(make_step(), sampler=lambda epoch: [0, 1, 2, row])

    def test_worker_processes_change_nothing(self):
        alone, helped = make_step(), make_step()
        fit(alone, epochs=1, augmentation=Augmentation())
        fit(helped, epochs=1, augmentation=Augmentation(), num_workers=2)
        assert_same_weights(alone, helped)


class TestAccumulation:
    """Several batches an optimizer step."""

    @pytest.mark.parametrize("explained", [None, 1])
    def test_two_batches_of_two_are_one_of_four_for_cross_entropy_and_evidence(self, tmp_path, caplog, explained):
        # Rows 2 and 5 have no mask, so one batch of a step has two annotated images and the other one or none.
        def sampler(epoch):
            return [0, 1, 2, 3, 2, 5, 4, 6]

        large, small = make_step(tune=cross_entropy_tuning).double(), make_step(tune=cross_entropy_tuning).double()
        settings = {"epochs": 1, "sampler": sampler, "weight_decay": 0.1, "max_gradient_norm": 0.5}
        inputs = in_double(make_inputs(large.encoder))
        # With one of two explained, which one is drawn: two batches of one annotated image each leave no choice.
        if explained:
            settings["sampler"] = lambda epoch: [0, 2, 1, 5, 5, 4, 2, 3]
        fit(large, tmp_path / "large", inputs=inputs, batch_size=4, **settings)
        fit(
            small,
            tmp_path / "small",
            inputs=inputs,
            batch_size=2,
            gradient_accumulation=2,
            evidence_images=explained,
            **settings,
        )
        for one, other in zip(large.parameters(), small.parameters(), strict=True):
            torch.testing.assert_close(one, other)
        for one, other in zip(records_in(tmp_path / "large"), records_in(tmp_path / "small"), strict=True):
            one.pop("evidence_to_task_gradient_ratio", None)  # measured on one batch
            other.pop("evidence_to_task_gradient_ratio", None)
            assert one == pytest.approx(other, rel=1e-5)
        assert "contrastive loss (flcp) still compares only the 2 images of one batch" in caplog.text

    def test_its_steps_count_optimizer_steps(self):
        step = make_step()
        inputs = make_inputs(step.encoder, images=14)
        assert fit(step, inputs=inputs, batch_size=2, gradient_accumulation=3, epochs=3).steps == 6
        assert inputs.dataset.opened[:12] == shuffled(14, seed=0)(0)[:12]

    def test_accelerates_own_accumulation_is_refused(self):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        config = TrainerConfig(batch_size=2)
        step = make_step()
        with pytest.raises(TrainingError, match=r"leave them at 1 and set training\.gradient_accumulation"):
            Trainer(config, accelerator).fit(step, make_inputs(step.encoder), seed=0)


def test_fewer_images_than_a_step_takes_are_refused_with_the_largest_size_that_fits():
    with pytest.raises(TrainingError, match=r"training\.batch_size to at most 12"):
        fit(make_step(), batch_size=16)
    with pytest.raises(TrainingError, match=r"is 4 times 5 accumulated .* at most 2"):
        fit(make_step(), gradient_accumulation=5)


def test_the_average_is_an_exponential_mean_of_the_weights_from_the_start_and_is_what_remains():
    class Remember(TrainerCallback):
        def __init__(self, step):
            self.seen = [weights_of(step)]
            self.step = step

        def on_step_end(self, step, record):
            self.seen.append(weights_of(self.step))

    averaged, plain = make_step(), make_step()
    remember = Remember(averaged)
    evaluated = []
    fit(
        averaged,
        callbacks=[remember],
        ema=0.8,
        evaluate_every=3,
        evaluate=lambda: evaluated.append(weights_of(averaged)) or {},
    )
    fit(plain)
    for name, value in plain.named_parameters():
        assert torch.equal(remember.seen[-1][name], value)  # averaging leaves the trained weights alone
    for name, value in averaged.named_parameters():
        mean = remember.seen[0][name]
        for number, weights in enumerate(remember.seen[1:], start=1):
            mean = 0.8 * mean + 0.2 * weights[name]
            if number == 3:
                torch.testing.assert_close(evaluated[0][name], mean)
        torch.testing.assert_close(value, mean)


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, spared = make_step(layers=[-1]), make_step(layers=[-1])
    fit(plain, epochs=1)
    fit(spared, epochs=1, gradient_checkpointing=True)
    for one, other in zip(plain.parameters(), spared.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert not any("forward" in vars(block) for block in spared.encoder.image_tower.blocks())


def test_the_logit_scale_stays_within_its_limit():
    step = make_step()
    with torch.no_grad():
        step.encoder.logit_scale.fill_(4.605)
    fit(step, learning_rate=0.1, ema=0.5)
    assert step.encoder.logit_scale.exp() <= 100.001


# Evidence


def test_every_kth_step_has_the_evidence_loss(tmp_path):
    fit(make_step(), tmp_path, evidence_every=2, probe_every=1)
    assert [record["step"] for record in records_in(tmp_path) if "evidence_loss" in record] == [1, 3, 5]
    probed = [record["step"] for record in records_in(tmp_path) if "evidence_to_task_gradient_ratio" in record]
    assert probed == [1, 3, 5]


def test_the_weight_of_each_step_is_logged_with_its_warmup(tmp_path):
    fit(make_step(weight=2.0), tmp_path, evidence_warmup_steps=4)
    records = records_in(tmp_path)
    assert [record["evidence_weight"] for record in records] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    for record in records:
        total = record["task_loss"] + record["evidence_weight"] * record["evidence_loss"]
        assert record["total_loss"] == pytest.approx(total)


def test_a_ratio_is_met_from_the_first_step_on(tmp_path):
    fitted = fit(make_step(), tmp_path, probe_every=1, weighting={"kind": "ratio", "target": 0.25, "smoothing": 0})
    records = records_in(tmp_path)
    for record in records:
        assert record["evidence_to_task_gradient_ratio"] == pytest.approx(0.25, rel=1e-3)
    assert len({record["evidence_weight"] for record in records}) == 6
    assert fitted.weight == records[-1]["evidence_weight"]


def test_a_bound_on_the_evidence_raises_the_weight_until_it_is_met(tmp_path):
    weighting = {"kind": "rma_bound", "target": 0.9, "rate": 1.0, "smoothing": 0}
    fit(make_step(weight=0.1), tmp_path, weighting=weighting)
    records = records_in(tmp_path)
    for now, then in pairwise(records):
        assert then["evidence_weight"] == pytest.approx(now["evidence_weight"] + 0.9 - now["rma"])


def test_a_bound_on_a_metric_follows_the_evaluations(tmp_path):
    weighting = {"kind": "metric_bound", "target": 0.8, "rate": 1.0}
    fit(make_step(), tmp_path, weighting=weighting, evaluate_every=2, evaluate=lambda: {"accuracy": 0.5})
    weights = [record["evidence_weight"] for record in records_in(tmp_path)]
    assert weights == pytest.approx([1, 1, 0.7, 0.7, 0.4, 0.4])


def test_a_sub_batch_is_explained_and_the_baseline_is_not_changed_by_the_heatmap():
    def elsewhere(trace, score, *, create_graph):
        assert len(trace.features) == 2
        return torch.ones(2, *trace.grid)

    first, second = make_step(weight=0.0), make_step(weight=0.0, heatmap=elsewhere)
    for step in (first, second):
        torch.manual_seed(0)
        fit(step, evidence_images=2)
    assert_same_weights(first, second)


class TestLiveness:
    @pytest.mark.parametrize("weighting", [{}, {"kind": "ratio", "target": 0.1}])
    def test_an_evidence_loss_that_trains_nothing_stops_the_run(self, weighting):
        def detached(trace, score, *, create_graph):
            return gradient_attention.heatmap(trace, score, create_graph=False)

        with pytest.raises(InertEvidenceError, match="create_graph=True"):
            fit(make_step(heatmap=detached), weighting=weighting)

    def test_at_weight_zero_there_is_nothing_to_check(self):
        assert fit(make_step(weight=0.0), epochs=1).first_probe is None

    def test_heatmaps_that_go_dark_later_are_told_once_and_do_not_stop_it(self, caplog):
        alive = iter([True] * 4)  # a probe and a step, twice

        def dimmed(trace, score, *, create_graph):
            bright = next(alive, False)
            return gradient_attention.heatmap(trace, score, create_graph=create_graph) * (1.0 if bright else 0.0)

        fitted = fit(make_step(heatmap=dimmed), probe_every=1)
        assert fitted.steps == 6
        assert caplog.text.count("step 3: all heatmaps of the step are empty") == 1
        assert caplog.text.count("are empty") == 1


# Faults


def test_a_loss_that_is_not_finite_stops_training_with_its_samples_and_advice():
    def broken(heatmaps, masks):
        return outside_mass.loss(heatmaps, masks) * float("inf")

    rows = ", ".join(f"'noise-{row}'" for row in shuffled(12, seed=0)(0)[:4])
    advice = r"lower training\.learning_rate \(now 0\.001\), or look whether heatmap or alignment divides by zero .*"
    with pytest.raises(TrainingError, match=rf"step 1: evidence loss is inf; {advice}. Samples of the batch: {rows}"):
        fit(make_step(weight=0.0, alignment=broken))


def test_with_accumulated_batches_only_the_faulty_one_is_named():
    step = make_step(tune=cross_entropy_tuning)
    inputs = make_inputs(step.encoder)

    class OneIsBroken(type(inputs)):
        def __getitem__(self, row):
            found = super().__getitem__(row)
            return found._replace(images=found.images * float("nan")) if row == 7 else found

    broken = OneIsBroken(inputs.dataset, inputs.transform, seed=0)
    step.evidence = replace(step.evidence, weight=0.0)
    with pytest.raises(TrainingError, match=r"task loss is nan; .* Samples of the batch: 'noise-6', 'noise-7'$"):
        fit(step, inputs=broken, batch_size=2, gradient_accumulation=3, sampler=lambda epoch: [0, 1, 3, 4, 6, 7])


def test_a_gradient_that_is_not_finite_stops_training_before_the_weights_are_touched():
    step = make_step(weight=0.0, tune=cross_entropy_tuning)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    objective = step.objective
    step.objective = lambda features, labels: objective(Steep.apply(features), labels)
    before = weights_of(step)
    with pytest.raises(TrainingError, match="step 1: the norm of the gradient is nan"):
        fit(step)
    assert all(torch.equal(before[name], value) for name, value in step.named_parameters())


def test_a_heatmap_that_is_nan_does_not_pass_for_an_image_without_evidence():
    def undefined(trace, score, *, create_graph):
        return gradient_attention.heatmap(trace, score, create_graph=create_graph) * float("nan")

    with pytest.raises(TrainingError, match="step 1: evidence loss is inf"):
        fit(make_step(weight=0.0, heatmap=undefined))


def test_a_flat_task_loss_is_told_once(caplog):
    step = make_step(tune=cross_entropy_tuning)
    objective = step.objective

    def stuck(features, labels):
        loss, score = objective(features, labels)
        return loss * 0 + 1.1, score

    step.objective = stuck
    step.evidence = replace(step.evidence, weight=0.0, layers=[-1])
    fit(step, epochs=35)
    assert caplog.text.count("step 100: the task loss has been 1.1000 for 100 steps: nothing is learnt") == 1
    assert caplog.text.count("nothing is learnt") == 1


def test_losses_close_to_zero_have_got_there_by_learning():
    assert is_flat([0.5] * 100)
    assert not is_flat([0.001] * 100)


def test_a_step_without_anything_to_train_is_refused():
    step = make_step()
    step.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        fit(step)


# Logs


def test_every_step_is_logged_and_the_first_with_its_gradient_ratio(tmp_path):
    fitted = fit(make_step(), tmp_path, probe_every=3)
    records = records_in(tmp_path)
    assert [record["step"] for record in records] == list(range(1, fitted.steps + 1)) == [1, 2, 3, 4, 5, 6]
    assert records[-1]["epoch"] == 2
    probed = [record["step"] for record in records if "evidence_to_task_gradient_ratio" in record]
    assert probed == [1, 4]
    assert records[0]["evidence_to_task_gradient_ratio"] == pytest.approx(fitted.first_probe.ratio)
    expected = {"task_loss", "evidence_loss", "total_loss", "learning_rate", "gradient_norm", "evidence_weight"}
    assert expected | {"rma", "empty_heatmaps"} <= set(records[0])


def test_where_nothing_is_resumed_from_is_named_whatever_else_is_there(tmp_path):
    fit(make_step(), tmp_path)
    with pytest.raises(RunFileError, match=r"there is no checkpoint .*nowhere"):
        fit(make_step(), tmp_path, resume=tmp_path / "nowhere")


def test_a_directory_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFileError, match=r"file cannot be written to: .*; choose another folder"):
        fit(make_step(), tmp_path / "file")


def test_a_loss_that_never_pulled_is_told(caplog):
    def met(heatmaps, masks):
        return 0 * relevance_mass_accuracy(heatmaps, masks)

    fit(make_step(alignment=met))
    assert "had no gradient whenever it was looked at" in caplog.text
    caplog.clear()
    fit(make_step())
    assert "had no gradient" not in caplog.text


def test_images_without_evidence_in_view_are_counted():
    assert fit(make_step()).annotated == pytest.approx(8 / 12)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    fit(make_step(), tmp_path, warmup_steps=2, schedule="cosine", learning_rate=1.0, max_gradient_norm=1e-9)
    expected = [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]
    assert [record["learning_rate"] for record in records_in(tmp_path)] == pytest.approx(expected, abs=1e-5)


def test_a_batch_without_evidence_logs_no_evidence_loss(tmp_path):
    step = make_step(weight=0.0)
    inputs = make_inputs(step.encoder)
    inputs.dataset.mask_sources = ["none"] * len(inputs)
    fit(step, tmp_path, inputs=inputs, epochs=1)
    assert len(records_in(tmp_path)) == 3
    assert not any({"evidence_loss", "rma", "empty_heatmaps"} & set(record) for record in records_in(tmp_path))


def test_callbacks_hear_of_steps_evaluations_and_checkpoints(tmp_path):
    heard = []

    class Listen(TrainerCallback):
        def on_step_end(self, step, record):
            heard.append(("step", step, record["step"]))

        def on_evaluate(self, step, metrics):
            heard.append(("evaluate", step, metrics))

        def on_save(self, step, checkpoint):
            heard.append(("save", step, checkpoints.read(checkpoint).step))

    settings = {"evaluate_every": 2, "checkpoint_every": 2, "evaluate": lambda: {"accuracy": 0.5}}
    fit(make_step(), tmp_path, callbacks=[Listen()], epochs=1, **settings)
    assert heard == [
        ("step", 1, 1),
        ("evaluate", 2, {"accuracy": 0.5}),
        ("step", 2, 2),
        ("save", 2, 2),
        ("evaluate", 3, {"accuracy": 0.5}),
        ("step", 3, 3),
        ("save", 3, 3),
    ]


def test_trackers_get_what_the_log_gets(tmp_path):
    class Tracker:
        name = "mine"

        def __init__(self):
            self.logged = []

        def log(self, values, step):
            self.logged.append((step, values))

    tracker = Tracker()
    own = trainer(tmp_path, epochs=1)
    own.accelerator.trackers = [tracker]
    step = make_step()
    own.fit(step, make_inputs(step.encoder), seed=0)
    assert tracker.logged == [(record["step"], record) for record in records_in(tmp_path)]


def test_what_is_measured_on_the_way_does_not_change_what_is_learnt(tmp_path):
    def evaluate():
        torch.rand(3), random.random(), np.random.random()  # noqa: NPY002
        observed.encoder.image_tower.eval()
        return {"accuracy": 0.5}

    plain, observed = (make_step() for _ in range(2))
    # A tower whose training depends on mode and random state.
    for step in (plain, observed):
        step.encoder.image_tower.register_forward_hook(lambda tower, _, out: F.dropout(out, 0.5, tower.training))
        torch.manual_seed(3)
        watched = {} if step is plain else {"evaluate_every": 1, "evaluate": evaluate, "watch_every": 1}
        fit(step, tmp_path / str(step is plain), panel=make_inputs(step.encoder), **watched)
    assert_same_weights(plain, observed)


def test_a_fixed_panel_is_explained_again_and_again(tmp_path):
    step = make_step()
    dark = make_inputs(step.encoder)
    fit(step, tmp_path, panel=dark, watch_every=3, watch_images=3)
    galleries = [Gallery.read(path) for path in sorted((tmp_path / "watch").iterdir())]
    assert [path.name for path in sorted((tmp_path / "watch").iterdir())] == [
        f"step-{number:08d}.safetensors" for number in (0, 3, 6)
    ]
    assert [gallery.rows.tolist() for gallery in galleries] == [[0, 1, 3]] * 3  # annotated ones, classes in turn
    watched = {record["step"]: record for record in records_in(tmp_path) if "panel_rma" in record}
    assert list(watched) == [0, 3, 6]
    grid = galleries[1].masks.float().unflatten(1, (4, 8)).unflatten(3, (6, 8)).mean(dim=(2, 4))
    heat = galleries[1].heatmaps
    expected = ((heat * grid).sum(dim=(1, 2)) / heat.sum(dim=(1, 2))).mean()
    assert watched[3]["panel_rma"] == pytest.approx(expected.item(), rel=1e-5)
    assert watched[3]["panel_empty_heatmaps"] == 0
    assert not torch.equal(galleries[0].heatmaps, galleries[2].heatmaps)


# Early stopping


def scores(*values, name="accuracy"):
    remaining = iter(values)
    return lambda: {name: next(remaining)}


class TestEarlyStopping:
    def test_training_stops_without_improvement_with_the_weights_of_the_best_evaluation(self):
        step, until_best = make_step(), make_step()
        fitted = fit(
            step,
            evaluate=scores(0.5, 0.7, 0.7, 0.6, 0.9),
            evaluate_every=1,
            early_stopping={"patience": 2},
            learning_rate=1e-3,
        )
        assert (fitted.steps, fitted.best_step) == (4, 2)
        fit(until_best, sampler=lambda epoch: shuffled(12, 0)(0)[:8], epochs=1)
        assert_same_weights(step, until_best)

    def test_less_can_be_better_and_nan_never_is(self):
        values = scores(float("nan"), 0.5, 0.6, 0.4, float("nan"), 0.5, name="loss")
        early = {"metric": "loss", "mode": "min", "patience": 3}
        fitted = fit(make_step(), evaluate=values, evaluate_every=1, early_stopping=early)
        assert (fitted.steps, fitted.best_step) == (6, 4)

    def test_a_metric_that_the_evaluation_does_not_return_is_named(self):
        with pytest.raises(TrainingError, match=r"metric = 'accuracy', but the evaluation returns 'RR'"):
            fit(make_step(), evaluate=scores(0.1, name="RR"), evaluate_every=1, early_stopping={})

    def test_without_evaluations_it_is_refused(self):
        with pytest.raises(ValidationError, match="early_stopping needs evaluations"):
            TrainerConfig(early_stopping={})
        with pytest.raises(TrainingError, match="give fit an evaluate function"):
            fit(make_step(), evaluate_every=1)


# Interruption. What a process that is killed leaves behind is tested in test_interruption.py.

EVERYTHING = {
    "epochs": 3,
    "schedule": "cosine",
    "warmup_steps": 2,
    "ema": 0.9,
    "augmentation": Augmentation(),
    "weighting": {"kind": "ratio", "target": 0.3, "smoothing": 0.5},
    "probe_every": 2,
    "evidence_images": 2,
    "evaluate_every": 4,
    "early_stopping": {"metric": "loss", "mode": "min", "patience": 100},
    "gradient_accumulation": 2,
    "batch_size": 2,
    "weight_decay": 0.01,
}


def dropping_out(step):
    """A tower whose training depends on the random state."""
    step.encoder.image_tower.register_forward_hook(lambda tower, _, out: F.dropout(out, 0.2, tower.training))
    return step


def everything(directory, resume=False, callbacks=(), **settings):
    """Nine steps with everything that has a state; a new model each time, as in a new process."""
    step = dropping_out(make_step())
    torch.manual_seed(11 if not resume else 12)
    batch = make_batch(step)

    def evaluate():
        with torch.no_grad():
            return {"loss": step(batch, explain=False).task.item()}

    fitted = fit(step, directory, resume=resume, callbacks=callbacks, evaluate=evaluate, **{**EVERYTHING, **settings})
    return step, fitted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_interrupted_and_resumed_is_one_that_was_not_bit_for_bit(tmp_path, number):
    whole, expected = everything(tmp_path / "whole")
    stop = random.Random(int(number)).randrange(1, 9)
    with pytest.raises(Interrupted, match=f"after step {stop}; resume from") as interrupted:
        everything(tmp_path / "parts", callbacks=[Stop(stop, number)])
    assert interrupted.value.checkpoint == tmp_path / "parts" / "checkpoints" / f"step-{stop:08d}"
    assert interrupted.value.exit_code == 75
    resumed, fitted = everything(tmp_path / "parts", resume=True)
    assert_same_weights(resumed, whole)
    assert fitted._replace(seconds=0) == expected._replace(seconds=0)
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_every_step_can_be_the_last_one_before_an_interruption(tmp_path):
    whole, _ = everything(tmp_path / "whole")
    for stop in range(1, 9):
        with pytest.raises(Interrupted):
            everything(tmp_path / "parts", resume=stop > 1, callbacks=[Stop(stop)], checkpoint_every=None)
    resumed, _ = everything(tmp_path / "parts", resume=True)
    assert_same_weights(resumed, whole)
    assert [record["step"] for record in records_in(tmp_path / "parts")] == list(range(1, 10))


def test_a_resumed_epoch_does_not_load_what_is_done(tmp_path):
    with pytest.raises(Interrupted):
        fit(make_step(), tmp_path, callbacks=[Stop(2)])
    step = make_step()
    inputs = make_inputs(step.encoder)
    fit(step, tmp_path, resume=True, inputs=inputs)
    assert inputs.dataset.opened == shuffled(12, seed=0)(0)[8:] + shuffled(12, seed=0)(1)


def test_steps_after_the_checkpoint_are_logged_once(tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, step, record):
            if step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_step(), tmp_path, checkpoint_every=2, callbacks=[Die()])
    assert [record["step"] for record in records_in(tmp_path)] == [1, 2, 3, 4, 5]
    fit(make_step(), tmp_path, checkpoint_every=2, resume=True)
    assert [record["step"] for record in records_in(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_was_killed_before_its_first_checkpoint_starts_over(tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, step, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_step(), tmp_path, checkpoint_every=2, callbacks=[Die()])
    assert fit(make_step(), tmp_path, checkpoint_every=2, resume=True).steps == 6
    assert [record["step"] for record in records_in(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_metrics_of_another_training_are_not_overwritten_when_there_is_no_checkpoint(tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, step, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_step(), tmp_path, callbacks=[Die()])
    with pytest.raises(ResumeError, match=r"metrics\.jsonl was written with other settings: seed was 0, is 1"):
        fit(make_step(), tmp_path, resume=True, seed=1)
    checkpoints.remove_all(tmp_path / "checkpoints")
    with pytest.raises(
        ResumeError, match=r"no checkpoint in .* to resume from, and .*metrics\.jsonl may be of another"
    ):
        fit(make_step(), tmp_path, resume=True)
    assert len(records_in(tmp_path)) == 1


@pytest.mark.parametrize("every", [4, None])
def test_a_finished_training_that_is_resumed_is_finished_at_once(tmp_path, every):
    whole, expected = everything(tmp_path, checkpoint_every=every)
    seconds = checkpoints.read_latest(tmp_path / "checkpoints").state["progress"]["seconds"]
    resumed, fitted = everything(tmp_path, checkpoint_every=every, resume=True)
    assert fitted._replace(seconds=0) == expected._replace(seconds=0)
    assert 0 < seconds <= min(fitted.seconds, expected.seconds)  # those before the interruption count
    assert_same_weights(resumed, whole)


def test_training_that_stopped_early_stays_stopped(tmp_path):
    early = {"evaluate_every": 1, "early_stopping": {"patience": 1}, "checkpoint_every": 5}
    first, second = make_step(), make_step()
    fit(first, tmp_path, evaluate=scores(0.5, 0.4), **early)
    fitted = fit(second, tmp_path, resume=True, evaluate=scores(), **early)
    assert (fitted.steps, fitted.best_step) == (2, 1)
    assert_same_weights(first, second)


def test_checkpoints_are_written_at_intervals_and_at_the_end_and_old_ones_go(tmp_path):
    fit(make_step(), tmp_path, checkpoint_every=2, keep_checkpoints=3, epochs=3)
    names = [path.name for path in checkpoints.all_in(tmp_path / "checkpoints")]
    assert names == ["step-00000006", "step-00000008", "step-00000009"]


def test_from_an_older_checkpoint_the_later_ones_are_forgotten(tmp_path):
    whole, again = make_step(), make_step()
    fit(whole, tmp_path, checkpoint_every=2, keep_checkpoints=3)
    fit(again, tmp_path, checkpoint_every=2, keep_checkpoints=3, resume=tmp_path / "checkpoints" / "step-00000002")
    assert_same_weights(whole, again)
    assert [record["step"] for record in records_in(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(tmp_path):
    whole, again = make_step(), make_step()
    fit(whole, tmp_path, checkpoint_every=2, keep_checkpoints=3)
    (tmp_path / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunFileError, match="step-00000006 is damaged"):
        fit(make_step(), tmp_path, resume=tmp_path / "checkpoints" / "step-00000006")
    fit(again, tmp_path, checkpoint_every=2, resume=True)
    assert_same_weights(whole, again)


class TestOtherSettings:
    """A training goes on with what it began with, or not at all."""

    @pytest.fixture
    def interrupted(self, tmp_path):
        with pytest.raises(Interrupted):
            fit(make_step(), tmp_path, callbacks=[Stop(2)], settings={"method": {"name": "flcp"}})
        return tmp_path

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"learning_rate": 1e-2}, r"training\.learning_rate was 0\.001, is 0\.01"),
            ({"augmentation": Augmentation(flip=False)}, r"training\.augmentation was None, is not set"),
            ({"seed": 1}, "seed was 0, is 1"),
            ({"images": 15}, r"data\.fingerprint was .*; data\.rows was 12, is 15"),
            ({"settings": {"method": {"name": "ft"}}}, r"method\.name was 'flcp', is 'ft'"),
        ],
    )
    def test_each_is_refused_by_its_name(self, interrupted, changed, message):
        with pytest.raises(ResumeError, match=message):
            fit(make_step(), interrupted, resume=True, **{"settings": {"method": {"name": "flcp"}}, **changed})

    def test_so_is_another_evidence_term(self, interrupted):
        with pytest.raises(ResumeError, match=r"evidence\.weight was 1\.0, is 2\.0; resume with those"):
            fit(make_step(weight=2.0), interrupted, resume=True, settings={"method": {"name": "flcp"}})

    def test_so_are_other_frozen_weights(self, tmp_path):
        with pytest.raises(Interrupted):
            fit(make_step(tune=cross_entropy_tuning), tmp_path, callbacks=[Stop(2)])
        step = make_step(tune=cross_entropy_tuning)
        with torch.no_grad():
            step.encoder.logit_scale.add_(0.1)
        with pytest.raises(ResumeError, match=r"weights\.frozen_sha256 was"):
            fit(step, tmp_path, resume=True)

    def test_what_does_not_decide_what_is_learnt_may_change(self, interrupted):
        changed = {"checkpoint_every": 1, "keep_checkpoints": 1, "num_workers": 1}
        fit(make_step(), interrupted, resume=True, settings={"method": {"name": "flcp"}}, **changed)

    def test_a_new_training_does_not_overwrite_it(self, interrupted):
        with pytest.raises(ResumeError, match="holds an earlier training; resume it, or choose another directory"):
            fit(make_step(), interrupted)


class TestSignals:
    def test_handlers_are_those_of_before_afterwards(self):
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(Interrupted, match="nothing was saved: the trainer has no directory"):
            fit(make_step(), callbacks=[Stop(1)])
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before

    @pytest.fixture
    def _heard(self):
        """A process that a shell put into the background ignores Ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.usefixtures("_heard")
    def test_a_second_ctrl_c_stops_at_once(self):
        before = signal.getsignal(signal.SIGINT)

        class Twice(TrainerCallback):
            def on_step_end(self, step, record):
                os.kill(os.getpid(), signal.SIGINT)
                while signal.getsignal(signal.SIGINT) is not before:  # two at once may count as one
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)

        with pytest.raises(KeyboardInterrupt):
            fit(make_step(), callbacks=[Twice()])

    def test_away_from_the_main_thread_training_leaves_signals_alone(self):
        done = []
        thread = threading.Thread(target=lambda: done.append(fit(make_step(), epochs=1)))
        thread.start()
        thread.join()
        assert done[0].steps == 3


def test_to_resume_there_must_be_a_directory():
    with pytest.raises(TrainingError, match="the trainer has no directory"):
        fit(make_step(), resume=True)
