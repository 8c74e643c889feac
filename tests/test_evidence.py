import pytest
import torch
import torch.nn.functional as F

from evidence_ft.evidence import (
    HeatmapError,
    checked_heatmaps,
    has_evidence,
    is_empty,
    mask_to_grid,
    relevance_mass_accuracy,
)
from tests import by_definition


def test_rma_matches_its_definition(generator):
    heat = torch.rand(5, 4, 6, generator=generator)
    mask = torch.rand(5, 4, 6, generator=generator)
    expected = [by_definition.rma(h, m) for h, m in zip(heat, mask, strict=True)]
    torch.testing.assert_close(relevance_mass_accuracy(heat, mask), torch.tensor(expected))


@pytest.mark.parametrize("scale", [1e-38, 1e-16, 1.0, 1e16, 1e36])
def test_rma_does_not_depend_on_the_heatmaps_scale(generator, scale):
    heat = torch.rand(3, 4, 6, generator=generator)
    mask = (torch.rand(3, 4, 6, generator=generator) > 0.5).float()
    torch.testing.assert_close(relevance_mass_accuracy(heat * scale, mask), relevance_mass_accuracy(heat, mask))


def test_rma_gradient_is_that_of_the_plain_ratio(generator):
    heat = torch.rand(3, 4, 6, generator=generator, dtype=torch.float64).float().requires_grad_()
    mask = torch.rand(3, 4, 6, generator=generator)
    ratio = (heat * mask).sum(dim=(1, 2)) / heat.sum(dim=(1, 2))
    expected = torch.autograd.grad(ratio.sum(), heat)[0]
    actual = torch.autograd.grad(relevance_mass_accuracy(heat, mask).sum(), heat)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_an_empty_heatmap_points_at_nothing_and_an_empty_mask_leaves_nothing_to_point_at():
    heat = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]])
    mask = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    rma = relevance_mass_accuracy(heat, mask)
    assert rma[0] == 0
    assert rma[1:].isnan().all()
    assert is_empty(heat).tolist() == [True, False, True]
    assert has_evidence(mask).tolist() == [True, False, False]


def test_images_without_evidence_send_no_nan_into_the_gradient():
    heat = torch.tensor([[[2.0, 1.0]], [[1.0, 1.0]]], requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    rma = relevance_mass_accuracy(heat, mask)
    torch.where(rma.isnan(), 0, rma).sum().backward()
    assert heat.grad.isfinite().all()
    assert heat.grad[1].eq(0).all()


def test_bfloat16_heatmaps_are_summed_in_float32():
    heat = torch.ones(1, 32, 32, dtype=torch.bfloat16)  # bfloat16 sums stall at 256
    mask = torch.zeros(1, 32, 32)
    mask[:, :8] = 1
    assert relevance_mass_accuracy(heat, mask).item() == 0.25


def test_float16_heatmaps_are_refused():
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        relevance_mass_accuracy(torch.ones(1, 2, 2, dtype=torch.float16), torch.ones(1, 2, 2))


def test_masks_in_pixels_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="mask_to_grid"):
        relevance_mass_accuracy(torch.ones(1, 2, 2), torch.ones(1, 4, 4))


def test_masks_by_area_equal_heatmaps_by_nearest_neighbour(generator):
    heat = torch.rand(2, 4, 6, generator=generator)
    mask = (torch.rand(2, 32, 48, generator=generator) > 0.6).to(torch.uint8)
    in_pixels = F.interpolate(heat[:, None], size=(32, 48), mode="nearest")[:, 0]
    expected = relevance_mass_accuracy(in_pixels, mask.float())
    torch.testing.assert_close(relevance_mass_accuracy(heat, mask_to_grid(mask, (4, 6))), expected)


def test_only_the_objects_value_counts_as_evidence():
    mask = torch.tensor([[[0, 1, 255, 1]]], dtype=torch.uint8)
    assert mask_to_grid(mask, (1, 2)).tolist() == [[[0.5, 0.5]]]


def test_a_grid_that_does_not_divide_the_mask_is_refused():
    with pytest.raises(ValueError, match=r"a 7x7 token grid does not divide masks of \(224, 220\) pixels"):
        mask_to_grid(torch.zeros(1, 224, 220), (7, 7))


@pytest.mark.parametrize(
    ("heatmaps", "message"),
    [
        (torch.ones(2, 1, 3, 4), r"shape \(2, 1, 3, 4\); expected a tensor of shape \(2, 3, 4\)"),
        (torch.ones(1, 3, 4), r"shape \(1, 3, 4\); expected"),
        (None, "type NoneType; expected a tensor"),
        (torch.full((2, 3, 4), -0.5), r"values down to -0\.5; expected none below 0"),
    ],
)
def test_what_is_no_heatmap_is_refused(heatmaps, message):
    with pytest.raises(HeatmapError, match=message):
        checked_heatmaps(heatmaps, images=2, grid=(3, 4))


def test_a_heatmap_passes_as_it_is():
    heatmaps = torch.tensor([[[0.0, 1.0]], [[3.0, 1.0]]])
    assert checked_heatmaps(heatmaps, images=2, grid=(1, 2)) is heatmaps


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_unless_they_are_met_elsewhere(value):
    heatmaps = torch.tensor([[[value, 1.0]]])
    with pytest.raises(HeatmapError, match="NaN or infinite values; look whether it divides by zero"):
        checked_heatmaps(heatmaps, images=1, grid=(1, 2))
    assert checked_heatmaps(heatmaps, images=1, grid=(1, 2), finite=False) is heatmaps
