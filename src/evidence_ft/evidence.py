"""Evidence masks on the token grid, and the share of a heatmap that lies on them.

The policy, here and nowhere else:

* Masks come to the token grid by area. That equals upsampling the heatmap by nearest neighbour and
  counting pixels.
* A mask without evidence gives NaN: there is nothing to point at. Such images are left out of losses and
  rates, and counted.
* A heatmap without mass gives 0: it points at nothing, so not at the evidence. Such images stay in, and are
  counted. Were they left out, a model could look good by going dark.
* No epsilon. Gradient heatmaps of a fresh model can sum to 1e-16; whatever is added would have a scale.
"""

import torch
from einops import reduce
from torch import Tensor

from evidence_ft.types import OBJECT, at_least_float32

VALID_FROM = 0.5
"""Evidence is valid from this RMA on, 0.5 itself included (Wang et al., AAAI 2025, arXiv 2412.13333)."""


class HeatmapError(ValueError):
    """A heatmap function returned something that is no heatmap; the message says what, and what was expected."""


def mask_to_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each token's area that is evidence.

    Args:
        masks: ``(B, Hpx, Wpx)``, `OBJECT` on the evidence.
        grid: token grid ``(h, w)``; must divide the mask.

    Returns:
        ``(B, h, w)`` float32 in [0, 1].

    Raises:
        ValueError: the grid does not divide the mask.

    Example:
        >>> mask = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]]], dtype=torch.uint8)
        >>> mask_to_grid(mask, (1, 2))
        tensor([[[0.7500, 0.0000]]])
    """
    h, w = grid
    if masks.shape[1] % h or masks.shape[2] % w:
        raise ValueError(f"a {h}x{w} token grid does not divide masks of {tuple(masks.shape[1:])} pixels")
    return reduce((masks == OBJECT).float(), "b (h p) (w q) -> b h w", "mean", h=h, w=w)


def relevance_mass_accuracy(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Share of each heatmap's mass that lies on the evidence (RMA).

    Relevance Mass Accuracy of Arras et al. 2022 (arXiv 2003.07258, eq. 4). Does not depend on the heatmap's
    scale. Computed in float32, or float64 where that is given.

    Args:
        heatmaps: ``(B, h, w)``, non-negative, any scale.
        masks: ``(B, h, w)`` in [0, 1], the share of each token that is evidence.

    Returns:
        ``(B,)`` in [0, 1]. 0 where the heatmap is empty; NaN where the mask is.

    Raises:
        ValueError: shapes differ.
        TypeError: float16 heatmaps, whose mass underflows.

    Example:
        >>> heat = torch.tensor([[[3.0, 1.0]], [[0.0, 0.0]], [[3.0, 1.0]]])
        >>> mask = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]])
        >>> relevance_mass_accuracy(heat, mask)
        tensor([0.7500, 0.0000,    nan])
    """
    if heatmaps.shape != masks.shape:
        raise ValueError(
            f"heatmaps of shape {tuple(heatmaps.shape)} and masks of shape {tuple(masks.shape)} do not match; "
            "bring the masks to the token grid with mask_to_grid"
        )
    if heatmaps.dtype == torch.float16:
        raise TypeError("float16 heatmaps underflow; compute them in float32 or bfloat16")
    # A product of two small gradients leaves float32 before its ratio does: scale by the peak first. The
    # peak is a constant to autograd, and cancels.
    heatmaps = at_least_float32(heatmaps)
    peak = reduce(heatmaps.detach(), "b h w -> b 1 1", "max")
    scaled = heatmaps / torch.where(peak > 0, peak, 1.0)
    total = reduce(scaled, "b h w -> b", "sum")
    inside = reduce(scaled * masks, "b h w -> b", "sum")
    rma = inside / torch.where(total > 0, total, 1.0)
    return torch.where(has_evidence(masks), rma, torch.nan)


def checked_heatmaps(heatmaps: object, images: int, grid: tuple[int, int], *, finite: bool = True) -> Tensor:
    """What a heatmap function returned, if it can be one: anybody may have written it.

    Args:
        heatmaps: what was returned.
        images: how many were explained.
        grid: token grid ``(h, w)``.
        finite: False where NaN and infinities are met elsewhere, with more to say about them.

    Returns:
        ``(images, h, w)``, non-negative.

    Raises:
        HeatmapError: no tensor, another shape, or values that are negative or not finite.

    Example:
        >>> checked_heatmaps(torch.tensor([[[1.0, -1.0]]]), images=1, grid=(1, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        evidence_ft.evidence.HeatmapError: the heatmap returned values down to -1; expected none below 0: take what ...
    """
    expected = (images, *grid)
    if not isinstance(heatmaps, Tensor) or tuple(heatmaps.shape) != expected:
        found = f"shape {tuple(heatmaps.shape)}" if isinstance(heatmaps, Tensor) else f"type {type(heatmaps).__name__}"
        raise HeatmapError(
            f"the heatmap returned {found}; expected a tensor of shape {expected}: one map an image, on the token grid"
        )
    if finite and not heatmaps.isfinite().all():
        raise HeatmapError(
            "the heatmap returned NaN or infinite values; look whether it divides by zero, as by an empty map's sum"
        )
    if (heatmaps < 0).any():
        raise HeatmapError(
            f"the heatmap returned values down to {heatmaps.min().item():g}; expected none below 0: take what is "
            "positive, or absolute values"
        )
    return heatmaps


def has_evidence(masks: Tensor) -> Tensor:
    """Which masks ``(B, h, w)`` have evidence anywhere: ``(B,)`` bool."""
    return (masks > 0).flatten(1).any(dim=1)


def is_empty(heatmaps: Tensor) -> Tensor:
    """Which heatmaps ``(B, h, w)`` have no mass at all: ``(B,)`` bool."""
    return ~(heatmaps > 0).flatten(1).any(dim=1)
