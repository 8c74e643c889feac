"""What is special to CLIP of transformers; the rest is in test_huggingface.py."""

import json

import pytest
import torch
from transformers import CLIPModel

from evidence_ft.backbones import hf_clip


@pytest.fixture
def folder(tmp_path):
    hf_clip.tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


def with_setting(folder, tower, **settings):
    config = json.loads((folder / "config.json").read_text())
    config[f"{tower}_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return hf_clip.load(str(folder))


def images():
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def test_it_reads_the_cls_token(folder):
    encoder = hf_clip.load(str(folder))
    trace = encoder.image_tower.trace(images())
    assert trace.num_prefix_tokens == 1
    assert trace.pooling[..., 0].eq(1).all()
    assert trace.pooling[..., 1:].eq(0).all()


def test_the_activation_is_the_one_of_the_configuration(folder):
    of_openai = hf_clip.load(str(folder))
    of_others = with_setting(folder, "vision", hidden_act="gelu")
    expected = CLIPModel.from_pretrained(folder).get_image_features(images()).pooler_output
    torch.testing.assert_close(of_others.image_tower(images()), expected)
    assert (of_others.image_tower(images()) - of_openai.image_tower(images())).abs().max() > 1e-4


def test_texts_are_read_from_left_to_right_also_while_a_trace_is_open(folder):
    encoder = hf_clip.load(str(folder))
    with encoder.image_tower.explicit_attention(encoder.image_tower.blocks()[0], lambda _: None):
        first, second = (
            encoder.model.text_model(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state
            for text in ("abcx", "abcyz")
        )
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4], second[:, 4])


def test_the_end_token_of_old_configurations_is_found(folder):
    """Up to transformers 4.30 `eos_token_id` was 2 for all, and the end token the largest of the ids."""
    end = json.loads((folder / "config.json").read_text())["text_config"]["eos_token_id"]
    tokens = torch.tensor([[0, 7, 9, 180, 180], [0, 7, 9, 5, 180]])
    old = with_setting(folder, "text", eos_token_id=2)
    at_the_largest = old.encode_tokens(tokens, torch.ones_like(tokens))
    new = with_setting(folder, "text", eos_token_id=180)
    torch.testing.assert_close(at_the_largest, new.encode_tokens(tokens, torch.ones_like(tokens)))
    assert end != 2
