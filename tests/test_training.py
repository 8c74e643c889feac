import pytest
import torch
from accelerate import Accelerator

from evidence_ft.alignments import outside_mass
from evidence_ft.evidence import HeatmapError, mask_to_grid, relevance_mass_accuracy
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.training import InertEvidenceError, TrainingError, extract_features, probe_gradients
from tests.conftest import build_encoder
from tests.noise import contrastive_tuning, cross_entropy_tuning, make_batch, make_inputs, make_step, weights_of


def test_the_total_is_the_task_and_the_weighted_evidence():
    step = make_step(weight=3.0)
    losses = step(make_batch(step))
    torch.testing.assert_close(losses.total, losses.task + 3 * losses.evidence)


def test_a_weight_of_the_moment_stands_in_for_the_terms_own():
    step = make_step(weight=3.0)
    losses = step(make_batch(step), weight=0.5)
    torch.testing.assert_close(losses.total, losses.task + 0.5 * losses.evidence)


def test_the_evidence_loss_is_the_mean_over_annotated_images():
    step = make_step()
    both = step(make_batch(step, rows=[0, 1])).evidence
    with_two_unannotated = step(make_batch(step, rows=[0, 1, 2, 5])).evidence
    torch.testing.assert_close(with_two_unannotated, both)


def test_weight_zero_logs_the_evidence_loss_without_a_graph():
    step = make_step(weight=0.0)
    losses = step(make_batch(step))
    assert 0 < losses.evidence < 1
    assert not losses.evidence.requires_grad
    assert torch.equal(losses.total, losses.task)


def test_each_explained_image_says_how_much_of_its_heatmap_is_on_the_evidence():
    step = make_step()
    batch = make_batch(step)
    losses = step(batch)
    trace = step.encoder.image_tower.trace(batch.images)
    _, score = step.objective(trace.features, batch.labels)
    heatmaps = gradient_attention.heatmap(trace, score, create_graph=False)
    expected = relevance_mass_accuracy(heatmaps, mask_to_grid(batch.masks, trace.grid))
    torch.testing.assert_close(losses.rma, expected, equal_nan=True)
    assert losses.rma.isnan().tolist() == [False, False, True, False, False, True]
    assert not losses.empty.any()


def test_empty_heatmaps_are_told():
    def dark(trace, score, *, create_graph):
        return gradient_attention.heatmap(trace, score, create_graph=create_graph) * 0

    step = make_step(heatmap=dark)
    assert step(make_batch(step)).empty.all()


def test_a_step_without_explanations_is_the_task_with_fused_attention():
    step = make_step()
    batch = make_batch(step)
    losses = step(batch, explain=False)
    expected, _ = step.objective(step.encoder.image_tower(batch.images), batch.labels)
    assert torch.equal(losses.total, expected)
    assert losses.evidence.isnan()
    assert len(losses.rma) == len(losses.empty) == 0


class TestSubBatch:
    """Of a batch, only some images are explained."""

    @pytest.mark.parametrize("tune", [contrastive_tuning, cross_entropy_tuning])
    def test_the_evidence_loss_is_that_of_the_chosen_images_among_the_others(self, tune):
        step = make_step(tune=tune).double()
        batch = make_batch(step, rows=[2, 0, 5, 1, 8, 11])  # two of six are annotated
        batch = batch._replace(images=batch.images.double())
        whole, part = step(batch), step(batch, explain_at_most=2)
        torch.testing.assert_close(part.evidence, whole.evidence)
        torch.testing.assert_close(part.task, whole.task)
        torch.testing.assert_close(part.rma.sort().values, whole.rma[[1, 3]].sort().values)
        for one, other in zip(gradients(step, part.total), gradients(step, whole.total), strict=True):
            torch.testing.assert_close(one, other)

    def test_as_many_are_explained_whatever_is_annotated(self):
        step = make_step()
        for rows, annotated in (([0, 1, 3, 4], 3), ([0, 2, 5, 8], 1), ([2, 5, 8, 11], 0)):
            losses = step(make_batch(step, rows), explain_at_most=3)
            assert len(losses.rma) == 3
            assert (~losses.rma.isnan()).sum() == annotated

    def test_they_are_drawn_at_random(self):
        step = make_step()
        batch = make_batch(step, rows=[0, 1, 3, 4])
        torch.manual_seed(0)
        draws = {round(step(batch, explain_at_most=1).rma.item(), 5) for _ in range(20)}
        assert len(draws) == 4

    def test_a_batch_that_is_smaller_is_explained_whole(self):
        step = make_step()
        batch = make_batch(step, rows=[0, 1])
        assert torch.equal(step(batch, explain_at_most=2).total, step(batch).total)


def gradients(step, loss):
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def test_parts_without_a_trained_parameter_stay_in_evaluation_mode():
    step = make_step(tune=cross_entropy_tuning).train()
    assert step.encoder.image_tower.training
    assert not step.encoder.model.transformer.training
    for block in step.encoder.image_tower.blocks():
        block.requires_grad_(False)
    first = step.encoder.image_tower.blocks()[0]
    first.attn.requires_grad_(True)
    step.train()
    assert first.training
    assert not any(block.training for block in step.encoder.image_tower.blocks()[1:])
    assert not step.eval().encoder.image_tower.training


class TestLiveness:
    """An evidence loss that trains nothing is told, with the reason."""

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

    def test_it_is_measured_at_the_weight_of_the_moment(self):
        step = make_step(weight=2.0)
        batch = make_batch(step)
        own, other = probe_gradients(step, batch), probe_gradients(step, batch, weight=0.5)
        assert other.evidence == pytest.approx(own.evidence / 4)
        assert other.task == pytest.approx(own.task)

    def test_it_changes_nothing(self):
        step = make_step()
        before, state = weights_of(step), torch.get_rng_state()
        probe_gradients(step, make_batch(step), explain_at_most=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], parameter) for name, parameter in step.named_parameters())
        assert all(parameter.grad is None for parameter in step.parameters())

    def test_a_heatmap_that_detaches_is_inert(self):
        def detached(trace, score, *, create_graph):
            return gradient_attention.heatmap(trace, score, create_graph=False)

        step = make_step(heatmap=detached)
        with pytest.raises(InertEvidenceError, match="create_graph=True"):
            probe_gradients(step, make_batch(step))

    def test_a_heatmap_off_the_path_is_inert(self):
        def elsewhere(trace, score, *, create_graph):
            return torch.ones(len(trace.features), *trace.grid, requires_grad=True) * 1.0

        step = make_step(heatmap=elsewhere)
        with pytest.raises(InertEvidenceError, match="does not reach any of the"):
            probe_gradients(step, make_batch(step))

    def test_heatmaps_that_are_all_empty_are_inert_until_life_was_proven(self):
        def dark(trace, score, *, create_graph):
            return gradient_attention.heatmap(trace, score, create_graph=create_graph) * 0

        step = make_step(heatmap=dark)
        with pytest.raises(InertEvidenceError, match="every heatmap is empty"):
            probe_gradients(step, make_batch(step))
        assert probe_gradients(step, make_batch(step), must_live=False).evidence == 0

    def test_a_loss_that_is_already_met_is_not_inert(self):
        def met(heatmaps, masks):
            return outside_mass.loss(heatmaps, masks) * 0

        step = make_step(alignment=met)
        assert probe_gradients(step, make_batch(step)).evidence == 0

    def test_a_gradient_that_is_not_finite_is_told(self):
        def broken(heatmaps, masks):
            return outside_mass.loss(heatmaps, masks) * float("inf")

        step = make_step(alignment=broken)
        with pytest.raises(TrainingError, match=r"gradient of the evidence loss .* is nan"):
            probe_gradients(step, make_batch(step))


def test_under_bf16_evidence_stays_float32_alive_and_close():
    step = make_step()
    batch = make_batch(step)
    exact = step(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = step(batch)
        in_parts = step(batch, explain_at_most=4)
        probe = probe_gradients(step, batch)
    assert rough.evidence.dtype == in_parts.evidence.dtype == torch.float32
    torch.testing.assert_close(rough.evidence, exact.evidence, rtol=0.05, atol=0.02)
    torch.testing.assert_close(in_parts.evidence, exact.evidence, rtol=0.05, atol=0.02)
    assert probe.evidence == pytest.approx(probe_gradients(step, batch).evidence, rel=0.2)


def test_features_of_a_training_set_come_in_the_order_of_its_rows():
    encoder = build_encoder("native")
    inputs = make_inputs(encoder, images=7)
    state = torch.get_rng_state()
    features, labels = extract_features(encoder, inputs, Accelerator(cpu=True), batch_size=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert not features.requires_grad
    for row in range(7):
        torch.testing.assert_close(features[row], encoder.image_tower(inputs[row].images[None])[0].detach())


@pytest.mark.parametrize("change", [torch.neg, lambda heatmaps: heatmaps[:, None], lambda heatmaps: None])
def test_a_function_that_gives_no_heatmaps_is_refused_and_named(change):
    def own(trace, score, *, create_graph):
        return change(gradient_attention.heatmap(trace, score, create_graph=create_graph))

    step = make_step(heatmap=own)
    with pytest.raises(HeatmapError, match=r"^the heatmap returned"):
        step(make_batch(step))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda features, labels: (features.sum(dim=1), None), r"a loss of shape \(6,\), not \(\)"),
        (lambda features, labels: (1.0, None), "a loss of type float"),
        (lambda features, labels: (features.sum(), features), "a score of type Tensor, not a function of features"),
        (
            lambda features, labels: (features.sum(), lambda f: f),
            r"score is of shape \(6, \d+\) for 6 images, not \(6,\)",
        ),
    ],
)
def test_an_objective_that_gives_no_loss_or_no_score_is_refused_and_named(objective, message):
    step = make_step()
    step.objective = objective
    with pytest.raises(TrainingError, match=message):
        step(make_batch(step))


def test_an_alignment_that_gives_no_tensor_is_refused():
    step = make_step(alignment=lambda heatmaps, masks: None)
    with pytest.raises(TrainingError, match="a loss of type NoneType for 6 images"):
        step(make_batch(step))


def test_an_alignment_that_gives_a_number_without_evidence_is_refused():
    step = make_step(alignment=lambda heatmaps, masks: outside_mass.loss(heatmaps, masks).nan_to_num())
    batch = make_batch(step, rows=[0, 2])
    with pytest.raises(TrainingError, match="a number for an image without evidence in view"):
        step(batch, weight=1.0)


def test_an_alignment_that_gives_one_loss_for_all_images_is_refused():
    step = make_step(alignment=lambda heatmaps, masks: heatmaps.mean())
    with pytest.raises(TrainingError, match=r"returned a loss of shape \(\) for \d+ images"):
        step(make_batch(step))
