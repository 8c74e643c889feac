"""Checkpoints of a training: folders that are there whole or not at all, without pickle.

::

    checkpoints/settings.json                      what the training was begun with
    checkpoints/step-00000120/state.json           numbers, settings and random states; names and hashes of the rest
    checkpoints/step-00000120/<group>.safetensors  tensors: weights, the optimizer's, averages

A checkpoint is written under a hidden name, brought to the disk and then renamed, so that a process killed at any
moment leaves whole checkpoints and hidden rubbish, which the next one removes. Older checkpoints go only after the new
one is in place. This module knows nothing of what the tensors are.
"""

import base64
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from evidence_ft.distributed import laid_out_like
from evidence_ft.files import RunFileError, named, sha256_of, write_atomically

FORMAT_VERSION = 1
"""Of ``state.json``; a reader refuses every other."""

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Group, then name."""

_STATE, _SETTINGS = "state.json", "settings.json"
_log = logging.getLogger(__name__)


class ResumeError(RunFileError):
    """A checkpoint exists, but training cannot go on from it; the message says why."""


class Checkpoint(NamedTuple):
    """A checkpoint as it was read.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        state: what JSON can hold.
        tensors: group, then name; on the CPU.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def write(directory: Path, step: int, state: Mapping[str, Any], tensors: Tensors, *, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest ones. For one process only.

    One of the same step stays as it is: a training comes through each step once, or repeats it bit for bit.

    Args:
        directory: of all checkpoints of a training.
        step: optimizer steps done; names the folder.
        state: what JSON can hold.
        tensors: group, then name; groups name files.
        keep: how many checkpoints may remain, the new one included.

    Returns:
        The new checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for rubbish in directory.glob(".step-*"):
        shutil.rmtree(rubbish)
    target = directory / f"step-{step:08d}"
    if target.exists():
        return target
    temporary = directory / f".{target.name}.tmp"
    temporary.mkdir()
    for group, values in tensors.items():
        # Copies, because safetensors refuses tensors that share memory.
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        save_file(copies, temporary / f"{group}.safetensors")
    files = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
    content = {"format_version": FORMAT_VERSION, "step": step, "files": files, "state": dict(state)}
    (temporary / _STATE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _to_disk(path)
    temporary.rename(target)
    _to_disk(directory)
    for old in all_in(directory)[:-keep]:
        _remove(old)
    return target


def all_in(directory: Path) -> list[Path]:
    """The checkpoints of a training, oldest first."""
    return sorted(
        path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()
    )


def read(path: Path) -> Checkpoint:
    """Read a checkpoint and check every file of it against its hash.

    Raises:
        RunFileError: no checkpoint, of another format, or damaged; the message names the file.
    """
    if not path.is_dir():
        raise RunFileError(f"there is no checkpoint {path}; {_what_is_in(path.parent)}")
    try:
        content = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise RunFileError(
                f"checkpoint {path} has format_version {content['format_version']!r}, expected {FORMAT_VERSION}; "
                "resume with the version of evidence-ft that wrote it"
            )
        step, state, files = int(content["step"]), dict(content["state"]), dict(content["files"])
    except FileNotFoundError as error:
        raise RunFileError(f"{path} is no checkpoint: it has no {_STATE}; {_what_is_in(path)}") from error
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunFileError(f"checkpoint {path} is damaged: {_STATE}: {error!r}") from error
    tensors = {}
    for name, sha256 in files.items():
        try:
            if sha256_of(path / name) != sha256:
                raise RunFileError(f"checkpoint {path} is damaged: {name} is not the file that was written")
            tensors[Path(name).stem] = load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise RunFileError(f"checkpoint {path} is damaged: {name}: {error}") from error
    return Checkpoint(path, step, state, tensors)


def read_latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read; None where there is none at all.

    A damaged one costs the steps since the one before: resuming repeats them exactly.

    Raises:
        RunFileError: there are checkpoints, and all are damaged.
    """
    complaints = []
    for path in reversed(all_in(directory)):
        try:
            return read(path)
        except RunFileError as error:
            complaints.append(str(error))
            _log.warning("%s; trying the one before", error)
    if complaints:
        raise RunFileError(
            f"no checkpoint in {directory} can be read: {'; '.join(complaints)}; remove the folder to start over"
        )
    return None


def _what_is_in(directory: Path) -> str:
    for folder in (directory, directory / "checkpoints"):
        if found := all_in(folder):
            return f"there are {named([str(path) for path in found])}"
    if not directory.is_dir():
        return f"there is no folder {directory} either"
    return f"{directory} holds {named(sorted(path.name for path in directory.iterdir()))}"


def begin(directory: Path, settings: Mapping[str, Any]) -> None:
    """Note what a training is begun with, before there is a checkpoint. For one process only."""
    write_atomically(directory / _SETTINGS, json.dumps(dict(settings), indent=1) + "\n")


def begun_with(directory: Path) -> dict[str, Any] | None:
    """What `begin` has noted; None where nothing was.

    Raises:
        RunFileError: it is damaged.
    """
    path = directory / _SETTINGS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RunFileError(f"{path} is damaged: {error}; remove {directory} to start over") from error


def remove_all(directory: Path) -> None:
    """Remove the checkpoints of a training whose weights are kept elsewhere. For one process only."""
    shutil.rmtree(directory, ignore_errors=True)


def remove_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps: training goes on from this one. For one process only."""
    for path in all_in(directory):
        if int(path.name.removeprefix("step-")) > step:
            _remove(path)


def check_settings(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than training began with.

    Args:
        path: of the checkpoint, for the message.
        then: settings by dotted name, as the checkpoint has them.
        now: likewise, as they would be now.

    Raises:
        ResumeError: they differ; the message names each difference.

    Example:
        >>> check_settings(Path("step-00000120"), {"training.epochs": 3}, {"training.epochs": 4})
        Traceback (most recent call last):
        ...
        evidence_ft.checkpoints.ResumeError: step-00000120 was written with other settings: training.epochs was 3, \
is 4; resume with those, or start over in another directory
    """
    if found := differences(then, now):
        raise ResumeError(
            f"{path} was written with other settings: {'; '.join(found)}; "
            "resume with those, or start over in another directory"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between settings by dotted name, with both values.

    Example:
        >>> differences({"seed": 0, "ema": None}, {"seed": 1, "epochs": 3, "ema": None})
        ['epochs was not set, is 3', 'seed was 0, is 1']
    """
    found = []
    for name in sorted({*then, *now}):
        if name not in now:
            found.append(f"{name} was {then[name]!r}, is not set")
        elif name not in then:
            found.append(f"{name} was not set, is {now[name]!r}")
        elif then[name] != now[name]:
            found.append(f"{name} was {then[name]!r}, is {now[name]!r}")
    return found


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as JSON would give them back.

    Example:
        >>> flattened({"training": {"epochs": 3, "augmentation": {"crop_scale": (0.8, 1.0)}}})
        {'training.epochs': 3, 'training.augmentation.crop_scale': [0.8, 1.0]}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value))
    return flat


def copy_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path) -> None:
    """Copy values into tensors of the same names, in place, and into their shards where they are in shards.

    Raises:
        ResumeError: names or shapes differ.
    """
    missing, unexpected = sorted(targets.keys() - values.keys()), sorted(values.keys() - targets.keys())
    if missing or unexpected:
        raise ResumeError(f"{path} does not fit the model: it lacks {named(missing)} and also has {named(unexpected)}")
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != values[name].shape:
                raise ResumeError(
                    f"{path} does not fit the model: {name} is {tuple(values[name].shape)}, "
                    f"expected {tuple(target.shape)}"
                )
            target.copy_(laid_out_like(values[name], target))


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an optimizer remembers of each parameter, as ``<parameter>/<key>``.

    Its settings are not part of it: whoever resumes builds it anew.

    Args:
        optimizer: whose state is made of tensors, as AdamW's is.
        parameters: all that it fits, by name.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizer_state(optimizer: Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer that was built anew what `optimizer_state` had kept."""
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {parameter: index for index, parameter in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("/")
        parameter = parameters[name]
        of_each_entry = value.shape == parameter.shape  # counters are not
        state.setdefault(number[parameter], {})[key] = laid_out_like(value, parameter) if of_each_entry else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RandomState(NamedTuple):
    """Every global source of randomness of a process: what a callback, dropout or a data set may draw from.

    Attributes:
        cpu: of torch's generator on the CPU.
        cuda: of its generator on the GPU in use; None without.
        numpy: of the legacy global generator.
        python: of `random`.
    """

    cpu: Tensor
    cuda: Tensor | None
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """The state now."""
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            dict(np.random.get_state(legacy=False)),  # noqa: NPY002  # libraries draw from it whether we like it or not
            random.getstate(),
        )

    def restore(self, device: torch.device) -> None:
        """Go on from this state. A GPU's is left alone where none was captured."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        mersenne = self.numpy["state"]
        version, internal, gauss = self.python
        return {
            "cpu": _encode(self.cpu.numpy()),
            "cuda": None if self.cuda is None else _encode(self.cuda.numpy()),
            "numpy": {
                **self.numpy,
                "state": {"key": _encode(mersenne["key"]), "pos": int(mersenne["pos"])},
            },
            "python": [version, list(internal), gauss],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "RandomState":
        """As it was captured."""
        mersenne = tree["numpy"]["state"]
        version, internal, gauss = tree["python"]
        return cls(
            torch.from_numpy(_decode(tree["cpu"], np.uint8)),
            None if tree["cuda"] is None else torch.from_numpy(_decode(tree["cuda"], np.uint8)),
            {**tree["numpy"], "state": {"key": _decode(mersenne["key"], np.uint32), "pos": mersenne["pos"]}},
            (version, tuple(internal), gauss),
        )


def _encode(values: "np.ndarray[Any, Any]") -> str:
    return base64.b64encode(values.tobytes()).decode()


def _decode(text: str, kind: type[np.generic]) -> "np.ndarray[Any, Any]":
    return np.frombuffer(base64.b64decode(text), dtype=kind).copy()


def _remove(path: Path) -> None:
    """Out of sight first: what is half removed must not pass for a checkpoint."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
