"""How much the evidence loss counts: fixed, or adjusted while training.

Two automatic ways. A *ratio* keeps the gradient of the weighted evidence loss at a given share of the task's. A *bound*
treats the weight as the multiplier of a constraint (dual ascent): it moves by ``rate`` times the violation each time
the constraint is seen, and stays within its limits. For ``rma_bound`` the constraint is on the evidence and a
violation raises the weight; for ``task_bound`` and ``metric_bound`` it is on the task and a violation lowers it.

A weight of 0 is the baseline and stays 0 whatever is chosen here. This module knows nothing of models.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Weighting(BaseModel):
    """How the weight of the evidence loss follows what training shows; ``evidence.weight`` is where it starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fixed", "ratio", "rma_bound", "task_bound", "metric_bound"] = Field(
        "fixed",
        description="fixed; ratio: evidence gradient over task gradient is kept at target; rma_bound: mean RMA of the "
        "training batches is to reach target; task_bound: the task loss is to stay below target; metric_bound: a "
        "metric of the evaluations is to stay above target. Bounds on the task never exceed evidence.weight",
    )
    target: float | None = Field(None, gt=0, description="the ratio or bound; needed by every kind but fixed")
    metric: str = Field("accuracy", description="what metric_bound looks at, of what the evaluation returns")
    smoothing: float = Field(
        0.9, ge=0, lt=1, description="share of the past in what is compared with the target; metric_bound has none"
    )
    rate: float = Field(0.1, gt=0, description="change of the weight per unit of violation, of the three bounds")
    smallest: float = Field(0.0, ge=0, description="the weight does not fall below this")
    largest: float = Field(100.0, gt=0, description="the weight does not rise above this")

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.kind != "fixed" and self.target is None:
            raise ValueError(f"kind {self.kind!r} has no target; give the ratio or bound that is to be held")
        if self.kind == "fixed" and self.target is not None:
            raise ValueError(
                f"target is {self.target}, but a fixed weight follows none; choose a kind, or leave it out"
            )
        if self.kind == "rma_bound" and self.target is not None and self.target > 1:
            raise ValueError(f"kind 'rma_bound' has target {self.target}; an RMA is at most 1")
        if self.smallest > self.largest:
            raise ValueError(f"smallest is {self.smallest}, above largest, which is {self.largest}")
        return self


class WeightState(NamedTuple):
    """What a weight has to remember across an interruption.

    Attributes:
        value: before the warm-up.
        smoothed: running mean of what is compared with the target; None before the first time.
    """

    value: float
    smoothed: float | None


class EvidenceWeight:
    """The weight, told what happens. Each kind listens to one of the three kinds of news and ignores the others.

    Args:
        config: how it follows the news.
        start: the weight to begin with; 0 stays 0.
        warmup_steps: steps over which it grows linearly from 0.

    Example:
        >>> weight = EvidenceWeight(Weighting(kind="rma_bound", target=0.6, smoothing=0, rate=0.5), start=1.0)
        >>> weight.saw_step(task_loss=0.3, mean_rma=0.4)  # 0.2 too little
        >>> round(weight.at(step=0), 6)
        1.1
    """

    def __init__(self, config: Weighting, start: float, warmup_steps: int = 0) -> None:
        self.config = config
        self.start = start
        self.warmup_steps = warmup_steps
        self.state = WeightState(self._within_limits(start) if start and config.kind != "fixed" else start, None)

    def at(self, step: int) -> float:
        """The weight of a step, counted from 0."""
        return self.state.value * min(1.0, (step + 1) / self.warmup_steps if self.warmup_steps else 1.0)

    def saw_probe(self, ratio: float) -> None:
        """The gradient of the evidence loss at the present weight, without warm-up, over the gradient of the task."""
        if self.config.kind != "ratio" or not self.start or not (math.isfinite(ratio) and ratio > 0):
            return
        # On a logarithmic scale, where twice too much and half of it are equally wrong. What is smoothed is the
        # weight that would have met the target, so a change of the weight does not disturb the mean.
        wanted = math.log(self.state.value * self._target / ratio)
        smoothed = self._smooth(wanted)
        self.state = WeightState(self._within_limits(math.exp(smoothed)), smoothed)

    def saw_step(self, *, task_loss: float, mean_rma: float) -> None:
        """Losses of a step; ``mean_rma`` is NaN where no image had evidence in view."""
        if self.config.kind == "rma_bound" and math.isfinite(mean_rma):
            smoothed = self._smooth(mean_rma)
            self._move(self._target - smoothed, smoothed)
        elif self.config.kind == "task_bound" and math.isfinite(task_loss):
            smoothed = self._smooth(task_loss)
            self._move(self._target - smoothed, smoothed)

    def saw_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Metrics of an evaluation.

        Raises:
            ValueError: the chosen metric is not among them.
        """
        if self.config.kind != "metric_bound":
            return
        if self.config.metric not in metrics:
            raise ValueError(
                f"training.weighting.metric = {self.config.metric!r}, but the evaluation returns {sorted(metrics)}"
            )
        value = metrics[self.config.metric]
        if math.isfinite(value):
            self._move(value - self._target, None)

    @property
    def _target(self) -> float:
        assert self.config.target is not None
        return self.config.target

    def _smooth(self, value: float) -> float:
        past = self.state.smoothed
        return value if past is None else self.config.smoothing * past + (1 - self.config.smoothing) * value

    def _move(self, by: float, smoothed: float | None) -> None:
        if self.start:
            self.state = WeightState(self._within_limits(self.state.value + self.config.rate * by), smoothed)

    def _within_limits(self, value: float) -> float:
        largest = self.config.largest
        if self.config.kind in ("task_bound", "metric_bound"):
            largest = min(largest, self.start)
        return min(max(value, self.config.smallest), largest)
