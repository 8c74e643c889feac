import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from evidence_ft.alignments import outside_mass
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import flcp
from evidence_ft.samples import Sample
from evidence_ft.training import (
    EvidenceTerm,
    InertEvidenceError,
    Trainer,
    TrainerConfig,
    TrainingError,
    TrainingStep,
    probe_gradients,
)
from evidence_ft.transforms import ModelInputs, SampleTransform, collate
from tests.conftest import build_encoder

NAMES = ("cat", "dog", "fox")


class Noise:
    """Random images of which every third has no mask. An `EvidenceDataset`."""

    class_names = NAMES

    def __init__(self, images=12):
        self.sample_ids = [f"noise-{row}" for row in range(images)]
        self.labels = [row % 3 for row in range(images)]
        self.mask_sources = ["none" if row % 3 == 2 else "mask" for row in range(images)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        generator = np.random.default_rng(row)
        image = Image.fromarray(generator.integers(0, 256, (32, 48, 3), dtype=np.uint8))
        mask = None
        if self.mask_sources[row] != "none":
            mask = np.zeros((32, 48), np.uint8)
            mask[8:24, 8:32] = 1
        return Sample(self.sample_ids[row], image, self.labels[row], mask, self.mask_sources[row])


def make_step(weight=1.0, heatmap=gradient_attention.heatmap, alignment=outside_mass.loss, layers="all"):
    encoder = build_encoder("native")
    tuning = flcp.prepare(encoder, NAMES, flcp.Config())
    return TrainingStep(tuning, EvidenceTerm(heatmap, alignment, layers, weight))


def make_inputs(encoder, augmentation=None, images=12):
    return ModelInputs(Noise(images), SampleTransform(encoder.preprocessing, augmentation), seed=0)


def make_batch(step, rows=range(6)):
    inputs = make_inputs(step.encoder)
    return collate([inputs[row] for row in rows])


def fit(step, tmp_path=None, **settings):
    config = TrainerConfig(**{"learning_rate": 1e-3, "epochs": 2, "batch_size": 4, "augmentation": None, **settings})
    metrics = tmp_path / "metrics.jsonl" if tmp_path else None
    return Trainer(config, Accelerator(cpu=True), metrics).fit(step, make_inputs(step.encoder), seed=0)


def weights_of(step):
    return {name: parameter.detach().clone() for name, parameter in step.named_parameters()}


def test_the_total_is_the_task_and_the_weighted_evidence():
    step = make_step(weight=3.0)
    losses = step(make_batch(step))
    torch.testing.assert_close(losses.total, losses.task + 3 * losses.evidence)


def test_the_evidence_loss_is_the_mean_over_annotated_images():
    step = make_step()
    both = step(make_batch(step, rows=[0, 1])).evidence
    with_two_unannotated = step(make_batch(step, rows=[0, 1, 2, 5])).evidence
    torch.testing.assert_close(with_two_unannotated, both)


def test_weight_zero_is_the_baseline_a_plain_loop_gives():
    step = make_step(weight=0.0)
    fit(step, epochs=1)
    plain = build_encoder("native")
    tuning = flcp.prepare(plain, NAMES, flcp.Config())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    inputs = make_inputs(plain)
    # The order a DataLoader draws from this seed.
    loader = torch.utils.data.DataLoader(
        inputs, batch_size=4, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0)
    )
    for batch in loader:
        loss, _ = tuning.objective(plain.image_tower(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Not weight by weight: the gradient of a key's bias is zero but for rounding, which AdamW scales up to a full step.
    images = make_batch(step, rows=range(12)).images
    torch.testing.assert_close(step.encoder.image_tower(images), plain.image_tower(images), rtol=1e-3, atol=1e-4)
    moved = step.encoder.image_tower(images) - build_encoder("native").image_tower(images)
    assert moved.abs().max() > 0.1


def test_weight_zero_logs_the_evidence_loss_without_a_graph():
    step = make_step(weight=0.0)
    losses = step(make_batch(step))
    assert 0 < losses.evidence < 1
    assert not losses.evidence.requires_grad
    assert torch.equal(losses.total, losses.task)


def test_the_evidence_loss_changes_what_is_learnt():
    baseline, regularised = make_step(weight=0.0), make_step(weight=1.0)
    fit(baseline)
    fit(regularised)
    batch = make_batch(baseline, rows=range(12))
    with torch.no_grad():
        before = make_step()(batch).evidence
        assert regularised(batch).evidence < min(baseline(batch).evidence, before)


def test_the_same_seed_gives_the_same_weights():
    first, second = make_step(), make_step()
    fit(first)
    fit(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_every_step_is_logged_and_the_first_with_its_gradient_ratio(tmp_path):
    fitted = fit(make_step(), tmp_path, probe_every=3)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, fitted.steps + 1)) == [1, 2, 3, 4, 5, 6]
    assert records[-1]["epoch"] == 2
    probed = [record["step"] for record in records if "evidence_to_task_gradient_ratio" in record]
    assert probed == [1, 4]
    assert records[0]["evidence_to_task_gradient_ratio"] == pytest.approx(fitted.first_probe.ratio)
    expected = {"task_loss", "evidence_loss", "total_loss", "learning_rate", "gradient_norm"}
    assert expected <= set(records[0])


def test_images_without_evidence_in_view_are_counted():
    assert fit(make_step()).annotated == pytest.approx(8 / 12)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    fit(make_step(), tmp_path, warmup_steps=2, schedule="cosine", learning_rate=1.0, max_gradient_norm=1e-9)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]
    assert [record["learning_rate"] for record in records] == pytest.approx(expected, abs=1e-5)


class TestLiveness:
    """An evidence loss that trains nothing stops the run, with the reason."""

    def test_a_live_loss_passes_and_its_ratio_is_that_of_the_norms(self):
        step = make_step(weight=2.0)
        batch = make_batch(step)
        probe = probe_gradients(step, batch)
        for name, expected in (("task", probe.task), ("evidence", probe.evidence)):
            step.zero_grad()
            losses = step(batch)
            (losses.task if name == "task" else 2 * losses.evidence).backward()
            squares = [p.grad.square().sum() for p in step.parameters() if p.grad is not None]
            assert torch.stack(squares).sum().sqrt().item() == pytest.approx(expected, rel=1e-4)
        assert probe.ratio == pytest.approx(probe.evidence / probe.task)

    def test_it_changes_nothing(self):
        step = make_step()
        before, state = weights_of(step), torch.get_rng_state()
        probe_gradients(step, make_batch(step))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], parameter) for name, parameter in step.named_parameters())
        assert all(parameter.grad is None for parameter in step.parameters())

    def test_a_heatmap_that_detaches_is_inert(self):
        def detached(trace, score, *, create_graph):
            return gradient_attention.heatmap(trace, score, create_graph=False)

        with pytest.raises(InertEvidenceError, match="create_graph=True"):
            fit(make_step(heatmap=detached))

    def test_a_heatmap_off_the_path_is_inert(self):
        def elsewhere(trace, score, *, create_graph):
            return torch.ones(len(trace.features), *trace.grid, requires_grad=True) * 1.0

        with pytest.raises(InertEvidenceError, match="does not reach any of the"):
            fit(make_step(heatmap=elsewhere))

    def test_heatmaps_that_are_all_empty_are_inert(self):
        def dark(trace, score, *, create_graph):
            return gradient_attention.heatmap(trace, score, create_graph=create_graph) * 0

        with pytest.raises(InertEvidenceError, match="every heatmap is empty"):
            fit(make_step(heatmap=dark))

    def test_at_weight_zero_there_is_nothing_to_check(self):
        assert fit(make_step(weight=0.0), epochs=1).first_probe is None


def test_a_loss_that_is_not_finite_stops_training_with_advice():
    def broken(heatmaps, masks):
        return outside_mass.loss(heatmaps, masks) * float("inf")

    with pytest.raises(TrainingError, match=r"gradient of the evidence loss .* is nan"):
        fit(make_step(alignment=broken))
    with pytest.raises(TrainingError, match=r"step 1: evidence loss is inf; lower training\.learning_rate"):
        fit(make_step(weight=0.0, alignment=broken))


def test_a_heatmap_that_is_nan_does_not_pass_for_an_image_without_evidence():
    def undefined(trace, score, *, create_graph):
        return gradient_attention.heatmap(trace, score, create_graph=create_graph) * float("nan")

    with pytest.raises(TrainingError, match="step 1: evidence loss is inf"):
        fit(make_step(weight=0.0, heatmap=undefined))


def test_a_batch_without_evidence_logs_no_evidence_loss(tmp_path):
    step = make_step(weight=0.0)
    inputs = make_inputs(step.encoder)
    inputs.dataset.mask_sources = ["none"] * len(inputs)
    Trainer(TrainerConfig(epochs=1, batch_size=4), Accelerator(cpu=True), tmp_path / "m.jsonl").fit(
        step, inputs, seed=0
    )
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert records
    assert not any("evidence_loss" in record for record in records)


def test_fewer_images_than_a_batch_are_refused_with_the_largest_size_that_fits():
    with pytest.raises(TrainingError, match=r"training\.batch_size to at most 12"):
        fit(make_step(), batch_size=16)


def test_under_bf16_evidence_stays_float32_alive_and_close():
    step = make_step()
    batch = make_batch(step)
    exact = step(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = step(batch)
        probe = probe_gradients(step, batch)
    assert rough.evidence.dtype == torch.float32
    torch.testing.assert_close(rough.evidence, exact.evidence, rtol=0.05, atol=0.02)
    assert probe.evidence == pytest.approx(probe_gradients(step, batch).evidence, rel=0.2)
