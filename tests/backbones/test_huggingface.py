"""What holds for both CLIP and SigLIP of transformers; expected values come from transformers itself."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from evidence_ft import huggingface
from evidence_ft.adaptation import LoraConfig, Towers, adapt
from evidence_ft.alignments import outside_mass
from evidence_ft.backbones import hf_clip, hf_siglip
from evidence_ft.classifier import prompt_classifier
from evidence_ft.encoder import CheckpointError
from evidence_ft.evidence import relevance_mass_accuracy
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import flcp, lora
from evidence_ft.model import BaseModelRef, load_tuning, save_model
from evidence_ft.samples import Sample
from evidence_ft.tower import UnsupportedTowerError
from evidence_ft.transforms import SampleTransform
from evidence_ft.types import Preprocessing

CLASSES = {hf_clip: transformers.CLIPModel, hf_siglip: transformers.SiglipModel}
TEXTS = ["a photo of a cat", "the dog", "Red circle, big!"]
TOKENS = {hf_clip: {"padding": True}, hf_siglip: {"padding": "max_length", "max_length": 64}}
"""How transformers' documentation has texts padded."""


@pytest.fixture(params=[hf_clip, hf_siglip], ids=["clip", "siglip"])
def backbone(request):
    return request.param


@pytest.fixture
def folder(backbone, tmp_path):
    backbone.tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def encoder(backbone, folder):
    return backbone.load(f"local-dir:{folder}")


@pytest.fixture
def theirs(backbone, folder):
    """The same weights in a model of transformers that we never touched."""
    return CLASSES[backbone].from_pretrained(folder)


def images_for(encoder, n=2):
    return torch.randn(n, 3, *encoder.preprocessing.size, generator=torch.Generator().manual_seed(0))


def tokens_for(backbone, folder, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    canonical = ["a photo of a cat", "the dog", "red circle big"] if backbone is hf_siglip else texts
    return tokenizer(canonical, return_tensors="pt", **TOKENS[backbone])


def everything_about(model):
    """Each module's attributes and hooks: by identity, so that an equal copy is not the same."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else id(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


class TestOutputs:
    def test_features_are_those_of_transformers(self, backbone, folder, encoder, theirs):
        images, tokens = images_for(encoder), tokens_for(backbone, folder, TEXTS)
        torch.testing.assert_close(
            encoder.image_tower(images), theirs.get_image_features(images).pooler_output, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            encoder.encode_text(TEXTS), theirs.get_text_features(**tokens).pooler_output, rtol=0, atol=1e-6
        )

    def test_zero_shot_logits_are_logits_per_image_up_to_the_bias(self, backbone, folder, encoder, theirs):
        images, tokens = images_for(encoder), tokens_for(backbone, folder, TEXTS)
        expected = theirs(pixel_values=images, **tokens).logits_per_image
        head = prompt_classifier(encoder, TEXTS, "{}").head
        bias = 0 if encoder.logit_bias is None else encoder.logit_bias
        torch.testing.assert_close(head(encoder.image_tower(images)) + bias, expected, rtol=0, atol=1e-6)

    def test_traced_attention_is_that_of_the_eager_model(self, backbone, folder, encoder):
        images = images_for(encoder)
        eager = CLASSES[backbone].from_pretrained(folder, attn_implementation="eager")
        expected = eager.vision_model(images, output_attentions=True).attentions
        trace = encoder.image_tower.trace(images)
        for found, of_eager in zip(trace.attention, expected, strict=True):
            torch.testing.assert_close(found, of_eager)

    def test_a_trace_gives_the_features_of_a_plain_pass(self, encoder):
        images = images_for(encoder)
        torch.testing.assert_close(encoder.image_tower.trace(images).features, encoder.image_tower(images))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_weights_in_half_precision_are_loaded_in_float32(self, backbone, folder, dtype):
        weights = folder / "model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(weights).items()}, weights, {"format": "pt"})
        encoder = backbone.load(str(folder))
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


class TestTheModelComesOutAsItWentIn:
    def test_after_a_trace(self, encoder):
        before = everything_about(encoder.model)
        encoder.image_tower.trace(images_for(encoder), layers=[-1])
        assert everything_about(encoder.model) == before

    def test_after_an_exception_inside_a_trace(self, encoder, monkeypatch):
        before = everything_about(encoder.model)
        encoder.model.vision_model.encoder.layers[-1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder.image_tower.trace(images_for(encoder))
        encoder.model.vision_model.encoder.layers[-1]._forward_hooks.clear()
        assert everything_about(encoder.model) == before

    def test_the_configuration_is_one_object_again(self, encoder):
        encoder.image_tower.trace(images_for(encoder))
        configs = {id(block.self_attn.config) for block in encoder.image_tower.blocks()}
        assert configs == {id(encoder.model.config.vision_config)}
        assert encoder.model.config.vision_config._attn_implementation == "sdpa"

    def test_only_the_traced_blocks_leave_fused_attention(self, encoder, monkeypatch):
        calls = []
        fused = F.scaled_dot_product_attention

        def counted(*args, **options):
            calls.append(args)
            return fused(*args, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
        images, depth = images_for(encoder), len(encoder.image_tower.blocks())
        encoder.image_tower(images)
        untraced = len(calls)
        calls.clear()
        encoder.image_tower.trace(images, layers=[-1])
        assert len(calls) == untraced - 1 == depth - 1

    def test_texts_are_read_as_ever_while_a_trace_is_open(self, encoder):
        expected = encoder.encode_text(TEXTS)
        block = encoder.image_tower.blocks()[0]
        with encoder.image_tower.explicit_attention(block, lambda _: None):
            assert torch.equal(encoder.encode_text(TEXTS), expected)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # later versions have another name
    def test_the_librarys_own_checkpointing_is_refused(self, encoder):
        encoder.model.gradient_checkpointing_enable()
        with pytest.raises(UnsupportedTowerError, match="activation checkpointing"):
            encoder.image_tower.trace(images_for(encoder))
        encoder.model.gradient_checkpointing_disable()
        encoder.image_tower.trace(images_for(encoder))


class TestImages:
    def processor(self, name, **settings):
        return getattr(transformers, name)(**settings)

    @pytest.mark.parametrize("size", [(40, 40), (41, 57), (60, 97), (75, 40), (203, 88), (37, 39), (40, 43)])
    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
            ("CLIPImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}),
            ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 2}),
            ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
            ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 2}),
            ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
        ],
    )
    def test_they_are_prepared_as_by_the_models_own_processor_with_pillow(self, name, settings, size, tmp_path):
        self.processor(name, **settings).save_pretrained(tmp_path)
        slow = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        expected = slow(image, return_tensors="pt").pixel_values[0]
        found, _ = SampleTransform(huggingface.preprocessing(tmp_path))(Sample("x", image, 0, None, "none"))
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)

    def test_the_mask_follows_the_crop(self, tmp_path):
        self.processor("CLIPImageProcessor", size={"shortest_edge": 8}, crop_size=8).save_pretrained(tmp_path)
        preprocessing = huggingface.preprocessing(tmp_path)._replace(mean=(0.0,) * 3, std=(1.0,) * 3)
        mask = np.random.default_rng(0).integers(0, 2, (8, 11), dtype=np.uint8)  # three columns too many
        image = Image.fromarray(np.repeat(mask[:, :, None] * 255, 3, axis=2))
        found, cropped = SampleTransform(preprocessing)(Sample("x", image, 0, mask, "mask"))
        assert torch.equal(found[0], cropped.float())
        assert torch.equal(cropped, torch.from_numpy(mask[:, 1:9]))

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"do_resize": False}, "images are not resized"),
            ({"do_rescale": False}, "not divided by 255"),
            ({"rescale_factor": 1.0}, "not divided by 255"),
            ({"resample": 1}, "resample is 1"),
            ({"do_center_crop": False}, "cropped to None"),
            ({"size": {"shortest_edge": 200}}, "cropped to"),
        ],
    )
    def test_what_is_not_supported_is_named(self, settings, complaint):
        with pytest.raises(CheckpointError, match=complaint):
            huggingface.as_preprocessing(self.processor("CLIPImageProcessor", **settings))

    def test_one_file_for_the_whole_processor_is_read_too(self, folder, backbone, tmp_path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        images = transformers.AutoImageProcessor.from_pretrained(folder)
        kind = transformers.CLIPProcessor if backbone is hf_clip else transformers.SiglipProcessor
        kind(images, tokenizer).save_pretrained(tmp_path / "processor")
        (folder / "preprocessor_config.json").unlink()
        for name in ("processor_config.json", "preprocessor_config.json"):
            if (tmp_path / "processor" / name).is_file():
                shutil.copy(tmp_path / "processor" / name, folder)
        assert huggingface.preprocessing(folder) == huggingface.as_preprocessing(images)


class TestTexts:
    def test_words_as_context_give_the_features_of_the_text(self, encoder):
        context = encoder.embed_words("a photo of a")
        assert context.shape == (len("aphotoofa"), encoder.text_width)
        found = encoder.encode_with_context(["cat", "red circle"], context)
        expected = encoder.encode_text(["a photo of a cat", "a photo of a red circle"])
        torch.testing.assert_close(found, expected)

    def test_each_name_may_have_its_own_context(self, encoder):
        contexts = torch.stack([encoder.embed_words(text) for text in ("big", "red")])
        found = encoder.encode_with_context(["cat", "cow"], contexts)
        torch.testing.assert_close(found, encoder.encode_text(["big cat", "red cow"]))
        with pytest.raises(ValueError, match="for 1 names"):
            encoder.encode_with_context(["cat"], contexts)

    def test_the_context_is_trained(self, encoder):
        context = torch.randn(3, encoder.text_width, requires_grad=True)
        encoder.encode_with_context(["cat", "cow"], context).sum().backward()
        assert context.grad.abs().sum(dim=1).all()
        assert not encoder.token_embedding()._forward_hooks

    def test_an_empty_context_is_no_context(self, encoder):
        found = encoder.encode_with_context(["cat"], torch.zeros(0, encoder.text_width))
        torch.testing.assert_close(found, encoder.encode_text(["cat"]))

    def test_what_does_not_fit_is_refused_and_a_caption_cut(self, encoder):
        with pytest.raises(ValueError, match=r"behind a context of 60 tokens is longer than the 64"):
            encoder.encode_with_context(["long name"], torch.zeros(60, encoder.text_width))
        with pytest.raises(ValueError, match="longer than the 64 tokens"):
            encoder.embed_words("a" * 80)
        torch.testing.assert_close(encoder.encode_text(["a" * 80]), encoder.encode_text(["a" * 90]))

    def test_features_do_not_depend_on_the_other_texts(self, encoder):
        alone = torch.cat([encoder.encode_text([text]) for text in TEXTS])
        torch.testing.assert_close(encoder.encode_text(TEXTS), alone)


class TestTraining:
    def test_a_heatmap_can_be_trained_onto_the_mask(self, encoder):
        tuning = flcp.prepare(encoder, ["cat", "dog"], flcp.Config())
        images, labels = images_for(encoder, 4), torch.tensor([0, 1, 0, 1])
        masks = torch.zeros(4, *encoder.image_tower.grid)
        masks[:, :2, :2] = 1
        optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
        masses = []
        for _ in range(25):
            trace = encoder.image_tower.trace(images, [-1])
            _, score = tuning.objective(trace.features, labels)
            heatmaps = gradient_attention.heatmap(trace, score, create_graph=True)
            masses.append(relevance_mass_accuracy(heatmaps.detach(), masks).mean().item())
            optimizer.zero_grad()
            outside_mass.loss(heatmaps, masks).mean().backward()
            optimizer.step()
        assert masses[-1] > masses[0] + 0.2

    @pytest.mark.parametrize("layers", [[-1], "all"])
    def test_the_evidence_reaches_every_tensor_of_the_image_tower(self, encoder, layers):
        trace = encoder.image_tower.trace(images_for(encoder), layers)
        heatmaps = gradient_attention.heatmap(trace, lambda features: features.square().sum(1), create_graph=True)
        outside_mass.loss(heatmaps, torch.eye(heatmaps.shape[1]).expand_as(heatmaps)).sum().backward()
        first = 0 if layers == "all" else len(encoder.image_tower.blocks()) - 1
        for name, parameter in encoder.image_tower.blocks()[first].named_parameters():
            assert parameter.grad is not None, name

    def test_lora_changes_nothing_at_first_and_then_only_itself(self, encoder):
        images = images_for(encoder)
        expected, texts = encoder.image_tower(images), encoder.encode_text(TEXTS)
        before = encoder.fingerprint()
        targets = LoraConfig(targets=("q", "k", "v", "out", "mlp"))
        adapt(encoder, Towers("lora", "lora", train_logit_scale=False, lora=targets))
        assert encoder.fingerprint() == before
        torch.testing.assert_close(encoder.image_tower(images), expected)
        torch.testing.assert_close(encoder.encode_text(TEXTS), texts)
        trained = [name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)
        assert len(trained) == 2 * 6 * 2 * 2  # towers, layers of a block, blocks, matrices
        assert encoder.image_tower.trace(images).features.shape == expected.shape

    def test_lora_reaches_the_vision_or_the_text_tower_alone(self, encoder):
        adapt(encoder, Towers("frozen", "lora", train_logit_scale=False, lora=LoraConfig()))
        assert all(name.startswith("text_model.") for name, p in encoder.model.named_parameters() if p.requires_grad)

    def test_the_logit_bias_is_trained_where_the_logit_scale_is(self, encoder):
        for trained in (True, False):
            adapt(encoder, Towers("full", "full", train_logit_scale=trained))
            parts = [part for part in (encoder.logit_scale, encoder.logit_bias) if part is not None]
            assert {part.requires_grad for part in parts} == {trained}
        vision, text = encoder.tower_parameters("vision"), encoder.tower_parameters("text")
        together = [id(parameter) for parameter in (*vision, *text, *parts)]
        assert sorted(together) == sorted(id(parameter) for parameter in encoder.model.parameters())


class TestSaving:
    def test_transformers_reads_what_is_saved(self, backbone, encoder, tmp_path):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        encoder.save(tmp_path / "saved")
        model, report = CLASSES[backbone].from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        images = images_for(encoder)
        torch.testing.assert_close(model.get_image_features(images).pooler_output, encoder.image_tower(images))
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
        inputs = processor(text=["the dog"], images=Image.new("RGB", (50, 60)), return_tensors="pt", **TOKENS[backbone])
        torch.testing.assert_close(
            model.get_text_features(inputs["input_ids"]).pooler_output, encoder.encode_text(["the dog"])
        )
        assert inputs["pixel_values"].shape[-2:] == encoder.preprocessing.size

    def test_saving_and_loading_keeps_everything(self, backbone, encoder, tmp_path):
        encoder.save(tmp_path / "saved")
        again = backbone.load(str(tmp_path / "saved"))
        assert again.fingerprint() == encoder.fingerprint()
        assert again.preprocessing == encoder.preprocessing
        assert torch.equal(again.encode_text(TEXTS), encoder.encode_text(TEXTS))
        assert (tmp_path / "saved" / "model.safetensors").stat().st_mode & 0o777 == 0o644

    def test_adapters_are_merged_into_what_is_saved(self, backbone, encoder, tmp_path):
        adapt(encoder, Towers("lora", "lora", train_logit_scale=True, lora=LoraConfig()))
        with torch.no_grad():
            for name, parameter in encoder.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        encoder.save(tmp_path / "saved")
        model = CLASSES[backbone].from_pretrained(tmp_path / "saved")
        images = images_for(encoder)
        torch.testing.assert_close(model.get_image_features(images).pooler_output, encoder.image_tower(images))

    def test_a_tuned_model_comes_back_with_scale_and_bias(self, backbone, folder, tmp_path):
        encoder = backbone.load(str(folder))
        base = BaseModelRef.of(encoder)
        config = lora.Config()
        tuning = lora.prepare(encoder, ["cat", "dog"], config)
        parts = [part for part in (encoder.logit_scale, encoder.logit_bias) if part is not None]
        with torch.no_grad():
            for part in parts:
                part.add_(0.25)
        save_model(tmp_path / "tuned", tuning, class_names=["cat", "dog"], method_config=config, base=base)
        again, manifest = load_tuning(tmp_path / "tuned")
        assert manifest.encoder == "adapter"
        assert torch.equal(again.encoder.logit_scale, encoder.logit_scale)
        assert (again.encoder.logit_bias is None) == (encoder.logit_bias is None)
        if encoder.logit_bias is not None:
            assert torch.equal(again.encoder.logit_bias, encoder.logit_bias)


def rewritten(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestRefusals:
    def test_a_folder_that_is_not_there(self, backbone):
        with pytest.raises(CheckpointError, match=r"no folder '/nowhere'.*hf-hub:<owner>/<name>"):
            backbone.load("local-dir:/nowhere")

    def test_the_hub_out_of_reach(self, backbone, monkeypatch):
        def no_network(*_args, **_options):
            raise ConnectionError("no network")

        monkeypatch.setattr(huggingface, "snapshot_download", no_network)
        with pytest.raises(CheckpointError, match=r"could not reach 'hf-hub:a/b'.*local-dir:"):
            backbone.load("hf-hub:a/b")

    def test_what_was_downloaded_before_is_used(self, backbone, folder, monkeypatch):
        asked = []
        monkeypatch.setattr(
            huggingface, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(folder)
        )
        assert backbone.load("hf-hub:a/b").checkpoint == "hf-hub:a/b"
        ((name, options),) = asked
        assert name == "a/b"
        assert not {"*.bin", "*.py", "*.pt"} & set(options["allow_patterns"])

    def test_another_family_names_the_backbone_for_it(self, backbone, tmp_path):
        other = hf_siglip if backbone is hf_clip else hf_clip
        with pytest.raises(CheckpointError, match=f"load it by backbone '{other.__name__.rpartition('.')[2]}'"):
            backbone.load(other.tiny(tmp_path))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("config.json", "holds no config.json"),
            ("model.safetensors", "holds no weights; expected model.safetensors"),
            ("preprocessor_config.json", "holds no preprocessor_config.json"),
            ("tokenizer.json", "holds no tokenizer"),
        ],
    )
    def test_a_missing_file(self, backbone, folder, name, message):
        for path in folder.glob("tokenizer*" if "tokenizer" in name else name):
            path.unlink()
        with pytest.raises(CheckpointError, match=message):
            backbone.load(str(folder))

    @pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
    def test_a_file_that_is_no_json(self, backbone, folder, name):
        (folder / name).write_text("{")
        with pytest.raises(CheckpointError):
            backbone.load(str(folder))

    def test_weights_that_were_cut(self, backbone, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="could not load"):
            backbone.load(str(folder))

    def test_weights_that_miss_or_exceed(self, backbone, folder):
        weights = folder / "model.safetensors"
        state = load_file(weights)
        del state["logit_scale"]
        state["left.over"] = torch.zeros(2)
        save_file(state, weights, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"logit_scale is missing; left\.over is not expected"):
            backbone.load(str(folder))

    def test_weights_of_another_shape(self, backbone, folder):
        config = json.loads((folder / "config.json").read_text())
        rewritten(folder / "config.json", vision_config=config["vision_config"] | {"intermediate_size": 48})
        with pytest.raises(CheckpointError, match=r"fc1\.bias has shape \(32,\), expected \(48,\).* and \d more"):
            backbone.load(str(folder))

    def test_images_of_another_size(self, backbone, folder):
        rewritten(folder / "preprocessor_config.json", size={"height": 48, "width": 48}, do_center_crop=False)
        with pytest.raises(CheckpointError, match="makes images of 48x48 pixels, and its image tower expects"):
            backbone.load(str(folder))

    def test_settings_the_family_does_not_know(self, backbone, folder):
        rewritten(folder / "config.json", vision_config={"hidden_size": "wide"})
        with pytest.raises(CheckpointError, match=r"is not a \w+Config"):
            backbone.load(str(folder))


class TestOlderFolders:
    def test_position_ids_among_the_weights_are_no_complaint(self, backbone, folder):
        weights = folder / "model.safetensors"
        state = load_file(weights) | {"vision_model.embeddings.position_ids": torch.arange(26)[None]}
        save_file(state, weights, {"format": "pt"})
        backbone.load(str(folder))

    def test_a_repository_without_safetensors(self, backbone, folder):
        expected = backbone.load(str(folder)).fingerprint()
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert backbone.load(str(folder)).fingerprint() == expected

    def test_code_among_pickled_weights_is_not_run(self, backbone, folder):
        torch.save({"logit_scale": SimpleNamespace()}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="something other than tensors"):
            backbone.load(str(folder))


def test_tiny_models_agree_and_leave_the_random_numbers_alone(backbone, tmp_path):
    state = torch.get_rng_state()
    first, second = (backbone.load(backbone.tiny(tmp_path / name)) for name in ("first", "second"))
    assert first.fingerprint() == second.fingerprint()
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_said_while_a_model_is_loaded(backbone, folder, capfd):
    backbone.load(str(folder))
    assert "".join(capfd.readouterr()) == ""


def test_fields_of_preprocessing_keep_their_old_defaults():
    assert Preprocessing((2, 2), (0.5,) * 3, (0.5,) * 3).crop_rounding == "even"


@pytest.mark.parametrize(
    ("file", "kind"), [("preprocessor_config.json", "AutoImageProcessor"), ("tokenizer_config.json", "AutoTokenizer")]
)
def test_code_that_comes_with_a_model_is_not_run(backbone, folder, file, kind):
    marker = folder / "was-run"
    (folder / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass Custom: pass\n")
    settings = json.loads((folder / file).read_text())
    own = ["custom.Custom", "custom.Custom"] if kind == "AutoTokenizer" else "custom.Custom"
    settings |= {"auto_map": {kind: own}, "image_processor_type": "Custom", "tokenizer_class": "Custom"}
    (folder / file).write_text(json.dumps(settings))
    try:
        backbone.load(f"local-dir:{folder}")  # by transformers' own class where there is one
    except CheckpointError as error:
        assert "custom" in str(error)  # noqa: PT017
    assert not marker.exists()
