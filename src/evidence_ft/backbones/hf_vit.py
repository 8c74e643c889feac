"""Vision transformers of transformers with a linear head: ViT, DINOv2, and DINOv2 with registers.

ViT's head reads the CLS token. DINOv2's reads the CLS token and the mean over the patches side by side: two halves of
the features, and `Readout.pooling` has a head for each. Attention is made explicit by a configuration of its own, for
the length of one trace, on the blocks that are traced.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from evidence_ft.encoder import CheckpointError, Encoder, OwnHead, Role, TowerName
from evidence_ft.huggingface import (
    as_config,
    as_preprocessing,
    eager_attention,
    load_image_processor,
    load_strictly,
    read_config,
    save_transformers,
    snapshot,
)
from evidence_ft.tower import ImageTower, check_tower, read_cls, read_mean
from evidence_ft.types import Readout

_CLASSES: Mapping[str, Any] = {
    "vit": ViTForImageClassification,
    "dinov2": Dinov2ForImageClassification,
    "dinov2_with_registers": Dinov2WithRegistersForImageClassification,
}
"""By ``model_type``."""

_NAMES: Mapping[Role, str] = {
    "q": r"attention\.q_proj",
    "k": r"attention\.k_proj",
    "v": r"attention\.v_proj",
    "out": r"attention\.o_proj",
    "mlp": r"mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)",
}
"""What linear layers of a block are called."""


READS_TEXT = False
"""Told without loading weights, which takes time; backbones that do not say so have a text tower."""


def load(checkpoint: str) -> Encoder:
    """Load a vision transformer with its classifier and check that it can be explained.

    Args:
        checkpoint: ``hf-hub:<owner>/<name>`` such as ``hf-hub:google/vit-base-patch16-224``, ``local-dir:<folder>`` or
            a folder in transformers' layout.

    Raises:
        CheckpointError: unknown name, another family, no classifier, missing or damaged files, files that do not fit
            together.
        UnsupportedTowerError: the model cannot be explained.
    """
    folder = snapshot(checkpoint, "ViT or DINOv2")
    settings = read_config(folder, list(_CLASSES))
    model_class = _CLASSES[settings["model_type"]]
    saved = next(iter(settings.get("architectures") or [model_class.__name__]))
    if saved != model_class.__name__:
        raise CheckpointError(
            f"{folder} holds a {saved}, without a classifier; expected a {model_class.__name__}; vision transformers "
            "without one are loaded by backbone 'timm_vit'"
        )
    config, processor = as_config(model_class.config_class, settings, folder), load_image_processor(folder)
    size, expected = as_preprocessing(processor).size, _pair(config.image_size)
    if settings["model_type"] == "vit" and size != expected:  # DINOv2 computes its positions for any size
        raise CheckpointError(
            f"the image processor in {folder} makes images of {size[0]}x{size[1]} pixels, and its model expects "
            f"{expected[0]}x{expected[1]}; are config.json and preprocessor_config.json of one model?"
        )
    encoder = HfVitEncoder(load_strictly(model_class, folder), processor, checkpoint).eval()
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    return encoder


def tiny(directory: Path) -> str:
    """Write a ViT with random weights of a few kilobytes, and return the name that `load` takes."""
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=(32, 48),
        patch_size=8,
        initializer_range=0.2,
        id2label=dict(enumerate(["cat", "dog", "sea lion", "red_circle", "tench, Tinca tinca"])),
    )
    processor = ViTImageProcessor(size={"height": 32, "width": 48})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = ViTForImageClassification(config)
    HfVitEncoder(model, processor, "tiny").save(directory)
    return f"local-dir:{directory}"


class HfVitEncoder(Encoder):
    """A vision transformer of transformers with its classifier, behind our protocol.

    Args:
        model: ``ViTForImageClassification`` or one of DINOv2; kept as it is.
        image_processor: of transformers.
        checkpoint: the name it was loaded by.
    """

    backbone = "hf_vit"
    model: Any

    def __init__(self, model: Any, image_processor: Any, checkpoint: str) -> None:
        super().__init__()
        self.model = model
        self.image_processor = image_processor
        self.checkpoint = checkpoint
        self.preprocessing = as_preprocessing(image_processor)
        self.image_tower = HfVitTower(model, self.preprocessing.size)

    @property
    def own_head(self) -> OwnHead | None:
        head, names = self.model.classifier, self.model.config.id2label
        if not isinstance(head, nn.Linear):
            return None
        class_names = tuple(str(names[row]) for row in range(len(head.weight)))
        unnamed = class_names == tuple(f"LABEL_{row}" for row in range(len(head.weight)))  # transformers' default
        return OwnHead(head.weight, head.bias, None if unnamed else class_names)

    def split_attention(self) -> None:
        pass  # transformers keeps queries, keys and values apart

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        names = [
            name.removesuffix(".base_layer")  # where an adapter is in place already
            for name, module in self.model.named_modules()
            if tower == "vision" and isinstance(module, nn.Linear)
        ]
        return {
            role: [name for name in names if re.fullmatch(rf".*\.layers?\.\d+\.{pattern}", name)]
            for role, pattern in _NAMES.items()
        }

    def tower_parameters(self, tower: TowerName) -> list[nn.Parameter]:
        unused = getattr(self.model.base_model.embeddings, "mask_token", None)  # of DINOv2's pre-training
        return [parameter for parameter in super().tower_parameters(tower) if parameter is not unused]

    def weights(self) -> dict[str, Tensor]:
        state = dict(self.model.state_dict()) if self.adapter is None else self.adapter.merged()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def save(self, directory: Path) -> None:
        config = copy.copy(self.model.config)
        config.architectures = [type(self.model).__name__]
        save_transformers(directory, config, None, self.image_processor, self.weights())


class HfVitTower(ImageTower):
    """The part of a classification model below its head; features are what the head reads.

    Args:
        model: ``ViTForImageClassification`` or one of DINOv2; kept as it is.
        image_size: height and width in pixels.
    """

    def __init__(self, model: Any, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.vision = model.base_model
        self.reads_patches = not isinstance(model, ViTForImageClassification)
        rows, columns = _pair(model.config.patch_size)
        self.grid = (image_size[0] // rows, image_size[1] // columns)
        self.num_prefix_tokens = 1 + int(getattr(model.config, "num_register_tokens", 0))

    def forward(self, images: Tensor) -> Tensor:
        return self._features(self.vision(pixel_values=images).last_hidden_state)

    def read(self, tokens: Tensor) -> Readout:
        pooling = read_cls(tokens)
        if self.reads_patches:
            pooling = torch.cat((pooling, read_mean(tokens, self.num_prefix_tokens)), dim=1)
        return Readout(self._features(self.vision.layernorm(tokens)), pooling)

    def _features(self, normed: Tensor) -> Tensor:
        cls = normed[:, 0]
        if not self.reads_patches:
            return cls
        return torch.cat((cls, normed[:, self.num_prefix_tokens :].mean(dim=1)), dim=1)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.vision.encoder.layer if self.reads_patches else self.vision.layers)

    def explicit_attention(self, block: Any, keep: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        return eager_attention(block.attention, keep)

    def recomputes(self) -> bool:
        return any(block.gradient_checkpointing for block in self.blocks())


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
