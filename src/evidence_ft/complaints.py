"""What pydantic has against a value, in the words of a person who wrote it: key, what was found, what was expected.

This module knows nothing of settings or files: what keys are called, and where they were read, its callers say.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "a section with keys",
    "model": "a section with keys",
    "none": "nothing",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def dotted(path: Sequence[int | str]) -> str:
    """Pydantic's path of a value as one key.

    Example:
        >>> dotted(["run", "arms", 0])
        'run.arms.0'
    """
    return ".".join(map(str, path))


def unknown(key: str) -> str:
    """A key that is not there."""
    return f"unknown key {key!r}"


def complaints(
    error: ValidationError,
    *,
    key_of: Callable[[Sequence[int | str]], str] = dotted,
    of_unknown: Callable[[str], str] = unknown,
) -> list[str]:
    """One sentence for each key that is wrong.

    Args:
        error: of a model.
        key_of: pydantic's path of a value to the key a user knows; what it maps to one key becomes one complaint, as
            for the members of a union.
        of_unknown: a key that is not there to the sentence about it.

    Example:
        >>> from pydantic import BaseModel, Field
        >>> class Settings(BaseModel, extra="forbid"):
        ...     epochs: int = Field(gt=0)
        >>> try:
        ...     Settings.model_validate({"epochs": "ten", "epoch": 3})
        ... except ValidationError as error:
        ...     print("; ".join(complaints(error)))
        epochs = 'ten': expected a whole number; unknown key 'epoch'
    """
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(key_of(detail["loc"]), []).append(detail)
    return [
        of_unknown(key) if details[0]["type"] == "extra_forbidden" else _complaint(key, details)
        for key, details in by_key.items()
    ]


def _complaint(key: str, details: Sequence[Mapping[str, Any]]) -> str:
    first = details[0]
    if first["type"] == "missing":
        return f"{key} is missing; it has no default"
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return f"{key}: {_expected(first)}" if key else _expected(first)  # of the section as a whole
    where = f"{key} = {first['input']!r}" if key else f"found {first['input']!r}"
    return f"{where}: {' or '.join(dict.fromkeys(map(_expected, details)))}".replace(" or expected ", " or ")


def _expected(detail: Mapping[str, Any]) -> str:
    kind, context = str(detail["type"]), detail.get("ctx", {})
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"expected {words} {context[bound]:g}"
    if kind == "value_error":
        return str(context["error"])
    return f"expected {next(_shapes(kind, context), None) or _in_pydantics_words(detail)}"


def _shapes(kind: str, context: Mapping[str, Any]) -> Iterator[str]:
    if kind == "literal_error":
        yield str(context["expected"])
    if kind == "string_pattern_mismatch":
        yield f"text like {context['pattern']}"
    if kind in ("too_short", "string_too_short"):
        yield f"at least {context['min_length']} {'entry' if context['min_length'] == 1 else 'entries'}"
    if kind in ("too_long", "string_too_long"):
        yield f"at most {context['max_length']} {'entry' if context['max_length'] == 1 else 'entries'}"
    stem = kind.partition("_")[0]
    if stem in _KINDS:
        yield _KINDS[stem]


def _in_pydantics_words(detail: Mapping[str, Any]) -> str:
    message = str(detail["msg"])
    return message[:1].lower() + message[1:]
