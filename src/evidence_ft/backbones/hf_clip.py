"""CLIP of transformers (``CLIPModel``).

Attention is made explicit by a configuration of its own, for the length of one trace, on the blocks that are traced;
the text tower keeps its fused attention and its causal mask. The activation (OpenAI's QuickGELU, or GELU) is the one
that ``config.json`` names.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from evidence_ft.encoder import DualEncoder, Role, TowerName
from evidence_ft.huggingface import (
    TransformersEncoder,
    as_config,
    check_image_size,
    eager_attention,
    load_image_processor,
    load_strictly,
    load_tokenizer,
    projections,
    read_config,
    save_transformers,
    snapshot,
    square_grid,
    tiny_vocabulary,
)
from evidence_ft.tower import ImageTower, check_tower, read_cls
from evidence_ft.types import Readout


def load(checkpoint: str) -> DualEncoder:
    """Load a CLIP of transformers and check that it can be explained.

    Args:
        checkpoint: ``hf-hub:<owner>/<name>`` such as ``hf-hub:openai/clip-vit-base-patch16``, ``local-dir:<folder>``
            or a folder in transformers' layout.

    Raises:
        CheckpointError: unknown name, another family, missing or damaged files, files that do not fit together.
        UnsupportedTowerError: the image tower cannot be explained.
    """
    folder = snapshot(checkpoint, "CLIP")
    config = as_config(CLIPConfig, read_config(folder, ["clip"]), folder)
    processor, tokenizer = load_image_processor(folder), load_tokenizer(folder)
    check_image_size(folder, processor, config.vision_config)
    encoder = HfClipEncoder(load_strictly(CLIPModel, folder), tokenizer, processor, checkpoint).eval()
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    return encoder


def tiny(directory: Path) -> str:
    """Write a CLIP with random weights of a few kilobytes, and return the name that `load` takes."""
    vocabulary = tiny_vocabulary(["<|startoftext|>", "<|endoftext|>"], end_of_word="</w>")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=64)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    depth = {"num_hidden_layers": 2, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        projection_dim=10,
        vision_config=depth
        | {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "image_size": 40, "patch_size": 8},
        text_config=depth
        | {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
        | {"vocab_size": len(vocabulary), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end},
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        weights = CLIPModel(config).state_dict()
    save_transformers(directory, config, tokenizer, processor, weights)
    return f"local-dir:{directory}"


class HfClipEncoder(TransformersEncoder):
    """``transformers.CLIPModel`` behind our protocol.

    Args:
        model: kept as it is.
        tokenizer: of transformers.
        image_processor: of transformers.
        checkpoint: the name it was loaded by.
    """

    backbone = "hf_clip"

    def __init__(self, model: CLIPModel, tokenizer: Any, image_processor: Any, checkpoint: str) -> None:
        super().__init__(model, HfClipImageTower(model), tokenizer, image_processor, checkpoint)
        self.max_length = int(model.config.text_config.max_position_embeddings)

    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        pooled = self.model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
        features: Tensor = self.model.text_projection(pooled)
        return features

    def token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.text_model.embeddings.token_embedding
        return embedding

    def split_attention(self) -> None:
        pass  # transformers keeps queries, keys and values apart

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        return projections(self.model, "vision_model" if tower == "vision" else "text_model")


class HfClipImageTower(ImageTower):
    """``CLIPVisionModel`` and its projection; reads the CLS token.

    Args:
        model: ``transformers.CLIPModel``; kept as it is.
    """

    num_prefix_tokens = 1

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.grid = square_grid(model.config.vision_config)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.projection(self.vision(pixel_values=images).pooler_output)
        return features

    def read(self, tokens: Tensor) -> Readout:
        return Readout(self.projection(self.vision.post_layernorm(tokens[:, 0])), read_cls(tokens))

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.vision.encoder.layers)

    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        return eager_attention(block.self_attn, keep)

    def recomputes(self) -> bool:
        return any(block.gradient_checkpointing for block in self.vision.encoder.layers)
