"""Linear probe: a linear classifier on frozen features.

As in Radford et al. 2021 (section 3.2) and Wang et al. (AAAI 2025, arXiv 2412.13333). Deviations: the features have
unit length, and the layer starts as the zero-shot classifier unless told otherwise, so that it is CLIP before its
first step; it is fitted by the trainer's own optimizer, which leaves room for the evidence loss.

The tower is frozen, and with it every attention. A heatmap weighs attention by the gradient of the score, and the
score is the layer's: its weights are the direction in feature space whose gradient is shown. The evidence loss can
turn that direction towards features that come from the evidence; it cannot make the tower look elsewhere.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from evidence_ft.adaptation import Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, HeadInit, linear_head
from evidence_ft.encoder import Encoder
from evidence_ft.objectives import cross_entropy
from evidence_ft.prompts import Templates


class Config(BaseModel):
    """Where the linear classifier starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["lp"] = Field("lp", description="linear probe: a linear classifier on frozen features")
    templates: Templates = Field(
        ("a photo of a {}",), description="captions of a class, averaged, for the zero-shot start; or clip_7, clip_80"
    )
    head: HeadInit = Field("zero_shot", description="where the linear classifier starts")


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Freeze both towers and train a linear classifier with cross entropy."""
    adapt(encoder, Towers(vision="frozen", text="frozen", train_logit_scale=False))
    head = linear_head(encoder, class_names, config.templates, config.head)
    return FineTuning(
        encoder, cross_entropy(head), lambda: Classifier(encoder.image_tower, head, class_names), head=head
    )
