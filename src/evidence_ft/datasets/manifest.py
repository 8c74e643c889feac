"""Manifest: one table, CSV or Parquet, with a row for each image.

For data that no annotation tool has made: write the table yourself. Licence and split are those of your data.

Example of ``labels.csv``::

    sample_id,image,label,mask,split
    007,images/007.jpg,neutrophil,masks/007.png,train
    008,images/008.jpg,monocyte,,train
    009,images/009.jpg,neutrophil,masks/009.png,test

Columns:

===========================================  ========================================================
``sample_id``                                unique in the whole file; always text, so 007 stays 007
``image``, ``label``                         path of the image file, name of its class
``mask`` (optional)                          path of a greyscale file, white on the evidence
``box_x``, ``box_y``, ``box_width``,         evidence as a box in pixels of the upright image; all four
``box_height`` (optional)                    or none; (0, 0) is the top left corner
``split`` (optional)                         name of the split the row belongs to
===========================================  ========================================================

Rules:

* Paths are relative to the manifest's folder, or to ``root``.
* An empty mask and an empty box mean: not annotated. Where a row has both, the mask wins.
* A mask's pixel is evidence if its value, as a share of white, is at least ``mask_threshold``.
* A box covers each pixel it touches. It may leave the image by up to one pixel, which is taken for rounding.
* Classes are the labels of the whole file in alphabetical order, so all splits number them alike; or
  ``classes``.
* Without a column ``split``, all rows are the training split, and there is no other.
* Any other column is an error, lest a misspelt one be dropped without a word; name it in ``ignore_columns``.
* Space around a cell does not count. CSV is UTF-8 with commas; quotes as Excel writes them.

Errors name the file, the line (of a CSV, its header being line 1; of a Parquet file the row, from 1), what
was found, what was expected, and what to do. Whether the files exist is checked on loading, all at once; what
is in them, when a sample is opened. With ``on_bad_sample: skip`` a missing file, too, is an error of its
sample alone.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
from pyarrow import parquet
from pydantic import Field

from evidence_ft.images import Box, DataError, MaskArray, check_box, fill_box, read_image, read_mask
from evidence_ft.samples import (
    SHOWN,
    DatasetConfig,
    EvidenceDataset,
    Sample,
    choose_classes,
    first_per_class,
    nearest_name,
)
from evidence_ft.types import MaskSource

REQUIRED_COLUMNS = ("sample_id", "image", "label")
BOX_COLUMNS = ("box_x", "box_y", "box_width", "box_height")
COLUMNS = (*REQUIRED_COLUMNS, "mask", *BOX_COLUMNS, "split")


class Config(DatasetConfig):
    """Where the table is, and how its masks are read."""

    format: Literal["manifest"] = Field("manifest", description="A table with a row for each image.")
    file: Path = Field(description="CSV or Parquet file; relative to the working directory, ~ is expanded.")
    root: Path | None = Field(
        None, description="Folder that the table's paths are relative to; the file's own if not given."
    )
    mask_threshold: float = Field(0.5, gt=0, le=1, description="Share of white from which a mask's pixel is evidence.")
    ignore_columns: tuple[str, ...] = Field((), description="Columns of the table that are not for us.")


def load(config: Config, split: str) -> EvidenceDataset:
    """One split, without opening its images.

    Raises:
        DataError: the table cannot be read, a cell is malformed, the split is not in it, or files are
            missing.
    """
    path = config.file.expanduser()
    root = path.parent if config.root is None else config.root.expanduser()
    rows = [_entry(cells, where, root) for where, cells in _read(path, config.ignore_columns)]
    _check_unique(rows, path)
    class_names = choose_classes(
        sorted({row.label for row in rows}),
        {row.label: row.where for row in reversed(rows)},
        classes=config.classes,
        leave_out=config.leave_out,
        where=str(path),
    )
    number = {name: label for label, name in enumerate(class_names)}
    chosen = [row for row in _of_split(rows, split, config, path) if row.label in number]
    if not chosen:
        raise DataError(f"{path}: no row of split {split!r} is left; expected at least one; check data.leave_out")
    labels = [number[row.label] for row in chosen]
    kept = first_per_class([row.sample_id for row in chosen], labels, config.max_per_class)
    if config.on_bad_sample == "error":
        _check_files([chosen[row] for row in kept], path, root)
    return ManifestDataset(
        class_names, [chosen[row] for row in kept], [labels[row] for row in kept], config.mask_threshold
    )


class _Entry(NamedTuple):
    """A row of the table, and where it is."""

    sample_id: str
    image: Path
    label: str
    mask: Path | None
    box: Box | None
    split: str | None
    where: str


class ManifestDataset:
    """A split of a manifest. An `EvidenceDataset`; made by `load`."""

    def __init__(
        self,
        class_names: tuple[str, ...],
        entries: Sequence[_Entry],
        labels: Sequence[int],
        mask_threshold: float,
    ) -> None:
        self.class_names = class_names
        self.sample_ids = [entry.sample_id for entry in entries]
        self.labels = list(labels)
        self.mask_sources = [_source(entry) for entry in entries]
        self._entries = list(entries)
        self._mask_threshold = mask_threshold

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, row: int) -> Sample:
        entry = self._entries[row]
        image = read_image(entry.image)
        mask: MaskArray | None = None
        if entry.mask is not None:
            mask = read_mask(entry.mask, self._mask_threshold)
        elif entry.box is not None:
            check_box(entry.box, image_width=image.width, image_height=image.height, where=f"{entry.where}: box")
            mask = fill_box(entry.box, image_width=image.width, image_height=image.height)
        return Sample(entry.sample_id, image, self.labels[row], mask, self.mask_sources[row])


def _source(entry: _Entry) -> MaskSource:
    if entry.mask is not None:
        return "mask"
    return "none" if entry.box is None else "box"


def _read(path: Path, ignored: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and cells of each row, as text."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path}: found a file ending in {path.suffix!r}; expected .csv or .parquet; convert the table, "
            "or correct data.file"
        )
    if not path.is_file():
        raise DataError(f"found no file {path}; expected the manifest; correct data.file")
    header, rows = readers[path.suffix.lower()](path)
    _check_columns(header, ignored, path)
    if not rows:
        raise DataError(f"{path}: found a header but no rows; expected one for each image; add them")
    for where, cells in rows:
        yield where, dict(zip(header, cells, strict=True))


_Table = tuple[list[str], list[tuple[str, list[str]]]]


def _read_csv(path: Path) -> _Table:
    # Not pyarrow's reader: it guesses types, takes "NA" for a missing label, and forgets line numbers.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        lines: list[tuple[str, list[str]]] = []
        start = 1
        try:
            for cells in reader:
                if cells:
                    lines.append((f"{path}, line {start}", [cell.strip() for cell in cells]))
                start = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}, line {start}: found something that is not CSV in UTF-8 ({error}); expected commas "
                "between cells and closed quotes; save the table again as CSV UTF-8"
            ) from error
    if not lines:
        raise DataError(f"{path}: found an empty file; expected a header: {','.join(REQUIRED_COLUMNS)}")
    header = lines[0][1]
    for where, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{where}: found {len(cells)} cells; expected {len(header)} as in the header; quote cells "
                "that contain commas"
            )
    return header, lines[1:]


def _read_parquet(path: Path) -> _Table:
    try:
        # Not read_table, which would add columns from folders named like key=value.
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: found something that is not a Parquet table ({error}); write the file again"
        ) from error
    columns = [[_text(value) for value in column.to_pylist()] for column in table.columns]
    rows = zip(*columns, strict=True)
    return list(table.column_names), [
        (f"{path}, row {position}", list(row)) for position, row in enumerate(rows, start=1)
    ]


def _text(value: object) -> str:
    # NaN is how pandas writes an empty number.
    return "" if value is None or value != value else str(value).strip()


def _check_columns(header: Sequence[str], ignored: Sequence[str], path: Path) -> None:
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{path}: found column {twice[0]!r} more than once; expected it once; remove one")
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if len(header) == 1 and missing and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{path}: found a header without commas: {header[0]!r}; expected cells separated by commas; save "
            "the table as CSV with commas"
        )
    unknown = [name for name in header if name not in COLUMNS and name not in ignored]
    if missing:
        raise DataError(
            f"{path}: found no column {_names(missing)}; expected {_names(REQUIRED_COLUMNS)}; add it, or "
            f"rename the column that holds it (columns found: {_names(header)})"
        )
    if unknown:
        nearest = nearest_name(unknown[0], [name for name in COLUMNS if name not in header])
        suggestion = f" (did you mean {nearest!r}?)" if nearest else ""
        raise DataError(
            f"{path}: found column {_names(unknown)}, which means nothing here{suggestion}; expected only "
            f"{_names(COLUMNS)}; rename it, or list it in data.ignore_columns"
        )
    boxes = [name for name in BOX_COLUMNS if name in header]
    if boxes and len(boxes) < len(BOX_COLUMNS):
        lacking = [name for name in BOX_COLUMNS if name not in boxes]
        raise DataError(
            f"{path}: found column {_names(boxes)} but not {_names(lacking)}; expected all four or none; add the others"
        )


def _names(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _entry(cells: dict[str, str], where: str, root: Path) -> _Entry:
    for name in (*REQUIRED_COLUMNS, "split"):
        if cells.get(name) == "":
            raise DataError(f"{where}: found an empty {name}; expected one for every row; fill it in")
    return _Entry(
        cells["sample_id"],
        root / Path(cells["image"]).expanduser(),
        cells["label"],
        root / Path(cells["mask"]).expanduser() if cells.get("mask") else None,
        _box(cells, where),
        cells.get("split"),
        where,
    )


def _box(cells: dict[str, str], where: str) -> Box | None:
    given = [name for name in BOX_COLUMNS if cells.get(name)]
    if not given:
        return None
    if len(given) < len(BOX_COLUMNS):
        lacking = [name for name in BOX_COLUMNS if name not in given]
        raise DataError(
            f"{where}: found {_names(given)} but no {_names(lacking)}; expected all four or none; complete "
            "the box, or empty its cells"
        )
    numbers = []
    for name in BOX_COLUMNS:
        try:
            numbers.append(float(cells[name]))
        except ValueError as error:
            raise DataError(
                f"{where}: {name}: found {cells[name]!r}; expected a number of pixels; correct it"
            ) from error
    return Box(*numbers)


def _check_unique(rows: Sequence[_Entry], path: Path) -> None:
    first_at: dict[str, str] = {}
    for row in rows:
        if row.sample_id in first_at:
            first = first_at[row.sample_id].removeprefix(f"{path}, ")
            raise DataError(
                f"{row.where}: found sample_id {row.sample_id!r}, as in {first}; expected each id once in "
                "all splits together; rename or remove one of the two"
            )
        first_at[row.sample_id] = row.where


def _of_split(rows: Sequence[_Entry], split: str, config: Config, path: Path) -> list[_Entry]:
    if rows[0].split is None:
        if split == config.train_split:
            return list(rows)
        raise DataError(
            f"{path}: found no column 'split', so all rows are for training and split {split!r} is empty; "
            "expected the column to say which rows are which; add it, and hold some rows back for testing"
        )
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        counts = Counter(row.split for row in rows)
        present = ", ".join(f"{name!r} ({count} rows)" for name, count in list(counts.items())[:SHOWN])
        nearest = nearest_name(split, [str(name) for name in counts])
        suggestion = f" (did you mean {nearest!r}?)" if nearest else ""
        raise DataError(
            f"{path}: found no row of split {split!r}{suggestion}; the file has {present}; correct the "
            "column, or data.train_split and data.test_splits"
        )
    return chosen


def _check_files(rows: Sequence[_Entry], path: Path, root: Path) -> None:
    missing = [
        f"  {row.where.removeprefix(f'{path}, ')}: {name} {file}"
        for row in rows
        for name, file in (("image", row.image), ("mask", row.mask))
        if file is not None and not file.is_file()
    ]
    if missing:
        shown = missing[:SHOWN] + ([f"  ... and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else [])
        raise DataError(
            f"{path}: found no file at {len(missing)} paths:\n"
            + "\n".join(shown)
            + f"\nPaths are relative to {root} (data.root). Correct them, restore the files, or leave these "
            "samples out with --data.on-bad-sample skip."
        )
