import json
import re
import warnings
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from evidence_ft.datasets import coco
from evidence_ft.images import DataError
from evidence_ft.samples import check_sample, validate

REAL = Path(__file__).resolve().parents[2] / "../shared/real/tiny_imagenet_boxes"
WIDTH, HEIGHT = 12, 10
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 1.0, 8.0]
SQUARE = [2.0, 2.0, 7.0, 2.0, 7.0, 7.0, 2.0, 7.0]


def content():
    """Two cats and a dog; categories are listed against the order of their ids."""
    return {
        "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
        "images": [
            {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for number, name in ((11, "tom.png"), (12, "rex.png"), (13, "kit.png"))
        ],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 2, "bbox": [1, 2, 3, 4]},
            {"id": 2, "image_id": 12, "category_id": 5, "bbox": [0, 0, 6, 6]},
            {"id": 3, "image_id": 13, "category_id": 2, "bbox": [4, 4, 8, 6]},
        ],
    }


def written(root, tree, split="train"):
    folder = root / "annotations"
    folder.mkdir(exist_ok=True)
    path = folder / f"instances_{split}.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    (root / split).mkdir(exist_ok=True)
    if isinstance(tree, dict):
        for entry in tree.get("images", []):
            if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
                Image.new("RGB", (WIDTH, HEIGHT)).save(root / split / entry["file_name"])
    return path


def loaded(root, tree, **settings):
    written(root, tree)
    return coco.load(coco.Config(root=root, **settings), "train")


def changed(place, value):
    """A valid file with one value replaced, or removed."""
    tree = content()
    *path, last = place
    node = tree
    for key in path:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return tree


def segmented(*segmentations):
    tree = content()
    tree["images"] = tree["images"][:1]
    tree["annotations"] = [
        {"id": number, "image_id": 11, "category_id": 2, "bbox": [1, 2, 3, 4], "segmentation": segmentation}
        for number, segmentation in enumerate(segmentations)
    ]
    return tree


def drawn_by_pycocotools(polygons):
    parts = pycocotools.mask.frPyObjects(polygons, HEIGHT, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its copy keyword under NumPy 2
        return pycocotools.mask.decode(pycocotools.mask.merge(parts))


def some_mask(seed=0):
    return (np.random.default_rng(seed).uniform(size=(HEIGHT, WIDTH)) < 0.4).astype(np.uint8)


def compressed(mask):
    encoded = pycocotools.mask.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def uncompressed(mask):
    """Run lengths down the columns, the first of background."""
    runs, value = [0], 0
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": [HEIGHT, WIDTH], "counts": runs}


# What is read


def test_classes_are_in_the_order_of_their_ids(tmp_path):
    assert loaded(tmp_path, content()).class_names == ("cat", "dog")


def test_samples_are_in_the_order_of_the_file_and_named_by_it(tmp_path):
    dataset = loaded(tmp_path, content())
    assert dataset.sample_ids == ["tom.png", "rex.png", "kit.png"]
    assert dataset.labels == [0, 1, 0]
    assert len(dataset) == 3


def test_a_box_is_filled_where_there_is_no_segmentation(tmp_path):
    dataset = loaded(tmp_path, content())
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[2:6, 1:4] = 1  # x 1, y 2, width 3, height 4
    np.testing.assert_array_equal(dataset[0].mask, expected)
    assert dataset.mask_sources == ["box"] * 3


@pytest.mark.parametrize("polygons", [[TRIANGLE], [TRIANGLE, SQUARE]])
def test_polygons_are_drawn_as_by_pycocotools(tmp_path, polygons):
    sample = loaded(tmp_path, segmented(polygons))[0]
    np.testing.assert_array_equal(sample.mask, drawn_by_pycocotools(polygons))
    assert sample.mask_source == "mask"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("encode", [compressed, uncompressed])
def test_run_length_encoding_is_read(tmp_path, encode, seed):
    np.testing.assert_array_equal(loaded(tmp_path, segmented(encode(some_mask(seed))))[0].mask, some_mask(seed))


def test_long_runs_of_a_large_image_are_read(tmp_path):
    mask = np.zeros((700, 900), np.uint8)
    mask[100:650, 50:850] = 1
    tree = segmented(compressed(mask))
    tree["images"][0] |= {"width": 900, "height": 700}
    path = written(tmp_path, tree)
    Image.new("RGB", (900, 700)).save(tmp_path / "train" / "tom.png")
    assert path.is_file()
    np.testing.assert_array_equal(coco.load(coco.Config(root=tmp_path), "train")[0].mask, mask)


def test_a_crowd_is_evidence_too(tmp_path):
    tree = segmented([SQUARE], uncompressed(some_mask()))
    tree["annotations"][1]["iscrowd"] = 1
    expected = drawn_by_pycocotools([SQUARE]) | some_mask()
    np.testing.assert_array_equal(loaded(tmp_path, tree)[0].mask, expected)


@pytest.mark.parametrize("nothing", [None, []])
def test_one_annotation_without_segmentation_makes_the_source_a_box(tmp_path, nothing):
    dataset = loaded(tmp_path, segmented([SQUARE], nothing))
    expected = drawn_by_pycocotools([SQUARE])
    expected[2:6, 1:4] = 1
    np.testing.assert_array_equal(dataset[0].mask, expected)
    assert dataset.mask_sources == ["box"]


def test_boxes_can_be_asked_for_although_there_are_segmentations(tmp_path):
    dataset = loaded(tmp_path, segmented([TRIANGLE]), mask="box")
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[2:6, 1:4] = 1
    np.testing.assert_array_equal(dataset[0].mask, expected)
    assert dataset.mask_sources == ["box"]


def test_every_sample_of_a_good_file_passes_the_check(tmp_path):
    dataset = loaded(tmp_path, content())
    assert validate(dataset, on_bad_sample="error", progress=False) == (dataset, [])


def test_loading_opens_no_image(tmp_path):
    path = written(tmp_path, content())
    for image in (tmp_path / "train").iterdir():
        image.unlink()
    assert len(coco.load(coco.Config(root=tmp_path), "train")) == 3
    assert path.is_file()


def test_places_of_files_can_be_set(tmp_path):
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "_annotations.coco.json").write_text(json.dumps(content()))
    config = coco.Config(root=tmp_path, annotations="{split}/_annotations.coco.json", test_splits=("valid",))
    assert len(coco.load(config, "valid")) == 3


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, content())
    assert len(coco.load(coco.Config(root=Path("~")), "train")) == 3


# Which images, which classes


def test_classes_state_an_order(tmp_path):
    dataset = loaded(tmp_path, content(), classes=("dog", "cat"))
    assert (dataset.class_names, dataset.labels) == (("dog", "cat"), [1, 0, 1])


def test_a_category_outside_the_classes_is_an_error_if_an_image_shows_it(tmp_path):
    with pytest.raises(DataError, match=r"images\[0\] \(tom\.png\): found label 'cat'.*expected one of data\.classes"):
        loaded(tmp_path, content(), classes=("dog",))


def test_a_category_outside_the_classes_may_stay_unused(tmp_path):
    tree = content()
    tree["categories"].append({"id": 9, "name": "emu"})
    assert loaded(tmp_path, tree, classes=("cat", "dog")).class_names == ("cat", "dog")


def test_a_class_left_out_takes_its_images_along(tmp_path):
    dataset = loaded(tmp_path, content(), leave_out=("cat",))
    assert (dataset.class_names, dataset.sample_ids, dataset.labels) == (("dog",), ["rex.png"], [0])


def test_a_class_to_leave_out_must_be_a_category(tmp_path):
    with pytest.raises(DataError, match=r"instances_train\.json: found no class 'cats'.*did you mean 'cat'\?"):
        loaded(tmp_path, content(), leave_out=("cats",))


def test_at_most_so_many_images_of_a_class_are_kept(tmp_path):
    dataset = loaded(tmp_path, content(), max_per_class=1)
    # sha256: "kit.png" 2aa1..., "tom.png" 856b...
    assert dataset.sample_ids == ["rex.png", "kit.png"]


def both_in_one_image(cat_box=(0, 0, 4, 4), dog_box=(4, 4, 5, 5)):
    tree = content()
    tree["images"] = tree["images"][:1]
    tree["annotations"] = [
        {"id": 1, "image_id": 11, "category_id": 2, "bbox": list(cat_box)},
        {"id": 2, "image_id": 11, "category_id": 2, "bbox": list(cat_box)},
        {"id": 3, "image_id": 11, "category_id": 5, "bbox": list(dog_box)},
    ]
    return tree


def test_an_image_of_several_categories_is_an_error(tmp_path):
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, both_in_one_image())
    message = str(caught.value)
    assert "instances_train.json: images[0] (tom.png): found annotations of 2 categories: 'cat', 'dog'" in message
    assert "set data.several to largest or skip, or name categories that do not count in data.leave_out" in message


def test_the_largest_category_counts_each_pixel_once(tmp_path):
    # The cat is annotated twice on the same 16 pixels, the dog once on 25.
    dataset = loaded(tmp_path, both_in_one_image(), several="largest")
    assert dataset.labels == [1]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[4:9, 4:9] = 1
    np.testing.assert_array_equal(dataset[0].mask, expected)


def test_of_equally_large_categories_the_smaller_id_is_taken(tmp_path):
    assert loaded(tmp_path, both_in_one_image(dog_box=(4, 4, 4, 4)), several="largest").labels == [0]


def test_images_of_several_categories_can_be_skipped(tmp_path):
    tree = content()
    tree["annotations"].append({"id": 4, "image_id": 11, "category_id": 5, "bbox": [0, 0, 2, 2]})
    assert loaded(tmp_path, tree, several="skip").sample_ids == ["rex.png", "kit.png"]


def test_annotations_of_a_class_left_out_do_not_count(tmp_path):
    dataset = loaded(tmp_path, both_in_one_image(), leave_out=("dog",))
    assert (dataset.labels, int(dataset[0].mask.sum())) == ([0], 16)


def test_an_image_without_annotations_is_an_error(tmp_path):
    tree = content()
    del tree["annotations"][1]
    with pytest.raises(
        DataError, match=r"images\[1\] \(rex\.png\): found no annotation.*data\.unannotated to leave_out"
    ):
        loaded(tmp_path, tree)


def test_an_image_without_annotations_can_be_left_out(tmp_path):
    tree = content()
    del tree["annotations"][1]
    dataset = loaded(tmp_path, tree, unannotated="leave_out")
    assert dataset.sample_ids == ["tom.png", "kit.png"]
    assert dataset.class_names == ("cat", "dog")


def test_no_image_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no image is left; expected at least one; check data\.leave_out"):
        loaded(tmp_path, content() | {"annotations": []}, unannotated="leave_out")


# Splits


def test_splits_number_classes_alike_although_they_show_different_ones(tmp_path):
    test = content()
    test["images"], test["annotations"] = test["images"][1:2], test["annotations"][1:2]
    written(tmp_path, content())
    written(tmp_path, test, "val")
    config = coco.Config(root=tmp_path)
    assert coco.load(config, "val").class_names == coco.load(config, "train").class_names
    assert coco.load(config, "val").labels == [1]


def test_splits_with_other_categories_are_an_error(tmp_path):
    test = content()
    test["categories"][1]["name"] = "lynx"
    written(tmp_path, content())
    written(tmp_path, test, "val")
    with pytest.raises(DataError, match=r"instances_val\.json: categories: .*instances_train\.json: 'cat', 'lynx';"):
        coco.load(coco.Config(root=tmp_path), "val")


def test_splits_with_categories_in_another_order_are_an_error(tmp_path):
    test = content()
    test["categories"] = [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}]
    written(tmp_path, content())
    written(tmp_path, test, "val")
    with pytest.raises(DataError, match=r"another order of the ids; .* or state the classes .* in data\.classes"):
        coco.load(coco.Config(root=tmp_path), "val")
    stated = coco.Config(root=tmp_path, classes=("cat", "dog"))
    assert coco.load(stated, "val").labels == [1, 0, 1]


def test_a_test_split_can_be_loaded_without_the_training_split(tmp_path):
    written(tmp_path, content(), "val")
    assert len(coco.load(coco.Config(root=tmp_path), "val")) == 3


def test_a_broken_training_file_is_named_when_a_test_split_is_compared_with_it(tmp_path):
    written(tmp_path, "{}")
    written(tmp_path, content(), "val")
    with pytest.raises(DataError, match=r"instances_train\.json: categories: found no such key"):
        coco.load(coco.Config(root=tmp_path), "val")


# What can be wrong


def test_a_missing_annotation_file_is_named_with_those_beside_it(tmp_path):
    written(tmp_path, content())
    with pytest.raises(DataError, match=r"instances_val\.json for split 'val'.*in that folder: instances_train\.json"):
        coco.load(coco.Config(root=tmp_path), "val")


def test_an_annotation_file_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "annotations" / "instances_train.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"instances_train\.json cannot be read"):
        coco.load(coco.Config(root=tmp_path), "train")


def test_a_missing_image_folder_is_named(tmp_path):
    written(tmp_path, content())
    with pytest.raises(DataError, match=r"found no folder .*photos for the images of split 'train'.*data\.images"):
        coco.load(coco.Config(root=tmp_path, images="photos"), "train")


def test_invalid_json_is_named_with_its_place(tmp_path):
    with pytest.raises(DataError, match=r"instances_train\.json: found invalid JSON: .*line 1 column"):
        loaded(tmp_path, '{"images": [')


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("categories",), KeyError, "categories: found no such key"),
        (("images",), KeyError, "images: found no such key"),
        (("annotations",), KeyError, "annotations: found no such key"),
        (("images",), {}, r"images: found \{\}; expected a valid array"),
        (("images", 1, "file_name"), KeyError, r"images\[1\]\.file_name: found no such key"),
        (("images", 1, "width"), "wide", r"images\[1\]\.width: found 'wide'; expected a valid integer"),
        (("images", 1, "height"), 0, r"images\[1\]\.height: found 0; expected greater than 0"),
        (("images", 1, "id"), 11, r"images\[1\]\.id: found 11, as in images\[0\]; expected each id once"),
        (("images", 2, "file_name"), "tom.png", r"images\[2\]\.file_name: found 'tom\.png', as in images\[0\]"),
        (("categories", 1, "id"), 5, r"categories\[1\]\.id: found 5, as in categories\[0\]"),
        (("categories", 1, "name"), "dog", r"categories\[1\]\.name: found 'dog', as in categories\[0\]"),
        (("categories", 1, "name"), "", r"categories\[1\]\.name: found ''"),
        (("annotations", 1, "image_id"), KeyError, r"annotations\[1\]\.image_id: found no such key"),
        (("annotations", 1, "image_id"), 99, r"annotations\[1\]\.image_id: found 99, which no image has"),
        (("annotations", 1, "category_id"), 3, r"annotations\[1\]\.category_id: found 3,.*2 \(cat\), 5 \(dog\)"),
        (("annotations", 1, "bbox"), KeyError, r"annotations\[1\]\.bbox: found no box and no segmentation"),
        (("annotations", 1, "bbox"), [1, 2, 3], r"annotations\[1\]\.bbox: found \[1, 2, 3\].* at least 4 items"),
        (("annotations", 1, "bbox"), [1, 2, 3, "a"], r"annotations\[1\]\.bbox\[3\]: found 'a'; expected a valid num"),
        (("annotations", 1, "bbox"), [1, 2, 0, 3], r"annotations\[1\]\.bbox: found a box of 0x3 pixels"),
        (("annotations", 1, "bbox"), [9, 1, 9, 3], r"annotations\[1\]\.bbox: found x 9 to 18, .* image of 12x10"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_in_the_file(tmp_path, place, value, message):
    with pytest.raises(DataError, match=rf"instances_train\.json: {message}") as caught:
        loaded(tmp_path, changed(place, value))
    assert re.search(r"correct|add it|rename|remove|export|check", str(caught.value))


def test_without_boxes_only_segmentations_can_be_asked_for(tmp_path):
    tree = segmented([SQUARE])
    del tree["annotations"][0]["bbox"]
    assert loaded(tmp_path, tree)[0].mask_source == "mask"
    with pytest.raises(DataError, match=r"annotations\[0\]\.bbox: found no box; expected \[x, y, width, height\]"):
        loaded(tmp_path, tree, mask="box")


def test_when_skipping_a_bad_box_is_an_error_of_its_sample_alone(tmp_path):
    dataset = loaded(tmp_path, changed(("annotations", 1, "bbox"), [9, 1, 9, 3]), on_bad_sample="skip")
    kept, bad = validate(dataset, on_bad_sample="skip", progress=False)
    assert kept.sample_ids == ("tom.png", "kit.png")
    assert [sample_id for sample_id, _ in bad] == ["rex.png"]
    assert "annotations[1].bbox" in bad[0].reason


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 5]], r"segmentation\[0\]: found \[1, 1, 5, 5\]; expected a polygon .* three corners"),
        ([SQUARE, [1, 1, 5, 5, 5]], r"segmentation\[1\]: found .* expected a polygon"),
        ([1, 1, 5, 5, 5, 1], r"segmentation\[0\]: found 1; expected a polygon"),
        ([[1, 1, 5, 5, None, 1]], r"segmentation\[0\]: found .* expected a polygon"),
        ([[1, 1, 40, 1, 40, 8]], r"segmentation\[0\]: found x 1 to 40, .* image of 12x10 pixels"),
        ("polygon", r"segmentation: found 'polygon'; expected a list of polygons, or an RLE"),
        ({"size": [12, 10], "counts": [120]}, r"segmentation\.size: found \[12, 10\]; expected \[10, 12\]"),
        ({"counts": [120]}, r"segmentation\.size: found None; expected \[10, 12\]"),
        ({"size": [10, 12], "counts": [100, 10]}, r"segmentation\.counts: .* add up to the image's 120 pixels"),
        ({"size": [10, 12], "counts": [130, -10]}, r"segmentation\.counts: found '\[130, -10\]'"),
        ({"size": [10, 12], "counts": "00"}, r"segmentation\.counts: found '00'; expected run lengths"),
        ({"size": [10, 12], "counts": "~~"}, r"segmentation\.counts: found '~~'"),
        ({"size": [10, 12], "counts": "P"}, r"segmentation\.counts: found 'P'"),
        ({"size": [10, 12]}, r"segmentation\.counts: found 'None'"),
    ],
)
def test_a_malformed_segmentation_is_named_when_its_sample_is_opened(tmp_path, segmentation, message):
    dataset = loaded(tmp_path, segmented(segmentation))
    with pytest.raises(DataError, match=rf"instances_train\.json: annotations\[0\]\.{message}"):
        dataset[0]


def test_a_segmentation_that_covers_no_pixel_is_named(tmp_path):
    sample = loaded(tmp_path, segmented(uncompressed(np.zeros((HEIGHT, WIDTH), np.uint8))))[0]
    with pytest.raises(DataError, match=r"sample 'tom\.png': found an annotated mask without a single object"):
        check_sample(sample)


def test_an_image_of_another_size_than_annotated_is_named(tmp_path):
    dataset = loaded(tmp_path, content())
    Image.new("RGB", (24, 20)).save(tmp_path / "train" / "tom.png")
    with pytest.raises(DataError, match=r"sample 'tom\.png': found .* 24x20 pixels; .* expects 12x10; scale them"):
        dataset[0]


def test_annotations_that_ignore_the_exif_orientation_are_named(tmp_path):
    dataset = loaded(tmp_path, content())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train" / "tom.png", exif=exif)
    with pytest.raises(DataError, match=r"sample 'tom\.png': .* 10x12 pixels; .*seem to ignore its EXIF orientation"):
        dataset[0]


def test_a_missing_image_is_named_when_its_sample_is_opened(tmp_path):
    dataset = loaded(tmp_path, content())
    (tmp_path / "train" / "tom.png").unlink()
    with pytest.raises(DataError, match=r"tom\.png does not exist"):
        dataset[0]


# Real data


@pytest.mark.skipif(not REAL.is_dir(), reason="Tiny-ImageNet with boxes is not here")
def test_tiny_imagenet_with_boxes_can_be_used():
    config = coco.Config(root=REAL, images="{split}", annotations="instances_{split}.json", mask="box", max_per_class=3)
    train, val = coco.load(config, "train"), coco.load(config, "val")
    assert len(train) == len(val) == 180
    assert train.class_names == val.class_names
    assert len(train.class_names) == 60
    assert val.class_names[:2] == ("southern black widow", "koala")
    assert set(val.mask_sources) == {"box"}
    assert validate(val, on_bad_sample="error", progress=False) == (val, [])


@pytest.mark.skipif(not REAL.is_dir(), reason="Tiny-ImageNet with boxes is not here")
def test_a_real_box_has_the_area_its_file_states():
    config = coco.Config(root=REAL, images="{split}", annotations="instances_{split}.json", mask="box")
    dataset = coco.load(config, "val")
    assert len(dataset) == 3000
    assert dataset.sample_ids[0] == "n01774384/val_192.JPEG"
    assert int(dataset[0].mask.sum()) == 1400  # bbox [4, 16, 50, 28]
