"""Tiny vision transformers of timm, under names that open_clip's configurations can give."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import _registry
from torch import nn

from evidence_ft.backbones import open_clip as backbone

IMAGE_SIZE = (16, 32)
SIZES = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
_VIT = {**SIZES, "dynamic_img_size": False}
_EVA = {**SIZES, "mlp_ratio": 2.0, "use_rot_pos_emb": True}
_EVA02 = {**_EVA, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}

TRUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny_timm": ("test_vit", _VIT),
    "tiny_timm_no_prefix": ("test_vit", _VIT | {"class_token": False}),
    "tiny_timm_registers": ("test_vit", _VIT | {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1}),
    "tiny_timm_pooling_prefix": ("test_vit", _VIT | {"reg_tokens": 2, "pool_include_prefix": True}),
    "tiny_timm_eva": ("eva_giant_patch14_clip_224", _EVA),
    "tiny_timm_eva02": ("eva02_base_patch14_448", _EVA02),
    "tiny_timm_patch_dropout": ("test_vit", _VIT | {"patch_drop_rate": 0.5}),
    "tiny_timm_any_size": ("test_vit", _VIT | {"dynamic_img_size": True}),
}
"""Names, and the model of timm that each is, made small."""


def _build(name: str, **options: Any) -> nn.Module:
    options = {key: value for key, value in options.items() if key != "pretrained" and not key.endswith("_cfg")}
    options = {key: value for key, value in options.items() if key not in ("pretrained_cfg_overlay", "cache_dir")}
    base, sizes = TRUNKS[name]
    return timm.create_model(base, **sizes | options)


for _name in TRUNKS:
    _registry._model_entrypoints[_name] = partial(_build, _name)


def save(directory: Path, vision: dict[str, Any], **config: Any) -> tuple[str, str]:
    """A random model of open_clip with this image tower, its text tower that of `tiny`: backbone and checkpoint."""
    checkpoint = backbone.tiny(directory)
    path = directory / "open_clip_config.json"
    written = json.loads(path.read_text())
    written["model_cfg"] |= {"vision_cfg": {"image_size": IMAGE_SIZE} | vision} | config
    path.write_text(json.dumps(written))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**written["model_cfg"])
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, _weights(directory))
    return "open_clip", checkpoint


def _weights(directory: Path) -> Path:
    return directory / "open_clip_model.safetensors"


def trunk(name: str, pool: str) -> Callable[[Path], tuple[str, str]]:
    """A saved model whose image tower is one of `TRUNKS`, as open_clip's own configurations have them."""
    proj = "none" if pool == "map" else "linear"
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
    return partial(save, vision=vision, embed_dim=24 if pool == "map" else 10)
