import hashlib
import math

import pytest
import torch

from tests.conftest import build_encoder


class TestConstrain:
    def test_a_trained_logit_scale_is_brought_back_to_100(self, native_encoder):
        with torch.no_grad():
            native_encoder.logit_scale.fill_(10.0)
        native_encoder.constrain()
        assert native_encoder.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)

    def test_a_smaller_one_is_left_alone(self, native_encoder):
        before = native_encoder.logit_scale.clone()
        native_encoder.constrain()
        assert torch.equal(native_encoder.logit_scale, before)
        assert before < math.log(100)

    def test_a_frozen_one_is_left_alone(self, native_encoder):
        with torch.no_grad():
            native_encoder.logit_scale.fill_(10.0)
        native_encoder.logit_scale.requires_grad_(False)
        native_encoder.constrain()
        assert native_encoder.logit_scale == 10


class TestTowerParameters:
    def test_the_towers_and_the_logit_scale_are_all_there_is(self, encoder):
        vision, text = encoder.tower_parameters("vision"), encoder.tower_parameters("text")
        together = [id(parameter) for parameter in (*vision, *text, encoder.logit_scale)]
        assert len(set(together)) == len(together)
        assert set(together) == {id(parameter) for parameter in encoder.parameters()}

    def test_features_depend_on_their_own_tower_alone(self, encoder):
        images = torch.randn(1, 3, *encoder.preprocessing.size, generator=torch.Generator().manual_seed(0))
        for tower, features in (("vision", encoder.image_tower(images)), ("text", encoder.encode_text(["a cat"]))):
            encoder.zero_grad()
            features.sum().backward()
            reached = {id(parameter) for parameter in encoder.parameters() if parameter.grad is not None}
            assert reached == {id(parameter) for parameter in encoder.tower_parameters(tower)}


class TestFingerprint:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_it_reads_every_precision(self, native_encoder, dtype):
        assert native_encoder.to(dtype).fingerprint() == build_encoder("native").to(dtype).fingerprint()

    def test_it_sees_the_smallest_change_of_a_weight(self, native_encoder):
        bias = native_encoder.model.visual.ln_post.bias
        before = native_encoder.fingerprint()
        with torch.no_grad():
            bias[-1] = torch.nextafter(bias[-1], torch.tensor(1.0))
        assert native_encoder.fingerprint() != before

    def test_it_is_the_sha256_of_names_and_values(self, native_encoder):
        digest = hashlib.sha256()
        for name, value in sorted(native_encoder.model.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        assert native_encoder.fingerprint() == digest.hexdigest()
