"""Configuration to objects to run records.

An experiment is some of five arms from one start and one seed: ``zero_shot`` (nothing is trained), ``baseline`` (the
method with the evidence loss at weight 0), ``evidence`` (the same with its weight), ``swap`` (the baseline with
background-swap augmentation) and ``evidence_swap`` (both). What can be checked is checked before training starts.
"""

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

from evidence_ft import checkpoints, trackers
from evidence_ft.adaptation import interpolate, snapshot
from evidence_ft.backgrounds import BackgroundSwap
from evidence_ft.checkpoints import flattened
from evidence_ft.classifier import Classifier, FineTuning
from evidence_ft.config import Arm, ConfigError, ExperimentConfig, component, parse, parse_command_line
from evidence_ft.encoder import CheckpointError, DualEncoder, Encoder
from evidence_ft.evaluation import choose_panel, evaluate, explain_panel
from evidence_ft.evidence import HeatmapError
from evidence_ft.files import RunFileError, check_can_be_made, make_writable, named
from evidence_ft.images import DataError
from evidence_ft.installation import InstallationError, explained
from evidence_ft.interruption import Interrupted
from evidence_ft.outcomes import Gallery, Outcomes, summarise
from evidence_ft.report import format_table, write_comparison
from evidence_ft.runs import (
    CONFIG_FILE,
    RECORD_FILE,
    DataRecord,
    RunRecord,
    SkippedSample,
    StoredFile,
    environment,
    write_config,
)
from evidence_ft.samples import EvidenceDataset, Subset, classes_without_images, fingerprint, validate
from evidence_ft.saved_model import BaseModelRef, save_model
from evidence_ft.tower import UnsupportedTowerError, resolve_layers
from evidence_ft.trainer import Trainer, check_precision
from evidence_ft.trainer_config import MAY_CHANGE
from evidence_ft.training import EvidenceTerm, TrainingError, TrainingStep, extract_features
from evidence_ft.transforms import ModelInputs, SampleTransform, to_pixels

_log = logging.getLogger(__name__)

SWAP_PROBABILITY = 0.5
"""Of the swap arms, where ``training.background_swap`` names none."""

VALIDATION = "held out"
"""Name among the splits of the training images that ``run.validation_share`` holds out."""

ArmState: TypeAlias = Literal["new", "interrupted", "finished", "other"]
"""Nothing there; begun with these settings; finished with these settings; or left by other settings."""

MENDABLE = (
    CheckpointError,
    ConfigError,
    DataError,
    HeatmapError,
    InstallationError,
    RunFileError,
    TrainingError,
    UnsupportedTowerError,
)
"""Errors whose message says all that a user needs."""

_SWAP_ARMS: tuple[Arm, ...] = ("swap", "evidence_swap")
_EVIDENCE_ARMS: tuple[Arm, ...] = ("evidence", "evidence_swap")
_NO_MATTER = {
    *(f"run.{key}" for key in ("arms", "device", "directory", "name", "report_to", "resume", "threads")),
    *(f"training.{key}" for key in MAY_CHANGE),
}  # settings that do not decide what an arm finds


_SHOWN = 8  # settings that an error names before it only counts


class Split(NamedTuple):
    """A validated split with what is recorded of it."""

    dataset: EvidenceDataset
    record: DataRecord


def main(default: Path, description: str, *, method: str | None = None, arms: Sequence[Arm] | None = None) -> None:
    """What a recipe does: read the command line, run, print the table and where the report is.

    Args:
        default: configuration without ``--config``.
        description: of ``--help``.
        method: ``method.name`` where neither the file nor a flag says otherwise.
        arms: ``run.arms``, likewise.

    Raises:
        SystemExit: 75 when interrupted; with the message alone, for everything a user can mend.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Hub clients report each request, and every process would.
    for library in ("httpx", "httpcore", "huggingface_hub", "matplotlib", "fontTools"):
        logging.getLogger(library).setLevel(logging.WARNING)
    config = parse_command_line(default, description, method=method, arms=arms)
    try:
        directory = run(config)
    except Interrupted as interrupted:
        raise SystemExit(interrupted.exit_code) from interrupted
    except MENDABLE as error:
        raise SystemExit(f"error: {error}") from error
    if directory is not None:
        sys.stdout.write(f"\n{(directory / 'comparison.html').resolve()}\n")


def run(config: ExperimentConfig[Any, Any]) -> Path | None:
    """Run the arms of an experiment one after the other, then compare them.

    Args:
        config: checked, as `evidence_ft.config.parse` gives it.

    Returns:
        Folder of the run, with ``comparison.html``, ``.md`` and ``.json`` in it; None on all but the main process.

    Raises:
        ConfigError: settings that cannot be met here.
        DataError: images or masks that cannot be used.
        CheckpointError: a model that cannot be loaded.
        TrainingError: training that cannot go on.
        RunFileError: an interrupted arm that cannot be resumed.
        Interrupted: SIGTERM or Ctrl-C; ``run.resume`` continues.
    """
    directory = run_arms(config)
    if directory is not None:
        comparison = write_comparison(directory)
        sys.stdout.write(f"\n{format_table(comparison)}\n")
    return directory


def run_arms(config: ExperimentConfig[Any, Any]) -> Path | None:
    """Run the arms of an experiment one after the other: `run` without the comparison."""
    _check_settings(config)
    with _threads(config.run.threads):
        return _run_arms(config)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_arms(config: ExperimentConfig[Any, Any]) -> Path | None:
    accelerator = _accelerator(config)
    directory = config.run.directory / config.run.name
    check_can_be_made(directory)
    arms = _arms_to_run(config, directory, accelerator)
    datasets = _load_datasets(config)
    _check_model(config, arms, next(iter(datasets.values())).class_names)
    splits = _checked_splits(config, datasets, accelerator)
    if set(arms) - {"zero_shot", "baseline"}:  # those two there are also of methods that train nothing
        config.training.check_fits(splits[config.data.train_split].record.n, accelerator.num_processes)
    _warn_of_unseen_classes(config, splits, accelerator)
    _check_others(config, arms, splits, directory)
    if accelerator.is_main_process:
        make_writable(directory)
    try:
        ran = [
            arm
            for arm, resume in arms.items()
            if _run_arm(arm, config, splits, directory / arm, accelerator, resume=resume)
        ]
    except Interrupted as interrupted:
        if accelerator.is_main_process:
            _log.warning("%s; the same command with --run.resume continues", interrupted)
        raise
    finally:
        accelerator.end_training()
    if arms and not ran:
        raise ConfigError(
            f"run.arms = {named(config.run.arms)}: nothing was run, because method {config.method.name} trains "
            "nothing; choose zero_shot or baseline, or another method"
        )
    return directory if accelerator.is_main_process else None


def arm_state(config: ExperimentConfig[Any, Any], arm: Arm) -> ArmState:
    """What an earlier run of this experiment has left of an arm.

    Raises:
        RunFileError: its record is damaged.
    """
    directory = config.run.directory / config.run.name / arm
    if not directory.exists():
        return "new"
    if _differences(directory, config, arm):
        return "other"
    return "finished" if (directory / RECORD_FILE).exists() else "interrupted"


def _differences(directory: Path, config: ExperimentConfig[Any, Any], arm: Arm) -> list[str]:
    """In what the settings that an arm was begun with differ from those it would have now, among those that matter."""
    if (directory / RECORD_FILE).exists():
        begun: Any = RunRecord.read(directory).config
    else:
        try:
            begun = yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            begun = None
        if not isinstance(begun, dict):
            return [f"there is no {CONFIG_FILE} that could be read"]
    theirs, ours = (
        {key: value for key, value in flattened(tree).items() if key not in _NO_MATTER}
        for tree in (begun, arm_config(config, arm).model_dump(mode="json"))
    )
    return checkpoints.differences(theirs, ours)


def _check_settings(config: ExperimentConfig[Any, Any]) -> None:
    """Settings that are fine each by itself, but not together."""
    arms, training = config.run.arms, config.training
    if training.background_swap and not set(arms) & set(_SWAP_ARMS):
        raise ConfigError(
            f"training.background_swap = {training.background_swap:g}, but none of run.arms = {named(arms)} swaps "
            "backgrounds; add swap or evidence_swap, or leave background_swap out"
        )
    if training.evaluate_every and not config.run.validation_share:
        raise ConfigError(
            f"training.evaluate_every = {training.evaluate_every}, but no images are held out to evaluate on; set "
            "run.validation_share, for example to 0.1: test images are not for choosing models"
        )
    try:
        trackers.check(config.run.report_to)
    except ValueError as error:
        raise ConfigError(f"run.report_to: {error}") from error


def _arms_to_run(config: ExperimentConfig[Any, Any], directory: Path, accelerator: Accelerator) -> dict[Arm, bool]:
    """The arms, and whether they go on from where they were: with ``run.resume``, those that have not finished."""
    if not config.run.resume:
        return dict.fromkeys(config.run.arms, False)
    states = {arm: arm_state(config, arm) for arm in config.run.arms}
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if others := [arm for arm, state in states.items() if state == "other"]:
        found = _differences(directory / others[0], config, others[0])
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConfigError(
            f"run.resume: {directory / others[0]} was begun with other settings: {'; '.join(found[:_SHOWN])}{more}. "
            f"Resume with those of its {CONFIG_FILE}, choose another run.name, or run without --run.resume, which "
            "moves it to replaced"
        )
    for arm, state in states.items():
        if accelerator.is_main_process and state != "new":
            _log.info("%s: %s", arm, "has finished; kept" if state == "finished" else "was interrupted; continuing")
    return {arm: state == "interrupted" for arm, state in states.items() if state != "finished"}


def _accelerator(config: ExperimentConfig[Any, Any]) -> Accelerator:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device = 'cuda', but torch sees no GPU here; set run.device to 'auto' or 'cpu', or install a build of "
            f"torch for your GPU (this is {torch.__version__})"
        )
    accelerator = Accelerator(
        cpu=config.run.device == "cpu",
        log_with=list(config.run.report_to) or None,
        project_dir=config.run.directory / config.run.name,
    )
    if config.run.device == "cuda" and accelerator.device.type != "cuda":
        raise ConfigError(
            f"run.device = 'cuda', but accelerate was launched for {accelerator.device}; launch it without --cpu"
        )
    check_precision(accelerator)
    if accelerator.is_main_process:
        _log.info(
            "device %s, %d process(es), mixed precision %s",
            accelerator.device,
            accelerator.num_processes,
            accelerator.mixed_precision,
        )
    return accelerator


def _load_datasets(config: ExperimentConfig[Any, Any]) -> dict[str, EvidenceDataset]:
    """Every split, none of its images read yet."""
    data = config.data
    module = component("datasets", data.format)
    names = list(dict.fromkeys([*([data.train_split] if _trains(config) else []), *data.test_splits]))
    return {name: module.load(data, name) for name in names}


def _trains(config: ExperimentConfig[Any, Any]) -> bool:
    return any(arm != "zero_shot" for arm in config.run.arms)


def _check_model(config: ExperimentConfig[Any, Any], arms: Collection[Arm], class_names: Sequence[str]) -> None:
    """Whether a model without a text tower can do what the arms ask, said before images are read.

    Models with one can, as far as can be told without them: their weights are loaded when the images have been checked.
    """
    if getattr(component("backbones", config.model.backbone), "READS_TEXT", True) or not arms:
        return
    encoder = _load_encoder(config)
    for arm in arms:
        _prepare(arm, arm_config(config, arm), encoder, class_names)


def _load_encoder(config: ExperimentConfig[Any, Any]) -> Encoder:
    with explained(f"backbone {config.model.backbone}"):
        encoder: Encoder = component("backbones", config.model.backbone).load(config.model.checkpoint)
    return encoder


def _prepare(arm: Arm, config: ExperimentConfig[Any, Any], encoder: Encoder, class_names: Sequence[str]) -> FineTuning:
    try:
        tuning: FineTuning = component("methods", config.method.name).prepare(encoder, class_names, config.method)
    except ValueError as error:
        if arm == "zero_shot" and not isinstance(encoder, DualEncoder):
            raise ConfigError(
                f"run.arms has zero_shot, but there is no model for these classes before training: {error}; set "
                "run.arms to baseline and evidence"
            ) from error
        raise ConfigError(f"method.name = {config.method.name!r}: {error}") from error
    return tuning


def _checked_splits(
    config: ExperimentConfig[Any, Any], datasets: Mapping[str, EvidenceDataset], accelerator: Accelerator
) -> dict[str, Split]:
    """Every split, each sample of it opened once."""
    data, names, trains = config.data, list(datasets), _trains(config)
    splits: dict[str, Split] = {}
    for name, unchecked in datasets.items():
        dataset, bad = validate(
            unchecked,
            on_bad_sample=data.on_bad_sample,
            description=f"checking {name}",
            progress=accelerator.is_main_process,
        )
        if bad and accelerator.is_main_process:
            _log.warning("%s: skipped %d bad sample(s), listed in run.json", name, len(bad))
        skipped = tuple(SkippedSample(sample_id=sample.sample_id, reason=sample.reason) for sample in bad)
        splits[name] = _described(dataset, skipped)
    first = splits[names[0]].dataset
    for name in names:
        if list(splits[name].dataset.class_names) != list(first.class_names):
            raise DataError(
                f"splits {names[0]!r} and {name!r} have different classes: {list(first.class_names)} and "
                f"{list(splits[name].dataset.class_names)}; give data.classes to fix their order"
            )
    if trains and config.run.validation_share:
        train = splits[data.train_split]
        kept, held_out = hold_out(train.dataset.labels, config.run.validation_share, config.run.seed)
        if not held_out:
            raise ConfigError(
                f"run.validation_share = {config.run.validation_share:g} of each class holds out none of "
                f"{train.record.n} training images; raise it"
            )
        splits[data.train_split] = _described(Subset(train.dataset, kept), train.record.skipped)
        splits[VALIDATION] = _described(Subset(train.dataset, held_out))
    aligns = config.evidence.weight and set(config.run.arms) & set(_EVIDENCE_ARMS)
    if aligns and not splits[data.train_split].record.annotated:
        raise DataError(
            f"no image of split {data.train_split!r} has a mask or box, so there is nothing to align evidence with; "
            "annotate some, set evidence.weight to 0, or leave the arm out (run.arms)"
        )
    if set(config.run.arms) & set(_SWAP_ARMS) and splits[data.train_split].record.annotated < 2:
        record = splits[data.train_split].record
        raise DataError(
            f"{record.annotated} of {record.n} images of split {data.train_split!r} have a mask or box, so there are "
            "no backgrounds to swap; annotate some, or leave the swap arms out (run.arms)"
        )
    return splits


def _described(dataset: EvidenceDataset, skipped: tuple[SkippedSample, ...] = ()) -> Split:
    record = DataRecord(
        fingerprint=fingerprint(dataset),
        n=len(dataset),
        annotated=sum(source != "none" for source in dataset.mask_sources),
        skipped=skipped,
        classes_without_images=classes_without_images(dataset),
    )
    return Split(dataset, record)


def _warn_of_unseen_classes(
    config: ExperimentConfig[Any, Any], splits: Mapping[str, Split], accelerator: Accelerator
) -> None:
    train = splits.get(config.data.train_split)
    if train and train.record.classes_without_images and accelerator.is_main_process:
        _log.warning(
            "no image of split %r shows %s: nothing is learnt of it",
            config.data.train_split,
            named(train.record.classes_without_images, 20),
        )


def hold_out(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on, and rows to hold out: the same share of each class, rounded, but never a whole class.

    Example:
        >>> kept, held_out = hold_out([0, 0, 0, 0, 1, 1, 2], share=0.5, seed=0)
        >>> len(held_out), sorted(kept + held_out), 6 in kept
        (3, [0, 1, 2, 3, 4, 5, 6], True)
    """
    generator = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in sorted(set(labels)):
        rows = [row for row, other in enumerate(labels) if other == label]
        count_out = min(round(share * len(rows)), len(rows) - 1)
        held_out += generator.permutation(rows)[:count_out].tolist()
    return sorted(set(range(len(labels))) - set(held_out)), sorted(held_out)


def arm_config(config: ExperimentConfig[Any, Any], arm: Arm) -> ExperimentConfig[Any, Any]:
    """The configuration of one arm alone: what its record holds, and what reproduces it."""
    tree = config.model_dump()
    tree["run"] |= {"arms": (arm,), "resume": False}
    if arm not in _EVIDENCE_ARMS:
        tree["evidence"]["weight"] = 0.0
    swap = config.training.background_swap or SWAP_PROBABILITY
    tree["training"]["background_swap"] = swap if arm in _SWAP_ARMS else 0.0
    if arm == "zero_shot":
        tree["method"] = {"name": "zero_shot", "templates": config.method.templates}
    return parse(tree)


def _run_arm(
    arm: Arm,
    config: ExperimentConfig[Any, Any],
    splits: Mapping[str, Split],
    directory: Path,
    accelerator: Accelerator,
    *,
    resume: bool,
) -> bool:
    """Run one arm, if the method has it; whether it has."""
    config = arm_config(config, arm)
    set_seed(config.run.seed)
    encoder = _load_encoder(config)
    base = BaseModelRef(config.model.backbone, config.model.checkpoint, encoder.fingerprint())
    names = next(iter(splits.values())).dataset.class_names
    tuning = _prepare(arm, config, encoder, names)
    _check_layers(config, encoder)
    if not tuning.trains and arm not in ("zero_shot", "baseline"):
        if accelerator.is_main_process:
            _log.warning("%s: skipped, because method %s trains nothing", arm, config.method.name)
        return False
    if tuning.trains:
        config.training.check_fits(splits[config.data.train_split].record.n, accelerator.num_processes)
    if not resume:
        _make_room(directory, accelerator)
        if accelerator.is_main_process:
            write_config(directory, config.model_dump(mode="json"))
    accelerator.wait_for_everyone()
    training = _train(tuning, config, splits, directory, accelerator, arm, resume=resume)
    model = {**config.model.model_dump(), "sha256": base.sha256}
    if tuning.trains:
        model["fine_tuned_sha256"] = encoder.fingerprint()
    if accelerator.is_main_process:
        # Before the evaluation: whatever happens there, the model is kept. The training goes on from its checkpoint.
        save_model(
            directory / "model",
            tuning,
            class_names=names,
            method_config=config.method,
            base=base,
            heatmap=config.evaluation.heatmap,
            layers=config.evaluation.layers,
        )
    classifier = tuning.classifier()
    results, stored = {}, {}
    for split in config.data.test_splits:
        dataset = splits[split].dataset
        outcomes = _evaluate(classifier, encoder, config, dataset, split, accelerator, f"{arm} on {split}")
        results[split] = summarise(outcomes, config.evaluation.threshold)
        if accelerator.is_main_process:
            path = directory / "outcomes" / f"{split}.parquet"
            outcomes.write(path)
            stored[split] = StoredFile.of(path, directory)
            _write_gallery(classifier, encoder, config, dataset, directory, split)
    if not accelerator.is_main_process:
        return True
    RunRecord(
        arm=arm,
        name=config.run.name,
        seed=config.run.seed,
        config=config.model_dump(mode="json"),
        environment=environment(device=str(accelerator.device), num_processes=accelerator.num_processes),
        model=model,
        data={name: split.record for name, split in splits.items()},
        training=training,
        results=results,
        outcomes=stored,
    ).write(directory)
    if config.training.checkpoint_every is None:
        checkpoints.remove_all(directory / "checkpoints")  # the one of the end; the weights are in model
    return True


def _check_layers(config: ExperimentConfig[Any, Any], encoder: Encoder) -> None:
    depth = len(encoder.image_tower.blocks())
    for section, layers in (("evidence", config.evidence.layers), ("evaluation", config.evaluation.layers)):
        try:
            resolve_layers(layers, depth)
        except ValueError as error:
            raise ConfigError(f"{section}.{error}") from error


def _check_others(
    config: ExperimentConfig[Any, Any], arms: Collection[Arm], splits: Mapping[str, Split], directory: Path
) -> None:
    """Arms that an earlier run left under this name must be comparable with those that are about to run."""
    evaluation = config.model_dump(mode="json")["evaluation"]
    for file in sorted(directory.glob(f"*/{RECORD_FILE}")):
        if file.parent.name in arms:
            continue
        record = RunRecord.read(file.parent)
        tests = {split: splits[split].record.fingerprint for split in config.data.test_splits}
        theirs = {split: data.fingerprint for split, data in record.data.items() if split in record.results}
        if record.config["evaluation"] != evaluation or theirs != tests:
            raise ConfigError(
                f"run.name = {config.run.name!r}: {file.parent} holds an arm that was judged on other images or "
                "by other evaluation settings, and cannot be compared; choose another run.name"
            )


def _train(
    tuning: FineTuning,
    config: ExperimentConfig[Any, Any],
    splits: Mapping[str, Split],
    directory: Path,
    accelerator: Accelerator,
    arm: Arm,
    *,
    resume: bool,
) -> dict[str, Any] | None:
    """Everything that depends on the training images; what is recorded of it, None where there is nothing."""
    if not tuning.trains and tuning.read_training_set is None:
        return None
    began = time.monotonic()
    dataset, preprocessing = splits[config.data.train_split].dataset, tuning.encoder.preprocessing
    tuning.encoder.to(accelerator.device)
    tuning.head.to(accelerator.device)
    as_they_are = ModelInputs(dataset, SampleTransform(preprocessing), seed=0)
    if tuning.read_training_set is not None:
        tuning.read_training_set(
            *extract_features(tuning.encoder, as_they_are, accelerator, config.evaluation.batch_size)
        )
    if not tuning.trains:
        return {"steps": 0, "seconds": round(time.monotonic() - began, 1)}
    share = config.evaluation.interpolation
    start = snapshot(tuning.encoder, tuning.head) if share < 1 else None
    evidence = EvidenceTerm(
        component("heatmaps", config.evidence.heatmap).heatmap,
        component("alignments", config.evidence.alignment).loss,
        config.evidence.layers,
        config.evidence.weight,
    )
    probability = config.training.background_swap
    inputs = ModelInputs(
        dataset,
        SampleTransform(preprocessing, config.training.augmentation),
        config.run.seed,
        BackgroundSwap(dataset, probability) if probability else None,
    )
    unseen = splits[VALIDATION].dataset if VALIDATION in splits else None
    if config.run.report_to:
        accelerator.project_configuration.set_directories(directory)
        # A tracker's project is the run, and its run the arm.
        trackers.start(accelerator, config.run.name, config.model_dump(mode="json"), directory.name)
    before = time.monotonic() - began
    fitted = Trainer(config.training, accelerator, directory).fit(
        TrainingStep(tuning, evidence),
        inputs,
        seed=config.run.seed,
        description=arm,
        resume=resume,
        settings={"model": config.model.model_dump(), "method": config.method.model_dump(mode="json")},
        panel=as_they_are if unseen is None else ModelInputs(unseen, SampleTransform(preprocessing), seed=0),
        evaluate=None if unseen is None else _judge(tuning, config, unseen, accelerator),
    )
    trackers.stop(accelerator)
    if start is not None:
        interpolate(tuning.encoder, tuning.head, start, share)
    probe = fitted.first_probe
    return {
        "steps": fitted.steps,
        "seconds": round(before + fitted.seconds, 1),
        "images_with_evidence_in_view": fitted.annotated,
        "first_task_gradient_norm": probe and probe.task,
        "first_evidence_gradient_norm": probe and probe.evidence,
        "first_evidence_to_task_gradient_ratio": probe and probe.ratio,
        "last_evidence_weight": fitted.weight,
        "best_step": fitted.best_step,
    }


def _judge(
    tuning: FineTuning, config: ExperimentConfig[Any, Any], dataset: EvidenceDataset, accelerator: Accelerator
) -> Callable[[], Mapping[str, float]]:
    """The held-out images, judged by the model as it is when this is called."""

    def judge() -> Mapping[str, float]:
        outcomes = _evaluate(
            tuning.classifier(), tuning.encoder, config, dataset, VALIDATION, accelerator, "held-out images"
        )
        return summarise(outcomes, config.evaluation.threshold)

    return judge


def _evaluate(
    classifier: Classifier,
    encoder: Encoder,
    config: ExperimentConfig[Any, Any],
    dataset: EvidenceDataset,
    split: str,
    accelerator: Accelerator,
    description: str,
) -> Outcomes:
    settings = config.evaluation
    return evaluate(
        classifier,
        ModelInputs(dataset, SampleTransform(encoder.preprocessing), seed=0),
        component("heatmaps", settings.heatmap).heatmap,
        accelerator=accelerator,
        layers=settings.layers,
        explain=settings.explain,
        batch_size=settings.batch_size,
        swap_seed=settings.swap_seed,
        split=split,
        description=description,
    )


def _write_gallery(
    classifier: Classifier,
    encoder: Encoder,
    config: ExperimentConfig[Any, Any],
    dataset: EvidenceDataset,
    directory: Path,
    split: str,
) -> None:
    annotated = [row for row, source in enumerate(dataset.mask_sources) if source != "none"]
    chosen = choose_panel([dataset.labels[row] for row in annotated], config.evaluation.gallery)
    if not chosen:
        return
    panel = explain_panel(
        classifier,
        ModelInputs(dataset, SampleTransform(encoder.preprocessing), seed=0),
        component("heatmaps", config.evaluation.heatmap).heatmap,
        [annotated[index] for index in chosen],
        layers=config.evaluation.layers,
        explain=config.evaluation.explain,
    )
    pixels = [torch.from_numpy(to_pixels(image, encoder.preprocessing)) for image in panel.images]
    gallery = Gallery(torch.stack(pixels), panel.masks, panel.heatmaps, panel.rows)
    gallery.write(directory / "gallery" / f"{split}.safetensors")


def _make_room(directory: Path, accelerator: Accelerator) -> None:
    """An empty folder for an arm; what an earlier run left there is moved to ``replaced``, never overwritten."""
    if accelerator.is_main_process:
        if directory.exists():
            replaced = directory.parent / "replaced"
            replaced.mkdir(exist_ok=True)
            free = next(place for k in count(1) if not (place := replaced / f"{directory.name}-{k}").exists())
            directory.replace(free)
            _log.info("%s exists already; moved to %s", directory, free)
        directory.mkdir(parents=True)
    accelerator.wait_for_everyone()
