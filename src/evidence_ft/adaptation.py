"""Which parts of an encoder are trained: whole towers, low-rank matrices beside their weights, or nothing.

Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) are PEFT's own, put into the library's model in place: what
is saved is a PEFT folder, and what is exported has them merged in. This is the only module that knows PEFT.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from evidence_ft.encoder import CheckpointError, DualEncoder, Encoder, Role, TowerName, write_weights
from evidence_ft.installation import explained

with explained("peft"):  # imports transformers, and that torchvision, which may not fit torch
    import peft
    from peft.tuners.lora import LoraLayer

Mode: TypeAlias = Literal["frozen", "full", "lora"]
"""What of a tower is trained: nothing, every parameter, or low-rank matrices beside its weights."""

Snapshot: TypeAlias = Mapping[str, Tensor]
"""What training may change, by name."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PeftModel's names for what is in the model it wraps


class LoraConfig(BaseModel):
    """Low-rank matrices: their size, and the layers they stand beside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(8, gt=0, description="of the matrices")
    alpha: float = Field(16.0, gt=0, description="what they add is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of their input, in training")
    targets: tuple[Role, ...] = Field(
        ("q", "v"), min_length=1, description="q, k, v, out (attention), mlp; towers with one qkv layer adapt all three"
    )


class Towers(NamedTuple):
    """What is trained of an encoder.

    Attributes:
        vision: the image tower.
        text: everything but the image tower and the logit scale and bias.
        train_logit_scale: whether the logit scale is trained, and the logit bias where there is one.
        lora: of towers in mode ``lora``.
    """

    vision: Mode
    text: Mode
    train_logit_scale: bool
    lora: LoraConfig | None = None


def adapt(encoder: Encoder, towers: Towers) -> None:
    """Decide what of the encoder is trained, and put low-rank matrices where they are wanted.

    Before an optimizer is built. The outputs stay as they are: the matrices add nothing yet. An encoder that carries
    them already keeps their values, if they are of the kind that is asked for.

    Raises:
        ValueError: mode ``lora`` without its settings, or with others than the encoder carries; a tower without the
            layers to adapt; mode ``full`` on a tower that carries low-rank matrices.
    """
    modes: dict[TowerName, Mode] = {"vision": towers.vision, "text": towers.text}
    adapted = [tower for tower, mode in modes.items() if mode == "lora"]
    if adapted:
        if towers.lora is None:
            raise ValueError(f"the {' and '.join(adapted)} tower is to be trained in mode 'lora': give its settings")
        encoder.split_attention()
        _put_in_place(encoder, _peft_config(encoder, adapted, towers.lora))
    low_rank = {id(parameter) for name, parameter in encoder.model.named_parameters() if ".lora_" in name}
    encoder.requires_grad_(False)
    for tower, mode in modes.items():
        for parameter in encoder.tower_parameters(tower):
            is_low_rank = id(parameter) in low_rank
            if is_low_rank and mode == "full":
                raise ValueError(
                    f"the {tower} tower carries low-rank matrices, which mode 'full' would train beside the weights; "
                    "save the encoder, which merges them, and load it again"
                )
            parameter.requires_grad_(mode == "full" or (mode == "lora" and is_low_rank))
    if isinstance(encoder, DualEncoder):
        encoder.logit_scale.requires_grad_(towers.train_logit_scale)
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(towers.train_logit_scale)


def is_adapted(encoder: Encoder) -> bool:
    """Whether the encoder carries low-rank matrices."""
    return encoder.adapter is not None


def save_adapter(encoder: Encoder, directory: Path) -> None:
    """Write the low-rank matrices as a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``).

    ``peft.PeftModel.from_pretrained`` loads it into the ``model`` of the encoder it was made from, after
    `Encoder.split_attention`.

    Raises:
        ValueError: the encoder carries none.
    """
    if not is_adapted(encoder):
        raise ValueError("this encoder carries no low-rank matrices to save; adapt it in mode 'lora' first")
    config = copy.copy(_config_in_place(encoder))
    config.inference_mode = True  # what PEFT writes: who loads a folder decides whether to train on
    config.save_pretrained(str(directory))
    state = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_state(encoder).items()}
    write_weights(directory / _WEIGHTS, state, metadata={"format": "pt"})


def load_adapter(encoder: Encoder, directory: Path) -> None:
    """Read a PEFT folder into the encoder it was made from, which may carry matrices of the same kind already.

    What is trained stays as it was, and is nothing in an encoder that carried none: `adapt` decides.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit the encoder in names or shapes.
    """
    for file in (_CONFIG, _WEIGHTS):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory} holds no {file}; expected a PEFT folder ({_CONFIG}, {_WEIGHTS})")
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(directory / _WEIGHTS).items()}
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be read as a PEFT folder: {error}; copy it again") from error
    if not isinstance(config, peft.LoraConfig):
        raise CheckpointError(f"{directory} holds an adapter of type {config.peft_type}; expected LORA")
    fresh = not is_adapted(encoder)
    encoder.split_attention()
    try:
        _put_in_place(encoder, config)
    except ValueError as error:
        raise CheckpointError(f"{directory} does not fit {encoder.checkpoint!r}: {error}") from error
    if fresh:
        encoder.requires_grad_(False)
    expected = {name: tensor.shape for name, tensor in _adapter_state(encoder).items()}
    complaints = [
        *(f"{name} is missing" for name in sorted(expected.keys() - state.keys())),
        *(f"{name} is not expected" for name in sorted(state.keys() - expected.keys())),
        *(
            f"{name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}"
            for name, shape in sorted(expected.items())
            if name in state and state[name].shape != shape
        ),
    ]
    if complaints:
        more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise CheckpointError(
            f"{directory} does not fit {encoder.checkpoint!r}: {'; '.join(complaints[:3])}{more}; "
            "was it made from another model?"
        )
    peft.set_peft_model_state_dict(encoder.model, state)


def snapshot(encoder: Encoder, head: nn.Module) -> Snapshot:
    """Copies of what training may change: parameters of the encoder that are trained, and all of the head."""
    return {name: tensor.detach().clone() for name, tensor in _changing(encoder, head).items()}


@torch.no_grad()
def interpolate(encoder: Encoder, head: nn.Module, start: Snapshot, share: float) -> None:
    """Go back part of the way to where training started, in place: ``(1 - share) start + share tuned``.

    WiSE-FT, equation 1 of Wortsman et al. 2022 (arXiv 2109.01903). Low-rank matrices are interpolated as what they
    amount to: a product that starts at zero is interpolated exactly by one of its factors.

    Args:
        encoder: tuned.
        head: tuned with it.
        start: their `snapshot` from before training.
        share: of the tuned weights; 1 changes nothing, 0 gives the start.

    Raises:
        ValueError: a share outside [0, 1], the snapshot of something else, or low-rank matrices that did not start
            at zero.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share of the tuned weights is {share}, expected 0 to 1")
    tuned = _changing(encoder, head)
    for name in sorted(tuned.keys() | start.keys()):
        if name not in start or name not in tuned or start[name].shape != tuned[name].shape:
            raise ValueError(
                f"{name} is not the same tensor at the start and now; take the snapshot when the method is prepared "
                "and has read its training set"
            )
        if ".lora_B." in name and start[name].any():
            raise ValueError(
                f"{name} was not zero when training started, and the sum of two low-rank products has no such factors; "
                "save the encoder, which merges them, and train from there"
            )
    for name, tensor in tuned.items():
        if tensor.is_floating_point() and ".lora_A." not in name:
            tensor.copy_(torch.lerp(start[name], tensor, share))


def _changing(encoder: Encoder, head: nn.Module) -> dict[str, Tensor]:
    trained = {f"encoder.{name}": value for name, value in encoder.named_parameters() if value.requires_grad}
    return trained | {f"head.{name}": value for name, value in head.state_dict().items()}


@dataclass(frozen=True)
class _LowRank:
    """PEFT's layers in a model."""

    model: nn.Module

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        state = dict(self.model.state_dict())
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer):
                for key in layer.state_dict(prefix=f"{name}."):
                    del state[key]
                alone = copy.deepcopy(layer)
                alone.merge()
                state.update(alone.get_base_layer().state_dict(prefix=f"{name}."))
        return state


def _peft_config(encoder: Encoder, adapted: Sequence[TowerName], lora: LoraConfig) -> Any:
    names: set[str] = set()
    for tower in adapted:
        projections = encoder.projections(tower)
        for role in lora.targets:
            if not projections[role]:
                known = ", ".join(sorted(role for role, found in projections.items() if found)) or "none"
                raise ValueError(
                    f"lora.targets: the {tower} tower of {encoder.checkpoint!r} has no {role!r} layers that can be "
                    f"adapted; found: {known}"
                )
            names.update(projections[role])
    # A pattern for whole names: of names in a list, PEFT also takes those that merely end so, and the text tower's
    # "transformer.resblocks.0" is how "visual.transformer.resblocks.0" ends.
    patterns = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names}
    return peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="|".join(sorted(patterns))
    )


def _put_in_place(encoder: Encoder, config: Any) -> None:
    """Inject the layers, unless they are there.

    Raises:
        ValueError: other ones are there, or the model has no layers to put them beside.
    """
    if is_adapted(encoder):
        for key in ("target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
            here, wanted = getattr(_config_in_place(encoder), key), getattr(config, key)
            if here != wanted:
                raise ValueError(
                    f"the encoder carries low-rank matrices with {key} = {here!r}, not {wanted!r}; save the encoder, "
                    "which merges them, and load it again"
                )
        return
    config.inference_mode = False
    peft.inject_adapter_in_model(config, encoder.model)
    for layer in encoder.model.modules():
        if isinstance(layer, LoraLayer):
            layer.train(layer.get_base_layer().training)  # new layers start in training mode, dropout included
    encoder.adapter = _LowRank(encoder.model)


def _config_in_place(encoder: Encoder) -> Any:
    configs: Any = encoder.model.peft_config
    return configs["default"]


def _adapter_state(encoder: Encoder) -> dict[str, Tensor]:
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(encoder.model, save_embedding_layers=False)
    return state
