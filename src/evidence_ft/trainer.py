"""The loop: fits a `TrainingStep`, and can be interrupted at any moment without losing or repeating a step.

Everything that decides a step follows from the seed and the number of the step, or is in the checkpoint: the order of
the images from seed and epoch, the learning rate from the step, random states, averages and the evidence weight from
the checkpoint. What is measured along the way (evaluation, the watched panel, probes) leaves no trace in what is
learnt.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from evidence_ft import checkpoints
from evidence_ft.checkpoints import Checkpoint, RandomState, ResumeError
from evidence_ft.distributed import gather, laid_out_like, shard, unshard, unsharded, whole
from evidence_ft.evaluation import choose_panel, explain_panel
from evidence_ft.evidence import is_empty, mask_to_grid, relevance_mass_accuracy
from evidence_ft.files import check_can_be_made, make_writable, named, without_nan
from evidence_ft.interruption import Interrupted, noted_signals, outlive_one_signal
from evidence_ft.outcomes import Gallery
from evidence_ft.runs import METRICS_FILE
from evidence_ft.samples import fingerprint
from evidence_ft.tower import check_trainable
from evidence_ft.trainer_config import MAY_CHANGE, EarlyStopping, TrainerConfig
from evidence_ft.training import (
    GradientProbe,
    TrainingError,
    TrainingStep,
    is_annotated,
    name_of,
    probe_gradients,
)
from evidence_ft.transforms import ModelInputs, collate, to_pixels
from evidence_ft.types import Batch, Losses
from evidence_ft.weighting import EvidenceWeight, WeightState

_log = logging.getLogger(__name__)

Sampler: TypeAlias = Callable[[int], Sequence[int]]
"""Epoch to the rows of the training images in their order: the same on every process, as many in every epoch, and
dependent on nothing but the epoch, so that an interrupted one can be continued. Rows may be left out or repeated."""

Evaluate: TypeAlias = Callable[[], Mapping[str, float]]
"""The model as it is now to metrics; called on, and returning the same on, every process."""


class TrainerCallback:
    """What happens beside training: override what you need. Called on every process."""

    def on_step_end(self, step: int, record: Mapping[str, float]) -> None:
        """After an optimizer step; ``record`` is what goes into ``metrics.jsonl``."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """After a checkpoint is in place."""


class Fitted(NamedTuple):
    """What a finished training reports.

    Attributes:
        steps: optimizer steps, those before an interruption included.
        annotated: share of training images in view of whose crop there was evidence, over all steps.
        first_probe: the liveness check; None at weight 0.
        weight: of the evidence loss at the end.
        best_step: of the evaluation whose weights were kept; None without early stopping.
        seconds: of training, those before an interruption included.
    """

    steps: int
    annotated: float
    first_probe: GradientProbe | None
    weight: float
    best_step: int | None
    seconds: float


class Trainer:
    """Fits a `TrainingStep` with Accelerate.

    Args:
        config: how to train.
        accelerator: precision, processes and trackers are its business.
        directory: gets ``metrics.jsonl`` with one JSON object per step, ``checkpoints`` and ``watch``; None for none.
        callbacks: told what happens.
    """

    def __init__(
        self,
        config: TrainerConfig,
        accelerator: Accelerator,
        directory: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.directory = directory
        self.callbacks = tuple(callbacks)

    def fit(
        self,
        step: TrainingStep,
        inputs: ModelInputs,
        *,
        seed: int,
        description: str = "training",
        resume: bool | Path = False,
        settings: Mapping[str, Any] | None = None,
        panel: ModelInputs | None = None,
        evaluate: Evaluate | None = None,
        sampler: Sampler | None = None,
    ) -> Fitted:
        """Train in place, with the evidence probe on the first batch that shows evidence.

        Args:
            step: its parameters with ``requires_grad`` are trained; with an average, they end up as the average, and
                with early stopping as those of the best evaluation.
            inputs: training images; what does not fill an optimizer step at the end of an epoch is dropped.
            seed: of the order of the images.
            description: of the progress bar.
            resume: True to go on from the newest checkpoint in the directory, from the beginning if this training left
                none there; a folder to go on from that checkpoint.
            settings: whatever else must be the same when training is resumed, such as the method's settings.
            panel: images without augmentation that are explained every ``watch_every`` steps.
            evaluate: called every ``evaluate_every`` steps and after the last one.
            sampler: order of the rows; shuffled anew in each epoch by default.

        Raises:
            InertEvidenceError: the evidence loss does not reach the trained parameters.
            TrainingError: fewer images than a step takes, or a loss that is not finite.
            HeatmapError: the heatmap function returned something that is no heatmap.
            RunFileError: the directory holds another training, or one that cannot be resumed.
            Interrupted: SIGTERM or Ctrl-C.
        """
        tower = step.encoder.image_tower
        try:
            tower.set_checkpointing(self.config.gradient_checkpointing)
            run = _Run(self, step, inputs, seed, panel, evaluate, sampler)
            run.begin(resume, settings or {})
            with noted_signals() as asked_to_stop:
                run.train(description, asked_to_stop)
            return run.finish()
        finally:
            tower.set_checkpointing(False)
            self.accelerator.free_memory()


def check_precision(accelerator: Accelerator) -> None:
    """Refuse fp16.

    Raises:
        TrainingError: it was launched with fp16.
    """
    if accelerator.mixed_precision == "fp16":
        raise TrainingError("mixed precision fp16 underflows in heatmap gradients; launch with bf16 or no")


def shuffled(images: int, seed: int) -> Sampler:
    """All rows in random order, anew in each epoch.

    Example:
        >>> order = shuffled(images=4, seed=0)
        >>> sorted(order(0)), order(0) == order(0), order(0) == order(1)
        ([0, 1, 2, 3], True, False)
    """

    def order(epoch: int) -> list[int]:
        mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
        rows: list[int] = torch.randperm(images, generator=torch.Generator().manual_seed(mixed)).tolist()
        return rows

    return order


@dataclass
class _Progress:
    """What a loop has to remember across an interruption, besides tensors and random states."""

    number: int = 0
    seen: int = 0
    annotated: int = 0
    last_probe: int = 0
    first_probe: tuple[float, float] | None = None
    best_step: int | None = None
    best_value: float | None = None
    waited: int = 0
    stopped: bool = False
    recent_task_losses: list[float] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    seconds: float = 0.0
    probed: bool = False


class _Measured(NamedTuple):
    """One optimizer step over all processes and accumulated batches."""

    total_loss: float
    task_loss: float
    evidence_loss: float
    rma: float
    empty_heatmaps: float


class _Run:
    """One call of `Trainer.fit`."""

    def __init__(
        self,
        trainer: Trainer,
        step: TrainingStep,
        inputs: ModelInputs,
        seed: int,
        panel: ModelInputs | None,
        evaluate: Evaluate | None,
        sampler: Sampler | None,
    ) -> None:
        config, accelerator = trainer.config, trainer.accelerator
        self.config, self.accelerator = config, accelerator
        self.directory, self.callbacks = trainer.directory, trainer.callbacks
        self.step, self.inputs, self.seed, self.evaluate = step, inputs, seed, evaluate
        self.sampler, self.order_is_own = sampler or shuffled(len(inputs), seed), sampler is not None
        self.check()
        self.rows_per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
        self.rows = len(self._rows_of(0))
        config.check_fits(self.rows, accelerator.num_processes)
        self.steps_per_epoch = self.rows // self.rows_per_step
        self.total_steps = config.epochs * self.steps_per_epoch
        self.panel = self._choose_panel(panel)
        self.weight = EvidenceWeight(config.weighting, step.evidence.weight, config.evidence_warmup_steps)
        self.progress = _Progress()
        step.to(accelerator.device)
        if accelerator.is_fsdp2:
            shard(step)  # as Accelerate does, which knows neither scalar parameters nor where the blocks are
        optimizer = torch.optim.AdamW(_parameter_groups(step, config.weight_decay), lr=config.learning_rate)
        self.wrapped = step if accelerator.is_fsdp2 else accelerator.prepare(step)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        check_trainable(self.wrapped, step.encoder.image_tower, step.evidence.layers)
        self.trained = {name: value for name, value in step.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self.trained.items()} if config.ema else {}
        self.best: dict[str, Tensor] = {}
        self.saved: Path | None = None
        self.clock = time.monotonic()

    def check(self) -> None:
        """Everything that can be known to be wrong before anything is done."""
        config = self.config
        check_precision(self.accelerator)
        if self.accelerator.gradient_accumulation_steps != 1:
            raise TrainingError(
                f"accelerate was launched with {self.accelerator.gradient_accumulation_steps} gradient accumulation "
                "steps, which would count twice; leave them at 1 and set training.gradient_accumulation"
            )
        if self.accelerator.distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2:
            raise TrainingError(
                "FSDP1, whose flat parameters refuse the gradient of a gradient, cannot train through heatmaps; set "
                "fsdp_version: 2 in the Accelerate configuration (configs/accelerate/fsdp2.yaml)"
            )
        if not any(parameter.requires_grad for parameter in self.step.parameters()):
            raise TrainingError("no parameter has requires_grad; there is nothing to train")
        if config.evaluate_every and self.evaluate is None:
            raise TrainingError(
                f"training.evaluate_every is {config.evaluate_every}, but there is nothing to evaluate on: give fit "
                "an evaluate function, or leave evaluate_every out"
            )
        if config.gradient_accumulation > 1 and self.accelerator.is_main_process:
            _log.warning(
                "gradient accumulation adds up %d batches; a contrastive loss (flcp) still compares only the %d images "
                "of one batch with each other, which is not the same as a larger batch",
                config.gradient_accumulation,
                config.batch_size * self.accelerator.num_processes,
            )

    def _rows_of(self, epoch: int) -> Sequence[int]:
        """What the sampler gives, which may be anybody's."""
        rows, images = self.sampler(epoch), len(self.inputs)
        if outside := [row for row in rows if not 0 <= row < images]:
            raise TrainingError(
                f"the sampler gives row {outside[0]} for epoch {epoch}, but there are {images} training images; "
                f"expected rows from 0 to {images - 1}"
            )
        return rows

    def _hash_of_order(self) -> str:
        """What tells a sampler from another: a function has no name that would."""
        orders = [[int(row) for row in self._rows_of(epoch)] for epoch in (0, self.config.epochs - 1)]
        return hashlib.sha256(json.dumps(orders).encode()).hexdigest()

    def _choose_panel(self, panel: ModelInputs | None) -> tuple[ModelInputs, list[int]] | None:
        if not self.config.watch_every:
            return None
        if panel is None:
            raise TrainingError(
                f"training.watch_every is {self.config.watch_every}, but there is no panel to look at: give fit one, "
                "or leave watch_every out"
            )
        annotated = [row for row, source in enumerate(panel.dataset.mask_sources) if source != "none"]
        chosen = choose_panel([panel.dataset.labels[row] for row in annotated], self.config.watch_images)
        return (panel, [annotated[index] for index in chosen]) if chosen else None

    # Beginning and end

    def begin(self, resume: bool | Path, settings: Mapping[str, Any]) -> None:
        """Start afresh or from a checkpoint; nothing of another training is overwritten."""
        if rank := self.accelerator.process_index:
            # All processes were seeded alike, to build the same model; from here on each draws its own.
            set_seed(int(np.random.SeedSequence([self.seed, rank]).generate_state(1)[0]))
        if self.directory is None:
            if resume:
                raise TrainingError("there is nothing to resume from: the trainer has no directory")
            return
        check_can_be_made(self.directory)
        self.settings = self._settings(settings)
        checkpoint = checkpoints.read(resume) if isinstance(resume, Path) else None
        found = checkpoints.all_in(self.checkpoints) if self.checkpoints.is_dir() else []
        goes_on_here = resume is True or (
            isinstance(resume, Path) and resume.resolve().parent == self.checkpoints.resolve()
        )
        if not goes_on_here and (found or self.metrics.exists()):
            raise ResumeError(
                f"{self.directory} holds an earlier training; resume it, or choose another directory for a new one"
            )
        if resume is True:
            checkpoint = checkpoints.read_latest(self.checkpoints)
        if checkpoint is not None:
            checkpoints.check_settings(checkpoint.path, checkpoint.state["settings"], self.settings)
            self._restore(checkpoint)
            self.saved = checkpoint.path
        elif self.metrics.exists():
            self._check_that_it_is_ours()
        self.accelerator.wait_for_everyone()  # all have read before the first one writes
        if self.accelerator.is_main_process:
            make_writable(self.directory)
            self._continue_metrics(checkpoint)
            checkpoints.begin(self.checkpoints, self.settings)
            checkpoints.remove_after(self.checkpoints, self.progress.number)
            if resume:
                _log.info(
                    "resuming after step %d of %d%s",
                    self.progress.number,
                    self.total_steps,
                    "" if checkpoint else f": {self.checkpoints} holds no checkpoint",
                )

    def _check_that_it_is_ours(self) -> None:
        """Steps were logged and no checkpoint was left: only this very training may log them again."""
        then = checkpoints.begun_with(self.checkpoints)
        if then is None:
            raise ResumeError(
                f"there is no checkpoint in {self.checkpoints} to resume from, and {self.metrics} may be of another "
                "training; remove it to start over, or choose another directory"
            )
        checkpoints.check_settings(self.metrics, then, self.settings)

    def finish(self) -> Fitted:
        """Leave the weights that count in place."""
        if self.best or self.average:
            self._set_weights(self.best or self.average)
        unshard(self.step)
        self.wrapped.eval()
        progress = self.progress
        self._note_time()
        if progress.probed and progress.first_probe is None and self.accelerator.is_main_process:
            _log.warning(
                "the evidence loss had no gradient whenever it was looked at: there is nothing to align. Look whether "
                "masks cover whole images, or are inverted"
            )
        first = None if progress.first_probe is None else GradientProbe(*progress.first_probe)
        share = progress.annotated / progress.seen
        return Fitted(progress.number, share, first, self.weight.state.value, progress.best_step, progress.seconds)

    # The loop

    def train(self, description: str, asked_to_stop: Callable[[], bool]) -> None:
        """All steps that are left."""
        progress = self.progress
        self.wrapped.train()
        if self.panel and progress.number == 0:
            self.write({"step": 0, **self.watch()})
        disabled = not self.accelerator.is_main_process
        with tqdm(total=self.total_steps, initial=progress.number, desc=description, disable=disabled) as bar:
            while progress.number < self.total_steps and not progress.stopped:
                epoch, done = divmod(progress.number, self.steps_per_epoch)
                with closing(self.steps_of(epoch, done)) as steps:
                    for batches in steps:
                        record = self.one_step(batches)
                        shown = {name: record.get(f"{name}_loss", math.nan) for name in ("task", "evidence")}
                        bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
                        bar.update()
                        self.save_or_stop(asked_to_stop())
                        if progress.stopped:
                            break
        if self._anyone(asked_to_stop()):  # while the last loaders ended
            raise Interrupted(progress.number, self.saved)

    def _anyone(self, asked_to_stop: bool) -> bool:
        return bool(gather(torch.tensor([asked_to_stop], device=self.accelerator.device)).any())

    def save_or_stop(self, asked_to_stop: bool) -> None:
        """After a step: a checkpoint where one is due, as after the last, and the end if a process was asked for it."""
        number, every = self.progress.number, self.config.checkpoint_every
        stop = self._anyone(asked_to_stop)
        is_last = number == self.total_steps or self.progress.stopped
        saved = None
        if stop or is_last or (every and number % every == 0):
            saved = self.save()
        if stop:
            raise Interrupted(number, saved)

    def steps_of(self, epoch: int, done: int) -> Generator[list[Batch]]:
        """The accumulated batches of each step of an epoch, without loading those that are done."""
        config, accelerator = self.config, self.accelerator
        rows = self._rows_of(epoch)
        if len(rows) != self.rows:
            raise TrainingError(
                f"the sampler gives {len(rows)} rows for epoch {epoch} and gave {self.rows} for epoch 0; "
                "every epoch needs as many"
            )
        size, ours = config.batch_size, accelerator.process_index
        batches = [
            list(rows[start : start + size])
            for start in range(0, self.steps_per_epoch * self.rows_per_step, size)
            if start // size % accelerator.num_processes == ours
        ]
        self.inputs.set_epoch(epoch)
        loader = DataLoader(
            self.inputs,
            batch_sampler=batches[done * config.gradient_accumulation :],
            num_workers=config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=outlive_one_signal,
            # A generator of its own: an iterator draws a seed from one, and a resumed epoch has one iterator more.
            generator=torch.Generator().manual_seed(self.seed + epoch),
        )
        batch_iterator = iter(loader)
        while batches_of_step := list(islice(batch_iterator, config.gradient_accumulation)):
            yield batches_of_step

    def one_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """An optimizer step on the batches of this process, and all that comes with it."""
        config, progress, number = self.config, self.progress, self.progress.number
        explain = number % config.evidence_every == 0
        in_view, shares = self._count(batches)
        progress.seen += self.rows_per_step
        progress.annotated += in_view
        device = self.accelerator.device
        probe = None
        if explain and in_view and self.is_probe_due():
            first = next(index for index, share in enumerate(shares) if share)
            probe = self.probe(send_to_device(batches[first], device))
        weight = self.weight.at(number)
        all_losses: list[Losses] = []
        for index, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    losses = self.wrapped(
                        send_to_device(batch, device),
                        weight=weight * share,
                        explain=explain,
                        explain_at_most=config.evidence_images,
                    )
                self.accelerator.backward(losses.total / len(batches))
            all_losses.append(losses)
        measured = self._measure(all_losses, shares, batches, weight)
        largest = config.max_gradient_norm or math.inf
        norm = whole(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), largest)).item()
        if not math.isfinite(norm):
            raise self._not_finite("the norm of the gradient", norm, [row for b in batches for row in b.rows.tolist()])
        learning_rate = config.learning_rate * self.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step.encoder.constrain()
        for name, value in self.average.items():
            value.lerp_(self.trained[name].detach(), 1 - (config.ema or 0))
        progress.number += 1
        record = {"step": progress.number, "epoch": progress.number / self.steps_per_epoch}
        # What was not measured, because no evidence was in view, is left out.
        record |= {name: value for name, value in measured._asdict().items() if not math.isnan(value)}
        record |= {"evidence_weight": weight, "learning_rate": learning_rate, "gradient_norm": norm}
        if probe is not None:
            record["evidence_to_task_gradient_ratio"] = probe.ratio
        self.weight.saw_step(task_loss=measured.task_loss, mean_rma=measured.rma)
        self._look_for_faults(measured, [row for batch in batches for row in batch.rows.tolist()])
        if self.panel and config.watch_every and progress.number % config.watch_every == 0:
            record |= self.watch()
        is_last = progress.number == self.total_steps
        if self.evaluate and config.evaluate_every and (is_last or progress.number % config.evaluate_every == 0):
            record |= {f"eval_{name}": value for name, value in self.judge(self.evaluate).items()}
        self.write(record)
        for callback in self.callbacks:
            callback.on_step_end(progress.number, record)
        return record

    def rate(self, number: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        config = self.config
        if number < config.warmup_steps:
            return (number + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = (number - config.warmup_steps) / max(self.total_steps - config.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def _count(self, batches: Sequence[Batch]) -> tuple[int, list[float]]:
        """Images with evidence in view over all processes, and what each batch's mean over its own counts for.

        The evidence loss of a step is the mean over all annotated images of all its batches, as it would be in one
        large batch. A mean of the batches' means would give an image more weight where few are annotated.
        """
        annotated = [int(is_annotated(batch.masks).sum()) for batch in batches]
        most = self.config.evidence_images or self.config.batch_size
        explained = [min(count, most) for count in annotated]
        counts = gather(torch.tensor([[annotated, explained]], device=self.accelerator.device)).sum(dim=0)
        in_view, by_batch = int(counts[0].sum()), counts[1].tolist()
        total = sum(by_batch)
        return in_view, [len(batches) * count / total if total else 0.0 for count in by_batch]

    def _measure(
        self, losses: Sequence[Losses], shares: Sequence[float], batches: Sequence[Batch], weight: float
    ) -> _Measured:
        """What the batches of all processes say, in one message between them.

        Raises:
            TrainingError: a loss is not finite; the batch is named.
        """
        values = torch.stack([torch.stack([each.total, each.task, each.evidence]).detach() for each in losses])
        # Processes (W), batches of the step (n), then total, task, evidence.
        everyone = gather(values[None])
        explained = losses[0].rma.numel() > 0
        # The sum is not finite where a part is not: the part is to be named.
        for column, name in ((1, "task"), (2, "evidence"), (0, "total")):
            wrong = ~everyone[:, :, column].isfinite()
            if name == "evidence" and not explained:
                continue
            if wrong.any():
                rows = gather(torch.stack([batch.rows for batch in batches]).to(values.device)[None])
                value = everyone[:, :, column][wrong][0].item()
                raise self._not_finite(f"{name} loss", value, rows[wrong].flatten().tolist())
        means = everyone.mean(dim=0)
        task = means[:, 1].mean().item()
        if not any(shares) or not explained:
            return _Measured(task, task, math.nan, math.nan, math.nan)
        evidence = sum(share * mean for share, mean in zip(shares, means[:, 2].tolist(), strict=True)) / len(shares)
        rma = gather(torch.cat([each.rma for each in losses]))
        empty = gather(torch.cat([each.empty for each in losses]))
        annotated = ~rma.isnan()
        return _Measured(
            task + weight * evidence,
            task,
            evidence,
            rma[annotated].mean().item(),
            empty[annotated].float().mean().item(),
        )

    def _not_finite(self, what: str, value: float, rows: Sequence[int]) -> TrainingError:
        advice = "set training.max_gradient_norm"
        if what == "evidence loss":
            advice = "look whether heatmap or alignment divides by zero or overflows"
        return TrainingError(
            f"step {self.progress.number + 1}: {what} is {value}; lower training.learning_rate (now "
            f"{self.config.learning_rate}), or {advice}. Samples of the batch: {self._samples(rows)}"
        )

    def _samples(self, rows: Sequence[int]) -> str:
        return named([str(self.inputs.dataset.sample_ids[row]) for row in rows])

    # Evidence

    def is_probe_due(self) -> bool:
        """At first as soon as there is evidence in view, then at intervals; never where it has no weight."""
        if not self.weight.state.value:
            return False
        return self.progress.first_probe is None or (
            self.progress.number - self.progress.last_probe >= self.config.probe_every
        )

    def probe(self, batch: Batch) -> GradientProbe:
        """Measure both gradients, tell the weight, and give the measurement at the weight of this step."""
        progress, nominal = self.progress, self.weight.state.value
        progress.probed = True
        with self.accelerator.autocast(), unsharded(self.step):
            found = probe_gradients(
                self.step,
                batch,
                weight=nominal,
                explain_at_most=self.config.evidence_images,
                must_live=progress.first_probe is None,
            )
        self.weight.saw_probe(found.ratio)
        progress.last_probe = progress.number
        at_step = found._replace(evidence=found.evidence * self.weight.at(progress.number) / nominal)
        if progress.first_probe is None and found.evidence:  # an alignment that is already met pulls nothing yet
            progress.first_probe = (at_step.task, at_step.evidence)
        return at_step

    def _look_for_faults(self, measured: _Measured, rows: Sequence[int]) -> None:
        recent = self.progress.recent_task_losses
        recent.append(measured.task_loss)
        del recent[:-_FLAT_STEPS]
        if is_flat(recent):
            self._warn_once(
                "flat task loss",
                f"the task loss has been {recent[-1]:.4f} for {_FLAT_STEPS} steps: nothing is learnt. Raise "
                f"training.learning_rate (now {self.config.learning_rate}), or look whether the method trains "
                f"what you think it does. Samples of this step: {self._samples(rows)}",
            )
        if measured.empty_heatmaps == 1:
            self._warn_once(
                "empty heatmaps",
                "all heatmaps of the step are empty, so the evidence loss pulls nowhere. Lower evidence.weight, "
                "choose other evidence.layers, or look at heatmaps of the untrained model. Samples of this step: "
                f"{self._samples(rows)}",
            )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self.progress.warned:
            self.progress.warned.append(topic)
            if self.accelerator.is_main_process:
                _log.warning("step %d: %s", self.progress.number, message)

    # Looking at the model without touching it

    @contextmanager
    def as_it_would_be_kept(self) -> Iterator[None]:
        """The averaged weights in place; weights, mode and random states as they were afterwards."""
        randomness = RandomState.capture(self.accelerator.device)
        own = {name: value.detach().clone() for name, value in self.trained.items()} if self.average else {}
        if self.average:
            self._set_weights(self.average)
        self.wrapped.eval()
        try:
            with unsharded(self.step):
                yield
        finally:
            if own:
                self._set_weights(own)
            randomness.restore(self.accelerator.device)
            self.wrapped.train()

    def _set_weights(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(values[name])

    def judge(self, evaluate: Evaluate) -> Mapping[str, float]:
        """Evaluate, and let early stopping and the evidence weight know."""
        with self.as_it_would_be_kept():
            metrics = evaluate()
        try:
            self.weight.saw_evaluation(metrics)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        for callback in self.callbacks:
            callback.on_evaluate(self.progress.number, metrics)
        if self.config.early_stopping:
            self._stop_early(self.config.early_stopping, metrics)
        return metrics

    def _stop_early(self, settings: EarlyStopping, metrics: Mapping[str, float]) -> None:
        if settings.metric not in metrics:
            raise TrainingError(
                f"training.early_stopping.metric = {settings.metric!r}, but the evaluation returns {named(metrics)}"
            )
        progress, value = self.progress, metrics[settings.metric]
        signed = -value if settings.mode == "min" else value
        if math.isfinite(signed) and (progress.best_value is None or signed > progress.best_value):
            progress.best_value, progress.best_step, progress.waited = signed, progress.number, 0
            weights = self.average or self.trained
            self.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
            return
        progress.waited += 1
        if progress.waited >= settings.patience:
            progress.stopped = True
            if self.accelerator.is_main_process:
                _log.info(
                    "step %d: %s has not improved for %d evaluations; stopping with the weights of step %s",
                    progress.number,
                    settings.metric,
                    progress.waited,
                    progress.best_step,
                )

    def watch(self) -> dict[str, float]:
        """Explain the panel, keep its heatmaps, and say how they are."""
        assert self.panel is not None
        inputs, rows = self.panel
        with self.as_it_would_be_kept():
            found = explain_panel(
                self.step.classifier(), inputs, self.step.evidence.heatmap, rows, layers=self.step.evidence.layers
            )
        grid = (found.heatmaps.shape[1], found.heatmaps.shape[2])
        rma = relevance_mass_accuracy(found.heatmaps, mask_to_grid(found.masks, grid))
        if self.directory is not None and self.accelerator.is_main_process:
            preprocessing = inputs.transform.preprocessing
            pixels = torch.stack([torch.from_numpy(to_pixels(image, preprocessing)) for image in found.images])
            Gallery(pixels, found.masks, found.heatmaps, found.rows).write(
                self.directory / "watch" / f"step-{self.progress.number:08d}.safetensors"
            )
        empty = is_empty(found.heatmaps).float().mean().item()
        return {"panel_rma": rma.nanmean().item(), "panel_empty_heatmaps": empty}

    # Files

    @property
    def metrics(self) -> Path:
        assert self.directory is not None
        return self.directory / METRICS_FILE

    @property
    def checkpoints(self) -> Path:
        assert self.directory is not None
        return self.directory / "checkpoints"

    def write(self, record: Mapping[str, float]) -> None:
        """Step by step: what led to a failure is what one wants to read."""
        if self.directory is not None and self.accelerator.is_main_process:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_nan(record), allow_nan=False) + "\n")
        self.accelerator.log(dict(record), step=int(record["step"]))

    def save(self) -> Path | None:
        """Write a checkpoint of everything that decides the steps to come; None without a directory."""
        if self.directory is None:
            return None
        self._note_time()
        randomness = gather_object([RandomState.capture(self.accelerator.device).to_json()])
        groups = {
            "model": self._model_state(),
            "optimizer": checkpoints.optimizer_state(self.optimizer, self.trained),
            "average": self.average,
            "best": self.best,
        }
        tensors = {
            group: {name: whole(value) for name, value in values.items()} for group, values in groups.items() if values
        }
        path = self.checkpoints / f"step-{self.progress.number:08d}"
        if self.accelerator.is_main_process:
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())
            state = {
                "settings": self.settings,
                "progress": asdict(self.progress),
                "weight": self.weight.state._asdict(),
                "metrics_bytes": self.metrics.stat().st_size,
                "random": randomness,
            }
            checkpoints.write(self.checkpoints, self.progress.number, state, tensors, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.saved = path
        for callback in self.callbacks:
            callback.on_save(self.progress.number, path)
        return path

    def _note_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now

    def _restore(self, checkpoint: Checkpoint) -> None:
        path, state, tensors = checkpoint.path, checkpoint.state, checkpoint.tensors
        checkpoints.copy_into(self._model_state(), tensors["model"], path)
        checkpoints.copy_into(self.average, tensors.get("average", {}), path)
        device = self.accelerator.device
        best = tensors.get("best", {})
        self.best = {name: laid_out_like(value.to(device), self.trained[name]) for name, value in best.items()}
        checkpoints.load_optimizer_state(self.optimizer, self.trained, tensors["optimizer"])
        self.progress = _Progress(**state["progress"])
        self.weight.state = WeightState(**state["weight"])
        RandomState.from_json(state["random"][self.accelerator.process_index]).restore(device)

    def _model_state(self) -> dict[str, Tensor]:
        """Trained parameters and all buffers that are part of the model's state."""
        saved = self.step.state_dict(keep_vars=True)
        buffers = {name: value for name, value in self.step.named_buffers() if name in saved}
        return {**self.trained, **buffers}

    def _continue_metrics(self, checkpoint: Checkpoint | None) -> None:
        """Forget what was logged after the checkpoint: those steps are going to be logged again."""
        if not self.metrics.exists():
            return
        known = checkpoint is not None and checkpoint.path.parent.resolve() == self.checkpoints.resolve()
        length = checkpoint.state["metrics_bytes"] if checkpoint is not None and known else 0
        if self.metrics.stat().st_size < length:
            _log.warning("%s has lost lines since the checkpoint was written", self.metrics)
            return
        os.truncate(self.metrics, length)

    def _settings(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that must be the same when training is resumed, by dotted name."""
        evidence, inputs, transform = self.step.evidence, self.inputs, self.inputs.transform
        training = self.config.model_dump(mode="json", exclude=set(MAY_CHANGE))
        augmentation = transform.augmentation
        frozen = {name: whole(value) for name, value in self.step.named_parameters() if not value.requires_grad}
        ours = checkpoints.flattened(
            {
                "training": training,
                "evidence": {
                    "heatmap": name_of(evidence.heatmap),
                    "alignment": name_of(evidence.alignment),
                    "layers": evidence.layers if evidence.layers == "all" else list(evidence.layers),
                    "weight": evidence.weight,
                },
                "seed": self.seed,
                "processes": self.accelerator.num_processes,
                "mixed_precision": str(self.accelerator.mixed_precision),
                "data": {
                    "fingerprint": fingerprint(inputs.dataset),
                    "seed": inputs.seed,
                    "augmentation": None if augmentation is None else augmentation.model_dump(mode="json"),
                    "preprocessing": transform.preprocessing._asdict(),
                    "rows": self.rows,
                    "order": self._hash_of_order() if self.order_is_own else None,
                },
                "weights": {"trained": sorted(self.trained), "frozen_sha256": checkpoints.hash_of(frozen)},
            }
        )
        return checkpoints.flattened(others) | ours


_FLAT_STEPS = 100


def is_flat(task_losses: Sequence[float]) -> bool:
    """Whether the last losses are so much alike that nothing can be learning.

    Between batches a loss that is alive varies by more than a thousandth of its size. One close to 0 has got there by
    learning.

    Example:
        >>> is_flat([1.386, 1.3862] * 50), is_flat([1.386, 1.3] * 50), is_flat([1.386] * 99), is_flat([1e-4] * 100)
        (True, False, False, False)
    """
    if len(task_losses) < _FLAT_STEPS:
        return False
    smallest, largest = min(task_losses), max(task_losses)
    return largest > 0.01 and largest - smallest < 1e-3 * largest


def _parameter_groups(step: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim == 1 and parameter.numel() > 1]
    # Single numbers are never in shards, so they are kept apart from what may be.
    scalars = [parameter for parameter in trained if parameter.ndim < 2 and parameter.numel() == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": scalars, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
