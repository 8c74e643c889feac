"""The image tower: images to features, with a look inside.

Tracing is written once, here; a backbone declares where its blocks and their attention are. Blocks below the first
traced one keep the library's fused attention, and may be recomputed in the backward pass to save memory. From the first
traced one on, a training heatmap differentiates twice: these blocks compute their attention explicitly and keep it, for
the length of one call. This module knows no model library.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from evidence_ft.types import Readout, VisionTrace

Layers: TypeAlias = Sequence[int] | Literal["all"]
"""Which blocks of a tower: indices (negative ones count from the end), or all of them."""


class UnsupportedTowerError(ValueError):
    """An image tower that cannot be explained; the message says which part of the check it failed."""


class ImageTower(nn.Module, ABC):
    """Images to features, with a look inside. A backbone fills in the declarations below.

    Attributes:
        grid: token grid ``(h, w)``.
        num_prefix_tokens: tokens before the patches: a CLS token, registers, or none at all.
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
    def read(self, tokens: Tensor) -> Readout:
        """Features from a block's tokens ``(B, N, D)`` as if it were the last; of the last block's, those of `forward`.

        Where a probe pools the tokens, its attention is computed explicitly, and differentiable twice; see
        `read_cls` and `read_mean` for the others.
        """

    @abstractmethod
    def explicit_attention(self, block: nn.Module, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        """While open, ``block`` computes its attention ``(B, H, N, N)`` explicitly and hands it to ``keep``.

        What is kept must be on the path to the block's output, and differentiable twice. Leaves the block as it was.
        """

    def recomputes(self) -> bool:
        """Whether the model library's own activation checkpointing is on, which a trace cannot live with."""
        return False

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations; gradients stay the same.

        A trace recomputes the blocks below its first layer alone: with the last block traced that is nearly all of
        the memory, with all blocks traced it is none.
        """
        for block in self.blocks():
            if _is_recomputed(block):
                del block.forward
            if enabled:
                block.forward = _Recomputed(block.forward)

    def trace(self, images: Tensor, layers: Layers = "all") -> VisionTrace:
        """Run the tower once and keep the attention of ``layers``.

        Works on a frozen tower and under ``torch.no_grad`` too: the graph then starts at the first traced block, and
        what lies below costs nothing. Leaves no hook, flag or attribute behind, also when the forward pass raises.

        Args:
            images: ``(B, 3, Hpx, Wpx)``, normalised for the backbone.
            layers: blocks to trace; their order does not matter.

        Raises:
            ValueError: no such layer.
            RuntimeError: in inference mode.
            UnsupportedTowerError: the tower is compiled, or recomputed by anything but `set_checkpointing`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("heatmaps need gradients, which torch.inference_mode forbids; use torch.no_grad instead")
        _check_traceable(self)
        blocks = self.blocks()
        chosen = resolve_layers(layers, len(blocks))
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            stack.callback(blocks[chosen[0]].register_forward_pre_hook(_open_graph).remove)
            # Fused attention has no second derivative, so the blocks above a traced one are explicit even where their
            # attention is not wanted; and what is recomputed is so after this call, when no block is explicit.
            for layer in range(chosen[0], len(blocks)):
                keep = partial(kept.__setitem__, layer) if layer in chosen else _forget
                stack.enter_context(_remembered(blocks[layer]))
                stack.enter_context(self.explicit_attention(blocks[layer], keep))
            last: list[Tensor] = []
            stack.callback(blocks[-1].register_forward_hook(partial(_keep_tokens, last)).remove)
            self(images)  # its own read-out is not looked at: a pooling probe may have used fused attention
            features, pooling = self.read(last[0])
        attention = tuple(kept[layer] for layer in chosen)
        return VisionTrace(features, pooling, attention, self.grid, self.num_prefix_tokens)


def read_cls(tokens: Tensor) -> Tensor:
    """The share of each of the tokens ``(B, N, D)`` where the first one is read: ``(B, 1, 1, N)``."""
    share = tokens.new_zeros(len(tokens), 1, 1, tokens.shape[1])
    share[..., 0] = 1
    return share


def read_mean(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """The share of each of the tokens ``(B, N, D)`` where the mean over the patches is read: ``(B, 1, 1, N)``."""
    share = tokens.new_zeros(len(tokens), 1, 1, tokens.shape[1])
    share[..., num_prefix_tokens:] = 1 / (tokens.shape[1] - num_prefix_tokens)
    return share


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


def _forget(_attention: Tensor) -> None:
    pass


def _keep_tokens(kept: list[Tensor], _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    kept.append(output[0] if isinstance(output, tuple) else output)


@dataclass(frozen=True)
class _Recomputed:
    """A block's forward whose activations are dropped, and computed again when the backward pass asks for them."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        # Reentrant checkpointing refuses torch.autograd.grad, which is how a heatmap gets its gradients.
        return checkpoint(self.forward, *args, use_reentrant=False, **options)


def _is_recomputed(block: nn.Module) -> bool:
    return isinstance(block.forward, _Recomputed)


@contextmanager
def _remembered(block: nn.Module) -> Iterator[None]:
    """While open, the block keeps its activations, whatever `ImageTower.set_checkpointing` says."""
    if not _is_recomputed(block):
        yield
        return
    recomputed = block.forward
    del block.forward
    try:
        yield
    finally:
        block.forward = recomputed


def _check_traceable(tower: ImageTower) -> None:
    if tower.recomputes():
        raise UnsupportedTowerError(
            "the model library's activation checkpointing runs each block again in the backward pass, without the "
            "trace; switch it off (model.set_grad_checkpointing(False)) and use image_tower.set_checkpointing(True), "
            "which spares the traced blocks"
        )
    for name, module in tower.named_modules():
        if isinstance(module, CheckpointWrapper):
            raise UnsupportedTowerError(
                f"{name} is wrapped for activation checkpointing (Accelerate's fsdp_activation_checkpointing does so), "
                "which runs it again in the backward pass, without the trace; use "
                "image_tower.set_checkpointing(True) instead, which spares the traced blocks"
            )
        if _is_compiled(module):
            raise UnsupportedTowerError(
                f"{name or 'the image tower'} is compiled: attention captured inside a compiled graph has no gradient, "
                "and compiled graphs have no second derivative; compile the text tower alone"
            )


def _is_compiled(module: nn.Module) -> bool:
    """By ``torch.compile(module)``, or in place by ``module.compile()``."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def check_trainable(step: nn.Module, tower: ImageTower, layers: Layers) -> None:
    """Refuse what would train on a wrong gradient of a heatmap, or fail inside the backward pass.

    Args:
        step: the module that is trained, wrapped as it will be; holds ``tower``.
        tower: its image tower.
        layers: blocks that will be traced.

    Raises:
        UnsupportedTowerError: the tower is compiled, sharded by FSDP1, or recomputed where it is traced.
        ValueError: no such layer.
    """
    _check_traceable(tower)
    blocks = tower.blocks()
    first = resolve_layers(layers, len(blocks))[0]
    if first == 0 and _is_recomputed(blocks[0]):
        raise UnsupportedTowerError(
            f"gradient checkpointing saves nothing while layers = {layers!r}: the heatmap needs every block from the "
            "first traced one on; trace later blocks, such as layers = [-1], or switch gradient checkpointing off"
        )
    for name, module in step.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise UnsupportedTowerError(
                f"{name or 'the training step'} is sharded by FSDP1, whose flat parameters refuse the gradient of a "
                "gradient; set fsdp_version: 2 in the Accelerate configuration (configs/accelerate/fsdp2.yaml)"
            )
        if _is_compiled(module) and any(part is tower for part in module.modules()):
            raise UnsupportedTowerError(
                f"{name or 'the training step'} is compiled, and the image tower with it: attention captured inside a "
                "compiled graph has no gradient, and compiled graphs have no second derivative; remove dynamo_config "
                "from the Accelerate configuration"
            )


def check_tower(tower: ImageTower, image_size: tuple[int, int]) -> None:
    """Try the tower on one random image and say what about it cannot be explained.

    Checks that tracing does not change the features (to 1e-5 of their largest entry), that attention rows are
    distributions over the tokens, that every traced attention receives a gradient from the features, and the same of a
    read-out that pools by attention.

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
    if not plain.isfinite().all():
        raise UnsupportedTowerError(
            f"{name}: the features of a random image are not finite; the weights hold NaN or infinite values, so copy "
            "or download them again"
        )
    difference = ((trace.features - plain).abs().max() / plain.abs().max()).item()
    if not difference <= 1e-5:
        raise UnsupportedTowerError(
            f"{name}: tracing changes the features by {difference:.1e} of their size, expected at most 1e-5; the "
            "attention that was traced is not the one the model computes"
        )
    tokens = tower.num_prefix_tokens + tower.grid[0] * tower.grid[1]
    with torch.enable_grad():
        score = trace.features.square().sum()
    maps = (*trace.attention, trace.pooling) if trace.pooling.requires_grad else trace.attention
    gradients = torch.autograd.grad(score, maps, allow_unused=True)
    for layer, (attention, gradient) in enumerate(zip(trace.attention, gradients, strict=False)):
        _check_attention(attention, gradient, tokens, f"{name}: the attention of block {layer}", tower)
    pooling_gradient = gradients[-1] if trace.pooling.requires_grad else torch.ones(())
    _check_attention(trace.pooling, pooling_gradient, tokens, f"{name}: the pooling of the read-out", tower)


def _check_attention(attention: Tensor, gradient: Tensor | None, tokens: int, name: str, tower: ImageTower) -> None:
    queries = 1 if attention.shape[-2] == 1 else tokens
    if attention.shape[-2:] != (queries, tokens):
        raise UnsupportedTowerError(
            f"{name} is {tuple(attention.shape)}, expected (B, H, {queries}, {tokens}) for a "
            f"{tower.grid[0]}x{tower.grid[1]} grid and {tower.num_prefix_tokens} prefix token(s)"
        )
    if not torch.allclose(attention.sum(-1), torch.ones(()).to(attention), atol=1e-4):
        raise UnsupportedTowerError(f"{name} has rows that do not sum to 1")
    if gradient is None or not gradient.any():
        raise UnsupportedTowerError(
            f"{name} receives no gradient from the features; it is not on the path to the output, and a loss on its "
            "heatmap would be inert"
        )
