"""What every method starts from: an image tower, with a text tower in a joint space or with a head of its own."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evidence_ft.installation import offline_switch, one_line
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


def unreachable(checkpoint: str, error: Exception) -> CheckpointError:
    """What to say where the hub does not hand out a model.

    Args:
        checkpoint: the hub id, as it was asked for.
        error: whatever the hub client, the network or the file system came up with.
    """
    reason = one_line(error).rstrip(".")
    if isinstance(error, OSError) and (switch := offline_switch()):
        reason = f"{switch} is set, and the cache does not hold it ({type(error).__name__}); unset it to ask the hub"
    return CheckpointError(
        f"could not reach {checkpoint!r}: {reason}. Without network, download the model elsewhere and name its folder "
        "as 'local-dir:<folder>'; evidence-ft doctor shows where models are kept"
    )


class Adapter(Protocol):
    """Low-rank matrices that an encoder's model carries beside its weights."""

    def merged(self) -> dict[str, Tensor]:
        """The state of the model as it would be without the adapter, with equal outputs."""


class OwnHead(NamedTuple):
    """The linear classifier that a model comes with, on the features as they are.

    Attributes:
        weight: ``(K, F)``, the model's own parameter.
        bias: ``(K,)``, likewise; zeros where it has none.
        class_names: of the rows; synonyms are separated by commas, as in ImageNet's ``tench, Tinca tinca``. None where
            the checkpoint does not name them.
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...] | None

    def of(self, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Weight ``(len(class_names), F)`` and bias of some classes, whatever their case and underscores.

        Raises:
            ValueError: a class that the head does not know, or a name that it has twice.
        """
        if self.class_names is None:
            raise ValueError(
                f"the model's own head has {len(self.weight)} classes, but its checkpoint does not name them"
            )
        rows = _rows_of(class_names, self.class_names)
        if missing := [name for name, found in zip(class_names, rows, strict=True) if not found]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"the model's own head has no class named {', '.join(map(repr, missing[:5]))}{more} among its "
                f"{len(self.class_names)} ({', '.join(map(repr, self.class_names[:3]))}, ...); name the classes as it "
                "does"
            )
        for name, found in zip(class_names, rows, strict=True):
            if len(found) > 1:
                raise ValueError(
                    f"{name!r} names {len(found)} classes of the model's own head: "
                    f"{', '.join(repr(self.class_names[row]) for row in found)}; give the whole name of one"
                )
        chosen = torch.tensor([found[0] for found in rows], device=self.weight.device)
        return self.weight[chosen], self.bias[chosen]


def _rows_of(names: Sequence[str], class_names: Sequence[str]) -> list[list[int]]:
    """For each name the rows whose whole name it is, or else those that have it among their synonyms."""
    whole, synonyms = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for row, class_name in enumerate(class_names):
        whole[_folded(class_name)].append(row)
        for synonym in {_folded(part) for part in class_name.split(",")}:
            synonyms[synonym].append(row)
    return [whole[name] or synonyms[name] for name in map(_folded, names)]


def _folded(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


class Encoder(nn.Module, ABC):
    """A model of images. A backbone fills in the declarations below.

    Attributes:
        model: the library's own model, which holds all parameters.
        image_tower: the part that is explained; its parameters are the model's.
        preprocessing: what the model expects of its images.
        checkpoint: the name it was loaded by.
        backbone: the file in ``backbones/`` that loads it.
        adapter: low-rank matrices in ``model``, where there are any.
        own_head: the classifier it was trained with, where it has one.
    """

    model: nn.Module
    image_tower: ImageTower
    preprocessing: Preprocessing
    checkpoint: str
    backbone: str
    adapter: Adapter | None = None

    @property
    def own_head(self) -> OwnHead | None:
        return None

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
        """Write `weights` (safetensors), configuration and whatever else loading needs in the library's own layout."""

    def fingerprint(self) -> str:
        """SHA-256 over names and values of `weights`, as they are now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights().items()):
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
        return digest.hexdigest()

    def tower_parameters(self, tower: TowerName) -> list[nn.Parameter]:
        """Parameters of the image tower without the model's own head; of a text tower, which there may not be."""
        if tower == "text":
            return []
        head = self.own_head
        own = {id(tensor) for tensor in (head.weight, head.bias)} if head else set()
        return [parameter for parameter in self.image_tower.parameters() if id(parameter) not in own]

    def constrain(self) -> None:
        """Bring what is trained back to where it may be; called after each optimizer step."""


class DualEncoder(Encoder):
    """An image-text model. A backbone fills in the declarations below.

    Attributes:
        logit_scale: ``()`` or ``(1,)`` parameter, logarithm of the inverse temperature.
        logit_bias: parameter of the same shape that a model trained by the sigmoid loss adds to its logits; else None.
    """

    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None = None

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

    def tower_parameters(self, tower: TowerName) -> list[nn.Parameter]:
        """Parameters of the image tower, or all others but the logit scale and bias."""
        vision = list(self.image_tower.parameters())
        if tower == "vision":
            return vision
        known = {id(parameter) for parameter in (*vision, self.logit_scale, self.logit_bias)}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in known]

    def constrain(self) -> None:
        """Bring a trained logit scale back to at most `MAX_LOGIT_SCALE`; called after each optimizer step.

        Models of the sigmoid loss know no such limit: published ones stand at 110 to 120.
        """
        if self.logit_scale.requires_grad and self.logit_bias is None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def with_text(encoder: Encoder, needed_by: str) -> DualEncoder:
    """The encoder, where it has a text tower.

    Args:
        encoder: any.
        needed_by: what reads texts, as a user knows it.

    Raises:
        ValueError: it has none.
    """
    if isinstance(encoder, DualEncoder):
        return encoder
    starts = "'own' (the model's own classifier) or 'random'" if encoder.own_head else "'random'"
    raise ValueError(
        f"{needed_by} needs a text tower, which backbone {encoder.backbone!r} ({encoder.checkpoint}) does not have; "
        f"choose method lp, lp_ft, ft, or lora with objective 'ft', each with head = {starts}"
    )


def context_length(context: Tensor, names: int, width: int) -> int:
    """How many tokens a context for a number of names has; see `DualEncoder.encode_with_context`.

    Raises:
        ValueError: neither ``(L, width)`` nor ``(names, L, width)``.
    """
    length = context.shape[-2] if context.ndim > 1 else 0
    if context.shape not in ((length, width), (names, length, width)):
        raise ValueError(
            f"context has shape {tuple(context.shape)}, expected (L, {width}) or "
            f"({names}, L, {width}) for {names} names"
        )
    return length


@contextmanager
def context_in_place(embedding: nn.Embedding, start: int, context: Tensor) -> Iterator[None]:
    """While open, embedded tokens ``(T, C, W)`` are those of a context, from the place ``start`` on."""

    def put_context(_module: nn.Module, _args: object, embedded: Tensor) -> Tensor:
        words = context.to(embedded).expand(len(embedded), -1, -1)
        return torch.cat((embedded[:, :start], words, embedded[:, start + words.shape[1] :]), dim=1)

    hook = embedding.register_forward_hook(put_context)
    try:
        yield
    finally:
        hook.remove()


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))
    temporary.chmod(mode)  # safetensors leaves it to its owner alone, unlike the files beside it
    temporary.replace(path)
