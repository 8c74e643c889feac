"""CoOp: learn the words around the class names.

Zhou et al. 2022 (arXiv 2109.01134). A context of vectors stands where words would, before each class name: one for
all classes or one each. Both towers are frozen; the text tower runs at each step over all classes, and the gradient
goes through it into the context. Deviations: the context starts from the words of the template, so that training
starts from the zero-shot classifier (``init: random`` is published: 16 vectors from a normal distribution of standard
deviation 0.02); and no full stop follows the name unless the template has one.

The tower is frozen, and with it every attention. The context decides the text features, which are the direction in
feature space whose gradient a heatmap shows: the evidence loss can turn it, but not make the tower look elsewhere.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from evidence_ft.adaptation import Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, PromptHead, cosine_logits
from evidence_ft.encoder import DualEncoder, Encoder, with_text
from evidence_ft.objectives import cross_entropy
from evidence_ft.prompts import Templates, fill
from evidence_ft.types import ScoreFn, at_least_float32

STD, LENGTH = 0.02, 16
"""Of a random context, as published."""


class Config(BaseModel):
    """What the context is, and where it starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["coop"] = Field("coop", description="learn the words around the class names")
    templates: Templates = Field(
        ("a photo of a {}",),
        description="one template: the context starts from what stands before {}; what stands after it stays",
    )
    init: Literal["text", "random"] = Field("text", description="start the context from the template or at random")
    context_length: int = Field(
        LENGTH, gt=0, description="words of a random context; one from text is as long as its text"
    )
    class_specific: bool = Field(False, description="a context for each class instead of one for all")

    @model_validator(mode="after")
    def _one_start(self) -> "Config":
        if len(self.templates) != 1:
            raise ValueError(f"templates: found {len(self.templates)}, but one prompt is learned; give one template")
        if self.init == "text" and self.context_length != LENGTH:
            raise ValueError(
                f"context_length is {self.context_length}, but a context from text is as long as its text; leave it "
                "out, or set init to 'random'"
            )
        if self.init == "text" and not self.templates[0].partition("{}")[0].strip():
            raise ValueError(
                f"templates: {self.templates[0]!r} has no words before {{}} for the context to start from; "
                "give it some, or set init to 'random'"
            )
        return self


class Context(nn.Module):
    """Vectors ``(L, W)`` for all classes, or ``(K, L, W)``, to stand before the class names."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Freeze both towers and train the context with cross entropy.

    Raises:
        ValueError: there is no text tower, or context and class names do not fit it.
    """
    dual = with_text(encoder, "method coop")
    adapt(dual, Towers(vision="frozen", text="frozen", train_logit_scale=False))
    before, place, after = config.templates[0].partition("{}")
    names = fill(place + after, class_names)
    context = Context(_start(dual, before.strip(), len(names), config))

    def text_features() -> Tensor:
        return dual.encode_with_context(names, context.vectors)

    def objective(features: Tensor, labels: Tensor) -> tuple[Tensor, ScoreFn]:
        weight = dual.logit_scale.exp() * F.normalize(at_least_float32(text_features()), dim=-1)
        return cross_entropy(partial(cosine_logits, weight=weight))(features, labels)

    def classifier() -> Classifier:
        with torch.no_grad():
            head = PromptHead(text_features(), dual.logit_scale.exp())
        return Classifier(dual.image_tower, head, class_names)

    classifier()  # what does not fit is to be said now, not at the first step
    return FineTuning(dual, objective, classifier, head=context)


def _start(encoder: DualEncoder, text: str, classes: int, config: Config) -> Tensor:
    if config.init == "text":
        words = at_least_float32(encoder.embed_words(text))
        return words.repeat(classes, 1, 1) if config.class_specific else words.clone()
    shape = (config.context_length, encoder.text_width)
    noise = torch.randn(classes, *shape) if config.class_specific else torch.randn(shape)
    return at_least_float32((STD * noise).to(encoder.logit_scale))
