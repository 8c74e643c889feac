"""How often predictions are right, for the right reasons, and how sure one may be of it.

Everything here is a ratio of two sums over test images: accuracy, PT, IR, mean RMA. `RatioStatistic` says so
once, and one bootstrap serves them all.

This module knows nothing of models, files or data sets.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from evidence_ft.evidence import VALID_FROM

_ROUNDING = 1e-6
_ELEMENTS_IN_A_CHUNK = 2**22
_Key = TypeVar("_Key")


class Rationality(NamedTuple):
    """Images with evidence, counted by whether prediction and rationale are right.

    Wang et al., AAAI 2025 (arXiv 2412.13333). The first letter says whether the prediction is right or
    wrong, the second whether the rationale is. A rate over no images is NaN (the paper's code raises).

    Attributes:
        RR: right prediction, right rationale.
        RW: right prediction, wrong rationale.
        WR: wrong prediction, right rationale.
        WW: wrong prediction, wrong rationale.

    Example:
        >>> counts = Rationality(RR=6, RW=2, WR=1, WW=1)
        >>> counts.accuracy, counts.PT, round(counts.IR, 3), counts.RR_share
        (0.8, 0.75, 0.857, 0.6)
    """

    RR: int
    RW: int
    WR: int
    WW: int

    @property
    def total(self) -> int:
        """Images with evidence."""
        return self.RR + self.RW + self.WR + self.WW

    @property
    def accuracy(self) -> float:
        """Share of right predictions, among images with evidence."""
        return _ratio(self.RR + self.RW, self.total)

    @property
    def PT(self) -> float:
        """Prediction trustworthiness: right rationales among right predictions."""
        return _ratio(self.RR, self.RR + self.RW)

    @property
    def IR(self) -> float:
        """Inference reliability: right predictions among right rationales."""
        return _ratio(self.RR, self.RR + self.WR)

    @property
    def RR_share(self) -> float:
        """Right for the right reason, among images with evidence: ``accuracy * PT``."""
        return _ratio(self.RR, self.total)


class RatioStatistic(NamedTuple):
    """A rate, kept as what each image adds to it: ``numerator.sum() / denominator.sum()``.

    Resampling images changes both sums, as it must where two models differ in their denominators: PT counts
    right predictions only, and each model has its own.

    Attributes:
        numerator: ``(n,)``, what each image adds above the line.
        denominator: ``(n,)``, what each image adds below it; 0 leaves the image out.

    Example:
        >>> RatioStatistic(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])).value
        0.5
    """

    numerator: Tensor
    denominator: Tensor

    @property
    def value(self) -> float:
        """The rate over all images; NaN over none."""
        return _ratio(self.numerator.double().sum().item(), self.denominator.double().sum().item())


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval.

    Attributes:
        estimate: the value on the images as they are.
        low: lower bound; NaN where more than half of the replicates are undefined.
        high: upper bound, likewise.
        undefined: replicates left out because nothing was left to divide by.
    """

    estimate: float
    low: float
    high: float
    undefined: int = 0

    @property
    def above_zero(self) -> bool:
        """The whole interval lies above 0; False where it is undefined."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """The whole interval lies below 0; False where it is undefined."""
        return self.high < 0


def accuracy(correct: Tensor) -> float:
    """Share of right predictions; NaN for no images.

    Args:
        correct: ``(n,)`` bool.

    Example:
        >>> accuracy(torch.tensor([True, True, True, False]))
        0.75
    """
    _check_correct(correct)
    return _ratio(int(correct.sum()), len(correct))


def rationality(correct: Tensor, rma: Tensor, threshold: float = VALID_FROM) -> Rationality:
    """Count predictions by whether they are right, and right for the right reason.

    A rationale is right from the threshold on, the threshold itself included. Images without evidence (NaN)
    are left out. An empty heatmap has an RMA of 0 and is never right, so a threshold of 0 is refused.

    Args:
        correct: ``(n,)`` bool.
        rma: ``(n,)`` in [0, 1], NaN where there is no evidence.
        threshold: in (0, 1].

    Raises:
        ValueError: shapes differ, an RMA lies outside [0, 1], or the threshold outside (0, 1].
        TypeError: ``correct`` is not bool.

    Example:
        >>> correct = torch.tensor([True, True, False, False, True])
        >>> rma = torch.tensor([0.5, 0.4, 0.9, 0.0, torch.nan])
        >>> rationality(correct, rma)
        Rationality(RR=1, RW=1, WR=1, WW=1)
    """
    _check_correct(correct)
    _check_rma(rma, len(correct))
    _check_threshold(threshold)
    annotated = ~rma.isnan()
    valid = rma >= threshold
    return Rationality(
        RR=int((correct & valid).sum()),
        RW=int((correct & annotated & ~valid).sum()),
        WR=int((~correct & valid).sum()),
        WW=int((~correct & annotated & ~valid).sum()),
    )


def chance_corrected_rma(rma: Tensor, mask_share: Tensor) -> Tensor:
    """RMA on a scale where a uniform heatmap has 0 and a perfect one 1: ``(rma - a) / (1 - a)``.

    A uniform heatmap's RMA is the share ``a`` of the image that the mask covers, so a large object is easy to
    hit. Negative where the heatmap avoids the object.

    Args:
        rma: ``(n,)`` in [0, 1], NaN where there is no evidence.
        mask_share: ``(n,)`` in [0, 1], the area share of each mask.

    Returns:
        ``(n,)``, at most 1. NaN where there is no evidence, and where the mask fills the image: there every
        heatmap is perfect.

    Raises:
        ValueError: shapes differ, or a value lies outside [0, 1].

    Example:
        >>> chance_corrected_rma(torch.tensor([0.8, 0.2, 0.1]), torch.tensor([0.2, 0.2, 0.2]))
        tensor([ 0.7500,  0.0000, -0.1250])
    """
    _check_rma(rma, len(rma))
    _check_rma(mask_share, len(rma), name="mask_share")
    return torch.where(mask_share < 1, (rma - mask_share) / (1 - mask_share), torch.nan)


def ratio_statistics(
    correct: Tensor, rma: Tensor, swapped_correct: Tensor | None = None, *, threshold: float = VALID_FROM
) -> dict[str, RatioStatistic]:
    """The rates a report is made of, ready for the bootstrap.

    Args:
        correct: ``(n,)`` bool.
        rma: ``(n,)`` in [0, 1], NaN where there is no evidence.
        swapped_correct: ``(n,)``, 1 or 0 for the prediction on the same object before another background, NaN
            where no such image exists. None if there is none at all.
        threshold: in (0, 1].

    Returns:
        ``accuracy`` over all images; ``PT``, ``IR``, ``RR`` (as a share) and ``mean_RMA`` over those with
        evidence; ``swapped_accuracy`` over those with a swapped image.

    Raises:
        ValueError: shapes differ, an RMA lies outside [0, 1], or the threshold outside (0, 1].
        TypeError: ``correct`` is not bool.

    Example:
        >>> correct = torch.tensor([True, True, False, True])
        >>> rates = ratio_statistics(correct, torch.tensor([0.75, 0.25, 0.5, torch.nan]))
        >>> {name: rate.value for name, rate in rates.items() if name != "swapped_accuracy"}
        {'accuracy': 0.75, 'PT': 0.5, 'IR': 0.5, 'RR': 0.3333333333333333, 'mean_RMA': 0.5}
    """
    _check_correct(correct)
    _check_rma(rma, len(correct))
    _check_threshold(threshold)
    swapped = torch.full((len(correct),), torch.nan) if swapped_correct is None else swapped_correct
    if swapped.shape != correct.shape:
        raise ValueError(f"swapped_correct of shape {tuple(swapped.shape)} does not match {len(correct)} predictions")
    annotated, valid = ~rma.isnan(), rma >= threshold
    return {
        "accuracy": RatioStatistic(correct, torch.ones_like(correct)),
        "PT": RatioStatistic(correct & valid, correct & annotated),
        "IR": RatioStatistic(correct & valid, valid),
        "RR": RatioStatistic(correct & valid, annotated),
        "mean_RMA": RatioStatistic(rma.nan_to_num(nan=0.0), annotated),
        "swapped_accuracy": RatioStatistic(swapped.nan_to_num(nan=0.0), ~swapped.isnan()),
    }


def bootstrap(
    statistics: Mapping[str, RatioStatistic],
    *,
    replicates: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of rates on one set of images.

    Args:
        statistics: rates over the same ``n`` images.
        replicates: how often the images are drawn anew.
        level: confidence level, in (0, 1).
        seed: same seed, same intervals.

    Raises:
        ValueError: the rates are not over the same number of images, or there is nothing to draw from.

    Example:
        >>> always = RatioStatistic(torch.ones(8), torch.ones(8))
        >>> bootstrap({"accuracy": always}, replicates=100)["accuracy"]
        Interval(estimate=1.0, low=1.0, high=1.0, undefined=0)
    """
    drawn = replicate(statistics, replicates=replicates, seed=seed)
    return {
        name: percentile_interval(statistic.value, drawn[name], level=level) for name, statistic in statistics.items()
    }


def paired_bootstrap(
    first: Mapping[str, RatioStatistic],
    second: Mapping[str, RatioStatistic],
    *,
    replicates: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of the differences ``second - first`` between two models on the same images.

    Both models are seen on the same drawn images, so what an image is worth to both cancels. Images are drawn
    rather than discordant pairs counted (McNemar), because PT and IR divide by counts that differ between
    the models. The interval covers the choice of test images, not of the training seed.

    Args:
        first: rates of one model; image ``i`` must be the same in both.
        second: the same rates of the other.
        replicates: how often the images are drawn anew.
        level: confidence level, in (0, 1).
        seed: same seed, same intervals.

    Raises:
        ValueError: the names differ, the rates are not over the same number of images, or there is nothing to
            draw from.

    Example:
        >>> ones = torch.ones(4)
        >>> before = {"accuracy": RatioStatistic(torch.tensor([1.0, 1.0, 0.0, 0.0]), ones)}
        >>> after = {"accuracy": RatioStatistic(torch.tensor([1.0, 1.0, 1.0, 1.0]), ones)}
        >>> paired_bootstrap(before, after, replicates=1000)["accuracy"]
        Interval(estimate=0.5, low=0.0, high=1.0, undefined=0)
    """
    if first.keys() != second.keys():
        raise ValueError(f"the models have different rates: {sorted(first)} and {sorted(second)}")
    both = {("first", name): rate for name, rate in first.items()}
    both |= {("second", name): rate for name, rate in second.items()}
    drawn = replicate(both, replicates=replicates, seed=seed)
    return {
        name: percentile_interval(
            second[name].value - first[name].value,
            drawn["second", name] - drawn["first", name],
            level=level,
        )
        for name in first
    }


def replicate(
    statistics: Mapping[_Key, RatioStatistic], *, replicates: int = 10_000, seed: int = 0
) -> dict[_Key, Tensor]:
    """Rates on images drawn anew with replacement; the same draws for every rate.

    An image counts as often as it was drawn, so all draws of all rates are one product: times drawn
    ``(replicates, n)`` with what each image adds ``(n, 2 * rates)``.

    Args:
        statistics: rates over the same ``n`` images.
        replicates: how often the images are drawn anew.
        seed: same seed, same draws.

    Returns:
        For each rate ``(replicates,)`` float64; NaN where a draw left nothing to divide by.

    Raises:
        ValueError: the rates are not over the same number of images, or there is nothing to draw from.

    Example:
        >>> rate = RatioStatistic(torch.tensor([1.0, 0.0]), torch.ones(2))
        >>> replicate({"accuracy": rate}, replicates=1000)["accuracy"].unique()
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not statistics:
        return {}
    if replicates < 1:
        raise ValueError(f"replicates = {replicates}, expected 1 or more")
    columns = [column for statistic in statistics.values() for column in statistic]
    shapes = {tuple(column.shape) for column in columns}
    if len(shapes) > 1 or len(columns[0].shape) != 1:
        raise ValueError(f"rates over the same images have columns of one shape (n,), got {sorted(shapes)}")
    (n,) = columns[0].shape
    if n == 0:
        raise ValueError("there are no images to draw from")
    per_image = torch.stack([column.detach().cpu().double() for column in columns], dim=1)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _ELEMENTS_IN_A_CHUNK // n)
    sums = torch.cat(
        [_times_drawn(min(rows, replicates - start), n, generator) @ per_image for start in range(0, replicates, rows)]
    )
    numerators, denominators = sums[:, 0::2], sums[:, 1::2]
    rates = torch.where(denominators > 0, numerators / denominators, torch.nan)
    return dict(zip(statistics, rates.unbind(dim=1), strict=True))


def percentile_interval(estimate: float, drawn: Tensor, *, level: float = 0.95) -> Interval:
    """The middle share of a statistic's replicates.

    Undefined replicates (NaN) are left out and counted. Where they are more than half, the bounds are NaN.

    Args:
        estimate: the statistic on the images as they are.
        drawn: ``(replicates,)``, the statistic on images drawn anew.
        level: confidence level, in (0, 1).

    Raises:
        ValueError: the level lies outside (0, 1).

    Example:
        >>> percentile_interval(50.0, torch.arange(101.0), level=0.5)
        Interval(estimate=50.0, low=25.0, high=75.0, undefined=0)
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}, expected a confidence level between 0 and 1, such as 0.95")
    undefined = int(drawn.isnan().sum())
    if 2 * undefined > len(drawn):
        return Interval(estimate, math.nan, math.nan, undefined)
    tail = (1 - level) / 2
    low, high = torch.nanquantile(drawn.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high, undefined)


def _times_drawn(replicates: int, n: int, generator: torch.Generator) -> Tensor:
    """How often each of n images comes up in n draws with replacement: ``(replicates, n)`` float64."""
    drawn = torch.randint(n, (replicates, n), generator=generator)
    return torch.zeros(replicates, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(replicates, n)
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _check_correct(correct: Tensor) -> None:
    if correct.dtype != torch.bool:
        raise TypeError(f"correct is {correct.dtype}, expected torch.bool: compare predictions with labels")
    if correct.ndim != 1:
        raise ValueError(f"correct has shape {tuple(correct.shape)}, expected one entry an image, (n,)")


def _check_rma(rma: Tensor, n: int, *, name: str = "rma") -> None:
    if rma.shape != (n,):
        raise ValueError(f"{name} of shape {tuple(rma.shape)} does not match {n} images, expected ({n},)")
    outside = rma[(rma < -_ROUNDING) | (rma > 1 + _ROUNDING)]
    if len(outside):
        raise ValueError(f"{name} has {outside[0].item():.6g}, expected shares of mass in [0, 1]")


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold = {threshold}, expected above 0 and at most 1; an empty heatmap has RMA 0 and is never valid"
        )
