"""Data sets of other libraries as ours: Hugging Face `datasets`, and torchvision's or any map-style data set of torch.

Neither library is imported: a data set is known by what it offers. `datasets` is not installed with this package; who
has such data sets has it (``pip install datasets``). Images are opened row by row; labels, and which
rows have a mask, are read once when the data set is wrapped.

This module knows nothing of models or training.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from evidence_ft.images import DataError, MaskArray, to_grey, to_rgb
from evidence_ft.samples import EvidenceDataset, Sample, nearest_name
from evidence_ft.types import BACKGROUND, OBJECT, MaskSource


class MaskReading(NamedTuple):
    """How the values of a mask are understood.

    Attributes:
        threshold: share of white from which a pixel is object, in (0, 1]; white is 255 in an 8-bit image, 65535 in a
            16-bit one, and 1 in a mask of numbers.
        object_values: values that mark the object, such as ``(1,)`` for class ids or ``(1, 3)`` for a trimap; these
            replace the threshold.
    """

    threshold: float = 0.5
    object_values: Collection[int] | None = None


def from_huggingface(
    dataset: Any,
    *,
    image: str = "image",
    label: str = "label",
    mask: str | None = "mask",
    sample_id: str | None = None,
    class_names: Sequence[str] | None = None,
    mask_threshold: float = 0.5,
    object_values: Collection[int] | None = None,
) -> EvidenceDataset:
    """One split of a Hugging Face ``datasets.Dataset`` as a data set with evidence.

    Args:
        dataset: not streamed, since its length and labels must be known.
        image: column of images.
        label: column of classes: a ``ClassLabel``, names, or whole numbers.
        mask: column of masks, None in rows without one; None where nothing is annotated.
        sample_id: column of stable, unique names; without it, rows are named by their number.
        class_names: in the order of the labels; needed where labels are bare numbers.
        mask_threshold: see `MaskReading`.
        object_values: see `MaskReading`.

    Raises:
        DataError: it is a dictionary of splits or a stream, a column is missing, or labels have no names.

    Example:
        Trimaps of the Oxford pets, where 1 is the animal, 2 the background and 3 its edge::

            from_huggingface(load_dataset("my/pets", split="train"), mask="trimap", object_values=(1, 3))
    """
    if isinstance(dataset, Mapping):
        raise DataError(f"found a dictionary of splits ({_listed(dataset)}); expected one of them; pass one")
    if not isinstance(dataset, _Table):
        raise DataError(
            f"found {type(dataset).__name__}, expected a datasets.Dataset that is not streamed; load it without "
            "streaming=True"
        )
    columns = {"image": image, "label": label, "mask": mask, "sample_id": sample_id}
    for argument, column in columns.items():
        if column is not None and column not in dataset.column_names:
            raise DataError(_no_column(argument, column, dataset.column_names))
    used = [column for column in columns.values() if column is not None]
    # Another format (torch, numpy) would hand out arrays in place of images.
    table = dataset.select_columns(list(dict.fromkeys(used))).with_format(None)
    names, labels = _labels(list(table[label]), getattr(table.features[label], "names", None), class_names, label)
    ids = [str(value) for value in table[sample_id]] if sample_id else [str(row) for row in range(len(table))]
    annotated = [False] * len(table) if mask is None else _has_value(table, mask)
    return _HuggingFaceDataset(
        table, names, ids, labels, annotated, image, mask, MaskReading(mask_threshold, object_values)
    )


def from_torchvision(
    dataset: Any,
    *,
    label: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    class_names: Sequence[str] | None = None,
    mask_threshold: float = 0.5,
    object_values: Collection[int] | None = None,
) -> EvidenceDataset:
    """A data set whose items are ``(image, target)``, as torchvision's are, as a data set with evidence.

    Targets that hold more than a class are read once, all of them, to learn labels and which images have a mask.

    Args:
        dataset: without transforms, so that an image and its mask can be brought to the model's size together.
        label: target to class; by default the target itself, or the first of a pair.
        mask: target to mask, or to None where there is none; by default the second of a pair.
        class_names: in the order of the labels; by default what the data set calls ``classes`` or ``categories``.
        mask_threshold: see `MaskReading`.
        object_values: see `MaskReading`.

    Raises:
        DataError: classes have no names, or targets are not what was expected.

    Example:
        Trimaps of the Oxford pets, where 1 is the animal, 2 the background and 3 its edge::

            pets = OxfordIIITPet("data", target_types=["category", "segmentation"])
            from_torchvision(pets, object_values=(1, 3))
    """
    if len(dataset) == 0:
        raise DataError(f"{type(dataset).__name__} has no images; check its split and its folder")
    names = class_names if class_names is not None else _declared_names(dataset)
    labels = _plain_targets(dataset) if label is None and mask is None else None
    label, mask = label or _label_of_target, mask or _mask_of_target
    annotated = [False] * len(dataset)
    if labels is None:
        labels = []
        for row in range(len(dataset)):
            _, target = dataset[row]
            labels.append(label(target))
            annotated[row] = mask(target) is not None
    names, rows = _labels(labels, names, class_names, "the targets")
    ids = [str(row) for row in range(len(dataset))]
    return _TorchvisionDataset(dataset, names, ids, rows, annotated, mask, MaskReading(mask_threshold, object_values))


def as_evidence_dataset(dataset: Any) -> EvidenceDataset:
    """A data set of ours as it is; a Hugging Face or torch one wrapped with default settings.

    Raises:
        DataError: the settings do not fit the data set.
        TypeError: it is none of these.
    """
    if isinstance(dataset, _Ours):
        return dataset
    if isinstance(dataset, _Table | Mapping):
        return from_huggingface(dataset)
    if isinstance(dataset, torch.utils.data.Dataset) and not isinstance(dataset, torch.utils.data.IterableDataset):
        return from_torchvision(dataset)
    raise TypeError(
        f"found a data set of type {type(dataset).__name__}; expected an EvidenceDataset (class_names, sample_ids, "
        "labels, mask_sources, rows), a datasets.Dataset, or a map-style torch data set of (image, target)"
    )


@runtime_checkable
class _Ours(EvidenceDataset, Protocol):
    """The protocol, to be asked for."""


@runtime_checkable
class _Table(Protocol):
    """What of ``datasets.Dataset`` is used; a stream has no length."""

    @property
    def column_names(self) -> list[str]: ...
    @property
    def features(self) -> Mapping[str, Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def select_columns(self, column_names: list[str]) -> Any: ...
    def with_format(self, type: str | None) -> Any: ...
    def cast_column(self, column: str, feature: Any) -> Any: ...


class _Wrapped:
    """What all rows have in common, whoever opens them."""

    def __init__(
        self, class_names: Sequence[str], sample_ids: Sequence[str], labels: Sequence[int], annotated: Sequence[bool]
    ) -> None:
        self.class_names = tuple(class_names)
        self.sample_ids = tuple(sample_ids)
        self.labels = tuple(labels)
        self.mask_sources: tuple[MaskSource, ...] = tuple("mask" if has_mask else "none" for has_mask in annotated)

    def __len__(self) -> int:
        return len(self.labels)

    def _sample(self, row: int, image: Any, mask: Any, reading: MaskReading) -> Sample:
        where = f"sample {self.sample_ids[row]!r}"
        array = None if self.mask_sources[row] == "none" else read_mask_value(mask, reading, where)
        return Sample(
            self.sample_ids[row], read_image_value(image, where), self.labels[row], array, self.mask_sources[row]
        )


class _HuggingFaceDataset(_Wrapped):
    def __init__(
        self,
        table: _Table,
        class_names: Sequence[str],
        sample_ids: Sequence[str],
        labels: Sequence[int],
        annotated: Sequence[bool],
        image: str,
        mask: str | None,
        reading: MaskReading,
    ) -> None:
        super().__init__(class_names, sample_ids, labels, annotated)
        self.table, self.image, self.mask, self.reading = table, image, mask, reading

    def __getitem__(self, row: int) -> Sample:
        values = self.table[row]
        return self._sample(row, values[self.image], self.mask and values[self.mask], self.reading)


class _TorchvisionDataset(_Wrapped):
    def __init__(
        self,
        items: Any,
        class_names: Sequence[str],
        sample_ids: Sequence[str],
        labels: Sequence[int],
        annotated: Sequence[bool],
        mask: Callable[[Any], Any],
        reading: MaskReading,
    ) -> None:
        super().__init__(class_names, sample_ids, labels, annotated)
        self.items, self.mask, self.reading = items, mask, reading

    def __getitem__(self, row: int) -> Sample:
        image, target = self.items[row]
        return self._sample(row, image, self.mask(target), self.reading)


# Labels


def _labels(
    values: Sequence[Any], declared: Sequence[Any] | None, class_names: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and each row's place among them."""
    chosen = class_names if class_names is not None else declared
    if all(isinstance(value, str) for value in values):
        names = tuple(sorted(set(values))) if chosen is None else _first_names(chosen)
        if unknown := sorted(set(values) - set(names)):
            raise DataError(
                f"found labels {_listed(unknown)} in {where}, expected one of {_listed(names)}; give class_names if "
                "the classes are others"
            )
        place = {name: label for label, name in enumerate(names)}
        return names, [place[value] for value in values]
    if chosen is None:
        raise DataError(f"found numbers without names in {where}; give class_names in the order of the labels")
    names = _first_names(chosen)
    numbers = []
    for row, value in enumerate(values):
        number = value.item() if isinstance(value, Tensor | np.generic) else value
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise DataError(
                f"row {row}: found label {value!r} in {where}, expected a whole number from 0 to {len(names) - 1} for "
                f"{len(names)} classes; leave out images without a label, and give class_names for all classes"
            )
        numbers.append(int(number))
    return names, numbers


def _first_names(names: Sequence[Any]) -> tuple[str, ...]:
    """ImageNet's classes are tuples of synonyms."""
    return tuple(name if isinstance(name, str) else name[0] for name in names)


def _declared_names(dataset: Any) -> Sequence[Any] | None:
    """What torchvision's data sets call their classes; they share no name for it."""
    names: Sequence[Any] | None = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    return names


def _plain_targets(dataset: Any) -> list[Any] | None:
    """Labels that can be had without opening the images: whole numbers that nothing changes on the way out."""
    _, first = dataset[0]
    listed = getattr(dataset, "targets", None)
    if listed is None or len(listed) != len(dataset) or not isinstance(first, int):
        return None
    labels = [value.item() if isinstance(value, Tensor) else value for value in listed]
    is_changed = getattr(dataset, "target_transform", None) or getattr(dataset, "transforms", None)
    return None if is_changed else labels


def _label_of_target(target: Any) -> Any:
    if isinstance(target, int | str | np.integer) or (isinstance(target, Tensor) and target.ndim == 0):
        return target
    if isinstance(target, tuple | list) and len(target) == 2:
        return _label_of_target(target[0])
    raise DataError(
        f"found a target of type {type(target).__name__}, expected a class or a pair of class and mask; say where in "
        "it they are with label= and mask="
    )


def _mask_of_target(target: Any) -> Any:
    return target[1] if isinstance(target, tuple | list) and len(target) == 2 else None


def _has_value(table: _Table, column: str) -> list[bool]:
    """Which rows have a value, without decoding an image where the column's type can be told not to."""
    feature = table.features[column]
    if getattr(feature, "decode", False):
        table = table.cast_column(column, type(feature)(decode=False))
    return [value is not None for value in table[column]]


def _no_column(argument: str, column: str, columns: Sequence[str]) -> str:
    nearest = nearest_name(column, columns)
    hint = f" (did you mean {nearest!r}?)" if nearest else ""
    without = ", or mask=None if nothing is annotated" if argument == "mask" else ""
    return f"no column {column!r}{hint}; there are {_listed(columns)}; name it with {argument}={without}"


def _listed(names: Iterable[str], shown: int = 20) -> str:
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + rest


# Images and masks that are already in memory


def read_image_value(image: Any, where: str) -> Image.Image:
    """An image in memory as a person sees it: upright and in RGB.

    Args:
        image: a PIL image of any mode, or 8-bit pixels as an array ``(Hpx, Wpx, 3)`` or a tensor ``(3, Hpx, Wpx)``.
        where: opens the message.

    Raises:
        DataError: it is neither; floating-point pixels mean that a transform has been there.
    """
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image), Path(where))
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
        return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    found = f"{type(image).__name__} {getattr(image, 'dtype', '')}".strip()
    raise DataError(
        f"{where}: found {found} where an image was expected: a PIL image, or 8-bit RGB pixels; leave out the data "
        "set's own transforms, images are brought to the model's size together with their masks"
    )


def read_mask_value(mask: Any, reading: MaskReading, where: str) -> MaskArray:
    """A mask in memory as `OBJECT` and `BACKGROUND`.

    Args:
        mask: a PIL image, or numbers ``(Hpx, Wpx)`` or ``(1, Hpx, Wpx)`` as array, tensor or lists.
        reading: what its values mean.
        where: opens the message.

    Raises:
        DataError: its values have no known meaning, or nothing in it is object.

    Example:
        >>> read_mask_value([[0, 2], [3, 1]], MaskReading(object_values=(1, 3)), "cat.png")
        array([[0, 0],
               [1, 1]], dtype=uint8)
    """
    if isinstance(mask, Image.Image) and reading.object_values is None:
        shares = to_grey(ImageOps.exif_transpose(mask), Path(where))
        return _checked(shares >= reading.threshold, shares, where)
    pixels = np.asarray(ImageOps.exif_transpose(mask) if isinstance(mask, Image.Image) else mask)
    if pixels.ndim == 3 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim != 2:
        raise DataError(f"{where}: found a mask of shape {pixels.shape}, expected (height, width)")
    if reading.object_values is not None:
        return _checked(np.isin(pixels, list(reading.object_values)), pixels, where)
    if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 1:
        raise DataError(
            f"{where}: found mask values from {pixels.min()} to {pixels.max()}, expected 0 to 1; name those that mark "
            "the object with object_values="
        )
    return _checked(pixels >= reading.threshold, pixels, where)


def _checked(is_object: Any, values: Any, where: str) -> MaskArray:
    if not is_object.any():
        raise DataError(
            f"{where}: nothing in its mask, whose largest value is {float(values.max(initial=0)):.3g}, is marked as "
            "object; name the values that mark it with object_values=, lower mask_threshold, or give None as the mask"
        )
    mask: MaskArray = np.where(is_object, OBJECT, BACKGROUND).astype(np.uint8)
    return mask
