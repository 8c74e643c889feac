import pytest
import torch
from pydantic import ValidationError

from evidence_ft.methods import ft
from tests.methods.fitting import NAMES, fit, random_batch


def test_the_classifier_follows_its_own_training(native_encoder):
    tuning = ft.prepare(native_encoder, NAMES, ft.Config())
    batch = random_batch(native_encoder)
    classifier = tuning.classifier()
    fit(tuning, batch, steps=30, learning_rate=3e-3)
    with torch.no_grad():
        logits = classifier.head(classifier.tower(batch.images))
    assert logits.argmax(dim=1).tolist() == batch.labels.tolist()


@pytest.mark.parametrize("setting", [{"text": "full"}, {"train_logit_scale": True}])
def test_what_takes_no_part_cannot_be_set(setting):
    with pytest.raises(ValidationError, match="extra"):
        ft.Config(**setting)
