import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from evidence_ft.adaptation import LoraConfig, Towers, adapt
from evidence_ft.backbones import hf_vit as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.samples import Sample
from evidence_ft.tower import check_tower
from evidence_ft.transforms import SampleTransform

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 8,
    "id2label": dict(enumerate(["cat", "dog", "sea lion", "crane, bird"])),
}
MODELS = {
    "vit": transformers.ViTConfig(**SMALL, intermediate_size=32, image_size=(32, 48)),
    "dinov2": transformers.Dinov2Config(**SMALL, image_size=64),
    "dinov2 with SwiGLU": transformers.Dinov2Config(**SMALL, image_size=64, use_swiglu_ffn=True),
    "dinov2 with registers": transformers.Dinov2WithRegistersConfig(**SMALL, image_size=64),
}


def image_processor(name):
    if name == "vit":
        return transformers.ViTImageProcessor(size={"height": 32, "width": 48})
    return transformers.BitImageProcessor(size={"shortest_edge": 44}, crop_size={"height": 32, "width": 40})


def build(name):
    config = MODELS[name]
    model = backbone._CLASSES[config.model_type](config)
    for parameter in model.parameters():  # transformers starts them next to zero
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone.HfVitEncoder(model, image_processor(name), name).eval()


@pytest.fixture(params=MODELS)
def encoder(request):
    return build(request.param)


@pytest.fixture
def folder(tmp_path):
    backbone.tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


def logits(encoder, images):
    """What the model's own head makes of the tower's features."""
    head = encoder.own_head
    with torch.no_grad():
        return F.linear(encoder.image_tower(images), head.weight, head.bias)


def random_images(encoder, n=2):
    return torch.randn(n, 3, *encoder.preprocessing.size, generator=torch.Generator().manual_seed(0))


def test_its_own_head_gives_the_logits_of_transformers(encoder):
    images = random_images(encoder)
    with torch.no_grad():
        expected = encoder.model(images).logits
    torch.testing.assert_close(logits(encoder, images), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_it_can_be_explained_and_comes_out_as_it_went_in(encoder):
    images, before = random_images(encoder), encoder.fingerprint()
    expected = logits(encoder, images)
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    assert torch.equal(logits(encoder, images), expected)
    assert encoder.fingerprint() == before
    for block in encoder.image_tower.blocks():
        assert block.attention.config is encoder.model.config
        assert not block.attention._forward_hooks
    assert encoder.model.config._attn_implementation == "sdpa"


def test_traced_attention_is_what_transformers_returns(encoder):
    images = random_images(encoder)
    eager = type(encoder.model)(encoder.model.config).eval()
    eager.load_state_dict(encoder.model.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(images, output_attentions=True).attentions
        found = encoder.image_tower.trace(images).attention
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_pooling_has_a_head_for_each_half_of_the_features():
    encoder = build("dinov2 with registers")
    images = random_images(encoder)
    with torch.no_grad():
        normed = encoder.image_tower.vision(images).last_hidden_state
        trace = encoder.image_tower.trace(images)
    halves = (trace.pooling @ normed[:, None]).flatten(1)
    torch.testing.assert_close(trace.features, halves)
    assert encoder.image_tower.num_prefix_tokens == 5


def test_a_heatmap_follows_what_is_read_from_the_cls_token_and_from_the_patches():
    encoder = build("dinov2")
    images = random_images(encoder, 1)
    trace = encoder.image_tower.trace(images)
    head = encoder.own_head

    def score(features):
        return F.linear(features, head.weight, head.bias)[:, 1]

    found = gradient_attention.heatmap(trace, score, create_graph=False)
    gradients = torch.autograd.grad(score(trace.features).sum(), trace.attention, retain_graph=True)
    tokens = trace.attention[0].shape[-1]
    relevance = torch.eye(tokens)
    for attention, gradient in zip(trace.attention, gradients, strict=True):  # eqs. 5 and 6 of Chefer et al. 2021
        relevance = relevance + (attention * gradient)[0].clamp(min=0).mean(dim=0) @ relevance
    shown = relevance - torch.eye(tokens)
    expected = (shown[0] + shown[1:].mean(dim=0)) / 2
    torch.testing.assert_close(found.flatten(), expected[1:].detach(), rtol=1e-4, atol=0)


def test_all_that_is_trained_of_the_tower_decides_the_features(encoder):
    encoder.requires_grad_(False)
    trained = encoder.tower_parameters("vision")
    for parameter in trained:
        parameter.requires_grad_()
    encoder.image_tower(random_images(encoder)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    rest = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert {name.rpartition("model.")[2] for name in rest if "mask_token" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert encoder.tower_parameters("text") == []


def test_saved_models_load_in_transformers_itself_with_equal_logits(encoder, tmp_path):
    encoder.save(tmp_path)
    images = random_images(encoder)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = encoder.model(images).logits
        torch.testing.assert_close(theirs(images).logits, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).size == encoder.image_processor.size


def test_saving_and_loading_keeps_weights_preprocessing_and_names(encoder, tmp_path):
    encoder.save(tmp_path)
    again = backbone.load(f"local-dir:{tmp_path}")
    assert again.fingerprint() == encoder.fingerprint()
    assert again.preprocessing == encoder.preprocessing
    assert again.own_head.class_names == ("cat", "dog", "sea lion", "crane, bird")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("size", [(61, 43), (97, 30), (131, 200)])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_are_prepared_as_transformers_does(name, size, tmp_path):
    image_processor(name).save_pretrained(tmp_path)
    pil = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = pil(image, return_tensors="pt").pixel_values[0]
    found, _ = SampleTransform(build(name).preprocessing)(Sample("a", image, 0, None, "none"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_names_that_transformers_made_up_are_no_names():
    config = transformers.ViTConfig(**{key: SMALL[key] for key in SMALL if key != "id2label"}, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    assert backbone.HfVitEncoder(model, image_processor("vit"), "").own_head.class_names is None


class TestLoad:
    def test_by_folder_with_and_without_a_prefix(self, folder):
        assert backbone.load(f"local-dir:{folder}").fingerprint() == backbone.load(str(folder)).fingerprint()

    def test_an_image_size_that_does_not_fit_is_an_error(self, folder):
        self.change(folder / "preprocessor_config.json", size={"height": 40, "width": 48})
        with pytest.raises(CheckpointError, match="makes images of 40x48 pixels, and its model expects 32x48"):
            backbone.load(str(folder))

    def test_another_family_is_sent_to_its_backbone(self, folder):
        self.change(folder / "config.json", model_type="clip")
        with pytest.raises(CheckpointError, match="backbone 'hf_clip'"):
            backbone.load(str(folder))

    def test_a_model_without_a_classifier_is_refused(self, tmp_path):
        transformers.Dinov2Model(MODELS["dinov2"]).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"holds a Dinov2Model, without a classifier; .*'timm_vit'"):
            backbone.load(str(tmp_path))

    def test_wrong_weights_name_what_is_missing(self, folder):
        state = load_file(folder / "model.safetensors")
        del state["classifier.bias"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"classifier\.bias is missing"):
            backbone.load(str(folder))

    def test_it_leaves_the_random_numbers_of_others_alone_in_tiny(self, tmp_path):
        before = torch.get_rng_state()
        first, second = backbone.tiny(tmp_path / "a"), backbone.tiny(tmp_path / "b")
        assert torch.equal(torch.get_rng_state(), before)
        assert backbone.load(first).fingerprint() == backbone.load(second).fingerprint()

    def change(self, file, **settings):
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_adapters_add_nothing_at_first_and_are_merged_in_what_is_saved(encoder, tmp_path):
    images, before = random_images(encoder), encoder.fingerprint()
    expected = logits(encoder, images)
    adapt(encoder, Towers("lora", "frozen", False, LoraConfig(targets=("q", "k", "v", "out", "mlp"))))
    assert encoder.fingerprint() == before
    torch.testing.assert_close(logits(encoder, images), expected)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    encoder.save(tmp_path)
    merged = backbone.load(str(tmp_path))
    assert not torch.allclose(logits(merged, images), expected)
    torch.testing.assert_close(logits(merged, images), logits(encoder, images), rtol=1e-4, atol=1e-4)
