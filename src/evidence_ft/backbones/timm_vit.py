"""Vision transformers of timm with a linear head: supervised ones, and self-supervised ones without any head.

The model stays timm's own, its head included: features are what the head reads, and the head is `Encoder.own_head`.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from evidence_ft.encoder import CheckpointError, Encoder, OwnHead, Role, TowerName, unreachable, write_weights
from evidence_ft.timm_tower import TimmTower
from evidence_ft.tower import UnsupportedTowerError, check_tower
from evidence_ft.types import Preprocessing

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

_NAMES: Mapping[Role, str] = {
    "q": r"blocks\.\d+\.attn\.(q_proj|qkv)",
    "k": r"blocks\.\d+\.attn\.(k_proj|qkv)",
    "v": r"blocks\.\d+\.attn\.(v_proj|qkv)",
    "out": r"blocks\.\d+\.attn\.proj",
    "mlp": r"blocks\.\d+\.mlp\.(fc1|fc1_g|fc1_x|fc2)",
}
"""What linear layers are called in timm's vision transformers."""

_RECORDED = (
    "tag", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes",
    "label_names", "label_descriptions", "first_conv", "classifier", "license",
)  # fmt: skip
"""What of timm's ``pretrained_cfg`` describes a model, wherever its weights came from."""


READS_TEXT = False
"""Told without loading weights, which takes time; backbones that do not say so have a text tower."""


def load(checkpoint: str) -> Encoder:
    """Load a vision transformer and check that it can be explained.

    Args:
        checkpoint: ``hf-hub:<owner>/<name>``, ``local-dir:<folder>`` or a folder in timm's hub layout;
            ``timm:<name>`` for weights that timm knows, such as ``timm:vit_base_patch16_224.augreg_in21k_ft_in1k``; or
            ``<architecture>/<file>.safetensors``, whose images are prepared as timm does for that architecture.

    Raises:
        CheckpointError: unknown name, missing or damaged files, weights that do not fit.
        UnsupportedTowerError: the model cannot be explained.
    """
    model_args: dict[str, Any] = {}
    if checkpoint.startswith("timm:"):
        model = _published(checkpoint.removeprefix("timm:"))
    elif checkpoint.startswith(("hf-hub:", "local-dir:")) or Path(checkpoint).expanduser().is_dir():
        model, model_args = _from_folder(_folder(checkpoint))
    else:
        model = _from_file(checkpoint)
    encoder = TimmVitEncoder(model.float(), model_args, checkpoint).eval()
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    return encoder


def tiny(directory: Path) -> str:
    """Write a tiny random model into a folder, and say by which name `load` finds it."""
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = _built("vit_tiny_patch16_224", {}, num_classes=5, **options)
        nn.init.normal_(model.head.weight, std=0.1)  # timm starts it at zero, which no heatmap can see through
    model.pretrained_cfg |= {
        "input_size": (3, 32, 48),
        "label_names": ["cat", "dog", "sea lion", "red_circle", "tench, Tinca tinca"],
        "tag": "tiny",
    }
    TimmVitEncoder(model, options, "tiny").save(directory)
    return f"local-dir:{directory}"


def _published(name: str) -> Any:
    architecture, _, tag = name.partition(".")
    _check_architecture(architecture)
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    if name not in known and (tag or not known):
        raise CheckpointError(
            f"timm knows no weights {tag!r} for {architecture}: there are {', '.join(known[:5]) or 'none'}; name a "
            f"file as '{architecture}/<file>.safetensors'"
        )
    try:
        with _quiet():
            return timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub client, the network or the file system came up with
        raise CheckpointError(
            f"could not load {name!r}: {type(error).__name__}: {error}. Without network, download the model elsewhere "
            "and name its folder as 'local-dir:<folder>'"
        ) from error


def _folder(checkpoint: str) -> Path:
    if checkpoint.startswith("hf-hub:"):
        name = checkpoint.removeprefix("hf-hub:")
        try:
            return Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS]))
        except Exception as error:  # whatever the hub client, the network or the file system came up with
            raise unreachable(checkpoint, error) from error
    return Path(checkpoint.removeprefix("local-dir:")).expanduser()


def _from_folder(folder: Path) -> tuple[Any, dict[str, Any]]:
    path = folder / _CONFIG
    for file in (path, folder / _WEIGHTS):
        if not file.is_file():
            raise CheckpointError(
                f"{folder} holds no {file.name}; expected a folder in timm's hub layout ({_CONFIG}, {_WEIGHTS})"
            )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if "architecture" not in config and "model_type" in config:
            raise CheckpointError(
                f"{folder} holds a model of transformers ({config['model_type']}), not one of timm; load it by "
                "backbone 'hf_vit', or the one for its family"
            )
        settings = dict(config.get("pretrained_cfg", config))
        settings |= {key: config[key] for key in ("label_names", "label_descriptions") if key in config}
        model_args = dict(config.get("model_args") or {})
        architecture, num_classes = config["architecture"], config.get("num_classes", settings.get("num_classes"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not timm's JSON with an 'architecture': {error!r}") from error
    _check_architecture(architecture)
    try:
        model = _built(architecture, settings, **{"num_classes": num_classes, **model_args})
    except Exception as error:  # any argument that this version of timm does not take
        raise CheckpointError(f"{path} describes no model that timm {timm.__version__} builds: {error}") from error
    _load_strictly(model, folder / _WEIGHTS)
    said, built = config.get("global_pool"), getattr(model, "global_pool", None)
    if said and said != built:
        raise CheckpointError(
            f"{path} says global_pool = {said!r}, but {architecture} is built with {built!r}; add it to "
            "model_args there"
        )
    return model, model_args


def _from_file(checkpoint: str) -> Any:
    architecture, _, file = checkpoint.partition("/")
    path = Path(file).expanduser()
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"no model {checkpoint!r}; expected 'timm:<name>', 'hf-hub:<owner>/<name>', 'local-dir:<folder>', or "
            "'<architecture>/<file>.safetensors'"
        )
    _check_architecture(architecture.partition(".")[0])
    if not path.is_file():
        raise CheckpointError(f"no file {path}, named for {architecture}")
    head = _read(path).get("head.weight")
    model = _built(architecture, {}, num_classes=0 if head is None else len(head))
    _load_strictly(model, path)
    return model


def _check_architecture(name: Any) -> None:
    if not isinstance(name, str) or not timm.is_model(name):
        near = get_close_matches(str(name), timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CheckpointError(f"timm {timm.__version__} knows no architecture {name!r}{hint}")


def _built(architecture: str, settings: Mapping[str, Any], **model_args: Any) -> Any:
    """A model with random weights."""
    with _quiet():
        # The tag of an architecture's first weights says nothing of others.
        overlay = {"tag": architecture.partition(".")[2], **_described(settings)}
        return timm.create_model(architecture, pretrained=False, pretrained_cfg_overlay=overlay, **model_args)


def _described(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in _RECORDED if settings.get(key)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy or download it again") from error


def _load_strictly(model: nn.Module, path: Path) -> None:
    """The loading of timm itself resizes position embeddings, and takes other layouts, without a word."""
    state, expected = _read(path), model.state_dict()
    complaints = [
        *(f"{name} is missing" for name in sorted(expected.keys() - state.keys())),
        *(f"{name} is not expected" for name in sorted(state.keys() - expected.keys())),
        *(
            f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in sorted(expected.items())
            if name in state and state[name].shape != tensor.shape
        ),
    ]
    if complaints:
        more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(complaints[:3])}{more}; expected weights of this architecture "
            "and resolution in timm's own layout"
        )
    model.load_state_dict(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep timm from reporting on the loading."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class TimmVitEncoder(Encoder):
    """A vision transformer of timm behind our protocol.

    Args:
        model: kept as it is, with its head.
        model_args: what it was built with beside its architecture, written beside saved weights.
        checkpoint: the name it was loaded by.

    Raises:
        UnsupportedTowerError: no vision transformer with at most one linear head.
        CheckpointError: images are prepared in a way that the joint image-and-mask transform does not know.
    """

    backbone = "timm_vit"
    model: Any

    def __init__(self, model: Any, model_args: Mapping[str, Any], checkpoint: str) -> None:
        super().__init__()
        head = getattr(model, "head", None)
        if isinstance(model, VisionTransformerDistilled) or not isinstance(head, nn.Linear | nn.Identity):
            raise UnsupportedTowerError(
                f"{type(model).__name__} with head {type(head).__name__} is not supported; expected one of timm's "
                "vision transformers with one linear head, or none"
            )
        self.model = model
        self.model_args = dict(model_args)
        self.checkpoint = checkpoint
        self.image_tower = TimmTower(model, nn.Identity(), pre_logits=True)
        self.preprocessing = _preprocessing(model)

    @property
    def own_head(self) -> OwnHead | None:
        head = self.model.head
        if isinstance(head, nn.Identity):
            return None
        bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
        return OwnHead(head.weight, bias, _class_names(self.model.pretrained_cfg, len(head.weight)))

    def split_attention(self) -> None:
        pass  # timm's are linear layers already

    def projections(self, tower: TowerName) -> Mapping[Role, Sequence[str]]:
        found: dict[Role, list[str]] = {role: [] for role in _NAMES}
        if tower == "text":
            return found
        for full_name, module in self.model.named_modules():
            name = full_name.removesuffix(".base_layer")  # where an adapter is in place already
            if not isinstance(module, nn.Linear):
                continue
            parent, _, own_name = name.rpartition(".")
            if own_name == "qkv" and self.model.get_submodule(parent)._parameters.get("q_bias") is not None:
                continue  # timm's BEiT and EVA read this layer's weights and never call it: an adapter would be inert
            for role, pattern in _NAMES.items():
                if re.fullmatch(pattern, name):
                    found[role].append(name)
        return found

    def weights(self) -> dict[str, Tensor]:
        state = dict(self.model.state_dict()) if self.adapter is None else self.adapter.merged()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        settings = _described(self.model.pretrained_cfg)
        labels: dict[str, Any] = {
            key: settings.pop(key) for key in ("label_names", "label_descriptions") if key in settings
        }
        config: dict[str, Any] = {
            "architecture": self.model.pretrained_cfg["architecture"],
            "num_classes": self.model.num_classes,
            "num_features": self.model.num_features,
            "global_pool": self.model.global_pool,
            **labels,
            "model_args": self.model_args,
            "pretrained_cfg": settings | {"num_classes": self.model.num_classes, "custom_load": False},
        }
        (directory / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        write_weights(directory / _WEIGHTS, self.weights(), metadata={"format": "pt"})


def _preprocessing(model: Any) -> Preprocessing:
    settings = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    rows, columns = size = tuple(model.patch_embed.img_size)
    modes = {"center": "shortest", "squash": "squash"}
    for complaint in (
        f"crop_mode is {settings['crop_mode']!r}" if settings["crop_mode"] not in modes else "",
        f"interpolation is {settings['interpolation']!r}"
        if settings["interpolation"] not in ("bicubic", "bilinear", "nearest")
        else "",
        f"they have {settings['input_size'][0]} channels" if settings["input_size"][0] != 3 else "",
    ):
        if complaint:
            raise CheckpointError(
                f"images of this model are prepared in a way that is not supported: {complaint}; expected 3 channels, "
                "resized by bicubic, bilinear or nearest interpolation, with crop_mode 'center' or 'squash'"
            )
    share = settings["crop_pct"]
    return Preprocessing(
        size=size,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        resize_mode=modes[settings["crop_mode"]],  # type: ignore[arg-type]
        resized=(int(rows / share), int(columns / share)),  # as timm rounds
    )


def _class_names(settings: Mapping[str, Any], classes: int) -> tuple[str, ...] | None:
    """Names of the classes as the checkpoint gives them, with descriptions and ids as synonyms; of ImageNet by its tag.

    The number of classes alone would not do: a thousand birds are not ImageNet.
    """
    names, descriptions = settings.get("label_names"), settings.get("label_descriptions") or {}
    if names is None and classes == 1000 and str(settings.get("tag")).endswith("in1k"):
        imagenet = ImageNetInfo()
        names, descriptions = imagenet.label_names(), imagenet.label_descriptions(as_dict=True)
    if isinstance(names, Mapping):
        names = [names.get(str(row), names.get(row, "")) for row in range(classes)]
    if names is None or len(names) != classes:
        return None
    return tuple(f"{descriptions[name]}, {name}" if name in descriptions else str(name) for name in names)
