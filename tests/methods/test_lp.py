import torch

from evidence_ft.methods import lp
from tests.methods.fitting import LABELS, NAMES, accuracy, clusters, fit_features


def test_a_probe_learns_classes_that_a_plane_can_part(native_encoder):
    tuning = lp.prepare(native_encoder, NAMES, lp.Config())
    features, labels = clusters()
    assert accuracy(tuning, features, labels) < 0.9
    fit_features(tuning, features, labels, steps=100, learning_rate=0.1)
    assert accuracy(tuning, features, labels) == 1


def test_a_random_start_says_nothing_of_the_prompts(native_encoder, generator):
    features = torch.randn(6, 10, generator=generator)
    logits = []
    for template in ("a photo of a {}", "the {}"):
        torch.manual_seed(0)
        logits.append(lp.prepare(native_encoder, NAMES, lp.Config(templates=template, head="random")).classifier())
    assert torch.equal(logits[0].head(features), logits[1].head(features))


def test_the_loss_is_the_cross_entropy_of_the_classifiers_logits(native_encoder, generator):
    tuning = lp.prepare(native_encoder, NAMES, lp.Config())
    features = torch.randn(6, 10, generator=generator)
    loss, score = tuning.objective(features, LABELS)
    logits = tuning.classifier().head(features)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, LABELS))
    torch.testing.assert_close(score(features), logits.gather(1, LABELS[:, None])[:, 0])
