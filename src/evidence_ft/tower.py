"""The image tower: images to features, with a look inside.

Tracing is written once, here; a backbone declares where its blocks and their attention are. What is not traced keeps
the library's fused attention: only blocks from which attention is wanted compute it explicitly, for the length of one
call. This module knows no model library.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from evidence_ft.types import VisionTrace

Layers: TypeAlias = Sequence[int] | Literal["all"]
"""Which blocks of a tower: indices (negative ones count from the end), or all of them."""


class UnsupportedTowerError(ValueError):
    """An image tower that cannot be explained; the message says which part of the check it failed."""


class ImageTower(nn.Module, ABC):
    """Images to features, with a look inside. A backbone fills in the declarations below.

    Attributes:
        grid: token grid ``(h, w)``.
        num_prefix_tokens: tokens before the patches; the first one is what the features are read from.
    """

    grid: tuple[int, int]
    num_prefix_tokens: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, Hpx, Wpx)`` to features ``(B, F)``, not normalised."""

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last; tokens are their first positional argument."""

    @abstractmethod
    def explicit_attention(self, block: nn.Module, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        """While open, ``block`` computes its attention ``(B, H, N, N)`` explicitly and hands it to ``keep``.

        What is kept must be on the path to the block's output, and differentiable twice. Leaves the block as it was.
        """

    def recomputes(self) -> bool:
        """Whether activation checkpointing is on."""
        return False

    def trace(self, images: Tensor, layers: Layers = "all") -> VisionTrace:
        """Run the tower once and keep the attention of ``layers``.

        Works on a frozen tower and under ``torch.no_grad`` too: the graph then starts at the first traced block, and
        what lies below costs nothing. Leaves no hook, flag or attribute behind, also when the forward pass raises.

        Args:
            images: ``(B, 3, Hpx, Wpx)``, normalised for the backbone.
            layers: blocks to trace; their order does not matter.

        Raises:
            ValueError: no such layer.
            RuntimeError: in inference mode, or with activation checkpointing on.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("heatmaps need gradients, which torch.inference_mode forbids; use torch.no_grad instead")
        if self.recomputes():
            raise RuntimeError(
                "activation checkpointing runs each block again in the backward pass, without the trace; switch it "
                "off for the image tower: model.set_grad_checkpointing(False)"
            )
        blocks = self.blocks()
        chosen = resolve_layers(layers, len(blocks))
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            stack.callback(blocks[chosen[0]].register_forward_pre_hook(_open_graph).remove)
            for layer in chosen:
                stack.enter_context(self.explicit_attention(blocks[layer], partial(kept.__setitem__, layer)))
            features: Tensor = self(images)
        return VisionTrace(features, tuple(kept[layer] for layer in chosen), self.grid, self.num_prefix_tokens)


def resolve_layers(layers: Layers, depth: int) -> list[int]:
    """Layer indices, sorted, each once.

    Example:
        >>> resolve_layers([-1, 0], depth=12)
        [0, 11]
    """
    if layers == "all":
        return list(range(depth))
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise ValueError(
            f"layers = {list(layers)}, but the image tower has {depth} blocks; "
            f"choose from {-depth} to {depth - 1}, or 'all'"
        )
    return sorted({layer % depth for layer in layers})


def _open_graph(_block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of the first traced block: from its input on there is a graph, whatever the mode and the weights."""
    torch.set_grad_enabled(True)
    tokens, *rest = args
    return (tokens if tokens.requires_grad else tokens.detach().requires_grad_(), *rest)


def check_tower(tower: ImageTower, image_size: tuple[int, int]) -> None:
    """Try the tower on one random image and say what about it cannot be explained.

    Checks that tracing does not change the features (to 1e-5 of their largest entry), that attention rows are
    distributions over the tokens, and that every traced attention receives a gradient from the features.

    Args:
        tower: any image tower; comes out as it went in.
        image_size: height and width in pixels.

    Raises:
        UnsupportedTowerError: names the failed check.
    """
    parameter = next(tower.parameters())
    image = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    was_training = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            plain = tower(image)
            trace = tower.trace(image)
    finally:
        tower.train(was_training)
    name = type(tower).__name__
    difference = ((trace.features - plain).abs().max() / plain.abs().max()).item()
    if not difference <= 1e-5:
        raise UnsupportedTowerError(
            f"{name}: tracing changes the features by {difference:.1e} of their size, expected at most 1e-5; the "
            "attention that was traced is not the one the model computes"
        )
    tokens = tower.num_prefix_tokens + tower.grid[0] * tower.grid[1]
    with torch.enable_grad():
        score = trace.features.square().sum()
    gradients = torch.autograd.grad(score, trace.attention, allow_unused=True)
    for layer, (attention, gradient) in enumerate(zip(trace.attention, gradients, strict=True)):
        if attention.shape[-2:] != (tokens, tokens):
            raise UnsupportedTowerError(
                f"{name}: attention of block {layer} is {tuple(attention.shape)}, expected (B, H, {tokens}, {tokens}) "
                f"for a {tower.grid[0]}x{tower.grid[1]} grid and {tower.num_prefix_tokens} prefix token(s)"
            )
        if not torch.allclose(attention.sum(-1), torch.ones(()).to(attention), atol=1e-4):
            raise UnsupportedTowerError(f"{name}: attention rows of block {layer} do not sum to 1")
        if gradient is None or not gradient.any():
            raise UnsupportedTowerError(
                f"{name}: the attention of block {layer} receives no gradient from the features; "
                "it is not on the path to the output, and a loss on its heatmap would be inert"
            )
