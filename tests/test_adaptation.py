import copy
import json
from itertools import pairwise

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from evidence_ft.adaptation import (
    LoraConfig,
    Towers,
    adapt,
    interpolate,
    is_adapted,
    load_adapter,
    save_adapter,
    snapshot,
)
from evidence_ft.alignments import outside_mass
from evidence_ft.backbones import open_clip as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.heatmaps import gradient_attention
from tests.conftest import build_encoder

TEXTS = ["a photo of a cat", "a dog"]
BOTH = Towers("lora", "lora", train_logit_scale=True, lora=LoraConfig())
EVERYTHING = Towers("lora", "lora", train_logit_scale=False, lora=LoraConfig(targets=("q", "k", "v", "out", "mlp")))


def images_for(encoder):
    return torch.randn(2, 3, *encoder.preprocessing.size, generator=torch.Generator().manual_seed(1))


def outputs(encoder):
    with torch.no_grad():
        return encoder.image_tower(images_for(encoder)), encoder.encode_text(TEXTS)


def assert_equal_outputs(encoder, expected, tolerance=0.0):
    for ours, theirs in zip(outputs(encoder), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def disturb(encoder):
    """Low-rank matrices as after training: what they add is no longer zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def adapted(kind="native", towers=EVERYTHING):
    encoder = build_encoder(kind)
    adapt(encoder, towers)
    return disturb(encoder)


def trained_names(encoder):
    return {name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad}


class TestModes:
    def test_full_trains_every_parameter_of_both_towers(self, encoder):
        adapt(encoder, Towers("full", "full", train_logit_scale=True))
        assert trained_names(encoder) == {name for name, _ in encoder.model.named_parameters()}

    def test_frozen_trains_nothing(self, encoder):
        adapt(encoder, Towers("frozen", "frozen", train_logit_scale=False))
        assert not trained_names(encoder)

    def test_each_tower_has_a_mode_of_its_own(self, encoder):
        adapt(encoder, Towers("lora", "full", train_logit_scale=False, lora=LoraConfig()))
        names = {name for name, _ in encoder.model.named_parameters()} - {"logit_scale"}
        expected = {name for name in names if "lora_" in name or not name.startswith("visual.")}
        assert trained_names(encoder) == expected
        assert all(name.startswith("visual.") for name in expected if "lora_" in name)

    def test_the_text_tower_is_adapted_alone(self, native_encoder):
        # Names in the image tower end as names in the text tower do.
        adapt(native_encoder, Towers("frozen", "lora", train_logit_scale=False, lora=LoraConfig()))
        assert trained_names(native_encoder) == {
            f"transformer.resblocks.0.attn.{projection}.lora_{matrix}.default.weight"
            for projection in ("q_proj", "v_proj")
            for matrix in "AB"
        }
        assert not any("lora_" in name for name, _ in native_encoder.image_tower.named_parameters())

    def test_every_block_of_an_adapted_tower_is_adapted(self, encoder):
        adapt(encoder, BOTH)
        blocks = encoder.image_tower.blocks()
        assert all(any("lora_B" in name for name, _ in block.named_parameters()) for block in blocks)

    @pytest.mark.parametrize("trained", [True, False])
    def test_the_logit_scale_has_a_switch_of_its_own(self, encoder, trained):
        adapt(encoder, Towers("lora", "lora", train_logit_scale=trained, lora=LoraConfig()))
        assert encoder.logit_scale.requires_grad is trained

    def test_an_adapted_encoder_can_be_frozen(self):
        encoder = adapted()
        expected = outputs(encoder)
        adapt(encoder, Towers("frozen", "frozen", train_logit_scale=False))
        assert not trained_names(encoder)
        assert_equal_outputs(encoder, expected)

    def test_lora_without_settings_is_refused(self, native_encoder):
        with pytest.raises(ValueError, match=r"vision and text tower .* give its settings"):
            adapt(native_encoder, Towers("lora", "lora", train_logit_scale=False))

    def test_other_settings_than_those_in_place_are_refused(self):
        encoder = adapted()
        with pytest.raises(ValueError, match="carries low-rank matrices with r = 8, not 4"):
            adapt(encoder, EVERYTHING._replace(lora=LoraConfig(rank=4, targets=EVERYTHING.lora.targets)))

    def test_full_training_beside_low_rank_matrices_is_refused(self):
        with pytest.raises(ValueError, match="vision tower carries low-rank matrices"):
            adapt(adapted(), Towers("full", "frozen", train_logit_scale=False))

    def test_a_tower_without_layers_to_adapt_is_named(self, native_encoder, monkeypatch):
        monkeypatch.setattr(native_encoder, "projections", lambda _tower: {"q": [], "v": [], "mlp": ["some.layer"]})
        with pytest.raises(ValueError, match=r"vision tower of 'tiny-native' has no 'q' layers .* found: mlp"):
            adapt(native_encoder, BOTH)


class TestLora:
    def test_it_changes_nothing_before_training(self, encoder):
        expected, fingerprint = outputs(encoder), encoder.fingerprint()
        adapt(encoder, EVERYTHING)
        assert is_adapted(encoder)
        assert_equal_outputs(encoder, expected, tolerance=1e-6)
        assert encoder.fingerprint() == fingerprint

    def test_it_computes_its_definition(self, native_encoder):
        adapt(native_encoder, Towers("lora", "frozen", False, LoraConfig(rank=3, alpha=12, targets=("out",))))
        layer = disturb(native_encoder).model.visual.transformer.resblocks[0].attn.out_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
        assert a.shape == (3, 24)
        expected = x @ layer.base_layer.weight.mT + layer.base_layer.bias + 12 / 3 * x @ (b @ a).mT
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)

    def test_its_dropout_is_off_in_evaluation_mode(self, native_encoder):
        adapt(native_encoder, EVERYTHING._replace(lora=LoraConfig(dropout=0.5)))
        disturb(native_encoder)
        assert_equal_outputs(native_encoder, outputs(native_encoder))
        native_encoder.train()
        assert not torch.equal(outputs(native_encoder)[0], outputs(native_encoder)[0])

    def test_a_second_adapt_keeps_what_was_trained(self, encoder):
        adapt(encoder, BOTH)
        disturb(encoder)
        expected = outputs(encoder)
        adapt(encoder, BOTH)
        assert_equal_outputs(encoder, expected)

    @pytest.mark.slow
    def test_frozen_weights_are_bit_identical_after_100_steps(self, encoder):
        adapt(encoder, BOTH)
        before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2, weight_decay=0.1)
        images = images_for(encoder)
        for step in range(100):
            optimizer.zero_grad()
            (encoder.image_tower(images) @ encoder.encode_text(TEXTS).mT * encoder.logit_scale).sum().backward()
            optimizer.step()
            if step % 25 == 0:
                encoder.weights()  # merges
        changed = {name for name, value in encoder.model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == trained_names(encoder)
        assert all("lora_" in name or name == "logit_scale" for name in changed)

    def test_the_evidence_loss_reaches_every_traced_matrix(self, encoder):
        adapt(encoder, Towers("lora", "frozen", False, EVERYTHING.lora))
        disturb(encoder)
        evidence_loss(encoder).backward()
        low_rank = [(name, value) for name, value in encoder.image_tower.named_parameters() if "lora_" in name]
        without = [name for name, value in low_rank if value.grad is None or not value.grad.any()]
        assert low_rank
        assert not without

    @pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
    def test_the_evidence_gradient_is_the_slope_of_the_evidence_loss(self, encoder, matrix):
        adapt(encoder, BOTH)
        disturb(encoder).double()
        low_rank = [value for name, value in encoder.image_tower.named_parameters() if matrix in name]
        gradients = torch.autograd.grad(evidence_loss(encoder), low_rank)
        generator = torch.Generator().manual_seed(3)
        directions = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in low_rank]
        predicted = sum((gradient * way).sum() for gradient, way in zip(gradients, directions, strict=True))
        step, losses = 1e-6, []
        for sign in (1, -2):  # one step ahead, then one behind
            with torch.no_grad():
                for value, way in zip(low_rank, directions, strict=True):
                    value += sign * step * way
            losses.append(evidence_loss(encoder))
        torch.testing.assert_close(predicted, (losses[0] - losses[1]) / (2 * step), rtol=1e-4, atol=0)

    def test_a_copied_encoder_has_matrices_of_its_own(self):
        encoder = adapted()
        fingerprint = encoder.fingerprint()
        other = copy.deepcopy(encoder)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        assert other.fingerprint() == build_encoder("native").fingerprint()
        assert encoder.fingerprint() == fingerprint


def evidence_loss(encoder):
    trace = encoder.image_tower.trace(images_for(encoder).to(encoder.logit_scale))
    heatmaps = gradient_attention.heatmap(trace, lambda features: features[:, 0], create_graph=True)
    masks = torch.zeros_like(heatmaps)
    masks[:, :2, 1:3] = 1
    return outside_mass.loss(heatmaps, masks).mean()


class TestFiles:
    @pytest.mark.parametrize("kind", ["native", "timm"])
    def test_peft_loads_what_was_saved(self, kind, tmp_path):
        encoder = adapted(kind)
        save_adapter(encoder, tmp_path)
        fresh = build_encoder(kind)
        fresh.split_attention()
        theirs = peft.PeftModel.from_pretrained(fresh.model, str(tmp_path)).eval()
        with torch.no_grad():
            features = theirs.encode_image(images_for(encoder)), theirs.encode_text(encoder.tokenizer(TEXTS))
        assert_equal_outputs(encoder, features)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    @pytest.mark.parametrize("kind", ["native", "timm"])
    def test_a_folder_of_peft_itself_loads_here(self, kind, tmp_path):
        encoder = adapted(kind)
        fresh = build_encoder(kind)
        fresh.split_attention()
        save_adapter(encoder, tmp_path / "ours")
        peft.PeftModel.from_pretrained(fresh.model, str(tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
        again = build_encoder(kind)
        load_adapter(again, tmp_path / "theirs")
        assert_equal_outputs(again, outputs(encoder))

    @pytest.mark.parametrize("kind", ["native", "timm"])
    @pytest.mark.parametrize("prepared", [False, True])
    def test_a_saved_adapter_gives_the_same_encoder(self, kind, prepared, tmp_path):
        encoder = adapted(kind)
        save_adapter(encoder, tmp_path)
        fresh = build_encoder(kind)
        if prepared:
            adapt(fresh, EVERYTHING)
        load_adapter(fresh, tmp_path)
        assert_equal_outputs(fresh, outputs(encoder))
        assert fresh.fingerprint() == encoder.fingerprint()
        assert bool(trained_names(fresh)) is prepared

    def test_a_loaded_adapter_can_be_trained_on(self, tmp_path):
        save_adapter(adapted(), tmp_path)
        encoder = build_encoder()
        load_adapter(encoder, tmp_path)
        adapt(encoder, EVERYTHING)
        assert_equal_outputs(encoder, outputs(adapted()))
        assert trained_names(encoder) == {name for name, _ in encoder.model.named_parameters() if "lora_" in name}

    @pytest.mark.parametrize("kind", ["native", "timm"])
    def test_a_saved_encoder_is_merged_and_loads_without_peft(self, kind, tmp_path):
        encoder = adapted(kind)
        encoder.save(tmp_path)
        merged = backbone.load(f"local-dir:{tmp_path}")
        assert_equal_outputs(merged, outputs(encoder), tolerance=1e-5)
        assert not is_adapted(merged)
        assert merged.model.state_dict().keys() == build_encoder(kind).model.state_dict().keys()
        assert merged.fingerprint() == encoder.fingerprint() != build_encoder(kind).fingerprint()

    def test_merging_leaves_the_live_model_as_it_is(self):
        encoder = adapted()
        before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
        encoder.weights()
        after = encoder.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_there_is_nothing_to_save_of_an_encoder_without_adapter(self, native_encoder, tmp_path):
        with pytest.raises(ValueError, match="no low-rank matrices"):
            save_adapter(native_encoder, tmp_path)

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_missing_file_is_named(self, native_encoder, tmp_path, file):
        save_adapter(adapted(), tmp_path)
        (tmp_path / file).unlink()
        with pytest.raises(CheckpointError, match=f"holds no {file}"):
            load_adapter(native_encoder, tmp_path)

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_damaged_file_is_refused(self, native_encoder, tmp_path, file):
        save_adapter(adapted(), tmp_path)
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:100])
        with pytest.raises(CheckpointError, match="cannot be read as a PEFT folder"):
            load_adapter(native_encoder, tmp_path)

    def test_an_adapter_of_another_kind_is_refused(self, native_encoder, tmp_path):
        save_adapter(adapted(), tmp_path)
        peft.IA3Config(target_modules=["c_fc"], feedforward_modules=["c_fc"]).save_pretrained(str(tmp_path))
        with pytest.raises(CheckpointError, match="expected LORA"):
            load_adapter(native_encoder, tmp_path)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda state, name: state.pop(name), r"resblocks\.0\.attn\.k_proj\.lora_A\.weight is missing"),
            (lambda state, name: state.update({f"{name}s": state[name].clone()}), r"lora_A\.weights is not expected"),
            (
                lambda state, name: state.update({name: state[name][:, 1:].contiguous()}),
                r"has shape \(8, 15\), expected \(8, 16\)",
            ),
        ],
    )
    def test_weights_that_do_not_fit_are_named(self, native_encoder, tmp_path, edit, message):
        save_adapter(adapted(), tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        state = load_file(path)
        edit(state, "base_model.model.transformer.resblocks.0.attn.k_proj.lora_A.weight")
        save_file(state, path)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(native_encoder, tmp_path)

    @pytest.mark.parametrize("prepared", [False, True])
    def test_the_adapter_of_another_model_is_refused(self, tmp_path, prepared):
        save_adapter(adapted("timm", BOTH), tmp_path)
        native = build_encoder("native")
        if prepared:
            adapt(native, BOTH)
        with pytest.raises(CheckpointError, match="does not fit 'tiny-native'"):
            load_adapter(native, tmp_path)

    def test_another_scale_than_the_prepared_one_is_refused(self, native_encoder, tmp_path):
        save_adapter(adapted(towers=BOTH), tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 32}))
        adapt(native_encoder, BOTH)
        with pytest.raises(CheckpointError, match=r"lora_alpha = 16\.0, not 32"):
            load_adapter(native_encoder, tmp_path)


class TestInterpolation:
    """WiSE-FT: what is between the weights at the start and the tuned ones."""

    SHARES = (0.0, 0.25, 0.5, 1.0)

    def tuned(self, towers):
        """An encoder and a head, their weights at the start, and after what might have been training."""
        encoder, head = build_encoder(), nn.Linear(10, 3)
        adapt(encoder, towers)
        start, first = snapshot(encoder, head), encoder.weights() | head.state_dict()
        first = {name: value.clone() for name, value in first.items()}
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in (*encoder.parameters(), *head.parameters()):
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        last = {name: value.clone() for name, value in (encoder.weights() | head.state_dict()).items()}
        return encoder, head, start, first, last

    @pytest.mark.parametrize("share", SHARES)
    @pytest.mark.parametrize("mode", ["full", "lora"])
    def test_every_weight_is_the_mean_of_start_and_end(self, mode, share):
        encoder, head, start, first, last = self.tuned(Towers(mode, mode, True, LoraConfig()))
        interpolate(encoder, head, start, share)
        now = encoder.weights() | head.state_dict()
        assert first.keys() == last.keys() == now.keys()
        expected = {name: (1 - share) * first[name].double() + share * last[name].double() for name in now}
        torch.testing.assert_close(now, {name: value.float() for name, value in expected.items()}, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("mode", ["full", "lora"])
    def test_the_ends_are_exact(self, mode):
        for share, end in ((0.0, "first"), (1.0, "last")):
            encoder, head, start, first, last = self.tuned(Towers(mode, mode, True, LoraConfig()))
            interpolate(encoder, head, start, share)
            expected = {"first": first, "last": last}[end]
            assert all(torch.equal(value, expected[name]) for name, value in encoder.weights().items())

    def test_what_is_frozen_is_not_touched(self):
        encoder, head, start, *_ = self.tuned(Towers("frozen", "full", False))
        before = [parameter.clone() for parameter in encoder.image_tower.parameters()]
        interpolate(encoder, head, start, 0.5)
        assert all(map(torch.equal, before, encoder.image_tower.parameters()))
        assert not any(name.startswith("encoder.model.visual") for name in start)

    def test_the_outputs_move_from_start_to_end(self):
        distances = []
        for share in self.SHARES:
            encoder, head, start, *_ = self.tuned(Towers("lora", "lora", False, LoraConfig()))
            interpolate(encoder, head, start, share)
            distances.append((outputs(encoder)[0] - outputs(build_encoder())[0]).norm().item())
        assert distances[0] == pytest.approx(0, abs=1e-5)
        assert all(earlier < later for earlier, later in pairwise(distances))

    def test_a_share_outside_the_unit_interval_is_refused(self, native_encoder):
        with pytest.raises(ValueError, match=r"1\.5, expected 0 to 1"):
            interpolate(native_encoder, nn.Module(), {}, 1.5)

    def test_the_snapshot_of_something_else_is_refused(self, native_encoder):
        start = snapshot(native_encoder, nn.Linear(10, 3))
        with pytest.raises(ValueError, match=r"head\.bias is not the same tensor"):
            interpolate(native_encoder, nn.Linear(10, 4), start, 0.5)
        with pytest.raises(ValueError, match=r"head\.bias is not the same tensor"):
            interpolate(native_encoder, nn.Module(), start, 0.5)

    def test_matrices_that_did_not_start_at_zero_are_refused(self):
        encoder = adapted()
        with pytest.raises(ValueError, match="was not zero when training started"):
            interpolate(encoder, nn.Module(), snapshot(encoder, nn.Module()), 0.5)
