import pytest
import torch
from torch import nn

from evidence_ft.classifier import (
    Classifier,
    FineTuning,
    LinearHead,
    PromptHead,
    cosine_logits,
    linear_head,
    prompt_classifier,
)

NAMES = ["cat", "sea_lion", "dog"]


@pytest.fixture
def features(generator):
    return torch.randn(5, 10, generator=generator)


def zero_shot_logits(encoder, features, templates):
    """Radford et al. 2021, section 3.1.4, class by class."""
    columns = []
    for name in ["cat", "sea lion", "dog"]:
        texts = [encoder.encode_text([template.format(name)])[0] for template in templates]
        centre = torch.stack([text / text.norm() for text in texts]).mean(dim=0)
        columns.append(encoder.logit_scale.exp() * torch.cosine_similarity(features, centre[None]))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("templates", [["a photo of a {}"], ["a photo of a {}", "the {}", "{}!"]])
def test_the_prompt_classifier_is_the_scaled_cosine_with_the_mean_text(native_encoder, features, templates):
    classifier = prompt_classifier(native_encoder, NAMES, templates)
    torch.testing.assert_close(classifier.head(features), zero_shot_logits(native_encoder, features, templates))
    assert classifier.class_names == NAMES
    assert classifier.tower is native_encoder.image_tower


def test_a_linear_head_starts_as_the_zero_shot_classifier(native_encoder, features):
    templates = ["a photo of a {}", "the {}"]
    head = linear_head(native_encoder, NAMES, templates, "zero_shot")
    torch.testing.assert_close(head(features), zero_shot_logits(native_encoder, features, templates))
    assert head.bias.tolist() == [0, 0, 0]


def test_a_random_linear_head_starts_as_torchs_own_layer(native_encoder, features):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        head = linear_head(native_encoder, NAMES, "a {}", "random")
        torch.manual_seed(4)
        layer = nn.Linear(10, 3)
    torch.testing.assert_close(head(features), layer(features / features.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize("init", ["zero_shot", "random"])
def test_weight_and_bias_of_a_linear_head_are_trained(native_encoder, init):
    head = linear_head(native_encoder, NAMES, "a {}", init)
    assert {name: tuple(p.shape) for name, p in head.named_parameters() if p.requires_grad} == {
        "weight": (3, 10),
        "bias": (3,),
    }


def test_a_linear_head_does_not_see_the_length_of_features(features):
    head = LinearHead(torch.eye(10), torch.arange(10.0))
    torch.testing.assert_close(head(features * 7), head(features))


def test_logits_are_computed_in_float32_under_autocast(features):
    weight = 100 * torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    heads = [PromptHead(weight / 100, torch.tensor(100.0)), LinearHead(weight, torch.zeros(3))]
    for head in heads:
        expected = head(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = head(features)
        assert torch.equal(found, expected)


def test_half_precision_features_give_float32_logits_and_double_ones_double(features):
    weight = torch.eye(10)
    assert cosine_logits(features.bfloat16(), weight).dtype == torch.float32
    assert cosine_logits(features.double(), weight.double()).dtype == torch.float64


def test_a_prompt_head_keeps_no_graph(native_encoder):
    head = prompt_classifier(native_encoder, NAMES, "a {}").head
    assert not head.weight.requires_grad
    assert list(head.parameters()) == []


def test_the_score_is_the_logit_of_each_images_label(native_encoder, features):
    classifier = prompt_classifier(native_encoder, NAMES, "a {}")
    logits = classifier.head(features)
    score = classifier.score_of(torch.tensor([2, 0, 1, 1, 0]))(features)
    expected = [logits[row, label] for row, label in enumerate([2, 0, 1, 1, 0])]
    torch.testing.assert_close(score, torch.stack(expected))


@pytest.mark.parametrize("part", ["encoder", "head"])
def test_a_method_trains_where_encoder_or_head_require_gradients(native_encoder, part):
    native_encoder.requires_grad_(False)
    head = nn.Linear(10, 3).requires_grad_(False)

    def classifier() -> Classifier:
        raise NotImplementedError

    tuning = FineTuning(native_encoder, lambda *_: NotImplemented, classifier, head=head)
    assert not tuning.trains
    trained = native_encoder.logit_scale if part == "encoder" else head.bias
    trained.requires_grad_(True)
    assert tuning.trains
