"""The training step, which is the module Accelerate wraps, and the probe of its two gradients.

Everything that is differentiated happens inside `TrainingStep.forward`: under mixed precision, and under DDP with
unused parameters, outputs of a wrapped module are copies, and a heatmap's gradient taken outside raises. Task and
evidence go through one backward pass, so data parallelism needs nothing special; sharding is told of the gradient
that is taken inside.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evidence_ft.classifier import FineTuning, Heatmap
from evidence_ft.distributed import inner_gradient, mean_over_defined, mean_over_processes
from evidence_ft.encoder import Encoder
from evidence_ft.evidence import checked_heatmaps, has_evidence, is_empty, mask_to_grid, relevance_mass_accuracy
from evidence_ft.tower import Layers
from evidence_ft.transforms import ModelInputs, collate
from evidence_ft.types import OBJECT, Batch, Losses, ScoreFn, VisionTrace

Alignment = Callable[[Tensor, Tensor], Tensor]
"""``loss(heatmaps, masks) -> (B,)``, as exported by each file of ``alignments``."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try, and of a step that failed which one it was."""


class InertEvidenceError(TrainingError):
    """The evidence loss does not reach a single trained parameter."""


@dataclass(frozen=True)
class EvidenceTerm:
    """What is added to the method's own loss.

    Attributes:
        heatmap: the map that is trained through.
        alignment: the loss on it.
        layers: blocks the map is made from.
        weight: of the loss; 0 logs the loss without training on it, through the same explicit attention.
    """

    heatmap: Heatmap
    alignment: Alignment
    layers: Layers = "all"
    weight: float = 1.0


class TrainingStep(nn.Module):
    """A batch to its losses. Holds every parameter of the method.

    In training mode, modules without a trained parameter stay in evaluation mode: a frozen tower does not drop out.
    """

    def __init__(self, tuning: FineTuning, evidence: EvidenceTerm) -> None:
        super().__init__()
        self.encoder = tuning.encoder
        self.head = tuning.head
        self.objective = tuning.objective
        self.classifier = tuning.classifier
        self.evidence = evidence

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            _rest_frozen(self)
        return self

    def forward(
        self, batch: Batch, *, weight: float | None = None, explain: bool = True, explain_at_most: int | None = None
    ) -> Losses:
        """Losses of a batch; every argument but the batch is the same on all processes.

        Args:
            batch: of this process.
            weight: of the evidence loss; that of the term by default.
            explain: False leaves the evidence out, and the tower with its fused attention.
            explain_at_most: images that are explained, annotated ones first and drawn at random, so that the others
                keep the fused attention as well; None for all.
        """
        weight = self.evidence.weight if weight is None else weight
        tower = self.encoder.image_tower
        if not explain:
            task, _ = self._task(tower(batch.images), batch.labels)
            undefined, nothing = task.new_full((), torch.nan), task.new_empty(0)
            return Losses(task, task, undefined, nothing, nothing.bool())
        if explain_at_most is None or explain_at_most >= len(batch.images):
            trace = tower.trace(batch.images, self.evidence.layers)
            task, score = self._task(trace.features, batch.labels)
            masks = batch.masks
        else:
            chosen, others = _annotated_first(batch.masks).tensor_split([explain_at_most])
            trace = tower.trace(batch.images[chosen], self.evidence.layers)
            parts = torch.cat([trace.features, tower(batch.images[others])])
            features = parts[torch.cat([chosen, others]).argsort()]
            task, score_of_all = self._task(features, batch.labels)
            score, masks = _restricted(score_of_all, features, chosen), batch.masks[chosen]
        evidence, rma, empty = self._evidence(trace, score, masks, weight)
        return Losses(task + weight * evidence if weight else task, task, evidence, rma, empty)

    def _task(self, features: Tensor, labels: Tensor) -> tuple[Tensor, ScoreFn]:
        """What the objective returns, which may be anybody's."""
        task, score = self.objective(features, labels)
        if not isinstance(task, Tensor) or task.ndim:
            raise TrainingError(f"the objective returned a loss of {_kind_of(task)}, not (): one number for the batch")
        if not callable(score):
            raise TrainingError(
                f"the objective returned a score of type {type(score).__name__}, not a function of features (B, F) to "
                "one number an image (B,)"
            )

        def one_each(features: Tensor) -> Tensor:
            values = score(features)
            if not isinstance(values, Tensor) or values.shape != (len(features),):
                raise TrainingError(
                    f"the objective's score is of {_kind_of(values)} for {len(features)} images, not "
                    f"({len(features)},): one number an image, what is explained"
                )
            return values

        return task, one_each

    def _evidence(self, trace: VisionTrace, score: ScoreFn, masks: Tensor, weight: float) -> tuple[Tensor, ...]:
        """The alignment loss ``()`` over the annotated images of all processes; RMA and emptiness ``(b,)``."""
        # Evidence is computed in float32 whatever the precision of the rest.
        with torch.autocast(masks.device.type, enabled=False):
            with inner_gradient(self):
                found = self.evidence.heatmap(trace, score, create_graph=weight > 0)
            heatmaps = checked_heatmaps(found, len(masks), trace.grid, finite=False)
            on_grid = mask_to_grid(masks, trace.grid)
            per_image = self.evidence.alignment(heatmaps, on_grid)
            if not isinstance(per_image, Tensor) or per_image.shape != (len(masks),):
                raise TrainingError(
                    f"the alignment returned a loss of {_kind_of(per_image)} for {len(masks)} images, not "
                    f"({len(masks)},): one loss an image, NaN where its mask is empty"
                )
            # NaN means "not annotated". On an annotated image it is a fault, which must not pass for that.
            annotated = has_evidence(on_grid)
            faulty = annotated & per_image.isnan()
            if not (annotated | per_image.isnan()).all():
                raise TrainingError(
                    "the alignment returned a number for an image without evidence in view, which would thin out the "
                    "mean over the others; return NaN where a mask is empty (evidence_ft.evidence.has_evidence)"
                )
            loss = mean_over_defined(torch.where(faulty, torch.inf, per_image))
            seen = heatmaps.detach()
            return loss, relevance_mass_accuracy(seen, on_grid), is_empty(seen)


def name_of(function: Callable[..., Any]) -> str:
    """Where a heatmap, an alignment or a method comes from: the name of our file, or the dotted path of anybody's.

    Example:
        >>> from evidence_ft.alignments import outside_mass
        >>> name_of(outside_mass.loss), name_of(extract_features)
        ('outside_mass', 'evidence_ft.training.extract_features')
    """
    kind = function if isinstance(function, FunctionType) else type(function)
    family, _, file = kind.__module__.rpartition(".")
    is_ours = family in ("evidence_ft.heatmaps", "evidence_ft.alignments")
    return file if is_ours else f"{kind.__module__}.{kind.__qualname__}"


def _kind_of(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"


def is_annotated(masks: Tensor) -> Tensor:
    """Which masks ``(B, Hpx, Wpx)`` show evidence: ``(B,)`` bool."""
    return (masks == OBJECT).flatten(1).any(dim=1)


def _annotated_first(masks: Tensor) -> Tensor:
    """Rows in random order, those with evidence in view before the others.

    Not those alone: collective operations must meet, so every process explains as many, whatever it has.
    """
    order = torch.randperm(len(masks), device=masks.device)
    return order[is_annotated(masks)[order].to(torch.uint8).argsort(descending=True, stable=True)]


def _restricted(score: ScoreFn, features: Tensor, chosen: Tensor) -> ScoreFn:
    """``score`` of some rows alone. It knows its labels by their position, so the rows go where they came from."""

    def of_chosen(of_rows: Tensor) -> Tensor:
        return score(features.detach().index_copy(0, chosen, of_rows))[chosen]

    return of_chosen


def _rest_frozen(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _rest_frozen(child)


class GradientProbe(NamedTuple):
    """Norms of two gradients over all trained parameters, on one batch.

    Attributes:
        task: of the method's own loss.
        evidence: of the weighted evidence loss.
    """

    task: float
    evidence: float

    @property
    def ratio(self) -> float:
        """Evidence over task; NaN where the task has no gradient."""
        return self.evidence / self.task if self.task else math.nan


def probe_gradients(
    step: TrainingStep,
    batch: Batch,
    *,
    weight: float | None = None,
    explain_at_most: int | None = None,
    must_live: bool = True,
) -> GradientProbe:
    """Measure on one batch what each loss pulls, and check that the evidence loss is alive.

    Args:
        step: not wrapped, not in shards; its weights and gradients stay as they are, and so does the random state.
        batch: with at least one annotated image.
        weight: of the evidence loss, above 0; that of the term by default.
        explain_at_most: as in `TrainingStep.forward`.
        must_live: whether an evidence loss above 0 without any gradient is an error.

    Raises:
        InertEvidenceError: the weighted evidence loss reaches no trained parameter.
        TrainingError: its gradient is not finite.
    """
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    weight = step.evidence.weight if weight is None else weight
    with torch.random.fork_rng(devices=[batch.images.device] if batch.images.is_cuda else []):
        losses = step(batch, weight=weight, explain_at_most=explain_at_most)
    found = f"the evidence loss ({losses.evidence.item():.3f} at weight {weight:g})"
    if not losses.evidence.requires_grad:
        raise InertEvidenceError(
            f"{found} has no graph: heatmap or alignment "
            "detaches what it is given. A heatmap must honour create_graph=True, an alignment must not detach"
        )
    evidence = _gradient_norm(weight * losses.evidence, parameters)
    if not math.isfinite(evidence):
        raise TrainingError(
            f"the gradient of {found} is {evidence}: heatmap or alignment divides by zero or overflows on this batch"
        )
    if must_live and evidence == 0 and mean_over_processes(losses.evidence.detach()).item() != 0:
        raise InertEvidenceError(
            f"{found} does not reach any of the "
            f"{len(parameters)} trained parameters: its gradient is {evidence}. Possible reasons: every heatmap is "
            "empty (look at heatmaps of the untrained model, or choose other layers), the parameters it depends on "
            "are frozen, or an attention that is not on the path to the features"
        )
    return GradientProbe(_gradient_norm(losses.task, parameters), evidence)


def _gradient_norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    """Of the gradient as data parallelism sees it: a process without annotated images contributes zeros."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    squares = [mean_over_processes(gradient.float()).square().sum() for gradient in gradients]
    return torch.stack(squares).sum().sqrt().item()


@torch.no_grad()
def extract_features(
    encoder: Encoder, inputs: ModelInputs, accelerator: Accelerator, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Features ``(n, F)`` and labels ``(n,)`` of all images in the order of their rows, on every process.

    Args:
        encoder: moved to the accelerator's device; its image tower is put into evaluation mode.
        inputs: images, usually without augmentation.
        accelerator: spreads the images over processes.
        batch_size: images per process.
    """
    tower = encoder.to(accelerator.device).image_tower.eval()
    # A generator of its own: an iterator draws a seed from one, and the global one belongs to training.
    loader = DataLoader(inputs, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())
    parts = [
        accelerator.gather_for_metrics((batch.rows, tower(batch.images), batch.labels))
        for batch in accelerator.prepare_data_loader(loader)
    ]
    rows, features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    order = rows.argsort()
    return features[order], labels[order]
