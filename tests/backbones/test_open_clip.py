import json
import math
import shutil
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock
from PIL import Image
from safetensors.torch import load_file
from timm.layers import AttentionPoolLatent
from timm.layers.attention_pool import AttentionPoolPrr
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, M2M100Config, MT5Config, PreTrainedTokenizerFast

from evidence_ft.adaptation import LoraConfig, Towers, adapt
from evidence_ft.backbones import open_clip as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.timm_tower import TimmTower
from evidence_ft.tower import UnsupportedTowerError, check_tower
from tests import tiny_timm
from tests.conftest import MODELS, TEXT, build_encoder

VISION = {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 1}
TIMM_VISION = {"timm_model_name": "tiny_timm", "timm_pool": "token", "timm_proj": "linear", "image_size": [16, 32]}
NATIVE = {"image_size": [16, 32], "patch_size": 8, "width": 24, "head_width": 8, "layers": 2}
VARIANTS = {
    "native-avg": partial(tiny_timm.save, vision=NATIVE | {"pool_type": "avg"}),
    "native-avg-then-norm": partial(tiny_timm.save, vision=NATIVE | {"pool_type": "avg", "final_ln_after_pool": True}),
    "native-quickgelu-layerscale": partial(tiny_timm.save, vision=NATIVE | {"ls_init_value": 0.1}, quick_gelu=True),
    "timm-cls": tiny_timm.trunk("tiny_timm", "token"),
    "timm-avg": tiny_timm.trunk("tiny_timm", "avg"),
    "timm-map": tiny_timm.trunk("tiny_timm_no_prefix", "map"),
    "timm-registers-cls": tiny_timm.trunk("tiny_timm_registers", "token"),
    "timm-registers-avg": tiny_timm.trunk("tiny_timm_registers", "avg"),
    "timm-registers-map": tiny_timm.trunk("tiny_timm_registers", "map"),
    "timm-registers-map-of-all": tiny_timm.trunk("tiny_timm_pooling_prefix", "map"),
    "timm-eva": tiny_timm.trunk("tiny_timm_eva", "token"),
    "timm-eva02-avg": tiny_timm.trunk("tiny_timm_eva02", "avg"),
}
"""What open_clip knows besides the model of `tiny`; a model is written into a folder, and named as it is loaded."""

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
        (
            "roberta-ViT-B-32/laion2b_s12b_b32k",
            "trained with GELU, but roberta-ViT-B-32 computes QuickGELU.*no roberta-ViT-B-32 that computes the other",
        ),
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
            VISION | {"attentional_pool": True, "attn_pooler_heads": 2},
            "AttentionalPooler",
        ),
        (VISION | {"patch_dropout": 0.5}, "holes"),
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "ModifiedResNet is not supported"),
        (
            {"timm_model_name": "test_vit", "timm_pool": "max", "image_size": 160},
            "pools its tokens by global_pool = 'max'",
        ),
        (TIMM_VISION | {"timm_pool": "avgmax"}, "pools its tokens by global_pool = 'avgmax'"),
        (TIMM_VISION | {"timm_model_name": "tiny_timm_pooling_prefix", "timm_pool": "avg"}, "averages its prefix"),
        (TIMM_VISION | {"timm_model_name": "tiny_timm_patch_dropout"}, "holes"),
        (
            TIMM_VISION | {"timm_model_name": "tiny_timm_any_size", "image_size": [32, 32]},
            r"image_size is \(32, 32\) in open_clip's configuration and \(16, 32\) in its timm model",
        ),
        ({"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 160}, "EfficientNet is not"),
    ],
)
def test_towers_that_cannot_be_explained_are_named(vision, message):
    model = open_clip.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=TEXT)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with pytest.raises(UnsupportedTowerError, match=message):
        backbone.OpenClipEncoder(model, None, {}, "x")


@pytest.mark.skipif(open_clip.__version__ >= "4", reason="the class of open_clip 4 has a switch that works")
def test_the_attention_that_open_clip_3_cannot_compute_explicitly_is_named():
    model = open_clip.CLIP(embed_dim=10, vision_cfg=VISION | {"qk_norm": True}, text_cfg=TEXT)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with pytest.raises(UnsupportedTowerError, match="attention"):
        backbone.OpenClipEncoder(model, None, {}, "x")


@pytest.mark.parametrize(
    "pool", [AttentionPoolLatent(24, num_heads=3, latent_len=2), AttentionPoolPrr(24, num_heads=3)], ids=["two", "prr"]
)
def test_other_pools_than_one_probe_are_named(pool):
    trunk = timm.create_model("tiny_timm", num_classes=0, global_pool="map")
    trunk.attn_pool = pool
    with pytest.raises(UnsupportedTowerError, match=rf"by {type(pool).__name__}; expected .* one attention probe"):
        TimmTower(trunk, nn.Identity())


def test_patches_of_any_number_are_named():
    trunk = timm.create_model("tiny_timm", num_classes=0)
    trunk.patch_embed.grid_size = None
    with pytest.raises(UnsupportedTowerError, match="no fixed grid"):
        TimmTower(trunk, nn.Identity())


class TestActivation:
    """With the wrong one the weights load, and every feature is slightly off."""

    @pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32", "ViT-L-14"])
    def test_openais_weights_get_the_activation_they_were_trained_with(self, name):
        assert backbone._resolve(f"{name}/openai") == backbone._resolve(f"{name}-quickgelu/openai")
        found, tag, config = backbone._resolve(f"{name}/openai")
        assert (found, tag, config["model_cfg"]["quick_gelu"]) == (f"{name}-quickgelu", "openai", True)

    def test_other_weights_of_the_same_architecture_keep_theirs(self):
        assert backbone._resolve("ViT-B-16/laion2b_s34b_b88k")[0] == "ViT-B-16"

    def test_it_is_told_and_the_model_computes_it(self, tmp_path, monkeypatch, caplog, generator):
        for name, more in (("Tiny-Act", {}), ("Tiny-Act-quickgelu", {"quick_gelu": True})):
            (tmp_path / f"{name}.json").write_text(json.dumps(MODELS["native"] | more))
            open_clip.add_model_config(tmp_path / f"{name}.json")
            tag = {"tag": {"file": str(tmp_path / "tiny" / "open_clip_model.safetensors"), "quick_gelu": True}}
            monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tag)
        build_encoder("native").save(tmp_path / "tiny")
        with caplog.at_level("INFO", logger="evidence_ft"):
            encoder = backbone.load("Tiny-Act/tag")
            named = backbone.load("Tiny-Act-quickgelu/tag")
        (message,) = caplog.messages
        assert message == "Tiny-Act/tag: its weights were trained with QuickGELU, which Tiny-Act-quickgelu computes"
        block = encoder.model.visual.transformer.resblocks[0].mlp
        x = torch.randn(3, 96, generator=generator)
        torch.testing.assert_close(block.gelu(x), x * torch.sigmoid(1.702 * x))
        images = torch.randn(2, 3, 32, 48, generator=generator)
        assert torch.equal(encoder.image_tower(images), named.image_tower(images))
        assert encoder.checkpoint == "Tiny-Act/tag"
        encoder.save(tmp_path / "saved")
        assert torch.equal(backbone.load(str(tmp_path / "saved")).image_tower(images), named.image_tower(images))


class TestResolution:
    """open_clip interpolates positions that do not fit, without a word."""

    @pytest.mark.parametrize(
        ("tower", "change", "message"),
        [
            (
                "vision_cfg",
                {"image_size": 64},
                r"25 positions in visual\.positional_embedding.* has 65; set image_size",
            ),
            ("text_cfg", {"context_length": 77}, r"12 positions in positional_embedding.* has 77; set context_length"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_weights_of_another_length_are_refused(self, folder, tower, change, message, suffix):
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"][tower] |= change
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        if suffix == "pth":
            weights = folder / "open_clip_model.safetensors"
            torch.save(load_file(weights), folder / "model.pth")
            weights.unlink()
        with pytest.raises(CheckpointError, match=message):
            backbone.load(str(folder))

    def test_so_are_those_of_an_older_layout(self, folder):
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["custom_text"] = True
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        backbone.load(str(folder))
        config["model_cfg"]["text_cfg"]["context_length"] = 5
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"12 positions in positional_embedding.* has 5"):
            backbone.load(str(folder))

    def test_those_of_timm_are_refused_by_their_shape(self, tmp_path):
        _, checkpoint = tiny_timm.trunk("tiny_timm", "token")(tmp_path)
        path = tmp_path / "open_clip_config.json"
        path.write_text(path.read_text().replace('"tiny_timm"', '"test_vit"'))
        with pytest.raises(CheckpointError, match="pos_embed"):
            backbone.load(checkpoint)


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


class TestTiny:
    def test_it_is_the_same_each_time_and_draws_no_random_numbers(self, tmp_path):
        before = torch.get_rng_state()
        names = [backbone.tiny(tmp_path / folder) for folder in ("first", "second")]
        assert torch.equal(torch.get_rng_state(), before)
        first, second = (backbone.load(name) for name in names)
        assert first.fingerprint() == second.fingerprint()
        assert first.tokenizer(["red circle"]).tolist() == second.tokenizer(["red circle"]).tolist()

    def test_it_is_one_of_open_clips_own(self, tmp_path, generator):
        checkpoint = backbone.tiny(tmp_path)
        theirs = open_clip.create_model(checkpoint).eval()
        images = torch.randn(2, 3, 16, 32, generator=generator)
        torch.testing.assert_close(theirs.encode_image(images), backbone.load(checkpoint).image_tower(images))

    def test_it_reads_any_text_and_tells_texts_apart(self, tmp_path):
        encoder = backbone.load(backbone.tiny(tmp_path))
        features = encoder.encode_text(["cat", "Dog", "a photo", "of 3 \u00e9", "x" * 200])
        assert torch.pdist(features).min() > 0.01
        assert torch.equal(encoder.encode_text(["cat"]), encoder.encode_text(["Cat"]))


def encoder_of(variant, folder):
    return backbone.load(VARIANTS[variant](folder)[1])


class TestReadOut:
    """How features are read from the tokens; `test_contract` checks what all of them have in common."""

    @pytest.mark.parametrize(
        ("variant", "expected"),
        [
            ("timm-cls", [1] + [0] * 8),
            ("native-avg", [0] + [1 / 8] * 8),
            ("native-avg-then-norm", [0] + [1 / 8] * 8),
            ("timm-avg", [0] + [1 / 8] * 8),
            ("timm-registers-cls", [1] + [0] * 10),
            ("timm-registers-avg", [0] * 3 + [1 / 8] * 8),
            ("timm-eva", [1] + [0] * 8),
            ("timm-eva02-avg", [0] + [1 / 8] * 8),
        ],
    )
    def test_it_is_a_constant_where_nothing_is_learned(self, variant, expected, tmp_path, generator):
        trace = encoder_of(variant, tmp_path).image_tower.trace(torch.randn(2, 3, 16, 32, generator=generator))
        assert trace.pooling.tolist() == [[[expected]]] * 2
        assert not trace.pooling.requires_grad

    @pytest.mark.parametrize(
        ("variant", "unread"), [("timm-map", 0), ("timm-registers-map", 3), ("timm-registers-map-of-all", 0)]
    )
    def test_a_probes_attention_is_that_of_its_definition(self, variant, unread, tmp_path, generator, monkeypatch):
        tower = encoder_of(variant, tmp_path).image_tower
        images = torch.randn(2, 3, 16, 32, generator=generator)
        seen, attend = [], F.scaled_dot_product_attention
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, v, **o: seen.append((q, k)) or attend(q, k, v)
        )
        with torch.no_grad():
            tower(images)
        queries, keys = seen[-1]
        expected = torch.zeros(2, 3, 1, tower.num_prefix_tokens + 8)
        for image in range(2):
            for head in range(3):
                scores = [float(queries[image, head, 0] @ key) / math.sqrt(8) for key in keys[image, head]]
                total = sum(math.exp(score) for score in scores)
                expected[image, head, 0, unread:] = torch.tensor([math.exp(score) / total for score in scores])
        torch.testing.assert_close(tower.trace(images).pooling, expected, rtol=1e-5, atol=1e-7)

    def test_registers_are_no_part_of_the_heatmap(self, tmp_path):
        tower = encoder_of("timm-registers-cls", tmp_path).image_tower
        assert (tower.num_prefix_tokens, tower.grid) == (3, (2, 4))
        trace = tower.trace(torch.zeros(1, 3, 16, 32))
        assert trace.on_grid(torch.arange(11.0)[None]).tolist() == [[[3, 4, 5, 6], [7, 8, 9, 10]]]


class Attention(nn.Module):
    """That of open_clip 4 (mlfoundations/open_clip, src/open_clip/transformer.py, version 4.2.0.dev0), shortened.

    What is left out are scaled cosine attention, and keys and values of other widths.
    """

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        self.num_heads, self.head_dim = fused.num_heads, fused.head_dim
        self.scale, self.use_sdpa = fused.head_dim**-0.5, True
        self.in_proj_weight, self.in_proj_bias = fused.in_proj_weight, fused.in_proj_bias
        self.ln_q, self.ln_k, self.ln_inner = nn.Identity(), nn.Identity(), nn.Identity()
        self.logit_scale = self.head_scale = None
        self.attn_drop, self.out_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.out_proj = nn.Linear(fused.embed_dim, fused.embed_dim)
        self.out_proj.load_state_dict(fused.out_proj.state_dict())

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        N, L, C = x.shape
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        q = F.linear(x, w_q, b_q).reshape(N, -1, self.num_heads, self.head_dim).transpose(1, 2)
        k = F.linear(x if k_x is None else k_x, w_k, b_k).reshape(N, -1, self.num_heads, self.head_dim).transpose(1, 2)
        v = F.linear(x if v_x is None else v_x, w_v, b_v).reshape(N, -1, self.num_heads, self.head_dim).transpose(1, 2)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.reshape(N, self.num_heads, L, L)
        q, k = self.ln_q(q), self.ln_k(k)
        if self.use_sdpa:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=self.scale)
        else:
            attn = (q * self.scale) @ k.transpose(-1, -2)
            if attn_mask is not None:
                attn = attn.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn + attn_mask
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        if self.head_scale is not None:
            x = x * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(x.transpose(1, 2).reshape(N, -1, C))))


class TestOpenClip4:
    """One attention class of its own, with a switch, takes the place of ``nn.MultiheadAttention``."""

    @pytest.fixture
    def of_4(self, monkeypatch):
        def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
            k_x, v_x = q_x if k_x is None else k_x, q_x if v_x is None else v_x
            return self.attn(q_x, k_x=k_x, v_x=v_x, attn_mask=None if attn_mask is None else attn_mask.to(q_x.dtype))

        monkeypatch.setattr(ResidualAttentionBlock, "attention", attention)
        encoder = build_encoder("native")
        for block in encoder.modules():
            if isinstance(block, ResidualAttentionBlock):
                if isinstance(block.attn, nn.MultiheadAttention):  # in open_clip 4 it is the published class itself
                    block.attn = Attention(block.attn)
                nn.init.normal_(block.attn.in_proj_bias, generator=torch.Generator().manual_seed(1))
        return encoder.eval()

    @pytest.fixture
    def images(self, generator):
        return torch.randn(2, 3, 32, 48, generator=generator)

    def test_it_can_be_explained(self, of_4):
        tower = backbone.NativeImageTower(of_4.model.visual)
        check_tower(tower, (32, 48))

    def test_attention_is_that_of_its_definition(self, of_4, images):
        block = of_4.image_tower.blocks()[0]
        tokens = []
        block.ln_1.register_forward_hook(lambda _module, _args, output: tokens.append(output))
        (attention,) = of_4.image_tower.trace(images, [0]).attention
        q, k, _ = F.linear(tokens[0], block.attn.in_proj_weight, block.attn.in_proj_bias).split(24, dim=-1)
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            expected = (q[..., part] @ k[..., part].mT / math.sqrt(8)).softmax(-1)
            torch.testing.assert_close(attention[:, head], expected, rtol=0, atol=1e-6)

    def test_tracing_changes_and_leaves_nothing(self, of_4, images):
        blocks = of_4.image_tower.blocks()
        before = [(sorted(part.__dict__), len(part._forward_hooks)) for part in of_4.modules()]
        expected = of_4.image_tower(images)
        for layers in ("all", [-1]):
            torch.testing.assert_close(of_4.image_tower.trace(images, layers).features, expected, rtol=0, atol=1e-6)
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever torch raises for half a channel
            of_4.image_tower.trace(images[:, :1])
        assert [(sorted(part.__dict__), len(part._forward_hooks)) for part in of_4.modules()] == before
        assert all(block.attn.use_sdpa for block in blocks)

    def test_splitting_changes_neither_outputs_nor_what_is_saved(self, of_4, images):
        expected = of_4.image_tower(images), of_4.encode_text(NAMES)
        attention, layout, fingerprint = of_4.image_tower.trace(images).attention, of_4.weights(), of_4.fingerprint()
        split(of_4)
        torch.testing.assert_close(of_4.image_tower(images), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(of_4.encode_text(NAMES), expected[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(of_4.image_tower.trace(images).attention, attention, rtol=0, atol=1e-6)
        assert of_4.weights().keys() == layout.keys()
        assert of_4.fingerprint() == fingerprint

    def test_low_rank_matrices_find_their_layers(self, of_4):
        expected = of_4.encode_text(NAMES).detach()
        adapt(of_4, Towers("lora", "lora", False, LoraConfig(targets=("q", "k", "v", "out", "mlp"))))
        assert of_4.projections("vision") == in_blocks("visual.transformer.resblocks", 3, OPEN_CLIP)
        assert of_4.projections("text") == in_blocks("transformer.resblocks", 1, OPEN_CLIP)
        torch.testing.assert_close(of_4.encode_text(NAMES), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("change", ["ln_q", "ln_k", "ln_inner", "head_scale", "attn_drop"])
    def test_attention_with_more_to_it_is_explained_but_not_split(self, of_4, images, change):
        for block in of_4.image_tower.blocks():
            width = 24 if change == "ln_inner" else 8
            more = {"head_scale": nn.Parameter(torch.rand(3, 1, 1)), "attn_drop": nn.Dropout(0.1)}
            setattr(block.attn, change, more.get(change, nn.LayerNorm(width)))
        check_tower(backbone.NativeImageTower(of_4.model.visual.eval()), (32, 48))
        with pytest.raises(ValueError, match=r"attention of visual\.transformer\.resblocks\.0 cannot be split"):
            split(of_4)


class TestEva:
    """timm reads the weights of EVA's one layer for queries, keys and values, and never calls it."""

    @pytest.fixture
    def eva(self, tmp_path):
        encoder = encoder_of("timm-eva", tmp_path)
        for name, parameter in encoder.image_tower.named_parameters():
            if name.endswith("_bias"):  # they start at zero, where a lost one is not missed
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        return encoder

    def test_splitting_changes_neither_outputs_nor_what_is_saved(self, eva, tmp_path, generator):
        images = torch.randn(2, 3, 16, 32, generator=generator)
        expected, layout, fingerprint = eva.image_tower(images), eva.weights(), eva.fingerprint()
        assert "visual.trunk.blocks.0.attn.q_bias" in layout
        split(split(eva))
        torch.testing.assert_close(eva.image_tower(images), expected, rtol=0, atol=1e-6)
        check_tower(eva.image_tower, (16, 32))
        assert eva.weights().keys() == layout.keys()
        assert eva.fingerprint() == fingerprint
        eva.save(tmp_path / "again")
        torch.testing.assert_close(backbone.load(str(tmp_path / "again")).image_tower(images), expected)

    def test_a_frozen_part_stays_frozen(self, eva):
        split(eva.requires_grad_(False))
        assert not any(parameter.requires_grad for parameter in eva.parameters())

    def test_every_layer_is_found(self, eva, tmp_path):
        attention = {role: [f"attn.{role}_proj"] for role in "qkv"} | {"out": ["attn.proj"]}
        expected = attention | {"mlp": ["mlp.fc1", "mlp.fc2"]}
        assert split(eva).projections("vision") == in_blocks("visual.trunk.blocks", 2, expected)
        eva02 = split(encoder_of("timm-eva02-avg", tmp_path / "eva02"))
        expected = attention | {"mlp": ["mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"]}
        assert eva02.projections("vision") == in_blocks("visual.trunk.blocks", 2, expected)


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

    @pytest.mark.parametrize("mask", [None, "float", "bool"])
    def test_it_computes_the_same_explicitly(self, mask, generator):
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        masks = {"float": torch.zeros(5, 5).masked_fill(~seen, -torch.inf), "bool": seen}
        attention = backbone.SplitAttention(nn.MultiheadAttention(12, 3, batch_first=True))
        tokens = torch.randn(2, 5, 12, generator=generator)
        expected = attention.attend(tokens, tokens, tokens, masks.get(mask))
        attention.use_sdpa = False
        found = attention.attend(tokens, tokens, tokens, masks.get(mask))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_outputs_stay_as_they_are(self, with_any_text_tower, generator):
        encoder = with_any_text_tower
        images = torch.randn(2, 3, *encoder.preprocessing.size, generator=generator)
        expected = encoder.image_tower(images), encoder.encode_text(NAMES)
        encoder.split_attention()
        torch.testing.assert_close(encoder.image_tower(images), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.encode_text(NAMES), expected[1], rtol=0, atol=1e-6)

    def test_no_fused_attention_is_left(self, encoder):
        assert any(name.endswith("in_proj_weight") for name, _ in encoder.named_parameters())
        encoder.split_attention()
        assert not any(name.endswith("in_proj_weight") for name, _ in encoder.named_parameters())

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

    @pytest.mark.skipif(open_clip.__version__ >= "4", reason="see TestOpenClip4")
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
