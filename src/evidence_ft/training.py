"""The training step, which is the module Accelerate wraps, and the loop around it.

Everything that is differentiated happens inside `TrainingStep.forward`: under mixed precision, and under DDP with
unused parameters, outputs of a wrapped module are copies, and a heatmap's gradient taken outside raises. Task and
evidence go through one backward pass, so data parallelism needs nothing special. The loop knows nothing of heatmaps,
masks or text; the probe of the evidence gradient lives beside the step.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from evidence_ft.classifier import FineTuning
from evidence_ft.distributed import gather, mean_over_defined, mean_over_processes
from evidence_ft.evidence import has_evidence, mask_to_grid
from evidence_ft.tower import Layers
from evidence_ft.transforms import Augmentation, ModelInputs, collate
from evidence_ft.types import Batch, Losses, ScoreFn, VisionTrace

Heatmap = Callable[..., Tensor]
"""``heatmap(trace, score, *, create_graph) -> (B, h, w)``, as exported by each file of ``heatmaps``."""
Alignment = Callable[[Tensor, Tensor], Tensor]
"""``loss(heatmaps, masks) -> (B,)``, as exported by each file of ``alignments``."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to try."""


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
    """A batch to its losses. Holds every parameter of the method."""

    def __init__(self, tuning: FineTuning, evidence: EvidenceTerm) -> None:
        super().__init__()
        self.encoder = tuning.encoder
        self.objective = tuning.objective
        self.evidence = evidence

    def forward(self, batch: Batch) -> Losses:
        trace = self.encoder.image_tower.trace(batch.images, self.evidence.layers)
        task, score = self.objective(trace.features, batch.labels)
        evidence = self.evidence_loss(trace, score, batch.masks)
        total = task + self.evidence.weight * evidence if self.evidence.weight else task
        return Losses(total, task, evidence)

    def evidence_loss(self, trace: VisionTrace, score: ScoreFn, masks: Tensor) -> Tensor:
        """The alignment loss over the annotated images of all processes, ``()``."""
        # Evidence is computed in float32 whatever the precision of the rest.
        with torch.autocast(masks.device.type, enabled=False):
            heatmaps = self.evidence.heatmap(trace, score, create_graph=self.evidence.weight > 0)
            on_grid = mask_to_grid(masks, trace.grid)
            per_image = self.evidence.alignment(heatmaps, on_grid)
            # NaN means "not annotated". On an annotated image it is a fault, which must not pass for that.
            faulty = has_evidence(on_grid) & per_image.isnan()
            return mean_over_defined(torch.where(faulty, torch.inf, per_image))


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


def probe_gradients(step: TrainingStep, batch: Batch) -> GradientProbe:
    """Check on one batch that the evidence loss is alive.

    Args:
        step: not wrapped; its weights and gradients stay as they are, and so does the random state.
        batch: with at least one annotated image.

    Raises:
        InertEvidenceError: the weighted evidence loss reaches no trained parameter.
        TrainingError: its gradient is not finite.
    """
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    weight = step.evidence.weight
    with torch.random.fork_rng(devices=[batch.images.device] if batch.images.is_cuda else []):
        losses = step(batch)
    if not losses.evidence.requires_grad:
        raise InertEvidenceError(
            f"the evidence loss ({losses.evidence.item():.3f} at weight {weight}) has no graph: heatmap or alignment "
            "detaches what it is given. A heatmap must honour create_graph=True, an alignment must not detach"
        )
    evidence = _gradient_norm(weight * losses.evidence, parameters)
    if not math.isfinite(evidence):
        raise TrainingError(
            f"the gradient of the evidence loss ({losses.evidence.item():.3f} at weight {weight}) is {evidence}: "
            "heatmap or alignment divides by zero or overflows on this batch"
        )
    if evidence == 0:
        raise InertEvidenceError(
            f"the evidence loss ({losses.evidence.item():.3f} at weight {weight}) does not reach any of the "
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


class TrainerConfig(BaseModel):
    """How the trained parameters are fitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(1e-5, gt=0, description="of AdamW, at its peak")
    epochs: int = Field(10, gt=0, description="passes over the training images")
    batch_size: int = Field(32, gt=1, description="images per process and step")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; biases, gains and the logit scale have none")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    max_gradient_norm: float | None = Field(None, gt=0, description="gradients are clipped to this norm")
    probe_every: int = Field(50, gt=0, description="steps between two measurements of the evidence-to-task ratio")
    num_workers: int = Field(0, ge=0, description="processes that load images, per process that trains")
    augmentation: Augmentation | None = Field(
        Augmentation(), description="random crops and flips, drawn once for image and mask"
    )

    def check_fits(self, images: int, processes: int) -> None:
        """Refuse a batch that the training images cannot fill.

        Raises:
            TrainingError: fewer images than a batch of all processes.
        """
        if images < self.batch_size * processes:
            raise TrainingError(
                f"{images} training images are fewer than one batch: training.batch_size is {self.batch_size} on "
                f"{processes} process(es); set training.batch_size to at most {images // processes}"
            )


class Fitted(NamedTuple):
    """What a finished training reports.

    Attributes:
        steps: optimizer steps.
        annotated: share of training images in view of whose crop there was evidence, over all steps.
        first_probe: the liveness check; None at weight 0.
    """

    steps: int
    annotated: float
    first_probe: GradientProbe | None


class Trainer:
    """Fits a `TrainingStep` with Accelerate.

    Args:
        config: how to train.
        accelerator: precision and processes are its business.
        metrics_file: one JSON object per step is written there; None for none.
    """

    def __init__(self, config: TrainerConfig, accelerator: Accelerator, metrics_file: Path | None = None) -> None:
        self.config = config
        self.accelerator = accelerator
        self.metrics_file = metrics_file

    def fit(self, step: TrainingStep, inputs: ModelInputs, *, seed: int, description: str = "training") -> Fitted:
        """Train in place, with the evidence probe on the first batch that shows evidence.

        Args:
            step: its parameters with ``requires_grad`` are trained.
            inputs: training images; the last incomplete batch of an epoch is dropped.
            seed: of the order of the images.
            description: of the progress bar.

        Raises:
            InertEvidenceError: the evidence loss does not reach the trained parameters.
            TrainingError: fewer images than a batch, or a loss that is not finite.
        """
        config, accelerator = self.config, self.accelerator
        step.to(accelerator.device)
        loader = DataLoader(
            inputs,
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=config.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),
        )
        global_batch = config.batch_size * accelerator.num_processes
        config.check_fits(len(inputs), accelerator.num_processes)
        optimizer = torch.optim.AdamW(_parameter_groups(step, config.weight_decay), lr=config.learning_rate)
        total_steps = config.epochs * (len(inputs) // global_batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate(total_steps))
        wrapped, optimizer, loader = accelerator.prepare(step, optimizer, loader)
        wrapped.train()
        first_probe: GradientProbe | None = None
        since_probe, seen, annotated, number = 0, 0, 0, 0
        with tqdm(total=total_steps, desc=description, disable=not accelerator.is_main_process) as bar:
            for epoch in range(config.epochs):
                inputs.set_epoch(epoch)
                for batch in loader:
                    in_view = int(gather(batch.masks.flatten(1).any(dim=1)).sum())
                    seen, annotated = seen + global_batch, annotated + in_view
                    probe = None
                    due = first_probe is None or since_probe >= config.probe_every
                    if step.evidence.weight and in_view and due:
                        with accelerator.autocast():
                            probe = probe_gradients(step, batch)
                        first_probe, since_probe = first_probe or probe, 0
                    losses = wrapped(batch)
                    self._check_finite(losses, number)
                    accelerator.backward(losses.total)
                    norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_gradient_norm or math.inf)
                    learning_rate = schedule.get_last_lr()[0]
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    number, since_probe = number + 1, since_probe + 1
                    record = {"step": number, "epoch": number / total_steps * config.epochs}
                    record |= {
                        f"{name}_loss": gather(value.detach()[None]).mean().item()
                        for name, value in losses._asdict().items()
                    }
                    record |= {"learning_rate": learning_rate, "gradient_norm": float(norm)}
                    if not in_view:
                        del record["evidence_loss"]  # there was none to measure
                    if probe is not None:
                        record["evidence_to_task_gradient_ratio"] = probe.ratio
                    self._write(record)
                    evidence = record.get("evidence_loss", math.nan)
                    bar.set_postfix(task=f"{record['task_loss']:.3f}", evidence=f"{evidence:.3f}")
                    bar.update()
        wrapped.eval()
        accelerator.free_memory()
        return Fitted(number, annotated / seen, first_probe)

    def _rate(self, total_steps: int) -> Callable[[int], float]:
        config = self.config

        def rate(step: int) -> float:
            if step < config.warmup_steps:
                return (step + 1) / config.warmup_steps
            if config.schedule == "constant":
                return 1.0
            progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

        return rate

    def _check_finite(self, losses: Losses, number: int) -> None:
        for name, value in losses._asdict().items():
            if not math.isfinite(value.item()):
                raise TrainingError(
                    f"step {number + 1}: {name} loss is {value.item()}; lower training.learning_rate (now "
                    f"{self.config.learning_rate}), or set training.max_gradient_norm"
                )

    def _write(self, record: dict[str, float]) -> None:
        # Step by step: what led to a failure is what one wants to read.
        if self.metrics_file is not None and self.accelerator.is_main_process:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _parameter_groups(step: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
