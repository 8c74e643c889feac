import hashlib
import json
import re
import warnings
from pathlib import Path

import numpy as np
import open_clip.transform
import pycocotools.mask
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from evidence_ft.samples import (
    Augmentation,
    Box,
    DataError,
    DatasetConfig,
    ModelInputs,
    Sample,
    SampleTransform,
    Subset,
    check_box,
    check_sample,
    choose_classes,
    collate,
    fill_box,
    fingerprint,
    first_per_class,
    read_image,
    read_mask,
    to_pixels,
    validate,
)
from evidence_ft.types import Preprocessing

HALF = (0.5, 0.5, 0.5)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
AS_GREYSCALE = "save it as an 8-bit greyscale PNG, 255 on the object and 0 elsewhere"


class InMemory:
    """Images with the left half annotated; a data set by shape, not by inheritance."""

    def __init__(self, n=4, size=(8, 6)):
        self.class_names = ("cat", "dog")
        self.sample_ids = [f"image {row}" for row in range(n)]
        self.labels = [row % 2 for row in range(n)]
        self.mask_sources = ["mask"] * n
        self.size = size

    def __len__(self):
        return len(self.sample_ids)

    def __getitem__(self, row):
        width, height = self.size
        noise = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, : width // 2] = 1
        return Sample(self.sample_ids[row], Image.fromarray(noise), self.labels[row], mask, self.mask_sources[row])


class Broken(InMemory):
    """Some rows cannot be opened."""

    def __init__(self, bad, n=4):
        super().__init__(n)
        self.bad = bad

    def __getitem__(self, row):
        if row in self.bad:
            raise DataError(f"image file {row}.png does not exist")
        return super().__getitem__(row)


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


# Classes and rows


def test_without_a_list_all_declared_names_are_classes():
    assert choose_classes(["b", "a"], {}, classes=None, leave_out=[], where="x") == ("b", "a")


def test_a_list_of_classes_gives_their_order():
    assert choose_classes(["a", "b"], {"a": ""}, classes=["b", "a"], leave_out=[], where="x") == ("b", "a")


def test_a_label_outside_the_classes_is_an_error_with_two_ways_out():
    with pytest.raises(DataError) as caught:
        choose_classes(["Neutrophil"], {"Neutrophil": "x.csv, line 5"}, classes=["neutrophil"], leave_out=[], where="")
    message = str(caught.value)
    assert message.startswith("x.csv, line 5: found label 'Neutrophil'")
    assert "did you mean 'neutrophil'?" in message
    assert "add it to data.classes, or to data.leave_out" in message


def test_a_class_to_leave_out_must_occur():
    with pytest.raises(DataError, match=r"x\.csv: found no class 'basofil'.*did you mean 'basophil'\?"):
        choose_classes(["basophil", "monocyte"], {}, classes=None, leave_out=["basofil"], where="x.csv")


def test_leaving_out_every_class_is_an_error():
    with pytest.raises(DataError, match=r"x\.csv: no class is left; name fewer classes in data\.leave_out"):
        choose_classes(["a"], {}, classes=None, leave_out=["a"], where="x.csv")


def test_the_samples_kept_per_class_have_the_smallest_hashes():
    ids = [f"image {row}" for row in range(20)]
    labels = [row % 3 for row in range(20)]
    expected = set()
    for label in range(3):
        of_class = [row for row in range(20) if labels[row] == label]
        expected |= set(sorted(of_class, key=lambda row: hashlib.sha256(ids[row].encode()).hexdigest())[:2])
    assert first_per_class(ids, labels, 2) == sorted(expected)


def test_the_samples_kept_per_class_do_not_depend_on_the_files_order():
    ids, labels = [f"image {row}" for row in range(20)], [0] * 20
    kept = {ids[row] for row in first_per_class(ids, labels, 5)}
    assert {ids[::-1][row] for row in first_per_class(ids[::-1], labels, 5)} == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("a", "a")}, "classes lists 'a' more than once"),
        ({"classes": ("a", "b"), "leave_out": ("b",)}, "'b' in both classes and leave_out"),
        ({"classes": ()}, "classes is an empty list"),
        ({"train_split": "test"}, "split 'test' is both train_split and one of test_splits"),
        ({"test_splits": ("a", "a")}, "test_splits lists 'a' more than once"),
        ({"max_per_class": 0}, "greater than or equal to 1"),
        ({"clases": ("a",)}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DatasetConfig(**settings)


def test_a_subset_is_a_data_set_of_the_chosen_rows():
    subset = Subset(InMemory(), [3, 0])
    assert (len(subset), subset.sample_ids, subset.labels) == (2, ("image 3", "image 0"), (1, 0))
    assert [subset[row].sample_id for row in range(2)] == ["image 3", "image 0"]


# Checking


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.ones((8, 6), np.uint8)}, "found a mask of 6x8 pixels .* expected 8x6 as its image"),
        ({"mask": np.full((6, 8), 255, np.uint8)}, "found uint8 mask values 255; expected uint8 of 0 and 1"),
        ({"mask": np.ones((6, 8), bool)}, "found bool mask values 1; expected uint8"),
        (
            {"mask": np.zeros((6, 8), np.uint8)},
            "found an annotated mask without a single object pixel.*mark the image as not annotated",
        ),
        ({"mask": None}, "found no mask with mask_source 'mask'.*correct the data set's mask_sources"),
        ({"mask_source": "none"}, "found a mask with mask_source 'none'"),
        ({"image": Image.new("L", (8, 6))}, "found an image in mode 'L', expected 'RGB'; open it with read_image"),
    ],
)
def test_a_sample_whose_parts_do_not_fit_is_named(change, message):
    with pytest.raises(DataError, match=rf"^sample 'image 0': {message}"):
        check_sample(InMemory()[0]._replace(**change))


def test_a_sample_without_annotation_is_good():
    check_sample(InMemory()[0]._replace(mask=None, mask_source="none"))


def test_a_good_data_set_comes_back_as_it_is():
    dataset = InMemory()
    assert validate(dataset, on_bad_sample="error", progress=False) == (dataset, [])


def test_all_bad_samples_are_reported_at_once():
    with pytest.raises(DataError) as caught:
        validate(Broken({1, 3}), on_bad_sample="error", description="train", progress=False)
    message = str(caught.value)
    assert message.startswith("train: 2 of 4 samples cannot be used:")
    assert "sample 'image 1': image file 1.png does not exist" in message
    assert "sample 'image 3': image file 3.png does not exist" in message
    assert "--data.on-bad-sample skip" in message


def test_only_ten_bad_samples_are_listed():
    with pytest.raises(DataError, match=r"12 of 13 samples") as caught:
        validate(Broken(set(range(12)), n=13), on_bad_sample="error", progress=False)
    assert str(caught.value).count("does not exist") == 10
    assert "... and 2 more" in str(caught.value)


def test_bad_samples_can_be_left_out():
    dataset, bad = validate(Broken({1}), on_bad_sample="skip", progress=False)
    assert dataset.sample_ids == ("image 0", "image 2", "image 3")
    assert dataset[1].sample_id == "image 2"
    assert bad == [("image 1", "image file 1.png does not exist")]


def test_a_data_set_of_bad_samples_only_is_an_error_even_when_skipping():
    with pytest.raises(DataError, match=r"none of 4 samples can be used:(.|\n)*Check the paths"):
        validate(Broken({0, 1, 2, 3}), on_bad_sample="skip", progress=False)


def test_a_bug_in_a_data_set_is_not_taken_for_a_bad_sample():
    class Buggy(InMemory):
        def __getitem__(self, row):
            raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        validate(Buggy(), on_bad_sample="skip", progress=False)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("sample_ids", ["a", "b", "a", "c"], "found 1 sample ids more than once: 'a'; expected each once"),
        ("labels", [0, 1, 2, 0], "sample 'image 2': found label 2, expected 0 to 1 for 2 classes"),
        ("labels", [0, 1, -1, 0], "sample 'image 2': found label -1, expected 0 to 1"),
        ("labels", [0], "data set of 4 rows: found 1 labels; expected one per row"),
        ("class_names", ("cat", "cat"), "found class names more than once: 'cat'"),
    ],
)
def test_a_data_set_that_contradicts_itself_is_refused_even_when_skipping(attribute, value, message):
    dataset = InMemory()
    setattr(dataset, attribute, value)
    with pytest.raises(DataError, match=message):
        validate(dataset, on_bad_sample="skip", progress=False)


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match=r"no samples; expected at least one; check its split"):
        validate(InMemory(0), on_bad_sample="skip", progress=False)


def test_a_sample_must_be_what_its_row_says():
    class Shifted(InMemory):
        def __getitem__(self, row):
            return super().__getitem__((row + 1) % 4)

    with pytest.raises(DataError, match=r"sample 'image 0': found id, label .* \('image 1', 1, 'mask'\)"):
        validate(Shifted(), on_bad_sample="error", progress=False)


def test_progress_is_shown_with_its_description(capsys):
    validate(InMemory(), on_bad_sample="error", description="Checking train")
    assert "Checking train" in capsys.readouterr().err


def test_the_fingerprint_is_the_sha256_of_one_json_line_per_row():
    dataset = InMemory(2)
    lines = [json.dumps(["image 0", "cat", "mask"], separators=(",", ":")), '["image 1","dog","mask"]']
    expected = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert fingerprint(dataset) == expected


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("sample_ids", ["image 0", "image 1", "image 2", "other"]),
        ("sample_ids", ["image 1", "image 0", "image 2", "image 3"]),
        ("labels", [0, 1, 0, 0]),
        ("class_names", ("cat", "wolf")),
        ("mask_sources", ["mask", "mask", "mask", "box"]),
    ],
)
def test_the_fingerprint_changes_with_every_row(attribute, value):
    changed = InMemory()
    setattr(changed, attribute, value)
    assert fingerprint(changed) != fingerprint(InMemory())


def test_the_fingerprint_does_not_change_when_classes_are_numbered_anew():
    changed = InMemory()
    changed.class_names, changed.labels = ("dog", "cat"), [1, 0, 1, 0]
    assert fingerprint(changed) == fingerprint(InMemory())


def test_no_separator_in_a_name_can_imitate_another_data_set():
    one, two = InMemory(1), InMemory(1)
    one.sample_ids, one.class_names = ['a","b'], ("c", "x")
    two.sample_ids, two.class_names = ["a"], ('b","c', "x")
    assert fingerprint(one) != fingerprint(two)


# Transform


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("image_size", [(97, 61), (40, 131), (33, 33), (300, 200), (5, 400)])
def test_evaluation_images_equal_open_clips(resize_mode, image_size, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (*image_size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    theirs = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(
            size=64, mean=mean, std=std, interpolation=interpolation, resize_mode=resize_mode
        ),
        is_train=False,
    )
    ours = SampleTransform(Preprocessing((64, 64), mean, std, interpolation, resize_mode))
    pixels, mask = ours(Sample("a", image, 0, None, "none"))
    torch.testing.assert_close(pixels, theirs(image), atol=1e-5, rtol=0)
    assert mask.shape == (64, 64)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_evaluation_images_equal_open_clips_for_a_model_that_is_not_square(resize_mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    cfg = open_clip.transform.PreprocessCfg(size=(48, 32), mean=HALF, std=HALF, resize_mode=resize_mode)
    theirs = open_clip.transform.image_transform_v2(cfg, is_train=False)(image)
    ours = SampleTransform(Preprocessing((48, 32), HALF, HALF, "bicubic", resize_mode))
    torch.testing.assert_close(ours(Sample("a", image, 0, None, "none"))[0], theirs, atol=1e-5, rtol=0)


def test_an_image_too_thin_to_resize_keeps_one_pixel():
    transform = SampleTransform(Preprocessing((8, 8), HALF, HALF, resize_mode="longest"))
    pixels, _ = transform(Sample("a", Image.new("RGB", (100, 1), "white"), 0, None, "none"))
    assert (pixels[0] == 1).sum() == 8


def painted_by_its_mask(width=60, height=45):
    """An image whose red channel is its mask, and nothing else."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[5:30, 8:35] = 1
    mask[30:40, 40:55] = 1
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = mask * 255
    return Sample("painted", Image.fromarray(pixels), 0, mask, "mask")


def agreement(image, mask):
    """Share of pixels in which the red channel, back in [0, 1], rounds to the mask."""
    red = (image[0] * 0.5 + 0.5) > 0.5
    return float((red == (mask == 1)).float().mean())


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_image_and_mask_stay_aligned_in_evaluation(resize_mode):
    image, mask = SampleTransform(Preprocessing((32, 32), HALF, HALF, "bicubic", resize_mode))(painted_by_its_mask())
    assert agreement(image, mask) > 0.97


def test_image_and_mask_stay_aligned_through_50_random_crops_and_flips():
    transform = SampleTransform(Preprocessing((32, 32), HALF, HALF), Augmentation(crop_scale=(0.2, 0.9)))
    inputs = ModelInputs(Repeated(painted_by_its_mask(), 50), transform, seed=0)
    items = [inputs[row] for row in range(50)]
    assert min(agreement(item.images, item.masks) for item in items) > 0.95
    assert len({item.masks.numpy().tobytes() for item in items}) == 50


def test_a_mask_that_did_not_follow_the_crop_would_be_noticed():
    transform = SampleTransform(Preprocessing((32, 32), HALF, HALF), Augmentation(crop_scale=(0.2, 0.9)))
    inputs = ModelInputs(Repeated(painted_by_its_mask(), 50), transform, seed=0)
    _, uncropped = SampleTransform(Preprocessing((32, 32), HALF, HALF, "bicubic", "squash"))(painted_by_its_mask())
    assert np.mean([agreement(inputs[row].images, uncropped) for row in range(50)]) < 0.9


class Repeated:
    class_names = ("only",)

    def __init__(self, sample, n):
        self.sample = sample
        self.sample_ids = [str(row) for row in range(n)]
        self.labels, self.mask_sources = [0] * n, [sample.mask_source] * n

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.sample


def test_half_of_the_training_images_are_flipped():
    image = two_halves(RED, BLUE, (32, 32))
    transform = SampleTransform(Preprocessing((8, 8), HALF, HALF), Augmentation(crop_scale=(1.0, 1.0)))
    inputs = ModelInputs(Repeated(Sample("a", image, 0, None, "none"), 200), transform, seed=0)
    flipped = sum(bool(inputs[row].images[2, 0, 0] > 0) for row in range(200))
    assert 70 < flipped < 130  # four deviations of a fair coin


def test_without_flip_and_jitter_and_with_the_whole_image_nothing_varies():
    image = two_halves(RED, BLUE, (32, 32))
    augmentation = Augmentation(crop_scale=(1.0, 1.0), flip=False)
    transform = SampleTransform(Preprocessing((8, 8), HALF, HALF), augmentation)
    inputs = ModelInputs(Repeated(Sample("a", image, 0, None, "none"), 20), transform, seed=0)
    assert len({inputs[row].images.numpy().tobytes() for row in range(20)}) == 1


def test_color_jitter_changes_colours_but_never_the_mask():
    sample = painted_by_its_mask(32, 32)._replace(image=Image.new("RGB", (32, 32), (120, 80, 40)))
    augmentation = Augmentation(crop_scale=(1.0, 1.0), flip=False, color_jitter=0.4)
    inputs = ModelInputs(
        Repeated(sample, 10), SampleTransform(Preprocessing((32, 32), HALF, HALF), augmentation), seed=0
    )
    items = [inputs[row] for row in range(10)]
    assert len({item.images.numpy().tobytes() for item in items}) == 10
    assert all((item.masks.numpy() == sample.mask).all() for item in items)


def test_an_image_without_annotation_has_a_mask_of_background():
    transform = SampleTransform(Preprocessing((4, 4), HALF, HALF))
    _, mask = transform(Sample("a", Image.new("RGB", (6, 6), "white"), 0, None, "none"))
    torch.testing.assert_close(mask, torch.zeros(4, 4, dtype=torch.uint8))


def test_padding_is_black_and_background():
    transform = SampleTransform(Preprocessing((4, 4), HALF, HALF, resize_mode="longest"))
    image, mask = transform(Sample("a", Image.new("RGB", (8, 4), "white"), 0, np.ones((4, 8), np.uint8), "mask"))
    expected = torch.tensor([[0] * 4, [1] * 4, [1] * 4, [0] * 4])
    torch.testing.assert_close(mask, expected.to(torch.uint8))
    torch.testing.assert_close(image[0], expected * 2.0 - 1)


def test_the_transform_gives_plain_tensors():
    image, mask = SampleTransform(Preprocessing((4, 4), HALF, HALF))(InMemory()[0])
    assert (type(image), type(mask)) == (torch.Tensor, torch.Tensor)
    assert (image.dtype, mask.dtype) == (torch.float32, torch.uint8)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.5), (0.5, 1.1)])
def test_a_crop_scale_that_is_no_range_is_refused(scale):
    with pytest.raises(ValidationError, match=r"expected two shares of the area"):
        Augmentation(crop_scale=scale)


# Batches


def augmented(n=6, seed=0):
    transform = SampleTransform(Preprocessing((8, 8), HALF, HALF), Augmentation(crop_scale=(0.3, 0.9)))
    return ModelInputs(InMemory(n, (24, 24)), transform, seed=seed)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    first, second = augmented(), augmented()
    expected = [first[row] for row in range(6)]
    torch.manual_seed(123)
    found = {row: second[row] for row in (5, 0, 3, 1, 4, 2)}
    assert all(same(found[row], expected[row]) for row in range(6))


def test_augmentation_varies_with_the_epoch_and_comes_back_with_it():
    inputs = augmented()
    first = inputs[0]
    inputs.set_epoch(1)
    assert not torch.equal(inputs[0].images, first.images)
    inputs.set_epoch(0)
    assert same(inputs[0], first)


def test_augmentation_varies_with_the_seed():
    assert not torch.equal(augmented(seed=0)[0].images, augmented(seed=1)[0].images)


def test_augmentation_takes_no_random_numbers_from_others():
    inputs = augmented()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    inputs[0]
    torch.testing.assert_close(torch.rand(3), expected)


def test_augmentation_leaves_the_gpus_generators_alone(monkeypatch):
    def reseeded(seed):
        raise AssertionError("reseeded all GPUs")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    augmented()[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches_in_every_epoch(persistent):
    alone, shared = augmented(), augmented()
    loader = DataLoader(shared, batch_size=2, num_workers=2, persistent_workers=persistent, collate_fn=collate)
    for epoch in range(3):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        batches = list(loader)
        for number, batch in enumerate(batches):
            assert same(batch, collate([alone[2 * number], alone[2 * number + 1]]))


def test_a_batch_has_rows_labels_images_and_masks_of_its_samples():
    inputs = ModelInputs(InMemory(), SampleTransform(Preprocessing((6, 8), HALF, HALF)), seed=0)
    (batch,) = DataLoader(inputs, batch_size=3, sampler=[3, 0, 1], collate_fn=collate)
    assert batch.rows.tolist() == [3, 0, 1]
    assert batch.labels.tolist() == [1, 0, 1]
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 6, 8), torch.float32)
    assert (batch.masks.shape, batch.masks.dtype) == ((3, 6, 8), torch.uint8)
    assert batch.labels.dtype == batch.rows.dtype == torch.int64


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1; choose one of at least 0"):
        ModelInputs(InMemory(), SampleTransform(Preprocessing((4, 4), HALF, HALF)), seed=-1)


def test_to_pixels_undoes_the_transform():
    sample = InMemory()[0]
    preprocessing = Preprocessing((6, 8), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    image, _ = SampleTransform(preprocessing)(sample)
    np.testing.assert_array_equal(to_pixels(image, preprocessing), np.asarray(sample.image))


def test_to_pixels_clips_what_lies_outside():
    image = torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1)
    assert to_pixels(image, Preprocessing((1, 1), HALF, HALF)).tolist() == [[[0, 128, 255]]]


def test_paths_in_errors_are_those_that_were_given():
    with pytest.raises(DataError, match=r"^image file nowhere/x\.png does not exist"):
        read_image(Path("nowhere/x.png"))
