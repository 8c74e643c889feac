"""Objects on other images' backgrounds: to see what a prediction needs, and to teach it to need the object.

A model that looks at the object keeps its prediction when the background comes from an image of another
class; one that looks elsewhere loses it. After the Mixed-Rand and Mixed-Next sets of Xiao et al., "Noise or
Signal: The Role of Image Backgrounds in Object Recognition" (ICLR 2021, arXiv 2006.09994), with two
differences. The background is never of the object's own class (Mixed-Rand draws it from all classes, so it
agrees by chance once in K), and the donor's object is painted out from its surroundings (theirs is covered by
tiles of the background beside it).

A mask that is a filled box carries the background inside the box along, so the swap is then a milder one.

This module knows nothing of models.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from evidence_ft.images import DataError, MaskArray
from evidence_ft.samples import EvidenceDataset, Sample, check_sample
from evidence_ft.types import OBJECT, MaskSource

Pixels = npt.NDArray[np.uint8]
"""``(Hpx, Wpx, 3)`` RGB."""

_MARGIN = 0.015  # of the longer side: soft edges and shadows that a mask leaves just outside
_SMOOTHING = 0.02  # of the longer side: softens the wedges that nearest pixels make


def paint_out(image: Pixels, mask: MaskArray) -> Pixels:
    """The image without its object: a guess at the background behind it.

    The object, dilated by 1.5 % of the longer side (at least 2 pixels), is filled with the nearest pixel of
    the background, then smoothed inside the hole only. That is crude beside inpainting, and on purpose: it
    needs no second model whose own habits one would measure too, and it brings nothing into the image that
    was not there. The object's colours go, and so does its outline on an even background. What touches the
    object is drawn out into the hole in wedges, and on a textured background the smooth hole can be made out.

    Where the dilated object leaves no background, it is not dilated; where the object itself leaves none, the
    whole image becomes its mean colour. An image without an object is returned as it is. The background
    outside the dilated object is never changed.

    Args:
        image: ``(Hpx, Wpx, 3)``.
        mask: ``(Hpx, Wpx)``, `OBJECT` on the object.

    Raises:
        ValueError: image and mask differ in size.

    Example:
        >>> image = np.full((8, 8, 3), 50, dtype=np.uint8)
        >>> mask = np.zeros((8, 8), dtype=np.uint8)
        >>> image[3:5, 3:5], mask[3:5, 3:5] = 255, 1
        >>> np.unique(paint_out(image, mask))
        array([50], dtype=uint8)
    """
    _check_sizes(image, mask)
    hole = mask == OBJECT
    if not hole.any():
        return image.copy()
    if hole.all():
        mean = image.reshape(-1, 3).mean(axis=0)
        return np.broadcast_to(np.rint(mean).astype(np.uint8), image.shape).copy()
    longer = max(mask.shape)
    dilated = ndimage.distance_transform_edt(~hole) <= max(2, _MARGIN * longer)
    if not dilated.all():
        hole = dilated
    rows, columns = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    filled = image[rows, columns].astype(np.float32)
    sigma = max(1.0, _SMOOTHING * longer)
    smooth = ndimage.gaussian_filter(filled, sigma=(sigma, sigma, 0), mode="nearest")
    return np.where(hole[..., None], np.rint(smooth), image).astype(np.uint8)


def swap_background(image: Pixels, mask: MaskArray, background: Pixels) -> Pixels:
    """The image's object, pixel by pixel, on another background, which is stretched to the image's size.

    Args:
        image: ``(Hpx, Wpx, 3)``.
        mask: ``(Hpx, Wpx)``, `OBJECT` on the object.
        background: ``(any, any, 3)``.

    Raises:
        ValueError: image and mask differ in size.

    Example:
        >>> image = np.full((1, 2, 3), 9, dtype=np.uint8)
        >>> swap_background(image, np.array([[1, 0]], dtype=np.uint8), np.zeros((1, 2, 3), np.uint8))[..., 0]
        array([[9, 0]], dtype=uint8)
    """
    _check_sizes(image, mask)
    height, width = mask.shape
    stretched = Image.fromarray(background).resize((width, height), Image.Resampling.BICUBIC)
    return np.where((mask == OBJECT)[..., None], image, np.asarray(stretched))


def _check_sizes(image: Pixels, mask: MaskArray) -> None:
    if image.shape != (*mask.shape, 3):
        raise ValueError(
            f"an image of shape {image.shape} does not fit a mask of shape {mask.shape}; expected (H, W, 3) and (H, W)"
        )


def choose_donors(labels: Sequence[int], usable: Sequence[bool], seed: int) -> list[int | None]:
    """Row whose background each row gets: drawn at random from the usable rows of other classes.

    Each donor is used once, as far as the classes allow; where one class has more than half of the rows, the
    others give about equally often. With a single class there is no background of another one.

    Args:
        labels: per row.
        usable: per row, whether it can give and get a background.
        seed: at least 0; the same seed gives the same donors on every machine.

    Returns:
        Per row, the donor's row; None where the row is not usable or there is no donor.

    Example:
        >>> choose_donors([0, 1, 0], [True, True, False], seed=0)
        [1, 0, None]
    """
    if len(labels) != len(usable):
        raise ValueError(f"{len(labels)} labels and {len(usable)} entries of usable; expected one each per row")
    donors: list[int | None] = [None] * len(labels)
    generator = np.random.default_rng(seed)
    rows = [int(row) for row in generator.permutation(np.flatnonzero(np.asarray(usable, dtype=bool)))]
    counts = Counter(labels[row] for row in rows)
    if len(counts) < 2:
        return donors
    # In blocks by class, the largest first: a shift by its size takes every row out of its block, unless that
    # class outnumbers all others; then these serve it in turn.
    rows.sort(key=lambda row: (-counts[labels[row]], labels[row]))
    largest = counts[labels[rows[0]]]
    others = rows[largest:]
    given = [others[turn % len(others)] for turn in range(max(largest, len(others)))]
    given += rows[: len(rows) - len(given)]
    _shuffle(given, rows, labels, generator)
    for row, donor in zip(rows, given, strict=True):
        donors[row] = donor
    return donors


def _shuffle(given: list[int], rows: Sequence[int], labels: Sequence[int], generator: np.random.Generator) -> None:
    """Exchange donors at random, so that a class's backgrounds do not all come from the same other class."""
    for i, j in generator.integers(len(rows), size=(10 * len(rows), 2)).tolist():
        if labels[rows[i]] != labels[given[j]] and labels[rows[j]] != labels[given[i]]:
            given[i], given[j] = given[j], given[i]


class SwappedBackgrounds:
    """The annotated images of a data set, each object on the painted-out background of another class's image.

    An `EvidenceDataset`: ids, labels and masks are the originals', so outcomes can be compared row by row.

    Args:
        dataset: whose images are swapped; those without a mask, or without a donor, are left out.
        seed: of the choice of donors.

    Attributes:
        rows: per row of this data set, its row in the original one.
        donors: per row of this data set, the original row whose background it has.
    """

    def __init__(self, dataset: EvidenceDataset, *, seed: int) -> None:
        self.dataset = dataset
        chosen = choose_donors(dataset.labels, [source != "none" for source in dataset.mask_sources], seed)
        self.rows = tuple(row for row, donor in enumerate(chosen) if donor is not None)
        self.donors = tuple(donor for donor in chosen if donor is not None)
        self.class_names = dataset.class_names
        self.sample_ids = tuple(dataset.sample_ids[row] for row in self.rows)
        self.labels = tuple(dataset.labels[row] for row in self.rows)
        self.mask_sources: tuple[MaskSource, ...] = tuple(dataset.mask_sources[row] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        sample, donor = self.dataset[self.rows[row]], self.dataset[self.donors[row]]
        mask = _mask(sample)
        background = paint_out(np.asarray(donor.image), _mask(donor))
        composite = swap_background(np.asarray(sample.image), mask, background)
        return sample._replace(image=Image.fromarray(composite))


class BackgroundSwap:
    """Augmentation: an object, now and then, on the painted-out background of a random other training image.

    The background comes from an annotated image of another class, or of the same one where there is no other. An
    image without a mask stays as it is; the mask, the label and the id never change. Unlike the fixed pairs of
    `SwappedBackgrounds`, the donor is drawn anew each time.

    Painting out costs about as much as a few crops (1 ms for 64 x 64 pixels, 60 ms for 480 x 480 on one core), so
    painted-out backgrounds are kept, the most recently used first, as far as the bound on memory allows. Each process
    that loads images keeps its own, for an epoch where ``num_workers`` is not 0.

    Args:
        dataset: training images, which give and get backgrounds.
        probability: that an image gets another background.
        cache_bytes: bound on the backgrounds kept in memory; 256 MiB hold 20,000 of 64 x 64 pixels, 390 of 480 x 480.

    Raises:
        ValueError: the probability is no probability.
        DataError: fewer than two images have a mask, so there is no other background.
    """

    def __init__(self, dataset: EvidenceDataset, probability: float, *, cache_bytes: int = 2**28) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}, expected a share between 0 and 1")
        self.dataset = dataset
        self.probability = probability
        self.cache_bytes = cache_bytes
        annotated = [row for row, source in enumerate(dataset.mask_sources) if source != "none"]
        if probability and len(annotated) < 2:
            raise DataError(
                f"found {len(annotated)} training image(s) with a mask; swapping backgrounds needs at least two: "
                "annotate more, or set training.background_swap to 0"
            )
        # By class, so that the rows of all other classes are what lies before and after one block.
        self._annotated = sorted(annotated, key=lambda row: (dataset.labels[row], row))
        self._labels = [dataset.labels[row] for row in self._annotated]
        self._kept: OrderedDict[int, Pixels] = OrderedDict()
        self._kept_bytes = 0

    def __call__(self, row: int, sample: Sample, generator: np.random.Generator) -> Sample:
        """The sample, or its object on another background.

        Args:
            row: of the sample in the data set.
            sample: to vary.
            generator: all randomness comes from it.
        """
        if sample.mask is None or generator.random() >= self.probability:
            return sample
        background = self._background(self.choose_donor(row, generator))
        composite = swap_background(np.asarray(sample.image), _mask(sample), background)
        return sample._replace(image=Image.fromarray(composite))

    def choose_donor(self, row: int, generator: np.random.Generator) -> int:
        """Row of an annotated image of another class, each as likely; with one class alone, of another image."""
        label = self.dataset.labels[row]
        first, last = bisect_left(self._labels, label), bisect_left(self._labels, label + 1)
        if last - first == len(self._labels):
            first = self._annotated.index(row)
            last = first + 1
        choice = int(generator.integers(len(self._annotated) - (last - first)))
        return self._annotated[choice if choice < first else choice + last - first]

    def _background(self, donor: int) -> Pixels:
        if donor in self._kept:
            self._kept.move_to_end(donor)
            return self._kept[donor]
        sample = self.dataset[donor]
        painted = paint_out(np.asarray(sample.image), _mask(sample))
        self._kept[donor] = painted
        self._kept_bytes += painted.nbytes
        while self._kept_bytes > self.cache_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return painted


def _mask(sample: Sample) -> MaskArray:
    check_sample(sample)
    if sample.mask is None:
        raise DataError(
            f"sample {sample.sample_id!r}: found no mask on opening it, though its row lists one; expected a "
            "mask; correct the data set's mask_sources"
        )
    return sample.mask
