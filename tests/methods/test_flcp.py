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
