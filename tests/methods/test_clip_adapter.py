import pytest
import torch

from evidence_ft.classifier import prompt_classifier
from evidence_ft.methods import clip_adapter
from tests.methods.fitting import NAMES, accuracy, clusters, fit_features


def adapted_logits(features, down, up, ratio, texts, scale):
    """Gao et al. 2021, eqs. 3 to 5, image by image."""
    rows = []
    for feature in features:
        bottleneck = torch.stack([(weights @ feature).clamp(min=0) for weights in down])
        adapted = torch.stack([weights @ bottleneck for weights in up])
        mixed = ratio * adapted + (1 - ratio) * feature
        rows.append([scale * torch.cosine_similarity(mixed, text, dim=0).item() for text in texts])
    return torch.tensor(rows)


@pytest.mark.parametrize("ratio", [0.2, 0.6, 1.0])
def test_logits_are_those_of_the_paper(native_encoder, generator, ratio):
    tuning = clip_adapter.prepare(native_encoder, NAMES, clip_adapter.Config(ratio=ratio))
    features = torch.randn(5, 10, generator=generator)  # of any length: the adapter grows with its input
    texts = native_encoder.encode_text(["a photo of a cat", "a photo of a sea lion", "a photo of a dog"]).detach()
    head = tuning.classifier().head
    expected = adapted_logits(
        features,
        head.down.weight.detach(),
        head.up.weight.detach(),
        ratio,
        texts,
        native_encoder.logit_scale.exp().item(),
    )
    torch.testing.assert_close(head(features).detach(), expected)


def test_the_bottleneck_is_narrower_by_the_reduction(native_encoder):
    head = clip_adapter.prepare(native_encoder, NAMES, clip_adapter.Config(reduction=5)).head
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "down.weight": (2, 10),
        "up.weight": (10, 2),
    }


def test_a_reduction_that_leaves_nothing_is_refused(native_encoder):
    with pytest.raises(ValueError, match="choose at most 10"):
        clip_adapter.prepare(native_encoder, NAMES, clip_adapter.Config(reduction=11))


def test_an_adapter_that_says_nothing_leaves_the_zero_shot_classifier(native_encoder, generator):
    tuning = clip_adapter.prepare(native_encoder, NAMES, clip_adapter.Config(templates="clip_7"))
    features = torch.randn(5, 10, generator=generator)
    expected = prompt_classifier(native_encoder, NAMES, clip_adapter.Config(templates="clip_7").templates)
    with torch.no_grad():
        tuning.head.up.weight.zero_()
    torch.testing.assert_close(tuning.classifier().head(features), expected.head(features))


def test_an_adapter_learns_classes_that_a_plane_can_part(native_encoder):
    tuning = clip_adapter.prepare(native_encoder, NAMES, clip_adapter.Config(ratio=0.8, reduction=1))
    features, labels = clusters()
    labels = min(((labels + shift) % 3 for shift in range(3)), key=lambda shifted: accuracy(tuning, features, shifted))
    assert accuracy(tuning, features, labels) < 0.5  # the naming that the untrained adapter gets wrong
    fit_features(tuning, features, labels, steps=100, learning_rate=0.05)
    assert accuracy(tuning, features, labels) == 1
