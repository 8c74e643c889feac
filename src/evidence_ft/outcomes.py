"""What became of the images of a test split: a table with one row an image, and a few of them to look at.

A table is checked when it is made and when it is read: a report made from it must be able to trust it. This
module knows nothing of models, arms or settings.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from evidence_ft import metrics
from evidence_ft.evidence import VALID_FROM
from evidence_ft.files import FORMAT_VERSION, RunFileError, named, write_atomically
from evidence_ft.metrics import Rationality, RatioStatistic
from evidence_ft.types import MaskSource

OUTCOMES_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("prediction", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("rma", pa.float32(), nullable=False),
        pa.field("mask_share", pa.float32(), nullable=False),
        pa.field("heatmap_mass", pa.float32(), nullable=False),
        pa.field("mask_source", pa.string(), nullable=False),
        pa.field("swapped_prediction", pa.int32(), nullable=True),
    ]
)
"""Columns of an outcomes table. NaN is a value (no evidence); null means that no swapped image exists."""

_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of each test image: one row an image, found again by its sample id.

    Rates and intervals are computed from this table and nothing else. It keeps the RMA rather than a verdict,
    so another threshold needs no model.

    Attributes:
        table: as `OUTCOMES_SCHEMA` describes; ``class_names`` and ``split`` are in its metadata.

    Example:
        >>> outcomes = Outcomes.from_columns(
        ...     sample_id=["a.jpg", "b.jpg", "c.jpg"],
        ...     label=[0, 1, 1],
        ...     prediction=[0, 1, 0],
        ...     confidence=[0.9, 0.8, 0.6],
        ...     rma=[0.7, 0.2, float("nan")],
        ...     mask_share=[0.3, 0.3, float("nan")],
        ...     heatmap_mass=[1.0, 2.0, 1.5],
        ...     mask_source=["mask", "mask", "none"],
        ...     class_names=["cat", "dog"],
        ...     split="test",
        ... )
        >>> outcomes.rationality()
        Rationality(RR=1, RW=1, WR=0, WW=0)
    """

    table: pa.Table

    def __post_init__(self) -> None:
        _check_outcomes(self.table)

    @classmethod
    def from_columns(
        cls,
        *,
        sample_id: Sequence[str],
        label: Sequence[int] | Tensor,
        prediction: Sequence[int] | Tensor,
        confidence: Sequence[float] | Tensor,
        rma: Sequence[float] | Tensor,
        mask_share: Sequence[float] | Tensor,
        heatmap_mass: Sequence[float] | Tensor,
        mask_source: Sequence[MaskSource],
        class_names: Sequence[str],
        split: str,
        swapped_prediction: Sequence[int | None] | Tensor | None = None,
    ) -> Self:
        """Outcomes from one value an image in each column.

        Args:
            sample_id: unique names of the images.
            label: index into ``class_names``.
            prediction: likewise.
            confidence: softmax probability of the prediction.
            rma: NaN where no evidence is annotated or none is in view; 0 for an empty heatmap.
            mask_share: share of the image that the mask covers; NaN as above.
            heatmap_mass: sum of the heatmap; 0 for an empty one.
            mask_source: where the masks come from.
            class_names: in the order of the labels.
            split: name of the test split.
            swapped_prediction: prediction on the same object before another background; None, or negative in
                a tensor, where no such image exists.

        Raises:
            ValueError: a column is longer than another, has a value out of range, or contradicts another.
        """
        n = len(sample_id)
        swapped = [None] * n if swapped_prediction is None else _listed(swapped_prediction)
        columns = {
            "sample_id": list(sample_id),
            "label": _listed(label),
            "prediction": _listed(prediction),
            "confidence": _listed(confidence),
            "rma": _listed(rma),
            "mask_share": _listed(mask_share),
            "heatmap_mass": _listed(heatmap_mass),
            "mask_source": list(mask_source),
            "swapped_prediction": [None if p is None or p < 0 else p for p in swapped],
        }
        for name, values in columns.items():
            if len(values) != n:
                raise ValueError(f"column {name} has {len(values)} values for {n} sample ids")
        described = OUTCOMES_SCHEMA.with_metadata(
            {
                "class_names": json.dumps(list(class_names), ensure_ascii=False),
                "split": split,
                "format_version": str(FORMAT_VERSION),
            }
        )
        try:
            table = pa.table(
                [pa.array(columns[field.name], field.type, from_pandas=False) for field in OUTCOMES_SCHEMA],
                schema=described,
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(f"outcomes of {split} cannot be put into a table: {error}") from error
        return cls(table)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table and check it.

        Raises:
            RunFileError: no such file, no such format, or a column that cannot be; file and column are named.
        """
        try:
            return cls(pq.read_table(path))
        except FileNotFoundError as error:
            raise RunFileError(f"outcomes {path} do not exist; evaluate the arm again") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise RunFileError(f"outcomes {path}: {error}") from error

    def write(self, path: Path) -> None:
        """Write the table; the file appears whole or not at all."""
        buffer = pa.BufferOutputStream()
        pq.write_table(self.table, buffer)
        write_atomically(path, buffer.getvalue().to_pybytes())

    @property
    def n(self) -> int:
        """Test images."""
        return int(self.table.num_rows)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return tuple(json.loads(self.table.schema.metadata[b"class_names"]))

    @property
    def split(self) -> str:
        """Name of the test split."""
        return str(self.table.schema.metadata[b"split"].decode())

    @cached_property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(self._listed("sample_id"))

    @cached_property
    def mask_sources(self) -> tuple[MaskSource, ...]:
        return tuple(self._listed("mask_source"))

    @cached_property
    def labels(self) -> Tensor:
        return torch.tensor(self._listed("label"), dtype=torch.int64)

    @cached_property
    def predictions(self) -> Tensor:
        return torch.tensor(self._listed("prediction"), dtype=torch.int64)

    @cached_property
    def confidence(self) -> Tensor:
        return torch.tensor(self._listed("confidence"))

    @cached_property
    def correct(self) -> Tensor:
        """``(n,)`` bool: the prediction is the label."""
        return self.predictions == self.labels

    @cached_property
    def rma(self) -> Tensor:
        """``(n,)`` float32, NaN without evidence."""
        return torch.tensor(self._listed("rma"))

    @cached_property
    def mask_share(self) -> Tensor:
        """``(n,)`` float32, NaN without evidence; the RMA of a uniform heatmap."""
        return torch.tensor(self._listed("mask_share"))

    @cached_property
    def heatmap_mass(self) -> Tensor:
        return torch.tensor(self._listed("heatmap_mass"))

    @cached_property
    def swapped_correct(self) -> Tensor:
        """``(n,)`` float32: 1 or 0 for the prediction on a swapped background, NaN where there is none."""
        pairs = zip(self._listed("swapped_prediction"), self.labels.tolist(), strict=True)
        return torch.tensor([math.nan if p is None else float(p == label) for p, label in pairs])

    @property
    def n_annotated(self) -> int:
        """Images with evidence in view; PT, IR and RMA are about these."""
        return int((~self.rma.isnan()).sum())

    @property
    def empty_heatmaps(self) -> int:
        """Images whose heatmap points at nothing."""
        return int((self.heatmap_mass == 0).sum())

    @property
    def swapped_n(self) -> int:
        """Images that exist with another background too."""
        return int((~self.swapped_correct.isnan()).sum())

    def rationality(self, threshold: float = VALID_FROM) -> Rationality:
        """Predictions counted by whether they are right, and right for the right reason."""
        return metrics.rationality(self.correct, self.rma, threshold)

    def uniform_PT(self, threshold: float = VALID_FROM) -> float:
        """PT of a heatmap that is the same everywhere: what large masks alone would give.

        The share of right predictions whose mask covers at least the threshold of the image.
        """
        return metrics.rationality(self.correct, self.mask_share, threshold).PT

    def ratio_statistics(self, threshold: float = VALID_FROM) -> dict[str, RatioStatistic]:
        """The rates of the report, ready for the bootstrap; one entry an image, in the order of the rows."""
        return metrics.ratio_statistics(self.correct, self.rma, self.swapped_correct, threshold=threshold)

    def in_order_of(self, sample_ids: Sequence[str]) -> Self:
        """The same outcomes with rows in the order of these ids: how two tables are joined.

        Raises:
            ValueError: the ids are not those of this table; the first few are named.
        """
        row_of = {sample_id: row for row, sample_id in enumerate(self.sample_ids)}
        if len(sample_ids) != self.n or row_of.keys() != set(sample_ids):
            unknown = [sample_id for sample_id in sample_ids if sample_id not in row_of]
            missing = sorted(row_of.keys() - set(sample_ids))
            raise ValueError(
                f"sample ids do not match: not in these outcomes: {named(unknown)}; only in these outcomes: "
                f"{named(missing)}"
            )
        rows = pa.array([row_of[sample_id] for sample_id in sample_ids], pa.int64())
        return type(self)(self.table.take(rows))

    def _listed(self, column: str) -> list[Any]:
        return list(self.table.column(column).to_pylist())


def summarise(outcomes: Outcomes, threshold: float = VALID_FROM) -> dict[str, int | float]:
    """Counts and rates of one test split, by the names the run record and the reports use.

    Rates are shares between 0 and 1, NaN where there is nothing to count. ``accuracy`` is over all images;
    ``PT``, ``IR``, ``RR_share`` and ``mean_RMA`` are over those with evidence.

    Example:
        >>> outcomes = Outcomes.from_columns(
        ...     sample_id=["a", "b"], label=[0, 1], prediction=[0, 1], confidence=[1.0, 1.0],
        ...     rma=[0.75, 0.25], mask_share=[0.5, 0.25], heatmap_mass=[1.0, 1.0],
        ...     mask_source=["mask", "box"], class_names=["cat", "dog"], split="test",
        ... )
        >>> summary = summarise(outcomes)
        >>> summary["accuracy"], summary["PT"], summary["mean_RMA"], summary["uniform_PT"]
        (1.0, 0.5, 0.5, 0.5)
    """
    counts = outcomes.rationality(threshold)
    rates = {name: rate.value for name, rate in outcomes.ratio_statistics(threshold).items()}
    return {
        "n": outcomes.n,
        "n_annotated": outcomes.n_annotated,
        "correct": int(outcomes.correct.sum()),
        **counts._asdict(),
        "accuracy": rates["accuracy"],
        "PT": counts.PT,
        "IR": counts.IR,
        "RR_share": counts.RR_share,
        "mean_RMA": rates["mean_RMA"],
        "empty_heatmaps": outcomes.empty_heatmaps,
        "swapped_n": outcomes.swapped_n,
        "swapped_accuracy": rates["swapped_accuracy"],
        "uniform_PT": outcomes.uniform_PT(threshold),
    }


class Gallery(NamedTuple):
    """A few test images with their masks and heatmaps, for people to look at.

    Attributes:
        images: ``(G, Hpx, Wpx, 3)`` uint8.
        masks: ``(G, Hpx, Wpx)`` uint8.
        heatmaps: ``(G, h, w)`` float32, non-negative.
        rows: ``(G,)`` int64, row of each image in the outcomes of the same arm.
    """

    images: Tensor
    masks: Tensor
    heatmaps: Tensor
    rows: Tensor

    def write(self, path: Path) -> None:
        """Write as safetensors.

        Raises:
            ValueError: a tensor's shape or type is not as described.
        """
        _check_gallery(self)
        write_atomically(path, save_tensors({name: t.contiguous() for name, t in self._asdict().items()}))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check.

        Raises:
            RunFileError: no such file, or its tensors are not those of a gallery.
        """
        try:
            tensors = load_tensors(path.read_bytes())
            if tensors.keys() != set(cls._fields):
                raise ValueError(f"it holds {named(sorted(tensors))}, expected {named(cls._fields)}")
            gallery = cls(**tensors)
            _check_gallery(gallery)
        except FileNotFoundError as error:
            raise RunFileError(f"gallery {path} does not exist") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise RunFileError(f"gallery {path}: {error}") from error
        return gallery


def _listed(values: Sequence[Any] | Tensor) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _check_outcomes(table: pa.Table) -> None:
    described = table.schema.metadata or {}
    for key in (b"class_names", b"split", b"format_version"):
        if key not in described:
            raise ValueError(f"no {key.decode()} in the metadata, expected a table written by Outcomes.write")
    if described[b"format_version"] != str(FORMAT_VERSION).encode():
        raise ValueError(f"format_version is {described[b'format_version'].decode()}, expected {FORMAT_VERSION}")
    if table.column_names != OUTCOMES_SCHEMA.names:
        raise ValueError(f"columns are {table.column_names}, expected {OUTCOMES_SCHEMA.names}")
    for field in OUTCOMES_SCHEMA:
        column = table.column(field.name)
        if column.type != field.type:
            raise ValueError(f"column {field.name} is {column.type}, expected {field.type}")
        if not field.nullable and column.null_count:
            raise ValueError(f"column {field.name} has {column.null_count} nulls, expected none")
    columns: dict[str, list[Any]] = table.to_pydict()
    ids = columns["sample_id"]
    if twice := [sample_id for sample_id, times in Counter(ids).items() if times > 1]:
        raise ValueError(f"column sample_id has {named(twice)} more than once; results are joined by it")
    classes = len(json.loads(described[b"class_names"]))
    for name in ("label", "prediction", "swapped_prediction"):
        _check_each(ids, columns, name, lambda p: p is None or 0 <= p < classes, f"one of {classes} classes")
    for name in ("rma", "mask_share"):
        _check_each(ids, columns, name, lambda v: math.isnan(v) or _is_share(v), "a share in [0, 1] or NaN")
    _check_each(ids, columns, "confidence", _is_share, "a probability in [0, 1]")
    _check_each(ids, columns, "heatmap_mass", lambda v: 0 <= v < math.inf, "a finite mass of 0 or more")
    sources = get_args(MaskSource)
    _check_each(ids, columns, "mask_source", lambda v: v in sources, f"one of {named(sources)}")
    _check_agreement(columns)


def _is_share(value: float) -> bool:
    return -_ROUNDING <= value <= 1 + _ROUNDING


def _check_each(ids: list[str], columns: dict[str, list[Any]], name: str, is_valid: Any, expected: str) -> None:
    for sample_id, value in zip(ids, columns[name], strict=True):
        if not is_valid(value):
            raise ValueError(f"column {name} is {value} for {sample_id!r}, expected {expected}")


def _check_agreement(columns: dict[str, list[Any]]) -> None:
    for sample_id, rma, share, mass, source in zip(
        *(columns[name] for name in ("sample_id", "rma", "mask_share", "heatmap_mass", "mask_source")),
        strict=True,
    ):
        if math.isnan(rma) != math.isnan(share):
            raise ValueError(f"columns rma and mask_share disagree on whether {sample_id!r} has evidence")
        if source == "none" and not math.isnan(rma):
            raise ValueError(f"column rma is {rma:g} for {sample_id!r}, expected NaN: its mask_source is none")
        if mass == 0 and rma > 0:
            raise ValueError(f"column rma is {rma:g} for {sample_id!r}, expected 0: its heatmap_mass is 0")


def _check_gallery(gallery: Gallery) -> None:
    expected = {"images": (torch.uint8, 4), "masks": (torch.uint8, 3), "heatmaps": (torch.float32, 3)}
    for name, (dtype, ndim) in (expected | {"rows": (torch.int64, 1)}).items():
        tensor: Tensor = getattr(gallery, name)
        if tensor.dtype != dtype or tensor.ndim != ndim:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {dtype} with {ndim} axes"
            )
    sizes = {name: len(tensor) for name, tensor in gallery._asdict().items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"images, masks, heatmaps and rows belong together, but their numbers differ: {sizes}")
    if gallery.images.shape[:3] != gallery.masks.shape or gallery.images.shape[3] != 3:
        raise ValueError(
            f"images of shape {tuple(gallery.images.shape)} and masks of shape {tuple(gallery.masks.shape)} "
            "do not match, expected (G, Hpx, Wpx, 3) and (G, Hpx, Wpx)"
        )
