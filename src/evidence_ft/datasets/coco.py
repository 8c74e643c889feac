"""COCO: images in a folder, categories and their boxes or segmentations in one JSON file per split.

What annotation tools export as "COCO" (CVAT, Label Studio, Roboflow, ...), used for classification: an
image's category is its class, and what is annotated of that category is the evidence for it. Licence and
split are those of your data.

Files, with the default settings and ``root: data/pets``::

    data/pets/annotations/instances_train.json
    data/pets/annotations/instances_val.json
    data/pets/train/rex.jpg
    data/pets/val/tom.jpg

A complete ``instances_train.json``::

    {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
     "images": [{"id": 7, "file_name": "rex.jpg", "width": 640, "height": 480}],
     "annotations": [{"id": 1, "image_id": 7, "category_id": 2,
                      "bbox": [100, 50, 200, 300],
                      "segmentation": [[100, 50, 300, 50, 200, 350]]}]}

Rules:

* Classes are the categories in the order of their ids, whether or not an image shows them, so all splits
  number them alike. The files of all splits must therefore list the same categories.
* ``file_name`` is the sample's id.
* An image with annotations of several categories has no one class: an error, unless ``several`` states a
  rule. ``largest`` takes the category that covers most pixels (of equal ones, that of the smaller id).
  Annotations of categories in ``leave_out`` do not count; an image with no others is left out.
* Evidence is the union of all annotations of the image's category, crowds (``iscrowd``) included. Polygons,
  compressed and uncompressed RLE are read. An annotation without segmentation gives its box; an image's
  ``mask_source`` is then "box", even if only one annotation of several had none.
* A box (x, y, width, height in pixels) covers each pixel it touches. Boxes and polygons may leave the image
  by up to one pixel, which is taken for rounding.
* Coordinates are those of the upright image, as the file's EXIF orientation turns it.

Errors name the file, the place in it (``annotations[3].bbox``), what was found, what was expected, and what
to do. The file as a whole and all boxes are checked on loading. What concerns one image (its file, its size,
its segmentations; its boxes too if ``on_bad_sample`` is "skip") is an error of that sample when it is opened.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from evidence_ft.images import Box, DataError, MaskArray, check_box, fill_box, read_image
from evidence_ft.samples import SHOWN, DatasetConfig, EvidenceDataset, Sample, choose_classes, first_per_class
from evidence_ft.types import BACKGROUND, OBJECT, MaskSource


class Config(DatasetConfig):
    """Where the files are, and what becomes of images that the format leaves open."""

    format: Literal["coco"] = Field("coco", description="Images with COCO annotations.")
    root: Path = Field(description="Folder of the data; relative to the working directory, ~ is expanded.")
    images: str = Field("{split}", description="Folder of a split's images, relative to root.")
    annotations: str = Field(
        "annotations/instances_{split}.json", description="Annotation file of a split, relative to root."
    )
    test_splits: tuple[str, ...] = Field(("val",), description="Splits to evaluate on.")
    mask: Literal["segmentation", "box"] = Field(
        "segmentation",
        description="Evidence: the segmentation (the box where an annotation has none), or always the box.",
    )
    several: Literal["error", "largest", "skip"] = Field(
        "error",
        description="An image with annotations of several categories is an error, takes the category with "
        "the largest annotated area, or is left out.",
    )
    unannotated: Literal["error", "leave_out"] = Field(
        "error", description="An image without annotations is an error, or is left out."
    )

    def annotation_file(self, split: str) -> Path:
        """Annotation file of a split."""
        return self.root.expanduser() / self.annotations.replace("{split}", split)

    def image_folder(self, split: str) -> Path:
        """Folder of a split's images."""
        return self.root.expanduser() / self.images.replace("{split}", split)


def load(config: Config, split: str) -> EvidenceDataset:
    """One split, without opening its images.

    Raises:
        DataError: a file or folder is missing, the JSON is malformed or contradicts itself, or an image's
            class is not decided by the settings.
    """
    path, folder = config.annotation_file(split), config.image_folder(split)
    content = _read(path, split)
    if not folder.is_dir():
        raise DataError(
            f"found no folder {folder} for the images of split {split!r}; expected it from data.root and "
            f"data.images ({config.images!r}); correct one of these"
        )
    _check_unique(content, path)
    names = {category.id: category.name for category in sorted(content.categories, key=lambda c: c.id)}
    _check_same_categories(config, split, names)
    return _rows(config, content, names, path, folder)


class _Category(BaseModel):
    id: int
    name: str = Field(min_length=1)


class _Image(BaseModel):
    id: int
    file_name: str = Field(min_length=1)
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class _Annotation(BaseModel):
    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)] | None = None
    segmentation: Any = None


class _Categories(BaseModel):
    categories: list[_Category]


class _File(_Categories):
    images: list[_Image]
    annotations: list[_Annotation]


class _Evidence(NamedTuple):
    """One annotation, and where it is in the file."""

    category_id: int
    box: Box | None
    segmentation: Any
    where: str


class CocoDataset:
    """A split of a COCO data set. An `EvidenceDataset`; made by `load`."""

    def __init__(
        self,
        class_names: tuple[str, ...],
        images: Sequence[_Image],
        labels: Sequence[int],
        evidence: Sequence[Sequence[_Evidence]],
        *,
        folder: Path,
        path: Path,
    ) -> None:
        self.class_names = class_names
        self.sample_ids = [image.file_name for image in images]
        self.labels = list(labels)
        self.mask_sources = [_source(annotations) for annotations in evidence]
        self._images = list(images)
        self._evidence = list(evidence)
        self._folder = folder
        self._path = path

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Sample:
        entry = self._images[row]
        image = read_image(self._folder / entry.file_name)
        if image.size != (entry.width, entry.height):
            turned = image.size == (entry.height, entry.width)
            cause = "the annotations seem to ignore its EXIF orientation: turn them" if turned else "scale them"
            raise DataError(
                f"sample {entry.file_name!r}: found an upright image of {image.width}x{image.height} pixels; "
                f"{self._path} expects {entry.width}x{entry.height}; {cause}, or restore the image that was "
                "annotated"
            )
        mask = _union([_drawn(annotation, entry) for annotation in self._evidence[row]])
        return Sample(entry.file_name, image, self.labels[row], mask, self.mask_sources[row])


def _read(path: Path, split: str) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        beside = sorted(file.name for file in path.parent.glob("*.json"))
        raise DataError(
            f"found no annotation file {path} for split {split!r}; expected it from data.root and "
            f"data.annotations; correct one of these, or data.train_split and data.test_splits "
            f"(JSON files in that folder: {', '.join(beside[:SHOWN]) or 'none'})"
        ) from error
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read ({error}); check its permissions") from error
    except ValidationError as error:
        raise DataError(_complaint(path, error)) from error


def _complaint(path: Path, error: ValidationError) -> str:
    """The first thing that is wrong with a file, in the words of JSON rather than pydantic."""
    detail = error.errors(include_url=False)[0]
    if detail["type"] == "json_invalid":
        return (
            f"{path}: found {detail['msg'][0].lower()}{detail['msg'][1:]}; expected a COCO file; "
            "export or download it again"
        )
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    place = place.lstrip(".") or "the file"
    if detail["type"] == "missing":
        return f"{path}: {place}: found no such key; expected it in every COCO file; add it, or export again"
    found = repr(detail["input"])
    shown = found if len(found) <= 60 else f"{found[:60]}..."
    expected = detail["msg"].removeprefix("Input should be ")
    return f"{path}: {place}: found {shown}; expected {expected}; correct it, or export again"


def _check_unique(content: _File, path: Path) -> None:
    unique: list[tuple[str, str, Sequence[int | str]]] = [
        ("categories", "id", [category.id for category in content.categories]),
        ("categories", "name", [category.name for category in content.categories]),
        ("images", "id", [image.id for image in content.images]),
        ("images", "file_name", [image.file_name for image in content.images]),
    ]
    for section, key, values in unique:
        first_at: dict[int | str, int] = {}
        for position, value in enumerate(values):
            if value in first_at:
                raise DataError(
                    f"{path}: {section}[{position}].{key}: found {value!r}, as in "
                    f"{section}[{first_at[value]}]; expected each {key} once; rename or remove one of the two"
                )
            first_at[value] = position


def _check_same_categories(config: Config, split: str, names: Mapping[int, str]) -> None:
    """Labels are numbers; with other categories in another split they would mean other classes."""
    reference = config.annotation_file(config.train_split)
    if config.classes is not None or split == config.train_split or not reference.is_file():
        return
    try:
        listed = _Categories.model_validate_json(reference.read_bytes()).categories
    except ValidationError as error:
        raise DataError(_complaint(reference, error)) from error
    expected = {category.name for category in listed}
    order = [category.name for category in sorted(listed, key=lambda category: category.id)]
    if order != list(names.values()):
        differing = sorted(expected ^ set(names.values()))
        difference = ", ".join(repr(name) for name in differing[:SHOWN]) or "another order of the ids"
        raise DataError(
            f"{config.annotation_file(split)}: categories: found other classes than in {reference}: "
            f"{difference}; expected the same in all splits; list all categories in both files, or state the "
            "classes and their order in data.classes"
        )


def _rows(config: Config, content: _File, names: Mapping[int, str], path: Path, folder: Path) -> CocoDataset:
    annotated = _evidence_of(config, content, names, path)
    images: list[_Image] = []
    evidence: list[list[_Evidence]] = []
    used: dict[str, str] = {}
    for position, image in enumerate(content.images):
        where = f"{path}: images[{position}] ({image.file_name})"
        counted = [one for one in annotated[image.id] if names[one.category_id] not in config.leave_out]
        if not annotated[image.id] and config.unannotated == "error":
            raise DataError(
                f"{where}: found no annotation of this image; expected one, which gives its class; annotate "
                "it, or set data.unannotated to leave_out"
            )
        category = _category(config, image, counted, names, where)
        if category is not None:
            images.append(image)
            evidence.append([one for one in counted if one.category_id == category])
            used.setdefault(names[category], where)
    class_names = choose_classes(
        list(names.values()),
        used,
        classes=config.classes,
        leave_out=config.leave_out,
        where=str(path),
    )
    if not images:
        raise DataError(
            f"{path}: no image is left; expected at least one; check data.leave_out, data.several and data.unannotated"
        )
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number[names[annotations[0].category_id]] for annotations in evidence]
    kept = first_per_class([image.file_name for image in images], labels, config.max_per_class)
    return CocoDataset(
        class_names,
        [images[row] for row in kept],
        [labels[row] for row in kept],
        [evidence[row] for row in kept],
        folder=folder,
        path=path,
    )


def _evidence_of(
    config: Config, content: _File, names: Mapping[int, str], path: Path
) -> defaultdict[int, list[_Evidence]]:
    """Annotations by the id of their image, reduced to what is drawn."""
    images = {image.id: image for image in content.images}
    annotated = defaultdict(list)
    for position, annotation in enumerate(content.annotations):
        where = f"{path}: annotations[{position}]"
        if annotation.image_id not in images:
            raise DataError(
                f"{where}.image_id: found {annotation.image_id}, which no image has; expected an id of "
                "images; correct it, or remove the annotation"
            )
        if annotation.category_id not in names:
            known = ", ".join(f"{number} ({name})" for number, name in list(names.items())[:SHOWN])
            raise DataError(
                f"{where}.category_id: found {annotation.category_id}, which no category has; expected one "
                f"of {known}; correct it, or remove the annotation"
            )
        image = images[annotation.image_id]
        if annotation.segmentation and config.mask == "segmentation":
            drawn = _Evidence(annotation.category_id, None, annotation.segmentation, f"{where}.segmentation")
        elif annotation.bbox is None:
            raise DataError(
                f"{where}.bbox: found no "
                f"box{' and no segmentation' if config.mask == 'segmentation' else ''}; expected [x, y, "
                "width, height] in pixels; add it, or remove the annotation"
            )
        else:
            drawn = _Evidence(annotation.category_id, Box(*annotation.bbox), None, f"{where}.bbox")
            if config.on_bad_sample == "error":
                _check_box(drawn, image)
        annotated[image.id].append(drawn)
    return annotated


def _category(
    config: Config, image: _Image, counted: Sequence[_Evidence], names: Mapping[int, str], where: str
) -> int | None:
    """The category that is the image's class; None if the image is left out."""
    categories = sorted({one.category_id for one in counted})
    if len(categories) <= 1:
        return categories[0] if categories else None
    if config.several == "skip":
        return None
    if config.several == "largest":

        def area(category: int) -> int:
            masks = [_drawn(one, image) for one in counted if one.category_id == category]
            return int((_union(masks) == OBJECT).sum())

        return max(categories, key=area)
    found = ", ".join(repr(names[category]) for category in categories)
    raise DataError(
        f"{where}: found annotations of {len(categories)} categories: {found}; expected one, which is the "
        "image's class; set data.several to largest or skip, or name categories that do not count in "
        "data.leave_out"
    )


def _source(annotations: Sequence[_Evidence]) -> MaskSource:
    return "mask" if all(one.box is None for one in annotations) else "box"


def _union(masks: Sequence[MaskArray]) -> MaskArray:
    union: MaskArray = np.maximum.reduce(masks)
    return union


def _drawn(evidence: _Evidence, image: _Image) -> MaskArray:
    if evidence.box is not None:
        _check_box(evidence, image)
        return fill_box(evidence.box, image_width=image.width, image_height=image.height)
    if isinstance(evidence.segmentation, dict):
        return _drawn_rle(evidence, image)
    return _drawn_polygons(evidence, image)


def _check_box(evidence: _Evidence, image: _Image) -> None:
    if evidence.box is not None:
        check_box(evidence.box, image_width=image.width, image_height=image.height, where=evidence.where)


def _drawn_polygons(evidence: _Evidence, image: _Image) -> MaskArray:
    polygons = evidence.segmentation
    if not isinstance(polygons, list):
        raise DataError(
            f"{evidence.where}: found {polygons!r:.60}; expected a list of polygons, or an RLE with size and "
            "counts; correct it, or remove it to use the box"
        )
    for number, polygon in enumerate(polygons):
        where = f"{evidence.where}[{number}]"
        # Of four numbers pycocotools would make a box, without a word.
        if not (
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(isinstance(value, int | float) and np.isfinite(value) for value in polygon)
        ):
            raise DataError(
                f"{where}: found {str(polygon)[:60]}; expected a polygon [x1, y1, x2, y2, x3, y3, ...] of at "
                "least three corners; correct it, or remove the segmentation to use the box"
            )
        x, y = polygon[0::2], polygon[1::2]
        if min(*x, *y) < -1 or max(x) > image.width + 1 or max(y) > image.height + 1:
            raise DataError(
                f"{where}: found x {min(x):g} to {max(x):g}, y {min(y):g} to {max(y):g} in an image of "
                f"{image.width}x{image.height} pixels; expected a polygon inside the image; check that it is "
                "in pixels of this image's upright size"
            )
    merged = rle.merge(rle.frPyObjects(polygons, image.height, image.width))
    return _decoded(_run_lengths(merged["counts"].decode()) or [], image)


def _drawn_rle(evidence: _Evidence, image: _Image) -> MaskArray:
    size, counts = evidence.segmentation.get("size"), evidence.segmentation.get("counts")
    if size != [image.height, image.width]:
        raise DataError(
            f"{evidence.where}.size: found {size!r:.60}; expected [{image.height}, {image.width}], height "
            "and width of the image; export the segmentation at the size of the upright image"
        )
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    if (
        not isinstance(runs, list)
        or not all(isinstance(run, int) and run >= 0 for run in runs)
        or sum(runs) != image.height * image.width
    ):
        raise DataError(
            f"{evidence.where}.counts: found {str(counts)[:60]!r}; expected run lengths, compressed or not, "
            f"that add up to the image's {image.height * image.width} pixels; export the segmentation again"
        )
    return _decoded(runs, image)


def _decoded(runs: Sequence[int], image: _Image) -> MaskArray:
    """Run lengths down the columns, the first of background, to a mask."""
    # Not pycocotools, whose decode warns under NumPy 2, and takes memory that nobody has written for missing runs.
    values = np.arange(len(runs), dtype=np.int64) % 2
    pixels = np.where(np.repeat(values, runs) == 1, OBJECT, BACKGROUND).astype(np.uint8)
    return pixels.reshape(image.width, image.height).T


def _run_lengths(text: str) -> list[int] | None:
    """Compressed RLE to its run lengths, None if it is none.

    Six bits to a character: five of the number, lowest first, and one that says whether more follow. From the
    fourth run on, what is stored is the difference to the run before last (``rleFrString`` of the COCO API).
    """
    runs: list[int] = []
    number, shift = 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        number |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, shift = 0, 0
    return runs if shift == 0 else None
