import pytest
import torch

from evidence_ft.methods import flcp
from tests import by_definition
from tests.methods.fitting import LABELS, NAMES

CAPTIONS = ["a photo of a cat", "a photo of a sea lion", "a photo of a dog"]


@pytest.mark.parametrize("targets", ["pair", "class"])
def test_the_loss_is_the_contrastive_loss_with_each_images_caption(native_encoder, generator, targets):
    tuning = flcp.prepare(native_encoder, NAMES, flcp.Config(targets=targets))
    features = torch.randn(6, 10, generator=generator)
    loss, _ = tuning.objective(features, LABELS)
    positives = torch.eye(6, dtype=torch.bool) if targets == "pair" else LABELS[:, None] == LABELS[None, :]
    texts = native_encoder.encode_text(CAPTIONS)[LABELS].detach()
    expected = by_definition.contrastive(features, texts, native_encoder.logit_scale.exp().item(), positives)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)


def test_a_fixed_logit_scale_is_not_trained(native_encoder):
    flcp.prepare(native_encoder, NAMES, flcp.Config(train_logit_scale=False))
    assert not native_encoder.logit_scale.requires_grad
    assert all(p.requires_grad for p in native_encoder.parameters() if p is not native_encoder.logit_scale)


def test_the_classifier_reads_the_prompts_anew(native_encoder, generator):
    tuning = flcp.prepare(native_encoder, NAMES, flcp.Config(templates="clip_7"))
    features = torch.randn(6, 10, generator=generator)
    before = tuning.classifier().head(features)
    with torch.no_grad():
        native_encoder.model.text_projection.mul_(-1)
    torch.testing.assert_close(tuning.classifier().head(features), -before)


@pytest.fixture
def with_bias(native_encoder):
    native_encoder.model.logit_bias = torch.nn.Parameter(torch.tensor(-3.0))
    return native_encoder


@pytest.mark.parametrize("loss", ["auto", "sigmoid"])
@pytest.mark.parametrize("targets", ["pair", "class"])
def test_with_a_logit_bias_the_loss_is_the_sigmoid_of_each_pair(with_bias, generator, targets, loss):
    tuning = flcp.prepare(with_bias, NAMES, flcp.Config(targets=targets, loss=loss))
    features = torch.randn(6, 10, generator=generator)
    found, _ = tuning.objective(features, LABELS)
    positives = torch.eye(6, dtype=torch.bool) if targets == "pair" else LABELS[:, None] == LABELS[None, :]
    texts = with_bias.encode_text(CAPTIONS)[LABELS].detach()
    expected = by_definition.sigmoid(features, texts, with_bias.logit_scale.exp().item(), -3.0, positives)
    torch.testing.assert_close(found.item(), expected, rtol=1e-5, atol=1e-6)
    found.backward()
    assert with_bias.logit_bias.grad != 0
    assert with_bias.logit_scale.grad != 0


def test_the_softmax_can_be_asked_for_and_leaves_the_bias_alone(with_bias, generator):
    tuning = flcp.prepare(with_bias, NAMES, flcp.Config(loss="softmax"))
    features = torch.randn(6, 10, generator=generator)
    texts = with_bias.encode_text(CAPTIONS)[LABELS].detach()
    positives = LABELS[:, None] == LABELS[None, :]
    expected = by_definition.contrastive(features, texts, with_bias.logit_scale.exp().item(), positives)
    torch.testing.assert_close(tuning.objective(features, LABELS)[0].item(), expected, rtol=1e-5, atol=1e-6)
    assert with_bias.logit_scale.requires_grad
    assert not with_bias.logit_bias.requires_grad


def test_a_fixed_logit_scale_means_a_fixed_bias(with_bias):
    flcp.prepare(with_bias, NAMES, flcp.Config(train_logit_scale=False))
    assert not with_bias.logit_bias.requires_grad


def test_the_sigmoid_loss_without_a_bias_is_refused(native_encoder):
    with pytest.raises(ValueError, match="'sigmoid' needs a logit bias, which 'tiny-native' does not have"):
        flcp.prepare(native_encoder, NAMES, flcp.Config(loss="sigmoid"))


def test_the_score_that_is_explained_has_no_bias(with_bias, generator):
    features = torch.randn(6, 10, generator=generator)
    _, score = flcp.prepare(with_bias, NAMES, flcp.Config()).objective(features, LABELS)
    cosines = torch.cosine_similarity(features, with_bias.encode_text(CAPTIONS)[LABELS])
    torch.testing.assert_close(score(features), with_bias.logit_scale.exp() * cosines)
