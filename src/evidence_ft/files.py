"""Files of a run: there whole or not at all, and named by the error where they cannot be trusted."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

FORMAT_VERSION: Literal[1] = 1
"""Of run records and outcomes tables; a reader refuses every other."""


class RunFileError(ValueError):
    """A file of a run is missing or not as it has to be; the message names it."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, and make its directory.

    Text is written as UTF-8 with the line ends it has.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "note.txt"
        >>> write_atomically(path, "done")
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('done', ['note.txt'])
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_writable(directory: Path) -> None:
    """Make a folder that can be written to.

    Raises:
        RunFileError: it cannot be made, or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial = directory / f".{os.getpid()}.tmp"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise RunFileError(f"{directory} cannot be written to: {error}; choose another folder") from error


def check_can_be_made(directory: Path) -> None:
    """What `make_writable` would stumble on, as far as can be told without making anything.

    Raises:
        RunFileError: a file is in the way, or the folder it would be made in cannot be written to.
    """
    try:
        nearest = next(path for path in (directory, *directory.resolve().parents) if path.exists())
        found = None if nearest.is_dir() else f"{nearest} is a file"
        if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
            found = f"{nearest} may not be written to"
    except OSError as error:  # a folder that may not even be looked into
        found = str(error)
    if found:
        raise RunFileError(f"{directory} cannot be written to: {found}; choose another folder")


def without_nan(value: Any) -> Any:
    """The same tree with None for NaN and infinities, which JSON does not have.

    Example:
        >>> without_nan({"PT": float("nan"), "n": [3]})
        {'PT': None, 'n': [3]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """Indented JSON with null for NaN and infinities, which JSON does not have.

    Example:
        >>> print(to_json({"PT": float("nan"), "n": 3}), end="")
        {
          "PT": null,
          "n": 3
        }
    """
    return json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named(values: Sequence[str] | Mapping[str, Any], shown: int = 5) -> str:
    """The first few values, for a message.

    Example:
        >>> named(["a", "b", "c"], shown=2), named([])
        ("'a', 'b' and 1 more", 'none')
    """
    values = list(values)
    listed = ", ".join(repr(value) for value in values[:shown])
    return (f"{listed} and {len(values) - shown} more" if len(values) > shown else listed) or "none"
