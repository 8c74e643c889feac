"""BLIP of transformers (Li et al. 2022, arXiv 2201.12086): the two towers of its image-text contrast.

The text encoder runs without its cross attention, and is read at its first token. Cross attention and matching head
belong to another branch: no gradient would reach them, which distributed training refuses. They are taken out of the
model, and written back, unchanged, when it is saved.

BLIP was trained on captions without most of their punctuation; transformers leaves that to its users, and so does this
backbone: prompts end better without a full stop.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor

from evidence_ft.encoder import CheckpointError, DualEncoder, Role, TowerName
from evidence_ft.huggingface import (
    TokenizedEncoder,
    as_preprocessing,
    eager_attention,
    from_state,
    load_image_processor,
    load_strictly,
    load_tokenizer,
    read_config,
    save_transformers,
    snapshot,
)
from evidence_ft.salesforce import (
    HEAD_WIDTH,
    MOMENTUM_AND_QUEUES,
    WeightsFile,
    bert_tokenizer,
    check_state,
    check_vocabulary,
    depth,
    interpolate_positions,
    inverse_temperature,
    read_state,
    shape_of,
    tiny_tokenizer,
    vision_sizes,
    weights_file,
)
from evidence_ft.tower import ImageTower, check_tower, read_cls
from evidence_ft.types import Readout

UNNEEDED = (*MOMENTUM_AND_QUEUES, r"text_decoder\..+", r"text_encoder\.embeddings\.position_ids")
"""Patterns for what is left out of a file of the authors: pre-training's own, the captioner, and a constant."""

_PUBLISHED = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
)
"""What parts are called in transformers, and in the authors' files; all others have the same names."""

_TEXT_LAYERS = {768: 12}  # of the published text encoders, by their width

_ROLES: Mapping[TowerName, Mapping[Role, Sequence[str]]] = {
    "vision": {
        "q": ["self_attn.qkv"],
        "k": ["self_attn.qkv"],
        "v": ["self_attn.qkv"],
        "out": ["self_attn.projection"],
        "mlp": ["mlp.fc1", "mlp.fc2"],
    },
    "text": {
        "q": ["attention.self.query"],
        "k": ["attention.self.key"],
        "v": ["attention.self.value"],
        "out": ["attention.output.dense"],
        "mlp": ["intermediate.dense", "output.dense"],
    },
}


def load(checkpoint: str) -> DualEncoder:
    """Load the contrastive part of a BLIP and check that it can be explained.

    Args:
        checkpoint: ``hf-hub:<owner>/<name>``, ``local-dir:<folder>`` or a folder, in the layout of
            ``transformers.BlipForImageTextRetrieval``; or a file of the authors with the parts for image-text
            contrast, such as ``model_base.pth`` or ``model_base_retrieval_coco.pth``, with the side of the images as
            ``<file>@384`` where it is not the one the file was trained with. Its tokenizer is read from the same
            folder (tokenizer.json or vocab.txt), or is bert-base-uncased's.

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
    """Write a tiny random model in transformers' layout, and return the checkpoint that `load` takes."""
    tokenizer = _with_decoder_tokens(tiny_tokenizer())
    config = BlipConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 40,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        image_text_hidden_size=10,
        architectures=["BlipForImageTextRetrieval"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlipForImageTextRetrieval(config)
    save_transformers(directory, config, tokenizer, _image_processor(40), model.state_dict())
    return f"local-dir:{directory}"


def _from_folder(checkpoint: str) -> "HfBlipEncoder":
    folder = snapshot(checkpoint, "BLIP")
    read_config(folder, ["blip"])
    tokenizer, image_processor = load_tokenizer(folder), load_image_processor(folder)
    return HfBlipEncoder(load_strictly(BlipForImageTextRetrieval, folder), tokenizer, image_processor, checkpoint)


def _from_published(checkpoint: str, file: WeightsFile) -> "HfBlipEncoder":
    config, state = _translated(file.path, read_state(file.path, UNNEEDED), file.image_size)
    tokenizer = _with_decoder_tokens(bert_tokenizer(file.path.parent))
    check_vocabulary(file.path, tokenizer, config.text_config.vocab_size)
    model = from_state(BlipForImageTextRetrieval, config, state)
    return HfBlipEncoder(model, tokenizer, _image_processor(config.vision_config.image_size), checkpoint)


def _translated(path: Path, state: Mapping[str, Tensor], image_size: int | None) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and state for transformers of what a file of the authors holds, `UNNEEDED` left out.

    Raises:
        CheckpointError: something is missing, not expected, or of another shape.
    """
    if any(name.endswith(".token_type_embeddings.weight") for name in state):
        raise CheckpointError(f"{path} is a file of ALBEF, not of BLIP; load it by backbone 'albef'")
    config = _config(path, state, image_size)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in BlipForImageTextRetrieval(config).state_dict().items()}
    positions = "visual_encoder.pos_embed"
    side = config.vision_config.image_size // config.vision_config.patch_size
    state = {**state, positions: interpolate_positions(state[positions], side)}
    names = {name: _published(name) for name in expected}
    check_state(path, state, {"temp": (), **{names[name]: shape for name, shape in expected.items()}})
    config.logit_scale_init_value = inverse_temperature(path, state["temp"])
    return config, {name: state[published] for name, published in names.items()}


def _published(name: str) -> str:
    """What a part of transformers' model is called in the authors' files."""
    for ours, theirs in _PUBLISHED:
        name = name.replace(ours, theirs)
    return name


def _config(path: Path, state: Mapping[str, Tensor], image_size: int | None) -> Any:
    """What the authors' configuration files say of the model in a file, for transformers."""
    vision = vision_sizes(path, state, image_size)
    vocabulary, width = shape_of(path, state, "text_encoder.embeddings.word_embeddings.weight")
    positions, _ = shape_of(path, state, "text_encoder.embeddings.position_embeddings.weight")
    hidden, _ = shape_of(path, state, "text_encoder.encoder.layer.0.intermediate.dense.weight")
    vision_hidden, _ = shape_of(path, state, "visual_encoder.blocks.0.mlp.fc1.weight")
    features, _ = shape_of(path, state, "vision_proj.weight")
    return BlipConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": _TEXT_LAYERS.get(width, depth(state, "text_encoder.encoder.layer")),
            # Two defaults of transformers are not what the authors trained with: 8 heads here, and 1e-5 below.
            "num_attention_heads": width // HEAD_WIDTH,
            "max_position_embeddings": positions,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": None,
            "sep_token_id": None,
        },
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision_hidden,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.width // HEAD_WIDTH,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": 1e-6,
        },
        image_text_hidden_size=features,
        architectures=["BlipForImageTextRetrieval"],
    )


def _with_decoder_tokens(tokenizer: Any) -> Any:
    """BLIP's two tokens behind BERT's; image-text contrast needs neither, but they are embedded."""
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
    return tokenizer


def _image_processor(side: int) -> Any:
    return BlipImageProcessor(size={"height": side, "width": side})


class HfBlipEncoder(TokenizedEncoder):
    """``transformers.BlipForImageTextRetrieval`` behind our protocol.

    Args:
        model: loses its cross attention and its matching head, which are carried along.
        tokenizer: of transformers.
        image_processor: of transformers.
        checkpoint: the name it was loaded by.

    Attributes:
        carried: tensors of the model that image-text contrast does not need, by name; saved as they were loaded.

    Raises:
        CheckpointError: images are prepared in another size than the model takes, or the tokenizer knows more tokens
            than are embedded.
    """

    backbone = "hf_blip"
    model: Any

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, checkpoint: str) -> None:
        super().__init__()
        self.carried = _take_out_fusion(model)
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.checkpoint = checkpoint
        self.preprocessing = as_preprocessing(image_processor)
        self.max_length = int(model.config.text_config.max_position_embeddings)
        self.image_tower = HfBlipImageTower(model)
        # The model has no temperature of its own: its similarities are cosines.
        self.logit_scale = nn.Parameter(torch.tensor(float(model.config.logit_scale_init_value)))
        if self.preprocessing.size != self.image_tower.image_size:
            raise CheckpointError(
                f"images of {checkpoint!r} are prepared in {self.preprocessing.size} pixels, but its weights are for "
                f"{self.image_tower.image_size}; make preprocessor_config.json and config.json agree"
            )
        embedded = self.token_embedding().num_embeddings
        if len(tokenizer) > embedded:
            raise CheckpointError(
                f"the tokenizer of {checkpoint!r} has {len(tokenizer)} tokens, but its text encoder embeds {embedded}; "
                "copy the tokenizer that belongs to the weights"
            )

    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        encoded = self.model.text_encoder(input_ids=tokens, attention_mask=mask)
        features: Tensor = self.model.text_proj(encoded.last_hidden_state[:, 0])
        return features

    def token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.text_encoder.embeddings.word_embeddings
        return embedding

    def split_attention(self) -> None:
        pass  # one linear layer for queries, keys and values is adapted as it is

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        blocks, layers = (
            ("vision_model.encoder.layers", self.model.vision_model.encoder.layers)
            if tower == "vision"
            else ("text_encoder.encoder.layer", self.model.text_encoder.encoder.layer)
        )
        return {
            role: [f"{blocks}.{block}.{name}" for block in range(len(layers)) for name in names]
            for role, names in _ROLES[tower].items()
        }

    def weights(self) -> dict[str, Tensor]:
        state = dict(self.model.state_dict()) if self.adapter is None else self.adapter.merged()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in (state | self.carried).items()}

    def fingerprint(self) -> str:
        """SHA-256 over names and values of `weights` and over the logit scale, which the layout keeps elsewhere."""
        return hashlib.sha256(f"{super().fingerprint()} {self.logit_scale.item()!r}".encode()).hexdigest()

    def save(self, directory: Path) -> None:
        config = copy.deepcopy(self.model.config)
        config.logit_scale_init_value = self.logit_scale.item()
        save_transformers(directory, config, self.tokenizer, self.image_processor, self.weights())


def _take_out_fusion(model: Any) -> dict[str, Tensor]:
    """Remove what image-text contrast does not need, and hand it over by name."""
    carried = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if ".crossattention." in name or name.startswith("itm_head.")
    }
    del model.itm_head
    for layer in model.text_encoder.encoder.layer:
        if layer.config.is_decoder:
            del layer.crossattention
    return carried


class HfBlipImageTower(ImageTower):
    """``transformers.BlipVisionModel`` and its projection; reads the CLS token.

    Its attention is always explicit, and hands out its weights from the path to its output.
    """

    num_prefix_tokens = 1

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision = model.vision_model
        self.project = model.vision_proj
        embeddings = self.vision.embeddings
        self.image_size = (int(embeddings.image_size),) * 2
        self.grid = (int(embeddings.image_size // embeddings.patch_size),) * 2

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.image_size:  # transformers adds the first of its positions to smaller images
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels, expected {self.image_size}")
        # Not pooler_output: there, transformers normalises the token twice.
        features: Tensor = self.project(self.vision(pixel_values=images).last_hidden_state[:, 0])
        return features

    def read(self, tokens: Tensor) -> Readout:
        return Readout(self.project(self.vision.post_layernorm(tokens[:, 0])), read_cls(tokens))

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.vision.encoder.layers)

    def recomputes(self) -> bool:
        return any(layer.gradient_checkpointing for layer in self.vision.encoder.layers)

    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        return eager_attention(block.self_attn, keep)
