"""How training goes: every setting of the trainer, checked when it is made."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evidence_ft.training import TrainingError
from evidence_ft.transforms import Augmentation
from evidence_ft.weighting import Weighting


class EarlyStopping(BaseModel):
    """Stop when a metric no longer improves, and keep the weights of its best evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = Field("accuracy", description="of what the evaluation returns")
    patience: int = Field(3, gt=0, description="evaluations in a row without improvement after which training stops")
    mode: Literal["max", "min"] = Field("max", description="whether more of it is better, or less")


class TrainerConfig(BaseModel):
    """How the trained parameters are fitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(1e-5, gt=0, description="of AdamW, at its peak")
    epochs: int = Field(10, gt=0, description="passes over the training images")
    batch_size: int = Field(32, gt=1, description="images per process and forward pass")
    gradient_accumulation: int = Field(
        1, gt=0, description="batches per optimizer step; does not enlarge the batches of a contrastive loss"
    )
    weight_decay: float = Field(0.0, ge=0, description="of matrices; biases, gains and the logit scale have none")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    max_gradient_norm: float | None = Field(None, gt=0, description="gradients are clipped to this norm")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay per step of a running mean of the weights, which is evaluated and kept"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the image tower's blocks again in the backward pass instead of keeping them"
    )
    augmentation: Augmentation | None = Field(
        Augmentation(), description="random crops and flips, drawn once for image and mask"
    )
    background_swap: float = Field(
        0.0, ge=0, le=1, description="share of the objects that are shown on another image's background"
    )
    evidence_every: int = Field(1, gt=0, description="steps between two that have the evidence loss")
    evidence_images: int | None = Field(
        None, gt=0, description="images of a batch that are explained at most, at random, annotated ones first"
    )
    evidence_warmup_steps: int = Field(0, ge=0, description="steps over which the evidence weight grows from 0")
    weighting: Weighting = Field(Weighting(), description="how the evidence weight is adjusted")
    probe_every: int = Field(50, gt=0, description="steps between two measurements of the evidence-to-task ratio")
    evaluate_every: int | None = Field(None, gt=0, description="steps between two evaluations while training")
    early_stopping: EarlyStopping | None = Field(None, description="stop when a metric no longer improves")
    watch_every: int | None = Field(None, gt=0, description="steps between two looks at a fixed panel of images")
    watch_images: int = Field(8, gt=0, description="annotated images in that panel")
    checkpoint_every: int | None = Field(
        None, gt=0, description="steps between two checkpoints; without, an interruption and the end leave one"
    )
    keep_checkpoints: int = Field(2, gt=0, description="checkpoints that are kept, the newest ones")
    num_workers: int = Field(0, ge=0, description="processes that load images, per process that trains")

    @model_validator(mode="after")
    def _what_needs_evaluations_has_them(self) -> Self:
        needs = "early_stopping" if self.early_stopping else "weighting.kind metric_bound"
        if self.evaluate_every is None and (self.early_stopping or self.weighting.kind == "metric_bound"):
            raise ValueError(f"{needs} needs evaluations while training; set evaluate_every")
        return self

    def check_fits(self, images: int, processes: int) -> None:
        """Refuse a step that the training images cannot fill.

        Raises:
            TrainingError: fewer images than one optimizer step of all processes takes.
        """
        shares = processes * self.gradient_accumulation
        if images < self.batch_size * shares:
            accumulated = f" times {self.gradient_accumulation} accumulated" if self.gradient_accumulation > 1 else ""
            most = images // shares
            advice = f"set training.batch_size to at most {most}" if most > 1 else "give more images"
            raise TrainingError(
                f"{images} training images are fewer than one batch: training.batch_size is {self.batch_size}"
                f"{accumulated} on {processes} process(es); {advice}"
            )


MAY_CHANGE = frozenset({"checkpoint_every", "keep_checkpoints", "num_workers", "watch_every", "watch_images"})
"""Settings that do not decide what is learnt: a resumed training may have others."""
