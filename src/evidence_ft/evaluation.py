"""A classifier and a data set to a table with one row per image. Knows no method and no model library."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from evidence_ft.backgrounds import SwappedBackgrounds
from evidence_ft.classifier import Classifier, Heatmap
from evidence_ft.evidence import checked_heatmaps, mask_to_grid, relevance_mass_accuracy
from evidence_ft.outcomes import Outcomes
from evidence_ft.tower import Layers
from evidence_ft.transforms import ModelInputs, collate
from evidence_ft.types import Batch


class _PerImage(NamedTuple):
    """What is known about each image of a batch, ``(B,)`` each."""

    rows: Tensor
    prediction: Tensor
    confidence: Tensor
    rma: Tensor
    mask_share: Tensor
    heatmap_mass: Tensor


@torch.no_grad()
def evaluate(
    classifier: Classifier,
    inputs: ModelInputs,
    heatmap: Heatmap,
    *,
    accelerator: Accelerator,
    layers: Layers = "all",
    explain: Literal["label", "prediction"] = "label",
    batch_size: int = 64,
    swap_seed: int = 0,
    split: str = "test",
    description: str = "evaluating",
) -> Outcomes:
    """Predict, explain and judge every image, then predict those with a mask again on another background.

    Args:
        classifier: what is evaluated; is moved to the accelerator's device and put into evaluation mode.
        inputs: test images, without augmentation.
        heatmap: the map it is judged by.
        accelerator: spreads the images over processes; every process receives the whole table.
        layers: blocks the heatmap is made from.
        explain: explain the score of the true class, as Wang et al. do, or of the predicted one.
        batch_size: images per process.
        swap_seed: decides which background goes to which object.
        split: named in the table.
        description: of the progress bar.
    """
    device = accelerator.device
    classifier.tower.eval().to(device)
    classifier.head.eval().to(device)

    def judge(batch: Batch) -> _PerImage:
        trace = classifier.tower.trace(batch.images, layers)
        with torch.autocast(device.type, enabled=False):
            probabilities = classifier.head(trace.features).softmax(dim=-1)
            confidence, prediction = probabilities.max(dim=-1)
            explained = batch.labels if explain == "label" else prediction
            found = heatmap(trace, classifier.score_of(explained), create_graph=False)
            heatmaps = checked_heatmaps(found, len(batch.labels), trace.grid)
            masks = mask_to_grid(batch.masks, trace.grid)
            uniform = torch.ones_like(heatmaps)
            return _PerImage(
                batch.rows,
                prediction,
                confidence,
                relevance_mass_accuracy(heatmaps, masks),
                relevance_mass_accuracy(uniform, masks),
                heatmaps.sum(dim=(1, 2)),
            )

    def predict(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.rows, classifier.head(classifier.tower(batch.images)).argmax(dim=-1)

    judged = _PerImage(*_over(inputs, judge, accelerator, batch_size, description))
    order = _each_once(judged.rows, len(inputs))
    dataset = inputs.dataset
    swapped_prediction: list[int | None] = [None] * len(dataset)
    swapped = SwappedBackgrounds(dataset, seed=swap_seed)
    if len(swapped):
        rows, predictions = _over(
            ModelInputs(swapped, inputs.transform, seed=0),
            predict,
            accelerator,
            batch_size,
            f"{description}, swapped",
        )
        in_order = predictions[_each_once(rows, len(swapped))]
        for row, prediction in zip(swapped.rows, in_order.tolist(), strict=True):
            swapped_prediction[row] = prediction
    columns = {name: values[order] for name, values in judged._asdict().items() if name != "rows"}
    return Outcomes.from_columns(
        sample_id=list(dataset.sample_ids),
        label=list(dataset.labels),
        mask_source=list(dataset.mask_sources),
        swapped_prediction=swapped_prediction,
        class_names=list(dataset.class_names),
        split=split,
        **columns,
    )


def _over(
    inputs: ModelInputs,
    function: Callable[[Batch], Sequence[Tensor]],
    accelerator: Accelerator,
    batch_size: int,
    description: str,
) -> list[Tensor]:
    """``function`` over all images, its outputs gathered over processes without the padding, on the CPU."""
    loader = accelerator.prepare(DataLoader(inputs, batch_size=batch_size, collate_fn=collate))
    parts: list[Sequence[Tensor]] = []
    for batch in tqdm(loader, desc=description, disable=not accelerator.is_main_process, leave=False):
        gathered = accelerator.gather_for_metrics(tuple(function(batch)))
        parts.append([values.cpu() for values in gathered])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _each_once(rows: Tensor, images: int) -> Tensor:
    """The order that sorts gathered results by row. Results are never joined by position."""
    order = rows.argsort()
    if not torch.equal(rows[order], torch.arange(images)):
        missing = sorted(set(range(images)) - set(rows.tolist()))
        raise RuntimeError(f"of {images} rows, {len(rows)} were gathered; missing: {missing[:10]}")
    return order


class Panel(NamedTuple):
    """A few images with their heatmaps, for people to look at.

    Attributes:
        rows: ``(G,)`` int64, rows of the data set.
        images: ``(G, 3, Hpx, Wpx)`` float32, as the model sees them.
        masks: ``(G, Hpx, Wpx)`` uint8.
        heatmaps: ``(G, h, w)`` float32.
    """

    rows: Tensor
    images: Tensor
    masks: Tensor
    heatmaps: Tensor


@torch.no_grad()
def explain_panel(
    classifier: Classifier,
    inputs: ModelInputs,
    heatmap: Heatmap,
    rows: Sequence[int],
    *,
    layers: Layers = "all",
    explain: Literal["label", "prediction"] = "label",
) -> Panel:
    """Heatmaps of a few images, on this process alone.

    Args:
        classifier: what is explained.
        inputs: test images, without augmentation.
        heatmap: the map to draw.
        rows: images to explain.
        layers: blocks the heatmap is made from.
        explain: explain the true class or the predicted one.
    """
    device = next(classifier.tower.parameters()).device
    batch = collate([inputs[row] for row in rows])
    trace = classifier.tower.trace(batch.images.to(device), layers)
    explained = batch.labels.to(device) if explain == "label" else classifier.head(trace.features).argmax(dim=-1)
    found = heatmap(trace, classifier.score_of(explained), create_graph=False)
    heatmaps = checked_heatmaps(found, len(rows), trace.grid)
    return Panel(batch.rows, batch.images, batch.masks, heatmaps.float().cpu())


def choose_panel(labels: Sequence[int], size: int) -> list[int]:
    """Rows for a panel: classes in turn, the first images of each.

    Example:
        >>> choose_panel([0, 0, 0, 1, 1, 2], size=4)
        [0, 1, 3, 5]
    """
    seen: dict[int, int] = {}
    ranked = []
    for row, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        ranked.append((seen[label], label, row))
    return sorted(row for _, _, row in sorted(ranked)[:size])
