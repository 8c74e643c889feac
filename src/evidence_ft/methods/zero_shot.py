"""No fine-tuning: the pre-trained model with its prompts (Radford et al. 2021, section 3.1.4).

A model without a text tower but with a classifier of its own is taken as it is, with the rows of the data's classes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evidence_ft.adaptation import Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, own_classifier, prompt_classifier
from evidence_ft.encoder import Encoder, with_text
from evidence_ft.prompts import Templates
from evidence_ft.types import ScoreFn


class Config(BaseModel):
    """How classes become texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["zero_shot"] = Field("zero_shot", description="the pre-trained model as it is")
    templates: Templates = Field(("a photo of a {}",), description="captions of a class, averaged; or clip_7, clip_80")


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Freeze everything; the classifier is the prompts' alone, or the model's own.

    Raises:
        ValueError: there is neither a text tower nor a classifier that knows the classes.
    """
    classifier = _classifier(encoder, class_names, config.templates)
    adapt(encoder, Towers(vision="frozen", text="frozen", train_logit_scale=False))

    def objective(features: Tensor, labels: Tensor) -> tuple[Tensor, ScoreFn]:
        raise RuntimeError("zero-shot has nothing to train; choose a method such as flcp")

    return FineTuning(encoder, objective, classifier)


def _classifier(encoder: Encoder, class_names: Sequence[str], templates: Templates) -> Callable[[], Classifier]:
    if encoder.own_head is None:
        return partial(prompt_classifier, with_text(encoder, "method zero_shot"), class_names, templates)
    own_classifier(encoder, class_names)  # what does not fit is to be said now
    return partial(own_classifier, encoder, class_names)
