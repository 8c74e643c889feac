"""An image tower and a text tower with a joint space: what every method starts from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from evidence_ft.tower import ImageTower
from evidence_ft.types import Preprocessing


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what was looked for and what to do."""


class DualEncoder(nn.Module, ABC):
    """An image-text model. A backbone fills in the declarations below.

    Attributes:
        image_tower: the part that is explained.
        logit_scale: ``()`` parameter, logarithm of the inverse temperature.
        preprocessing: what the model expects of its images.
        checkpoint: the name it was loaded by.
    """

    image_tower: ImageTower
    logit_scale: nn.Parameter
    preprocessing: Preprocessing
    checkpoint: str

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts to features ``(len(texts), F)``, not normalised."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights, as they are now."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer in the backbone's own layout."""
