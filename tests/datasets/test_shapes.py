import numpy as np
import pytest
from scipy import ndimage

from evidence_ft.datasets import shapes
from evidence_ft.images import DataError
from evidence_ft.samples import check_sample, fingerprint


def test_the_same_seed_draws_the_same_images_and_another_seed_others():
    first, again, other = shapes.Shapes("test", 8), shapes.Shapes("test", 8), shapes.Shapes("test", 8, seed=1)
    for row in range(8):
        assert first[row].image.tobytes() == again[row].image.tobytes()
        assert first[row].image.tobytes() != other[row].image.tobytes()


def test_images_do_not_depend_on_the_order_they_are_asked_for():
    forward = [shapes.Shapes("train", 5)[row].image.tobytes() for row in range(5)]
    data = shapes.Shapes("train", 5)
    assert [data[row].image.tobytes() for row in reversed(range(5))] == forward[::-1]


def test_splits_share_no_image():
    seen = {shapes.Shapes(split, 20)[row].image.tobytes() for split in shapes.SPLITS for row in range(20)}
    assert len(seen) == 20 * len(shapes.SPLITS)


def test_every_sample_is_sound_and_every_class_is_drawn():
    data = shapes.Shapes("train", 40)
    for row in range(40):
        check_sample(data[row])
    assert set(data.labels) == set(range(len(shapes.CLASS_NAMES)))


def test_the_mask_is_one_object_whose_pixels_the_tags_do_not_touch():
    for label in range(len(shapes.CLASS_NAMES)):
        plain = shapes.draw(np.random.default_rng(label), label, tag=None)
        tagged = shapes.draw(np.random.default_rng(label), label, tag=0)
        assert ndimage.label(plain.mask)[1] == 1
        assert np.array_equal(plain.mask, tagged.mask)
        changed = (np.asarray(plain.image, int) != np.asarray(tagged.image, int)).any(axis=-1)
        assert changed.any()
        assert not (changed & (plain.mask == 1)).any()
        squares = ndimage.find_objects(ndimage.label(ndimage.binary_closing(changed))[0])
        assert len(squares) == 2
        assert all(side.stop - side.start <= shapes._TAG for square in squares for side in square)


def test_two_tags_find_room_wherever_the_largest_object_is():
    generator = np.random.default_rng(0)
    radius = 20
    for label, name in enumerate(shapes.CLASS_NAMES):
        for x in (radius + 1, shapes.SIZE / 2, shapes.SIZE - radius - 1):
            for y in (radius + 1, shapes.SIZE / 2, shapes.SIZE - radius - 1):
                occupied = shapes._shape(name, np.array([x, y]), radius, generator.uniform(-0.3, 0.3)) > 0
                (top, left), (other_top, other_left) = shapes._beside(generator, occupied)
                assert max(abs(top - other_top), abs(left - other_left)) >= shapes._TAG + 2, label


def tag_of(data, row):
    """The class whose tags are in an image, found by looking for its colours."""
    pixels = np.asarray(data[row].image, float)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (shapes._TAG, shapes._TAG), axis=(0, 1))
    distances = [
        np.abs(windows - shapes._tag(label).transpose(2, 0, 1)).mean(axis=(2, 3, 4)).min()
        for label in range(len(shapes.CLASS_NAMES))
    ]
    return int(np.argmin(distances))


def test_the_tags_name_the_class_in_train_and_test_and_are_drawn_at_random_in_shifted():
    agree = {
        split: np.mean([tag_of(data, row) == data.labels[row] for row in range(48)])
        for split in ("train", "test", "shifted")
        for data in [shapes.Shapes(split, 48)]
    }
    assert agree["train"] == agree["test"] == 1
    assert agree["shifted"] < 0.4  # chance is 0.125


def test_plain_images_have_no_tag():
    data = shapes.Shapes("plain", 3)
    for row in range(3):
        generator = np.random.default_rng([0, shapes.SPLITS.index("plain"), row])
        assert data[row].image.tobytes() == shapes.draw(generator, row, tag=None).image.tobytes()


def test_load_reads_sizes_and_seed_from_the_config():
    config = shapes.Config(train_images=16, test_images=8, seed=3)
    assert len(shapes.load(config, "train")) == 16
    assert len(shapes.load(config, "shifted")) == 8
    assert fingerprint(shapes.load(config, "test")) == fingerprint(shapes.Shapes("test", 8, seed=3))
    assert fingerprint(shapes.load(config, "test")) != fingerprint(shapes.Shapes("test", 8, seed=4))


def test_as_many_training_images_as_asked_for_whatever_they_are_called():
    config = shapes.Config(train_split="plain", test_splits=("train",), train_images=16, test_images=8)
    assert len(shapes.load(config, "plain")) == 16
    assert len(shapes.load(config, "train")) == 8


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="no split 'val'; choose from train, test, shifted, plain"):
        shapes.load(shapes.Config(), "val")
