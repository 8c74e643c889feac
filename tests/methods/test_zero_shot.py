import pytest
import torch

from evidence_ft.methods import zero_shot
from tests.methods.fitting import LABELS, NAMES


def test_zero_shot_is_the_prompts_alone(native_encoder, generator):
    tuning = zero_shot.prepare(native_encoder, NAMES, zero_shot.Config())
    features = torch.randn(6, 10, generator=generator)
    texts = native_encoder.encode_text(["a photo of a cat", "a photo of a sea lion", "a photo of a dog"])
    expected = native_encoder.logit_scale.exp() * torch.cosine_similarity(features[:, None], texts[None], dim=-1)
    classifier = tuning.classifier()
    torch.testing.assert_close(classifier.head(features), expected)
    torch.testing.assert_close(classifier.score_of(LABELS)(features), expected.gather(1, LABELS[:, None])[:, 0])


def test_zero_shot_trains_nothing(native_encoder, generator):
    tuning = zero_shot.prepare(native_encoder, NAMES, zero_shot.Config())
    assert not tuning.trains
    with pytest.raises(RuntimeError, match="nothing to train"):
        tuning.objective(torch.randn(6, 10, generator=generator), LABELS)
