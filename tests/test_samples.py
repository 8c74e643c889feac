import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from evidence_ft.images import DataError
from evidence_ft.samples import (
    DatasetConfig,
    Subset,
    check_sample,
    choose_classes,
    fingerprint,
    first_per_class,
    validate,
)
from tests.in_memory import InMemory


class Broken(InMemory):
    """Some rows cannot be opened."""

    def __init__(self, bad, n=4):
        super().__init__(n)
        self.bad = bad

    def __getitem__(self, row):
        if row in self.bad:
            raise DataError(f"image file {row}.png does not exist")
        return super().__getitem__(row)


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
