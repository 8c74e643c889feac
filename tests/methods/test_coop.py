import pytest
import torch
from pydantic import ValidationError

from evidence_ft.backbones import open_clip
from evidence_ft.classifier import prompt_classifier
from evidence_ft.methods import coop
from tests.methods.fitting import LABELS, NAMES, accuracy, clusters, fit_features


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("template", ["a photo of a {}", "an image of the {}, a pet."])
def test_from_text_it_starts_as_the_prompts_classifier(native_encoder, generator, class_specific, template):
    config = coop.Config(templates=template, class_specific=class_specific)
    tuning = coop.prepare(native_encoder, NAMES, config)
    features = torch.randn(6, 10, generator=generator)
    expected = prompt_classifier(native_encoder, NAMES, template).head(features)
    torch.testing.assert_close(tuning.classifier().head(features), expected)


def test_from_text_it_starts_as_the_prompts_classifier_of_the_embedded_model(generator):
    encoder = open_clip.load("toy_clip")
    tuning = coop.prepare(encoder, ["circle", "square"], coop.Config())
    expected = prompt_classifier(encoder, ["circle", "square"], "a photo of a {}").head
    features = torch.randn(6, expected.weight.shape[1], generator=generator)
    torch.testing.assert_close(tuning.classifier().head(features), expected(features))


def test_a_random_context_is_as_long_as_told_and_as_small_as_published(native_encoder):
    torch.manual_seed(0)
    shared = coop.prepare(native_encoder, NAMES, coop.Config(init="random", context_length=4)).head.vectors
    own = coop.prepare(native_encoder, NAMES, coop.Config(init="random", context_length=4, class_specific=True))
    assert shared.shape == (4, 16)
    assert own.head.vectors.shape == (3, 4, 16)
    assert own.head.vectors.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(own.head.vectors[0], own.head.vectors[1])


def test_the_loss_is_the_cross_entropy_of_the_classifiers_logits(native_encoder, generator):
    tuning = coop.prepare(native_encoder, NAMES, coop.Config())
    with torch.no_grad():
        tuning.head.vectors.add_(torch.randn(tuning.head.vectors.shape, generator=generator))
    features = torch.randn(6, 10, generator=generator)
    loss, score = tuning.objective(features, LABELS)
    logits = tuning.classifier().head(features)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, LABELS))
    torch.testing.assert_close(score(features), logits.gather(1, LABELS[:, None])[:, 0])


def test_a_context_of_its_own_changes_only_its_class(native_encoder, generator):
    tuning = coop.prepare(native_encoder, NAMES, coop.Config(class_specific=True))
    assert tuning.head.vectors.shape == (3, 4, 16)
    features = torch.randn(6, 10, generator=generator)
    before = tuning.classifier().head(features)
    with torch.no_grad():
        tuning.head.vectors[1].add_(torch.randn(4, 16, generator=generator))
    after = tuning.classifier().head(features)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]])
    assert ((after[:, 1] - before[:, 1]).abs() > 0.1).all()


def test_what_stands_after_the_name_stays(native_encoder):
    heads = []
    for template in ("a photo of a {}", "a photo of a {} on grass"):
        config = coop.Config(templates=template, init="random", context_length=2)
        torch.manual_seed(0)
        heads.append(coop.prepare(native_encoder, NAMES, config).classifier().head.weight)
    assert not torch.allclose(*heads)


def test_contexts_of_their_own_learn_classes_that_a_plane_can_part(native_encoder):
    tuning = coop.prepare(native_encoder, NAMES, coop.Config(class_specific=True))
    features, labels = clusters()
    assert accuracy(tuning, features, labels) < 0.9
    fit_features(tuning, features, labels, steps=100, learning_rate=0.1)
    assert accuracy(tuning, features, labels) == 1


def test_a_context_that_does_not_fit_is_refused_before_training(native_encoder):
    with pytest.raises(ValueError, match="12"):
        coop.prepare(native_encoder, NAMES, coop.Config(init="random", context_length=12))


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"templates": ["a {}", "the {}"]}, "give one template"),
        ({"templates": "{} in the wild"}, "no words before {}"),
        ({"context_length": 4}, "context_length is 4, but a context from text is as long as its text"),
    ],
)
def test_a_start_that_is_none_is_refused(setting, complaint):
    with pytest.raises(ValidationError, match=complaint):
        coop.Config(**setting)


def test_a_random_context_needs_no_words_before_the_name():
    assert coop.Config(templates="{}.", init="random").templates == ("{}.",)
