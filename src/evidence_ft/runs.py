"""What a run leaves behind, written and read.

A run has arms, and each arm a directory of its own::

    runs/<name>/<arm>/run.json                     RunRecord: settings, environment, data, results
    runs/<name>/<arm>/config.yaml                  the resolved configuration
    runs/<name>/<arm>/metrics.jsonl                one JSON object for each logged step
    runs/<name>/<arm>/outcomes/<split>.parquet     Outcomes: one row for each test image
    runs/<name>/<arm>/gallery/<split>.safetensors  Gallery: a few images with masks and heatmaps

Every file appears whole or not at all, and is checked when it is read: a report made from these files alone
must be able to trust them. This module knows nothing of models or training.
"""

import json
import math
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evidence_ft.complaints import complaints
from evidence_ft.files import FORMAT_VERSION, RunFileError, named, sha256_of, to_json, write_atomically
from evidence_ft.outcomes import Outcomes

RECORD_FILE, CONFIG_FILE, METRICS_FILE = "run.json", "config.yaml", "metrics.jsonl"

_PACKAGES = (
    "evidence-ft",
    "accelerate",
    "numpy",
    "open_clip_torch",
    "peft",
    "pillow",
    "pyarrow",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SkippedSample(_Record):
    """A sample left out of a split, and why."""

    sample_id: str
    reason: str


class DataRecord(_Record):
    """What a split consisted of.

    Attributes:
        fingerprint: of ids, classes and mask sources; equal where the samples are.
        n: samples used.
        annotated: of these, with evidence.
        skipped: samples left out.
        classes_without_images: names of classes that no sample has.
    """

    fingerprint: str
    n: int = Field(ge=0)
    annotated: int = Field(ge=0)
    skipped: tuple[SkippedSample, ...] = ()
    classes_without_images: tuple[str, ...] = ()


class StoredFile(_Record):
    """A file of the arm, by its path within the arm's directory, and its SHA-256."""

    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, file: str) -> str:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file:
            raise ValueError(f"{file!r} leaves the arm's directory, expected a path such as 'outcomes/test.parquet'")
        return file

    @classmethod
    def of(cls, path: Path, directory: Path) -> Self:
        """Describe a file that is there."""
        return cls(file=path.relative_to(directory).as_posix(), sha256=sha256_of(path))


class RunRecord(_Record):
    """What one arm did and found; with the outcomes, all that a report needs.

    Attributes:
        arm: name of the arm, also that of its directory.
        name: name of the run.
        config: resolved; ``config["evaluation"]`` is what arms must agree on to be compared.
        environment: see `environment`.
        model: checkpoint, its hash and what else identifies the weights.
        data: what each split consisted of.
        training: steps, seconds and the like; None where nothing was trained.
        results: for each test split, what `evidence_ft.outcomes.summarise` gives.
        outcomes: for each test split, its table.
    """

    format_version: Literal[1] = FORMAT_VERSION
    arm: str = Field(pattern=_NAME)
    name: str = Field(min_length=1)
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, DataRecord]
    training: dict[str, Any] | None = None
    results: dict[str, dict[str, int | float | None]]
    outcomes: dict[str, StoredFile]

    def write(self, directory: Path) -> Path:
        """Write ``run.json`` into the arm's directory; NaN becomes null."""
        path = directory / RECORD_FILE
        write_atomically(path, to_json(self.model_dump(mode="python")))
        return path

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read ``run.json`` from the arm's directory.

        Raises:
            RunFileError: no such file, no JSON, or unknown, missing or wrong keys; all are named.
        """
        path = directory / RECORD_FILE
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunFileError(f"{path} does not exist; the arm has not finished") from error
        except (OSError, ValueError) as error:
            raise RunFileError(f"{path} is not JSON: {error}") from error
        if isinstance(tree, dict) and tree.get("format_version") != FORMAT_VERSION:
            raise RunFileError(
                f"{path} has format_version {tree.get('format_version')!r}, expected {FORMAT_VERSION}; read "
                "it with the version of evidence-ft that wrote it"
            )
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RunFileError(f"{path}: {'; '.join(complaints(error))}") from error

    def read_outcomes(self, directory: Path, split: str) -> Outcomes:
        """The table of one split, if it is still the one this record was written for.

        Raises:
            RunFileError: no such split or file, or the file has changed.
        """
        if split not in self.outcomes:
            raise RunFileError(f"{directory / RECORD_FILE} has no outcomes of {split!r}; it has {named(self.outcomes)}")
        stored = self.outcomes[split]
        path = directory / stored.file
        if path.exists() and sha256_of(path) != stored.sha256:
            raise RunFileError(f"outcomes {path} have changed since {RECORD_FILE} was written; evaluate the arm again")
        outcomes = Outcomes.read(path)
        if outcomes.split != split:
            raise RunFileError(f"outcomes {path} are of split {outcomes.split!r}, expected {split!r}")
        return outcomes


def read_steps(path: Path) -> list[dict[str, float]]:
    """The logged steps of a ``metrics.jsonl``, by step.

    A resumed run may log a step twice; the later line counts. NaN and null are NaN.

    Raises:
        RunFileError: no such file, or a line that is not an object of numbers with a ``step``.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(f"metrics {path} cannot be read: {error}") from error
    steps: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            step = {key: math.nan if value is None else float(value) for key, value in values.items()}
            steps[int(step["step"])] = step
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise RunFileError(f"metrics {path}, line {number}: not a step with numbers: {line[:80]!r}") from error
    return [steps[step] for step in sorted(steps)]


def write_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write the resolved configuration as ``config.yaml``, in the order of its keys."""
    path = directory / CONFIG_FILE
    write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110))
    return path


def environment(*, device: str = "cpu", num_processes: int = 1) -> dict[str, Any]:
    """Where a run took place: versions, machine type, commit. Neither host name nor paths.

    Args:
        device: such as ``"cpu"`` or ``"cuda:0"``; a GPU is named by its model.
        num_processes: that shared the work.

    Returns:
        ``git`` is None outside a git repository; its ``dirty`` is true where files differ from the commit.
    """
    is_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return {
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if is_gpu else device,
        "num_processes": num_processes,
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
