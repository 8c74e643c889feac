import pytest
import torch

from evidence_ft.contrastive import contrastive_loss, sigmoid_loss
from tests import by_definition


def test_pair_targets_match_the_definition(generator):
    images, texts = torch.randn(5, 10, generator=generator), torch.randn(5, 10, generator=generator)
    expected = by_definition.contrastive(images, texts, 7.0, torch.eye(5, dtype=torch.bool))
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(7.0)).item(), expected)


def test_several_positives_share_the_target(generator):
    images, texts = torch.randn(5, 10, generator=generator), torch.randn(5, 10, generator=generator)
    labels = torch.tensor([0, 1, 0, 2, 1])
    positives = labels[:, None] == labels[None, :]
    expected = by_definition.contrastive(images, texts, 7.0, positives)
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(7.0), positives).item(), expected)


def test_pair_targets_equal_open_clips_own_loss(generator):
    from open_clip.loss import ClipLoss

    images, texts = torch.randn(5, 10, generator=generator), torch.randn(5, 10, generator=generator)
    normalised = [features / features.norm(dim=1, keepdim=True) for features in (images, texts)]
    expected = ClipLoss()(*normalised, torch.tensor(7.0))
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(7.0)), expected)


def test_with_one_caption_per_class_pair_and_class_targets_are_the_same_loss(generator):
    images = torch.randn(6, 10, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    texts = torch.randn(3, 10, generator=generator)[labels].requires_grad_()
    positives = labels[:, None] == labels[None, :]
    pair = contrastive_loss(images, texts, torch.tensor(5.0))
    by_class = contrastive_loss(images, texts, torch.tensor(5.0), positives)
    torch.testing.assert_close(pair, by_class)
    of_pair = torch.autograd.grad(pair, images)[0]
    torch.testing.assert_close(of_pair, torch.autograd.grad(by_class, images)[0])


def test_half_precision_features_are_compared_in_float32(generator):
    images = torch.randn(5, 10, generator=generator).bfloat16()
    loss = contrastive_loss(images, images, torch.tensor(100.0, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("several", [False, True])
def test_the_sigmoid_loss_matches_its_definition(generator, several, shape):
    images, texts = torch.randn(5, 10, generator=generator), torch.randn(5, 10, generator=generator)
    labels = torch.tensor([0, 1, 0, 2, 1]) if several else torch.arange(5)
    positives = labels[:, None] == labels[None, :]
    expected = by_definition.sigmoid(images, texts, 7.0, -3.0, positives)
    found = sigmoid_loss(images, texts, torch.full(shape, 7.0), torch.full(shape, -3.0), positives if several else None)
    assert found.shape == ()
    torch.testing.assert_close(found.item(), expected)


def test_the_sigmoid_loss_of_pairs_equals_open_clips_own(generator):
    from open_clip.loss import SigLipLoss

    images, texts = torch.randn(5, 10, generator=generator), torch.randn(5, 10, generator=generator)
    normalised = [features / features.norm(dim=1, keepdim=True) for features in (images, texts)]
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    torch.testing.assert_close(sigmoid_loss(images, texts, scale, bias), SigLipLoss()(*normalised, scale, bias))


def test_the_sigmoid_loss_is_of_each_pair_alone(generator):
    """Without a softmax, adding a caption that fits no image leaves the terms of the others as they were."""
    images, texts = torch.randn(3, 10, generator=generator), torch.randn(3, 10, generator=generator)
    scale, bias = torch.tensor(5.0), torch.tensor(-1.0)
    separate = [
        sigmoid_loss(images[[i]], texts[[j]], scale, bias, torch.tensor([[i == j]])) for i in range(3) for j in range(3)
    ]
    torch.testing.assert_close(sigmoid_loss(images, texts, scale, bias), sum(separate) / 3)


def test_the_sigmoid_loss_of_half_precision_features_is_in_float32(generator):
    images = torch.randn(5, 10, generator=generator).bfloat16()
    scale, bias = torch.tensor(100.0, dtype=torch.bfloat16), torch.tensor(-10.0, dtype=torch.bfloat16)
    assert sigmoid_loss(images, images, scale, bias).dtype == torch.float32
