import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BlipForImageTextRetrieval, BlipImageProcessor

from evidence_ft.adaptation import LoraConfig, Towers, adapt
from evidence_ft.backbones import hf_blip as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.salesforce import tiny_tokenizer
from evidence_ft.tower import UnsupportedTowerError
from tests import published

NAMES = ["cat", "red circle"]
VOCABULARY = len(tiny_tokenizer()) + 2
SMALL = {
    "image": 128,
    "text": 64,
    "depth": 2,
    "layers": 2,
    "patch": 8,
    "grid": 3,
    "vocabulary": VOCABULARY,
    "positions": 16,
    "features": 10,
    "queue": 6,
}
LEFT_OUT = re.compile(r"_m\.|_queue|queue_ptr|^text_decoder|position_ids")


@pytest.fixture
def encoder(tmp_path):
    return backbone.load(backbone.tiny(tmp_path / "tiny"))


def file_of_the_authors(folder, kind=published.blip, seed=0):
    """A small file with the names and the nesting of the published ones, and its tensors."""
    folder.mkdir(exist_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    state = published.random_state(kind(**SMALL), seed)
    torch.save({"model": state}, folder / "model_base.pth")
    return folder / "model_base.pth", state


def of_the_authors(folder):
    return "hf_blip", str(file_of_the_authors(folder)[0])


VARIANTS = {"of-the-authors": of_the_authors}


def needed(shapes):
    """Tensors without memory of all that `read_state` would keep of such a file."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items() if not LEFT_OUT.search(name)}
    return {**state, "temp": torch.tensor(0.07)}


def rewritten(path, change):
    """The same file with other tensors."""
    state = torch.load(path)["model"]
    change(state)
    torch.save({"model": state}, path)
    return str(path)


class TestTransformers:
    def test_it_computes_what_transformers_computes(self, tmp_path, generator):
        encoder = backbone.load(backbone.tiny(tmp_path))
        theirs = BlipForImageTextRetrieval.from_pretrained(tmp_path).eval()
        images = torch.randn(3, 3, 40, 40, generator=generator)
        texts = ["a photo of a cat", "red"]
        tokens = encoder.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=images,
                use_itm_head=False,
            ).itm_score
            ours = [torch.nn.functional.normalize(x) for x in (encoder.image_tower(images), encoder.encode_text(texts))]
        torch.testing.assert_close(ours[0] @ ours[1].T, expected, rtol=0, atol=1e-6)

    def test_its_texts_and_images_are_those_of_the_models_own_processor(self, tmp_path, generator):
        encoder = backbone.load(backbone.tiny(tmp_path))
        texts = ["A Photo of a cat, and more!", "red"]
        ids, mask = encoder._tokenize(texts)
        processor = AutoProcessor.from_pretrained(tmp_path)
        assert type(processor.image_processor) is BlipImageProcessor
        expected = processor.tokenizer(texts, padding=True, return_tensors="pt")
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"])

    def test_the_text_is_read_in_both_directions_and_without_the_image(self, encoder):
        one, other = encoder.encode_text(["a cat", "a photo of a cat"]), encoder.encode_text(["a cat"])
        torch.testing.assert_close(one[:1], other, rtol=0, atol=1e-6)  # padding does not matter
        before, after = encoder.encode_text(["a red cat", "a red photo"])
        assert (before - after).abs().max() > 1e-4  # the first token has seen the last one

    def test_a_saved_model_loads_in_transformers_with_every_weight(self, tmp_path):
        encoder = backbone.load(backbone.tiny(tmp_path / "tiny"))
        encoder.save(tmp_path / "saved")
        model, report = BlipForImageTextRetrieval.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(report.values())
        before = load_file(tmp_path / "tiny/model.safetensors")
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_what_contrast_does_not_need_is_carried_but_never_trained(self, encoder):
        assert encoder.carried
        assert all("crossattention" in name or name.startswith("itm_head.") for name in encoder.carried)
        assert not encoder.carried.keys() & encoder.model.state_dict().keys()
        images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
        similarity = encoder.image_tower(images) @ encoder.encode_text(NAMES).T * encoder.logit_scale.exp()
        similarity.square().sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters())

    def test_the_temperature_outlives_saving_to_the_bit(self, tmp_path):
        encoder = backbone.load(backbone.tiny(tmp_path / "tiny"))
        assert encoder.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-4)
        with torch.no_grad():
            encoder.logit_scale.fill_(1 / 3)
        encoder.save(tmp_path / "saved")
        again = backbone.load(str(tmp_path / "saved"))
        assert torch.equal(again.logit_scale, encoder.logit_scale)
        assert again.fingerprint() == encoder.fingerprint()
        assert encoder.model.config.logit_scale_init_value != pytest.approx(1 / 3)  # the model's own is left alone

    def test_the_fingerprint_sees_the_temperature(self, encoder):
        before = encoder.fingerprint()
        with torch.no_grad():
            encoder.logit_scale.copy_(torch.nextafter(encoder.logit_scale, torch.tensor(9.0)))
        assert encoder.fingerprint() != before

    def test_the_temperature_is_of_neither_tower(self, encoder):
        towers = [*encoder.tower_parameters("vision"), *encoder.tower_parameters("text")]
        assert {id(parameter) for parameter in (*towers, encoder.logit_scale)} == {id(p) for p in encoder.parameters()}
        assert len(towers) + 1 == len(list(encoder.parameters()))
        assert all(parameter is not encoder.logit_scale for parameter in towers)

    def test_tensors_that_transformers_once_saved_are_no_obstacle(self, tmp_path):
        checkpoint = backbone.tiny(tmp_path)
        before = backbone.load(checkpoint).fingerprint()
        state = load_file(tmp_path / "model.safetensors")
        state["text_encoder.embeddings.position_ids"] = torch.arange(24)[None]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert backbone.load(checkpoint).fingerprint() == before

    @pytest.mark.parametrize("side", [32, 48])
    def test_images_of_another_size_are_refused_although_transformers_takes_them(self, encoder, side):
        with pytest.raises(ValueError, match=rf"images are \({side}, {side}\) pixels, expected \(40, 40\)"):
            encoder.image_tower(torch.zeros(1, 3, side, side))

    def test_preparing_images_in_another_size_is_refused(self, tmp_path):
        checkpoint = backbone.tiny(tmp_path)
        BlipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"prepared in \(48, 48\) pixels, but its weights are for \(40, 40\)"):
            backbone.load(checkpoint)

    def test_a_tokenizer_with_too_many_tokens_is_refused(self, tmp_path):
        checkpoint = backbone.tiny(tmp_path)
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["one", "two", "three"])
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=rf"has {VOCABULARY + 1} tokens, but its text encoder embeds"):
            backbone.load(checkpoint)

    def test_a_resolution_that_is_not_that_of_the_weights_is_refused(self, tmp_path):
        checkpoint = backbone.tiny(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["vision_config"]["image_size"] = 48
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointError, match=r"position_embedding has shape \(1, 26, 24\), expected \(1, 37, 24\)"
        ):
            backbone.load(checkpoint)

    @pytest.mark.parametrize(
        "part", ["vision_proj.bias", "text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    )
    def test_a_missing_weight_is_named(self, tmp_path, part):
        checkpoint = backbone.tiny(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state[part]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{part} is missing"):
            backbone.load(checkpoint)

    def test_another_blip_is_refused(self, tmp_path):
        """A captioner has the same ``model_type``, and no projections."""
        checkpoint = backbone.tiny(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        captioner = {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
        captioner |= {
            f"text_decoder.bert.{name.removeprefix('text_encoder.')}": tensor
            for name, tensor in state.items()
            if name.startswith("text_encoder.")
        }
        save_file(captioner, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="is missing"):
            backbone.load(checkpoint)

    def test_a_truncated_file_is_refused(self, tmp_path):
        checkpoint = backbone.tiny(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="could not load"):
            backbone.load(checkpoint)

    def test_checkpointing_of_transformers_is_refused(self, encoder):
        for layer in encoder.model.vision_model.encoder.layers:
            layer.gradient_checkpointing = True
        with pytest.raises(UnsupportedTowerError, match="activation checkpointing"):
            encoder.image_tower.trace(torch.zeros(1, 3, 40, 40))


class TestFilesOfTheAuthors:
    @pytest.mark.parametrize("kind", [published.blip, published.blip_for_retrieval])
    def test_features_are_those_of_the_papers_model(self, tmp_path, kind, generator):
        path, state = file_of_the_authors(tmp_path, kind)
        encoder = backbone.load(str(path))
        images = torch.randn(2, 3, 24, 24, generator=generator)
        expected = torch.stack([published.read_image(state, image, heads=2) for image in images])
        torch.testing.assert_close(encoder.image_tower(images), expected, rtol=0, atol=1e-5)
        texts = ["a photo of a cat", "red"]
        expected = [
            published.read_text(state, torch.tensor(encoder.tokenizer(text)["input_ids"]), 1, 2, "text_encoder")
            for text in texts
        ]
        torch.testing.assert_close(encoder.encode_text(texts), torch.stack(expected), rtol=0, atol=1e-5)

    def test_another_resolution_is_reached_by_interpolation(self, tmp_path, generator):
        path, state = file_of_the_authors(tmp_path)
        encoder = backbone.load(f"{path}@40")
        assert encoder.image_tower.grid == (5, 5)
        assert encoder.preprocessing.size == (40, 40)
        image = torch.randn(3, 40, 40, generator=generator)
        expected = published.read_image(published.with_positions_for(state, 5), image, heads=2)
        torch.testing.assert_close(encoder.image_tower(image[None])[0], expected, rtol=0, atol=1e-5)

    def test_the_temperature_is_the_files(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        assert backbone.load(str(path)).logit_scale.item() == pytest.approx(-math.log(0.045), abs=1e-6)

    def test_images_are_squashed_and_normalised_as_clips(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        preprocessing = backbone.load(str(path)).preprocessing
        assert (preprocessing.resize_mode, preprocessing.interpolation) == ("squash", "bicubic")
        assert preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
        assert preprocessing.std == (0.26862954, 0.26130258, 0.27577711)

    def test_the_tokenizer_has_blips_two_tokens_more_in_their_order(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        tokenizer = backbone.load(str(path)).tokenizer
        assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [VOCABULARY - 2, VOCABULARY - 1]

    def test_saved_in_transformers_layout_it_is_the_same_model(self, tmp_path, generator):
        path, state = file_of_the_authors(tmp_path / "theirs")
        encoder = backbone.load(f"{path}@40")
        encoder.save(tmp_path / "saved")
        again = backbone.load(str(tmp_path / "saved"))
        assert again.fingerprint() == encoder.fingerprint()
        images = torch.randn(1, 3, 40, 40, generator=generator)
        torch.testing.assert_close(again.image_tower(images), encoder.image_tower(images), rtol=0, atol=1e-6)
        torch.testing.assert_close(again.encode_text(NAMES), encoder.encode_text(NAMES), rtol=0, atol=1e-6)
        theirs = BlipForImageTextRetrieval.from_pretrained(tmp_path / "saved")
        assert torch.equal(theirs.itm_head.weight, state["itm_head.weight"])

    @pytest.mark.parametrize(
        "sizes",
        [{}, {"image": 1024, "depth": 24}, {"grid": 24}],
        ids=["model_base", "model_large", "at 384 pixels"],
    )
    @pytest.mark.parametrize("kind", [published.blip, published.blip_for_retrieval])
    def test_every_name_and_shape_of_the_published_files_has_its_place(self, tmp_path, kind, sizes):
        shapes = kind(**sizes)
        config, state = backbone._translated(tmp_path, needed(shapes), None)
        with torch.device("meta"):
            expected = BlipForImageTextRetrieval(config).state_dict()
        assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in expected.items()}
        taken = [shape for name, shape in shapes.items() if not LEFT_OUT.search(name) and name != "temp"]
        assert sorted(map(tuple, (value.shape for value in state.values()))) == sorted(taken)
        heads = config.vision_config.num_attention_heads, config.text_config.num_attention_heads
        assert heads == ((16, 12) if "image" in sizes else (12, 12))
        assert config.vision_config.layer_norm_eps == 1e-6
        assert config.text_config.layer_norm_eps == 1e-12
        assert config.vision_config.image_size == 16 * sizes.get("grid", 14)

    @pytest.mark.parametrize(
        "part",
        [
            "temp",
            "visual_encoder.blocks.11.mlp.fc2.bias",
            "text_encoder.encoder.layer.11.output.LayerNorm.weight",
            "text_encoder.encoder.layer.11.crossattention.self.query.bias",
            "vision_proj.bias",
            "itm_head.weight",
        ],
    )
    def test_a_missing_tensor_is_named(self, tmp_path, part):
        state = needed(published.blip())
        del state[part]
        with pytest.raises(CheckpointError, match=f"1 tensor is missing: {part}"):
            backbone._translated(tmp_path, state, None)

    def test_a_missing_last_block_is_missed(self, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"12 tensors are missing: visual_encoder\.blocks\.11\.attn\.proj\.bias"
        ):
            backbone._translated(tmp_path, needed(published.blip(depth=11)), None)

    def test_tensors_that_nobody_knows_are_named(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        checkpoint = rewritten(path, lambda state: state.update({"cls_head.0.weight": torch.ones(2)}))
        with pytest.raises(CheckpointError, match=r"1 tensor is not expected: cls_head\.0\.weight"):
            backbone.load(checkpoint)

    def test_a_tensor_of_another_shape_is_named(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        checkpoint = rewritten(path, lambda state: state.update({"text_proj.bias": torch.ones(11)}))
        with pytest.raises(CheckpointError, match=r"text_proj\.bias \(11,\) instead of \(10,\)"):
            backbone.load(checkpoint)

    def test_what_is_left_out_is_listed(self, tmp_path, caplog):
        path, state = file_of_the_authors(tmp_path)
        with caplog.at_level("INFO", logger="evidence_ft.salesforce"):
            backbone.load(str(path))
        listed = caplog.messages[0].partition("left out: ")[2].split(", ")
        assert sorted(listed) == sorted(name for name in state if LEFT_OUT.search(name))

    def test_a_file_of_albef_is_sent_to_its_backbone(self, tmp_path):
        sizes = {**SMALL, "layers": 4}
        torch.save({"model": published.random_state(published.albef(**sizes))}, tmp_path / "ALBEF.pth")
        with pytest.raises(CheckpointError, match="load it by backbone 'albef'"):
            backbone.load(str(tmp_path / "ALBEF.pth"))

    def test_a_captioner_is_refused(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)

        def to_captioner(state):
            for name in [name for name in state if name.startswith(("text_encoder", "text_proj", "vision_proj"))]:
                del state[name]

        with pytest.raises(CheckpointError, match="the parts for image-text contrast"):
            backbone.load(rewritten(path, to_captioner))

    def test_a_tokenizer_of_another_size_is_refused(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=f"the tokenizer has {VOCABULARY + 1} tokens"):
            backbone.load(str(path))

    def test_dropout_is_that_of_the_authors(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        config = backbone.load(str(path)).model.config.text_config
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)


class TestLora:
    @pytest.mark.parametrize("layout", ["transformers", "authors"])
    def test_every_kind_of_layer_can_be_adapted_in_both_towers(self, tmp_path, layout, generator):
        checkpoint = backbone.tiny(tmp_path) if layout == "transformers" else str(file_of_the_authors(tmp_path)[0])
        encoder = backbone.load(checkpoint)
        images = torch.randn(2, 3, *encoder.preprocessing.size, generator=generator)
        expected = encoder.image_tower(images).detach(), encoder.encode_text(NAMES).detach()
        before, names = encoder.fingerprint(), encoder.projections("text")
        adapt(encoder, Towers("lora", "lora", False, LoraConfig(targets=("q", "k", "v", "out", "mlp"))))
        torch.testing.assert_close(encoder.image_tower(images), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.encode_text(NAMES), expected[1], rtol=0, atol=1e-6)
        assert encoder.fingerprint() == before
        assert encoder.projections("text") == names
        (encoder.image_tower(images).square().sum() + encoder.encode_text(NAMES).square().sum()).backward()
        low_rank = {name: value for name, value in encoder.named_parameters() if "lora_B" in name}
        # per block: one fused projection, the output, two layers of the MLP; the text tower has three projections
        assert len(low_rank) == 4 * len(encoder.image_tower.blocks()) + 6 * 2
        assert all(value.grad.any() for value in low_rank.values())

    def test_saved_with_what_was_learned_it_computes_the_same(self, tmp_path, generator):
        encoder = backbone.load(backbone.tiny(tmp_path / "tiny"))
        adapt(encoder, Towers("lora", "lora", False, LoraConfig()))
        with torch.no_grad():
            for name, value in encoder.named_parameters():
                if "lora_B" in name:
                    value.normal_(generator=generator)
        encoder.save(tmp_path / "merged")
        images = torch.randn(2, 3, 40, 40, generator=generator)
        again = backbone.load(str(tmp_path / "merged"))
        torch.testing.assert_close(again.image_tower(images), encoder.image_tower(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(again.encode_text(NAMES), encoder.encode_text(NAMES), rtol=0, atol=1e-5)

    def test_a_frozen_tower_has_no_gradient_and_is_explained_all_the_same(self, encoder, generator):
        adapt(encoder, Towers("frozen", "full", True))
        images = torch.randn(2, 3, 40, 40, generator=generator)
        trace = encoder.image_tower.trace(images, [-1])
        (gradient,) = torch.autograd.grad(trace.features.square().sum(), trace.attention)
        assert gradient.any()
        encoder.encode_text(NAMES).sum().backward()
        assert all(parameter.grad is None for parameter in encoder.tower_parameters("vision"))
        assert all(parameter.grad is not None for parameter in encoder.tower_parameters("text"))


class TestContext:
    @pytest.mark.parametrize("layout", ["transformers", "authors"])
    def test_words_as_context_give_the_features_of_the_text(self, tmp_path, layout):
        checkpoint = backbone.tiny(tmp_path) if layout == "transformers" else str(file_of_the_authors(tmp_path)[0])
        encoder = backbone.load(checkpoint)
        context = encoder.embed_words("a photo of a")
        expected = encoder.encode_text([f"a photo of a {name}" for name in NAMES])
        torch.testing.assert_close(encoder.encode_with_context(NAMES, context), expected, rtol=0, atol=1e-6)

    def test_the_context_stands_behind_the_first_special_token(self, encoder):
        table = encoder.model.text_encoder.embeddings.word_embeddings.weight
        ids = encoder.tokenizer("photo of")["input_ids"]
        assert torch.equal(encoder.embed_words("photo of"), table[ids[1:-1]])

    def test_a_context_that_leaves_no_room_is_refused(self, encoder):
        room = 24 - 2 - len(encoder.embed_words("cat"))
        encoder.encode_with_context(["cat"], torch.zeros(room, 16))
        with pytest.raises(ValueError, match=f"'cat' behind a context of {room + 1} tokens is longer than the 24"):
            encoder.encode_with_context(["cat"], torch.zeros(room + 1, 16))


class TestTiny:
    def test_it_is_the_same_each_time_and_draws_no_random_numbers(self, tmp_path):
        before = torch.get_rng_state()
        first, second = backbone.load(backbone.tiny(tmp_path / "a")), backbone.load(backbone.tiny(tmp_path / "b"))
        assert first.fingerprint() == second.fingerprint()
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("/nowhere/model_base.pth", r"no weights file '/nowhere/model_base\.pth'"),
        ("local-dir:/nowhere", "no folder '/nowhere'; expected a BLIP model"),
    ],
)
def test_a_missing_checkpoint_is_one_clear_error(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        backbone.load(checkpoint)
