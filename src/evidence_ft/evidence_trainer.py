"""Fine-tuning in one object: a model, data, a method, and functions of your own in place of any part.

A thin composition of what the package is made of: a method prepares the encoder, `TrainingStep` computes its losses,
`Trainer` fits it, `evaluate` judges it. Who needs something else composes these parts.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import open_clip
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import BaseModel, Field, ValidationError, field_validator

from evidence_ft import checkpoints, trackers
from evidence_ft.backbones.open_clip import OpenClipEncoder
from evidence_ft.backgrounds import BackgroundSwap
from evidence_ft.classifier import FineTuning, Heatmap, Objective
from evidence_ft.complaints import complaints, dotted
from evidence_ft.config import ConfigError, component
from evidence_ft.encoder import Encoder
from evidence_ft.evaluation import evaluate
from evidence_ft.files import named
from evidence_ft.images import DataError
from evidence_ft.installation import explained
from evidence_ft.model import EvidenceModel
from evidence_ft.outcomes import Outcomes, summarise
from evidence_ft.samples import EvidenceDataset, OnBadSample, classes_without_images, fingerprint, validate
from evidence_ft.saved_model import BaseModelRef, Prepare, save_model
from evidence_ft.tower import check_tower, resolve_layers
from evidence_ft.trainer import Fitted, Sampler, Trainer, TrainerCallback, check_precision
from evidence_ft.trainer_config import TrainerConfig
from evidence_ft.training import Alignment, EvidenceTerm, TrainingError, TrainingStep, extract_features, name_of
from evidence_ft.transforms import ModelInputs, SampleTransform
from evidence_ft.wrapped_datasets import as_evidence_dataset

_log = logging.getLogger(__name__)

_ON_THE_CARD = ("accuracy", "PT", "IR", "mean_RMA", "swapped_accuracy", "n", "n_annotated")

ObjectiveOf: TypeAlias = Callable[[FineTuning], Objective]
"""A prepared method to the loss it is trained with: see `EvidenceTrainer`."""


class EvidenceTrainingArguments(TrainerConfig):
    """How `EvidenceTrainer` trains and judges: the settings of `TrainerConfig`, and these."""

    output_dir: Path = Field(Path("trained"), description="metrics.jsonl, checkpoints and models go here")
    seed: int = Field(0, ge=0, description="of training: order of images, augmentation, heads")
    evidence_weight: float = Field(1.0, ge=0, description="of the evidence loss; 0 for training without it")
    layers: tuple[int, ...] | Literal["all"] = Field(
        "all", description="blocks heatmaps are made from, in training and evaluation; negative ones count from the end"
    )
    explain: Literal["label", "prediction"] = Field("label", description="class whose score is explained in evaluation")
    threshold: float = Field(0.5, gt=0, le=1, description="RMA from which evidence is valid")
    eval_batch_size: int = Field(64, gt=0, description="images per process in evaluation")
    swap_seed: int = Field(0, ge=0, description="which background goes to which object in evaluation")
    on_bad_sample: OnBadSample = Field(
        "error", description="whether a sample that cannot be used stops, or is left out"
    )
    report_to: tuple[str, ...] = Field((), description="trackers, such as tensorboard, wandb, trackio or mlflow")
    project: str = Field("evidence-ft", min_length=1, description="name of the project for trackers")
    device: Literal["auto", "cpu"] = Field("auto", description="auto is what accelerate launch chose")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @field_validator("report_to")
    @classmethod
    def _are_trackers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        trackers.check(names)
        return tuple(dict.fromkeys(names))

    @property
    def training(self) -> TrainerConfig:
        """The settings of the loop alone."""
        return TrainerConfig.model_validate(self.model_dump(include=set(TrainerConfig.model_fields)))


class EvidenceTrainer:
    """Fine-tunes a vision-language model, and measures whether it is right for the right reasons.

    Args:
        model: a checkpoint id (see `evidence_ft.backbones.open_clip.load`), an encoder of a backbone, or a model of
            open_clip together with its ``architecture``.
        args: how to train and judge.
        train_dataset: ours, a Hugging Face ``datasets.Dataset`` with columns image, label and mask, or a torchvision
            one; others are wrapped by `evidence_ft.wrapped_datasets` first. None to evaluate only.
        eval_dataset: likewise; or several by name.
        method: name of a file in ``methods``, a module like these, or a function of encoder and class names.
        method_config: settings of the method, as its ``Config`` or a mapping.
        heatmap: name of a file in ``heatmaps``, or a function ``heatmap(trace, score, *, create_graph)`` to a map
            ``(B, h, w)``; trained through and judged by.
        alignment: name of a file in ``alignments``, or a function of heatmaps and masks ``(B, h, w)`` to a loss
            ``(B,)``.
        objective: replaces the method's loss: a function of the prepared method (its ``encoder`` and ``head``) to a
            function of features ``(B, F)`` and labels ``(B,)``, to the loss and the score that is explained.
        sampler: epoch to the rows of the training images in their order; shuffled anew in each epoch by default.
        callbacks: told what happens, see `evidence_ft.trainer.TrainerCallback`.
        architecture: of an open_clip model: the name it was made by, such as ``ViT-B-32``.
        accelerator: instead of one made from ``args``.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: settings that do not exist or do not fit.
        DataError: images or masks that cannot be used.

    Example:
        >>> from evidence_ft import EvidenceTrainer, EvidenceTrainingArguments  # doctest: +SKIP
        >>> args = EvidenceTrainingArguments(output_dir="tuned", learning_rate=1e-5, epochs=3)  # doctest: +SKIP
        >>> trainer = EvidenceTrainer("ViT-B-16/openai", args, train, test)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.evaluate()["PT"]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Encoder | torch.nn.Module,
        args: EvidenceTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        method: str | ModuleType | Prepare = "flcp",
        method_config: BaseModel | Mapping[str, Any] | None = None,
        heatmap: str | Heatmap = "gradient_attention",
        alignment: str | Alignment = "outside_mass",
        objective: ObjectiveOf | None = None,
        sampler: Sampler | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        architecture: str | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.args = args or EvidenceTrainingArguments()
        self.accelerator = accelerator or _accelerator(self.args)
        _check_accelerator(self.accelerator, self.args)
        _check_parts(method, heatmap, alignment, objective, sampler, callbacks)
        self.heatmap: Heatmap = component("heatmaps", heatmap).heatmap if isinstance(heatmap, str) else heatmap
        self.alignment: Alignment = component("alignments", alignment).loss if isinstance(alignment, str) else alignment
        self.sampler = sampler
        self.callbacks = tuple(callbacks)
        self.train_dataset = None if train_dataset is None else self._checked(train_dataset, "train_dataset")
        self.eval_datasets = {name: self._checked(each, name) for name, each in _by_name(eval_dataset).items()}
        self.class_names = self._class_names()
        self.last_metrics: dict[str, dict[str, float]] = {}
        self.steps = 0
        self._began = self._is_finished = False
        prepare, self.method_config = _method(method, method_config)
        set_seed(self.args.seed)
        encoder = _as_encoder(model, architecture)
        try:
            resolve_layers(self.args.layers, len(encoder.image_tower.blocks()))
        except ValueError as error:
            raise ConfigError(f"args.{error}") from error
        self._start = BaseModelRef.of(encoder)
        self._start_was_loaded = isinstance(model, str)
        try:
            tuning = prepare(encoder, self.class_names)
        except ValueError as error:
            raise ConfigError(f"method {self.method_config['name']!r}: {error}") from error
        self.tuning = tuning if objective is None else replace(tuning, objective=objective(tuning))
        self._objective_name = None if objective is None else name_of(objective)
        self._heatmap_name = heatmap if isinstance(heatmap, str) else name_of(heatmap)

    @cached_property
    def base(self) -> BaseModelRef:
        """The model that is tuned, by a name only if it can be loaded by that."""
        return self._start if self._start_was_loaded else self._start.checked()

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> Fitted:
        """Train in place; settings, losses and checkpoints go to ``output_dir``.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in ``output_dir``, from the beginning if this
                training left none there; or the folder of a checkpoint.

        Raises:
            ConfigError: the method trains nothing.
            DataError: there is nothing to train on, or nothing to align evidence with.
            TrainingError: training cannot go on; the message says at which step and why.
            RunFileError: ``output_dir`` holds another training, or the checkpoint is not there or damaged.
            Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
        """
        args, dataset = self.args, self.train_dataset
        if dataset is None:
            raise DataError("found no train_dataset; give one to train")
        if not self.tuning.trains and self.tuning.read_training_set is None:
            raise ConfigError(f"method {self.method_config['name']!r} trains nothing; evaluate it, or choose another")
        if self.tuning.trains:
            rows = len(dataset) if self.sampler is None else len(self.sampler(0))  # which may repeat or leave out some
            args.check_fits(rows, self.accelerator.num_processes)
            if args.evidence_weight and not any(source != "none" for source in dataset.mask_sources):
                raise DataError(
                    "no training image has a mask or box, so there is nothing to align evidence with; annotate some, "
                    "or set evidence_weight to 0"
                )
        if (unseen := classes_without_images(dataset)) and self.accelerator.is_main_process:
            _log.warning("train_dataset: no image shows %s: nothing is learnt of it", named(unseen, 20))
        if self.tuning.read_training_set is not None:
            self.tuning.read_training_set(
                *extract_features(self.tuning.encoder, self._inputs(dataset), self.accelerator, args.eval_batch_size)
            )
        if not self.tuning.trains:
            return Fitted(steps=0, annotated=math.nan, first_probe=None, weight=0.0, best_step=None, seconds=0.0)
        self._start_trackers()
        resume = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else resume_from_checkpoint
        if resume is True and self._began and not checkpoints.all_in(args.output_dir / "checkpoints"):
            raise TrainingError(
                f"{args.output_dir} holds no checkpoint, and this model has been trained already: it cannot start from "
                "the beginning. Make a new EvidenceTrainer; checkpoint_every writes checkpoints along the way"
            )
        self._began, self._is_finished = True, False
        swap = BackgroundSwap(dataset, args.background_swap) if args.background_swap else None
        transform = SampleTransform(self.tuning.encoder.preprocessing, args.augmentation)
        fitted = Trainer(args.training, self.accelerator, args.output_dir, self.callbacks).fit(
            TrainingStep(
                self.tuning, EvidenceTerm(self.heatmap, self.alignment, args.layers, weight=args.evidence_weight)
            ),
            ModelInputs(dataset, transform, args.seed, swap),
            seed=args.seed,
            resume=resume or False,
            settings={
                "method": self.method_config,
                "base": self._start.sha256,
                "objective": self._objective_name,
                "judged": self._judged_by() if args.evaluate_every else None,
            },
            panel=self._inputs(next(iter(self.eval_datasets.values()), dataset)),
            evaluate=(lambda: _joined(self._judge(self.eval_datasets))) if self.eval_datasets else None,
            sampler=self.sampler,
        )
        self.steps = fitted.steps
        self._is_finished = True
        return fitted

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Accuracy, PT, IR and the like; see `evidence_ft.outcomes.summarise`.

        Args:
            dataset: to judge on, or several by name; by default ``eval_dataset``.

        Returns:
            By name; by ``<data set>/<name>`` where there are several data sets.
        """
        datasets = self.eval_datasets
        if dataset is not None:
            datasets = {name: self._checked(each, name) for name, each in _by_name(dataset).items()}
        if not datasets:
            raise DataError("found no eval_dataset; give one to evaluate on")
        self._start_trackers()
        self.last_metrics = self._judge(datasets)
        metrics = _joined(self.last_metrics)
        if self.accelerator.trackers:
            self.accelerator.log({f"final_{name}": value for name, value in metrics.items()}, step=self.steps)
        return metrics

    def predict(self, dataset: Any) -> Outcomes:
        """What becomes of each image: prediction, confidence, RMA, prediction on another background."""
        return self._outcomes(self._checked(dataset, "predict"), "predict")

    def to_model(self) -> EvidenceModel:
        """The classifier as it is now, for use."""
        return EvidenceModel(
            self.tuning,
            method_config=self.method_config,
            base=self.base,
            heatmap=self._heatmap_name,
            layers=self.args.layers,
        )

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Write the model as it is now; `EvidenceModel.from_pretrained` reads it.

        The checkpoint that a finished training leaves goes, unless ``checkpoint_every`` asks for checkpoints.

        Args:
            output_dir: by default ``model`` in ``args.output_dir``.

        Returns:
            The folder.
        """
        directory = self.args.output_dir / "model" if output_dir is None else Path(output_dir)
        if self.accelerator.is_main_process:
            save_model(
                directory,
                self.tuning,
                class_names=self.class_names,
                method_config=self.method_config,
                base=self.base,
                heatmap=self._heatmap_name,
                layers=self.args.layers,
            )
            if self._is_finished and self.args.checkpoint_every is None:
                checkpoints.remove_all(self.args.output_dir / "checkpoints")
        self.accelerator.wait_for_everyone()
        return directory

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        metrics: Mapping[str, Mapping[str, float]] | None = None,
    ) -> str | None:
        """Upload the model with a card that holds the last evaluation; see `EvidenceModel.push_to_hub`.

        Args:
            repo_id: ``<owner>/<name>``; made if it does not exist.
            private: whether others may not see it; None for the owner's default.
            token: by default the one the hub's client knows.
            metrics: further rows of the card's table, such as those of the baseline.

        Returns:
            Address of the commit; None on all but the main process.
        """
        address = None
        if self.accelerator.is_main_process:
            own = {name: {key: values[key] for key in _ON_THE_CARD} for name, values in self.last_metrics.items()}
            args = self.args
            details = {
                "alignment": name_of(self.alignment),
                "evidence weight": args.evidence_weight,
                "explained class": args.explain,
                "threshold": args.threshold,
                "learning rate": args.learning_rate,
                "steps": self.steps,
                "seed": args.seed,
            }
            address = self.to_model().push_to_hub(
                repo_id, private=private, token=token, metrics={**(metrics or {}), **own}, details=details
            )
        self.accelerator.wait_for_everyone()
        return address

    def _start_trackers(self) -> None:
        if not self.args.report_to or self.accelerator.trackers:
            return
        settings = {**self.args.model_dump(mode="json"), "method": self.method_config, "base": self._start._asdict()}
        trackers.start(self.accelerator, self.args.project, settings)

    def _checked(self, dataset: Any, name: str) -> EvidenceDataset:
        checked, bad = validate(
            as_evidence_dataset(dataset),
            on_bad_sample=self.args.on_bad_sample,
            description=f"checking {name}",
            progress=self.accelerator.is_main_process,
        )
        if bad and self.accelerator.is_main_process:
            _log.warning("%s: left out %d bad sample(s), such as %s", name, len(bad), bad[0].reason)
        return checked

    def _class_names(self) -> tuple[str, ...]:
        datasets = {"train_dataset": self.train_dataset, **self.eval_datasets}
        by_data_set = {name: tuple(each.class_names) for name, each in datasets.items() if each is not None}
        if not by_data_set:
            raise DataError("found neither train_dataset nor eval_dataset; give at least one, for the class names")
        first, *others = by_data_set
        for other in others:
            if by_data_set[other] != by_data_set[first]:
                raise DataError(
                    f"{first} and {other} have different classes: {named(by_data_set[first])} and "
                    f"{named(by_data_set[other])}; give class_names in one order where they are wrapped"
                )
        return by_data_set[first]

    def _inputs(self, dataset: EvidenceDataset) -> ModelInputs:
        return ModelInputs(dataset, SampleTransform(self.tuning.encoder.preprocessing), seed=0)

    def _judged_by(self) -> dict[str, Any]:
        """What evaluations depend on, which early stopping and the evidence weight may follow."""
        args = self.args
        return {
            "explain": args.explain,
            "threshold": args.threshold,
            "swap_seed": args.swap_seed,
            "data": {name: fingerprint(each) for name, each in self.eval_datasets.items()},
        }

    def _judge(self, datasets: Mapping[str, EvidenceDataset]) -> dict[str, dict[str, float]]:
        return {name: summarise(self._outcomes(each, name), self.args.threshold) for name, each in datasets.items()}

    def _outcomes(self, dataset: EvidenceDataset, split: str) -> Outcomes:
        args = self.args
        if tuple(dataset.class_names) != self.class_names:
            raise DataError(
                f"{split} has classes {named(dataset.class_names)}, but the model knows {named(self.class_names)}, in "
                "this order; give class_names where the data set is wrapped"
            )
        return evaluate(
            self.tuning.classifier(),
            self._inputs(dataset),
            self.heatmap,
            accelerator=self.accelerator,
            layers=args.layers,
            explain=args.explain,
            batch_size=args.eval_batch_size,
            swap_seed=args.swap_seed,
            split=split,
            description=f"evaluating {split}",
        )


def _accelerator(args: EvidenceTrainingArguments) -> Accelerator:
    return Accelerator(cpu=args.device == "cpu", log_with=list(args.report_to) or None, project_dir=args.output_dir)


def _check_accelerator(accelerator: Accelerator, args: EvidenceTrainingArguments) -> None:
    """Whether one that was made elsewhere does what ``args`` ask for."""
    check_precision(accelerator)
    if args.device == "cpu" and accelerator.device.type != "cpu":
        raise ConfigError(
            f"args.device = 'cpu', but the accelerator that was given is on {accelerator.device}; leave one of them out"
        )
    logs_with = [str(getattr(each, "value", each)) for each in accelerator.log_with]
    if missing := [name for name in args.report_to if name not in logs_with]:
        raise ConfigError(
            f"args.report_to = {named(args.report_to)}, but the accelerator that was given logs with "
            f"{named(logs_with)}; make it with log_with={missing[0]!r} and a project_dir, or leave accelerator out"
        )


def _check_parts(
    method: object, heatmap: object, alignment: object, objective: object, sampler: object, callbacks: object
) -> None:
    """Whether what may be anybody's is at least of the right kind."""
    parts = {"heatmap": heatmap, "alignment": alignment, "objective": objective, "sampler": sampler}
    for name, part in parts.items():
        may_be = {"heatmap": str, "alignment": str}.get(name, type(None))
        if not isinstance(part, may_be) and not callable(part):
            raise ConfigError(
                f"{name}: found {type(part).__name__}, expected a function{' or a name' * (may_be is str)}"
            )
    if not isinstance(method, str | ModuleType) and not callable(method):
        raise ConfigError(f"method: found {type(method).__name__}, expected a name, a module or a function")
    given = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
    if wrong := [each for each in given if not isinstance(each, TrainerCallback)]:
        raise ConfigError(
            f"callbacks: found {type(wrong[0]).__name__}, expected a list of objects of classes derived from "
            "evidence_ft.trainer.TrainerCallback"
        )


def _by_name(datasets: Any) -> dict[str, Any]:
    if datasets is None:
        return {}
    return dict(datasets) if isinstance(datasets, Mapping) else {"test": datasets}


def _joined(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By the metric's name, behind that of its data set where there are several."""
    return {
        f"{name}/{key}" if len(metrics) > 1 else key: value
        for name, values in metrics.items()
        for key, value in values.items()
    }


def _as_encoder(model: Any, architecture: str | None) -> Encoder:
    if isinstance(model, Encoder):
        return model
    if isinstance(model, str):
        with explained("backbone open_clip"):
            encoder: Encoder = component("backbones", "open_clip").load(model)
        return encoder
    if architecture is None:
        raise ConfigError(
            f"found a model of type {type(model).__name__}, expected a checkpoint id, an encoder of a backbone, or an "
            "open_clip model together with the name it was made by: architecture='ViT-B-32'"
        )
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ConfigError(f"open_clip knows no architecture {architecture!r}; give the name the model was made by")
    wrapped = OpenClipEncoder(model, open_clip.get_tokenizer(architecture), {"model_cfg": config}, checkpoint="").eval()
    check_tower(wrapped.image_tower, wrapped.preprocessing.size)
    return wrapped


def _method(
    method: str | ModuleType | Prepare, settings: BaseModel | Mapping[str, Any] | None
) -> tuple[Prepare, dict[str, Any]]:
    """What prepares an encoder, and the settings that are saved with the model."""
    module = component("methods", method) if isinstance(method, str) else method
    if not isinstance(module, ModuleType):
        if settings is not None:
            raise ConfigError("a method that is a function takes no method_config; settle its settings in the function")
        return module, {"name": name_of(module)}
    if isinstance(settings, BaseModel):
        config = settings
    else:
        try:
            config = module.Config.model_validate(settings or {})
        except ValidationError as error:
            found = complaints(error, key_of=lambda path: dotted(["method_config", *path]))
            raise ConfigError("; ".join(found)) from error
    return partial(module.prepare, config=config), config.model_dump(mode="json")
