"""FLCP: fine-tune like CLIP pre-training, images against the captions of their classes.

Goyal et al. 2023 (FLYP, arXiv 2212.00638), as compared by Wang et al. (AAAI 2025, arXiv 2412.13333). Both towers
and the logit scale are trained; the paper's code keeps the temperature fixed for CLIP. Features are gathered over
processes, so the contrastive batch is the global one.

Same-class images of a batch share their caption. With one caption per class the published pair targets (each caption
belongs to one image) and class targets (to all images of its class) are the same loss: images with equal captions have
equal logits, so a uniform target over them and the sum of one-hot targets agree. They differ once captions differ
within a class.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evidence_ft.classifier import FineTuning, Template, fill, prompt_classifier
from evidence_ft.contrastive import contrastive_loss
from evidence_ft.distributed import gather, gather_with_grad
from evidence_ft.encoder import DualEncoder
from evidence_ft.types import ScoreFn, at_least_float32

MAX_LOGIT_SCALE = math.log(100)
"""As in CLIP's pre-training (Radford et al. 2021, section 2.5)."""


class Config(BaseModel):
    """What captions say, and what counts as a match."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["flcp"] = Field("flcp", description="fine-tune like CLIP pre-training")
    template: Template = Field("a photo of a {}", description="caption of a class; {} is its name")
    targets: Literal["pair", "class"] = Field(
        "class", description="a caption fits its own image alone (published), or all images of its class"
    )
    train_logit_scale: bool = Field(True, description="learn the temperature, as FLYP does")


def prepare(encoder: DualEncoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Train both towers on image-caption pairs; the classifier re-reads the prompts at each evaluation."""
    encoder.requires_grad_(True)
    encoder.logit_scale.requires_grad_(config.train_logit_scale)
    captions = fill(config.template, class_names)

    def objective(features: Tensor, labels: Tensor) -> tuple[Tensor, ScoreFn]:
        # Each caption of the batch is encoded once, however many of its images there are.
        present, caption_of = torch.unique(labels, return_inverse=True)
        text_features = encoder.encode_text([captions[label] for label in present.tolist()])[caption_of]
        with torch.no_grad():
            encoder.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        scale = encoder.logit_scale.exp()
        positives = None
        if config.targets == "class":
            everyone = gather(labels)
            positives = everyone[:, None] == everyone[None, :]
        loss = contrastive_loss(gather_with_grad(features), gather_with_grad(text_features), scale, positives)
        own_caption = F.normalize(at_least_float32(text_features), dim=-1)

        def score(features: Tensor) -> Tensor:
            return scale * (F.normalize(at_least_float32(features), dim=-1) * own_caption).sum(dim=-1)

        return loss, score

    return FineTuning(encoder, objective, lambda: prompt_classifier(encoder, class_names, config.template))
