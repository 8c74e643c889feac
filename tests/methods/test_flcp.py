import pytest
import torch

from evidence_ft.methods import flcp, zero_shot
from tests import by_definition

NAMES = ["cat", "sea_lion", "dog"]


def features_and_labels(generator):
    return torch.randn(5, 10, generator=generator, requires_grad=True), torch.tensor([0, 1, 0, 2, 1])


def captions_of(encoder, labels):
    texts = ["a photo of a cat", "a photo of a sea lion", "a photo of a dog"]
    return encoder.encode_text([texts[label] for label in labels.tolist()])


@pytest.mark.parametrize("targets", ["pair", "class"])
def test_the_loss_is_the_contrastive_loss_with_each_images_caption(native_encoder, generator, targets):
    tuning = flcp.prepare(native_encoder, NAMES, flcp.Config(targets=targets))
    features, labels = features_and_labels(generator)
    loss, _ = tuning.objective(features, labels)
    positives = torch.eye(5, dtype=torch.bool) if targets == "pair" else labels[:, None] == labels[None, :]
    scale = native_encoder.logit_scale.exp().item()
    expected = by_definition.contrastive(
        features.detach(), captions_of(native_encoder, labels).detach(), scale, positives
    )
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)


def test_the_score_is_the_scaled_cosine_with_the_own_caption(native_encoder, generator):
    tuning = flcp.prepare(native_encoder, NAMES, flcp.Config())
    features, labels = features_and_labels(generator)
    _, score = tuning.objective(features, labels)
    texts = captions_of(native_encoder, labels)
    expected = native_encoder.logit_scale.exp() * torch.cosine_similarity(features, texts)
    torch.testing.assert_close(score(features), expected)


def test_every_parameter_receives_a_gradient(native_encoder, generator):
    tuning = flcp.prepare(native_encoder, NAMES, flcp.Config())
    images = torch.randn(5, 3, 32, 48, generator=generator)
    loss, _ = tuning.objective(native_encoder.image_tower(images), torch.tensor([0, 1, 0, 2, 1]))
    loss.backward()
    without = [name for name, parameter in native_encoder.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_fixed_logit_scale_is_not_trained(native_encoder):
    flcp.prepare(native_encoder, NAMES, flcp.Config(train_logit_scale=False))
    assert [name for name, p in native_encoder.named_parameters() if not p.requires_grad] == ["model.logit_scale"]


def test_the_logit_scale_stays_at_most_100(native_encoder, generator):
    tuning = flcp.prepare(native_encoder, NAMES, flcp.Config())
    with torch.no_grad():
        native_encoder.logit_scale.fill_(10.0)
    tuning.objective(*features_and_labels(generator))
    torch.testing.assert_close(native_encoder.logit_scale.exp().item(), 100.0, rtol=1e-5, atol=0)


def test_the_classifier_reads_the_prompts_anew(native_encoder, generator):
    tuning = flcp.prepare(native_encoder, NAMES, flcp.Config())
    features, _ = features_and_labels(generator)
    before = tuning.classifier().head(features)
    with torch.no_grad():
        native_encoder.model.text_projection.mul_(-1)
    torch.testing.assert_close(tuning.classifier().head(features), -before)


def test_zero_shot_is_the_prompts_alone(native_encoder, generator):
    tuning = zero_shot.prepare(native_encoder, NAMES, zero_shot.Config())
    features, labels = features_and_labels(generator)
    texts = captions_of(native_encoder, torch.arange(3))
    expected = native_encoder.logit_scale.exp() * torch.cosine_similarity(features[:, None], texts[None], dim=-1)
    classifier = tuning.classifier()
    torch.testing.assert_close(classifier.head(features), expected)
    torch.testing.assert_close(classifier.score_of(labels)(features), expected.gather(1, labels[:, None])[:, 0])
    assert not tuning.trains
    with pytest.raises(RuntimeError, match="nothing to train"):
        tuning.objective(features, labels)
