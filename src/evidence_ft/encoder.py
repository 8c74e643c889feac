"""An image tower and a text tower with a joint space: what every method starts from."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from evidence_ft.tower import ImageTower
from evidence_ft.types import Preprocessing

TowerName: TypeAlias = Literal["vision", "text"]
"""One of the two towers."""

Role: TypeAlias = Literal["q", "k", "v", "out", "mlp"]
"""What a linear layer of a transformer block does: a projection of its attention, or part of its MLP."""

MAX_LOGIT_SCALE = math.log(100)
"""Where CLIP stops its temperature (Radford et al. 2021, section 2.5)."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what was looked for and what to do."""


class Adapter(Protocol):
    """Low-rank matrices that an encoder's model carries beside its weights."""

    def merged(self) -> dict[str, Tensor]:
        """The state of the model as it would be without the adapter, with equal outputs."""


class DualEncoder(nn.Module, ABC):
    """An image-text model. A backbone fills in the declarations below.

    Attributes:
        model: the library's own model, which holds all parameters.
        image_tower: the part that is explained; its parameters are the model's.
        logit_scale: ``()`` parameter, logarithm of the inverse temperature.
        preprocessing: what the model expects of its images.
        checkpoint: the name it was loaded by.
        backbone: the file in ``backbones/`` that loads it.
        adapter: low-rank matrices in ``model``, where there are any.
    """

    model: nn.Module
    image_tower: ImageTower
    logit_scale: nn.Parameter
    preprocessing: Preprocessing
    checkpoint: str
    backbone: str
    adapter: Adapter | None = None

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts to features ``(len(texts), F)``, not normalised."""

    @abstractmethod
    def encode_with_context(self, names: Sequence[str], context: Tensor) -> Tensor:
        """Names behind token embeddings that no vocabulary has, as in CoOp (Zhou et al. 2022, arXiv 2109.01134).

        The context stands where the words of a prompt would: after the tokenizer's start token, if it has one, and
        before the name.

        Args:
            names: one text each.
            context: ``(L, W)`` for all names, or ``(len(names), L, W)``; receives gradients.

        Returns:
            ``(len(names), F)``, not normalised.

        Raises:
            ValueError: a context of another shape, or one that does not fit together with a name.
        """

    @abstractmethod
    def embed_words(self, text: str) -> Tensor:
        """Token embeddings ``(L, W)`` of a text, without special tokens and positions; a copy."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width W of the token embeddings."""

    @abstractmethod
    def split_attention(self) -> None:
        """Turn fused query, key and value weights that PEFT cannot adapt into linear layers of their own.

        In place, before an optimizer is built. Exact: outputs, `weights` and `fingerprint` stay as they are.
        """

    @abstractmethod
    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        """Names of the linear layers in ``model`` by what they do, after `split_attention`.

        One layer that computes queries, keys and values at once is listed under all three.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The state of ``model`` in its library's own layout: attention fused again, the adapter merged in.

        Detached, contiguous, on the CPU; may share memory with the live model, which is left as it is.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write `weights` (safetensors), configuration and tokenizer in the library's own layout."""

    def fingerprint(self) -> str:
        """SHA-256 over names and values of `weights`, as they are now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights().items()):
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
        return digest.hexdigest()

    def tower_parameters(self, tower: TowerName) -> list[nn.Parameter]:
        """Parameters of the image tower, or all others but the logit scale."""
        vision = list(self.image_tower.parameters())
        if tower == "vision":
            return vision
        known = {id(parameter) for parameter in (*vision, self.logit_scale)}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in known]

    def constrain(self) -> None:
        """Bring a trained logit scale back to at most `MAX_LOGIT_SCALE`; called after each optimizer step."""
        if self.logit_scale.requires_grad:
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
