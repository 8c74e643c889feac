import torch

from evidence_ft.contrastive import contrastive_loss
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
