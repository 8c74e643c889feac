"""What a fine-tuning method is, the classifier that results, and the heads that methods have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence_ft.encoder import DualEncoder, Encoder, with_text
from evidence_ft.prompts import class_features
from evidence_ft.tower import ImageTower
from evidence_ft.types import ScoreFn, at_least_float32

Objective: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ScoreFn]]
"""Features ``(B, F)`` and labels ``(B,)`` to the task loss ``()`` and the score of each image's own label."""

Heatmap: TypeAlias = Callable[..., Tensor]
"""``heatmap(trace, score, *, create_graph) -> (B, h, w)``, as exported by each file of ``heatmaps``."""

HeadInit: TypeAlias = Literal["zero_shot", "random", "own"]
"""Where a linear head starts: at the prompts' classifier, at random, or at the classifier the model comes with."""


def cosine_logits(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on features of unit length, in float32 or better also under autocast.

    Args:
        features: ``(B, F)``, normalised here.
        weight: ``(K, F)``, as it is.
        bias: ``(K,)``.

    Returns:
        ``(B, K)``.
    """
    # At a scale of 100, logits in bfloat16 are multiples of 0.5.
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(F.normalize(at_least_float32(features), dim=-1), weight, bias)


def own_score(head: Callable[[Tensor], Tensor], labels: Tensor) -> ScoreFn:
    """The logit of each image's class in ``labels`` ``(B,)``, as a function of features."""

    def score(features: Tensor) -> Tensor:
        return head(features).gather(1, labels[:, None]).squeeze(1)

    return score


class PromptHead(nn.Module):
    """Scaled cosine with one text per class: ``(B, F)`` to logits ``(B, K)``. Holds no parameters.

    Args:
        text_features: ``(K, F)``; normalised here.
        scale: ``()``, inverse temperature.
    """

    def __init__(self, text_features: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", scale.detach() * F.normalize(at_least_float32(text_features.detach()), dim=-1))
        self.weight: Tensor

    def forward(self, features: Tensor) -> Tensor:
        return cosine_logits(features, self.weight)


class LinearHead(nn.Module):
    """A linear layer, in float32 or better also under autocast: ``(B, F)`` to logits ``(B, K)``.

    Args:
        weight: ``(K, F)`` to start from.
        bias: ``(K,)`` to start from.
        unit_length: bring features to unit length first, as in a joint space; a model trained under a classifier of
            its own has them read as they are.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, unit_length: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(at_least_float32(weight.detach()).clone())
        self.bias = nn.Parameter(at_least_float32(bias.detach()).clone())
        self.unit_length = unit_length

    def inputs(self, features: Tensor) -> Tensor:
        """What the layer is applied to: ``(B, F)``, in float32 or better."""
        features = at_least_float32(features)
        return F.normalize(features, dim=-1) if self.unit_length else features

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.inputs(features), self.weight, self.bias)


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
        return own_score(self.head, labels)


@dataclass(frozen=True)
class FineTuning:
    """A method, ready to train: what is fitted, towards what, and the classifier that results.

    Parameters of encoder and head with ``requires_grad`` are trained; zero-shot has none.

    Attributes:
        encoder: the model.
        objective: the method's own loss, and the score that is explained in training.
        classifier: the classifier the weights amount to now.
        head: whatever the method adds to the encoder: linear head, context, adapter, cache. Its ``state_dict`` is all
            there is to save of it, and can be loaded into the head of the same method prepared anew.
        read_training_set: takes the features ``(n, F)`` and labels ``(n,)`` of the training images, not augmented, in
            the order of the rows; the same ones on every process. Called once, before training and before there is
            an optimizer; None where the method needs nothing of the kind.
    """

    encoder: Encoder
    objective: Objective
    classifier: Callable[[], Classifier]
    head: nn.Module = field(default_factory=nn.Module)
    read_training_set: Callable[[Tensor, Tensor], None] | None = None

    @property
    def trains(self) -> bool:
        """Whether anything is fitted by gradient descent."""
        return any(parameter.requires_grad for part in (self.encoder, self.head) for parameter in part.parameters())


def prompt_head(encoder: DualEncoder, class_names: Sequence[str], templates: str | Sequence[str]) -> PromptHead:
    """The zero-shot head of an encoder as it is now (Radford et al. 2021, section 3.1.4)."""
    with torch.no_grad():
        return PromptHead(class_features(encoder, class_names, templates), encoder.logit_scale.exp())


def prompt_classifier(encoder: DualEncoder, class_names: Sequence[str], templates: str | Sequence[str]) -> Classifier:
    """The zero-shot classifier of an encoder as it is now; several templates make an ensemble."""
    return Classifier(encoder.image_tower, prompt_head(encoder, class_names, templates), class_names)


def own_classifier(encoder: Encoder, class_names: Sequence[str]) -> Classifier:
    """The model as it is now, with the rows of its own head for some classes.

    Raises:
        ValueError: it has no head of its own, or not these classes.
    """
    return Classifier(encoder.image_tower, _own_head(encoder, class_names).requires_grad_(False), class_names)


def _own_head(encoder: Encoder, class_names: Sequence[str]) -> LinearHead:
    if encoder.own_head is None:
        raise ValueError(f"backbone {encoder.backbone!r} ({encoder.checkpoint}) comes without a classifier of its own")
    return LinearHead(*encoder.own_head.of(class_names), unit_length=False)


def linear_head(
    encoder: Encoder, class_names: Sequence[str], templates: str | Sequence[str], init: HeadInit
) -> LinearHead:
    """A linear head that starts as the zero-shot classifier, as the model's own, or as `torch.nn.Linear` does.

    It reads features of unit length where there is a text tower, and as they are where there is none.

    Args:
        encoder: read as it is now.
        class_names: in the order of the logits.
        templates: captions of a class, for the zero-shot start.
        init: where it starts; ``random`` draws from torch's own generator.

    Raises:
        ValueError: the encoder has nothing to start from in this way.
    """
    if init == "own":
        try:
            return _own_head(encoder, class_names)
        except ValueError as error:
            starts = "'zero_shot' or 'random'" if isinstance(encoder, DualEncoder) else "'random'"
            raise ValueError(f"head = 'own': {error}; or set head to {starts}") from error
    if init == "random" and not isinstance(encoder, DualEncoder):
        like = _features_of_nothing(encoder)
        fresh = nn.Linear(like.shape[1], len(class_names)).to(like)
        return LinearHead(fresh.weight, fresh.bias, unit_length=False)
    prompts = prompt_head(with_text(encoder, "head = 'zero_shot'"), class_names, templates).weight
    if init == "zero_shot":
        return LinearHead(prompts, prompts.new_zeros(len(prompts)))
    fresh = nn.Linear(prompts.shape[1], prompts.shape[0])
    return LinearHead(fresh.weight.to(prompts), fresh.bias.to(prompts))


@torch.no_grad()
def _features_of_nothing(encoder: Encoder) -> Tensor:
    """Features ``(1, F)`` of a blank image, at least float32: their width, and where they are."""
    parameter = next(encoder.image_tower.parameters())
    return at_least_float32(encoder.image_tower(parameter.new_zeros(1, 3, *encoder.preprocessing.size)))
