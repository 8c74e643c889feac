import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from evidence_ft.adaptation import LoraConfig, Towers, adapt
from evidence_ft.backbones import albef as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.salesforce import tiny_tokenizer
from tests import published

NAMES = ["cat", "red circle"]
SMALL = {
    "image": 128,
    "text": 64,
    "depth": 2,
    "layers": 4,
    "patch": 8,
    "grid": 3,
    "vocabulary": len(tiny_tokenizer()),
    "positions": 16,
    "features": 10,
    "queue": 6,
}
LEFT_OUT = re.compile(r"_m\.|_queue|queue_ptr|^itm_head|^text_encoder\.cls|position_ids")


def in_fusion_layers(name, first):
    found = re.match(r"text_encoder\.(bert\.)?encoder\.layer\.(\d+)\.", name)
    return bool(found) and int(found[2]) >= first


@pytest.fixture
def encoder(tmp_path):
    return backbone.load(backbone.tiny(tmp_path / "tiny"))


def file_of_the_authors(folder, kind=published.albef, seed=0):
    """A small file with the names and the nesting of the published ones, and its tensors."""
    folder.mkdir(exist_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    state = published.random_state(kind(**SMALL), seed)
    torch.save({"model": state}, folder / "ALBEF.pth")
    return folder / "ALBEF.pth", state


def at_another_resolution(folder):
    return "albef", f"{file_of_the_authors(folder)[0]}@40"


VARIANTS = {"at-another-resolution": at_another_resolution}


def rewritten(path, change):
    """The same file with other tensors."""
    state = torch.load(path)["model"]
    change(state)
    torch.save({"model": state}, path)
    return str(path)


def needed(shapes):
    """Tensors without memory of all that `read_state` would keep of such a file."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items() if not LEFT_OUT.search(name)}
    return {**state, "temp": torch.tensor(0.07)}


class TestFilesOfTheAuthors:
    @pytest.mark.parametrize(
        ("kind", "bert"),
        [(published.albef, "text_encoder.bert"), (published.albef_for_retrieval, "text_encoder")],
        ids=["pre-training", "retrieval"],
    )
    def test_features_are_those_of_the_papers_model(self, tmp_path, kind, bert, generator):
        path, state = file_of_the_authors(tmp_path, kind)
        encoder = backbone.load(str(path))
        images = torch.randn(2, 3, 24, 24, generator=generator)
        expected = torch.stack([published.read_image(state, image, heads=2) for image in images])
        torch.testing.assert_close(encoder.image_tower(images), expected, rtol=0, atol=1e-5)
        texts = ["a photo of a cat", "red"]
        expected = [
            published.read_text(state, torch.tensor(encoder.tokenizer(text)["input_ids"]), 1, 2, bert) for text in texts
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

    def test_images_are_squashed_and_normalised_as_clips(self, encoder):
        preprocessing = encoder.preprocessing
        assert (preprocessing.resize_mode, preprocessing.interpolation) == ("squash", "bicubic")
        assert preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
        assert preprocessing.std == (0.26862954, 0.26130258, 0.27577711)

    @pytest.mark.parametrize("kind", [published.albef, published.albef_for_retrieval])
    @pytest.mark.parametrize("grid", [16, 24])
    def test_every_name_and_shape_of_the_published_files_has_its_place(self, tmp_path, kind, grid):
        shapes = kind(grid=grid)
        architecture, state = backbone._translated(tmp_path, needed(shapes), None)
        with torch.device("meta"):
            text = backbone.BertModel(backbone._bert_config(architecture), add_pooling_layer=False)
            model = backbone.Albef(architecture, text)
        expected = {backbone._published(name): value.shape for name, value in model.state_dict().items()}
        assert {name: value.shape for name, value in state.items()} == expected
        taken = [
            shape for name, shape in shapes.items() if not LEFT_OUT.search(name) and not in_fusion_layers(name, first=6)
        ]
        assert sorted(map(tuple, expected.values())) == sorted(taken)
        assert architecture == backbone.Architecture(
            image_size=16 * grid,
            patch_size=16,
            vision_width=768,
            vision_depth=12,
            vision_heads=12,
            text_width=768,
            text_depth=6,
            text_heads=12,
            text_hidden=3072,
            text_positions=512,
            text_types=2,
            vocabulary=30522,
            features=256,
        )
        assert (model.visual_encoder.norm.eps, model.visual_encoder.blocks[0].norm2.eps) == (1e-6, 1e-6)
        assert text.embeddings.LayerNorm.eps == 1e-12
        assert (text.config.hidden_dropout_prob, text.config.attention_probs_dropout_prob) == (0.1, 0.1)

    def test_256_pixels_for_384_is_a_grid_of_24(self, tmp_path):
        state = needed(published.albef())
        state["visual_encoder.pos_embed"] = torch.zeros(1, 257, 768)
        architecture, state = backbone._translated(tmp_path, state, 384)
        assert (architecture.image_size, state["visual_encoder.pos_embed"].shape) == (384, (1, 577, 768))

    def test_what_is_left_out_is_listed(self, tmp_path, caplog):
        path, state = file_of_the_authors(tmp_path)
        with caplog.at_level("INFO"):
            backbone.load(str(path))
        listed = ", ".join(message.partition("left out: ")[2] for message in caplog.messages).split(", ")
        expected = [name for name in state if LEFT_OUT.search(name) or in_fusion_layers(name, first=2)]
        assert sorted(listed) == sorted(expected)

    @pytest.mark.parametrize(
        "part",
        [
            "temp",
            "visual_encoder.blocks.1.mlp.fc2.bias",
            "text_encoder.bert.encoder.layer.1.output.LayerNorm.weight",
            "vision_proj.bias",
        ],
    )
    def test_a_missing_tensor_is_named(self, tmp_path, part):
        path, _ = file_of_the_authors(tmp_path)
        with pytest.raises(CheckpointError, match=f"1 tensor is missing: {part}"):
            backbone.load(rewritten(path, lambda state: state.pop(part)))

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

    def test_a_file_without_projections_is_refused(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)

        def for_questions(state):
            for name in [name for name in state if "_proj" in name]:
                del state[name]

        with pytest.raises(CheckpointError, match=r"no vision_proj\.weight among .*the parts for image-text contrast"):
            backbone.load(rewritten(path, for_questions))

    def test_a_file_of_blip_is_sent_to_its_backbone(self, tmp_path):
        torch.save({"model": published.random_state(published.blip(**SMALL))}, tmp_path / "model_base.pth")
        with pytest.raises(CheckpointError, match="load it by backbone 'hf_blip'"):
            backbone.load(str(tmp_path / "model_base.pth"))

    def test_a_truncated_file_is_refused(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        path.write_bytes(path.read_bytes()[:100_000])
        with pytest.raises(CheckpointError, match="is it damaged"):
            backbone.load(str(path))

    def test_a_tokenizer_of_another_size_is_refused(self, tmp_path):
        path, _ = file_of_the_authors(tmp_path)
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=f"the tokenizer has {SMALL['vocabulary'] + 1} tokens"):
            backbone.load(str(path))


class TestTiny:
    def test_it_is_made_as_the_published_file(self, tmp_path):
        backbone.tiny(tmp_path)
        content = torch.load(tmp_path / "ALBEF.pth", weights_only=True)
        assert list(content) == ["model"]
        assert set(content["model"]) == set(published.albef(depth=3, layers=4))

    def test_it_is_the_same_each_time_and_draws_no_random_numbers(self, tmp_path):
        before = torch.get_rng_state()
        first, second = backbone.load(backbone.tiny(tmp_path / "a")), backbone.load(backbone.tiny(tmp_path / "b"))
        assert first.fingerprint() == second.fingerprint()
        assert torch.equal(torch.get_rng_state(), before)


class TestSaved:
    def test_it_is_the_same_model_again(self, tmp_path, generator):
        path, _ = file_of_the_authors(tmp_path / "theirs")
        encoder = backbone.load(f"{path}@40")
        encoder.save(tmp_path / "saved")
        images = torch.randn(1, 3, 40, 40, generator=generator)
        for checkpoint in (str(tmp_path / "saved"), f"local-dir:{tmp_path / 'saved'}"):
            again = backbone.load(checkpoint)
            assert again.fingerprint() == encoder.fingerprint()
            assert again.preprocessing == encoder.preprocessing
            torch.testing.assert_close(again.image_tower(images), encoder.image_tower(images), rtol=0, atol=1e-6)
            torch.testing.assert_close(again.encode_text(NAMES), encoder.encode_text(NAMES), rtol=0, atol=1e-6)

    def test_tensors_have_the_names_and_values_of_the_pre_training_file(self, tmp_path):
        path, state = file_of_the_authors(tmp_path / "theirs")
        backbone.load(str(path)).save(tmp_path / "saved")
        saved = load_file(tmp_path / "saved/model.safetensors")
        expected = {
            name: tensor
            for name, tensor in state.items()
            if not LEFT_OUT.search(name) and not in_fusion_layers(name, first=2)
        }
        assert saved.keys() == expected.keys()
        temp = saved.pop("temp")
        assert temp.item() == pytest.approx(expected["temp"].item(), abs=1e-8)
        assert all(torch.equal(saved[name], expected[name]) for name in saved)

    @pytest.mark.parametrize("scale", [-1.3, 1e-4, 0.7, 2.66, math.log(100)])
    def test_the_temperature_outlives_saving_to_the_bit(self, tmp_path, encoder, scale):
        with torch.no_grad():
            encoder.logit_scale.fill_(scale)
        encoder.save(tmp_path / "saved")
        again = backbone.load(str(tmp_path / "saved"))
        assert torch.equal(again.logit_scale, encoder.logit_scale)
        assert again.logit_scale.dtype == torch.float32
        assert again.fingerprint() == encoder.fingerprint()

    def test_its_files_are_safetensors_and_json_only(self, tmp_path, encoder):
        encoder.save(tmp_path / "saved")
        names = sorted(path.name for path in (tmp_path / "saved").iterdir())
        assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        assert (tmp_path / "saved/model.safetensors").stat().st_mode & 0o777 == 0o644

    def saved(self, folder):
        backbone.load(backbone.tiny(folder / "tiny")).save(folder / "saved")
        return folder / "saved"

    def test_weights_of_another_resolution_are_refused(self, tmp_path):
        folder = self.saved(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"image_size": 32}))
        with pytest.raises(CheckpointError, match=r"pos_embed \(1, 10, 128\) instead of \(1, 17, 128\)"):
            backbone.load(str(folder))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "blip"}, "holds a model of type 'blip', expected albef; load it by backbone 'hf_blip'"),
            ({"text_depth": None}, "has no positive whole number for text_depth"),
            ({"text_depth": 0, "features": "x"}, "has no positive whole number for text_depth, features"),
            ({"text_depth": 3}, r"16 tensors are missing: text_encoder\.bert\.encoder\.layer\.2\."),
            ({"text_depth": 1}, r"16 tensors are not expected: text_encoder\.bert\.encoder\.layer\.1\."),
        ],
    )
    def test_a_configuration_that_does_not_fit_is_refused(self, tmp_path, change, message):
        folder = self.saved(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            backbone.load(str(folder))

    def test_missing_weights_are_named(self, tmp_path):
        folder = self.saved(tmp_path)
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no weights file .*model\.safetensors"):
            backbone.load(str(folder))

    def test_a_truncated_file_is_refused(self, tmp_path):
        folder = self.saved(tmp_path)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="is it damaged"):
            backbone.load(str(folder))

    def test_a_tensor_more_is_refused(self, tmp_path):
        folder = self.saved(tmp_path)
        state = load_file(folder / "model.safetensors")
        save_file({**state, "itm_head.bias": torch.ones(2)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"1 tensor is not expected: itm_head\.bias"):
            backbone.load(str(folder))

    @pytest.mark.parametrize("checkpoint", ["/nowhere", "local-dir:/nowhere"])
    def test_a_missing_folder_is_one_clear_error(self, checkpoint):
        with pytest.raises(CheckpointError, match=r"no file or folder '/nowhere'; expected a file of ALBEF's authors"):
            backbone.load(checkpoint)

    def test_a_missing_file_is_one_clear_error(self):
        with pytest.raises(CheckpointError, match=r"no weights file '/nowhere/ALBEF\.pth'"):
            backbone.load("/nowhere/ALBEF.pth@384")

    def test_a_hub_id_without_network_says_what_to_do(self, monkeypatch):
        def no_network(*_args, **_options):
            raise ConnectionError("no network")

        monkeypatch.setattr("evidence_ft.huggingface.snapshot_download", no_network)
        with pytest.raises(CheckpointError, match="local-dir:"):
            backbone.load("hf-hub:someone/something")


class TestText:
    @pytest.mark.parametrize(
        ("text", "read"),
        [
            ("A photo of a Black-footed Albatross.", "a photo of a black footed albatross"),
            ("itap of: the  cat/dog!", "itap of the cat dog"),
            ('<person>\'s #1 "cat" (red); ~5*4?', "persons 1 cat red 54"),
            ("", ""),
        ],
    )
    def test_it_is_cleaned_as_the_captions_it_was_trained_on(self, encoder, text, read):
        assert encoder.normalize_text(text) == read
        torch.testing.assert_close(encoder.encode_text([text]), encoder.encode_text([read]), rtol=0, atol=0)

    def test_padding_does_not_matter(self, encoder):
        together, alone = encoder.encode_text(["a cat", "a photo of a red cat"]), encoder.encode_text(["a cat"])
        torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("words", ["a photo of a", "A photo of: a", ""])
    def test_words_as_context_give_the_features_of_the_text(self, encoder, words):
        context = encoder.embed_words(words)
        expected = encoder.encode_text([f"{words} {name}" for name in NAMES])
        torch.testing.assert_close(encoder.encode_with_context(NAMES, context), expected, rtol=0, atol=1e-6)

    def test_the_context_stands_behind_the_first_special_token(self, encoder):
        table = encoder.model.text_encoder.embeddings.word_embeddings.weight
        ids = encoder.tokenizer("photo of")["input_ids"]
        assert torch.equal(encoder.embed_words("photo of"), table[ids[1:-1]])

    def test_a_context_that_leaves_no_room_is_refused(self, encoder):
        room = 24 - 2 - len(encoder.embed_words("cat"))
        encoder.encode_with_context(["cat"], torch.zeros(room, 64))
        with pytest.raises(ValueError, match=f"'cat' behind a context of {room + 1} tokens is longer than the 24"):
            encoder.encode_with_context(["cat"], torch.zeros(room + 1, 64))


class TestTraining:
    def test_every_parameter_is_reached(self, encoder, generator):
        images = torch.randn(2, 3, 24, 24, generator=generator)
        similarity = encoder.image_tower(images) @ encoder.encode_text(NAMES).T * encoder.logit_scale.exp()
        similarity.square().sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters())

    def test_a_frozen_tower_has_no_gradient_and_is_explained_all_the_same(self, encoder, generator):
        adapt(encoder, Towers("frozen", "full", True))
        trace = encoder.image_tower.trace(torch.randn(2, 3, 24, 24, generator=generator), [-1])
        (gradient,) = torch.autograd.grad(trace.features.square().sum(), trace.attention)
        assert gradient.any()
        encoder.encode_text(NAMES).sum().backward()
        assert all(parameter.grad is None for parameter in encoder.tower_parameters("vision"))
        assert all(parameter.grad is not None for parameter in encoder.tower_parameters("text"))

    def test_every_kind_of_layer_can_be_adapted_in_both_towers(self, encoder, generator):
        images = torch.randn(2, 3, 24, 24, generator=generator)
        expected = encoder.image_tower(images).detach(), encoder.encode_text(NAMES).detach()
        before, names = encoder.fingerprint(), encoder.projections("vision")
        adapt(encoder, Towers("lora", "lora", False, LoraConfig(targets=("q", "k", "v", "out", "mlp"))))
        torch.testing.assert_close(encoder.image_tower(images), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.encode_text(NAMES), expected[1], rtol=0, atol=1e-6)
        assert encoder.fingerprint() == before
        assert encoder.projections("vision") == names
        (encoder.image_tower(images).square().sum() + encoder.encode_text(NAMES).square().sum()).backward()
        low_rank = {name: value for name, value in encoder.named_parameters() if "lora_B" in name}
        assert len(low_rank) == 4 * 3 + 6 * 2
        assert all(value.grad.any() for value in low_rank.values())

    def test_saved_with_what_was_learned_it_computes_the_same(self, tmp_path, encoder, generator):
        adapt(encoder, Towers("lora", "lora", False, LoraConfig()))
        with torch.no_grad():
            for name, value in encoder.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.1, generator=generator)
        encoder.save(tmp_path / "merged")
        again = backbone.load(str(tmp_path / "merged"))
        images = torch.randn(2, 3, 24, 24, generator=generator)
        torch.testing.assert_close(again.image_tower(images), encoder.image_tower(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(again.encode_text(NAMES), encoder.encode_text(NAMES), rtol=0, atol=1e-5)
