"""timm's vision transformers as image towers, for every backbone that has one: open_clip's trunks, ALBEF, plain ones.

timm computes attention explicitly where ``fused_attn`` is off, and its dropout then lies on the path: the switch is
thrown for the length of one trace, on the blocks that are traced, and the dropout's output is kept.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import AttentionPoolLatent
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from evidence_ft.tower import ImageTower, UnsupportedTowerError, read_cls, read_mean
from evidence_ft.types import Readout


class TimmTower(ImageTower):
    """A timm vision transformer and what maps its features into the joint space.

    Reads the CLS token, the mean over the patches, or a probe that pools by attention (SigLIP); prefix tokens may
    include registers (DINOv2) or be absent.

    Args:
        trunk: timm's model; kept as it is.
        project: features of the trunk to those of the tower.
        pre_logits: leave out the trunk's own classification head.

    Raises:
        UnsupportedTowerError: no vision transformer, or one with another kind of attention or pooling.
    """

    def __init__(self, trunk: Any, project: nn.Module, *, pre_logits: bool = False) -> None:
        super().__init__()
        if not hasattr(trunk, "patch_embed") or not hasattr(trunk, "blocks") or not hasattr(trunk, "norm"):
            raise UnsupportedTowerError(
                f"image tower {type(trunk).__name__} is not supported; expected one of timm's vision transformers"
            )
        if getattr(trunk.patch_embed, "grid_size", None) is None:
            raise UnsupportedTowerError(
                f"image tower {type(trunk).__name__} has no fixed grid of patches; expected one of fixed resolution"
            )
        _check_pooling(trunk)
        if not isinstance(getattr(trunk, "patch_drop", None) or nn.Identity(), nn.Identity):
            raise UnsupportedTowerError("patch dropout leaves holes in the heatmap; load the model without it")
        self.trunk = trunk
        self.project = project
        self.pre_logits = pre_logits
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.num_prefix_tokens = int(trunk.num_prefix_tokens)
        for block in self.blocks():
            if not hasattr(getattr(block, "attn", None), "attn_drop") or not hasattr(block.attn, "fused_attn"):
                raise UnsupportedTowerError(
                    f"block {type(block).__name__} has no timm attention with 'fused_attn' and 'attn_drop'"
                )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.project(self._head(self.trunk.forward_features(images)))
        return features

    def read(self, tokens: Tensor) -> Readout:
        normed = self.trunk.norm(tokens)
        if getattr(self.trunk, "attn_pool", None) is not None:
            return self._read_by_probe(normed)
        averages = self.trunk.global_pool == "avg"
        pooling = read_mean(tokens, self.num_prefix_tokens) if averages else read_cls(tokens)
        return Readout(self.project(self._head(normed)), pooling)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.trunk.blocks)

    def recomputes(self) -> bool:
        return bool(self.trunk.grad_checkpointing)

    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        return unfused(block.attn, keep)

    def _head(self, normed: Tensor) -> Tensor:
        features: Tensor = self.trunk.forward_head(normed, pre_logits=self.pre_logits)
        return features

    def _read_by_probe(self, normed: Tensor) -> Readout:
        """`AttentionPoolLatent.forward`, which has no module between its softmax and its values to look into."""
        pool: Any = self.trunk.attn_pool
        without = 0 if getattr(self.trunk, "pool_include_prefix", True) else self.num_prefix_tokens
        tokens = normed[:, without:]
        placed = tokens if pool.pos_embed is None else tokens + pool.pos_embed.to(tokens.dtype)
        q = rearrange(pool.q(pool.latent), "1 1 (h d) -> 1 h 1 d", h=pool.num_heads)
        k, v = rearrange(pool.kv(placed), "b n (two h d) -> two b h n d", two=2, h=pool.num_heads)
        weights = (pool.q_norm(q) * pool.scale @ pool.k_norm(k).mT).softmax(dim=-1)
        pooling = F.pad(weights, (without, 0))
        mixed = rearrange(pooling[..., without:].to(v) @ v, "b h 1 d -> b (h d)")
        pooled = pool.proj_drop(pool.proj(mixed))
        if pool.mlp is not None:
            pooled = pooled + pool.mlp(pool.norm(pooled))
        trunk = self.trunk
        logits = trunk.head_drop(trunk.fc_norm(pooled))
        return Readout(self.project(logits if self.pre_logits else trunk.head(logits)), pooling)


def _check_pooling(trunk: Any) -> None:
    pool = getattr(trunk, "attn_pool", None)
    if pool is None and trunk.global_pool in ("token", "avg"):
        if trunk.global_pool == "avg" and getattr(trunk, "pool_include_prefix", False):
            raise UnsupportedTowerError("image tower averages its prefix tokens too; expected the mean of the patches")
        if trunk.global_pool == "token" and not trunk.num_prefix_tokens:
            raise UnsupportedTowerError("image tower reads its first patch; expected a CLS token, or pooling")
        return
    if isinstance(pool, AttentionPoolLatent) and pool.latent_len == 1:
        return
    kind = f"global_pool = {trunk.global_pool!r}" if pool is None else type(pool).__name__
    raise UnsupportedTowerError(
        f"image tower pools its tokens by {kind}; expected the CLS token ('token'), the mean over the patches ('avg') "
        "or one attention probe ('map')"
    )


@contextmanager
def unfused(attention: Any, keep: Callable[[Tensor], None], switch: str = "fused_attn") -> Iterator[None]:
    """While open, attention computes its weights explicitly and keeps what its dropout hands on.

    Args:
        attention: has the switch, and a module ``attn_drop`` that the weights pass through where it is off.
        keep: is handed the weights ``(B, H, N, N)``, on the path to the output.
        switch: name of the attribute.
    """
    was_fused = getattr(attention, switch)

    def keep_output(_module: nn.Module, _args: Any, output: Tensor) -> None:
        keep(output)

    hook = attention.attn_drop.register_forward_hook(keep_output)
    setattr(attention, switch, False)
    try:
        yield
    finally:
        hook.remove()
        setattr(attention, switch, was_fused)


def split_qkv(model: nn.Module) -> None:
    """Give EVA's attention a linear layer each for queries, keys and values, in place; see `fuse_qkv`.

    It reads the weights of its one layer for the three and never calls it, so that an adapter beside it would be inert.
    timm knows the same attention with three layers (``qkv_fused=False``); this turns the one into the other, exactly.
    """
    for module in model.modules():
        if isinstance(module, EvaAttention) and module.qkv is not None and module.q_bias is not None:
            weights = module.qkv.weight.chunk(3)
            for name, weight, bias in zip("qkv", weights, (module.q_bias, None, module.v_bias), strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
                linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=module.qkv.weight.requires_grad)
                if bias is not None:
                    linear.bias = bias
                setattr(module, f"{name}_proj", linear.train(module.training))
            module.qkv = module.q_bias = module.v_bias = None
            module.was_fused = True


def fuse_qkv(model: nn.Module, state: MutableMapping[str, Tensor]) -> None:
    """Give the state of a model the names and shapes it had before `split_qkv`, in place."""
    for name, module in model.named_modules():
        if isinstance(module, EvaAttention) and getattr(module, "was_fused", False):
            state[f"{name}.qkv.weight"] = torch.cat([state.pop(f"{name}.{part}_proj.weight") for part in "qkv"])
            for part in "qv":
                state[f"{name}.{part}_bias"] = state.pop(f"{name}.{part}_proj.bias")
