"""Shapes: objects with exact masks on clutter, and a shortcut that gives the class away.

What: eight shapes (circle, square, triangle, ...), one to an image of 64 x 64 pixels, in any colour, size, place and
slight rotation, over a noisy gradient with strokes and specks. Beside the object lie two *tags*: small squares of one
colour, which stands for a class.

Splits: in ``train`` and ``test`` the tags name the image's class, so a model can be right by reading them. In
``shifted`` their class is drawn at random: only a model that looks at the object stays right. ``plain`` has no tags;
what ``toy_clip`` was pre-trained on.

Evidence: the object's exact pixels (``mask_source`` "mask"). Generated from a seed, the same on every machine; nothing
is downloaded or stored. Free of any licence.
"""

import colorsys
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evidence_ft.images import DataError
from evidence_ft.samples import Sample
from evidence_ft.types import MaskSource

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "arrow")
SPLITS = ("train", "test", "shifted", "plain")
SIZE = 64
"""Side of an image in pixels."""

_OVERSAMPLING = 4
_TAG = 13  # side of a tag in pixels
_TAGS = 2  # in an image: two are learnt so fast that a learning rate which spares what the model knows is enough
_CLEARANCE = 2  # pixels around a tag that belong to neither object nor another tag


class Config(BaseModel):
    """How many images of each split are drawn, and from which seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["shapes"] = Field("shapes", description="generated shapes with a shortcut")
    train_split: str = Field("train", description="split that is trained on")
    test_splits: tuple[str, ...] = Field(("test", "shifted"), min_length=1, description="splits that are evaluated")
    train_images: int = Field(4000, gt=0, description="images to train on")
    test_images: int = Field(500, gt=0, description="images of each split that is evaluated")
    seed: int = Field(0, ge=0, description="seed of the images, apart from the run's own")
    on_bad_sample: Literal["error", "skip"] = Field("error", description="generated images are never bad")

    @model_validator(mode="after")
    def _splits_are_there_and_apart(self) -> Self:
        for split in (self.train_split, *self.test_splits):
            if split not in SPLITS:
                raise ValueError(f"shapes has no split {split!r}; choose from {', '.join(SPLITS)}")
        if len(set(self.test_splits)) < len(self.test_splits):
            raise ValueError(f"test_splits lists a split more than once: {', '.join(self.test_splits)}")
        if self.train_split in self.test_splits:
            raise ValueError(f"split {self.train_split!r} is both train_split and one of test_splits")
        return self


def load(config: Config, split: str) -> "Shapes":
    """One split; images are drawn when they are first asked for.

    Raises:
        DataError: no such split.
    """
    if split not in SPLITS:
        raise DataError(f"shapes has no split {split!r}; choose from {', '.join(SPLITS)}")
    return Shapes(split, config.train_images if split == config.train_split else config.test_images, config.seed)


class Shapes:
    """``images`` generated images of one split, classes in turn. An `EvidenceDataset`."""

    class_names = CLASS_NAMES

    def __init__(self, split: str, images: int, seed: int = 0) -> None:
        self.split = split
        self.seed = seed
        self.sample_ids = [f"{split}-{seed}-{row:06d}" for row in range(images)]
        self.labels = [row % len(CLASS_NAMES) for row in range(images)]
        self.mask_sources: list[MaskSource] = ["mask"] * images
        self._drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Sample:
        # Kept: an epoch would spend more time drawing than training, and an image takes 16 kB.
        if row not in self._drawn:
            drawing = self.draw(row)
            self._drawn[row] = Sample(self.sample_ids[row], drawing.image, self.labels[row], drawing.mask, "mask")
        return self._drawn[row]

    def draw(self, row: int) -> "Drawing":
        """The image of a row with what a caption can say about it."""
        generator = np.random.default_rng([self.seed, SPLITS.index(self.split), row])
        label = self.labels[row]
        tag: int | None = label
        if self.split == "shifted":
            tag = int(generator.integers(len(CLASS_NAMES)))
        elif self.split == "plain":
            tag = None
        return draw(generator, label, tag)


class Drawing(NamedTuple):
    """A drawn image.

    Attributes:
        image: RGB.
        mask: ``(SIZE, SIZE)`` uint8, 1 on the object.
        hue: of the object, in [0, 1).
        centre: of the object, x and y in [0, 1].
    """

    image: Image.Image
    mask: NDArray[np.uint8]
    hue: float
    centre: tuple[float, float]


def draw(generator: np.random.Generator, label: int, tag: int | None) -> Drawing:
    """One object on clutter, with the tags of class ``tag`` beside it, or without.

    Every random draw is made whether or not there are tags, so an image differs from its tagged twin by them alone.
    """
    canvas = _clutter(generator)
    radius = generator.uniform(14, 20)
    centre = generator.uniform(radius + 1, SIZE - radius - 1, size=2)
    angle = generator.uniform(-0.3, 0.3)
    mask = _shape(CLASS_NAMES[label], centre, radius, angle)
    hue = generator.uniform()
    colour = _rgb(hue, generator.uniform(0.5, 1.0), generator.uniform(0.55, 1.0))
    fill = np.clip(np.asarray(colour) + generator.normal(0, 5, (SIZE, SIZE, 3)), 0, 255)
    # Anti-aliased: the edge blends, the mask is where the object has at least half of the pixel.
    alpha = mask[..., None]
    canvas = canvas * (1 - alpha) + fill * alpha
    places = _beside(generator, mask > 0)
    if tag is not None:
        for y, x in places:
            canvas[y : y + _TAG, x : x + _TAG] = _tag(tag)
    image = Image.fromarray(np.clip(canvas + generator.normal(0, 3, canvas.shape), 0, 255).astype(np.uint8))
    return Drawing(
        image, (mask >= 0.5).astype(np.uint8), float(hue), (float(centre[0] / SIZE), float(centre[1] / SIZE))
    )


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def _clutter(generator: np.random.Generator) -> NDArray[np.float64]:
    """A gradient between two dull colours, with strokes and specks in any colour."""
    ends = [np.asarray(_rgb(generator.uniform(), 0.4, generator.uniform(0.2, 0.8)), float) for _ in range(2)]
    direction = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    blend = np.clip(0.5 + x * np.cos(direction) + y * np.sin(direction), 0, 1)[..., None]
    image = Image.fromarray((ends[0] * blend + ends[1] * (1 - blend)).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(generator.integers(2, 5)):
        ends_of_stroke = [tuple(point) for point in generator.uniform(-5, SIZE + 5, (2, 2))]
        pen.line(ends_of_stroke, fill=_rgb(generator.uniform(), 0.5, generator.uniform(0.2, 0.9)), width=2)
    for _ in range(generator.integers(2, 7)):
        cx, cy = generator.uniform(0, SIZE, 2)
        size = generator.uniform(0.8, 2.2)
        colour = _rgb(generator.uniform(), 0.6, generator.uniform(0.3, 1.0))
        pen.rectangle((cx - size, cy - size, cx + size, cy + size), fill=colour)
    blurred = image.filter(ImageFilter.GaussianBlur(0.6))
    return np.asarray(blurred, float) + generator.normal(0, 3, (SIZE, SIZE, 3))


def _shape(name: str, centre: NDArray[np.float64], radius: float, angle: float) -> NDArray[np.float64]:
    """Coverage of each pixel by the shape, in [0, 1]."""
    scale = _OVERSAMPLING
    image = Image.new("L", (SIZE * scale, SIZE * scale))
    pen = ImageDraw.Draw(image)

    def at(points: NDArray[np.float64]) -> list[tuple[float, float]]:
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return [tuple(point) for point in (points @ turn * radius + centre) * scale]

    def disc(x: float, y: float, size: float, ink: int) -> None:
        ((cx, cy),) = at(np.array([[x, y]]))
        reach = size * radius * scale
        pen.ellipse((cx - reach, cy - reach, cx + reach, cy + reach), fill=ink)

    def regular(corners: int) -> NDArray[np.float64]:
        turns = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
        return np.stack([np.cos(turns), np.sin(turns)], axis=1)

    if name == "circle":
        disc(0, 0, 0.95, 255)
    elif name == "ring":
        disc(0, 0, 1, 255)
        disc(0, 0, 0.45, 0)
    elif name == "crescent":
        disc(0, 0, 1, 255)
        disc(0.55, 0, 0.75, 0)
    elif name == "square":
        pen.polygon(at(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85), fill=255)
    elif name == "triangle":
        pen.polygon(at(regular(3) * 1.1), fill=255)
    elif name == "star":
        points = regular(10) * np.where(np.arange(10) % 2, 0.45, 1.1)[:, None]
        pen.polygon(at(points), fill=255)
    elif name == "cross":
        pen.polygon(at(np.array([[-1, -0.33], [1, -0.33], [1, 0.33], [-1, 0.33]])), fill=255)
        pen.polygon(at(np.array([[-0.33, -1], [-0.33, 1], [0.33, 1], [0.33, -1]])), fill=255)
    elif name == "arrow":
        pen.polygon(at(np.array([[0, -1.05], [0.85, -0.05], [-0.85, -0.05]])), fill=255)
        pen.polygon(at(np.array([[-0.35, -0.1], [0.35, -0.1], [0.35, 1], [-0.35, 1]])), fill=255)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), float) / 255


def _tag(label: int) -> NDArray[np.float64]:
    """The colour that stands for a class."""
    patch = np.empty((_TAG, _TAG, 3))
    patch[:] = _rgb(label / len(CLASS_NAMES), 1, 1)
    return patch


def _beside(generator: np.random.Generator, occupied: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Top left corners of places for the tags along the edge of the image, clear of the object and of each other."""
    last = SIZE - _TAG
    edge = [(y, x) for y in range(last + 1) for x in range(last + 1) if y in (0, last) or x in (0, last)]
    taken, places = occupied.copy(), []
    for index in generator.permutation(len(edge)):
        y, x = edge[index]
        around = np.s_[max(y - _CLEARANCE, 0) : y + _TAG + _CLEARANCE, max(x - _CLEARANCE, 0) : x + _TAG + _CLEARANCE]
        if not taken[around].any():
            taken[y : y + _TAG, x : x + _TAG] = True
            places.append((y, x))
            if len(places) == _TAGS:
                return places
    raise AssertionError("an object of at most 44 pixels leaves room for two tags along the edge of 64")
