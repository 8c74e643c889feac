"""Templates, the texts they give for class names, and the features of classes that result.

The named template lists are open_clip's, whatever the backbone: prompts are text, and belong to no model.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from evidence_ft.encoder import DualEncoder
from evidence_ft.installation import explained
from evidence_ft.types import at_least_float32

with explained("open_clip"):
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

NAMED = {"clip_7": SIMPLE_IMAGENET_TEMPLATES, "clip_80": OPENAI_IMAGENET_TEMPLATES}
"""The 80 templates of CLIP for ImageNet, and the seven of them that were found best together."""


def _has_one_place(template: str) -> str:
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        names = " or ".join(NAMED)
        raise ValueError(f"expected exactly one {{}}, where the class name goes, and no other braces; or {names}")
    return template


def _spelt_out(templates: Any) -> Any:
    """One template as a tuple of one; names replaced by the templates they stand for."""
    if isinstance(templates, str):
        templates = (templates,)
    if not isinstance(templates, list | tuple):
        return templates
    return tuple(template for entry in templates for template in _named(entry))


def _named(entry: Any) -> Iterable[Any]:
    if isinstance(entry, str) and entry in NAMED:
        return [template("{}") for template in NAMED[entry]]
    return [entry]


Template: TypeAlias = Annotated[str, AfterValidator(_has_one_place)]
"""Caption of a class, such as ``a photo of a {}``; without the name in it all classes would be one."""

Templates: TypeAlias = Annotated[tuple[Template, ...], BeforeValidator(_spelt_out), Field(min_length=1)]
"""Captions of a class: one template, a list of them, or the name of a list, which is written out when it is read."""


def fill(templates: str | Sequence[str], class_names: Sequence[str]) -> list[str]:
    """One caption per class, template by template; underscores in names read as spaces.

    Example:
        >>> fill(["a photo of a {}", "a {}"], ["cat", "guinea_pig"])
        ['a photo of a cat', 'a photo of a guinea pig', 'a cat', 'a guinea pig']
    """
    if isinstance(templates, str):
        templates = [templates]
    return [template.format(name.replace("_", " ")) for template in templates for name in class_names]


def class_features(encoder: DualEncoder, class_names: Sequence[str], templates: str | Sequence[str]) -> Tensor:
    """What the text tower makes of each class: ``(K, F)``, of unit length.

    The mean over the templates of features of unit length (Radford et al. 2021, section 3.1.4), at least in float32.
    """
    if isinstance(templates, str):
        templates = [templates]
    # Template by template: 80 of them and a thousand classes are too many texts for one pass.
    per_template = [
        F.normalize(at_least_float32(encoder.encode_text(fill(template, class_names))), dim=-1)
        for template in templates
    ]
    return F.normalize(torch.stack(per_template).mean(dim=0), dim=-1)
