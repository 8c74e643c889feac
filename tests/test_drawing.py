"""Pictures show what the numbers say, pixel by pixel."""

import numpy as np

from evidence_ft import drawing


def test_an_overlay_puts_each_token_on_its_own_pixels():
    heatmap = np.array([[0.0, 1.0]], dtype=np.float32)
    drawn = drawing._overlay(np.full((224, 224, 3), 128, np.uint8), np.zeros((224, 224), np.uint8), heatmap)
    left, right = drawn[:, :112].reshape(-1, 3), drawn[:, 112:].reshape(-1, 3)
    assert (left == left[0]).all()
    assert (right == right[0]).all()
    assert right[0].astype(int).sum() > left[0].astype(int).sum() + 100


def test_an_empty_heatmap_leaves_the_image_grey():
    image = np.random.default_rng(0).integers(256, size=(300, 200, 3), dtype=np.uint8)
    drawn = drawing._overlay(image, np.zeros((300, 200), np.uint8), np.zeros((2, 2), np.float32))
    assert drawn.shape == (224, 149, 3)
    assert (drawn == drawn[..., :1]).all()


def test_an_outline_runs_inside_the_mask_and_its_rim_outside():
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 1
    drawn = drawing._outlined(np.full((9, 9, 3), 100, np.uint8), mask)[..., 0]
    assert drawn[4].tolist() == [100, 0, 255, 255, 100, 255, 255, 0, 100]


def test_a_running_mean_keeps_a_constant_and_short_curves():
    np.testing.assert_allclose(drawing._smoothed(np.full(200, 3.0)), 3.0)
    short = np.array([1.0, 2.0])
    assert drawing._smoothed(short) is short
