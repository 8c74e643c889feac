import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from evidence_ft.images import DataError
from evidence_ft.samples import validate
from evidence_ft.wrapped_datasets import (
    MaskReading,
    as_evidence_dataset,
    from_huggingface,
    from_torchvision,
    read_image_value,
    read_mask_value,
)
from tests.in_memory import InMemory

WIDTH, HEIGHT = 8, 6


def picture(shade):
    return Image.new("RGB", (WIDTH, HEIGHT), (shade, 0, 0))


def left_half(value=255, mode="L"):
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[:, : WIDTH // 2] = value
    return Image.fromarray(pixels).convert(mode)


LEFT_HALF = np.array(left_half(1))


class Table:
    """As much of ``datasets.Dataset`` as is used."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    @property
    def column_names(self):
        return list(self.columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}

    def select_columns(self, names):
        return Table({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    def with_format(self, _type):
        return self

    def cast_column(self, _column, _feature):
        return self


def table(**changes):
    columns = {
        "image": [picture(10), picture(20), picture(30)],
        "label": [1, 0, 1],
        "mask": [left_half(), None, left_half()],
    } | changes
    columns = {name: values for name, values in columns.items() if values is not None}
    return Table(
        columns, {name: SimpleNamespace() for name in columns} | {"label": SimpleNamespace(names=["no", "yes"])}
    )


class Items(torch.utils.data.Dataset):
    """A data set of ``(image, target)`` as torchvision's are, without files."""

    classes = ("no", "yes")

    def __init__(self, targets):
        self.drawn = targets
        self.opened = 0

    def __len__(self):
        return len(self.drawn)

    def __getitem__(self, row):
        self.opened += 1
        return picture(row), self.drawn[row]


def test_a_hugging_face_table_gives_samples_with_image_label_and_mask():
    dataset = from_huggingface(table())
    assert dataset.class_names == ("no", "yes")
    assert dataset.labels == (1, 0, 1)
    assert dataset.mask_sources == ("mask", "none", "mask")
    first, second = dataset[0], dataset[1]
    assert first.image.getpixel((0, 0)) == (10, 0, 0)
    np.testing.assert_array_equal(first.mask, LEFT_HALF)
    assert second.mask is None
    assert validate(dataset, on_bad_sample="error", progress=False)[1] == []


def test_names_as_labels_become_classes_in_alphabetical_order_or_as_told():
    named = table(label=["yes", "no", "yes"])
    assert from_huggingface(named).class_names == ("no", "yes")
    told = from_huggingface(named, class_names=("yes", "no"))
    assert (told.class_names, told.labels) == (("yes", "no"), (0, 1, 0))


def test_names_as_labels_must_be_among_the_classes_that_the_data_set_declares():
    assert from_torchvision(Items(["yes", "yes"])).labels == (1, 1)
    with pytest.raises(DataError, match="found labels 'zz' in the targets, expected one of 'no', 'yes'"):
        from_torchvision(Items(["zz", "zz"]))


def test_rows_are_named_by_their_number_or_by_a_column():
    assert from_huggingface(table()).sample_ids == ("0", "1", "2")
    assert from_huggingface(table(file=["a", "b", "c"]), sample_id="file").sample_ids == ("a", "b", "c")


def test_a_table_without_masks_has_none_annotated():
    assert from_huggingface(table(mask=None), mask=None).mask_sources == ("none",) * 3


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ({"train": table()}, {}, "dictionary of splits .'train'."),
        (iter([]), {}, "list_iterator, expected a datasets.Dataset that is not streamed"),
        (table(mask=None), {}, "no column 'mask'; there are 'image', 'label'; .*mask=None if nothing"),
        (table(), {"image": "img"}, "no column 'img' .did you mean 'image'"),
        (table(label=[1, -1, 0]), {}, "row 1: found label -1 in label, expected a whole number from 0 to 1"),
        (table(label=["maybe"] * 3), {"class_names": ["no", "yes"]}, "found labels 'maybe' in label"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_what_to_do(dataset, options, message):
    with pytest.raises(DataError, match=message):
        from_huggingface(dataset, **options)


def test_numbers_without_names_need_class_names():
    unnamed = table()
    unnamed.features["label"] = SimpleNamespace()
    with pytest.raises(DataError, match="numbers without names in label; give class_names"):
        from_huggingface(unnamed)
    assert from_huggingface(unnamed, class_names=["no", "yes"]).labels == (1, 0, 1)


def test_pairs_of_class_and_mask_are_read_from_torchvision_targets():
    dataset = from_torchvision(Items([(1, left_half()), (0, None)]))
    assert dataset.class_names == ("no", "yes")
    assert (dataset.labels, dataset.mask_sources) == ((1, 0), ("mask", "none"))
    np.testing.assert_array_equal(dataset[0].mask, LEFT_HALF)
    assert dataset[1].image.getpixel((0, 0)) == (1, 0, 0)


def test_label_and_mask_are_found_where_the_user_says():
    items = Items([{"kind": "yes", "outline": left_half()}, {"kind": "no", "outline": left_half()}])
    dataset = from_torchvision(items, label=lambda target: target["kind"], mask=lambda target: target["outline"])
    assert (dataset.labels, dataset.mask_sources) == ((1, 0), ("mask", "mask"))


def test_a_target_of_unknown_shape_asks_for_functions():
    with pytest.raises(DataError, match=r"target of type dict.* label= and mask="):
        from_torchvision(Items([{"kind": "yes"}]))


def test_an_image_folder_is_wrapped_without_opening_its_images(tmp_path):
    for name in ("no/a.png", "yes/b.png", "yes/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(7).save(tmp_path / name)
    opened = []

    def loader(path):
        opened.append(Path(path).name)
        with Image.open(path) as image:
            return image.convert("RGB")

    dataset = from_torchvision(ImageFolder(tmp_path, loader=loader))
    assert opened == ["a.png"]  # the first, to see what a target is
    assert (dataset.class_names, dataset.labels) == (("no", "yes"), (0, 1, 1))
    assert dataset.mask_sources == ("none",) * 3


def test_changed_targets_are_read_from_the_items(tmp_path):
    for name in ("no/a.png", "yes/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(7).save(tmp_path / name)
    assert from_torchvision(ImageFolder(tmp_path, target_transform=lambda label: 1 - label)).labels == (1, 0)


def test_a_mask_can_be_made_for_an_image_folder(tmp_path):
    for name in ("no/a.png", "yes/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(7).save(tmp_path / name)
    dataset = from_torchvision(ImageFolder(tmp_path), mask=lambda label: left_half() if label else None)
    assert dataset.mask_sources == ("none", "mask")


def test_a_data_set_that_transforms_its_images_is_refused():
    items = Items([0, 1])
    dataset = from_torchvision(items)
    items.__class__ = type("Transformed", (Items,), {"__getitem__": lambda self, row: (torch.rand(3, 4, 4), 0)})
    with pytest.raises(DataError, match=r"sample '0': found Tensor torch.float32.* leave out the data set's own"):
        dataset[0]


def test_known_kinds_of_data_sets_are_wrapped_by_default():
    ours = InMemory()
    assert as_evidence_dataset(ours) is ours
    assert as_evidence_dataset(table()).labels == (1, 0, 1)
    assert as_evidence_dataset(Items([1, 0])).labels == (1, 0)
    with pytest.raises(TypeError, match="data set of type list; expected an EvidenceDataset"):
        as_evidence_dataset([1, 2])


@pytest.mark.parametrize(
    ("mask", "reading"),
    [
        (left_half(255), MaskReading()),
        (left_half(255, "1"), MaskReading()),
        (left_half(1), MaskReading(object_values=(1,))),
        (left_half(128), MaskReading(threshold=0.5)),
        (LEFT_HALF.astype(bool), MaskReading()),
        (LEFT_HALF, MaskReading()),
        (LEFT_HALF.tolist(), MaskReading()),
        (torch.tensor(LEFT_HALF)[None], MaskReading()),
        (torch.tensor(LEFT_HALF) * 0.7, MaskReading(threshold=0.6)),
        (LEFT_HALF * 3, MaskReading(object_values=(2, 3))),
    ],
)
def test_every_usual_kind_of_mask_is_understood(mask, reading):
    np.testing.assert_array_equal(read_mask_value(mask, reading, "a"), LEFT_HALF)


@pytest.mark.parametrize(
    ("mask", "reading", "message"),
    [
        (left_half(1), MaskReading(), "largest value is 0.00392, is marked as object; .* object_values="),
        (LEFT_HALF * 0, MaskReading(), "nothing in its mask"),
        (LEFT_HALF * 255, MaskReading(), "mask values from 0 to 255, expected 0 to 1; .* object_values="),
        (np.zeros((2, 3, 4)), MaskReading(), r"mask of shape \(2, 3, 4\), expected \(height, width\)"),
    ],
)
def test_a_mask_without_known_meaning_is_refused(mask, reading, message):
    with pytest.raises(DataError, match=message):
        read_mask_value(mask, reading, "a")


def test_images_in_memory_come_out_upright_and_in_rgb():
    tall = Image.new("L", (WIDTH, HEIGHT), 90)
    tall.getexif()[0x0112] = 6  # to be turned by a quarter
    upright = read_image_value(tall, "a")
    assert (upright.mode, upright.size) == ("RGB", (HEIGHT, WIDTH))
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for image in (pixels, torch.tensor(pixels).permute(2, 0, 1)):
        np.testing.assert_array_equal(np.array(read_image_value(image, "a")), pixels)


def test_the_real_library_of_hugging_face_is_understood():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "mask": datasets.Image(),
            "note": datasets.Value("string"),
        }
    )
    rows = {
        "image": [picture(10), picture(20), picture(30)],
        "label": [1, 0, 1],
        "mask": [left_half(), None, left_half()],
        "note": ["a", "b", "c"],
    }
    table = datasets.Dataset.from_dict(rows, features=features).select([2, 1]).with_format("torch")
    dataset = as_evidence_dataset(table)
    assert (dataset.labels, dataset.mask_sources) == ((1, 0), ("mask", "none"))
    assert dataset[0].image.getpixel((0, 0)) == (30, 0, 0)
    np.testing.assert_array_equal(dataset[0].mask, LEFT_HALF)
    with pytest.raises(DataError, match="not streamed"):
        from_huggingface(table.to_iterable_dataset())
    assert "datasets" in sys.modules
