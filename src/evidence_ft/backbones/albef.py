"""ALBEF (Li et al. 2021, arXiv 2107.07651): the two towers of its image-text contrast.

The image tower is a vision transformer of timm, the text tower the first half of a BERT of transformers: the layers
before those with cross attention. The other half, the matching head and what only pre-training needs are left out.

Saved models are a folder of their own layout: config.json, the tokenizer, and model.safetensors, whose tensors have the
names of the authors' pre-training file.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from evidence_ft.encoder import CheckpointError, DualEncoder, Role, TowerName, write_weights
from evidence_ft.huggingface import TokenizedEncoder, from_state, load_tokenizer, read_config, snapshot
from evidence_ft.salesforce import (
    HEAD_WIDTH,
    MOMENTUM_AND_QUEUES,
    WeightsFile,
    bert_tokenizer,
    check_state,
    check_vocabulary,
    fusion_start,
    interpolate_positions,
    inverse_temperature,
    read_state,
    shape_of,
    tiny_tokenizer,
    vision_sizes,
    weights_file,
)
from evidence_ft.timm_tower import TimmTower
from evidence_ft.tower import check_tower
from evidence_ft.types import Preprocessing

logger = logging.getLogger(__name__)

UNNEEDED = (
    *MOMENTUM_AND_QUEUES,
    r"itm_head\..+",
    r"text_encoder\.cls\..+",
    r"text_encoder\.(bert\.)?embeddings\.position_ids",
)
"""Patterns for what is left out of a file of the authors, besides the layers of BERT that see the image."""

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_TEXT_LAYERS = {768: 6}  # of the published text encoder, by its width

# What the authors' captions were cleaned of, in training and in evaluation.
_PUNCTUATION = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})

_VISION: Mapping[Role, Sequence[str]] = {
    "q": ["attn.qkv"],
    "k": ["attn.qkv"],
    "v": ["attn.qkv"],
    "out": ["attn.proj"],
    "mlp": ["mlp.fc1", "mlp.fc2"],
}
_TEXT: Mapping[Role, Sequence[str]] = {
    "q": ["attention.self.query"],
    "k": ["attention.self.key"],
    "v": ["attention.self.value"],
    "out": ["attention.output.dense"],
    "mlp": ["intermediate.dense", "output.dense"],
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of the two towers; what is not said here is as published. Images, patches and the grid are square.

    Attributes:
        features: width F of the joint space.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_depth: int
    vision_heads: int
    text_width: int
    text_depth: int
    text_heads: int
    text_hidden: int
    text_positions: int
    text_types: int
    vocabulary: int
    features: int


def load(checkpoint: str) -> DualEncoder:
    """Load the contrastive part of an ALBEF and check that it can be explained.

    Args:
        checkpoint: a file of the authors with the parts for image-text contrast, such as ``ALBEF.pth`` or
            ``mscoco.pth``, with the side of the images as ``<file>@384`` where it is not the one the file was trained
            with; its tokenizer is read from the same folder (tokenizer.json or vocab.txt), or is bert-base-uncased's.
            Or what `AlbefEncoder.save` wrote: ``local-dir:<folder>``, a folder, or ``hf-hub:<owner>/<name>``.

    Raises:
        CheckpointError: unknown name, missing or damaged files, parts that do not fit each other.
        UnsupportedTowerError: the image tower cannot be explained.
    """
    file = weights_file(checkpoint)
    encoder = _from_folder(checkpoint) if file is None else _from_published(checkpoint, file)
    encoder.eval()
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    return encoder


def tiny(directory: Path) -> str:
    """Write a tiny random model as the authors' files are made, and return the checkpoint that `load` takes.

    Heads are 64 wide, which such files do not say: two in the image tower and one in the text tower.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.ones(shape)
        if re.search(r"(norm\d?|LayerNorm)\.weight$", name)
        else 0.05 * torch.randn(shape, generator=generator)
        for name, shape in _tiny_shapes(len(tokenizer)).items()
    }
    for queue in ("image_queue", "text_queue"):
        state[queue] = nn.functional.normalize(state[queue], dim=0)
    state["temp"] = torch.tensor(0.07)
    state["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    for twin in ("text_encoder", "text_encoder_m"):
        state[f"{twin}.bert.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save({"model": state}, directory / "ALBEF.pth")
    return str(directory / "ALBEF.pth")


def _tiny_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of floating point numbers in a small pre-training file, momentum copies and queues included."""
    image, text, features, patch, grid = 128, 64, 10, 8, 3

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def attention(name: str, seen: int) -> dict[str, tuple[int, ...]]:
        return {
            **linear(f"{name}.self.query", text, text),
            **linear(f"{name}.self.key", seen, text),
            **linear(f"{name}.self.value", seen, text),
            **linear(f"{name}.output.dense", text, text),
            **norm(f"{name}.output.LayerNorm", text),
        }

    shapes: dict[str, tuple[int, ...]] = {"temp": (), "image_queue": (features, 6), "text_queue": (features, 6)}
    for twin in ("", "_m"):
        visual, words, head = f"visual_encoder{twin}", f"text_encoder{twin}.bert", f"text_encoder{twin}.cls.predictions"
        shapes |= {
            f"{visual}.cls_token": (1, 1, image),
            f"{visual}.pos_embed": (1, 1 + grid * grid, image),
            f"{visual}.patch_embed.proj.weight": (image, 3, patch, patch),
            f"{visual}.patch_embed.proj.bias": (image,),
            **norm(f"{visual}.norm", image),
            f"{words}.embeddings.word_embeddings.weight": (vocabulary, text),
            f"{words}.embeddings.position_embeddings.weight": (24, text),
            f"{words}.embeddings.token_type_embeddings.weight": (2, text),
            **norm(f"{words}.embeddings.LayerNorm", text),
            f"{head}.bias": (vocabulary,),
            **linear(f"{head}.transform.dense", text, text),
            **norm(f"{head}.transform.LayerNorm", text),
            **linear(f"{head}.decoder", text, vocabulary),
            **linear(f"vision_proj{twin}", image, features),
            **linear(f"text_proj{twin}", text, features),
        }
        for block in (f"{visual}.blocks.{index}" for index in range(3)):
            shapes |= norm(f"{block}.norm1", image) | norm(f"{block}.norm2", image)
            shapes |= linear(f"{block}.attn.qkv", image, 3 * image) | linear(f"{block}.attn.proj", image, image)
            shapes |= linear(f"{block}.mlp.fc1", image, 4 * image) | linear(f"{block}.mlp.fc2", 4 * image, image)
        for index in range(4):
            layer = f"{words}.encoder.layer.{index}"
            shapes |= attention(f"{layer}.attention", text)
            shapes |= linear(f"{layer}.intermediate.dense", text, 96) | linear(f"{layer}.output.dense", 96, text)
            shapes |= norm(f"{layer}.output.LayerNorm", text)
            if index >= 2:
                shapes |= attention(f"{layer}.crossattention", image)
    return shapes | linear("itm_head", text, 2)


def _from_published(checkpoint: str, file: WeightsFile) -> "AlbefEncoder":
    architecture, state = _translated(file.path, read_state(file.path, UNNEEDED), file.image_size)
    tokenizer = bert_tokenizer(file.path.parent)
    return AlbefEncoder(_model(file.path, state, architecture), architecture, tokenizer, checkpoint)


def _translated(
    path: Path, state: Mapping[str, Tensor], image_size: int | None
) -> tuple[Architecture, dict[str, Tensor]]:
    """What a file of the authors holds, `UNNEEDED` left out: its sizes, and its tensors without the fusion layers.

    Raises:
        CheckpointError: what says the sizes is missing.
    """
    # The pre-training file has BERT inside a masked language model, those fine-tuned for retrieval have it bare.
    state = {re.sub(r"^text_encoder\.(?!bert\.)", "text_encoder.bert.", name): state[name] for name in state}
    architecture = _architecture(path, state, image_size)
    layers = (re.match(r"text_encoder\.bert\.encoder\.layer\.(\d+)\.", name) for name in state)
    fusion = {match.string for match in layers if match and int(match[1]) >= architecture.text_depth}
    if fusion:
        logger.info("%s: %d tensors of fusion layers are left out: %s", path, len(fusion), ", ".join(sorted(fusion)))
    kept = {name: tensor for name, tensor in state.items() if name not in fusion}
    positions = "visual_encoder.pos_embed"
    kept[positions] = interpolate_positions(kept[positions], architecture.image_size // architecture.patch_size)
    return architecture, kept


def _architecture(path: Path, state: Mapping[str, Tensor], image_size: int | None) -> Architecture:
    vision = vision_sizes(path, state, image_size)
    bert = "text_encoder.bert"
    text_depth = fusion_start(state, f"{bert}.encoder.layer")
    if not text_depth and f"{bert}.embeddings.token_type_embeddings.weight" not in state:
        raise CheckpointError(f"{path} looks like a file of BLIP, not of ALBEF; load it by backbone 'hf_blip'")
    vocabulary, text_width = shape_of(path, state, f"{bert}.embeddings.word_embeddings.weight")
    return Architecture(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision_width=vision.width,
        vision_depth=vision.depth,
        vision_heads=vision.width // HEAD_WIDTH,
        text_width=text_width,
        text_depth=_TEXT_LAYERS.get(text_width, text_depth),
        text_heads=text_width // HEAD_WIDTH,
        text_hidden=shape_of(path, state, f"{bert}.encoder.layer.0.intermediate.dense.weight")[0],
        text_positions=shape_of(path, state, f"{bert}.embeddings.position_embeddings.weight")[0],
        text_types=shape_of(path, state, f"{bert}.embeddings.token_type_embeddings.weight")[0],
        vocabulary=vocabulary,
        features=shape_of(path, state, "vision_proj.weight")[0],
    )


def _from_folder(checkpoint: str) -> "AlbefEncoder":
    folder = Path(checkpoint.removeprefix("local-dir:")).expanduser()
    if checkpoint.startswith("hf-hub:"):
        folder = snapshot(checkpoint, "ALBEF")
    elif not folder.is_dir():
        raise CheckpointError(
            f"no file or folder {str(folder)!r}; expected a file of ALBEF's authors such as 'ALBEF.pth', or "
            f"'local-dir:<folder>' or 'hf-hub:<owner>/<name>' with {_CONFIG}, {_WEIGHTS} and a tokenizer"
        )
    config = read_config(folder, ["albef"])
    sizes = {field.name: config.get(field.name) for field in fields(Architecture)}
    wrong = [name for name, size in sizes.items() if not isinstance(size, int) or size < 1]
    if wrong:
        raise CheckpointError(f"{folder / _CONFIG} has no positive whole number for {', '.join(wrong)}; copy it again")
    architecture = Architecture(**sizes)  # type: ignore[arg-type]  # whole numbers, as was just checked
    tokenizer = load_tokenizer(folder)
    model = _model(folder / _WEIGHTS, read_state(folder / _WEIGHTS), architecture)
    return AlbefEncoder(model, architecture, tokenizer, checkpoint)


def _bert_config(architecture: Architecture) -> Any:
    return BertConfig(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.text_width,
        num_hidden_layers=architecture.text_depth,
        num_attention_heads=architecture.text_heads,
        intermediate_size=architecture.text_hidden,
        max_position_embeddings=architecture.text_positions,
        type_vocab_size=architecture.text_types,
    )


def _model(source: Path, state: Mapping[str, Tensor], architecture: Architecture) -> "Albef":
    """The model with its weights, which are checked first.

    Raises:
        CheckpointError: the weights do not fit.
    """
    config = _bert_config(architecture)
    with torch.device("meta"):  # draws no numbers, and takes no memory twice
        model = Albef(architecture, BertModel(config, add_pooling_layer=False))
    check_state(source, state, {_published(name): tensor.shape for name, tensor in model.state_dict().items()})
    renamed = {
        name: state[_published(name)].to(torch.float32, copy=True)  # not mapped from a file any more
        for name in model.state_dict()
        if name != "logit_scale"
    }
    renamed["logit_scale"] = torch.tensor(inverse_temperature(source, state["temp"]))
    # Not by assignment as the rest: BERT has constants that are in no file.
    prefix = "text_encoder."
    text = {name.removeprefix(prefix): tensor for name, tensor in renamed.items() if name.startswith(prefix)}
    model.load_state_dict(renamed, assign=True)
    model.text_encoder = from_state(BertModel, config, text, add_pooling_layer=False)
    return model


def _published(name: str) -> str:
    """What a tensor of `Albef` is called in the authors' pre-training file."""
    return "temp" if name == "logit_scale" else re.sub(r"^text_encoder\.", "text_encoder.bert.", name)


class Albef(nn.Module):
    """The parts of ALBEF that image-text contrast needs.

    Args:
        architecture: of both towers.
        text_encoder: ``transformers.BertModel`` of the layers without cross attention.
    """

    def __init__(self, architecture: Architecture, text_encoder: nn.Module) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(
            img_size=architecture.image_size,
            patch_size=architecture.patch_size,
            embed_dim=architecture.vision_width,
            depth=architecture.vision_depth,
            num_heads=architecture.vision_heads,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.text_encoder = text_encoder
        self.vision_proj = nn.Linear(architecture.vision_width, architecture.features)
        self.text_proj = nn.Linear(architecture.text_width, architecture.features)
        self.logit_scale = nn.Parameter(torch.zeros(()))


class AlbefEncoder(TokenizedEncoder):
    """ALBEF's towers behind our protocol.

    Args:
        model: both towers, their projections and the logit scale.
        architecture: of the model, written beside saved weights.
        tokenizer: of transformers.
        checkpoint: the name it was loaded by.

    Raises:
        CheckpointError: the tokenizer has more or fewer tokens than are embedded.
    """

    backbone = "albef"
    model: Albef

    def __init__(self, model: Albef, architecture: Architecture, tokenizer: Any, checkpoint: str) -> None:
        super().__init__()
        check_vocabulary(Path(checkpoint), tokenizer, architecture.vocabulary)
        self.model = model
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.max_length = architecture.text_positions
        size = (architecture.image_size, architecture.image_size)
        self.preprocessing = Preprocessing(size, _MEAN, _STD, interpolation="bicubic", resize_mode="squash")
        self.image_tower = TimmTower(model.visual_encoder, model.vision_proj)

    @property
    def logit_scale(self) -> nn.Parameter:  # type: ignore[override]  # a view: the parameter stays the model's
        """``()``, logarithm of the inverse temperature."""
        return self.model.logit_scale

    def normalize_text(self, text: str) -> str:
        """Lower case without punctuation, as all the captions were that the model has read."""
        return " ".join(text.lower().translate(_PUNCTUATION).replace("<person>", "person").split())

    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        encoded = self.model.text_encoder(input_ids=tokens, attention_mask=mask)
        features: Tensor = self.model.text_proj(encoded.last_hidden_state[:, 0])
        return features

    def token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.text_encoder.get_submodule("embeddings.word_embeddings")  # type: ignore[assignment]
        return embedding

    def split_attention(self) -> None:
        pass  # one linear layer for queries, keys and values is adapted as it is

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        blocks, depth, layers = (
            ("visual_encoder.blocks", self.architecture.vision_depth, _VISION)
            if tower == "vision"
            else ("text_encoder.encoder.layer", self.architecture.text_depth, _TEXT)
        )
        return {
            role: [f"{blocks}.{block}.{name}" for block in range(depth) for name in names]
            for role, names in layers.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """The state of the two towers under the names of the authors' pre-training file, their temperature included."""
        state = dict(self.model.state_dict()) if self.adapter is None else self.adapter.merged()
        # In double precision, so that its logarithm comes back to the bit.
        state["logit_scale"] = state["logit_scale"].detach().cpu().double().neg().exp()
        return {_published(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        config = {"model_type": "albef", **asdict(self.architecture)}
        (directory / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        write_weights(directory / _WEIGHTS, self.weights())
