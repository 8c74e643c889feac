import math

import pytest
import torch

from evidence_ft.classifier import prompt_classifier
from evidence_ft.methods import tip_adapter
from tests.methods.fitting import NAMES, accuracy, clusters, fit_features


def logits_by_definition(feature, keys, labels, prompted, alpha, beta):
    """Zhang et al. 2022, eqs. 3 to 5: one image, key by key."""
    logits = list(prompted)
    for key, label in zip(keys, labels, strict=True):
        cosine = sum(a * b for a, b in zip(feature, key, strict=True))
        logits[label] += alpha * math.exp(-beta * (1 - cosine))
    return logits


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def test_logits_are_those_of_the_paper(native_encoder, generator):
    config = tip_adapter.Config(alpha=1.5, beta=3.0, shots=None)
    tuning = tip_adapter.prepare(native_encoder, NAMES, config)
    memory, labels = torch.randn(7, 10, generator=generator), [0, 2, 1, 1, 0, 2, 2]
    tuning.read_training_set(memory, torch.tensor(labels))
    features = torch.randn(4, 10, generator=generator)
    prompted = prompt_classifier(native_encoder, NAMES, "a photo of a {}").head(features)
    expected = [
        logits_by_definition(feature, unit(memory).tolist(), labels, prompts, 1.5, 3.0)
        for feature, prompts in zip(unit(features).tolist(), prompted.tolist(), strict=True)
    ]
    torch.testing.assert_close(tuning.classifier().head(features), torch.tensor(expected))


def test_at_alpha_zero_it_is_the_zero_shot_classifier(native_encoder, generator):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config(alpha=0))
    tuning.read_training_set(*clusters())
    features = torch.randn(4, 10, generator=generator)
    expected = prompt_classifier(native_encoder, NAMES, "a photo of a {}").head(features)
    assert torch.equal(tuning.classifier().head(features), expected)


def test_the_first_shots_of_each_class_are_remembered(native_encoder):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config(shots=2))
    features = torch.eye(10)[:8] * 5
    tuning.read_training_set(features, torch.tensor([1, 1, 0, 2, 1, 0, 0, 2]))
    remembered = {
        (key.argmax().item(), label) for key, label in zip(tuning.head.keys, tuning.head.labels.tolist(), strict=True)
    }
    assert remembered == {(0, 1), (1, 1), (2, 0), (3, 2), (5, 0), (7, 2)}
    torch.testing.assert_close(tuning.head.keys.norm(dim=1).detach(), torch.ones(6))


@pytest.mark.parametrize(("shots", "remembered"), [(None, 60), (16, 48), (100, 60)])
def test_all_are_remembered_where_no_number_is_given_or_there_are_fewer(native_encoder, shots, remembered):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config(shots=shots))
    tuning.read_training_set(*clusters())
    assert tuning.head.keys.shape == (remembered, 10)


def test_a_class_without_images_is_left_to_its_prompts(native_encoder, generator):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config())
    features = torch.randn(4, 10, generator=generator)
    before = tuning.classifier().head(features)
    tuning.read_training_set(torch.randn(5, 10, generator=generator), torch.tensor([0, 2, 2, 0, 0]))
    after = tuning.classifier().head(features)
    assert torch.equal(after[:, 1], before[:, 1])
    assert (after[:, [0, 2]] > before[:, [0, 2]]).all()


def test_memory_tells_classes_apart_without_training(native_encoder):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config(alpha=100))
    assert not tuning.trains
    tuning.read_training_set(*clusters())
    others, labels = clusters()
    generator = torch.Generator().manual_seed(9)
    assert accuracy(tuning, others + 0.1 * torch.randn(60, 10, generator=generator), labels) == 1


def test_training_the_keys_learns_what_memory_alone_cannot(native_encoder):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config(alpha=5, shots=1, fine_tune=True))
    features, labels = clusters()
    tuning.read_training_set(features.roll(1, dims=0), labels)  # keys of the wrong class
    assert accuracy(tuning, features, labels) < 0.9
    fit_features(tuning, features, labels, steps=200, learning_rate=0.1)
    assert accuracy(tuning, features, labels) == 1


def test_an_optimizer_that_was_built_first_trains_the_keys_all_the_same(native_encoder):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config(fine_tune=True))
    held = tuning.head.keys
    tuning.read_training_set(*clusters())
    assert tuning.head.keys is held
    assert held.shape == (48, 10)
    assert held.requires_grad


def test_reading_again_replaces_what_was_remembered(native_encoder):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config())
    for features in (torch.eye(10)[:3], torch.eye(10)[4:6]):
        tuning.read_training_set(features, torch.arange(len(features)))
    assert torch.equal(tuning.head.keys, torch.eye(10)[4:6])
    assert tuning.head.labels.tolist() == [0, 1]


def test_a_memory_of_other_features_is_refused(native_encoder):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config())
    state = tuning.head.state_dict() | {"keys": torch.zeros(4, 11), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=r"size mismatch for keys.*\[4, 11\]"):
        tuning.head.load_state_dict(state)


def test_a_state_without_memory_is_refused(native_encoder):
    tuning = tip_adapter.prepare(native_encoder, NAMES, tip_adapter.Config())
    state = {name: tensor for name, tensor in tuning.head.state_dict().items() if name not in ("keys", "labels")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*keys"):
        tuning.head.load_state_dict(state)
