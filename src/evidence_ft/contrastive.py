"""The contrastive losses of CLIP and SigLIP on given features."""

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
    logits = logit_scale * _cosines(image_features, text_features)
    positives = _own_captions(logits) if positives is None else positives
    return (_cross_entropy(logits, positives) + _cross_entropy(logits.T, positives.T)) / 2


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor | None = None,
) -> Tensor:
    """Each image with each caption is a yes or no of its own (SigLIP: Zhai et al. 2023, arXiv 2303.15343, eq. 1).

    The bias is added to the logits, as in the paper's listing and in published weights.

    Args:
        image_features: ``(B, F)``, normalised to unit length here.
        text_features: ``(B, F)``, likewise; row ``i`` is the caption of image ``i``.
        logit_scale: ``()`` or ``(1,)``, the inverse temperature, already exponentiated.
        logit_bias: ``()`` or ``(1,)``.
        positives: ``(B, B)`` bool, which captions fit which images; None for each image's own caption only.

    Returns:
        ``()``, in nats per image: the sum over captions, averaged over images.

    Example:
        Two images, each surely not of the other's caption, and undecided about its own:

        >>> features = torch.eye(2)
        >>> sigmoid_loss(features, features, torch.tensor(10.0), torch.tensor(-10.0))
        tensor(0.6932)
    """
    logits = logit_scale * _cosines(image_features, text_features) + logit_bias
    positives = _own_captions(logits) if positives is None else positives
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(logits)


def _cosines(image_features: Tensor, text_features: Tensor) -> Tensor:
    images, texts = (F.normalize(at_least_float32(features), dim=-1) for features in (image_features, text_features))
    return images @ texts.T


def _own_captions(logits: Tensor) -> Tensor:
    return torch.eye(len(logits), dtype=torch.bool, device=logits.device)


def _cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    targets = positives.to(logits) / positives.sum(dim=1, keepdim=True)
    return F.cross_entropy(logits, targets)
