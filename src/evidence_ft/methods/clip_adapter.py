"""CLIP-Adapter: a small bottleneck on the image features, mixed into them.

Gao et al. 2021 (arXiv 2110.04544), the adapter of the image features: ``ratio * A(f) + (1 - ratio) * f`` with ``A(f)
= ReLU(f W1) W2``, then the cosine with the prompts. Both towers are frozen. As in the equation, and other than in the
public code, no second ReLU follows. Features are brought to unit length first; without biases that changes nothing,
since ``A`` scales with its input.

The tower is frozen, and with it every attention. The adapter decides which direction in feature space a score grows
along, and a heatmap shows the gradient of the score: the evidence loss can turn that direction, image by image, but
not make the tower look elsewhere.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from evidence_ft.adaptation import Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, PromptHead, prompt_head
from evidence_ft.encoder import Encoder, with_text
from evidence_ft.objectives import cross_entropy
from evidence_ft.prompts import Templates
from evidence_ft.types import at_least_float32


class Config(BaseModel):
    """How narrow the bottleneck is, and how much it has to say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["clip_adapter"] = Field("clip_adapter", description="a bottleneck on the image features")
    templates: Templates = Field(("a photo of a {}",), description="captions of a class, averaged; or clip_7, clip_80")
    reduction: int = Field(4, gt=0, description="width of the features over width of the bottleneck")
    ratio: float = Field(0.2, gt=0, le=1, description="share of the adapter in the features; the rest is CLIP's")


class AdapterHead(nn.Module):
    """Adapted features against the prompts: ``(B, F)`` to logits ``(B, K)``.

    Args:
        prompts: the zero-shot head; holds no parameters.
        reduction: width of the features over width of the bottleneck.
        ratio: share of the adapter.
    """

    def __init__(self, prompts: PromptHead, reduction: int, ratio: float) -> None:
        super().__init__()
        width = prompts.weight.shape[1]
        self.prompts = prompts
        self.ratio = ratio
        self.down = nn.Linear(width, width // reduction, bias=False).to(prompts.weight)
        self.up = nn.Linear(width // reduction, width, bias=False).to(prompts.weight)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(at_least_float32(features), dim=-1)
            adapted = self.up(self.down(features).relu())
            logits: Tensor = self.prompts(self.ratio * adapted + (1 - self.ratio) * features)
            return logits


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Freeze both towers and train the adapter with cross entropy.

    Raises:
        ValueError: there is no text tower, or the features are narrower than the reduction.
    """
    dual = with_text(encoder, "method clip_adapter")
    adapt(dual, Towers(vision="frozen", text="frozen", train_logit_scale=False))
    prompts = prompt_head(dual, class_names, config.templates)
    width = prompts.weight.shape[1]
    if config.reduction > width:
        raise ValueError(f"reduction = {config.reduction} leaves nothing of {width} features; choose at most {width}")
    head = AdapterHead(prompts, config.reduction, config.ratio)
    return FineTuning(
        encoder, cross_entropy(head), lambda: Classifier(encoder.image_tower, head, class_names), head=head
    )
