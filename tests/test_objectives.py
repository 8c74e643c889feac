import math

import pytest
import torch

from evidence_ft.classifier import LinearHead
from evidence_ft.objectives import contrastive, cross_entropy
from tests import by_definition

NAMES = ["cat", "sea_lion", "dog"]
ONE = ["a photo of a {}"]
THREE = ["a photo of a {}", "the {}", "an image of {}"]


def features_and_labels(generator):
    return torch.randn(5, 10, generator=generator, requires_grad=True), torch.tensor([0, 1, 0, 2, 1])


def captions_of(encoder, labels):
    texts = ["a photo of a cat", "a photo of a sea lion", "a photo of a dog"]
    return encoder.encode_text([texts[label] for label in labels.tolist()])


class Recorder:
    """Stands in for a text tower's method and keeps what it was asked for."""

    def __init__(self, encode):
        self.encode = encode
        self.texts = []

    def __call__(self, texts):
        self.texts.append(list(texts))
        return self.encode(texts)


@pytest.fixture
def recorder(native_encoder, monkeypatch):
    recorder = Recorder(native_encoder.encode_text)
    monkeypatch.setattr(native_encoder, "encode_text", recorder)
    return recorder


@pytest.mark.parametrize("targets", ["pair", "class"])
def test_the_contrastive_loss_is_that_with_each_images_caption(native_encoder, generator, targets):
    features, labels = features_and_labels(generator)
    loss, _ = contrastive(native_encoder, NAMES, ONE, targets)(features, labels)
    positives = torch.eye(5, dtype=torch.bool) if targets == "pair" else labels[:, None] == labels[None, :]
    scale = native_encoder.logit_scale.exp().item()
    expected = by_definition.contrastive(
        features.detach(), captions_of(native_encoder, labels).detach(), scale, positives
    )
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)


def test_the_contrastive_score_is_the_scaled_cosine_with_the_own_caption(native_encoder, generator):
    features, labels = features_and_labels(generator)
    _, score = contrastive(native_encoder, NAMES, ONE, "class")(features, labels)
    expected = native_encoder.logit_scale.exp() * torch.cosine_similarity(features, captions_of(native_encoder, labels))
    torch.testing.assert_close(score(features), expected)


def test_each_caption_of_a_batch_is_encoded_once(native_encoder, generator, recorder):
    contrastive(native_encoder, NAMES, ONE, "class")(*features_and_labels(generator))
    assert recorder.texts == [["a photo of a cat", "a photo of a sea lion", "a photo of a dog"]]


def test_of_several_templates_each_image_draws_one(native_encoder, generator, recorder):
    objective = contrastive(native_encoder, NAMES, THREE, "pair")
    features, labels = torch.randn(60, 10, generator=generator), torch.arange(60) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss, score = objective(features, labels)
    (drawn,) = recorder.texts
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) == {
        template.format(name) for template in THREE for name in ("cat", "sea lion", "dog")
    }  # with 20 images of a class, a template that nobody drew has a chance of 0.0003
    texts = {text: native_encoder.encode_text([text])[0].detach() for text in drawn}
    fits = []
    scale = native_encoder.logit_scale.exp()
    for row, label in enumerate(labels.tolist()):
        of_class = [text for text in drawn if text.endswith(NAMES[label].replace("_", " "))]
        scores = [scale * torch.cosine_similarity(features[row], texts[text], dim=0) for text in of_class]
        errors = [abs(score(features)[row] - each).item() for each in scores]
        assert min(errors) < 1e-5
        fits.append(texts[of_class[errors.index(min(errors))]])
    expected = by_definition.contrastive(features, torch.stack(fits), scale.item(), torch.eye(60, dtype=torch.bool))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)


def test_captions_are_drawn_by_torchs_seed(native_encoder, generator):
    objective = contrastive(native_encoder, NAMES, THREE, "class")
    features, labels = features_and_labels(generator)
    losses = []
    for seed in (3, 3, 4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            losses.append(objective(features, labels)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_a_single_template_draws_nothing(native_encoder, generator):
    state = torch.get_rng_state()
    contrastive(native_encoder, NAMES, ONE, "class")(*features_and_labels(generator))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_contrastive_loss_reaches_images_texts_and_scale(native_encoder, generator):
    features, labels = features_and_labels(generator)
    loss, _ = contrastive(native_encoder, NAMES, ONE, "class")(features, labels)
    loss.backward()
    assert features.grad.any()
    assert native_encoder.model.text_projection.grad.any()
    assert native_encoder.logit_scale.grad != 0


def test_the_contrastive_loss_is_computed_in_float32_under_autocast(native_encoder, generator):
    objective = contrastive(native_encoder, NAMES, ONE, "class")
    features, labels = features_and_labels(generator)
    texts = native_encoder.encode_text(["a photo of a cat", "a photo of a sea lion", "a photo of a dog"])
    native_encoder.encode_text = lambda _texts: texts
    expected, _ = objective(features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = objective(features, labels)
    assert torch.equal(found, expected)


def test_cross_entropy_is_the_mean_surprise_at_the_labels(generator):
    weight = torch.randn(3, 10, generator=generator) * 5
    features, labels = features_and_labels(generator)
    loss, score = cross_entropy(LinearHead(weight, torch.tensor([0.5, -1.0, 2.0])))(features, labels)
    total = 0.0
    own = []
    for row, label in zip(features.tolist(), labels.tolist(), strict=True):
        length = math.sqrt(sum(value * value for value in row))
        logits = [
            sum(w * value / length for w, value in zip(of_class, row, strict=True)) + bias
            for of_class, bias in zip(weight.tolist(), [0.5, -1.0, 2.0], strict=True)
        ]
        own.append(logits[label])
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    torch.testing.assert_close(loss.item(), total / 5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score(features), torch.tensor(own))


def test_the_gradient_of_a_score_reaches_the_head(generator):
    head = LinearHead(torch.randn(3, 10, generator=generator), torch.zeros(3))
    features, labels = features_and_labels(generator)
    _, score = cross_entropy(head)(features, labels)
    (direction,) = torch.autograd.grad(score(features).sum(), features, create_graph=True)
    (gradient,) = torch.autograd.grad(direction.square().sum(), head.weight)
    assert gradient.any(dim=1).all()
