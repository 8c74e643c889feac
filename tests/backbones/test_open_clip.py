import json
import shutil
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, M2M100Config, MT5Config, PreTrainedTokenizerFast

from evidence_ft.adaptation import LoraConfig, Towers, adapt
from evidence_ft.backbones import open_clip as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.tower import UnsupportedTowerError, check_tower
from tests.conftest import MODELS, TEXT, build_encoder

VISION = {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1}
WORDS = ["<pad>", "<end>", "<start>", "<unknown>", "a", "photo", "of", "cat", "red", "circle"]
NAMES = ["cat", "red circle"]


@pytest.fixture
def folder(tmp_path):
    build_encoder("native").save(tmp_path / "tiny")
    return tmp_path / "tiny"


def text_tower_of_transformers(folder, kind):
    """A tiny text tower of transformers with a tokenizer of ten words, and a folder they load from."""
    config = {
        "bert": BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
        "m2m": M2M100Config(d_model=16, encoder_ffn_dim=32, encoder_layers=2, encoder_attention_heads=2),
        "mt5": MT5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2),
    }[kind]
    config.vocab_size, config.pad_token_id = len(WORDS), 0
    config.save_pretrained(folder)
    template = "$A <end>" if kind == "mt5" else "<start> $A <end>"
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(template, None, [("<start>", 2), ("<end>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)


@pytest.fixture(params=["clip", "no start token", "custom", "bert", "m2m", "mt5"])
def with_any_text_tower(request, tmp_path):
    """Encoders that differ in where text is embedded, whether it has a start token, and where features are read."""
    if request.param == "clip":
        return build_encoder("native")
    if request.param == "no start token":
        return backbone.load("toy_clip")
    if request.param == "custom":
        text, tokenizer = TEXT | {"no_causal_mask": True, "pool_type": "last"}, SimpleTokenizer(context_length=12)
    else:
        text_tower_of_transformers(tmp_path, request.param)
        text = {
            "hf_model_name": str(tmp_path),
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
        }
        tokenizer = HFTokenizer(str(tmp_path), context_length=9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(embed_dim=10, vision_cfg=VISION, text_cfg=text)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return backbone.OpenClipEncoder(model, tokenizer, {}, request.param).eval()


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
        (
            {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1, "attentional_pool": True},
            "AttentionalPooler",
        ),
        ({"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1, "patch_dropout": 0.5}, "holes"),
        ({"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1, "qk_norm": True}, "attention"),
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "ModifiedResNet is not supported"),
        (
            {"timm_model_name": "test_vit", "timm_pool": "max", "image_size": 160},
            "pools its tokens by global_pool = 'max'",
        ),
        ({"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 160}, "EfficientNet is not"),
    ],
)
def test_towers_that_cannot_be_explained_are_named(vision, message):
    model = open_clip.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=TEXT)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with pytest.raises(UnsupportedTowerError, match=message):
        backbone.OpenClipEncoder(model, None, {}, "x")


class TestContext:
    def test_words_as_context_give_the_features_of_the_text(self, with_any_text_tower):
        encoder = with_any_text_tower
        context = encoder.embed_words("a photo of a")
        expected = encoder.encode_text([f"a photo of a {name}" for name in NAMES])
        torch.testing.assert_close(encoder.encode_with_context(NAMES, context), expected, rtol=0, atol=1e-6)

    def test_each_name_may_have_a_context_of_its_own(self, with_any_text_tower):
        encoder = with_any_text_tower
        context = torch.stack([encoder.embed_words("a photo"), encoder.embed_words("of a")])
        expected = encoder.encode_text(["a photo cat", "of a red circle"])
        torch.testing.assert_close(encoder.encode_with_context(NAMES, context), expected, rtol=0, atol=1e-6)

    def test_a_context_that_no_words_have_stands_where_words_would(self, native_encoder, generator):
        model, context = native_encoder.model, torch.randn(3, 16, generator=generator)
        embed = model.token_embedding.weight
        words = native_encoder.tokenizer.encode("red circle")
        start, end, padding = 49406, 49407, 0
        x = torch.cat(
            [embed[[start]], context, embed[words], embed[[end]], embed[[padding] * (12 - 3 - len(words) - 2)]]
        )
        x = model.transformer((x + model.positional_embedding)[None], attn_mask=model.attn_mask)
        expected = model.ln_final(x)[:, 1 + 3 + len(words)] @ model.text_projection
        features = native_encoder.encode_with_context(["red circle"], context)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)

    def test_only_the_context_receives_gradients(self, with_any_text_tower, generator):
        encoder = with_any_text_tower.requires_grad_(False)
        context = torch.randn(2, 3, encoder.text_width, generator=generator, requires_grad=True)
        encoder.encode_with_context(NAMES, context).sum().backward()
        assert context.grad.abs().sum(dim=-1).all()
        assert all(parameter.grad is None for parameter in encoder.parameters())

    def test_words_are_embedded_without_special_tokens(self, native_encoder):
        rows = native_encoder.tokenizer.encode("a photo of a")
        words = native_encoder.embed_words("a photo of a")
        assert torch.equal(words, native_encoder.model.token_embedding.weight[rows])
        assert not words.requires_grad

    def test_changing_the_embedded_words_leaves_the_model_alone(self, native_encoder):
        before = native_encoder.fingerprint()
        native_encoder.embed_words("a photo").zero_()
        assert native_encoder.fingerprint() == before

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_model_is_left_without_a_trace(self, native_encoder, monkeypatch, fails):
        def encode_text(_tokens):
            raise RuntimeError("no memory left")

        if fails:
            monkeypatch.setattr(native_encoder.model, "encode_text", encode_text)
            with pytest.raises(RuntimeError, match="no memory left"):
                native_encoder.encode_with_context(NAMES, torch.zeros(2, 16))
        else:
            native_encoder.encode_with_context(NAMES, torch.zeros(2, 16))
        assert not native_encoder.model.token_embedding._forward_hooks

    def test_what_just_fits_is_taken_and_one_more_token_is_refused(self, with_any_text_tower):
        encoder = with_any_text_tower
        special = 1 if encoder.checkpoint in ("toy_clip", "mt5") else 2  # an end token, and for most a start token
        room = encoder.tokenizer([""]).shape[1] - special - len(encoder.embed_words("cat"))
        encoder.encode_with_context(["cat"], torch.zeros(room, encoder.text_width))
        with pytest.raises(ValueError, match=f"'cat' behind a context of {room + 1} tokens is longer than the"):
            encoder.encode_with_context(["cat"], torch.zeros(room + 1, encoder.text_width))

    def test_words_that_do_not_fit_are_refused(self, with_any_text_tower):
        with pytest.raises(ValueError, match="is longer than the"):
            with_any_text_tower.embed_words("cat " * 40)

    @pytest.mark.parametrize("shape", [(16,), (4, 15), (3, 4, 16)])
    def test_a_context_of_another_shape_is_refused(self, native_encoder, shape):
        with pytest.raises(ValueError, match=r"expected \(L, 16\) or \(2, L, 16\) for 2 names"):
            native_encoder.encode_with_context(NAMES, torch.zeros(shape))


def split(encoder):
    encoder.split_attention()
    return encoder


class TestSplitAttention:
    @pytest.mark.parametrize("mask", [None, "float", "bool", "per head"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_computes_what_torch_computes(self, mask, bias, generator):
        with torch.random.fork_rng():
            fused = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
        for parameter in fused.parameters():
            nn.init.normal_(parameter, generator=generator)  # biases start at zero, where a lost one is not missed
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        masks = {
            "float": torch.zeros(5, 5).masked_fill(hidden, -torch.inf),
            "bool": hidden,
            "per head": torch.randn(2 * 3, 5, 5, generator=generator),
        }
        query, key, value = torch.randn(3, 2, 5, 12, generator=generator)
        expected, _ = fused(query, key, value, attn_mask=masks.get(mask), need_weights=False)
        found, _ = backbone.SplitAttention(fused)(query, key, value, attn_mask=masks.get(mask), need_weights=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_outputs_stay_as_they_are(self, with_any_text_tower, generator):
        encoder = with_any_text_tower
        images = torch.randn(2, 3, *encoder.preprocessing.size, generator=generator)
        expected = encoder.image_tower(images), encoder.encode_text(NAMES)
        encoder.split_attention()
        torch.testing.assert_close(encoder.image_tower(images), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.encode_text(NAMES), expected[1], rtol=0, atol=1e-6)

    def test_no_fused_attention_is_left(self, encoder):
        assert any(isinstance(module, nn.MultiheadAttention) for module in encoder.modules())
        encoder.split_attention()
        assert not any(isinstance(module, nn.MultiheadAttention) for module in encoder.modules())

    def test_splitting_twice_is_splitting_once(self, native_encoder):
        native_encoder.split_attention()
        before = {name: id(value) for name, value in native_encoder.named_parameters()}
        native_encoder.split_attention()
        assert {name: id(value) for name, value in native_encoder.named_parameters()} == before

    def test_what_is_saved_is_open_clips_own_layout(self, encoder):
        layout = {name: (value.shape, value.dtype) for name, value in encoder.model.state_dict().items()}
        fingerprint = encoder.fingerprint()
        encoder.split_attention()
        assert {name: (value.shape, value.dtype) for name, value in encoder.weights().items()} == layout
        assert encoder.fingerprint() == fingerprint

    def test_a_change_of_a_split_matrix_is_saved_in_its_place(self, native_encoder):
        native_encoder.split_attention()
        attention = native_encoder.model.transformer.resblocks[0].attn
        with torch.no_grad():
            attention.k_proj.weight.fill_(7)
            attention.v_proj.bias.fill_(8)
        fused = native_encoder.weights()
        weight = fused["transformer.resblocks.0.attn.in_proj_weight"]
        bias = fused["transformer.resblocks.0.attn.in_proj_bias"]
        assert [(part == 7).all().item() for part in weight.split(16)] == [False, True, False]
        assert [(part == 8).all().item() for part in bias.split(16)] == [False, False, True]

    def test_a_saved_split_encoder_loads_in_open_clip(self, tmp_path, generator):
        encoder = split(build_encoder("native"))
        encoder.save(tmp_path)
        theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
        images = torch.randn(2, 3, 32, 48, generator=generator)
        torch.testing.assert_close(theirs.encode_image(images), encoder.image_tower(images), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("layers", ["all", [-1]])
    def test_tracing_sees_the_same_attention(self, layers, generator):
        images = torch.randn(2, 3, 32, 48, generator=generator)
        fused = build_encoder("native").image_tower.trace(images, layers)
        trace = split(build_encoder("native")).image_tower.trace(images, layers)
        torch.testing.assert_close(trace.features, fused.features, rtol=0, atol=1e-6)
        torch.testing.assert_close(trace.attention, fused.attention, rtol=0, atol=1e-6)

    def test_tracing_does_not_change_the_features(self, generator):
        tower = split(build_encoder("native")).image_tower
        images = torch.randn(2, 3, 32, 48, generator=generator)
        torch.testing.assert_close(tower.trace(images).features, tower(images), rtol=0, atol=1e-6)
        check_tower(tower, (32, 48))

    def test_tracing_leaves_nothing_behind(self, generator):
        tower = split(build_encoder("native")).image_tower
        images = torch.randn(2, 3, 32, 48, generator=generator)
        before = [(sorted(part.__dict__), len(part._forward_hooks)) for part in tower.modules()]
        tower.trace(images)
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever torch raises for half a channel
            tower.trace(images[:, :1])
        assert [(sorted(part.__dict__), len(part._forward_hooks)) for part in tower.modules()] == before

    def test_a_frozen_part_stays_frozen(self, native_encoder):
        native_encoder.model.visual.requires_grad_(False)
        native_encoder.split_attention()
        assert not any(parameter.requires_grad for parameter in native_encoder.image_tower.parameters())
        assert all(parameter.requires_grad for parameter in native_encoder.tower_parameters("text"))

    def test_it_draws_no_random_numbers(self, native_encoder):
        before = torch.get_rng_state()
        native_encoder.split_attention()
        assert torch.equal(torch.get_rng_state(), before)

    def test_attention_with_more_to_it_is_refused(self, native_encoder):
        native_encoder.model.transformer.resblocks[0].attn.dropout = 0.1
        with pytest.raises(ValueError, match=r"attention of transformer\.resblocks\.0 cannot be split"):
            native_encoder.split_attention()


OPEN_CLIP = {
    "q": ["attn.q_proj"],
    "k": ["attn.k_proj"],
    "v": ["attn.v_proj"],
    "out": ["attn.out_proj"],
    "mlp": ["mlp.c_fc", "mlp.c_proj"],
}
TIMM = {
    "q": ["attn.qkv"],
    "k": ["attn.qkv"],
    "v": ["attn.qkv"],
    "out": ["attn.proj"],
    "mlp": ["mlp.fc1", "mlp.fc2"],
}
BERT = {
    "q": ["attention.self.query"],
    "k": ["attention.self.key"],
    "v": ["attention.self.value"],
    "out": ["attention.output.dense"],
    "mlp": ["intermediate.dense", "output.dense"],
}
M2M = {
    "q": ["self_attn.q_proj"],
    "k": ["self_attn.k_proj"],
    "v": ["self_attn.v_proj"],
    "out": ["self_attn.out_proj"],
    "mlp": ["fc1", "fc2"],
}
T5 = {
    "q": ["layer.0.SelfAttention.q"],
    "k": ["layer.0.SelfAttention.k"],
    "v": ["layer.0.SelfAttention.v"],
    "out": ["layer.0.SelfAttention.o"],
    "mlp": ["layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wo"],
}


def in_blocks(blocks, depth, layers):
    return {
        role: [f"{blocks}.{block}.{name}" for block in range(depth) for name in names] for role, names in layers.items()
    }


class TestProjections:
    @pytest.mark.parametrize(
        ("kind", "blocks", "layers"),
        [("native", "visual.transformer.resblocks", OPEN_CLIP), ("timm", "visual.trunk.blocks", TIMM)],
    )
    def test_image_towers_name_them_block_by_block(self, kind, blocks, layers):
        encoder = split(build_encoder(kind))
        assert encoder.projections("vision") == in_blocks(blocks, len(encoder.image_tower.blocks()), layers)

    def test_text_towers_name_them_block_by_block(self, with_any_text_tower):
        encoder = split(with_any_text_tower)
        expected = {
            "tiny-native": ("transformer.resblocks", 1, OPEN_CLIP),
            "toy_clip": ("transformer.resblocks", 2, OPEN_CLIP),
            "custom": ("text.transformer.resblocks", 1, OPEN_CLIP),
            "bert": ("text.transformer.encoder.layer", 2, BERT),
            "m2m": ("text.transformer.layers", 2, M2M),
            "mt5": ("text.transformer.block", 2, T5),
        }
        assert encoder.projections("text") == in_blocks(*expected[encoder.checkpoint])

    def test_names_stay_when_they_are_adapted(self, encoder):
        before = split(encoder).projections("vision")
        adapt(encoder, Towers("lora", "lora", train_logit_scale=False, lora=LoraConfig(targets=("q", "out", "mlp"))))
        assert encoder.projections("vision") == before

    def test_layers_that_are_read_but_never_called_are_left_out(self):
        encoder = build_encoder("timm")
        encoder.model.visual.trunk = timm.create_model(
            "beit_base_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=0
        )
        found = encoder.projections("vision")
        assert (found["q"], found["out"]) == ([], ["visual.trunk.blocks.0.attn.proj"])


class TestLora:
    def test_every_text_tower_can_be_adapted(self, with_any_text_tower):
        encoder = with_any_text_tower
        expected = encoder.encode_text(NAMES).detach()
        adapt(encoder, Towers("frozen", "lora", False, LoraConfig(targets=("q", "k", "v", "out", "mlp"))))
        torch.testing.assert_close(encoder.encode_text(NAMES), expected, rtol=0, atol=1e-6)
        encoder.encode_text(NAMES).square().sum().backward()
        low_rank = {name: value for name, value in encoder.named_parameters() if "lora_B" in name}
        assert low_rank
        assert all(value.grad.any() for value in low_rank.values())


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
