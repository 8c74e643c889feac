"""From a sample to a batch: the one transform that moves an image and its mask together, and the way back.

This module knows nothing of models, file formats or training.
"""

from collections.abc import Callable, Sequence
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from evidence_ft.installation import explained
from evidence_ft.samples import EvidenceDataset, Sample
from evidence_ft.types import BACKGROUND, Batch, Preprocessing

with explained("torchvision"):
    from torchvision import tv_tensors
    from torchvision.transforms import v2

Swap: TypeAlias = Callable[[int, Sample, np.random.Generator], Sample]
"""What becomes of a row's sample before it is transformed, such as `evidence_ft.backgrounds.BackgroundSwap`."""


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


_SWAPPING = 1  # keeps the draws of background swaps apart from those of crops and flips


class SampleTransform:
    """Sample to model input: one transform that moves the image and its mask together.

    Without augmentation, images come out as from open_clip's own evaluation transform (resized by Pillow with
    antialiasing, padded in black), except that a stated bilinear interpolation also holds for ``shortest``
    with a model that is not square, where open_clip resizes bicubically; or, where ``crop_rounding`` is ``down``, as
    from transformers' image processors with Pillow. Masks are resized by nearest neighbour and padded as background.

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
            image, wrapped = self._centre(image, wrapped)
        else:
            image, wrapped = self._vary(sample.image, wrapped, self.augmentation)
        pixels = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)
        mean, std = list(self.preprocessing.mean), list(self.preprocessing.std)
        return v2.functional.normalize(pixels, mean, std).as_subclass(Tensor), wrapped.as_subclass(Tensor)

    def _centre(self, image: Image.Image, mask: tv_tensors.Mask) -> tuple[Image.Image, tv_tensors.Mask]:
        rows, columns = self.preprocessing.size
        if self.preprocessing.crop_rounding == "down" and image.height >= rows and image.width >= columns:
            place = [(image.height - rows) // 2, (image.width - columns) // 2, rows, columns]
            return v2.functional.crop(image, *place), v2.functional.crop(mask, *place)
        cropped: tuple[Image.Image, tv_tensors.Mask] = v2.CenterCrop((rows, columns))(image, mask)
        return cropped

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
    rows, columns = preprocessing.resized or preprocessing.size
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
    workers, the order of the rows or whatever else draws random numbers; and it takes none from them. Crops and
    flips are the same whether or not backgrounds are swapped.

    Args:
        dataset: to read.
        transform: what happens to each sample.
        seed: of the augmentation, at least 0.
        swap: puts objects on other backgrounds; None to leave all images as they are.
    """

    def __init__(
        self, dataset: EvidenceDataset, transform: SampleTransform, seed: int, swap: Swap | None = None
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; choose one of at least 0")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.swap = swap
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
        if self.swap is not None:
            sample = self.swap(row, sample, np.random.default_rng([*self._entropy(row), _SWAPPING]))
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
        return int(np.random.SeedSequence(self._entropy(row)).generate_state(1, np.uint64)[0])

    def _entropy(self, row: int) -> list[int]:
        return [self.seed, int(self._epoch), row]


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
