"""What models of transformers have in common: reading a folder, looking into an attention, preparing images and texts.

Only files that cannot run code are read: JSON, text, safetensors, and, where a repository has nothing else, weights
that `torch.load` restricts to tensors.
"""

import copy
import json
import pickle
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn

from evidence_ft.encoder import (
    CheckpointError,
    DualEncoder,
    Role,
    context_in_place,
    context_length,
    unreachable,
    write_weights,
)
from evidence_ft.tower import ImageTower
from evidence_ft.types import Preprocessing

_ELSEWHERE = {
    "clip": "load it by backbone 'hf_clip'",
    "siglip": "load it by backbone 'hf_siglip'",
    "blip": "load it by backbone 'hf_blip'",
    "albef": "load it by backbone 'albef'",
    "vit": "load it by backbone 'hf_vit'",
    "dinov2": "load it by backbone 'hf_vit'",
    "dinov2_with_registers": "load it by backbone 'hf_vit'",
    "siglip2": (
        "SigLIP 2 of variable resolution (NaFlex) has no fixed grid of tokens; choose one of fixed resolution, such as "
        "hf-hub:google/siglip2-base-patch16-224"
    ),
}
"""What to do about a ``model_type`` that was not expected."""

_CONFIG, _WEIGHTS, _PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
_READ = ("*.json", "*.txt", "*.model", "*.safetensors")

_INTERPOLATIONS: Mapping[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers for the ways to resize."""

_PLACEHOLDER = "a"
"""A word of one token in every vocabulary, where the embeddings of a context will stand."""


@contextmanager
def eager_attention(attention: Any, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, one attention of transformers computes its weights ``(B, H, N, N)`` explicitly and hands them over.

    By a copy of its configuration, so that no other attention is touched: all layers share one configuration object,
    and of the switches for whole models one silently drops the text tower's causal mask. Where a family's attention is
    always explicit, the copy does nothing.

    Args:
        attention: returns its weights second, on the path to what it returns first.
        keep: is handed the weights.
    """

    def keep_weights(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        keep(output[1])

    config = attention.config
    eager = copy.copy(config)
    eager._attn_implementation = "eager"
    hook = attention.register_forward_hook(keep_weights)
    attention.config = eager
    try:
        yield
    finally:
        attention.config = config
        hook.remove()


def snapshot(checkpoint: str, family: str) -> Path:
    """The folder a checkpoint's name stands for, downloaded first where it is a hub id.

    Files that were downloaded before are used offline.

    Args:
        checkpoint: ``hf-hub:<owner>/<name>``, ``local-dir:<folder>`` or a folder.
        family: what is looked for, as a reader knows it, such as ``CLIP``.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    if checkpoint.startswith("hf-hub:"):
        name = checkpoint.removeprefix("hf-hub:")
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_READ), ignore_patterns=["*/*"]))
            if not any(folder.glob("*.safetensors")):
                snapshot_download(name, allow_patterns=[_PICKLED])
        except Exception as error:  # whatever the hub client, the network or the file system came up with
            raise unreachable(checkpoint, error) from error
        return folder
    folder = Path(checkpoint.removeprefix("local-dir:")).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"no folder {str(folder)!r}; expected a {family} model of transformers: 'hf-hub:<owner>/<name>', or "
            f"'local-dir:<folder>' with {_CONFIG}, {_WEIGHTS}, its tokenizer and its preprocessor_config.json"
        )
    return folder


def read_config(folder: Path, model_types: Sequence[str]) -> dict[str, Any]:
    """``config.json``, of one of the families in ``model_types``.

    Raises:
        CheckpointError: missing, no JSON, or another family's.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {_CONFIG}; expected a folder in transformers' layout ({_CONFIG}, {_WEIGHTS})"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not transformers' JSON with a 'model_type': {error!r}") from error
    if found not in model_types:
        hint = f"; {_ELSEWHERE[found]}" if found in _ELSEWHERE else ""
        raise CheckpointError(f"{folder} holds a model of type {found!r}, expected {' or '.join(model_types)}{hint}")
    return dict(config)


def load_strictly(model_class: Any, folder: Path) -> Any:
    """A model of transformers in float32 and evaluation mode, every weight of it from the folder.

    Args:
        model_class: such as ``transformers.CLIPModel``.
        folder: in transformers' layout.

    Raises:
        CheckpointError: no weights, damaged ones, or weights that are missing, superfluous or of another shape.
    """
    safe = any(folder.glob("*.safetensors"))
    if not safe and not (folder / _PICKLED).is_file():
        raise CheckpointError(f"{folder} holds no weights; expected {_WEIGHTS}")
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=safe,
                weights_only=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # to name them all
                output_loading_info=True,
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"could not load {folder / _PICKLED}: it holds something other than tensors, or is damaged; download it "
            "again, or ask its author for safetensors"
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError, EOFError) as error:
        raise CheckpointError(f"could not load {folder}: {error}; copy or download it again") from error
    complaints = [
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(f"{name} is not expected" for name in sorted(report["unexpected_keys"])),
        *(
            f"{name} has shape {tuple(found)}, expected {tuple(expected)}"
            for name, found, expected in sorted(report["mismatched_keys"])
        ),
    ]
    if complaints:
        more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise CheckpointError(
            f"the weights in {folder} do not fit its {_CONFIG}: {'; '.join(complaints[:3])}{more}; are both of one "
            "model?"
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        CheckpointError: missing, damaged, or in need of a package that is not installed.
    """
    # Without its files, some classes of transformers make a tokenizer that knows no words.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(
            f"{folder} holds no tokenizer; expected tokenizer.json, or {', '.join(_VOCABULARIES[1:])}"
        )
    try:
        with _quiet():
            try:
                return transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except ImportError:  # its own class reads another file, with a package that is not here
                return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare ones
        raise CheckpointError(
            f"could not load the tokenizer in {folder}: {error}; expected tokenizer.json and tokenizer_config.json"
        ) from error


def load_image_processor(folder: Path) -> Any:
    """The model's own image processor, from ``preprocessor_config.json`` or ``processor_config.json``.

    Raises:
        CheckpointError: missing or damaged.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} holds no {names[0]}, which says how images are prepared; copy it there")
    try:
        with _quiet():
            return transformers.AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise CheckpointError(f"could not load the image processor in {folder}: {error}") from error


def preprocessing(folder: Path) -> Preprocessing:
    """How the model in a folder expects its images; see `as_preprocessing`."""
    return as_preprocessing(load_image_processor(folder))


def as_preprocessing(processor: Any) -> Preprocessing:
    """What an image processor of transformers does, as the joint image-and-mask transform is told.

    Raises:
        CheckpointError: it does something that transform does not.
    """
    settings = processor.to_dict()
    size, crop = settings["size"], settings.get("crop_size") if settings.get("do_center_crop") else None
    edge = 0 if size.get("longest_edge") else int(size.get("shortest_edge") or 0)
    resized = (int(size["height"]), int(size["width"])) if size.get("height") else (edge, edge)
    cropped = (int(crop["height"]), int(crop["width"])) if crop else resized
    fits = 0 < cropped[0] <= resized[0] and 0 < cropped[1] <= resized[1]
    checks = {
        "images are not resized": settings.get("do_resize", True),
        "images are padded": not settings.get("do_pad"),
        "pixels are not divided by 255": settings.get("do_rescale", True)
        and abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6,
        f"resample is {settings['resample']}": int(settings["resample"]) in _INTERPOLATIONS,
        f"size is {size}, cropped to {crop}": fits and (not edge or crop is not None),
    }
    for complaint, fine in checks.items():
        if not fine:
            raise CheckpointError(
                f"images of this model are prepared in a way that is not supported: {complaint}; expected a shortest "
                "edge and a crop from the centre, or a fixed height and width, then a division by 255"
            )
    normalized = settings.get("do_normalize", True)
    return Preprocessing(
        size=cropped,
        mean=tuple(settings["image_mean"]) if normalized else (0.0,) * 3,
        std=tuple(settings["image_std"]) if normalized else (1.0,) * 3,
        interpolation=_INTERPOLATIONS[int(settings["resample"])],
        resize_mode="shortest" if edge else "squash",
        crop_rounding="down",
        resized=None if resized == cropped else resized,
    )


class TokenizedEncoder(DualEncoder):
    """A dual encoder whose texts go through a tokenizer of transformers and an embedding of tokens.

    A backbone sets the attributes and fills in `encode_tokens` and `token_embedding`.

    Attributes:
        tokenizer: of transformers.
        max_length: tokens the text tower takes at most, special ones included.
        pads_to_max_length: whether the text tower was trained on texts of one length, padding included.
    """

    tokenizer: Any
    max_length: int
    pads_to_max_length: bool = False

    @abstractmethod
    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids ``(T, C)``, and which of them are not padding (int64, 1 or 0), to features ``(T, F)``."""

    @abstractmethod
    def token_embedding(self) -> nn.Embedding:
        """What looks up token ids, called once in `encode_tokens`."""

    def normalize_text(self, text: str) -> str:
        """The text as the tokenizer is given it; a family whose tokenizer does too little does the rest here."""
        return text

    @property
    def text_width(self) -> int:
        return int(self.token_embedding().embedding_dim)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.encode_tokens(*self._tokenize(texts))

    def encode_with_context(self, names: Sequence[str], context: Tensor) -> Tensor:
        length = context_length(context, len(names), self.text_width)
        prompts = [f"{_PLACEHOLDER} " * length + name for name in names]
        for name, ids in zip(names, self._ids(prompts), strict=True):
            if len(ids) > self.max_length:
                behind = f" behind a context of {length} tokens" if length else ""
                raise ValueError(
                    f"{name!r}{behind} is longer than the {self.max_length} tokens the text tower takes; shorten it"
                )
        start = self._start()
        with context_in_place(self.token_embedding(), start, context):
            return self.encode_tokens(*self._tokenize(prompts))

    def embed_words(self, text: str) -> Tensor:
        (ids,), (blank,) = self._ids([text]), self._ids([""])
        if len(ids) > self.max_length:
            raise ValueError(f"{text!r} is longer than the {self.max_length} tokens the text tower takes; shorten it")
        start = self._start()
        chosen = ids[start : start + len(ids) - len(blank)]
        tokens = torch.tensor(chosen, dtype=torch.long, device=self.logit_scale.device)
        with torch.no_grad():  # called, not indexed: some scale what they look up
            words: Tensor = self.token_embedding()(tokens)
        return words

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, special ones included."""
        ids: list[list[int]] = self.tokenizer([self.normalize_text(text) for text in texts], verbose=False)["input_ids"]
        return ids

    def _start(self) -> int:
        """How many special tokens come before the first word."""
        blank, word = self._ids(["", _PLACEHOLDER])
        differ = [one != other for one, other in zip(blank, word, strict=False)]
        return differ.index(True) if any(differ) else len(blank)

    def _tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids ``(T, C)`` of texts, cut where they are too long, and which are not padding."""
        tokens = self.tokenizer(
            [self.normalize_text(text) for text in texts],
            padding="max_length" if self.pads_to_max_length else "longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = self.logit_scale.device
        return tokens["input_ids"].to(device), tokens["attention_mask"].to(device)


class TransformersEncoder(TokenizedEncoder):
    """An image-text model of transformers behind our protocol.

    Args:
        model: such as ``transformers.CLIPModel``; kept as it is.
        image_tower: of ``model``.
        tokenizer: of transformers.
        image_processor: of transformers.
        checkpoint: the name it was loaded by.
    """

    model: Any

    def __init__(
        self, model: Any, image_tower: ImageTower, tokenizer: Any, image_processor: Any, checkpoint: str
    ) -> None:
        super().__init__()
        self.model = model
        self.image_tower = image_tower
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.preprocessing = as_preprocessing(image_processor)
        self.checkpoint = checkpoint

    @property
    def logit_scale(self) -> nn.Parameter:  # type: ignore[override]  # a view: the parameter stays the model's
        """``()`` or ``(1,)``, logarithm of the inverse temperature."""
        parameter: nn.Parameter = self.model.logit_scale
        return parameter

    def weights(self) -> dict[str, Tensor]:
        state = dict(self.model.state_dict()) if self.adapter is None else self.adapter.merged()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def save(self, directory: Path) -> None:
        save_transformers(directory, self.model.config, self.tokenizer, self.image_processor, self.weights())


def save_transformers(
    directory: Path, config: Any, tokenizer: Any, image_processor: Any, weights: Mapping[str, Tensor]
) -> None:
    """Write a folder that ``from_pretrained`` of transformers reads; a model of images has no tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet():
        for part in (config, tokenizer, image_processor):
            if part is not None:
                part.save_pretrained(directory)
    write_weights(directory / _WEIGHTS, weights, metadata={"format": "pt"})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting on the loading; what matters of it becomes an error."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_PROJECTIONS: Mapping[Role, str] = {
    "q": r"self_attn\.q_proj",
    "k": r"self_attn\.k_proj",
    "v": r"self_attn\.v_proj",
    "out": r"self_attn\.out_proj",
    "mlp": r"mlp\.fc[12]",
}


def projections(model: nn.Module, tower: str) -> dict[Role, list[str]]:
    """Names of the linear layers in the blocks of a tower, where the blocks are like those of CLIP.

    Args:
        model: holds the tower.
        tower: its name in ``model``.
    """
    names = [
        name.removesuffix(".base_layer")  # where an adapter is in place already
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{tower}.")
    ]
    return {
        role: [name for name in names if re.fullmatch(rf".*\.layers\.\d+\.{pattern}", name)]
        for role, pattern in _PROJECTIONS.items()
    }


def square_grid(vision_config: Any) -> tuple[int, int]:
    """Token grid of an image tower that was configured for square images."""
    side = int(vision_config.image_size) // int(vision_config.patch_size)
    return side, side


def check_image_size(folder: Path, image_processor: Any, vision_config: Any) -> None:
    """That the image processor makes images of the size the image tower was configured for.

    Raises:
        CheckpointError: it does not.
    """
    size, expected = as_preprocessing(image_processor).size, (int(vision_config.image_size),) * 2
    if size != expected:
        raise CheckpointError(
            f"the image processor in {folder} makes images of {size[0]}x{size[1]} pixels, and its image tower expects "
            f"{expected[0]}x{expected[1]}; are {_CONFIG} and preprocessor_config.json of one model?"
        )


def as_config(config_class: Any, settings: Mapping[str, Any], folder: Path) -> Any:
    """What `read_config` returned, with the defaults of its family.

    Raises:
        CheckpointError: values that the family does not know.
    """
    try:
        with _quiet():
            return config_class.from_dict(dict(settings))
    except Exception as error:  # transformers checks types by errors of its own
        raise CheckpointError(f"{folder / _CONFIG} is not a {config_class.__name__}: {error}") from error


def tiny_vocabulary(special: Sequence[str], end_of_word: str = "") -> dict[str, int]:
    """Special tokens, then all printable characters of ASCII, within a word and at its end."""
    letters = [chr(code) for code in range(33, 127)]
    inside = letters if end_of_word else []
    return {token: index for index, token in enumerate([*special, *inside, *(f"{c}{end_of_word}" for c in letters)])}


def from_state(model_class: Any, config: Any, state: Mapping[str, Tensor], **options: Any) -> Any:
    """A model of transformers in float32 and evaluation mode, made of tensors that are known to fit.

    Args:
        model_class: such as ``transformers.BertModel``.
        config: its configuration.
        state: all its tensors by name.
        options: of the class.
    """
    # Copies: tensors that are mapped from a file lie in memory as it has them, and are multiplied in another order.
    own = {name: tensor.clone() for name, tensor in state.items()}
    with _quiet():
        model = model_class.from_pretrained(None, config=config, state_dict=own, dtype=torch.float32, **options)
    return model.eval()
