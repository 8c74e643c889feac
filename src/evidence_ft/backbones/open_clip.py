"""Models of open_clip: native ``VisionTransformer`` towers, and timm vision transformers as trunks.

Models go in and come out unchanged: attention is made explicit for the length of one trace, on the blocks that are
traced, by standing in for one method (native) or by timm's own switch. The weights that ``nn.MultiheadAttention``
returns are no substitute: they are not on the path to its output, and have no gradient.

Low-rank adapters need linear layers to adapt, where ``nn.MultiheadAttention`` has one fused matrix. PEFT's own wrapper
for it merges and unmerges the adapter at each forward pass, and rounding moves the frozen weights a little every time;
`OpenClipEncoder.split_attention` splits the matrix instead, which is exact, and fuses it again in what is saved.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from evidence_ft.encoder import CheckpointError, DualEncoder, Role, TowerName
from evidence_ft.timm_tower import TimmTower
from evidence_ft.tower import ImageTower, UnsupportedTowerError, check_tower, read_cls, read_mean
from evidence_ft.types import Preprocessing, Readout

EMBEDDED = ("toy_clip",)
"""Checkpoints that come with the package."""

_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

_PLACEHOLDER = "a"
"""A word of one token in every vocabulary, where the embeddings of a context will stand."""

_NAMES: Mapping[Role, str] = {
    "q": r".*(attn\.(q_proj|qkv)|attention\.self\.query|SelfAttention\.q)",
    "k": r".*(attn\.(k_proj|qkv)|attention\.self\.key|SelfAttention\.k)",
    "v": r".*(attn\.(v_proj|qkv)|attention\.self\.value|SelfAttention\.v)",
    "out": r".*(attn\.(out_proj|proj)|attention\.output\.dense|SelfAttention\.o)",
    "mlp": (
        r".*(mlp\.(c_fc|c_proj)|(mlp|layers\.\d+)\.fc[12]|DenseReluDense\.w[io](_\d)?"
        r"|(intermediate|(?<!attention\.)output)\.dense)"
    ),
}
"""What linear layers are called in open_clip and timm, and in text towers like BERT, M2M-100 and T5."""


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
    """A CLIP of open_clip behind our protocol, its text tower open_clip's own or one of transformers.

    Args:
        model: ``open_clip.CLIP`` or ``CustomTextCLIP``; kept as it is.
        tokenizer: texts to token ids.
        config: open_clip's configuration of the model (``model_cfg``), written beside saved weights.
        checkpoint: the name it was loaded by.
    """

    backbone = "open_clip"
    model: Any

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

    @property
    def text_width(self) -> int:
        return int(self._token_embedding().embedding_dim)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts)).to(self.logit_scale.device)
        features: Tensor = self.model.encode_text(tokens)
        return features

    def encode_with_context(self, names: Sequence[str], context: Tensor) -> Tensor:
        length = context.shape[-2] if context.ndim > 1 else 0
        if context.shape not in ((length, self.text_width), (len(names), length, self.text_width)):
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected (L, {self.text_width}) or "
                f"({len(names)}, L, {self.text_width}) for {len(names)} names"
            )
        tokens, start, _ = self._tokenize([_PLACEHOLDER + " "] * length, names)

        def put_context(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
            words = context.to(embedded).expand(len(names), -1, -1)
            return torch.cat((embedded[:, :start], words, embedded[:, start + length :]), dim=1)

        hook = self._token_embedding().register_forward_hook(put_context)
        try:
            features: Tensor = self.model.encode_text(tokens)
        finally:
            hook.remove()
        return features

    def embed_words(self, text: str) -> Tensor:
        tokens, start, (length,) = self._tokenize([], [text])
        with torch.no_grad():  # called, not indexed: some scale what they look up
            words: Tensor = self._token_embedding()(tokens[0, start : start + length])
        return words

    def _tokenize(self, before: Sequence[str], texts: Sequence[str]) -> tuple[Tensor, int, list[int]]:
        """Token ids ``(T, C)`` of texts, how many come before the first word, and how many each text's words take."""
        blank, word = self.tokenizer(["", _PLACEHOLDER])
        padding = blank[-2]  # the last one may be an end token that stands behind the padding
        prompts = ["".join((*before, text)) for text in texts]
        tokens = self.tokenizer(prompts)
        with_room = self.tokenizer(prompts, context_length=tokens.shape[1] + 1)
        unused = (tokens == padding).sum(dim=1)
        for text, cut in zip(texts, (with_room == padding).sum(dim=1) == unused, strict=True):
            if cut:
                behind = f" behind a context of {len(before)} tokens" if before else ""
                raise ValueError(
                    f"{text!r}{behind} is longer than the {tokens.shape[1]} tokens the text tower takes; shorten it"
                )
        words = (blank == padding).sum() - unused
        return tokens.to(self.logit_scale.device), int(blank[0] == word[0]), words.tolist()

    def _token_embedding(self) -> nn.Embedding:
        text = self.model if isinstance(self.model, open_clip.CLIP) else self.model.text
        embedding: nn.Embedding = (
            text.transformer.get_input_embeddings() if isinstance(text, HFTextEncoder) else text.token_embedding
        )
        return embedding

    def split_attention(self) -> None:
        for name, block in list(self.model.named_modules()):
            if isinstance(block, ResidualAttentionBlock) and isinstance(block.attn, nn.MultiheadAttention):
                if not _is_plain(block.attn):
                    raise ValueError(f"attention of {name} cannot be split: expected a plain one, found {block.attn}")
                block.attn = SplitAttention(block.attn)

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        found: dict[Role, list[str]] = {role: [] for role in _NAMES}
        for full_name, module in self.model.named_modules():
            name = full_name.removesuffix(".base_layer")  # where an adapter is in place already
            if not isinstance(module, nn.Linear) or name.startswith("visual.") != (tower == "vision"):
                continue
            parent, _, own_name = name.rpartition(".")
            if own_name == "qkv" and "q_bias" in self.model.get_submodule(parent)._parameters:
                continue  # timm's BEiT and EVA read this layer's weights and never call it: an adapter would be inert
            for role, pattern in _NAMES.items():
                if re.fullmatch(pattern, name):
                    found[role].append(name)
        return found

    def weights(self) -> dict[str, Tensor]:
        state = dict(self.model.state_dict()) if self.adapter is None else self.adapter.merged()
        for name, module in self.model.named_modules():
            if isinstance(module, SplitAttention):
                for kind in ("weight", "bias"):
                    parts = [f"{name}.{part}_proj.{kind}" for part in "qkv"]
                    if parts[0] in state:
                        state[f"{name}.in_proj_{kind}"] = torch.cat([state.pop(part) for part in parts])
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(self.tokenizer, HFTokenizer | SigLipTokenizer):
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
        temporary = directory / f"{_WEIGHTS}.tmp"
        save_file(self.weights(), temporary)
        temporary.chmod(0o644)  # safetensors leaves it to its owner alone, unlike the files beside it
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
    if isinstance(visual, TimmModel):
        return TimmTower(visual.trunk, visual.head)
    raise UnsupportedTowerError(
        f"image tower {type(visual).__name__} is not supported; expected a vision transformer, native to open_clip or "
        "from timm"
    )


def _is_plain(attention: object) -> bool:
    """Whether attention is open_clip's usual one: one fused matrix for q, k and v, and nothing besides."""
    return (
        isinstance(attention, nn.MultiheadAttention)
        and attention.in_proj_weight is not None
        and attention.batch_first
        and not attention.dropout
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


class SplitAttention(nn.Module):
    """``nn.MultiheadAttention`` with a linear layer each for queries, keys and values, which PEFT can adapt.

    Computes the same, and is called the same, but returns no attention weights.

    Args:
        fused: what it takes the place of; its weights are copied.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = fused.num_heads
        self.head_dim = fused.head_dim
        weights = fused.in_proj_weight.chunk(3)
        biases = (None, None, None) if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        trained = fused.in_proj_weight.requires_grad
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, trained=trained) for weight, bias in zip(weights, biases, strict=True)
        )
        # PEFT adapts plain linear layers; torch's own class here is a subclass that says it is not to be quantized.
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias, trained=fused.out_proj.weight.requires_grad)
        self.train(fused.training)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head: ``(B, N, W)`` each to ``(B, H, N, W / H)``."""
        q, k, v = (
            rearrange(project(tokens), "b n (h d) -> b h n d", h=self.num_heads)
            for project, tokens in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return q, k, v

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        q, k, v = self.project(query, key, value)
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = rearrange(attn_mask, "(b h) n m -> b h n m", h=self.num_heads)
            if attn_mask.dtype == torch.bool:
                attn_mask = ~attn_mask  # true means hidden to nn.MultiheadAttention, and seen to this function
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(rearrange(mixed, "b h n d -> b n (h d)")), None


def _linear(weight: Tensor, bias: Tensor | None, *, trained: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")  # draws no numbers
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return linear


class NativeImageTower(ImageTower):
    """``open_clip.transformer.VisionTransformer``; reads the CLS token, or the mean over the patches."""

    num_prefix_tokens = 1

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise UnsupportedTowerError(
                "image tower pools its tokens by open_clip's AttentionalPooler (CoCa); expected one that reads the CLS "
                "token or the mean over the patches, or a timm trunk that pools by attention (SigLIP)"
            )
        if not isinstance(visual.patch_dropout, nn.Identity):
            raise UnsupportedTowerError("patch dropout leaves holes in the heatmap; load the model without it")
        self.visual = visual
        self.grid = tuple(visual.grid_size)
        for block in self.blocks():
            if not isinstance(block.attn, SplitAttention) and not _is_plain(block.attn):
                raise UnsupportedTowerError(
                    f"attention {block.attn} is not supported; expected open_clip's plain nn.MultiheadAttention"
                )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features

    def read(self, tokens: Tensor) -> Readout:
        pooled, _ = self.visual._pool(tokens)
        features = pooled if self.visual.proj is None else pooled @ self.visual.proj
        averages = self.visual.pool_type == "avg"
        return Readout(features, read_mean(tokens, self.num_prefix_tokens) if averages else read_cls(tokens))

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.visual.transformer.resblocks)

    def recomputes(self) -> bool:
        return bool(self.visual.transformer.grad_checkpointing)

    @contextmanager
    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> Iterator[None]:
        attention = block.attn

        def forward(query: Tensor, key: Tensor, value: Tensor, **_options: Any) -> tuple[Tensor, None]:
            if isinstance(attention, SplitAttention):
                q, k, v = attention.project(query, key, value)
            else:
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
