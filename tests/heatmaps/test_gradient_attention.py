import pytest
import torch

from evidence_ft.heatmaps import gradient_attention
from evidence_ft.types import VisionTrace
from tests import by_definition


def first_feature(features):
    return features[:, 0]


@pytest.mark.parametrize("layers", ["all", [-1], [0, 2]])
def test_it_equals_the_definition_image_by_image(encoder, generator, layers):
    images = torch.randn(3, 3, *encoder.preprocessing.size, generator=generator)
    tower = encoder.image_tower
    heatmaps = gradient_attention.heatmap(tower.trace(images, layers), first_feature, create_graph=False)
    for image, heatmap in zip(images, heatmaps, strict=True):
        trace = tower.trace(image[None], layers)
        gradients = torch.autograd.grad(trace.features[0, 0], trace.attention)
        expected = by_definition.generic_attention_attribution(
            [attention[0].detach() for attention in trace.attention], [gradient[0] for gradient in gradients]
        )
        expected = expected[tower.num_prefix_tokens :]
        torch.testing.assert_close(heatmap.flatten().double(), expected, rtol=1e-4, atol=1e-9 + 1e-5 * expected.max())


def test_the_grid_is_filled_row_by_row():
    relevance = torch.arange(1, 26.0)[None]
    trace = VisionTrace(torch.zeros(1, 2), torch.zeros(1, 1, 1, 25), (), (4, 6), 1)
    assert trace.on_grid(relevance)[0, 1].tolist() == [8, 9, 10, 11, 12, 13]


def test_training_through_it_reaches_every_block_below_the_traced_one(encoder, generator):
    images = torch.randn(2, 3, *encoder.preprocessing.size, generator=generator)
    tower = encoder.image_tower
    heat = gradient_attention.heatmap(tower.trace(images, [-1]), first_feature, create_graph=True)
    (heat[:, :2].sum() / heat.sum()).backward()
    for block in tower.blocks():
        assert all(
            parameter.grad.any()
            for parameter in block.parameters()
            if parameter.ndim > 1 and block is not tower.blocks()[-1]
        )


def test_looking_leaves_no_graph_behind(encoder, generator):
    images = torch.randn(2, 3, *encoder.preprocessing.size, generator=generator)
    assert not gradient_attention.heatmap(
        encoder.image_tower.trace(images), first_feature, create_graph=False
    ).requires_grad
