"""Models of open_clip: native ``VisionTransformer`` towers, and timm vision transformers as trunks.

Models go in and come out unchanged: attention is made explicit for the length of one trace, on the blocks that are
traced, by standing in for one method (native) or by timm's own switch. The weights that ``nn.MultiheadAttention``
returns are no substitute: they are not on the path to its output, and have no gradient.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch.nn.functional as F
from einops import rearrange
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from evidence_ft.encoder import CheckpointError, DualEncoder
from evidence_ft.tower import ImageTower, UnsupportedTowerError, check_tower
from evidence_ft.types import Preprocessing

EMBEDDED = ("toy_clip",)
"""Checkpoints that come with the package."""

_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def load(checkpoint: str) -> DualEncoder:
    """Load an image-text model and check that it can be explained.

    Args:
        checkpoint: ``toy_clip`` (comes with the package), ``hf-hub:<owner>/<name>``, ``local-dir:<folder>`` or a
            folder in open_clip's layout, or a built-in architecture with a tag or a weights file:
            ``ViT-B-16-quickgelu/openai``, ``ViT-B-16/weights/my.safetensors``.

    Raises:
        CheckpointError: unknown name, missing or damaged files, activation that does not fit the weights.
        UnsupportedTowerError: the image tower cannot be explained.
    """
    with _quiet():
        name, pretrained, config = _resolve(checkpoint)
    try:
        with _quiet():
            model = open_clip.create_model(name, pretrained=pretrained, weights_only=True, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"could not load {checkpoint!r}: {error}") from error
    encoder = OpenClipEncoder(model, tokenizer, config, checkpoint).eval()
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    return encoder


def _resolve(checkpoint: str) -> tuple[str, str | None, dict[str, Any]]:
    """Name and weights as open_clip takes them, and the model's configuration. Nothing heavy is loaded."""
    if checkpoint in EMBEDDED:
        checkpoint = f"local-dir:{resources.files('evidence_ft') / 'assets' / checkpoint}"
    elif not checkpoint.startswith(("local-dir:", "hf-hub:")) and Path(checkpoint).expanduser().is_dir():
        checkpoint = f"local-dir:{checkpoint}"
    if checkpoint.startswith("hf-hub:"):
        try:
            return checkpoint, None, open_clip.factory._get_hf_config(checkpoint.removeprefix("hf-hub:"))
        except Exception as error:  # whatever the hub client, the network or the file system came up with
            raise CheckpointError(
                f"could not reach {checkpoint!r}: {type(error).__name__}: {error}. Without network, download the "
                "model elsewhere and name its folder as 'local-dir:<folder>'"
            ) from error
    if checkpoint.startswith("local-dir:"):
        folder = Path(checkpoint.removeprefix("local-dir:")).expanduser()
        return f"local-dir:{folder}", None, _read_config(folder)
    name, _, pretrained = checkpoint.partition("/")
    if name not in open_clip.list_models():
        near = get_close_matches(name, [*EMBEDDED, *open_clip.list_models()], n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise CheckpointError(
            f"no model {checkpoint!r}: {hint}expected {', '.join(EMBEDDED)}, 'hf-hub:<owner>/<name>', "
            "'local-dir:<folder>', or a built-in architecture with a tag or file such as 'ViT-B-16-quickgelu/openai'"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).expanduser().is_file():
        raise CheckpointError(
            f"no weights {pretrained!r} for {name}: neither a file nor one of its tags: {', '.join(tags) or 'none'}"
        )
    if pretrained in tags:
        _check_activation(name, pretrained)
    else:
        pretrained = str(Path(pretrained).expanduser())
    return name, pretrained, {"model_cfg": open_clip.get_model_config(name)}


def _check_activation(name: str, tag: str) -> None:
    """With the wrong activation the weights load, and every feature is slightly off; open_clip only warns."""
    of_model = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    of_weights = bool(open_clip.pretrained.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    if of_model != of_weights:
        other = name.removesuffix("-quickgelu") if of_model else f"{name}-quickgelu"
        raise CheckpointError(
            f"weights {tag!r} were trained with {'QuickGELU' if of_weights else 'GELU'}, which {name} does not "
            f"compute; use {other}/{tag}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {_CONFIG}; expected a folder in open_clip's layout ({_CONFIG}, {_WEIGHTS})"
        )
    if open_clip.factory._find_checkpoint_in_dir(folder) is None:
        raise CheckpointError(f"{folder} holds no weights; expected {_WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["model_cfg"], dict):
            raise KeyError("model_cfg")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not open_clip's JSON with a 'model_cfg': {error!r}") from error
    return dict(config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from reporting every step of the loading on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


class OpenClipEncoder(DualEncoder):
    """A CLIP of open_clip behind our protocol.

    Args:
        model: ``open_clip.CLIP`` or ``CustomTextCLIP``; kept as it is.
        tokenizer: texts to token ids.
        config: open_clip's configuration of the model (``model_cfg``), written beside saved weights.
        checkpoint: the name it was loaded by.
    """

    def __init__(self, model: Any, tokenizer: Any, config: dict[str, Any], checkpoint: str) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.checkpoint = checkpoint
        self.preprocessing = _preprocessing(model.visual)
        self.image_tower = _image_tower(model.visual)

    @property
    def logit_scale(self) -> nn.Parameter:  # type: ignore[override]  # a view: the parameter stays the model's
        """``()``, logarithm of the inverse temperature."""
        parameter: nn.Parameter = self.model.logit_scale
        return parameter

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts)).to(self.logit_scale.device)
        features: Tensor = self.model.encode_text(tokens)
        return features

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(directory)
        preprocessing = self.preprocessing
        config = {
            "model_cfg": self.config["model_cfg"],
            "preprocess_cfg": {
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
                "interpolation": preprocessing.interpolation,
                "resize_mode": preprocessing.resize_mode,
            },
        }
        (directory / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        temporary = directory / f"{_WEIGHTS}.tmp"
        save_file(weights, temporary)
        temporary.replace(directory / _WEIGHTS)


def _preprocessing(visual: Any) -> Preprocessing:
    config = open_clip.transform.PreprocessCfg(**visual.preprocess_cfg)
    return Preprocessing(
        size=tuple(config.size) if isinstance(config.size, Sequence) else (config.size, config.size),
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=config.interpolation,
        resize_mode=config.resize_mode,
    )


def _image_tower(visual: Any) -> ImageTower:
    if isinstance(visual, VisionTransformer):
        return NativeImageTower(visual)
    if isinstance(visual, TimmModel) and hasattr(visual.trunk, "patch_embed") and hasattr(visual.trunk, "blocks"):
        return TimmImageTower(visual)
    trunk = type(getattr(visual, "trunk", visual)).__name__
    raise UnsupportedTowerError(
        f"image tower {trunk} is not supported; expected a vision transformer, native to open_clip or from timm"
    )


class NativeImageTower(ImageTower):
    """``open_clip.transformer.VisionTransformer``; reads the CLS token."""

    num_prefix_tokens = 1

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        if visual.attn_pool is not None or visual.pool_type != "tok":
            raise UnsupportedTowerError("image tower pools its patch tokens; only the CLS read-out is supported")
        if not isinstance(visual.patch_dropout, nn.Identity):
            raise UnsupportedTowerError("patch dropout leaves holes in the heatmap; load the model without it")
        self.visual = visual
        self.grid = tuple(visual.grid_size)
        for block in self.blocks():
            attention = block.attn
            if (
                not isinstance(attention, nn.MultiheadAttention)
                or attention.in_proj_weight is None
                or not attention.batch_first
                or attention.dropout
            ):
                raise UnsupportedTowerError(
                    f"attention {attention} is not supported; expected open_clip's plain nn.MultiheadAttention"
                )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.visual.transformer.resblocks)

    def recomputes(self) -> bool:
        return bool(self.visual.transformer.grad_checkpointing)

    @contextmanager
    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> Iterator[None]:
        attention = block.attn

        def forward(query: Tensor, _key: Tensor, _value: Tensor, **_options: Any) -> tuple[Tensor, None]:
            projected = F.linear(query, attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = rearrange(projected, "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)
            weights = (q * attention.head_dim**-0.5 @ k.mT).softmax(dim=-1)
            keep(weights)
            return attention.out_proj(rearrange(weights.to(v) @ v, "b h n d -> b n (h d)")), None

        attention.forward = forward
        try:
            yield
        finally:
            del attention.forward


class TimmImageTower(ImageTower):
    """A timm vision transformer inside open_clip; reads the CLS token."""

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        trunk = visual.trunk
        if getattr(trunk, "global_pool", None) != "token" or getattr(trunk, "attn_pool", None) is not None:
            raise UnsupportedTowerError(
                f"image tower pools by {getattr(trunk, 'global_pool', 'an unknown rule')!r}; only the CLS read-out "
                "('token') is supported"
            )
        self.visual = visual
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.num_prefix_tokens = int(trunk.num_prefix_tokens)
        for block in self.blocks():
            if not hasattr(getattr(block, "attn", None), "attn_drop") or not hasattr(block.attn, "fused_attn"):
                raise UnsupportedTowerError(
                    f"block {type(block).__name__} has no timm attention with 'fused_attn' and 'attn_drop'"
                )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.visual.trunk.blocks)

    def recomputes(self) -> bool:
        return bool(self.visual.trunk.grad_checkpointing)

    @contextmanager
    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> Iterator[None]:
        attention = block.attn
        was_fused = attention.fused_attn

        def keep_output(_module: nn.Module, _args: Any, output: Tensor) -> None:
            keep(output)

        hook = attention.attn_drop.register_forward_hook(keep_output)
        attention.fused_attn = False
        try:
            yield
        finally:
            hook.remove()
            attention.fused_attn = was_fused
