"""Models of open_clip: native ``VisionTransformer`` towers, and timm vision transformers as trunks.

Models go in and come out unchanged: attention is made explicit for the length of one trace, on the blocks that are
traced, by standing in for one method (``nn.MultiheadAttention``, which open_clip 3 builds on) or by the library's own
switch (open_clip 4, timm). The weights that ``nn.MultiheadAttention`` returns are no substitute: they are not on the
path to its output, and have no gradient.

Low-rank adapters need linear layers to adapt, where ``nn.MultiheadAttention`` has one fused matrix. PEFT's own wrapper
for it merges and unmerges the adapter at each forward pass, and rounding moves the frozen weights a little every time;
`OpenClipEncoder.split_attention` splits the matrix instead, which is exact, and fuses it again in what is saved.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from evidence_ft.encoder import (
    CheckpointError,
    DualEncoder,
    Role,
    TowerName,
    context_in_place,
    context_length,
    unreachable,
    write_weights,
)
from evidence_ft.timm_tower import TimmTower, fuse_qkv, split_qkv, unfused
from evidence_ft.tower import ImageTower, UnsupportedTowerError, check_tower, read_cls, read_mean
from evidence_ft.types import Preprocessing, Readout

EMBEDDED = ("toy_clip",)
"""Checkpoints that come with the package."""

_log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

_PLACEHOLDER = "a"
"""A word of one token in every vocabulary, where the embeddings of a context will stand."""

_NAMES: Mapping[Role, str] = {
    "q": r".*(attn\.(q_proj|qkv)|attention\.self\.query|SelfAttention\.q)",
    "k": r".*(attn\.(k_proj|qkv)|attention\.self\.key|SelfAttention\.k)",
    "v": r".*(attn\.(v_proj|qkv)|attention\.self\.value|SelfAttention\.v)",
    "out": r".*(attn\.(out_proj|proj)|attention\.output\.dense|SelfAttention\.o)",
    "mlp": (
        r".*(mlp\.(c_fc|c_proj)|(mlp|layers\.\d+)\.(fc[12]|fc1_[gx])|DenseReluDense\.w[io](_\d)?"
        r"|(intermediate|(?<!attention\.)output)\.dense)"
    ),
}
"""What linear layers are called in open_clip and timm, and in text towers like BERT, M2M-100 and T5."""


def load(checkpoint: str) -> DualEncoder:
    """Load an image-text model and check that it can be explained.

    Args:
        checkpoint: ``toy_clip`` (comes with the package), ``hf-hub:<owner>/<name>``, ``local-dir:<folder>`` or a
            folder in open_clip's layout, or a built-in architecture with a tag or a weights file:
            ``ViT-B-16/openai``, ``ViT-B-16/weights/my.safetensors``. A tag whose weights want QuickGELU gets it.

    Raises:
        CheckpointError: unknown name, missing or damaged files, weights of another activation, resolution or context
            length.
        UnsupportedTowerError: the image tower cannot be explained.
    """
    with _quiet():
        name, pretrained, config = _resolve(checkpoint)
    if pretrained and not checkpoint.startswith(f"{name}/"):
        _log.info("%s: its weights were trained with QuickGELU, which %s computes", checkpoint, name)
    try:
        with _quiet():
            _check_positions(_shapes(_weights_file(name, pretrained)), config["model_cfg"], checkpoint)
            model = open_clip.create_model(name, pretrained=pretrained, weights_only=True, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, TypeError, OSError, SafetensorError, UnpicklingError, KeyError) as error:
        raise CheckpointError(f"could not load {checkpoint!r}: {error}") from error
    encoder = OpenClipEncoder(model, tokenizer, config, checkpoint).eval()
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    return encoder


def tiny(directory: Path) -> str:
    """Write a CLIP with random weights of a few kilobytes, and return the name that `load` takes."""
    tokenizer = _tiny_tokenizer()
    config: dict[str, Any] = {
        "embed_dim": 10,
        "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "width": 24, "head_width": 8, "layers": 2},
        "text_cfg": {"context_length": 64, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 1}
        | {"hf_tokenizer_name": "tiny"},  # any name has it read from the folder
    }
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = open_clip.CLIP(**config)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": (16, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    OpenClipEncoder(model, None, {"model_cfg": config}, "tiny").save(directory)
    return f"local-dir:{directory}"


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Letter by letter; the end token has the highest number, by which CLIP's text tower finds it."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<pad>", "<start>", "<unknown>", *letters, *(f"##{letter}" for letter in letters), "<end>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    special = [(word, vocabulary[word]) for word in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unknown>")


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
            raise unreachable(checkpoint, error) from error
    if checkpoint.startswith("local-dir:"):
        folder = Path(checkpoint.removeprefix("local-dir:")).expanduser()
        return f"local-dir:{folder}", None, _read_config(folder)
    name, _, pretrained = checkpoint.partition("/")
    if name not in open_clip.list_models():
        near = get_close_matches(name, [*EMBEDDED, *open_clip.list_models()], n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise CheckpointError(
            f"no model {checkpoint!r}: {hint}expected {', '.join(EMBEDDED)}, 'hf-hub:<owner>/<name>', "
            "'local-dir:<folder>', or a built-in architecture with a tag or file such as 'ViT-B-16/openai'"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).expanduser().is_file():
        raise CheckpointError(
            f"no weights {pretrained!r} for {name}: neither a file nor one of its tags: {', '.join(tags) or 'none'}"
        )
    if pretrained in tags:
        name = _with_activation(name, pretrained)
    else:
        pretrained = str(Path(pretrained).expanduser())
    return name, pretrained, {"model_cfg": open_clip.get_model_config(name)}


def _with_activation(name: str, tag: str) -> str:
    """The architecture that computes the activation of a tag's weights.

    With the wrong one the weights load, and every feature is slightly off; open_clip only warns.
    """
    of_model = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    of_weights = bool(open_clip.pretrained.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    if of_model == of_weights:
        return name
    if of_weights and f"{name}-quickgelu" in open_clip.list_models():
        return f"{name}-quickgelu"
    kinds = {True: "QuickGELU", False: "GELU"}
    raise CheckpointError(
        f"weights {tag!r} were trained with {kinds[of_weights]}, but {name} computes {kinds[of_model]}, and open_clip "
        f"has no {name} that computes the other; choose other weights: "
        f"{', '.join(open_clip.list_pretrained_tags_by_model(name))}"
    )


def _weights_file(name: str, pretrained: str | None) -> Path:
    """What `open_clip.create_model` reads; downloaded where it is not here yet."""
    if pretrained is None:
        where, _, identifier = name.partition(":")
        if where == "local-dir":
            return Path(open_clip.factory._find_checkpoint_in_dir(Path(identifier)))
        return Path(open_clip.factory.download_pretrained_from_hf(identifier))
    tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    return Path(open_clip.pretrained.download_pretrained(tag) if tag else pretrained)


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    if weights.suffix in (".npz", ".npy"):  # SigLIP's first release; their names are not open_clip's
        return {}
    state = open_clip.factory.load_state_dict(str(weights), weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_positions(shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, Any], checkpoint: str) -> None:
    """Positions of another number than the weights were trained with, open_clip interpolates without a word."""
    expected: dict[str, tuple[int, str]] = {}
    if "timm_model_name" not in model["vision_cfg"]:
        vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
        (height, width), (of_patch, across) = _pair(vision.image_size), _pair(vision.patch_size)
        expected["visual.positional_embedding"] = height // of_patch * (width // across) + 1, "image_size"
    if "hf_model_name" not in model["text_cfg"]:
        text = open_clip.CLIPTextCfg(**model["text_cfg"])
        for name in ("positional_embedding", "text.positional_embedding"):
            expected[name] = text.context_length + text.embed_cls, "context_length"
    for name, (positions, setting) in expected.items():
        if name in shapes and shapes[name][0] != positions:
            raise CheckpointError(
                f"weights of {checkpoint!r} have {shapes[name][0]} positions in {name}, but the architecture has "
                f"{positions}; set {setting} to what they were trained with, or name an architecture that has it"
            )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


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
    def logit_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """``()`` of models trained by the sigmoid loss (SigLIP)."""
        parameter: nn.Parameter | None = self.model.logit_bias
        return parameter

    @property
    def text_width(self) -> int:
        return int(self._token_embedding().embedding_dim)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts)).to(self.logit_scale.device)
        features: Tensor = self.model.encode_text(tokens)
        return features

    def encode_with_context(self, names: Sequence[str], context: Tensor) -> Tensor:
        length = context_length(context, len(names), self.text_width)
        tokens, start, _ = self._tokenize([_PLACEHOLDER + " "] * length, names)
        with context_in_place(self._token_embedding(), start, context):
            features: Tensor = self.model.encode_text(tokens)
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
            if isinstance(block, ResidualAttentionBlock) and not isinstance(block.attn, SplitAttention):
                if not _is_plain(block.attn):
                    raise ValueError(f"attention of {name} cannot be split: expected a plain one, found {block.attn}")
                torchs = isinstance(block.attn, nn.MultiheadAttention)
                block.attn = SplitAttention(block.attn) if torchs else SplitAttentionOfOpenClip4(block.attn)
        split_qkv(self.model)

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        found: dict[Role, list[str]] = {role: [] for role in _NAMES}
        for full_name, module in self.model.named_modules():
            name = full_name.removesuffix(".base_layer")  # where an adapter is in place already
            if not isinstance(module, nn.Linear) or name.startswith("visual.") != (tower == "vision"):
                continue
            parent, _, own_name = name.rpartition(".")
            if own_name == "qkv" and "q_bias" in self.model.get_submodule(parent)._parameters:
                continue  # timm's BEiT reads this layer's weights and never calls it: an adapter would be inert
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
        fuse_qkv(self.model, state)
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
        write_weights(directory / _WEIGHTS, self.weights())


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
        tower = TimmTower(visual.trunk, visual.head)
        if (of_trunk := tuple(visual.trunk.patch_embed.img_size)) != tuple(visual.image_size):
            raise UnsupportedTowerError(
                f"image_size is {visual.image_size} in open_clip's configuration and {of_trunk} in its timm model, "
                "whose positions would be interpolated; set it to the latter"
            )
        return tower
    raise UnsupportedTowerError(
        f"image tower {type(visual).__name__} is not supported; expected a vision transformer, native to open_clip or "
        "from timm"
    )


def _is_plain(attention: Any) -> bool:
    """Whether attention is open_clip's usual one: one fused matrix for q, k and v, and nothing besides."""
    if isinstance(attention, nn.MultiheadAttention):
        return (
            attention.in_proj_weight is not None
            and attention.batch_first
            and not attention.dropout
            and attention.bias_k is None
            and not attention.add_zero_attn
        )
    return (
        _has_switch(attention)
        and not isinstance(attention, SplitAttention)
        and attention.in_proj_weight is not None
        and attention.logit_scale is None
        and attention.head_scale is None
        and not attention.attn_drop.p
        and not attention.out_drop.p
        and all(isinstance(norm, nn.Identity) for norm in (attention.ln_q, attention.ln_k, attention.ln_inner))
    )


def _has_switch(attention: object) -> bool:
    """Whether attention can be told to be explicit, its weights passing through a module: open_clip 4's own class.

    The class of that name in open_clip 3 has another switch, and fails when it is thrown.
    """
    return hasattr(attention, "use_sdpa") and isinstance(getattr(attention, "attn_drop", None), nn.Module)


class SplitAttention(nn.Module):
    """Attention with a linear layer each for queries, keys and values, which PEFT can adapt.

    Computes what it takes the place of. Is called like ``nn.MultiheadAttention``, but returns no attention weights.

    Args:
        fused: what it takes the place of, `_is_plain`; its weights are copied.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_heads = int(fused.num_heads)
        self.head_dim = int(fused.head_dim)
        self.use_sdpa = True
        weights = fused.in_proj_weight.chunk(3)
        biases = (None, None, None) if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        trained = fused.in_proj_weight.requires_grad
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, trained=trained) for weight, bias in zip(weights, biases, strict=True)
        )
        self.attn_drop = nn.Identity()  # where the weights pass, as in open_clip 4
        # PEFT adapts plain linear layers; torch's own class here is a subclass that says it is not to be quantized.
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias, trained=fused.out_proj.weight.requires_grad)
        self.train(fused.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # true means hidden to nn.MultiheadAttention, and seen to torch's functions
        return self.attend(query, key, value, attn_mask), None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, N, W)`` each to ``(B, N, W)``; the mask is added to the scores, or true where there is attention."""
        q, k, v = (
            rearrange(project(tokens), "b n (h d) -> b h n d", h=self.num_heads)
            for project, tokens in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if mask is not None and mask.ndim == 3:
            mask = rearrange(mask, "(b h) n m -> b h n m", h=self.num_heads)
        if self.use_sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            mixed = self.attn_drop(_attention_weights(q, k, self.head_dim, mask)).to(v) @ v
        features: Tensor = self.out_proj(rearrange(mixed, "b h n d -> b n (h d)"))
        return features


class SplitAttentionOfOpenClip4(SplitAttention):
    """The same, called like open_clip 4's own class."""

    def forward(  # type: ignore[override]  # another caller
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        return self.attend(x, x if k_x is None else k_x, x if v_x is None else v_x, attn_mask)


def _attention_weights(q: Tensor, k: Tensor, head_dim: int, mask: Tensor | None = None) -> Tensor:
    scores = q * head_dim**-0.5 @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights: Tensor = scores.softmax(dim=-1)
    return weights


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
            if not _has_switch(block.attn) and not _is_plain(block.attn):
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

    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        if isinstance(block.attn, nn.MultiheadAttention):
            return _standing_in(block.attn, keep)
        return unfused(block.attn, keep, switch="use_sdpa")


@contextmanager
def _standing_in(attention: Any, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, ``nn.MultiheadAttention`` computes and keeps its weights on the path to its output."""

    def forward(query: Tensor, _key: Tensor, _value: Tensor, **_options: Any) -> tuple[Tensor, None]:
        projected = F.linear(query, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = rearrange(projected, "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)
        weights = _attention_weights(q, k, attention.head_dim)
        keep(weights)
        return attention.out_proj(rearrange(weights.to(v) @ v, "b h n d -> b n (h d)")), None

    attention.forward = forward
    try:
        yield
    finally:
        del attention.forward
