"""Tip-Adapter: training images remembered as keys and labels, beside the zero-shot classifier.

Zhang et al. 2022 (arXiv 2207.09519). The logits are the prompts' plus ``alpha * exp(-beta * (1 - f K^T)) L``, with
the features ``f`` of an image, the remembered ones ``K`` (unit length) and their one-hot labels ``L``. Nothing is
trained, or with ``fine_tune`` the keys are (Tip-Adapter-F), which then need not keep unit length; labels and towers
are frozen. Deviations: the first images of each class in the order of the rows are remembered, so that no seed is
involved, each without augmentation (published: a random choice, the mean over ten augmented views); alpha and beta
are given instead of searched on validation images.

The tower is frozen, and with it every attention. The gradient of the score, which a heatmap shows, leads to the text
of the class and to the keys near the image: the evidence loss can move the keys, but not make the tower look
elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from evidence_ft.adaptation import Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, PromptHead, cosine_logits, prompt_head
from evidence_ft.encoder import Encoder, with_text
from evidence_ft.objectives import cross_entropy
from evidence_ft.prompts import Templates
from evidence_ft.types import at_least_float32


class Config(BaseModel):
    """What is remembered, and how much it has to say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["tip_adapter"] = Field("tip_adapter", description="remembered training images beside the prompts")
    templates: Templates = Field(("a photo of a {}",), description="captions of a class, averaged; or clip_7, clip_80")
    shots: int | None = Field(16, gt=0, description="images remembered of each class, the first ones; none for all")
    alpha: float = Field(1.0, ge=0, description="weight of what is remembered against the prompts")
    beta: float = Field(5.5, gt=0, description="how fast a remembered image loses its say with distance")
    fine_tune: bool = Field(False, description="train the keys (Tip-Adapter-F)")


class CacheHead(nn.Module):
    """Prompts and remembered images: ``(B, F)`` to logits ``(B, K)``. Zero-shot as long as nothing is remembered.

    A state can be loaded whatever number of images it remembers.

    Args:
        prompts: the zero-shot head; holds no parameters.
        alpha: weight of what is remembered.
        beta: sharpness of the affinity.
        fine_tune: train the keys.
    """

    def __init__(self, prompts: PromptHead, alpha: float, beta: float, *, fine_tune: bool) -> None:
        super().__init__()
        self.prompts = prompts
        self.alpha = alpha
        self.beta = beta
        weight = prompts.weight
        self.keys = nn.Parameter(weight.new_empty(0, weight.shape[1]), requires_grad=fine_tune)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64, device=weight.device))
        self.labels: Tensor

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            prompted: Tensor = self.prompts(features)
            affinity = torch.exp(-self.beta * (1 - cosine_logits(features, self.keys)))
            return prompted + self.alpha * affinity @ F.one_hot(self.labels, prompted.shape[1]).to(affinity)

    def remember(self, features: Tensor, labels: Tensor, shots: int | None) -> None:
        """Replace what is remembered by the first ``shots`` images of each class, or by all.

        Args:
            features: ``(n, F)``.
            labels: ``(n,)``; a class without images is left to its prompts.
            shots: images of each class.
        """
        rows = torch.cat([(labels == label).nonzero()[:shots, 0] for label in sorted(set(labels.tolist()))])
        self._resize(len(rows))
        with torch.no_grad():
            self.keys.copy_(F.normalize(at_least_float32(features[rows]), dim=-1))
            self.labels.copy_(labels[rows])

    def _resize(self, images: int) -> None:
        # The same parameter with other storage: whoever holds it already goes on holding it.
        self.keys.data = self.keys.new_empty(images, self.keys.shape[1])
        self.labels.data = self.labels.new_empty(images)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}labels")
        if saved is not None:
            self._resize(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Freeze both towers; remember the training set when it is read, and train the keys if told so.

    Raises:
        ValueError: the encoder has no text tower.
    """
    dual = with_text(encoder, "method tip_adapter")
    adapt(dual, Towers(vision="frozen", text="frozen", train_logit_scale=False))
    head = CacheHead(
        prompt_head(dual, class_names, config.templates), config.alpha, config.beta, fine_tune=config.fine_tune
    )
    return FineTuning(
        encoder,
        cross_entropy(head),
        lambda: Classifier(encoder.image_tower, head, class_names),
        head=head,
        read_training_set=lambda features, labels: head.remember(features, labels, config.shots),
    )
