import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from evidence_ft.backbones import open_clip as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.tower import UnsupportedTowerError
from tests.conftest import MODELS, TEXT, build_encoder


@pytest.fixture
def folder(tmp_path):
    build_encoder("native").save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_it_computes_what_open_clip_computes(encoder, generator):
    images = torch.randn(2, 3, *encoder.preprocessing.size, generator=generator)
    texts = ["a photo of a cat", "a dog"]
    torch.testing.assert_close(encoder.image_tower(images), encoder.model.encode_image(images))
    expected = encoder.model.encode_text(encoder.tokenizer(texts))
    torch.testing.assert_close(encoder.encode_text(texts), expected)


def test_saved_models_load_in_open_clip_itself_with_equal_outputs(folder, generator):
    encoder = build_encoder("native")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    images = torch.randn(2, 3, 32, 48, generator=generator)
    torch.testing.assert_close(theirs.encode_image(images), encoder.image_tower(images))
    assert torch.equal(theirs.logit_scale, encoder.logit_scale)


def test_saving_and_loading_keeps_every_weight(folder):
    assert backbone.load(f"local-dir:{folder}").fingerprint() == build_encoder("native").fingerprint()
    assert backbone.load(str(folder)).fingerprint() == build_encoder("native").fingerprint()


def test_the_fingerprint_sees_a_single_changed_weight(native_encoder):
    before = native_encoder.fingerprint()
    with torch.no_grad():
        native_encoder.logit_scale.add_(1e-6)
    assert native_encoder.fingerprint() != before


def test_saved_files_are_safetensors_and_json_only(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]


def test_the_embedded_model_loads_and_is_small():
    encoder = backbone.load("toy_clip")
    assert encoder.image_tower.grid == (8, 8)
    assert encoder.preprocessing.size == (64, 64)
    weights = Path(backbone.__file__).parents[1] / "assets/toy_clip/open_clip_model.safetensors"
    assert weights.stat().st_size < 5_000_000


def test_a_built_in_architecture_takes_a_weights_file(tmp_path, monkeypatch):
    config = tmp_path / "Tiny-Test.json"
    config.write_text(json.dumps(MODELS["native"]))
    open_clip.add_model_config(config)
    build_encoder("native").save(tmp_path / "tiny")
    weights = tmp_path / "tiny" / "open_clip_model.safetensors"
    assert backbone.load(f"Tiny-Test/{weights}").fingerprint() == build_encoder("native").fingerprint()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("ViT-B-33/openai", "did you mean ViT-B-32"),
        ("ViT-B-16/openai", "use ViT-B-16-quickgelu/openai"),
        ("toy_clp", "did you mean toy_clip"),
        ("ViT-B-32/opanai", "neither a file nor one of its tags: openai"),
        ("local-dir:/nowhere/at/all", "open_clip_config.json"),
    ],
)
def test_an_unknown_checkpoint_is_one_clear_error(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        backbone.load(checkpoint)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    def no_network(*_args, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(open_clip.factory, "_get_hf_config", no_network)
    with pytest.raises(CheckpointError, match="local-dir:"):
        backbone.load("hf-hub:someone/something")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        backbone.load(str(folder))


def test_a_truncated_file_is_refused(folder):
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="could not load"):
        backbone.load(str(folder))


def test_a_config_that_is_no_json_is_refused(folder):
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="model_cfg"):
        backbone.load(str(folder))


def test_weights_of_another_model_are_refused(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 2
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"resblocks\.2"):
        backbone.load(str(folder))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1, "pool_type": "avg"}, "CLS"),
        ({"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1, "patch_dropout": 0.5}, "holes"),
        ({"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1, "qk_norm": True}, "attention"),
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "ModifiedResNet is not supported"),
        ({"timm_model_name": "test_vit", "timm_pool": "avg", "image_size": 160}, "pools by 'avg'"),
        ({"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 160}, "EfficientNet is not"),
    ],
)
def test_towers_that_cannot_be_explained_are_named(vision, message):
    model = open_clip.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=TEXT)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with pytest.raises(UnsupportedTowerError, match=message):
        backbone.OpenClipEncoder(model, None, {}, "x")


class TestRealModel:
    """A timm trunk inside open_clip, pre-trained."""

    def test_preprocessing_equals_open_clips_own(self, real_data):
        from evidence_ft.samples import Sample
        from evidence_ft.transforms import SampleTransform

        checkpoint = f"local-dir:{real_data / 'vit_ti_lit'}"
        encoder = backbone.load(checkpoint)
        _, _, theirs = open_clip.create_model_and_transforms(checkpoint)
        path = next((real_data / "tiny_imagenet_boxes" / "val").rglob("*.JPEG"))
        image = Image.open(path).convert("RGB")
        ours, _ = SampleTransform(encoder.preprocessing)(Sample("x", image, 0, None, "none"))
        torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-5)

    def test_saved_and_loaded_it_is_the_same_model(self, real_data, tmp_path):
        encoder = backbone.load(f"local-dir:{real_data / 'vit_ti_lit'}")
        encoder.save(tmp_path)
        assert backbone.load(str(tmp_path)).fingerprint() == encoder.fingerprint()


def test_a_copied_toy_model_keeps_its_tokenizer(tmp_path):
    encoder = backbone.load("toy_clip")
    encoder.save(tmp_path / "copy")
    again = backbone.load(str(tmp_path / "copy"))
    texts = ["a photo of a star", "something else entirely"]
    torch.testing.assert_close(again.encode_text(texts), encoder.encode_text(texts))
    shutil.rmtree(tmp_path / "copy")
