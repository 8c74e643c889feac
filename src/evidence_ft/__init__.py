"""Fine-tune vision-language models so that they are right for the right reasons, and measure it."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evidence_ft.evidence_trainer import EvidenceTrainer as EvidenceTrainer
    from evidence_ft.evidence_trainer import EvidenceTrainingArguments as EvidenceTrainingArguments
    from evidence_ft.model import EvidenceModel as EvidenceModel

__version__ = version("evidence-ft")
__all__ = ["EvidenceModel", "EvidenceTrainer", "EvidenceTrainingArguments", "__version__"]

_HOMES = {
    "EvidenceModel": "evidence_ft.model",
    "EvidenceTrainer": "evidence_ft.evidence_trainer",
    "EvidenceTrainingArguments": "evidence_ft.evidence_trainer",
}


def __getattr__(name: str) -> Any:
    """The public face, loaded when it is first asked for: torch and the model libraries take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'evidence_ft' has no attribute {name!r}")
    from evidence_ft.installation import explained

    with explained(f"evidence_ft.{name}"):
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
