"""SigLIP and SigLIP 2 of fixed resolution, of transformers (``SiglipModel``).

There is no CLS token: a probe attends to the patches, and its attention is part of what is traced. The text tower is
read at the last token of texts padded to one length, as it was trained, padding attended to. Zhai et al. 2023
(arXiv 2303.15343); Tschannen et al. 2025 (arXiv 2502.14786).
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

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
from evidence_ft.tower import ImageTower, UnsupportedTowerError, check_tower
from evidence_ft.types import Readout


def load(checkpoint: str) -> DualEncoder:
    """Load a SigLIP of transformers and check that it can be explained.

    Args:
        checkpoint: ``hf-hub:<owner>/<name>`` such as ``hf-hub:google/siglip-base-patch16-224`` or
            ``hf-hub:google/siglip2-base-patch16-224``, ``local-dir:<folder>`` or a folder in transformers' layout.

    Raises:
        CheckpointError: unknown name, another family (such as SigLIP 2 of variable resolution), missing or damaged
            files, files that do not fit together.
        UnsupportedTowerError: the image tower cannot be explained.
    """
    folder = snapshot(checkpoint, "SigLIP")
    config = as_config(SiglipConfig, read_config(folder, ["siglip"]), folder)
    processor, tokenizer = load_image_processor(folder), load_tokenizer(folder)
    check_image_size(folder, processor, config.vision_config)
    encoder = HfSiglipEncoder(load_strictly(SiglipModel, folder), tokenizer, processor, checkpoint).eval()
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    return encoder


def tiny(directory: Path) -> str:
    """Write a SigLIP with random weights of a few kilobytes, and return the name that `load` takes."""
    vocabulary = tiny_vocabulary(["<pad>", "</s>", "<unk>", "▁"])
    vocabulary |= {f"▁{letter}": len(vocabulary) + place for place, letter in enumerate(string.ascii_letters)}
    fast = Tokenizer(models.Unigram([(token, -float(len(vocabulary))) for token in vocabulary], unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    names = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, model_input_names=["input_ids"], **names)
    config = SiglipConfig(
        vision_config={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
        | {"image_size": 32, "patch_size": 8},
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"vocab_size": len(vocabulary), "max_position_embeddings": 64, "projection_size": 24}
        | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1},
    )
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = SiglipModel(config)
    with torch.no_grad():  # as in the paper before training, where transformers starts from zeros
        model.logit_scale.fill_(10.0).log_()
        model.logit_bias.fill_(-10.0)
    save_transformers(directory, config, tokenizer, processor, model.state_dict())
    return f"local-dir:{directory}"


class HfSiglipEncoder(TransformersEncoder):
    """``transformers.SiglipModel`` behind our protocol.

    Args:
        model: kept as it is.
        tokenizer: of transformers.
        image_processor: of transformers.
        checkpoint: the name it was loaded by.
    """

    backbone = "hf_siglip"
    pads_to_max_length = True

    def __init__(self, model: SiglipModel, tokenizer: Any, image_processor: Any, checkpoint: str) -> None:
        super().__init__(model, HfSiglipImageTower(model), tokenizer, image_processor, checkpoint)
        self.max_length = int(model.config.text_config.max_position_embeddings)

    @property
    def logit_bias(self) -> nn.Parameter:  # type: ignore[override]  # a view: the parameter stays the model's
        """``(1,)``."""
        parameter: nn.Parameter = self.model.logit_bias
        return parameter

    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        features: Tensor = self.model.text_model(input_ids=tokens).pooler_output
        return features

    def token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.text_model.embeddings.token_embedding
        return embedding

    def normalize_text(self, text: str) -> str:
        """As in training: without capitals, and for SigLIP 1, whose texts end in ``</s>``, without punctuation.

        Of the tokenizers in published folders some do so themselves, which changes nothing, and some do not.
        """
        if self.tokenizer.init_kwargs.get("do_lower_case", True):
            text = text.lower()
        if self.tokenizer.eos_token != "</s>":
            return text
        return re.sub(r"\s+", " ", text.translate(str.maketrans("", "", string.punctuation))).strip()

    def split_attention(self) -> None:
        pass  # of the blocks, transformers keeps queries, keys and values apart; the probe's attention is not adapted

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        return projections(self.model, "vision_model" if tower == "vision" else "text_model")


class HfSiglipImageTower(ImageTower):
    """``SiglipVisionModel``; a probe pools the patches by attention.

    Args:
        model: ``transformers.SiglipModel``; kept as it is.

    Raises:
        UnsupportedTowerError: a tower without its pooling head.
    """

    num_prefix_tokens = 0

    def __init__(self, model: SiglipModel) -> None:
        super().__init__()
        if not model.config.vision_config.vision_use_head:
            raise UnsupportedTowerError(
                "image tower has no pooling head (vision_use_head is false), so it makes no features to compare with "
                "texts; load a model that has one"
            )
        self.vision = model.vision_model
        self.grid = square_grid(model.config.vision_config)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.vision(pixel_values=images).pooler_output
        return features

    def read(self, tokens: Tensor) -> Readout:
        head = self.vision.head
        pool = head.attention
        normed = self.vision.post_layernorm(tokens)
        weights, biases = pool.in_proj_weight.chunk(3), pool.in_proj_bias.chunk(3)
        q, k, v = (
            rearrange(F.linear(inputs, weight, bias), "b n (h d) -> b h n d", h=pool.num_heads)
            for inputs, weight, bias in zip((head.probe, normed, normed), weights, biases, strict=True)
        )
        pooling = (q * pool.head_dim**-0.5 @ k.mT).softmax(dim=-1)
        mixed = rearrange(pooling.to(v) @ v, "b h 1 d -> b (h d)")
        pooled = F.linear(mixed, pool.out_proj.weight, pool.out_proj.bias)
        return Readout(pooled + head.mlp(head.layernorm(pooled)), pooling)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.vision.encoder.layers)

    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        return eager_attention(block.self_attn, keep)

    def recomputes(self) -> bool:
        return any(block.gradient_checkpointing for block in self.vision.encoder.layers)
