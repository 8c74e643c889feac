"""What the tests of methods share: a random batch, both losses on it, and a few steps of AdamW."""

from typing import NamedTuple

import torch
from torch import Tensor

from evidence_ft.alignments import outside_mass
from evidence_ft.classifier import FineTuning
from evidence_ft.encoder import DualEncoder
from evidence_ft.evidence import mask_to_grid
from evidence_ft.heatmaps import gradient_attention

NAMES = ["cat", "sea_lion", "dog"]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Annotated(NamedTuple):
    """Random images with their labels and masks."""

    images: Tensor
    labels: Tensor
    masks: Tensor


def random_batch(encoder: DualEncoder, seed: int = 5) -> Annotated:
    generator = torch.Generator().manual_seed(seed)
    height, width = encoder.preprocessing.size
    images = torch.randn(6, 3, height, width, generator=generator)
    masks = torch.zeros(6, height, width, dtype=torch.uint8)
    masks[:, : height // 2, : width // 2] = 1
    return Annotated(images, LABELS, masks)


def features_of(encoder: DualEncoder, images: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder.image_tower(images)


def read_training_set(tuning: FineTuning, batch: Annotated) -> None:
    if tuning.read_training_set is not None:
        tuning.read_training_set(features_of(tuning.encoder, batch.images), batch.labels)


def losses(tuning: FineTuning, batch: Annotated) -> tuple[Tensor, Tensor]:
    """The method's own loss and the share of the heatmap outside the mask, from one pass."""
    trace = tuning.encoder.image_tower.trace(batch.images)
    task, score = tuning.objective(trace.features, batch.labels)
    heatmaps = gradient_attention.heatmap(trace, score, create_graph=True)
    return task, outside_mass.loss(heatmaps, mask_to_grid(batch.masks, trace.grid)).mean()


def parameters(tuning: FineTuning) -> dict[str, torch.nn.Parameter]:
    """Every parameter, trained or not: those of the head under ``head.``, those of the encoder by their own names."""
    return {**dict(tuning.encoder.named_parameters()), **dict(tuning.head.named_parameters(prefix="head"))}


def trained(tuning: FineTuning) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in parameters(tuning).items() if parameter.requires_grad}


def snapshot(tuning: FineTuning) -> dict[str, Tensor]:
    """Every parameter and buffer as it is now."""
    state = {**tuning.encoder.state_dict(), **tuning.head.state_dict(prefix="head.")}
    return {name: tensor.clone() for name, tensor in state.items()}


def fit(tuning: FineTuning, batch: Annotated, *, steps: int, learning_rate: float = 1e-3) -> list[float]:
    """Steps of AdamW on both losses, with weight decay; the task loss before each."""
    optimizer = torch.optim.AdamW(trained(tuning).values(), lr=learning_rate, weight_decay=0.1)
    history = []
    for _ in range(steps):
        task, evidence = losses(tuning, batch)
        (task + evidence).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(task.item())
    return history


def fit_features(tuning: FineTuning, features: Tensor, labels: Tensor, *, steps: int, learning_rate: float) -> None:
    """Steps of Adam on given features: for methods that train nothing below them."""
    optimizer = torch.optim.Adam(trained(tuning).values(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        tuning.objective(features, labels)[0].backward()
        optimizer.step()


def clusters(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features ``(60, 10)`` of three classes that a plane can part, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 10, generator=generator)
    labels = torch.arange(60) % 3
    return centres[labels] + 0.1 * torch.randn(60, 10, generator=generator), labels


def accuracy(tuning: FineTuning, features: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (tuning.classifier().head(features).argmax(dim=1) == labels).float().mean().item()
