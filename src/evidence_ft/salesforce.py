"""The weights files of ALBEF (Li et al. 2021, arXiv 2107.07651) and BLIP (Li et al. 2022, arXiv 2201.12086).

Such a file is a pickled dictionary whose entry ``model`` is the state of a whole pre-training model: the two towers and
their projections, a temperature, and much that image-text contrast does not need. What is not needed is named by the
backbone; what is neither needed nor named is an error.

What the files do not say is the same in all of them: attention heads are 64 wide, and images are squashed to a square
and normalised as CLIP's are.
"""

import logging
import math
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizer

from evidence_ft.encoder import CheckpointError
from evidence_ft.installation import one_line
from evidence_ft.types import at_least_float32

logger = logging.getLogger(__name__)

HEAD_WIDTH = 64
"""Width of an attention head in ViT-B, ViT-L and BERT."""

MOMENTUM_AND_QUEUES = (
    r"(visual_encoder|vision_proj|text_encoder|text_proj)_m\..+",
    r"(image|text|idx)_queue|queue_ptr|ptr_queue",
)
"""Patterns for what only pre-training needs: moving averages of the towers, and features of earlier batches."""

_BERT = "google-bert/bert-base-uncased"
_SUFFIXES = (".pth", ".pt", ".safetensors")
_DEPTHS = {768: 12, 1024: 24}  # of the published vision transformers, by their width

_DAMAGED = (RuntimeError, EOFError, UnpicklingError, OSError, ValueError, KeyError, TypeError, SafetensorError)


class WeightsFile(NamedTuple):
    """A weights file, and the side of the images it is to be used with in pixels; None for the file's own."""

    path: Path
    image_size: int | None


class VisionSizes(NamedTuple):
    """Of a vision transformer in a published file. Images, patches and the grid are square."""

    width: int
    depth: int
    patch_size: int
    image_size: int


def weights_file(checkpoint: str) -> WeightsFile | None:
    """The file that a checkpoint's name stands for: ``<file>``, or ``<file>@<image size>``; None for other names.

    Example:
        >>> weights_file("models/ALBEF.pth@384")
        WeightsFile(path=PosixPath('models/ALBEF.pth'), image_size=384)
        >>> weights_file("hf-hub:Salesforce/blip-itm-base-coco")
    """
    found = re.fullmatch(r"(?P<path>.+?)(@(?P<size>[1-9]\d*))?", checkpoint)
    path = Path(found["path"]).expanduser() if found else Path()
    if found is None or path.suffix not in _SUFFIXES or path.is_dir():
        return None
    return WeightsFile(path, int(found["size"]) if found["size"] else None)


def read_state(path: Path, unneeded: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weights file by name, at least in float32, without those whose whole names match a pattern.

    Args:
        path: pickled (entry ``model``; only tensors are read of it), or safetensors.
        unneeded: regular expressions; what they match is listed in the log.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights file {str(path)!r}; check the path")
    try:
        content: Any = (
            {"model": load_file(path)}
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except _DAMAGED as error:
        raise CheckpointError(f"could not read {path}: {one_line(error)}; is it damaged? Download it again") from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"the entries {_some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CheckpointError(
            f"{path} holds {found}; expected a dictionary whose entry 'model' names the tensors of a model"
        )
    left_out = [name for name in state if any(re.fullmatch(pattern, name) for pattern in unneeded)]
    if left_out:
        logger.info("%s: %d tensors are not needed and left out: %s", path, len(left_out), ", ".join(left_out))
    kept = {name: tensor for name, tensor in state.items() if name not in set(left_out)}
    return {name: at_least_float32(value) if value.is_floating_point() else value for name, value in kept.items()}


def check_state(source: Path, state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Hold the tensors of a file against the names and shapes that are expected.

    Raises:
        CheckpointError: names what is missing, not expected, or of another shape.
    """
    complaints = []
    for names, what in (
        (sorted(expected.keys() - state.keys()), "missing"),
        (sorted(state.keys() - expected.keys()), "not expected"),
        (
            [
                f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
                for name, shape in sorted(expected.items())
                if name in state and tuple(state[name].shape) != tuple(shape)
            ],
            "of another shape",
        ),
    ):
        if names:
            complaints.append(f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} {what}: {_some(names)}")
    if complaints:
        raise CheckpointError(f"{source} does not fit: {'; '.join(complaints)}; was it made from another model?")


def vision_sizes(source: Path, state: Mapping[str, Tensor], image_size: int | None) -> VisionSizes:
    """Sizes of the ``visual_encoder`` in a published file.

    Args:
        source: the file, for messages.
        state: its tensors.
        image_size: to use it with; None for the one it was trained with.

    Raises:
        CheckpointError: there is none, its grid is not square, or its patches do not divide the image.
    """
    _, tokens, width = shape_of(source, state, "visual_encoder.pos_embed", dimensions=3)
    *_, patch_size = shape_of(source, state, "visual_encoder.patch_embed.proj.weight", dimensions=4)
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise CheckpointError(f"{source} has positions for {tokens} tokens; expected a CLS token and a square grid")
    image_size = side * patch_size if image_size is None else image_size
    if image_size % patch_size:
        raise CheckpointError(
            f"images of {image_size} pixels were asked for, but {source} has patches of {patch_size}; expected a "
            "multiple of it"
        )
    return VisionSizes(width, _DEPTHS.get(width, depth(state, "visual_encoder.blocks")), patch_size, image_size)


def shape_of(source: Path, state: Mapping[str, Tensor], name: str, *, dimensions: int = 2) -> tuple[int, ...]:
    """The shape of one tensor of a published file.

    Raises:
        CheckpointError: there is none of that name, or it has another number of dimensions.
    """
    if name not in state or state[name].ndim != dimensions:
        found = f"{name} {tuple(state[name].shape)}" if name in state else f"no {name} among {_some(sorted(state))}"
        raise CheckpointError(
            f"{source} holds {found}; expected a file of ALBEF or BLIP with the parts for image-text contrast, as "
            "published for pre-training and retrieval"
        )
    return tuple(state[name].shape)


def depth(state: Mapping[str, Tensor], blocks: str) -> int:
    """How many blocks there are tensors of.

    Example:
        >>> depth({"a.layer.0.weight": torch.ones(()), "a.layer.1.weight": torch.ones(())}, "a.layer")
        2
    """
    found = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def fusion_start(state: Mapping[str, Tensor], layers: str) -> int:
    """The first layer with cross attention, or how many layers there are."""
    total = depth(state, layers)
    crossed = (layer for layer in range(total) if any(f"{layers}.{layer}.crossattention." in name for name in state))
    return next(crossed, total)


def interpolate_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings ``(1, 1 + n * n, W)`` for another grid: ``(1, 1 + side * side, W)``.

    As in the published code: bicubic without antialiasing; that of the CLS token stays.
    """
    n = math.isqrt(positions.shape[1] - 1)
    if n == side:
        return positions
    grid = rearrange(positions[:, 1:], "1 (h w) d -> 1 d h w", h=n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")), dim=1)


def inverse_temperature(source: Path, temp: Tensor) -> float:
    """Logarithm of the inverse of the temperature ``()`` that published code divides logits by.

    Raises:
        CheckpointError: it is not positive.
    """
    if not (temp > 0 and temp.isfinite()):
        raise CheckpointError(f"{source} has temperature {temp.item()}, expected a positive number")
    return -math.log(temp.item())


def bert_tokenizer(folder: Path) -> Any:
    """BERT's tokenizer: from ``folder`` if it holds tokenizer.json or vocab.txt, bert-base-uncased otherwise.

    Raises:
        CheckpointError: neither there nor to be downloaded.
    """
    beside = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    try:
        return BertTokenizer.from_pretrained(folder if beside else _BERT, local_files_only=beside)
    except Exception as error:  # tokenizers raises bare ones, and the hub client whatever the network came up with
        hint = "copy it again" if beside else f"without network, put tokenizer.json or vocab.txt of {_BERT} there"
        raise CheckpointError(
            f"could not load the tokenizer {f'in {folder}' if beside else f'{_BERT}, and {folder} holds none'}: "
            f"{one_line(error)}; {hint}"
        ) from error


def check_vocabulary(source: Path, tokenizer: Any, vocabulary: int) -> None:
    """With another vocabulary every text would have features, and none of them its own.

    Raises:
        CheckpointError: the tokenizer has more or fewer tokens than are embedded.
    """
    if len(tokenizer) != vocabulary:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, but {source} embeds {vocabulary}; expected the one it was "
            f"trained with, which for the published files is {_BERT}'s"
        )


def tiny_tokenizer() -> Any:
    """A BERT tokenizer that knows a few words, and spells out all others."""
    characters = string.ascii_lowercase + string.digits
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *",.-'!?()/:")
    vocabulary = {word: index for index, word in enumerate((*words, "photo", "of", "the", "cat", "red", "circle"))}
    return BertTokenizer(vocab=vocabulary)


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    """The first few of them."""
    shown = [str(name) for name in list(names)[:3]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
