import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

from evidence_ft.adaptation import LoraConfig, Towers, adapt
from evidence_ft.backbones import timm_vit as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.samples import Sample
from evidence_ft.tower import UnsupportedTowerError, check_tower
from evidence_ft.transforms import SampleTransform

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 4}
MODELS = {
    "cls": ("vit_tiny_patch16_224", SMALL | {"img_size": (32, 48), "patch_size": 8}),
    "mean": ("vit_tiny_patch16_224", SMALL | {"img_size": (32, 48), "patch_size": 8, "global_pool": "avg"}),
    "probe, no prefix": ("vit_base_patch16_siglip_224", SMALL | {"img_size": 64}),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}),
    "layer scale": ("deit3_small_patch16_224", SMALL | {"img_size": 64}),
    "relative positions": ("vit_relpos_small_patch16_224", SMALL | {"img_size": 64}),
    "beit": ("beit_base_patch16_224", SMALL | {"img_size": 64}),
    "rotary positions": ("eva02_tiny_patch14_224", SMALL | {"img_size": 56}),
}


def random_model(name):
    architecture, options = MODELS[name]
    model = timm.create_model(architecture, **options)
    for parameter in model.parameters():  # timm starts heads, registers and layer scales at zero or next to it
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=MODELS)
def encoder(request):
    return backbone.TimmVitEncoder(random_model(request.param), MODELS[request.param][1], request.param).eval()


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


def test_its_own_head_gives_the_logits_of_timm(encoder):
    images = random_images(encoder)
    with torch.no_grad():
        expected = encoder.model(images)
    torch.testing.assert_close(logits(encoder, images), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_it_can_be_explained_and_comes_out_as_it_went_in(encoder):
    images, before = random_images(encoder), encoder.fingerprint()
    fused = [block.attn.fused_attn for block in encoder.image_tower.blocks()]
    expected = logits(encoder, images)
    check_tower(encoder.image_tower, encoder.preprocessing.size)
    assert torch.equal(logits(encoder, images), expected)
    assert encoder.fingerprint() == before
    assert [block.attn.fused_attn for block in encoder.image_tower.blocks()] == fused


def test_all_of_the_tower_and_nothing_of_the_head_is_trained(encoder):
    encoder.requires_grad_(False)
    for parameter in encoder.tower_parameters("vision"):
        parameter.requires_grad_()
    encoder.image_tower(random_images(encoder)).square().sum().backward()
    named = dict(encoder.named_parameters())
    reached = {name for name, parameter in named.items() if parameter.grad is not None}
    assert {name for name, parameter in named.items() if parameter.requires_grad} == reached
    assert {name for name in named if not named[name].requires_grad} == {"model.head.weight", "model.head.bias"}
    assert encoder.tower_parameters("text") == []


def test_saved_models_load_in_timm_itself_with_equal_logits(encoder, tmp_path):
    encoder.save(tmp_path)
    images = random_images(encoder)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        expected = encoder.model(images)
        torch.testing.assert_close(theirs(images), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_saving_and_loading_keeps_weights_preprocessing_and_names(encoder, tmp_path):
    encoder.model.pretrained_cfg["label_names"] = ["a", "b", "c", "d"]
    encoder.save(tmp_path)
    again = backbone.load(f"local-dir:{tmp_path}")
    assert again.fingerprint() == encoder.fingerprint()
    assert again.preprocessing == encoder.preprocessing
    assert again.own_head.class_names == ("a", "b", "c", "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("crop", [{}, {"crop_pct": 1.0}, {"crop_mode": "squash"}, {"interpolation": "bilinear"}])
@pytest.mark.parametrize(("name", "size"), [("cls", (61, 43)), ("registers", (61, 43)), ("registers", (30, 97))])
def test_images_are_prepared_as_timm_does(name, crop, size):
    model = random_model(name)
    model.pretrained_cfg |= {"input_size": (3, *model.patch_embed.img_size), **crop}
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = create_transform(**resolve_data_config(model=model), is_training=False)(image)
    transform = SampleTransform(backbone.TimmVitEncoder(model, {}, name).preprocessing)
    found, _ = transform(Sample("a", image, 0, None, "none"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"), [({"crop_mode": "border"}, "border"), ({"interpolation": "lanczos"}, "lanczos")]
)
def test_images_that_would_be_prepared_otherwise_are_refused(setting, message):
    model = random_model("cls")
    model.pretrained_cfg |= setting
    with pytest.raises(CheckpointError, match=message):
        backbone.TimmVitEncoder(model, {}, "")


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "resnet18", "convnext_atto"])
def test_a_model_with_another_head_is_refused(name):
    with pytest.raises(UnsupportedTowerError, match="one linear head, or none"):
        backbone.TimmVitEncoder(timm.create_model(name), {}, name)


def test_a_model_without_a_head_has_none_of_its_own():
    architecture, options = MODELS["registers"]
    model = timm.create_model(architecture, **options | {"num_classes": 0})
    encoder = backbone.TimmVitEncoder(model, options | {"num_classes": 0}, "").eval()
    assert encoder.own_head is None
    images = random_images(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder.image_tower(images), encoder.model(images))


class TestLoad:
    def test_by_folder_with_and_without_a_prefix(self, folder):
        assert backbone.load(f"local-dir:{folder}").fingerprint() == backbone.load(str(folder)).fingerprint()

    def test_by_architecture_and_weights_file(self, tmp_path):
        model = timm.create_model("test_vit", num_classes=3)
        save_file(model.state_dict(), tmp_path / "my.safetensors")
        encoder = backbone.load(f"test_vit/{tmp_path / 'my.safetensors'}")
        assert encoder.own_head.weight.shape == (3, 64)
        assert encoder.own_head.class_names is None
        torch.testing.assert_close(encoder.model.state_dict(), model.state_dict())

    def test_weights_that_timm_publishes(self, monkeypatch):
        asked = {}

        def create(name, **options):
            asked[name] = options
            return original("test_vit.r160_in1k")

        original = timm.create_model
        monkeypatch.setattr(timm, "create_model", create)
        encoder = backbone.load("timm:test_vit.r160_in1k")
        assert asked == {"test_vit.r160_in1k": {"pretrained": True}}
        assert encoder.own_head.class_names[0] == "tench, Tinca tinca, n01440764"

    def test_without_network_it_says_what_to_do(self, monkeypatch):
        def no_network(*_args, **_options):
            raise ConnectionError("no network")

        monkeypatch.setattr(timm, "create_model", no_network)
        with pytest.raises(CheckpointError, match="name its folder as 'local-dir:<folder>'"):
            backbone.load("timm:test_vit.r160_in1k")
        monkeypatch.setattr(backbone, "snapshot_download", no_network)
        with pytest.raises(CheckpointError, match="name its folder as 'local-dir:<folder>'"):
            backbone.load("hf-hub:someone/something")

    def test_a_hub_id_is_the_folder_it_is_downloaded_to(self, folder, monkeypatch):
        monkeypatch.setattr(backbone, "snapshot_download", lambda _name, **_options: str(folder))
        assert backbone.load("hf-hub:someone/something").fingerprint() == backbone.load(str(folder)).fingerprint()

    @pytest.mark.parametrize(
        ("checkpoint", "message"),
        [
            ("timm:vit_base_patch61_224", "did you mean vit_base_patch16_224"),
            ("timm:test_vit.nothing", "knows no weights 'nothing' for test_vit: there are test_vit.r160_in1k"),
            ("vit_base_patch16_224", "'timm:<name>', 'hf-hub:<owner>/<name>'"),
            ("test_vit/nothing.safetensors", "no file nothing.safetensors"),
            ("test_vti/nothing.safetensors", "did you mean test_vit"),
            ("local-dir:/nowhere/at/all", "holds no config.json"),
        ],
    )
    def test_an_unknown_checkpoint_is_one_clear_error(self, checkpoint, message):
        with pytest.raises(CheckpointError, match=message):
            backbone.load(checkpoint)

    def test_a_model_of_transformers_is_sent_elsewhere(self, folder):
        (folder / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(CheckpointError, match="backbone 'hf_vit'"):
            backbone.load(str(folder))

    @pytest.mark.parametrize(
        "text", ["[]", "{}", "no json", '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": 3}']
    )
    def test_a_damaged_configuration_is_named(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json is not timm's JSON"):
            backbone.load(str(folder))

    def test_arguments_that_timm_does_not_take_are_named(self, folder):
        self.change(folder, model_args={"no_such": 1})
        with pytest.raises(CheckpointError, match=r"describes no model that timm .* builds: .*no_such"):
            backbone.load(str(folder))

    def test_another_pooling_than_the_configuration_says_is_an_error(self, folder):
        self.change(folder, global_pool="avg")
        with pytest.raises(CheckpointError, match=r"says global_pool = 'avg', but .* is built with 'token'"):
            backbone.load(str(folder))

    def test_positions_of_another_resolution_are_not_resized_in_silence(self, folder):
        config = json.loads((folder / "config.json").read_text())
        self.change(folder, model_args=config["model_args"] | {"img_size": [32, 32]})
        with pytest.raises(CheckpointError, match=r"pos_embed has shape \(1, 25, 24\), expected \(1, 17, 24\)"):
            backbone.load(str(folder))

    def test_wrong_weights_name_what_is_missing_and_what_is_not_expected(self, folder):
        state = load_file(folder / "model.safetensors")
        for block in ("0", "1"):
            state[f"layers.{block}"] = state.pop(f"blocks.{block}.norm1.bias")
        save_file(state, folder / "model.safetensors")
        with pytest.raises(
            CheckpointError, match=r"blocks\.0\.norm1\.bias is missing; .*layers\.0 is not exp.* and 1 more"
        ):
            backbone.load(str(folder))

    def test_a_truncated_file_is_named(self, folder):
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:-8])
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
            backbone.load(str(folder))

    def test_it_draws_no_random_numbers_that_others_would_miss_in_tiny(self, tmp_path):
        before = torch.get_rng_state()
        first, second = backbone.tiny(tmp_path / "a"), backbone.tiny(tmp_path / "b")
        assert torch.equal(torch.get_rng_state(), before)
        assert backbone.load(first).fingerprint() == backbone.load(second).fingerprint()

    def change(self, folder, **settings):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))


class TestClassNames:
    def test_descriptions_and_ids_are_synonyms(self):
        settings = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "crane, bird"}}
        assert backbone._class_names(settings, 2) == ("crane, bird, n1", "n2")

    def test_a_mapping_of_rows_to_names(self):
        assert backbone._class_names({"label_names": {"0": "cat", "1": "dog"}}, 2) == ("cat", "dog")

    def test_a_thousand_classes_are_not_imagenet_by_their_number(self):
        assert backbone._class_names({"tag": "birds"}, 1000) is None
        assert len(set(backbone._class_names({"tag": "augreg_in21k_ft_in1k"}, 1000))) == 1000

    def test_weights_of_unknown_origin_do_not_inherit_the_tag_of_their_architecture(self, tmp_path):
        model = timm.create_model("test_vit")
        save_file(model.state_dict(), tmp_path / "birds.safetensors")
        assert backbone.load(f"test_vit/{tmp_path / 'birds.safetensors'}").own_head.class_names is None
        named = backbone.load(f"test_vit.r160_in1k/{tmp_path / 'birds.safetensors'}")
        assert named.own_head.class_names[1].startswith("goldfish")


class TestLora:
    def test_adapters_add_nothing_at_first_and_are_merged_in_what_is_saved(self, folder, tmp_path):
        encoder = backbone.load(str(folder))
        images, before = random_images(encoder), encoder.fingerprint()
        expected = logits(encoder, images)
        adapt(encoder, Towers("lora", "frozen", False, LoraConfig(targets=("q", "k", "v", "out", "mlp"))))
        assert encoder.fingerprint() == before
        torch.testing.assert_close(logits(encoder, images), expected)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if ".lora_B." in name:
                    assert parameter.requires_grad
                    torch.nn.init.normal_(parameter)
        encoder.save(tmp_path / "merged")
        merged = backbone.load(str(tmp_path / "merged"))
        assert not torch.allclose(logits(merged, images), expected)
        torch.testing.assert_close(logits(merged, images), logits(encoder, images))

    @pytest.mark.parametrize("name", ["beit", "rotary positions"])
    def test_layers_that_timm_never_calls_are_not_offered(self, name):
        encoder = backbone.TimmVitEncoder(random_model(name), {}, name)
        with pytest.raises(ValueError, match=r"has no 'q' layers that can be adapted; found: mlp, out"):
            adapt(encoder, Towers("lora", "frozen", False, LoraConfig()))
