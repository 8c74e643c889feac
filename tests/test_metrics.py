"""Rates by hand, by definition and by other libraries; intervals against SciPy's."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torchmetrics.functional import classification

from evidence_ft import metrics
from evidence_ft.metrics import Interval, Rationality, RatioStatistic

NAN = float("nan")


def rationality_by_definition(correct, rma, threshold):
    """Wang et al. 2025, image by image: slow, and too plain to be wrong."""
    counts = {"RR": 0, "RW": 0, "WR": 0, "WW": 0}
    for right, mass in zip(correct.tolist(), rma.tolist(), strict=True):
        if math.isnan(mass):
            continue
        counts[("R" if right else "W") + ("R" if mass >= threshold else "W")] += 1
    return counts


def bootstrap_by_definition(statistics, draws):
    """Each replicate literally built from its images."""
    rates = {name: [] for name in statistics}
    for drawn in draws:
        for name, (numerator, denominator) in statistics.items():
            above = sum(float(numerator[i]) for i in drawn)
            below = sum(float(denominator[i]) for i in drawn)
            rates[name].append(above / below if below else NAN)
    return rates


def a_test_set(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(n, generator=generator) < 0.7
    rma = torch.rand(n, generator=generator)
    rma[torch.rand(n, generator=generator) < 0.2] = NAN
    swapped = (torch.rand(n, generator=generator) < 0.5).float()
    swapped[::7] = NAN
    return correct, rma, swapped


def test_quadrants_and_rates_by_hand():
    correct = torch.tensor([True, True, True, False, False, False, True])
    rma = torch.tensor([0.9, 0.8, 0.1, 0.7, 0.2, 0.0, NAN])
    counts = metrics.rationality(correct, rma)
    assert counts == Rationality(RR=2, RW=1, WR=1, WW=2)
    assert counts.total == 6
    assert counts.accuracy == 3 / 6
    assert counts.PT == 2 / 3
    assert counts.IR == 2 / 3
    assert counts.RR_share == 2 / 6


@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.0])
def test_rationality_matches_its_definition(threshold):
    correct, rma, _ = a_test_set(200)
    assert metrics.rationality(correct, rma, threshold)._asdict() == rationality_by_definition(correct, rma, threshold)


def test_exactly_half_is_valid():
    correct = torch.tensor([True, True])
    assert metrics.rationality(correct, torch.tensor([0.5, 0.4999999])).RR == 1


def test_the_share_right_for_the_right_reasons_is_accuracy_times_pt():
    correct, rma, _ = a_test_set(200)
    counts = metrics.rationality(correct, rma)
    assert counts.RR_share == pytest.approx(counts.accuracy * counts.PT)


def test_images_without_evidence_are_left_out():
    correct, rma, _ = a_test_set()
    kept = ~rma.isnan()
    assert metrics.rationality(correct, rma) == metrics.rationality(correct[kept], rma[kept])


def test_rates_over_nothing_are_nan():
    nothing = Rationality(0, 0, 0, 0)
    assert all(math.isnan(rate) for rate in (nothing.accuracy, nothing.PT, nothing.IR, nothing.RR_share))
    assert math.isnan(Rationality(RR=0, RW=0, WR=3, WW=1).PT)
    assert math.isnan(Rationality(RR=0, RW=2, WR=0, WW=1).IR)
    assert math.isnan(metrics.accuracy(torch.zeros(0, dtype=torch.bool)))


def test_accuracy_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (97,), generator=generator)
    predictions = torch.where(torch.rand(97, generator=generator) < 0.6, labels, (labels + 1) % 5)
    expected = classification.multiclass_accuracy(predictions, labels, num_classes=5, average="micro")
    assert metrics.accuracy(predictions == labels) == pytest.approx(expected.item(), abs=1e-6)


def test_pt_and_ir_are_the_recall_and_precision_torchmetrics_knows():
    correct, rma, _ = a_test_set(200)
    kept = ~rma.isnan()
    valid, right = (rma[kept] >= 0.5).int(), correct[kept].int()
    counts = metrics.rationality(correct, rma)
    torch.testing.assert_close(torch.tensor(counts.PT), classification.binary_recall(valid, right))
    torch.testing.assert_close(torch.tensor(counts.IR), classification.binary_precision(valid, right))


@pytest.mark.parametrize(
    ("correct", "rma", "threshold", "error", "message"),
    [
        ([1, 0], [0.5, 0.5], 0.5, TypeError, "expected torch.bool"),
        ([[True]], [[0.5]], 0.5, ValueError, r"correct has shape \(1, 1\)"),
        ([True, False], [0.5], 0.5, ValueError, r"rma of shape \(1,\) does not match 2 images"),
        ([True, False], [0.5, 1.5], 0.5, ValueError, "rma has 1.5, expected shares"),
        ([True, False], [-0.1, 0.5], 0.5, ValueError, "rma has -0.1, expected shares"),
        ([True], [0.5], 0.0, ValueError, "threshold = 0.0, expected above 0"),
        ([True], [0.5], 1.1, ValueError, "threshold = 1.1, expected above 0"),
    ],
)
def test_what_cannot_be_counted_is_refused(correct, rma, threshold, error, message):
    with pytest.raises(error, match=message):
        metrics.rationality(torch.tensor(correct), torch.tensor(rma), threshold)
    with pytest.raises(error, match=message):
        metrics.ratio_statistics(torch.tensor(correct), torch.tensor(rma), threshold=threshold)


def test_rounding_beyond_one_is_not_refused():
    assert metrics.rationality(torch.tensor([True]), torch.tensor([1.0 + 2e-7])).RR == 1


def test_a_uniform_heatmap_is_worth_nothing_and_a_perfect_one_everything():
    share = torch.tensor([0.25, 0.5, 0.9])
    torch.testing.assert_close(metrics.chance_corrected_rma(share, share), torch.zeros(3))
    torch.testing.assert_close(metrics.chance_corrected_rma(torch.ones(3), share), torch.ones(3))


def test_chance_correction_by_hand():
    rma, share = torch.tensor([0.6, 0.0, NAN, 1.0]), torch.tensor([0.2, 0.2, NAN, 1.0])
    expected = torch.tensor([0.5, -0.25, NAN, NAN])
    torch.testing.assert_close(metrics.chance_corrected_rma(rma, share), expected, equal_nan=True)


def test_chance_correction_needs_a_share_for_each_rma():
    with pytest.raises(ValueError, match=r"mask_share of shape \(1,\) does not match 2 images"):
        metrics.chance_corrected_rma(torch.tensor([0.5, 0.5]), torch.tensor([0.5]))


def test_ratio_statistics_are_the_rates():
    correct, rma, swapped = a_test_set(200)
    rates = metrics.ratio_statistics(correct, rma, swapped)
    counts = metrics.rationality(correct, rma)
    assert {name: rate.value for name, rate in rates.items()} == {
        "accuracy": metrics.accuracy(correct),
        "PT": counts.PT,
        "IR": counts.IR,
        "RR": counts.RR_share,
        "mean_RMA": pytest.approx(rma.nanmean().item(), abs=1e-6),
        "swapped_accuracy": pytest.approx(swapped.nanmean().item()),
    }


def test_without_swapped_images_their_accuracy_is_nan():
    correct, rma, _ = a_test_set()
    assert math.isnan(metrics.ratio_statistics(correct, rma)["swapped_accuracy"].value)


def test_swapped_predictions_must_match_the_images():
    correct, rma, swapped = a_test_set()
    with pytest.raises(ValueError, match=r"swapped_correct of shape \(39,\) does not match 40"):
        metrics.ratio_statistics(correct, rma, swapped[1:])


def test_replicates_match_their_definition():
    n, replicates = 40, 50
    statistics = metrics.ratio_statistics(*a_test_set(n))
    draws = torch.randint(n, (replicates, n), generator=torch.Generator().manual_seed(3)).tolist()
    expected = bootstrap_by_definition(statistics, draws)
    for name, drawn in metrics.replicate(statistics, replicates=replicates, seed=3).items():
        torch.testing.assert_close(drawn, torch.tensor(expected[name]).double(), atol=1e-6, rtol=0)


def test_chunks_do_not_change_the_replicates(monkeypatch):
    statistics = metrics.ratio_statistics(*a_test_set())
    whole = metrics.replicate(statistics, replicates=100, seed=1)
    monkeypatch.setattr(metrics, "_ELEMENTS_IN_A_CHUNK", 7 * 40)
    torch.testing.assert_close(
        metrics.replicate(statistics, replicates=100, seed=1), whole, rtol=1e-12, atol=0, equal_nan=True
    )


def test_the_seed_decides():
    statistics = metrics.ratio_statistics(*a_test_set())
    first, again, other = (metrics.bootstrap(statistics, replicates=200, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["mean_RMA"] != other["mean_RMA"]


def test_identical_models_differ_by_nothing():
    statistics = metrics.ratio_statistics(*a_test_set())
    differences = metrics.paired_bootstrap(statistics, statistics, replicates=200)
    assert {interval[:3] for interval in differences.values()} == {(0.0, 0.0, 0.0)}


def test_what_both_models_share_cancels():
    correct, rma, _ = a_test_set(200)
    first = metrics.ratio_statistics(correct, rma)
    second = metrics.ratio_statistics(correct.clone().index_fill(0, torch.arange(5), True), rma)
    paired = metrics.paired_bootstrap(first, second, replicates=1000)["accuracy"]
    alone = metrics.bootstrap(first, replicates=1000)["accuracy"]
    assert paired.high - paired.low < (alone.high - alone.low) / 3


def pt_difference(correct_a, valid_a, correct_b, valid_b, axis=-1):
    pt_a = (correct_a * valid_a).sum(axis=axis) / correct_a.sum(axis=axis)
    return (correct_b * valid_b).sum(axis=axis) / correct_b.sum(axis=axis) - pt_a


def test_the_interval_of_a_pt_difference_agrees_with_scipy():
    n, rng = 300, np.random.default_rng(0)
    correct_a, correct_b = rng.random(n) < 0.8, rng.random(n) < 0.75
    rma_a = rng.random(n)
    rma_b = np.clip(rma_a + rng.normal(0.1, 0.2, n), 0, 1)
    first = metrics.ratio_statistics(torch.tensor(correct_a), torch.tensor(rma_a))
    second = metrics.ratio_statistics(torch.tensor(correct_b), torch.tensor(rma_b))
    ours = metrics.paired_bootstrap(first, second, replicates=10_000)["PT"]
    theirs = scipy.stats.bootstrap(
        (correct_a, rma_a >= 0.5, correct_b, rma_b >= 0.5),
        pt_difference,
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    # Two independent sets of 10,000 draws: their percentiles differ by a few per cent of the width.
    tolerance = 0.05 * (theirs.high - theirs.low)
    assert ours.estimate == pytest.approx(float(pt_difference(correct_a, rma_a >= 0.5, correct_b, rma_b >= 0.5)))
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator, covered, sets = torch.Generator().manual_seed(0), 0, 200
    for seed in range(sets):
        correct = torch.rand(150, generator=generator) < 0.8
        rma = torch.where(torch.rand(150, generator=generator) < 0.6, 0.9, 0.1)  # PT is 0.6 in truth
        interval = metrics.bootstrap(metrics.ratio_statistics(correct, rma), replicates=500, seed=seed)["PT"]
        covered += interval.low <= 0.6 <= interval.high
    # 0.95 of 200, give or take four standard errors; percentile intervals run a little short.
    assert 0.89 <= covered / sets <= 1.0


def test_undefined_replicates_are_left_out_and_counted():
    rate = RatioStatistic(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    interval = metrics.bootstrap({"PT": rate}, replicates=2000)["PT"]
    # All three draws hit the image that is left out with probability 1/27.
    assert interval.undefined == pytest.approx(2000 / 27, abs=35)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_mostly_undefined_replicates_give_no_interval():
    drawn = torch.tensor([NAN, NAN, NAN, 0.5, 0.6])
    interval = metrics.percentile_interval(0.5, drawn)
    assert (interval.estimate, interval.undefined) == (0.5, 3)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert not interval.above_zero
    assert not interval.below_zero


def test_half_undefined_replicates_still_give_an_interval():
    drawn = torch.tensor([NAN, NAN, 0.5, 0.5])
    assert metrics.percentile_interval(0.5, drawn) == Interval(0.5, 0.5, 0.5, 2)


def test_an_interval_knows_its_side_of_zero():
    assert Interval(0.2, 0.1, 0.3).above_zero
    assert Interval(-0.2, -0.3, -0.1).below_zero
    touching = Interval(0.1, 0.0, 0.2)
    assert not touching.above_zero
    assert not touching.below_zero


def test_nothing_to_estimate_gives_nothing():
    assert metrics.bootstrap({}) == {}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"a": RatioStatistic(torch.ones(3), torch.ones(2))}, "columns of one shape"),
        ({"a": RatioStatistic(torch.ones(2, 2), torch.ones(2, 2))}, "columns of one shape"),
        ({"a": RatioStatistic(torch.ones(0), torch.ones(0))}, "no images to draw from"),
    ],
)
def test_rates_must_be_over_the_same_images(rates, message):
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap(rates)


def test_models_must_have_the_same_rates():
    rate = RatioStatistic(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="different rates: \\['PT'\\] and \\['IR'\\]"):
        metrics.paired_bootstrap({"PT": rate}, {"IR": rate})


@pytest.mark.parametrize(("setting", "message"), [({"level": 95}, "level = 95"), ({"replicates": 0}, "1 or more")])
def test_settings_out_of_range_are_refused(setting, message):
    rate = RatioStatistic(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap({"PT": rate}, **{"replicates": 10, **setting})
