"""A tuned classifier as a folder.

::

    evidence_ft.json                                what follows, and what is needed to use it: `Manifest`
    head.safetensors                                what the method adds to an encoder, if anything
    adapter_config.json, adapter_model.safetensors  LoRA in PEFT's format; or else
    <the backbone's own layout>                     the whole encoder, if weights of its own were trained

Frozen weights are not copied: they come from the base model, by its name, and another model under that name is refused.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from evidence_ft.adaptation import is_adapted, load_adapter, save_adapter
from evidence_ft.classifier import FineTuning
from evidence_ft.complaints import complaints, dotted
from evidence_ft.config import ConfigError, component
from evidence_ft.encoder import CheckpointError, DualEncoder, Encoder, write_weights
from evidence_ft.files import named, to_json, write_atomically
from evidence_ft.installation import explained
from evidence_ft.tower import Layers

MANIFEST_FILE, HEAD_FILE = "evidence_ft.json", "head.safetensors"

Prepare: TypeAlias = Callable[[Any, Sequence[str]], FineTuning]
"""A method without a module of its own: encoder and class names to what is trained."""


class BaseModelRef(NamedTuple):
    """Where an encoder came from, and how to tell that it is the same one.

    Attributes:
        backbone: name of the file in ``backbones`` that loads it, or the dotted path of a module.
        checkpoint: what that module loads it by; None for a model that was built in memory.
        sha256: of its weights before anything was trained, see `Encoder.fingerprint`.
    """

    backbone: str
    checkpoint: str | None
    sha256: str

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        """Describe an encoder as it is now; to be called before training."""
        return cls(encoder.backbone, encoder.checkpoint or None, encoder.fingerprint())

    def checked(self) -> Self:
        """This reference, without its name where that leads nowhere or to other weights.

        An encoder that was tuned before still has the name it was loaded by.
        """
        if self.checkpoint is None:
            return self
        try:
            with torch.random.fork_rng(devices=[]):
                found = component("backbones", self.backbone).load(self.checkpoint).fingerprint()
        except (CheckpointError, ConfigError):
            found = None
        return self if found == self.sha256 else self._replace(checkpoint=None)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRecord(_Record):
    """The model that was tuned: its name, None if it has none, and the SHA-256 of its weights."""

    checkpoint: str | None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Record):
    """What a saved folder is.

    Attributes:
        backbone: file in ``backbones`` that loads the encoder.
        base: the model that was tuned.
        encoder: what of the encoder is in the folder: nothing, its LoRA adapter, or all of it.
        logit_scale: of the encoder; part of neither adapter nor head. None where there is no text tower.
        logit_bias: likewise; None where the encoder has none.
        trained: parts that were trained: ``vision``, ``text``, ``logit_scale`` (and bias), ``head``.
        method: its settings, with its name.
        class_names: in the order of the logits.
        heatmap: file in ``heatmaps`` that predictions are explained by.
        layers: blocks it is made from.
        files: the other files of the folder; what is not listed was not written by `save_model`.
    """

    format_version: Literal[1] = 1
    backbone: str
    base: BaseRecord
    encoder: Literal["base", "adapter", "whole"]
    logit_scale: float | None
    logit_bias: float | None = None
    trained: tuple[str, ...]
    method: dict[str, Any]
    class_names: tuple[str, ...] = Field(min_length=1)
    heatmap: str
    layers: tuple[int, ...] | Literal["all"]
    files: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read and check ``evidence_ft.json``.

        Raises:
            CheckpointError: no such file, no JSON, another version, or unknown, missing or wrong keys.
        """
        path = directory / MANIFEST_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        except OSError as error:
            raise CheckpointError(
                f"{directory} holds no {MANIFEST_FILE}; expected a folder written by save_model; a plain encoder is "
                "loaded by its backbone, as in evidence_ft.backbones.open_clip.load"
            ) from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            for detail in error.errors():
                if detail["loc"] == ("format_version",):
                    raise CheckpointError(
                        f"{path} has format_version {detail['input']!r}, expected 1; load it with the version of "
                        "evidence-ft that wrote it"
                    ) from error
            raise CheckpointError(f"{path} is damaged: {'; '.join(complaints(error))}") from error


# Writing


def save_model(
    directory: Path,
    tuning: FineTuning,
    *,
    class_names: Sequence[str],
    method_config: BaseModel | Mapping[str, Any],
    base: BaseModelRef,
    heatmap: str = "gradient_attention",
    layers: Layers = "all",
) -> None:
    """Write a tuned model as a folder: there whole or not at all.

    The encoder is left out if it is still the base model, and saved as an adapter if LoRA is all that was trained of
    its towers. Otherwise all of it is written in its backbone's own layout, LoRA merged in, and the folder can also be
    loaded by the backbone's library. So it is where the base model has no name to load it by.

    Args:
        directory: replaced if it holds a saved model, refused if it holds anything else.
        tuning: as it is now.
        class_names: in the order of the logits.
        method_config: settings of the method; with ``name``, by which it is found again.
        base: described before training.
        heatmap: name of the file in ``heatmaps`` that predictions are explained by.
        layers: blocks it is made from.

    Raises:
        FileExistsError: the folder holds something else.
    """
    encoder = tuning.encoder
    dual = encoder if isinstance(encoder, DualEncoder) else None
    stored = _what_to_store(encoder, base)
    method = method_config.model_dump(mode="json") if isinstance(method_config, BaseModel) else dict(method_config)
    manifest = Manifest(
        backbone=base.backbone,
        base=BaseRecord(checkpoint=base.checkpoint, sha256=base.sha256),
        encoder=stored,
        logit_scale=None if dual is None else dual.logit_scale.item(),
        logit_bias=None if dual is None or dual.logit_bias is None else dual.logit_bias.item(),
        trained=tuple(_trained_parts(tuning)),
        method=method,
        class_names=tuple(class_names),
        heatmap=heatmap,
        layers=layers if layers == "all" else tuple(layers),
    )
    head = {name: tensor.detach().cpu().clone() for name, tensor in tuning.head.state_dict().items()}
    with whole_folder(directory) as folder:
        if stored == "whole":
            encoder.save(folder)
        elif stored == "adapter":
            save_adapter(encoder, folder)
        if head:
            write_weights(folder / HEAD_FILE, head)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        complete = manifest.model_copy(update={"files": files})
        write_atomically(folder / MANIFEST_FILE, to_json(complete.model_dump(mode="json")))


def _what_to_store(encoder: Encoder, base: BaseModelRef) -> Literal["base", "adapter", "whole"]:
    if base.checkpoint is None:
        return "whole"
    if is_adapted(encoder):
        return "whole" if _own_trained_weights(encoder) else "adapter"
    # The weights decide and not what was meant to be trained: nothing that has changed can be lost.
    return "base" if encoder.fingerprint() == base.sha256 else "whole"


def _own_trained_weights(encoder: Encoder) -> list[str]:
    """Trained parameters of the towers that an adapter does not hold."""
    scalars = (encoder.logit_scale, encoder.logit_bias) if isinstance(encoder, DualEncoder) else ()
    elsewhere = {id(parameter) for parameter in scalars}
    return [
        name
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad and id(parameter) not in elsewhere and "lora_" not in name
    ]


def _trained_parts(tuning: FineTuning) -> Iterator[str]:
    encoder = tuning.encoder
    parts: dict[str, list[nn.Parameter]] = {
        "vision": encoder.tower_parameters("vision"),
        "text": encoder.tower_parameters("text"),
        "logit_scale": [encoder.logit_scale] if isinstance(encoder, DualEncoder) else [],
        "head": list(tuning.head.parameters()),
    }
    for name, parameters in parts.items():
        if any(parameter.requires_grad for parameter in parameters):
            yield name


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``directory`` when all is written.

    Raises:
        FileExistsError: ``directory`` holds something that no earlier `save_model` wrote.
    """
    directory = directory.expanduser().resolve()
    put_back(directory)
    foreign = _foreign_files(directory) if directory.is_dir() else []
    if foreign or directory.is_file():
        raise FileExistsError(
            f"{directory} holds something other than a saved model ({named(foreign) if foreign else 'it is a file'}), "
            "which would be lost; choose another folder, or empty this one"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = _hidden(directory)
    for left in (temporary, replaced):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            directory.replace(replaced)
        try:
            temporary.replace(directory)
        except BaseException:
            put_back(directory)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_back(directory: Path) -> None:
    """Give a folder its name back if a process was killed just as it was being replaced, and it is all there is."""
    replaced = _hidden(directory)[1]
    if replaced.exists() and not directory.exists():
        replaced.replace(directory)


def _hidden(directory: Path) -> tuple[Path, Path]:
    """What is being written in a folder's place, and what it replaces."""
    return directory.with_name(f".{directory.name}.new"), directory.with_name(f".{directory.name}.old")


def _foreign_files(directory: Path) -> list[str]:
    """What is in a folder and not of a saved model."""
    try:
        ours = {MANIFEST_FILE, *Manifest.read(directory).files}
    except CheckpointError:
        ours = set()
    return sorted(path.name for path in directory.iterdir() if path.name not in ours)


# Reading


def load_tuning(
    directory: Path,
    *,
    base: str | None = None,
    method: ModuleType | Prepare | None = None,
    backbone: ModuleType | None = None,
) -> tuple[FineTuning, Manifest]:
    """Read a saved folder back: what was trained can be used, or trained on.

    Args:
        directory: written by `save_model`.
        base: where the base model is now, if its recorded name does not lead there.
        method: the module, or the function of encoder and class names, that prepares a method of your own. Modules
            that a folder names are imported only from this package.
        backbone: the module that loads models of a backbone of your own.

    Raises:
        CheckpointError: the folder is damaged, does not fit this version, or the base model is another one.
    """
    manifest = Manifest.read(directory)
    if lost := [name for name in manifest.files if name != HEAD_FILE and not (directory / name).exists()]:
        raise CheckpointError(
            f"{directory} lacks {named(lost)}, which its {MANIFEST_FILE} lists; copy the folder again"
        )
    prepare = _preparation(manifest, method, directory)
    backbone = backbone or _own_component("backbones", manifest.backbone, directory)
    with torch.random.fork_rng(devices=[]):  # what is drawn to start from is overwritten at once
        with explained(f"backbone {manifest.backbone}"):
            encoder = _load_encoder(directory, manifest, base, backbone)
        tuning = prepare(encoder, manifest.class_names)
    if manifest.encoder == "adapter":
        load_adapter(encoder, directory)
        if isinstance(encoder, DualEncoder) and manifest.logit_scale is not None:
            with torch.no_grad():
                encoder.logit_scale.fill_(manifest.logit_scale)
                if encoder.logit_bias is not None and manifest.logit_bias is not None:
                    encoder.logit_bias.fill_(manifest.logit_bias)
    _load_head(tuning.head, directory)
    return tuning, manifest


def _load_encoder(directory: Path, manifest: Manifest, base: str | None, backbone: ModuleType) -> Encoder:
    if manifest.encoder == "whole":
        whole: Encoder = backbone.load(str(directory.resolve()))
        return whole
    checkpoint = base or manifest.base.checkpoint
    try:
        encoder: Encoder = backbone.load(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory} was tuned from the base model {manifest.base.checkpoint!r}, which is not in it and could not "
            f"be loaded: {error}. If it is elsewhere, name it with base="
        ) from error
    found = encoder.fingerprint()
    if found != manifest.base.sha256:
        raise CheckpointError(
            f"base model {checkpoint!r} has SHA-256 {found[:12]}..., but {directory} was tuned from one with "
            f"{manifest.base.sha256[:12]}...; its weights are others than then; name the right one with base="
        )
    return encoder


def _preparation(manifest: Manifest, method: ModuleType | Prepare | None, directory: Path) -> Prepare:
    """The method with its settings, checked before any weights are loaded."""
    if method is None:
        method = _own_component("methods", str(manifest.method.get("name")), directory)
    if not isinstance(method, ModuleType):
        return method
    try:
        return partial(method.prepare, config=method.Config.model_validate(manifest.method))
    except ValidationError as error:
        found = complaints(error, key_of=lambda path: dotted(["method", *path]))
        raise CheckpointError(f"{directory / MANIFEST_FILE}: {'; '.join(found)}") from error


def _own_component(family: str, name: str, directory: Path) -> ModuleType:
    if "." in name:
        raise CheckpointError(
            f"{directory / MANIFEST_FILE} names {name!r}, which is not part of evidence_ft, and what a folder names is "
            f"not imported unseen; import it and hand it over with {family.removesuffix('s')}="
        )
    try:
        return component(family, name)
    except ConfigError as error:
        raise CheckpointError(f"{directory / MANIFEST_FILE}: {error}") from error


def _load_head(head: nn.Module, directory: Path) -> None:
    path = directory / HEAD_FILE
    expected = head.state_dict().keys()
    try:
        state = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy the folder again") from error
    if expected != state.keys():
        raise CheckpointError(
            f"{path} does not fit the method: missing: {named(sorted(expected - state.keys()))}; not expected: "
            f"{named(sorted(state.keys() - expected))}; copy the folder again, or load it by the version that wrote it"
        )
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the method: {error}") from error
