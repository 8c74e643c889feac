import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertTokenizer

from evidence_ft import salesforce
from evidence_ft.encoder import CheckpointError
from tests import published

SMALL = {"image": 128, "text": 64, "depth": 2, "layers": 2, "patch": 8, "grid": 3, "vocabulary": 9, "positions": 12}


@pytest.mark.parametrize(
    ("checkpoint", "path", "size"),
    [
        ("weights/ALBEF.pth", "weights/ALBEF.pth", None),
        ("weights/ALBEF.pth@384", "weights/ALBEF.pth", 384),
        ("of me@home/model_base.pth", "of me@home/model_base.pth", None),
        ("ALBEF.safetensors@32", "ALBEF.safetensors", 32),
    ],
)
def test_a_file_may_name_the_resolution_it_is_used_with(checkpoint, path, size):
    file = salesforce.weights_file(checkpoint)
    assert (str(file.path), file.image_size) == (path, size)


@pytest.mark.parametrize("checkpoint", ["hf-hub:some/one", "local-dir:/some/where", "folder", "", "x.pth@0", "x.pth@a"])
def test_other_names_are_no_files(checkpoint):
    assert salesforce.weights_file(checkpoint) is None


def test_a_folder_called_like_a_file_is_a_folder(tmp_path):
    (tmp_path / "x.pth").mkdir()
    assert salesforce.weights_file(str(tmp_path / "x.pth")) is None


class TestReadState:
    def test_what_is_left_out_is_listed_in_the_log(self, tmp_path, caplog):
        torch.save({"model": {"a": torch.ones(1), "a_m.b": torch.ones(1), "c.d": torch.ones(1)}}, tmp_path / "x.pth")
        with caplog.at_level(logging.INFO):
            assert set(salesforce.read_state(tmp_path / "x.pth", [r"a_m\..+", r"c"])) == {"a", "c.d"}
        assert "1 tensors are not needed and left out: a_m.b" in caplog.text

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_half_precision_becomes_float32(self, tmp_path, dtype):
        torch.save({"model": {"a": torch.ones(1, dtype=dtype)}}, tmp_path / "x.pth")
        assert salesforce.read_state(tmp_path / "x.pth")["a"].dtype == torch.float32

    def test_safetensors_are_read_without_nesting(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        assert torch.equal(salesforce.read_state(tmp_path / "x.safetensors")["a"], torch.ones(2))

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no weights file .*x\.pth"):
            salesforce.read_state(tmp_path / "x.pth")

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("length", [0, 5, 300])
    def test_a_truncated_file_is_refused(self, tmp_path, suffix, length):
        path = tmp_path / f"x.{suffix}"
        if suffix == "pth":
            torch.save({"model": {"a": torch.ones(1000)}}, path)
        else:
            save_file({"a": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(CheckpointError, match="is it damaged"):
            salesforce.read_state(path)

    def test_a_file_that_runs_code_is_refused(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return print, ("gotcha",)

        torch.save({"model": {"a": torch.ones(1)}, "more": Harmful()}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="could not read"):
            salesforce.read_state(tmp_path / "x.pth")

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ({"state_dict": {}, "epoch": 1}, "the entries state_dict, epoch"),
            ([1], "a list"),
            ({"model": {"a": 1}}, "the entries model"),
        ],
    )
    def test_another_nesting_is_refused(self, tmp_path, content, found):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=f"holds {found}; expected a dictionary whose entry 'model'"):
            salesforce.read_state(tmp_path / "x.pth")


class TestCheckState:
    def test_what_fits_is_taken(self, tmp_path):
        salesforce.check_state(tmp_path, {"a": torch.ones(2, 3)}, {"a": (2, 3)})

    def test_all_kinds_of_complaints_come_at_once(self, tmp_path):
        state = {"a": torch.ones(2), **{f"x{index}": torch.ones(1) for index in range(5)}}
        with pytest.raises(CheckpointError) as error:
            salesforce.check_state(tmp_path, state, {"a": (3,), "b": (1,)})
        assert "1 tensor is missing: b; 5 tensors are not expected: x0, x1, x2 and 2 more" in str(error.value)
        assert "1 tensor is of another shape: a (2,) instead of (3,)" in str(error.value)


class TestSizes:
    def state(self, **sizes):
        return published.random_state(published.blip(**SMALL | sizes))

    def test_they_are_read_off_the_tensors(self, tmp_path):
        assert salesforce.vision_sizes(tmp_path, self.state(), None) == (128, 2, 8, 24)

    def test_the_resolution_may_be_another_one(self, tmp_path):
        assert salesforce.vision_sizes(tmp_path, self.state(), 40).image_size == 40

    def test_a_resolution_that_patches_do_not_divide_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"images of 30 pixels were asked for, but .* has patches of 8"):
            salesforce.vision_sizes(tmp_path, self.state(), 30)

    def test_a_grid_that_is_not_square_is_refused(self, tmp_path):
        state = {**self.state(), "visual_encoder.pos_embed": torch.ones(1, 13, 128)}
        with pytest.raises(CheckpointError, match="positions for 13 tokens"):
            salesforce.vision_sizes(tmp_path, state, None)

    def test_a_published_width_has_its_published_depth_whatever_is_missing(self, tmp_path):
        with torch.device("meta"):
            state = {name: torch.empty(shape) for name, shape in published.blip(depth=11).items()}
        assert salesforce.vision_sizes(tmp_path, state, None).depth == 12

    def test_another_kind_of_model_is_refused(self, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"no visual_encoder\.pos_embed among conv1; expected a file of ALBEF"
        ):
            salesforce.vision_sizes(tmp_path, {"conv1": torch.ones(1)}, None)

    @pytest.mark.parametrize(("layers", "expected"), [(range(2, 4), 2), (range(4), 0), ((), 4)])
    def test_fusion_starts_at_the_first_layer_with_cross_attention(self, layers, expected):
        shapes = published.bert("bert", 64, 4, 9, 12, crossed=layers, seen=8, types=2)
        assert salesforce.fusion_start(published.random_state(shapes), "bert.encoder.layer") == expected


class TestInterpolatePositions:
    @pytest.mark.parametrize("side", [2, 3, 5, 7])
    def test_it_is_bicubic_and_leaves_the_cls_token_alone(self, side, generator):
        positions = torch.randn(1, 1 + 4 * 4, 6, generator=generator)
        expected = published.with_positions_for({"visual_encoder.pos_embed": positions}, side)
        found = salesforce.interpolate_positions(positions, side)
        torch.testing.assert_close(found, expected["visual_encoder.pos_embed"], rtol=0, atol=1e-5)

    def test_the_same_grid_keeps_every_bit(self, generator):
        positions = torch.randn(1, 10, 6, generator=generator)
        assert torch.equal(salesforce.interpolate_positions(positions, 3), positions)


@pytest.mark.parametrize(("temp", "expected"), [(0.07, math.log(1 / 0.07)), (1.0, 0.0), (0.5, math.log(2))])
def test_the_logit_scale_is_the_logarithm_of_the_inverse_temperature(tmp_path, temp, expected):
    temp = torch.tensor(temp, dtype=torch.float64)
    assert salesforce.inverse_temperature(tmp_path, temp) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("temp", [0.0, -1.0, math.nan, math.inf])
def test_no_temperature_is_refused(tmp_path, temp):
    with pytest.raises(CheckpointError, match="expected a positive number"):
        salesforce.inverse_temperature(tmp_path, torch.tensor(temp))


class TestTokenizer:
    @pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
    def test_it_is_read_from_beside_the_weights(self, tmp_path, file):
        tokenizer = salesforce.tiny_tokenizer()
        if file == "vocab.txt":
            words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
            (tmp_path / file).write_text("\n".join(words) + "\n")
        else:
            tokenizer.save_pretrained(tmp_path)
        text = "A photo of the red-winged blackbird."
        assert salesforce.bert_tokenizer(tmp_path)(text) == tokenizer(text)

    def test_without_one_it_is_berts(self, tmp_path, monkeypatch):
        asked = []

        def from_pretrained(name, *, local_files_only):
            asked.append((name, local_files_only))
            return salesforce.tiny_tokenizer()

        monkeypatch.setattr(BertTokenizer, "from_pretrained", from_pretrained)
        salesforce.bert_tokenizer(tmp_path)
        assert asked == [("google-bert/bert-base-uncased", False)]

    def test_without_network_it_says_what_to_put_where(self, tmp_path, monkeypatch):
        def no_network(*_args, **_options):
            raise OSError("no network")

        monkeypatch.setattr(BertTokenizer, "from_pretrained", no_network)
        with pytest.raises(
            CheckpointError, match=r"put tokenizer\.json or vocab\.txt of google-bert/bert-base-uncased"
        ):
            salesforce.bert_tokenizer(tmp_path)

    def test_a_damaged_one_is_refused(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=f"could not load the tokenizer in {tmp_path}.*copy it again"):
            salesforce.bert_tokenizer(tmp_path)

    def test_another_vocabulary_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"embeds 30522; expected the one it was trained with"):
            salesforce.check_vocabulary(tmp_path, salesforce.tiny_tokenizer(), 30522)
