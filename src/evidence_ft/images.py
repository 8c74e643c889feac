"""Image and mask files, read so that they come out upright and in known values, or not at all.

One clear error names the file and what to do. Boxes are here too: they become masks.

This module knows nothing of samples, data sets or models.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from evidence_ft.types import BACKGROUND, OBJECT

MaskArray: TypeAlias = npt.NDArray[np.uint8]
"""``(Hpx, Wpx)`` of `BACKGROUND` and `OBJECT`."""


class DataError(ValueError):
    """Something in the data is not as it has to be.

    The message names the file or the sample, what was found, what was expected, and what to do.
    """


def read_image(path: Path) -> Image.Image:
    """Image of a file as a person sees it: upright and in RGB.

    The EXIF orientation is applied. Transparency is laid on white, since what a file stores under transparent
    pixels is anything. 16-bit grey is scaled to 8 bits by its full range. Of an animation, the first frame.

    Raises:
        DataError: the file is missing, not an image, truncated, corrupt or larger than Pillow's safety limit,
            or its pixel values have no known range.
    """
    with _pillow_errors_explained(path):
        return to_rgb(_open_upright(path), path)


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
        grey = to_grey(_open_upright(path), path)
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


def to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """An upright image in RGB, as `read_image` describes it.

    Args:
        image: of any mode.
        path: of its file, or what else the message is to call it.

    Raises:
        DataError: its pixel values have no known range.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(np.rint(_scaled_16_bit(image, path) * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image.convert("RGBA"))
        return on_white.convert("RGB")
    return image.convert("RGB")


def to_grey(image: Image.Image, path: Path) -> npt.NDArray[np.float64]:
    """An upright mask as shares of white ``(Hpx, Wpx)``, as `read_mask` describes it.

    Args:
        image: of any mode.
        path: of its file, or what else the message is to call it.

    Raises:
        DataError: it has colours or transparency, or its pixel values have no known range.
    """
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
