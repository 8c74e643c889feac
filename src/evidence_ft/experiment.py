"""Configuration to objects to run records: the only module that resolves names.

An experiment is up to three arms from one start and one seed: ``zero_shot`` (nothing is trained), ``baseline`` (the
method with the evidence loss at weight 0) and ``evidence`` (the same with its weight). What can be checked is checked
before training starts.
"""

import logging
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from evidence_ft.classifier import Classifier, FineTuning
from evidence_ft.config import Arm, ConfigError, ExperimentConfig, component, parse, parse_command_line
from evidence_ft.encoder import CheckpointError, DualEncoder
from evidence_ft.evaluation import choose_panel, evaluate, explain_panel
from evidence_ft.files import RunFileError
from evidence_ft.images import DataError
from evidence_ft.outcomes import Gallery, Outcomes, summarise
from evidence_ft.report import format_table, write_comparison
from evidence_ft.runs import DataRecord, RunRecord, SkippedSample, StoredFile, environment, write_config
from evidence_ft.samples import EvidenceDataset, fingerprint, validate
from evidence_ft.tower import UnsupportedTowerError, resolve_layers
from evidence_ft.training import EvidenceTerm, Fitted, Trainer, TrainingError, TrainingStep
from evidence_ft.transforms import ModelInputs, SampleTransform, to_pixels

_log = logging.getLogger(__name__)


class Split(NamedTuple):
    """A validated split with what is recorded of it."""

    dataset: EvidenceDataset
    record: DataRecord


def main(default: Path, description: str) -> None:
    """What a recipe does: read the command line, run, print the table and where the report is.

    Args:
        default: configuration without ``--config``.
        description: of ``--help``.

    Raises:
        SystemExit: with the message alone, for everything a user can mend.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Hub clients report each request, and every process would.
    for library in ("httpx", "httpcore", "huggingface_hub", "matplotlib", "fontTools"):
        logging.getLogger(library).setLevel(logging.WARNING)
    config = parse_command_line(default, description)
    try:
        directory = run(config)
    except (CheckpointError, ConfigError, DataError, RunFileError, TrainingError, UnsupportedTowerError) as error:
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
    """
    accelerator = _accelerator(config)
    splits = _load_splits(config, accelerator)
    if config.data.train_split in splits:
        config.training.check_fits(splits[config.data.train_split].record.n, accelerator.num_processes)
    directory = config.run.directory / config.run.name
    _check_others(config, splits, directory)
    for arm in config.run.arms:
        _run_arm(arm, config, splits, directory / arm, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    comparison = write_comparison(directory)
    sys.stdout.write(f"\n{format_table(comparison)}\n")
    return directory


def _accelerator(config: ExperimentConfig[Any, Any]) -> Accelerator:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device = 'cuda', but torch sees no GPU here; set run.device to 'auto' or 'cpu', or install a build of "
            f"torch for your GPU (this is {torch.__version__})"
        )
    accelerator = Accelerator(cpu=config.run.device == "cpu")
    if config.run.device == "cuda" and accelerator.device.type != "cuda":
        raise ConfigError(
            f"run.device = 'cuda', but accelerate was launched for {accelerator.device}; launch it without --cpu"
        )
    if accelerator.mixed_precision == "fp16":
        raise ConfigError("mixed precision fp16 underflows in heatmap gradients; launch with bf16 or no")
    if accelerator.is_main_process:
        _log.info(
            "device %s, %d process(es), mixed precision %s",
            accelerator.device,
            accelerator.num_processes,
            accelerator.mixed_precision,
        )
    return accelerator


def _load_splits(config: ExperimentConfig[Any, Any], accelerator: Accelerator) -> dict[str, Split]:
    """Every split, each sample of it opened once."""
    data = config.data
    module = component("datasets", data.format)
    trains = any(arm != "zero_shot" for arm in config.run.arms)
    names = list(dict.fromkeys([*([data.train_split] if trains else []), *data.test_splits]))
    splits: dict[str, Split] = {}
    for name in names:
        dataset, bad = validate(
            module.load(data, name),
            on_bad_sample=data.on_bad_sample,
            description=f"checking {name}",
            progress=accelerator.is_main_process,
        )
        if bad and accelerator.is_main_process:
            _log.warning("%s: skipped %d bad sample(s), listed in run.json", name, len(bad))
        record = DataRecord(
            fingerprint=fingerprint(dataset),
            n=len(dataset),
            annotated=sum(source != "none" for source in dataset.mask_sources),
            skipped=tuple(SkippedSample(sample_id=sample.sample_id, reason=sample.reason) for sample in bad),
        )
        splits[name] = Split(dataset, record)
    first = splits[names[0]].dataset
    for name in names:
        if list(splits[name].dataset.class_names) != list(first.class_names):
            raise DataError(
                f"splits {names[0]!r} and {name!r} have different classes: {list(first.class_names)} and "
                f"{list(splits[name].dataset.class_names)}; give data.classes to fix their order"
            )
    if "evidence" in config.run.arms and config.evidence.weight and not splits[data.train_split].record.annotated:
        raise DataError(
            f"no image of split {data.train_split!r} has a mask or box, so there is nothing to align evidence with; "
            "annotate some, set evidence.weight to 0, or leave the arm out (run.arms)"
        )
    return splits


def arm_config(config: ExperimentConfig[Any, Any], arm: Arm) -> ExperimentConfig[Any, Any]:
    """The configuration of one arm alone: what its record holds, and what reproduces it."""
    tree = config.model_dump()
    tree["run"]["arms"] = (arm,)
    if arm == "baseline":
        tree["evidence"]["weight"] = 0.0
    if arm == "zero_shot":
        tree["method"] = {"name": "zero_shot", "template": config.method.template}
    return parse(tree)


def _run_arm(
    arm: Arm,
    config: ExperimentConfig[Any, Any],
    splits: Mapping[str, Split],
    directory: Path,
    accelerator: Accelerator,
) -> None:
    config = arm_config(config, arm)
    set_seed(config.run.seed)
    encoder = component("backbones", config.model.backbone).load(config.model.checkpoint)
    start = encoder.fingerprint()
    names = next(iter(splits.values())).dataset.class_names
    tuning: FineTuning = component("methods", config.method.name).prepare(encoder, names, config.method)
    _check_layers(config, encoder)
    if arm != "zero_shot" and not tuning.trains:
        raise ConfigError(f"method.name = {config.method.name!r} trains nothing; set run.arms to zero_shot")
    _make_room(directory, accelerator)
    model = {"backbone": config.model.backbone, "checkpoint": config.model.checkpoint, "sha256": start}
    training = None
    if arm != "zero_shot":
        training = _train(tuning, config, splits[config.data.train_split].dataset, directory, accelerator, arm)
        model["fine_tuned_sha256"] = encoder.fingerprint()
        if accelerator.is_main_process:
            tuning.save(directory / "model")  # before the evaluation: whatever happens there, the training is kept
    classifier = tuning.classifier()
    results, stored = {}, {}
    for split in config.data.test_splits:
        outcomes = _evaluate(classifier, encoder, config, splits[split].dataset, split, accelerator, arm)
        results[split] = summarise(outcomes, config.evaluation.threshold)
        if accelerator.is_main_process:
            path = directory / "outcomes" / f"{split}.parquet"
            outcomes.write(path)
            stored[split] = StoredFile.of(path, directory)
            _write_gallery(classifier, encoder, config, splits[split].dataset, directory, split)
    if not accelerator.is_main_process:
        return
    write_config(directory, config.model_dump(mode="json"))
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


def _check_layers(config: ExperimentConfig[Any, Any], encoder: DualEncoder) -> None:
    depth = len(encoder.image_tower.blocks())
    for section, layers in (("evidence", config.evidence.layers), ("evaluation", config.evaluation.layers)):
        try:
            resolve_layers(layers, depth)
        except ValueError as error:
            raise ConfigError(f"{section}.{error}") from error


def _check_others(config: ExperimentConfig[Any, Any], splits: Mapping[str, Split], directory: Path) -> None:
    """Arms that an earlier run left under this name must be comparable with those that are about to run."""
    evaluation = config.model_dump(mode="json")["evaluation"]
    for file in sorted(directory.glob("*/run.json")):
        arm = file.parent.name
        if arm in config.run.arms:
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
    dataset: EvidenceDataset,
    directory: Path,
    accelerator: Accelerator,
    arm: Arm,
) -> dict[str, Any]:
    evidence = EvidenceTerm(
        component("heatmaps", config.evidence.heatmap).heatmap,
        component("alignments", config.evidence.alignment).loss,
        config.evidence.layers,
        config.evidence.weight,
    )
    transform = SampleTransform(tuning.encoder.preprocessing, config.training.augmentation)
    began = time.monotonic()
    fitted: Fitted = Trainer(config.training, accelerator, directory / "metrics.jsonl").fit(
        TrainingStep(tuning, evidence),
        ModelInputs(dataset, transform, config.run.seed),
        seed=config.run.seed,
        description=arm,
    )
    probe = fitted.first_probe
    return {
        "steps": fitted.steps,
        "seconds": round(time.monotonic() - began, 1),
        "images_with_evidence_in_view": fitted.annotated,
        "first_task_gradient_norm": probe and probe.task,
        "first_evidence_gradient_norm": probe and probe.evidence,
        "first_evidence_to_task_gradient_ratio": probe and probe.ratio,
    }


def _evaluate(
    classifier: Classifier,
    encoder: DualEncoder,
    config: ExperimentConfig[Any, Any],
    dataset: EvidenceDataset,
    split: str,
    accelerator: Accelerator,
    arm: Arm,
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
        description=f"{arm} on {split}",
    )


def _write_gallery(
    classifier: Classifier,
    encoder: DualEncoder,
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
