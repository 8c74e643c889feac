"""Heatmap mass outside the evidence: 1 - RMA.

The energy loss of Rao et al. 2023 (Model Guidance, arXiv 2303.11932, eq. 4). Its degenerate optimum is all mass on a
single evidence token.
"""

from torch import Tensor

from evidence_ft.evidence import relevance_mass_accuracy


def loss(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Share of each heatmap's mass outside its mask.

    Args:
        heatmaps: ``(B, h, w)``, non-negative, any scale.
        masks: ``(B, h, w)`` in [0, 1].

    Returns:
        ``(B,)`` in [0, 1]; 1 for an empty heatmap (without gradient), NaN where the mask is empty.

    Example:
        >>> import torch
        >>> loss(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]]))
        tensor([0.2500])
    """
    return 1 - relevance_mass_accuracy(heatmaps, masks)
