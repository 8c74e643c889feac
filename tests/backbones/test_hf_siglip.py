"""What is special to SigLIP of transformers; the rest is in test_huggingface.py."""

import json

import pytest
import torch
from transformers import SiglipModel

from evidence_ft.adaptation import Towers, adapt
from evidence_ft.alignments import outside_mass
from evidence_ft.backbones import hf_siglip
from evidence_ft.encoder import CheckpointError
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.tower import UnsupportedTowerError


@pytest.fixture
def folder(tmp_path):
    hf_siglip.tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def encoder(folder):
    return hf_siglip.load(str(folder))


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def rewritten(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_probes_attention_is_that_of_the_pooling_head(encoder):
    head, kept = encoder.model.vision_model.head, []
    hook = head.attention.register_forward_pre_hook(lambda _module, args: kept.append(args))
    encoder.image_tower(images())
    hook.remove()
    _, expected = head.attention(*kept[0], average_attn_weights=False)
    torch.testing.assert_close(encoder.image_tower.trace(images()).pooling, expected)


def test_the_probes_attention_is_on_the_path_to_the_features(encoder):
    trace = encoder.image_tower.trace(images())
    assert trace.pooling.shape == (2, 3, 1, 16)
    assert torch.autograd.grad(trace.features.square().sum(), trace.pooling)[0].any()


def test_the_evidence_reaches_the_pooling_head(encoder):
    trace = encoder.image_tower.trace(images(), [-1])
    heatmaps = gradient_attention.heatmap(trace, lambda features: features.square().sum(1), create_graph=True)
    outside_mass.loss(heatmaps, torch.eye(4).expand_as(heatmaps)).sum().backward()
    head = encoder.model.vision_model.head
    assert head.probe.grad.any()
    assert head.attention.in_proj_weight.grad.any()


def test_the_pooling_head_is_not_adapted(encoder):
    named = [name for names in encoder.projections("vision").values() for name in names]
    assert named
    assert not any("head" in name for name in named)
    assert {type(encoder.model.get_submodule(name)) for name in named} == {torch.nn.Linear}


def test_padding_is_attended_to_as_in_training(encoder, folder):
    model = SiglipModel.from_pretrained(folder)
    ids = encoder.tokenizer("cat", padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 64)
    torch.testing.assert_close(encoder.encode_text(["cat"]), model.get_text_features(ids).pooler_output)
    masked = model.get_text_features(ids, attention_mask=(ids != 1).long()).pooler_output
    assert (encoder.encode_text(["cat"]) - masked).abs().max() > 1e-3


def test_text_features_are_not_normalised(encoder):
    assert (encoder.encode_text(["cat"]).norm(dim=1) - 1).abs() > 0.01


def test_texts_lose_capitals_and_punctuation(encoder):
    assert torch.equal(encoder.encode_text(["A  photo, of a Cat!"]), encoder.encode_text(["a photo of a cat"]))


def test_texts_of_siglip_2_lose_capitals_alone(folder):
    rewritten(folder / "tokenizer_config.json", eos_token="<eos>")
    encoder = hf_siglip.load(str(folder))
    assert encoder.normalize_text("A photo, of a Cat!") == "a photo, of a cat!"


def test_a_tokenizer_that_keeps_capitals_may(folder):
    rewritten(folder / "tokenizer_config.json", do_lower_case=False)
    encoder = hf_siglip.load(str(folder))
    assert encoder.normalize_text("A Cat.") == "A Cat"
    encoder.save(folder.with_name("again"))
    assert hf_siglip.load(str(folder.with_name("again"))).normalize_text("A Cat.") == "A Cat"


def test_a_tokenizer_whose_class_needs_sentencepiece_is_read_from_its_other_file(encoder, folder):
    """As `google/siglip-*` name theirs."""
    rewritten(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        again = hf_siglip.load(str(folder))
        assert torch.equal(again.encode_text(["a cat"]), encoder.encode_text(["a cat"]))
    else:
        pytest.skip("sentencepiece is here")


def test_variable_resolution_is_refused(folder):
    rewritten(folder / "config.json", model_type="siglip2")
    with pytest.raises(CheckpointError, match=r"NaFlex.*google/siglip2-base-patch16-224"):
        hf_siglip.load(str(folder))


def test_a_tower_without_its_head_is_refused(folder):
    model = SiglipModel.from_pretrained(folder)
    model.config.vision_config.vision_use_head = False
    with pytest.raises(UnsupportedTowerError, match="no pooling head"):
        hf_siglip.HfSiglipImageTower(model)


def test_the_scale_of_siglip_is_not_cut_at_that_of_clip(encoder):
    adapt(encoder, Towers("full", "full", train_logit_scale=True))
    with torch.no_grad():
        encoder.logit_scale.fill_(4.77)  # google/siglip-base-patch16-224
    encoder.constrain()
    assert encoder.logit_scale.item() == pytest.approx(4.77)
