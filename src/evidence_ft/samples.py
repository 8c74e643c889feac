"""Samples, and their way from a file to a model.

A format in `evidence_ft.datasets` says where images, labels and masks are; everything after that is here:
reading a file so that it comes out upright and in RGB or not at all, the check of a whole data set before
training, the one transform that moves an image and its mask together, and the batch.

This module knows nothing of models, file formats of annotations or training.
"""

import difflib
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from evidence_ft.types import BACKGROUND, OBJECT, Batch, MaskSource, Preprocessing

MaskArray: TypeAlias = npt.NDArray[np.uint8]
"""``(Hpx, Wpx)`` of `BACKGROUND` and `OBJECT`."""

OnBadSample: TypeAlias = Literal["error", "skip"]
"""What becomes of a sample that cannot be used: training does not start, or starts without it."""

SHOWN = 10
"""How many offenders an error message lists before it only counts."""


class DataError(ValueError):
    """Something in the data is not as it has to be.

    The message names the file or the sample, what was found, what was expected, and what to do.
    """


class Sample(NamedTuple):
    """One image with its label and the evidence for it.

    Attributes:
        sample_id: stable name, unique in its data set.
        image: RGB and upright.
        label: row in the data set's ``class_names``.
        mask: ``(Hpx, Wpx)`` uint8 of `BACKGROUND` and `OBJECT`, as large as the image; None where no evidence
            is annotated.
        mask_source: where the mask comes from; ``"none"`` exactly where it is None.
    """

    sample_id: str
    image: Image.Image
    label: int
    mask: MaskArray | None
    mask_source: MaskSource


class EvidenceDataset(Protocol):
    """What a data set has to offer; what is known without opening an image is known for all rows at once.

    A class with these four attributes and two methods is a data set; nothing has to be inherited.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        sample_ids: per row.
        labels: per row, in ``range(len(class_names))``.
        mask_sources: per row.
    """

    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def sample_ids(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def mask_sources(self) -> Sequence[MaskSource]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Sample: ...


class DatasetConfig(BaseModel):
    """What every data format lets a user choose; a format adds its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_split: str = Field("train", description="Split to train on.")
    test_splits: tuple[str, ...] = Field(("test",), description="Splits to evaluate on.")
    classes: tuple[str, ...] | None = Field(
        None,
        description="Class names in the order of the labels. A label outside this list is an error. "
        "Without the list, all labels are classes.",
    )
    leave_out: tuple[str, ...] = Field((), description="Classes to leave out on purpose.")
    max_per_class: int | None = Field(
        None,
        ge=1,
        description="Keep at most this many samples of each class: those whose ids have the smallest "
        "SHA-256, so that the choice depends on nothing but the ids.",
    )
    on_bad_sample: OnBadSample = Field(
        "error", description="Whether a sample that cannot be used stops the run, or is left out and listed."
    )

    @model_validator(mode="after")
    def _names_do_not_contradict(self) -> Self:
        for name, values in (
            ("classes", self.classes or ()),
            ("leave_out", self.leave_out),
            ("test_splits", self.test_splits),
        ):
            if twice := [value for value, n in Counter(values).items() if n > 1]:
                raise ValueError(f"{name} lists {_quoted(twice)} more than once; name each once")
        if both := sorted(set(self.classes or ()) & set(self.leave_out)):
            raise ValueError(f"{_quoted(both)} in both classes and leave_out; remove from one of them")
        if self.classes is not None and len(self.classes) == 0:
            raise ValueError("classes is an empty list; name the classes, or drop the key to use all labels")
        if self.train_split in self.test_splits:
            raise ValueError(
                f"split {self.train_split!r} is both train_split and one of test_splits; "
                "evaluate on images that were not trained on"
            )
        return self


# Reading files


def read_image(path: Path) -> Image.Image:
    """Image of a file as a person sees it: upright and in RGB.

    The EXIF orientation is applied. Transparency is laid on white, since what a file stores under transparent
    pixels is anything. 16-bit grey is scaled to 8 bits by its full range. Of an animation, the first frame.

    Raises:
        DataError: the file is missing, not an image, truncated, corrupt or larger than Pillow's safety limit,
            or its pixel values have no known range.
    """
    with _pillow_errors_explained(path):
        return _to_rgb(_open_upright(path), path)


def read_mask(path: Path, threshold: float) -> MaskArray:
    """Evidence mask of a greyscale file: `OBJECT` from the threshold on.

    The threshold is a share of white, and white is what the file's format says: 1 in a 1-bit, 255 in an
    8-bit, 65535 in a 16-bit image, whatever the largest value present. Colour and palette images are read
    where all their colours are grey, so a grey image that some tool has saved as a palette is read by its
    greys and not by its palette indices. Other palettes are an error: whether the index or the colour carries
    the meaning cannot be known. The EXIF orientation is applied.

    Args:
        path: file of the mask.
        threshold: in (0, 1].

    Raises:
        DataError: as `read_image`; or the file has colours or transparency; or nothing reaches the threshold.
        ValueError: the threshold is outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"mask threshold is {threshold}; choose one above 0 and up to 1")
    with _pillow_errors_explained(path):
        grey = _to_grey(_open_upright(path), path)
    mask = np.where(grey >= threshold, OBJECT, BACKGROUND).astype(np.uint8)
    if not (mask == OBJECT).any():
        largest = float(grey.max(initial=0.0))
        advice = f"lower mask_threshold to {largest:.2g} or less" if largest > 0 else "the mask is all black"
        raise DataError(
            f"mask {path}: its largest value is {largest:.4g} of 1, so nothing reaches the threshold of "
            f"{threshold:g}; {advice}, or mark the image as not annotated"
        )
    return mask


@contextmanager
def _pillow_errors_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"image file {path} does not exist; correct its path, or restore the file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"image file {path} is too large ({error}); scale the image down, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"file {path} is not an image that Pillow can read; convert it to PNG or JPEG, or remove it"
        ) from error
    # Decoders of broken files raise SyntaxError, struct.error, EOFError and more besides OSError.
    except Exception as error:
        raise DataError(
            f"image file {path} cannot be read ({type(error).__name__}: {error}); it is damaged or "
            "incomplete: copy or download it again, or remove it"
        ) from error


def _open_upright(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(np.rint(_scaled_16_bit(image, path) * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image.convert("RGBA"))
        return on_white.convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image, path: Path) -> npt.NDArray[np.float64]:
    if image.mode.startswith(("I", "F")):
        return _scaled_16_bit(image, path)
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise DataError(
            f"mask {path} is partly transparent, so it is not clear what marks the object; save it as an "
            "8-bit greyscale PNG, 255 on the object and 0 elsewhere"
        )
    pixels = np.asarray(image.convert("RGB"))
    if (pixels != pixels[..., :1]).any():
        kind = "a palette of colours" if image.mode in ("P", "PA") else "colours"
        raise DataError(
            f"mask {path} has {kind} (mode {image.mode}) where greys were expected; save it as an 8-bit "
            "greyscale PNG, 255 on the object and 0 elsewhere"
        )
    grey: npt.NDArray[np.float64] = pixels[..., 0] / 255
    return grey


def _scaled_16_bit(image: Image.Image, path: Path) -> npt.NDArray[np.float64]:
    pixels = np.asarray(image, dtype=np.float64)
    # Pillow opens some 16-bit files as 32-bit integers; real 32-bit and float files have no known white.
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(
            f"image file {path} has {image.mode!r} pixels from {pixels.min():g} to {pixels.max():g} where 8 "
            "or 16 bits were expected; convert it to an 8-bit or 16-bit PNG"
        )
    return pixels / 65535


# Boxes


class Box(NamedTuple):
    """Axis-parallel rectangle in pixels; the image's top left corner is (0, 0)."""

    x: float
    y: float
    width: float
    height: float


def check_box(box: Box, *, image_width: int, image_height: int, where: str) -> None:
    """Refuse a box without area, or one that lies partly outside its image.

    Up to one pixel outside is taken for rounding.

    Args:
        box: to check.
        image_width: in pixels.
        image_height: in pixels.
        where: file and place of the box, which open the message.

    Raises:
        DataError: the box has no area, or leaves the image by more than a pixel.

    Example:
        >>> size = {"image_width": 8, "image_height": 8}
        >>> check_box(Box(0, 0, 8, 4), **size, where="labels.csv, line 2")
        >>> empty = Box(0, 4, 8, 0)
        >>> check_box(empty, **size, where="labels.csv, line 3")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        DataError: labels.csv, line 3: found a box of 8x0 pixels
    """
    if not all(math.isfinite(number) for number in box) or box.width <= 0 or box.height <= 0:
        raise DataError(
            f"{where}: found a box of {box.width:g}x{box.height:g} pixels; expected a width and a height "
            "above 0; correct the box (x, y, width, height), or remove it"
        )
    right, bottom = box.x + box.width, box.y + box.height
    if min(box.x, box.y) < -1 or right > image_width + 1 or bottom > image_height + 1:
        raise DataError(
            f"{where}: found x {box.x:g} to {right:g}, y {box.y:g} to {bottom:g} in an image of "
            f"{image_width}x{image_height} pixels; expected a box inside the image; check that it is x, y, "
            "width, height in pixels (not x1, y1, x2, y2, not shares) and of this image's upright size"
        )


def fill_box(box: Box, *, image_width: int, image_height: int) -> MaskArray:
    """Mask with `OBJECT` on each pixel that the box touches.

    Example:
        >>> fill_box(Box(1, 0, 2, 1), image_width=4, image_height=2)
        array([[0, 1, 1, 0],
               [0, 0, 0, 0]], dtype=uint8)
    """
    mask = np.full((image_height, image_width), BACKGROUND, dtype=np.uint8)
    # A thousandth of a pixel is what is left of an integer after some float32 arithmetic.
    left, top = max(math.floor(box.x + 1e-3), 0), max(math.floor(box.y + 1e-3), 0)
    right, bottom = math.ceil(box.x + box.width - 1e-3), math.ceil(box.y + box.height - 1e-3)
    mask[top : max(bottom, 0), left : max(right, 0)] = OBJECT
    return mask


# Classes and rows


def choose_classes(
    declared: Sequence[str],
    used: Mapping[str, str],
    *,
    classes: Sequence[str] | None,
    leave_out: Sequence[str],
    where: str,
) -> tuple[str, ...]:
    """Class names of a data set, in the order of the labels.

    Args:
        declared: names the file knows, in their natural order.
        used: names that label an image, with the first place where each does.
        classes: names the user wants, in their order; None for all declared ones.
        leave_out: names the user does without.
        where: file that opens the message.

    Raises:
        DataError: a used name is in neither list, a name to leave out does not occur, or no class is left.

    Example:
        >>> names = ["cat", "dog", "emu"]
        >>> choose_classes(names, {"cat": "line 2"}, classes=None, leave_out=["dog"], where="labels.csv")
        ('cat', 'emu')
    """
    for name in leave_out:
        if name not in declared:
            raise DataError(
                f"{where}: found no class {name!r}, which data.leave_out names; expected one of "
                f"{_listed(declared)}{_suggestion(name, declared)}; correct or remove the name"
            )
    if classes is not None:
        outside = [name for name in used if name not in classes and name not in leave_out]
        if outside:
            raise DataError(
                f"{used[outside[0]]}: found label {outside[0]!r}{_and_more(len(outside))}; expected one of "
                f"data.classes: {_listed(classes)}{_suggestion(outside[0], classes)}; add it to "
                "data.classes, or to data.leave_out to do without its images"
            )
    names = tuple(name for name in (declared if classes is None else classes) if name not in leave_out)
    if not names:
        raise DataError(f"{where}: no class is left; name fewer classes in data.leave_out")
    return names


def first_per_class(sample_ids: Sequence[str], labels: Sequence[int], max_per_class: int | None) -> list[int]:
    """Rows of at most so many samples per class, in their old order.

    Kept are the samples whose ids have the smallest SHA-256: as good as a random choice, the same on every
    machine and in any order of the file, and a larger number keeps all that a smaller one kept.

    Example:
        >>> first_per_class(["a", "b", "c"], [0, 0, 1], None)
        [0, 1, 2]
        >>> first_per_class(["a", "b", "c"], [0, 0, 1], 1)  # "b" hashes to 3e..., "a" to ca...
        [1, 2]
    """
    if max_per_class is None:
        return list(range(len(sample_ids)))
    rows_of = defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    kept: list[int] = []
    for rows in rows_of.values():
        rows.sort(key=lambda row: hashlib.sha256(sample_ids[row].encode()).digest())
        kept += rows[:max_per_class]
    return sorted(kept)


def nearest_name(name: str, names: Sequence[str]) -> str | None:
    """The one of the names that a typing error may have turned into this one, if any.

    Example:
        >>> nearest_name("lable", ["image", "label"])
        'label'
    """
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else None


def _suggestion(name: str, names: Sequence[str]) -> str:
    nearest = nearest_name(name, names)
    return f" (did you mean {nearest!r}?)" if nearest else ""


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _listed(names: Sequence[str]) -> str:
    return _quoted(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _and_more(count: int) -> str:
    return f" (and {count - 1} more such labels)" if count > 1 else ""


class Subset:
    """Some rows of a data set, as a data set.

    Args:
        dataset: to choose from.
        rows: to keep, in this order.
    """

    def __init__(self, dataset: EvidenceDataset, rows: Sequence[int]) -> None:
        self.dataset = dataset
        self.rows = tuple(rows)
        self.class_names = dataset.class_names
        self.sample_ids = tuple(dataset.sample_ids[row] for row in self.rows)
        self.labels = tuple(dataset.labels[row] for row in self.rows)
        self.mask_sources = tuple(dataset.mask_sources[row] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return self.dataset[self.rows[row]]


# Checking


class BadSample(NamedTuple):
    """A sample that cannot be used, and why."""

    sample_id: str
    reason: str


def check_sample(sample: Sample) -> None:
    """Refuse a sample whose parts do not fit each other.

    Raises:
        DataError: the mask is of another size than the image, has values other than `BACKGROUND` and
            `OBJECT`, has no object, or is there or missing against its ``mask_source``; or the image is not
            RGB.

    Example:
        >>> image = Image.new("RGB", (4, 2))
        >>> check_sample(Sample("cat 1", image, 0, np.ones((2, 4), dtype=np.uint8), "mask"))
        >>> empty = np.zeros((2, 4), dtype=np.uint8)
        >>> check_sample(Sample("cat 2", image, 0, empty, "mask"))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        DataError: sample 'cat 2': found an annotated mask without a single object pixel
    """
    name = f"sample {sample.sample_id!r}"
    if sample.image.mode != "RGB":
        raise DataError(
            f"{name}: found an image in mode {sample.image.mode!r}, expected 'RGB'; open it with read_image"
        )
    if (sample.mask is None) != (sample.mask_source == "none"):
        found = "no mask" if sample.mask is None else "a mask"
        raise DataError(
            f"{name}: found {found} with mask_source {sample.mask_source!r}; expected no mask exactly where "
            "the source is 'none'; correct the data set's mask_sources"
        )
    if sample.mask is None:
        return
    width, height = sample.image.size
    if sample.mask.shape != (height, width):
        raise DataError(
            f"{name}: found a mask of {_size(sample.mask.shape)} pixels (width x height), expected "
            f"{width}x{height} as its image; export the mask at the size of the upright image"
        )
    values = np.unique(sample.mask)
    if sample.mask.dtype != np.uint8 or not np.isin(values, (BACKGROUND, OBJECT)).all():
        raise DataError(
            f"{name}: found {sample.mask.dtype} mask values {', '.join(f'{value:g}' for value in values[:5])}"
            f"{', ...' if len(values) > 5 else ''}; expected uint8 of {BACKGROUND} and {OBJECT} only; "
            "cut the mask at a threshold, as read_mask does"
        )
    if OBJECT not in values:
        raise DataError(
            f"{name}: found an annotated mask without a single object pixel; expected some evidence; correct "
            "the annotation or its threshold, or mark the image as not annotated"
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(length) for length in reversed(shape))


def validate(
    dataset: EvidenceDataset,
    *,
    on_bad_sample: OnBadSample,
    description: str = "Checking samples",
    progress: bool = True,
) -> tuple[EvidenceDataset, list[BadSample]]:
    """Open every sample once, so that nothing fails hours later.

    Args:
        dataset: to check.
        on_bad_sample: with ``"error"`` all bad samples are reported in one error; with ``"skip"`` they are
            left out.
        description: beside the progress bar, and in messages.
        progress: whether to show the progress bar.

    Returns:
        The data set, without the bad samples if there are any, and the list of these.

    Raises:
        DataError: samples are bad and are not to be skipped; none is left; or what the data set says about
            all rows (ids, labels, mask sources) contradicts itself, which skipping cannot repair.
    """
    _check_rows(dataset)

    def reason(row: int) -> str | None:
        try:
            sample = dataset[row]
            check_sample(sample)
            _check_row(dataset, row, sample)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as threads:
        reasons = threads.map(reason, range(len(dataset)))
        bar = tqdm(reasons, desc=description, total=len(dataset), unit="sample", disable=not progress)
        found = list(bar)
    bad = [BadSample(dataset.sample_ids[row], text) for row, text in enumerate(found) if text is not None]
    if not bad:
        return dataset, []
    if on_bad_sample == "error":
        raise DataError(
            f"{description}: {len(bad)} of {len(dataset)} samples cannot be used:\n{_bad_list(bad)}\nRepair "
            "them, or leave them out with --data.on-bad-sample skip."
        )
    rows = [row for row, text in enumerate(found) if text is None]
    if not rows:
        raise DataError(
            f"{description}: none of {len(dataset)} samples can be used:\n{_bad_list(bad)}\nCheck the paths "
            "and settings of the data set."
        )
    return Subset(dataset, rows), bad


def _check_rows(dataset: EvidenceDataset) -> None:
    lengths = {
        "sample_ids": len(dataset.sample_ids),
        "labels": len(dataset.labels),
        "mask_sources": len(dataset.mask_sources),
    }
    for name, length in lengths.items():
        if length != len(dataset):
            raise DataError(
                f"data set of {len(dataset)} rows: found {length} {name}; expected one per row; correct its {name}"
            )
    if len(dataset) == 0:
        raise DataError("the data set has no samples; expected at least one; check its split and its filters")
    if twice := [name for name, n in Counter(dataset.sample_ids).items() if n > 1]:
        raise DataError(
            f"found {len(twice)} sample ids more than once: {_listed(twice)}; expected each once, since "
            "results are joined by them; rename or remove the copies"
        )
    if twice := [name for name, n in Counter(dataset.class_names).items() if n > 1]:
        raise DataError(
            f"found class names more than once: {_listed(twice)}; expected each once; rename or merge the classes"
        )
    for sample_id, label in zip(dataset.sample_ids, dataset.labels, strict=True):
        if not 0 <= label < len(dataset.class_names):
            raise DataError(
                f"sample {sample_id!r}: found label {label}, expected 0 to {len(dataset.class_names) - 1} "
                f"for {len(dataset.class_names)} classes; correct the data set's labels or class_names"
            )


def _check_row(dataset: EvidenceDataset, row: int, sample: Sample) -> None:
    declared = (dataset.sample_ids[row], dataset.labels[row], dataset.mask_sources[row])
    found = (sample.sample_id, sample.label, sample.mask_source)
    if found != declared:
        raise DataError(
            f"sample {declared[0]!r}: found id, label and mask source {found} on opening it; expected "
            f"{declared} as the data set lists for this row; make the two agree"
        )


def _bad_list(bad: Sequence[BadSample]) -> str:
    lines = [
        f"  {reason}" if sample_id in reason else f"  sample {sample_id!r}: {reason}"
        for sample_id, reason in bad[:SHOWN]
    ]
    if len(bad) > SHOWN:
        lines.append(f"  ... and {len(bad) - SHOWN} more")
    return "\n".join(lines)


def fingerprint(dataset: EvidenceDataset) -> str:
    """SHA-256 over id, class name and mask source of all rows, in their order.

    Two runs with the same fingerprint saw the same samples under the same names; the pixels are not part of
    it. Each row enters as one line of JSON, so no choice of names can make two data sets look alike.

    Example:
        >>> class TwoImages:
        ...     class_names, labels = ("cat", "dog"), (0, 1)
        ...     sample_ids, mask_sources = ("a.jpg", "b.jpg"), ("mask", "none")
        >>> fingerprint(TwoImages())[:16]  # of the lines ["a.jpg","cat","mask"] and ["b.jpg","dog","none"]
        '02aeff9ef2d84bba'
    """
    digest = hashlib.sha256()
    rows = zip(dataset.sample_ids, dataset.labels, dataset.mask_sources, strict=True)
    for sample_id, label, source in rows:
        line = json.dumps([sample_id, dataset.class_names[label], source], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


# From a sample to a batch


class Augmentation(BaseModel):
    """How training images vary from epoch to epoch. The mask follows every crop and flip."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_scale: tuple[float, float] = Field(
        (0.8, 1.0),
        description="Smallest and largest share of the image's area that a random crop keeps.",
    )
    flip: bool = Field(True, description="Whether half of the images are mirrored left to right.")
    color_jitter: float = Field(
        0.0, ge=0, le=1, description="How far brightness, contrast and saturation vary; 0 for not at all."
    )

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        smallest, largest = self.crop_scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError(
                f"crop_scale is {self.crop_scale}; expected two shares of the area with 0 < smallest <= largest <= 1"
            )
        return self


class SampleTransform:
    """Sample to model input: one transform that moves the image and its mask together.

    Without augmentation, images come out as from open_clip's own evaluation transform (resized by Pillow with
    antialiasing, padded in black), except that a stated bilinear interpolation also holds for ``shortest``
    with a model that is not square, where open_clip resizes bicubically. Masks are resized by nearest
    neighbour and padded as background.

    Args:
        preprocessing: what the model expects.
        augmentation: how training images vary; None for evaluation. A random crop replaces the resize mode.

    Example:
        >>> transform = SampleTransform(Preprocessing((2, 2), mean=(0.5,) * 3, std=(0.5,) * 3))
        >>> mask = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], dtype=np.uint8)
        >>> image, mask = transform(Sample("a", Image.new("RGB", (4, 2), "white"), 0, mask, "mask"))
        >>> image.shape, image.unique(), mask
        (torch.Size([3, 2, 2]), tensor([1.]), tensor([[0, 1],
                [0, 1]], dtype=torch.uint8))
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        width, height = sample.image.size
        mask = np.full((height, width), BACKGROUND, dtype=np.uint8) if sample.mask is None else sample.mask
        # As a plain tensor the mask would pass crops and flips untouched.
        wrapped = tv_tensors.Mask(torch.tensor(mask))
        if self.augmentation is None:
            resized = _resized(height, width, self.preprocessing)
            image, wrapped = self._resize(sample.image, wrapped, resized)
            image, wrapped = v2.CenterCrop(self.preprocessing.size)(image, wrapped)
        else:
            image, wrapped = self._vary(sample.image, wrapped, self.augmentation)
        pixels = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)
        mean, std = list(self.preprocessing.mean), list(self.preprocessing.std)
        return v2.functional.normalize(pixels, mean, std).as_subclass(Tensor), wrapped.as_subclass(Tensor)

    def _vary(
        self, image: Image.Image, mask: tv_tensors.Mask, augmentation: Augmentation
    ) -> tuple[Image.Image, tv_tensors.Mask]:
        size = list(self.preprocessing.size)
        crop = v2.RandomResizedCrop(size, scale=augmentation.crop_scale, ratio=(3 / 4, 4 / 3))
        place = crop.make_params([image])
        image, mask = v2.functional.crop(image, **place), v2.functional.crop(mask, **place)
        image, mask = self._resize(image, mask, size)
        strength = augmentation.color_jitter
        steps = [v2.RandomHorizontalFlip(0.5 if augmentation.flip else 0.0)]
        if strength > 0:
            steps.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
        varied: tuple[Image.Image, tv_tensors.Mask] = v2.Compose(steps)(image, mask)
        return varied

    def _resize(
        self, image: Image.Image, mask: tv_tensors.Mask, size: list[int]
    ) -> tuple[Image.Image, tv_tensors.Mask]:
        interpolation = v2.InterpolationMode(self.preprocessing.interpolation)
        image = v2.functional.resize(image, size, interpolation=interpolation, antialias=True)
        # torchvision resizes a Mask with "nearest", which takes the top left of the pixels that fall together and so
        # shifts it against its image by up to half of them.
        resized = v2.functional.resize(
            mask.as_subclass(Tensor)[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT
        )
        return image, tv_tensors.Mask(resized[0])


def _resized(height: int, width: int, preprocessing: Preprocessing) -> list[int]:
    """Size before the centre is cropped or padded, rounded as open_clip rounds."""
    rows, columns = preprocessing.size
    if preprocessing.resize_mode == "squash":
        return [rows, columns]
    if preprocessing.resize_mode == "longest":
        ratio = max(height / rows, width / columns)
        # Rounding a very thin image to nothing is the one thing not to take over.
        return [max(round(height / ratio), 1), max(round(width / ratio), 1)]
    if rows == columns:
        shorter = min(height, width)
        return [int(rows * height / shorter), int(rows * width / shorter)]
    ratio = min(height / rows, width / columns)
    return [round(height / ratio), round(width / ratio)]


class ModelInputs(Dataset[Batch]):
    """A data set as a model reads it, for a `torch.utils.data.DataLoader` with `collate`.

    What augmentation does to a row depends on the seed, the epoch and the row alone: not on the number of
    workers, the order of the rows or whatever else draws random numbers; and it takes none from them.

    Args:
        dataset: to read.
        transform: what happens to each sample.
        seed: of the augmentation, at least 0.
    """

    def __init__(self, dataset: EvidenceDataset, transform: SampleTransform, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; choose one of at least 0")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # In shared memory, so that workers which outlive an epoch hear of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Vary the images anew; call before iterating over the loader, with any kind of workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Batch:
        """One row, without the batch axis; `collate` adds it."""
        sample = self.dataset[row]
        if self.transform.augmentation is None:
            image, mask = self.transform(sample)
        else:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would reseed the GPUs too, which nothing restores: dropout would
                # repeat itself.
                torch.default_generator.manual_seed(self._seed_of(row))
                image, mask = self.transform(sample)
        return Batch(image, torch.tensor(sample.label), mask, torch.tensor(row))

    def _seed_of(self, row: int) -> int:
        entropy = [self.seed, int(self._epoch), row]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def collate(items: Sequence[Batch]) -> Batch:
    """Rows of `ModelInputs` to one batch.

    Example:
        >>> mask = torch.zeros(2, 2, dtype=torch.uint8)
        >>> row = Batch(torch.zeros(3, 2, 2), torch.tensor(1), mask, torch.tensor(7))
        >>> batch = collate([row, row])
        >>> batch.images.shape, batch.labels, batch.rows
        (torch.Size([2, 3, 2, 2]), tensor([1, 1]), tensor([7, 7]))
    """
    return Batch(*(torch.stack(column) for column in zip(*items, strict=True)))


def to_pixels(image: Tensor, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Normalised image ``(3, Hpx, Wpx)`` back to ``(Hpx, Wpx, 3)`` uint8, to be looked at.

    Example:
        >>> half = Preprocessing((1, 1), mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> to_pixels(torch.tensor([-1.0, 0.2, 1.0]).view(3, 1, 1), half).tolist()
        [[[0, 153, 255]]]
    """
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (preprocessing.mean, preprocessing.std))
    shares = (image.detach().cpu().float() * std + mean).clamp(0, 1)
    pixels: npt.NDArray[np.uint8] = (shares * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels
