"""The symmetric contrastive loss of CLIP on given features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evidence_ft.types import at_least_float32


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, positives: Tensor | None = None
) -> Tensor:
    """Mean of image-to-text and text-to-image cross entropy (Radford et al. 2021, fig. 3).

    Args:
        image_features: ``(B, F)``, normalised to unit length here.
        text_features: ``(B, F)``, likewise; row ``i`` is the caption of image ``i``.
        logit_scale: ``()``, the inverse temperature, already exponentiated.
        positives: ``(B, B)`` bool, which captions fit which images; None for each image's own caption only.
            Several positives share the target equally (the supervised contrastive target of Khosla et al.
            2020, arXiv 2004.11362, eq. 2).

    Returns:
        ``()``, in nats.

    Example:
        Two images that match their captions and a temperature that leaves little doubt:

        >>> features = torch.eye(2)
        >>> contrastive_loss(features, features, torch.tensor(4.0))
        tensor(0.0181)
    """
    images, texts = (F.normalize(at_least_float32(features), dim=-1) for features in (image_features, text_features))
    logits = logit_scale * images @ texts.T
    if positives is None:
        positives = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (_cross_entropy(logits, positives) + _cross_entropy(logits.T, positives.T)) / 2


def _cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    targets = positives.to(logits) / positives.sum(dim=1, keepdim=True)
    return F.cross_entropy(logits, targets)
