"""What a fine-tuning method is, and the classifier that results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from evidence_ft.encoder import DualEncoder
from evidence_ft.tower import ImageTower
from evidence_ft.types import ScoreFn, at_least_float32


def _has_one_place(template: str) -> str:
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise ValueError("expected exactly one {}, where the class name goes, and no other braces")
    return template


Template: TypeAlias = Annotated[str, AfterValidator(_has_one_place)]
"""Caption of a class, such as ``a photo of a {}``; without the name in it all classes would be one."""

Objective: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ScoreFn]]
"""Features ``(B, F)`` and labels ``(B,)`` to the task loss ``()`` and the score of each image's own label."""


class PromptHead(nn.Module):
    """Scaled cosine with one text per class: ``(B, F)`` to logits ``(B, K)``.

    Args:
        text_features: ``(K, F)``; normalised here.
        scale: ``()``, inverse temperature.
    """

    def __init__(self, text_features: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", scale.detach() * F.normalize(at_least_float32(text_features.detach()), dim=-1))
        self.weight: Tensor

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(at_least_float32(features), dim=-1) @ self.weight.T


@dataclass(frozen=True)
class Classifier:
    """An image tower and a head: what is evaluated and explained.

    Attributes:
        tower: images to features.
        head: features ``(B, F)`` to logits ``(B, K)``.
        class_names: in the order of the logits.
    """

    tower: ImageTower
    head: nn.Module
    class_names: Sequence[str]

    def score_of(self, labels: Tensor) -> ScoreFn:
        """The logit of each image's class in ``labels`` ``(B,)``, as a function of features."""

        def score(features: Tensor) -> Tensor:
            logits: Tensor = self.head(features)
            return logits.gather(1, labels[:, None]).squeeze(1)

        return score


@dataclass(frozen=True)
class FineTuning:
    """A method, ready to train: what is fitted, towards what, and the classifier that results.

    Attributes:
        encoder: holds every parameter; those with ``requires_grad`` are trained. None of them are for zero-shot.
        objective: the method's own loss, and the score that is explained in training.
        classifier: the classifier the weights amount to now.
    """

    encoder: DualEncoder
    objective: Objective
    classifier: Callable[[], Classifier]

    @property
    def trains(self) -> bool:
        """Whether anything is fitted at all."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    def save(self, directory: Path) -> None:
        """Write the model in its backbone's own layout."""
        self.encoder.save(directory)


def prompt_classifier(encoder: DualEncoder, class_names: Sequence[str], template: str) -> Classifier:
    """The zero-shot classifier of an encoder as it is now (Radford et al. 2021, section 3.1.4)."""
    with torch.no_grad():
        text_features = encoder.encode_text(fill(template, class_names))
        head = PromptHead(text_features, encoder.logit_scale.exp())
    return Classifier(encoder.image_tower, head, class_names)


def fill(template: str, class_names: Sequence[str]) -> list[str]:
    """One caption per class; underscores in names read as spaces.

    Example:
        >>> fill("a photo of a {}", ["guinea_pig"])
        ['a photo of a guinea pig']
    """
    return [template.format(name.replace("_", " ")) for name in class_names]
