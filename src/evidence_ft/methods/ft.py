"""Full fine-tuning: the image tower and a linear classifier, with cross entropy.

The classifier reads features of unit length and starts as the zero-shot classifier, as in WiSE-FT (Wortsman et al.
2022, arXiv 2109.01903). Wang et al. (AAAI 2025, arXiv 2412.13333) start from a random layer on features of any
length; ``head: random`` gives their start, on features of unit length. Prompts only start the classifier: the text
tower and the logit scale take no part in training, and are frozen.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from evidence_ft.adaptation import LoraConfig, Mode, Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, HeadInit, linear_head
from evidence_ft.encoder import Encoder
from evidence_ft.objectives import cross_entropy
from evidence_ft.prompts import Templates


class Config(BaseModel):
    """Where the linear classifier starts, and what is trained below it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["ft"] = Field("ft", description="fine-tune the image tower under a linear classifier")
    templates: Templates = Field(
        ("a photo of a {}",), description="captions of a class, averaged, for the zero-shot start; or clip_7, clip_80"
    )
    head: HeadInit = Field("zero_shot", description="where the linear classifier starts")
    vision: Mode = Field("full", description="what is trained of the image tower")
    lora: LoraConfig = Field(LoraConfig(), description="of an image tower in mode lora")


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Train the image tower and a linear classifier with cross entropy."""
    head = linear_head(encoder, class_names, config.templates, config.head)
    adapt(encoder, Towers(config.vision, text="frozen", train_logit_scale=False, lora=config.lora))
    return FineTuning(
        encoder, cross_entropy(head), lambda: Classifier(encoder.image_tower, head, class_names), head=head
    )
