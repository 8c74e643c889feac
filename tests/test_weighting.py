"""Every sequence here can be followed with pencil and paper."""

import math

import pytest
from pydantic import ValidationError

from evidence_ft.weighting import EvidenceWeight, Weighting, WeightState


def values_after(weight, news):
    """The weight after each piece of news."""
    values = []
    for piece in news:
        piece(weight)
        values.append(weight.state.value)
    return values


def step(task_loss=math.nan, mean_rma=math.nan):
    return lambda weight: weight.saw_step(task_loss=task_loss, mean_rma=mean_rma)


def test_a_fixed_weight_hears_nothing():
    weight = EvidenceWeight(Weighting(), start=200.0)
    news = [step(1.0, 0.1), lambda w: w.saw_probe(5.0), lambda w: w.saw_evaluation({})]
    assert values_after(weight, news) == [200.0] * 3


def test_a_weight_grows_linearly_over_its_warmup():
    weight = EvidenceWeight(Weighting(), start=2.0, warmup_steps=4)
    assert [weight.at(number) for number in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


class TestRatio:
    def test_without_smoothing_the_target_is_met_at_once(self):
        weight = EvidenceWeight(Weighting(kind="ratio", target=0.5, smoothing=0), start=1.0)
        weight.saw_probe(0.25)  # at weight 1, so 2 is wanted
        assert weight.state.value == pytest.approx(2.0)
        weight.saw_probe(0.25)  # at weight 2
        assert weight.state.value == pytest.approx(4.0)
        weight.saw_probe(0.5)
        assert weight.state.value == pytest.approx(4.0)

    def test_it_is_smoothed_in_the_logarithm(self):
        weight = EvidenceWeight(Weighting(kind="ratio", target=1.0, smoothing=0.5), start=1.0)
        weight.saw_probe(0.25)  # 4 is wanted, and nothing was before
        weight.saw_probe(4.0)  # at weight 4, so 1 is wanted: halfway between log 4 and log 1 is log 2
        assert weight.state.value == pytest.approx(2.0)

    def test_it_stays_within_its_limits_and_recovers(self):
        config = Weighting(kind="ratio", target=1.0, smoothing=0, smallest=0.5, largest=3.0)
        weight = EvidenceWeight(config, start=1.0)
        news = [lambda w: w.saw_probe(0.01), lambda w: w.saw_probe(100.0), lambda w: w.saw_probe(0.5)]
        assert values_after(weight, news) == pytest.approx([3.0, 0.5, 1.0])

    @pytest.mark.parametrize("ratio", [0.0, math.nan, math.inf])
    def test_a_gradient_that_says_nothing_changes_nothing(self, ratio):
        weight = EvidenceWeight(Weighting(kind="ratio", target=1.0), start=1.5)
        weight.saw_probe(ratio)
        assert weight.state == WeightState(1.5, None)


class TestBounds:
    def test_too_little_evidence_raises_the_weight_and_enough_lowers_it_to_zero(self):
        weight = EvidenceWeight(Weighting(kind="rma_bound", target=0.6, smoothing=0, rate=1.0), start=0.1)
        news = [step(mean_rma=0.4), step(mean_rma=0.6), step(mean_rma=0.8), step(mean_rma=0.9)]
        assert values_after(weight, news) == pytest.approx([0.3, 0.3, 0.1, 0.0])

    def test_the_evidence_is_smoothed_before_it_is_compared(self):
        weight = EvidenceWeight(Weighting(kind="rma_bound", target=0.5, smoothing=0.5, rate=1.0), start=1.0)
        # Running means 0.3, 0.5 and 0.6.
        news = [step(mean_rma=0.3), step(mean_rma=0.7), step(mean_rma=0.7)]
        assert values_after(weight, news) == pytest.approx([1.2, 1.2, 1.1])

    def test_a_step_without_evidence_in_view_changes_nothing(self):
        weight = EvidenceWeight(Weighting(kind="rma_bound", target=0.5), start=1.0)
        weight.saw_step(task_loss=0.3, mean_rma=math.nan)
        assert weight.state == WeightState(1.0, None)

    def test_a_task_loss_above_its_bound_lowers_the_weight_and_never_raises_it_above_its_start(self):
        weight = EvidenceWeight(Weighting(kind="task_bound", target=1.0, smoothing=0, rate=0.5), start=1.0)
        news = [
            step(task_loss=2.0),
            step(task_loss=3.0),
            step(task_loss=0.5),
            step(task_loss=0.0),
            step(0.0),
            step(0.0),
        ]
        assert values_after(weight, news) == pytest.approx([0.5, 0.0, 0.25, 0.75, 1.0, 1.0])

    def test_a_smallest_weight_does_not_raise_it_above_its_start(self):
        weight = EvidenceWeight(Weighting(kind="task_bound", target=1.0, smoothing=0, smallest=0.1), start=0.05)
        weight.saw_step(task_loss=2.0, mean_rma=math.nan)
        assert weight.state.value == 0.05

    def test_a_metric_below_its_bound_lowers_the_weight(self):
        weight = EvidenceWeight(Weighting(kind="metric_bound", target=0.8, rate=2.0, metric="RR"), start=1.0)
        weight.saw_evaluation({"RR": 0.7, "accuracy": 0.9})
        assert weight.state.value == pytest.approx(0.8)
        with pytest.raises(ValueError, match=r"metric = 'RR', but the evaluation returns \['accuracy'\]"):
            weight.saw_evaluation({"accuracy": 0.9})


@pytest.mark.parametrize("kind", ["fixed", "ratio", "rma_bound", "task_bound", "metric_bound"])
def test_a_baseline_stays_one(kind):
    target = None if kind == "fixed" else 0.5
    weight = EvidenceWeight(Weighting(kind=kind, target=target, smallest=0.1), start=0.0)
    weight.saw_probe(0.01)
    weight.saw_step(task_loss=0.1, mean_rma=0.1)
    weight.saw_evaluation({"accuracy": 0.9})
    assert weight.at(10) == 0


@pytest.mark.parametrize("kind", ["ratio", "rma_bound", "task_bound"])
def test_a_weight_with_another_ones_state_goes_the_same_way(kind):
    def news(number):
        return [lambda w: w.saw_probe(0.1 * number), step(task_loss=0.2 * number, mean_rma=0.1 * number)]

    config = Weighting(kind=kind, target=0.5, smoothing=0.7)
    whole, first, second = (EvidenceWeight(config, start=1.0) for _ in range(3))
    for number in range(1, 8):
        values_after(whole, news(number))
        values_after(first if number < 4 else second, news(number))
        if number == 3:
            second.state = first.state
    assert second.state == whole.state


def test_a_weight_that_follows_something_needs_to_know_what():
    with pytest.raises(ValidationError, match="kind 'ratio' has no target"):
        Weighting(kind="ratio")
    with pytest.raises(ValidationError, match=r"target is 0\.5, but a fixed weight follows none"):
        Weighting(target=0.5)
    with pytest.raises(ValidationError, match=r"target 1\.5; an RMA is at most 1"):
        Weighting(kind="rma_bound", target=1.5)
    with pytest.raises(ValidationError, match=r"smallest is 2\.0, above largest"):
        Weighting(smallest=2.0, largest=1.0)
