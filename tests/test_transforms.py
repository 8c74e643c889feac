"""An image and its mask go the same way to the model, whatever happens to them."""

import numpy as np
import open_clip.transform
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from evidence_ft.backgrounds import BackgroundSwap
from evidence_ft.samples import Sample
from evidence_ft.transforms import Augmentation, ModelInputs, SampleTransform, collate, to_pixels
from evidence_ft.types import Preprocessing
from tests.in_memory import InMemory

HALF = (0.5, 0.5, 0.5)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_halves(left, right, size=(8, 4)):
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


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


def swapping(probability, *, augment=True):
    dataset = InMemory(6, (24, 24))
    augmentation = Augmentation(crop_scale=(0.3, 0.9)) if augment else None
    transform = SampleTransform(Preprocessing((24, 24), HALF, HALF), augmentation)
    return ModelInputs(dataset, transform, seed=0, swap=BackgroundSwap(dataset, probability))


def test_a_swap_of_probability_0_changes_not_a_bit():
    dataset = InMemory(6, (24, 24))
    transform = SampleTransform(Preprocessing((24, 24), HALF, HALF), Augmentation(crop_scale=(0.3, 0.9)))
    without = ModelInputs(dataset, transform, seed=0)
    assert all(same(swapping(0.0)[row], without[row]) for row in range(6))


def test_swapping_backgrounds_moves_neither_mask_nor_object_nor_the_crop():
    for row in range(6):
        kept, swapped = swapping(0.0)[row], swapping(1.0)[row]
        assert torch.equal(swapped.masks, kept.masks)
        # Resizing mixes in what lies beside, so only the middle of the object is the same to the bit.
        inner = -torch.nn.functional.max_pool2d(-kept.masks[None].float(), 7, stride=1, padding=3)[0] > 0
        assert inner.any()
        assert torch.equal(swapped.images[:, inner], kept.images[:, inner])
        assert not torch.equal(swapped.images, kept.images)


def test_swapped_backgrounds_depend_on_seed_epoch_and_row_alone():
    first, second = swapping(1.0, augment=False), swapping(1.0, augment=False)
    expected = [first[row] for row in range(6)]
    assert all(same(second[row], expected[row]) for row in (5, 0, 3, 1, 4, 2))
    changed = 0
    for epoch in range(1, 4):
        second.set_epoch(epoch)
        changed += sum(not same(second[row], expected[row]) for row in range(6))
    assert changed >= 6  # of 18, two thirds on average: there are three donors of the other class


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("inputs", [augmented, lambda: swapping(0.5)], ids=["augmented", "swapped"])
def test_workers_give_the_same_batches_in_every_epoch(inputs, persistent):
    alone, shared = inputs(), inputs()
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
