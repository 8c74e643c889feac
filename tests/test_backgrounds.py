from collections import Counter

import numpy as np
import pytest
from PIL import Image

from evidence_ft.backgrounds import BackgroundSwap, SwappedBackgrounds, choose_donors, paint_out, swap_background
from evidence_ft.images import DataError
from evidence_ft.samples import Sample, validate

RED, GREEN = (255, 0, 0), (0, 255, 0)


def disc(size=64, radius=16):
    y, x = np.mgrid[:size, :size] - size / 2
    return (x**2 + y**2 <= radius**2).astype(np.uint8)


def noise(size=64, seed=0, low=0, high=100):
    return np.random.default_rng(seed).integers(low, high, (size, size, 3), dtype=np.uint8)


# Painting out


def test_no_colour_of_the_object_remains():
    image, mask = noise(high=100), disc()
    image[mask == 1] = (255, 200, 255)
    assert paint_out(image, mask).max() < 100


def test_a_soft_edge_just_outside_the_mask_goes_as_well():
    image, mask = noise(high=100), disc(radius=16)
    image[disc(radius=17) == 1] = (255, 200, 255)
    assert paint_out(image, mask).max() < 100


def test_an_object_on_a_plain_background_leaves_no_silhouette():
    image = np.full((64, 64, 3), (10, 90, 40), dtype=np.uint8)
    image[disc() == 1] = RED
    assert (paint_out(image, disc()) == (10, 90, 40)).all()


def test_an_object_on_a_gradient_leaves_no_edge():
    image = np.repeat(np.linspace(0, 252, 64).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    image[disc() == 1] = 255
    steps = np.abs(np.diff(paint_out(image, disc()).astype(int), axis=1))
    assert steps.max() < 40  # the object's edge was a step of about 200, the gradient one of 4


def test_the_background_is_not_touched():
    image = noise()
    far = disc(radius=20) == 0
    np.testing.assert_array_equal(paint_out(image, disc(radius=16))[far], image[far])


def test_an_image_that_is_all_object_becomes_its_mean_colour():
    image = np.array([[[0, 10, 20], [100, 20, 20]]], dtype=np.uint8)
    assert paint_out(image, np.ones((1, 2), np.uint8)).tolist() == [[[50, 15, 20], [50, 15, 20]]]


def test_a_background_thinner_than_the_dilation_is_still_used():
    image = np.full((20, 20, 3), RED, dtype=np.uint8)
    image[:, 0] = GREEN
    mask = np.ones((20, 20), np.uint8)
    mask[:, 0] = 0
    assert (paint_out(image, mask) == GREEN).all()


def test_an_image_without_an_object_stays_as_it_is():
    image = noise()
    np.testing.assert_array_equal(paint_out(image, np.zeros((64, 64), np.uint8)), image)


def test_painting_out_leaves_its_arguments_alone():
    image, mask = noise(), disc()
    before = image.copy(), mask.copy()
    paint_out(image, mask)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


# Swapping


def test_the_object_keeps_its_pixels_and_the_rest_is_the_background():
    image, background, mask = noise(seed=1), noise(seed=2), disc()
    swapped = swap_background(image, mask, background)
    np.testing.assert_array_equal(swapped[mask == 1], image[mask == 1])
    np.testing.assert_array_equal(swapped[mask == 0], background[mask == 0])


def test_a_background_of_another_size_is_resized_as_by_pillow():
    background = noise(size=20, seed=3)
    expected = np.asarray(Image.fromarray(background).resize((8, 4), Image.Resampling.BICUBIC))
    swapped = swap_background(np.zeros((4, 8, 3), np.uint8), np.zeros((4, 8), np.uint8), background)
    np.testing.assert_array_equal(swapped, expected)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"image of shape \(4, 4, 3\) does not fit a mask of shape \(4, 5\)"):
        swap_background(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="does not fit a mask"):
        paint_out(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8))


# Donors

BALANCED = [0, 1, 2] * 20
HALF_OF_ONE = [0] * 30 + [1] * 10 + [2] * 20
MOSTLY_ONE = [0] * 45 + [1] * 10 + [2] * 5


@pytest.mark.parametrize("labels", [BALANCED, HALF_OF_ONE, MOSTLY_ONE])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_donor_is_of_another_class(labels, seed):
    donors = choose_donors(labels, [True] * 60, seed)
    assert all(donor is not None and labels[donor] != label for label, donor in zip(labels, donors, strict=True))


@pytest.mark.parametrize("labels", [BALANCED, HALF_OF_ONE, [0, 0, 1, 1, 2]])
def test_each_donor_is_used_once_where_the_classes_allow(labels):
    assert sorted(choose_donors(labels, [True] * len(labels), 0)) == list(range(len(labels)))


def test_donors_of_a_class_that_outnumbers_the_others_take_turns():
    donors = choose_donors(MOSTLY_ONE, [True] * 60, 0)
    uses = Counter(donor for label, donor in zip(MOSTLY_ONE, donors, strict=True) if label == 0)
    assert set(uses) == set(range(45, 60))
    assert set(uses.values()) == {3}


def test_backgrounds_of_one_class_come_from_all_others():
    donors = choose_donors([0, 1, 2, 3] * 50, [True] * 200, 0)
    of_class_0 = Counter(donors[row] % 4 for row in range(0, 200, 4))
    assert set(of_class_0) == {1, 2, 3}
    assert min(of_class_0.values()) >= 5


def test_with_one_class_there_is_no_background_of_another_one():
    assert choose_donors([4] * 9, [True] * 9, 0) == [None] * 9
    assert choose_donors([4, 4, 1], [True, True, False], 0) == [None] * 3


def test_rows_that_are_not_usable_neither_give_nor_get():
    usable = [row % 3 != 0 for row in range(60)]
    labels = [row // 20 for row in range(60)]
    donors = choose_donors(labels, usable, 0)
    assert all((donors[row] is not None) == usable[row] for row in range(60))
    assert all(donor is None or usable[donor] for donor in donors)


@pytest.mark.parametrize("usable", [[], [False, False], [True, False]])
def test_without_another_usable_row_there_is_no_donor(usable):
    assert choose_donors(list(range(len(usable))), usable, 0) == [None] * len(usable)


def test_donors_follow_from_the_seed():
    assert choose_donors(BALANCED, [True] * 60, 7) == choose_donors(BALANCED, [True] * 60, 7)
    assert choose_donors(BALANCED, [True] * 60, 7) != choose_donors(BALANCED, [True] * 60, 8)


def test_labels_and_usable_must_be_as_long():
    with pytest.raises(ValueError, match="2 labels and 1 entries of usable; expected one each per row"):
        choose_donors([0, 1], [True], 0)


# The data set


class Discs:
    """Red discs on black and green discs on white; the third image is not annotated."""

    class_names = ("on black", "on white")
    sample_ids = ("a", "b", "c", "d", "e")
    labels = (0, 1, 0, 0, 1)
    mask_sources = ("mask", "mask", "none", "mask", "mask")

    def __len__(self):
        return 5

    def __getitem__(self, row):
        mask = disc()
        image = np.full((64, 64, 3), 255 * self.labels[row], dtype=np.uint8)
        image[mask == 1] = (RED, GREEN)[self.labels[row]]
        return Sample(
            self.sample_ids[row],
            Image.fromarray(image),
            self.labels[row],
            mask if self.mask_sources[row] == "mask" else None,
            self.mask_sources[row],
        )


def test_each_object_stands_on_the_other_classs_background():
    swapped = SwappedBackgrounds(Discs(), seed=0)
    for sample in (swapped[row] for row in range(len(swapped))):
        pixels, inside = np.asarray(sample.image), disc() == 1
        assert (pixels[inside] == (RED, GREEN)[sample.label]).all()
        assert (pixels[~inside] == 255 * (1 - sample.label)).all()


def test_rows_without_a_mask_are_left_out():
    swapped = SwappedBackgrounds(Discs(), seed=0)
    assert swapped.rows == (0, 1, 3, 4)
    assert swapped.sample_ids == ("a", "b", "d", "e")
    assert swapped.labels == (0, 1, 0, 1)


def test_donors_are_original_rows_of_the_other_class():
    swapped = SwappedBackgrounds(Discs(), seed=0)
    assert [Discs.labels[donor] for donor in swapped.donors] == [1, 0, 1, 0]


def test_swapped_backgrounds_are_a_data_set_that_passes_the_check():
    swapped = SwappedBackgrounds(Discs(), seed=0)
    assert validate(swapped, on_bad_sample="error", progress=False) == (swapped, [])


def test_a_data_set_without_masks_gives_an_empty_view():
    class Unannotated(Discs):
        mask_sources = ("none",) * 5

    assert len(SwappedBackgrounds(Unannotated(), seed=0)) == 0


def test_a_mask_of_another_size_is_named():
    class Small(Discs):
        def __getitem__(self, row):
            return super().__getitem__(row)._replace(mask=np.ones((3, 3), np.uint8))

    with pytest.raises(DataError, match="sample 'a': found a mask of 3x3 pixels"):
        SwappedBackgrounds(Small(), seed=0)[0]


def test_a_mask_that_was_promised_and_is_not_there_is_named():
    class Promised(Discs):
        def __getitem__(self, row):
            return super().__getitem__(row)._replace(mask=None, mask_source="none")

    with pytest.raises(DataError, match=r"sample 'b': found no mask on opening it.*correct the data set's mask_sou"):
        SwappedBackgrounds(Promised(), seed=0)[1]


# Augmentation


def swapped(row, probability=1.0, seed=0, dataset=None):
    dataset = dataset or Discs()
    return BackgroundSwap(dataset, probability)(row, dataset[row], np.random.default_rng(seed))


@pytest.mark.parametrize("row", [0, 1, 3, 4])
def test_an_augmented_object_stands_on_the_other_classs_background_with_its_own_mask(row):
    sample = swapped(row)
    pixels, inside = np.asarray(sample.image), disc() == 1
    assert (pixels[inside] == (RED, GREEN)[sample.label]).all()
    assert (pixels[~inside] == 255 * (1 - sample.label)).all()
    assert (sample.sample_id, sample.label, sample.mask_source) == (Discs.sample_ids[row], Discs.labels[row], "mask")
    np.testing.assert_array_equal(sample.mask, disc())


def test_an_image_without_a_mask_keeps_its_background():
    sample = Discs()[2]
    assert BackgroundSwap(Discs(), 1.0)(2, sample, np.random.default_rng(0)) is sample


def test_backgrounds_are_swapped_as_often_as_asked():
    swap, sample, generator = BackgroundSwap(Discs(), 0.25), Discs()[0], np.random.default_rng(0)
    times = sum(swap(0, sample, generator) is not sample for _ in range(1000))
    assert 250 - 42 < times < 250 + 42  # three standard deviations


def test_augmenting_donors_are_all_annotated_images_of_other_classes_about_equally_often():
    class Ten(Discs):
        labels = (2, 0, 1, 2, 0, 1, 2, 0, 1, 2)
        mask_sources = ("mask",) * 9 + ("none",)
        sample_ids = tuple("abcdefghij")

    swap, generator = BackgroundSwap(Ten(), 1.0), np.random.default_rng(0)
    for row, others in ((2, {0, 1, 3, 4, 6, 7}), (1, {0, 2, 3, 5, 6, 8}), (0, {1, 2, 4, 5, 7, 8})):
        drawn = Counter(swap.choose_donor(row, generator) for _ in range(1200))
        assert set(drawn) == others
        assert 150 < min(drawn.values()) <= max(drawn.values()) < 250  # 200 each, four standard deviations


def test_with_one_class_an_augmenting_donor_is_another_image():
    class Alike(Discs):
        labels = (0,) * 5

    swap, generator = BackgroundSwap(Alike(), 1.0), np.random.default_rng(0)
    assert {swap.choose_donor(1, generator) for _ in range(100)} == {0, 3, 4}


def test_painted_out_backgrounds_are_kept_as_far_as_the_bound_allows():
    class Counting(Discs):
        def __init__(self):
            self.opened = Counter()

        def __getitem__(self, row):
            self.opened[row] += 1
            return super().__getitem__(row)

    def opened(cache_bytes):
        dataset = Counting()
        swap, sample = BackgroundSwap(dataset, 1.0, cache_bytes=cache_bytes), Discs()[0]
        images = [np.asarray(swap(0, sample, np.random.default_rng(seed)).image) for seed in range(20)]
        assert all(image[0, 0, 0] == 255 for image in images)
        return sum(dataset.opened.values())

    one = 64 * 64 * 3
    assert opened(2 * one) == 2  # rows 1 and 4, each once
    assert opened(0) == 20
    assert 2 < opened(one) < 20


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_that_is_none_is_refused(probability):
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        BackgroundSwap(Discs(), probability)


def test_without_another_background_swapping_is_refused():
    class Lonely(Discs):
        mask_sources = ("mask", *("none",) * 4)

    with pytest.raises(DataError, match=r"found 1 training image\(s\) with a mask.*set training\.background_swap to 0"):
        BackgroundSwap(Lonely(), 0.5)
    BackgroundSwap(Lonely(), 0.0)
