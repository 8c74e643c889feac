"""Files come out upright and in known values, or with an error that names them."""

import re
import warnings
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from evidence_ft.images import Box, DataError, check_box, fill_box, read_image, read_mask

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
AS_GREYSCALE = "save it as an 8-bit greyscale PNG, 255 on the object and 0 elsewhere"


def saved(image, path, **options):
    image.save(path, **options)
    return path


def grey(values, dtype=np.uint8):
    return Image.fromarray(np.array(values, dtype=dtype))


def two_halves(left, right, size=(8, 4)):
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


# Reading images


def test_an_image_comes_out_upright_as_its_exif_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "the top of the file is the right-hand side of the scene"
    path = saved(two_halves(RED, BLUE), tmp_path / "phone.png", exif=exif)
    image = read_image(path)
    assert image.size == (4, 8)
    assert image.getpixel((0, 0)) == RED
    assert image.getpixel((0, 7)) == BLUE


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_a_white_image_of_any_mode_is_white_in_rgb(tmp_path, mode):
    path = saved(Image.new("RGB", (3, 2), "white").convert(mode), tmp_path / "white.tif")
    image = read_image(path)
    assert image.mode == "RGB"
    assert image.getcolors() == [(6, WHITE)]


def test_cmyk_is_subtractive(tmp_path):
    image = read_image(saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), tmp_path / "print.jpg", quality=100))
    np.testing.assert_allclose(np.asarray(image)[0, 0], RED, atol=4)


def test_transparency_is_laid_on_white(tmp_path):
    hidden = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert read_image(saved(hidden, tmp_path / "logo.png")).getpixel((0, 0)) == WHITE


def test_a_transparent_palette_entry_is_laid_on_white(tmp_path):
    image = Image.new("P", (1, 1), 3)
    image.putpalette([0] * 9 + [0, 200, 0])
    assert read_image(saved(image, tmp_path / "icon.png", transparency=3)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_by_its_full_range(tmp_path, suffix):
    path = saved(grey([[0, 32896, 65535]], np.uint16), tmp_path / f"scan.{suffix}")
    assert [read_image(path).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, WHITE]


def test_float_pixels_have_no_known_white(tmp_path):
    path = saved(grey([[0.0, 3.5]], np.float32), tmp_path / "depth.tif")
    with pytest.raises(DataError, match=r"depth\.tif has 'F' pixels from 0 to 3\.5 .* convert it to an 8-bit"):
        read_image(path)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_image(path).getpixel((0, 0)) == RED


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"lost\.png does not exist; correct its path, or restore the file"):
        read_image(tmp_path / "lost.png")


def test_paths_in_errors_are_those_that_were_given():
    with pytest.raises(DataError, match=r"^image file nowhere/x\.png does not exist"):
        read_image(Path("nowhere/x.png"))


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("a cat")
    with pytest.raises(DataError, match=r"notes\.jpg is not an image .* convert it to PNG or JPEG"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "bmp"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"half.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"half\.{suffix}.*(copy or download it again|convert it)"):
        read_image(path)


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path} cannot be read")):
        read_image(tmp_path)


def test_a_decompression_bomb_is_not_opened(tmp_path, monkeypatch):
    path = saved(Image.new("L", (50, 50)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png is too large .* scale the image down"):
        read_image(path)


def test_an_image_of_unusual_size_is_only_warned_about(tmp_path, monkeypatch):
    path = saved(Image.new("L", (50, 50)), tmp_path / "satellite.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert read_image(path).size == (50, 50)


# Reading masks


def test_the_threshold_itself_is_object(tmp_path):
    path = saved(grey([[0, 127, 128, 255]]), tmp_path / "mask.png")
    assert read_mask(path, 128 / 255).tolist() == [[0, 0, 1, 1]]


def test_16_bit_masks_are_scaled_by_their_full_range(tmp_path):
    path = saved(grey([[255, 32767, 32768, 65535]], np.uint16), tmp_path / "mask.png")
    assert read_mask(path, 0.5).tolist() == [[0, 0, 1, 1]]


def test_a_1_bit_mask_is_taken_as_it_is(tmp_path):
    path = saved(grey([[0, 255]]).convert("1"), tmp_path / "mask.png")
    assert read_mask(path, 1.0).tolist() == [[0, 1]]


def test_a_grey_mask_saved_as_colour_is_read_by_its_greys(tmp_path):
    path = saved(grey([[0, 200]]).convert("RGB"), tmp_path / "mask.png")
    assert read_mask(path, 0.5).tolist() == [[0, 1]]


def test_a_grey_palette_is_read_by_its_greys_not_its_indices(tmp_path):
    image = grey([[0, 1]])
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert read_mask(saved(image, tmp_path / "mask.png"), 0.5).tolist() == [[1, 0]]


def test_a_palette_of_colours_is_ambiguous(tmp_path):
    image = grey([[0, 1]])
    image.putpalette([0, 0, 0, 128, 0, 0])
    path = saved(image, tmp_path / "voc.png")
    with pytest.raises(DataError, match=rf"voc\.png has a palette of colours \(mode P\).*{AS_GREYSCALE}"):
        read_mask(path, 0.5)


def test_a_mask_in_colours_is_refused(tmp_path):
    path = saved(Image.new("RGB", (1, 1), RED), tmp_path / "red.png")
    with pytest.raises(DataError, match=rf"red\.png has colours \(mode RGB\) where greys.*{AS_GREYSCALE}"):
        read_mask(path, 0.5)


def test_a_transparent_mask_is_ambiguous(tmp_path):
    path = saved(Image.new("RGBA", (1, 1), (255, 255, 255, 0)), tmp_path / "alpha.png")
    with pytest.raises(DataError, match=rf"alpha\.png is partly transparent.*{AS_GREYSCALE}"):
        read_mask(path, 0.5)


def test_an_opaque_alpha_channel_does_no_harm(tmp_path):
    path = saved(Image.new("RGBA", (1, 1), WHITE), tmp_path / "mask.png")
    assert read_mask(path, 0.5).tolist() == [[1]]


def test_an_8_bit_mask_of_zeros_and_ones_says_which_threshold_would_do(tmp_path):
    path = saved(grey([[0, 1]]), tmp_path / "binary.png")
    with pytest.raises(DataError, match=r"binary\.png: its largest value is 0\.003922 of 1, .* 0\.0039 or less"):
        read_mask(path, 0.5)


def test_a_black_mask_is_refused(tmp_path):
    path = saved(grey([[0, 0]]), tmp_path / "black.png")
    with pytest.raises(DataError, match=r"black\.png.*all black, or mark the image as not annotated"):
        read_mask(path, 0.5)


def test_a_mask_is_turned_like_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    path = saved(grey([[255, 0, 0]]), tmp_path / "mask.png", exif=exif)
    assert read_mask(path, 0.5).tolist() == [[0, 0, 1]]


def test_a_missing_mask_is_named(tmp_path):
    with pytest.raises(DataError, match=r"lost\.png does not exist"):
        read_mask(tmp_path / "lost.png", 0.5)


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_a_threshold_that_marks_all_or_nothing_is_refused(tmp_path, threshold):
    with pytest.raises(ValueError, match=r"choose one above 0 and up to 1"):
        read_mask(tmp_path / "mask.png", threshold)


# Boxes


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (2, 1, 3, 2), (0, 0, 7, 5), (6, 4, 1, 1)])
def test_whole_boxes_are_filled_as_by_pycocotools(box):
    encoded = pycocotools.mask.frPyObjects(np.array([box], dtype=float), 5, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its copy keyword under NumPy 2
        expected = pycocotools.mask.decode(encoded)[..., 0]
    np.testing.assert_array_equal(fill_box(Box(*box), image_width=7, image_height=5), expected)


def test_a_box_covers_each_pixel_it_touches():
    assert fill_box(Box(0.9, 0, 1.2, 1), image_width=4, image_height=1).tolist() == [[1, 1, 1, 0]]


def test_a_box_off_by_float_noise_covers_no_further_pixel():
    assert fill_box(Box(1 - 1e-5, 0, 1 + 2e-5, 1), image_width=4, image_height=1).tolist() == [[0, 1, 0, 0]]


def test_a_box_that_leaves_the_image_by_a_pixel_is_cut():
    box = Box(-1, 0, 3, 2)
    check_box(box, image_width=4, image_height=1, where="")
    assert fill_box(box, image_width=4, image_height=1).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("box", [(0, 0, 0, 2), (1, 1, 2, -1), (0, 0, float("nan"), 1)])
def test_a_box_without_area_is_refused(box):
    with pytest.raises(DataError, match=r"^here: found a box of .* expected a width and a height above 0"):
        check_box(Box(*box), image_width=4, image_height=4, where="here")


@pytest.mark.parametrize("box", [(-1.5, 0, 3, 2), (0, -2, 3, 3), (0, 0, 5.5, 2), (2, 3, 2, 3)])
def test_a_box_partly_outside_is_refused(box):
    with pytest.raises(DataError, match=r"^here: found x .* in an image of 4x4 pixels; .*not x1, y1, x2, y2"):
        check_box(Box(*box), image_width=4, image_height=4, where="here")
