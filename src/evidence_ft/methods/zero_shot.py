"""No fine-tuning: the pre-trained model with its prompts (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evidence_ft.adaptation import Towers, adapt
from evidence_ft.classifier import FineTuning, prompt_classifier
from evidence_ft.encoder import DualEncoder
from evidence_ft.prompts import Templates
from evidence_ft.types import ScoreFn


class Config(BaseModel):
    """How classes become texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["zero_shot"] = Field("zero_shot", description="the pre-trained model as it is")
    templates: Templates = Field(("a photo of a {}",), description="captions of a class, averaged; or clip_7, clip_80")


def prepare(encoder: DualEncoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Freeze everything; the classifier is the prompts' alone."""
    adapt(encoder, Towers(vision="frozen", text="frozen", train_logit_scale=False))

    def objective(features: Tensor, labels: Tensor) -> tuple[Tensor, ScoreFn]:
        raise RuntimeError("zero-shot has nothing to train; choose a method such as flcp")

    return FineTuning(encoder, objective, lambda: prompt_classifier(encoder, class_names, config.templates))
