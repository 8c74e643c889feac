"""Samples, data sets of them, and the check of a whole data set before training.

A format in `evidence_ft.datasets` says where images, labels and masks are, `evidence_ft.images` reads them, and
`evidence_ft.transforms` makes them a model's input.

This module knows nothing of models, file formats of annotations or training.
"""

import difflib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tqdm import tqdm

from evidence_ft.images import DataError, MaskArray
from evidence_ft.types import BACKGROUND, OBJECT, MaskSource

OnBadSample: TypeAlias = Literal["error", "skip"]
"""What becomes of a sample that cannot be used: training does not start, or starts without it."""

SHOWN = 10
"""How many offenders an error message lists before it only counts."""


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


# Classes and rows


def classes_without_images(dataset: EvidenceDataset) -> tuple[str, ...]:
    """Names of the classes that no row has."""
    shown = set(dataset.labels)
    return tuple(name for label, name in enumerate(dataset.class_names) if label not in shown)


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
            "them, or leave them out with --data.on-bad-sample skip (in code, on_bad_sample='skip')."
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
