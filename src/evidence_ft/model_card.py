"""What a person finds beside a model on the hub: what it is, how it was tuned, and how to use it.

Names in it come from users and files: they are escaped, for Markdown and for the HTML that it may hold.

This module knows nothing of models.
"""

import html
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

_WHAT = """\
An image classifier tuned with evidence_ft, which measures whether predictions are right for the right reasons, and can
train for it."""
_USE = """\
```python
from evidence_ft import EvidenceModel

model = EvidenceModel.from_pretrained("{repo_id}")
model.predict("image.jpg").names  # the class
model.explain("image.jpg")        # where the model looked
```"""
_MEASURES = """\
PT: share of right predictions with valid evidence. IR: share of predictions with valid evidence that are right.
Evidence is valid if at least half of the heatmap's mass lies on the mask, unless another threshold is named above."""


def model_card(
    *,
    title: str,
    repo_id: str,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    details: Mapping[str, object],
) -> str:
    """A model card in Markdown, with the front matter that the hub reads.

    Args:
        title: heading.
        repo_id: what to load the model by.
        manifest: of the saved folder: method, base, class names and the like.
        metrics: a table by row and column; none if empty.
        details: what else there is to know of the training.
    """
    checkpoint = manifest["base"]["checkpoint"]
    front: dict[str, Any] = {
        "library_name": "evidence-ft",
        "pipeline_tag": "image-classification",
        "tags": ["evidence-ft", manifest["method"]["name"]],
    }
    if (checkpoint or "").startswith("hf-hub:"):
        front["base_model"] = checkpoint.removeprefix("hf-hub:")
    settings = {name: value for name, value in manifest["method"].items() if name != "name"}
    stored = {
        "base": "the base model itself, by name",
        "adapter": "a LoRA adapter in PEFT's format; the base model is loaded by name",
        "whole": "in this repository, in its library's own layout",
    }
    facts = {
        "base model": f"{checkpoint or 'without a name'} (SHA-256 {manifest['base']['sha256'][:12]}...)",
        "encoder": stored[manifest["encoder"]],
        "method": manifest["method"]["name"],
        "settings": json.dumps(settings, ensure_ascii=False),
        "trained": ", ".join(manifest["trained"]) or "nothing",
        "classes": ", ".join(manifest["class_names"]),
        "explained by": f"{manifest['heatmap']}, layers {manifest['layers']}",
        **{name: str(value) for name, value in details.items()},
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {escaped(title)}",
        _WHAT,
        _table(["", ""], [[name, value] for name, value in facts.items()]),
        _USE.format(repo_id=repo_id),
    ]
    if metrics:
        columns = list(dict.fromkeys(name for row in metrics.values() for name in row))
        rows = [[label, *(_number(row.get(name, math.nan)) for name in columns)] for label, row in metrics.items()]
        parts += [_MEASURES, _table(["", *columns], rows)]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    r"""Text that Markdown and HTML leave as it is, on one line.

    Example:
        >>> print(escaped("a|b <b>*c*</b>"))
        a\|b &lt;b&gt;\*c\*&lt;/b&gt;
    """
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [[escaped(name) for name in columns], ["---"] * len(columns)]
    lines += [[escaped(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}"
    return str(value)
