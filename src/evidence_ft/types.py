"""The nouns that cross module boundaries.

Axes, everywhere in this package:

    B  images in the batch            K  classes
    H  attention heads                N  tokens of the image tower, prefix tokens included
    Q  query tokens                   F  width of the joint space
    h, w  token grid (N = num_prefix_tokens + h * w)
    Hpx, Wpx  pixels

This module knows nothing of models, data formats or training.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

BACKGROUND = 0
"""Mask value of a pixel that is not evidence."""
OBJECT = 1
"""Mask value of a pixel on the evidence; the values from 2 to 255 are kept free (255 for "unknown")."""

ScoreFn: TypeAlias = Callable[[Tensor], Tensor]
"""Features ``(B, F)`` to the score ``(B,)`` of each image's explained class."""

MaskSource: TypeAlias = Literal["mask", "box", "none"]
"""Where an evidence mask comes from: drawn pixel by pixel, filled from boxes, or not annotated."""


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Preprocessing(NamedTuple):
    """What a model expects of its images; the joint image-and-mask transform is built from it alone.

    Attributes:
        size: height and width in pixels.
        mean: per channel, on images scaled to [0, 1].
        std: per channel, on images scaled to [0, 1].
        interpolation: how images are resized.
        resize_mode: ``shortest`` resizes the shorter side, then crops the centre; ``squash`` ignores the
            aspect ratio; ``longest`` resizes the longer side, then pads.
        crop_rounding: where the centre lies between two pixels: ``even``, as torchvision and open_clip round, or
            ``down``, as transformers does.
        resized: height and width that are aimed at before the centre is cropped or padded to ``size``; by default, the
            same.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"
    crop_rounding: Literal["even", "down"] = "even"
    resized: tuple[int, int] | None = None


class Batch(NamedTuple):
    """Images with what is known about them, ready for a model.

    Attributes:
        images: ``(B, 3, Hpx, Wpx)`` float32, normalised for the backbone.
        labels: ``(B,)`` int64.
        masks: ``(B, Hpx, Wpx)`` uint8 of `BACKGROUND` and `OBJECT`; all background where no evidence is
            annotated or none of it is in view.
        rows: ``(B,)`` int64, row in the data set: the only key by which results are joined.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    rows: Tensor


class Readout(NamedTuple):
    """What is read from the tokens of a block, and how.

    Attributes:
        features: ``(B, F)``, before normalisation; what the prediction is made from.
        pooling: ``(B, H, 1, N)``, share of each token in what is read; rows sum to 1. Attention of a pooling probe on
            the path to the features, or a constant without gradient: all on the CLS token, or even over the patches.
    """

    features: Tensor
    pooling: Tensor


class VisionTrace(NamedTuple):
    """One pass through an image tower, with the attention of the traced layers on the path to its features.

    Attributes:
        features: ``(B, F)``, before normalisation; what the prediction is made from.
        pooling: ``(B, H, 1, N)``, how they were read from the last block's tokens; see `Readout`.
        attention: per traced layer, in the order of the layers, ``(B, H, N, N)``; rows sum to 1.
        grid: token grid ``(h, w)``.
        num_prefix_tokens: tokens before the patches: a CLS token, registers, or none at all.
    """

    features: Tensor
    pooling: Tensor
    attention: tuple[Tensor, ...]
    grid: tuple[int, int]
    num_prefix_tokens: int

    def on_grid(self, relevance: Tensor) -> Tensor:
        """Token relevance ``(B, N)`` to heatmap ``(B, h, w)``, prefix tokens dropped."""
        return relevance[:, self.num_prefix_tokens :].reshape(-1, *self.grid)


class Losses(NamedTuple):
    """What one step leaves behind.

    Attributes:
        total: ``()``, what is minimised.
        task: ``()``, the method's own loss.
        evidence: ``()``, the alignment loss before its weight, averaged over annotated images; NaN where it was not
            computed.
        rma: ``(b,)``, without gradient: RMA of the images that were explained, NaN where not annotated.
        empty: ``(b,)`` bool, which of their heatmaps have no mass.
    """

    total: Tensor
    task: Tensor
    evidence: Tensor
    rma: Tensor
    empty: Tensor
