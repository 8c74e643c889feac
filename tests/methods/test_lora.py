import pytest
import torch
from pydantic import ValidationError

from evidence_ft.adaptation import LoraConfig
from evidence_ft.methods import lora
from tests.conftest import build_encoder
from tests.methods.fitting import NAMES, fit, random_batch, trained


@pytest.mark.parametrize("setting", [{"text": "lora"}, {"text": "full"}, {"train_logit_scale": True}])
def test_what_takes_no_part_in_ft_cannot_be_trained_there(setting):
    with pytest.raises(ValidationError, match="choose objective 'flcp'"):
        lora.Config(objective="ft", **setting)
    lora.Config(objective="flcp", **setting)


def test_ft_may_say_that_the_text_tower_is_frozen():
    assert lora.Config(objective="ft", text="frozen", train_logit_scale=False).text == "frozen"


@pytest.mark.parametrize("kind", ["native", "timm"])
@pytest.mark.parametrize("objective", ["flcp", "ft"])
def test_adapters_learn_a_batch(kind, objective):
    encoder = build_encoder(kind)
    tuning = lora.prepare(encoder, NAMES, lora.Config(objective=objective))
    history = fit(tuning, random_batch(encoder), steps=10, learning_rate=1e-2)
    assert history[-1] < history[0]


def test_the_rank_is_that_of_the_settings(native_encoder):
    tuning = lora.prepare(native_encoder, NAMES, lora.Config(lora=LoraConfig(rank=3)))
    ranks = {min(parameter.shape) for name, parameter in trained(tuning).items() if "lora_" in name}
    assert ranks == {3}


def test_a_tower_can_be_left_out(native_encoder):
    tuning = lora.prepare(native_encoder, NAMES, lora.Config(vision="frozen", train_logit_scale=False))
    assert not any(parameter.requires_grad for parameter in native_encoder.image_tower.parameters())
    assert trained(tuning)
    assert not native_encoder.logit_scale.requires_grad


def test_the_classifier_reads_the_adapted_text_tower(native_encoder, generator):
    features = torch.randn(6, 10, generator=generator)
    tuning = lora.prepare(native_encoder, NAMES, lora.Config(vision="frozen"))
    before = tuning.classifier().head(features)
    fit(tuning, random_batch(native_encoder), steps=3, learning_rate=1e-2)
    assert not torch.allclose(tuning.classifier().head(features), before)


def test_adapters_in_no_tower_are_refused():
    with pytest.raises(ValueError, match="no tower has an adapter"):
        lora.Config(vision="frozen", text="frozen")


def test_the_loss_of_flcp_is_that_of_the_settings(native_encoder, generator):
    native_encoder.model.logit_bias = torch.nn.Parameter(torch.tensor(-3.0))
    tuning = lora.prepare(native_encoder, NAMES, lora.Config(loss="softmax"))
    assert not native_encoder.logit_bias.requires_grad
    features = torch.randn(6, 10, generator=generator)
    softmax, _ = tuning.objective(features, torch.tensor([0, 1, 2, 0, 1, 2]))
    sigmoid, _ = lora.prepare(native_encoder, NAMES, lora.Config()).objective(features, torch.tensor([0, 1, 2] * 2))
    assert native_encoder.logit_bias.requires_grad
    assert softmax != sigmoid
