from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from evidence_ft.heatmaps import gradient_attention
from evidence_ft.tower import UnsupportedTowerError, check_tower, check_trainable, resolve_layers


def images_for(encoder, count=2):
    return torch.randn(count, 3, *encoder.preprocessing.size, generator=torch.Generator().manual_seed(1))


def state_of(module):
    """Everything a trace could leave behind: hooks, flags and attributes of every submodule."""
    return {
        name: (
            sorted(part.__dict__),
            len(part._forward_hooks),
            len(part._forward_pre_hooks),
            getattr(part, "fused_attn", None),
            part.training,
            [parameter.requires_grad for parameter in part.parameters(recurse=False)],
        )
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize("layers", ["all", [-1], [0]])
def test_the_traced_features_are_the_plain_ones(encoder, layers):
    images = images_for(encoder)
    trace = encoder.image_tower.trace(images, layers)
    torch.testing.assert_close(trace.features, encoder.image_tower(images), rtol=1e-5, atol=1e-5)


def test_attention_comes_in_the_order_of_the_layers(encoder):
    images = images_for(encoder)
    everything = encoder.image_tower.trace(images, "all")
    two = encoder.image_tower.trace(images, [-1, 0])
    torch.testing.assert_close(two.attention[0], everything.attention[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two.attention[1], everything.attention[-1], rtol=1e-4, atol=1e-6)


def test_tracing_leaves_nothing_behind(encoder):
    before = state_of(encoder)
    encoder.image_tower.trace(images_for(encoder))
    assert state_of(encoder) == before
    assert torch.is_grad_enabled()


def test_tracing_leaves_nothing_behind_when_the_forward_pass_raises(encoder):
    before = state_of(encoder)
    with torch.no_grad():
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever the library raises for half a channel
            encoder.image_tower.trace(images_for(encoder)[:, :1])
        assert not torch.is_grad_enabled()
    assert state_of(encoder) == before


def test_tracing_twice_gives_what_tracing_once_gives(encoder):
    images = images_for(encoder)
    first, second = (encoder.image_tower.trace(images) for _ in range(2))
    assert torch.equal(first.features, second.features)
    assert all(torch.equal(a, b) for a, b in zip(first.attention, second.attention, strict=True))


@pytest.mark.parametrize("layers", ["all", [-1]])
def test_a_frozen_tower_can_still_be_explained(encoder, layers):
    images = images_for(encoder)
    expected = gradient_attention.heatmap(
        encoder.image_tower.trace(images, layers), lambda f: f[:, 0], create_graph=False
    )
    encoder.requires_grad_(False)
    with torch.no_grad():
        trace = encoder.image_tower.trace(images, layers)
        frozen = gradient_attention.heatmap(trace, lambda f: f[:, 0], create_graph=False)
    torch.testing.assert_close(frozen, expected)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_only_the_traced_block_leaves_fused_attention(native_encoder, monkeypatch):
    fused = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: fused.append(1) or original(*args, **options),
    )
    native_encoder.image_tower.trace(images_for(native_encoder), [-1])
    assert len(fused) == 2  # of three blocks


def test_inference_mode_is_refused_with_the_way_out(encoder):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad instead"):
        encoder.image_tower.trace(images_for(encoder))


def test_the_librarys_checkpointing_is_refused_with_the_way_out(encoder):
    encoder.model.set_grad_checkpointing(True)
    with pytest.raises(UnsupportedTowerError, match=r"set_grad_checkpointing\(False\).*set_checkpointing\(True\)"):
        encoder.image_tower.trace(images_for(encoder))


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"layers = \[12\], but the image tower has 12 blocks"):
        resolve_layers([12], depth=12)
    with pytest.raises(ValueError, match="layers = "):
        resolve_layers([], depth=12)
    assert resolve_layers([-1, 11, 0], depth=12) == [0, 11]


def evidence_gradients(encoder, layers):
    """Gradients of the share of each heatmap's mass that lies on its first patch, with the features' own loss."""
    encoder.zero_grad()
    trace = encoder.image_tower.trace(images_for(encoder), layers)
    heat = gradient_attention.heatmap(trace, lambda features: features.square().sum(-1), create_graph=True)
    loss = (heat[:, 0, 0] / heat.sum(dim=(1, 2))).sum() + trace.features.square().mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in encoder.image_tower.named_parameters()}


def computations_of(block):
    """A list that grows whenever the block is computed."""
    computed = []
    next(block.children()).register_forward_hook(lambda *_: computed.append(1))
    return computed


class TestCheckpointing:
    """Activations are computed twice instead of kept, and nothing else changes."""

    @pytest.mark.parametrize("layers", [[-1], [1], [1, -1], [0], "all"])
    def test_gradients_are_those_without_it(self, encoder, layers):
        encoder.train()
        expected = evidence_gradients(encoder, layers)
        encoder.image_tower.set_checkpointing(True)
        found = evidence_gradients(encoder, layers)
        assert {name for name, gradient in found.items() if gradient is not None} == {
            name for name, gradient in expected.items() if gradient is not None
        }
        assert all(torch.equal(found[name], expected[name]) for name in found if found[name] is not None)

    def test_blocks_below_the_first_traced_one_are_computed_twice_and_no_others(self, encoder):
        blocks = encoder.image_tower.blocks()
        encoder.image_tower.set_checkpointing(True)
        computed = [computations_of(blocks[layer]) for layer in (0, 1, -1)]
        evidence_gradients(encoder, [1])
        assert [len(each) for each in computed] == [2, 1, 1]

    def test_without_a_trace_every_block_is_computed_twice(self, encoder):
        computed = [computations_of(block) for block in encoder.image_tower.blocks()]
        encoder.image_tower.set_checkpointing(True)
        encoder.image_tower(images_for(encoder)).sum().backward()
        assert [len(each) for each in computed] == [2] * len(computed)

    def test_it_leaves_a_trace_as_it_was_found(self, encoder):
        encoder.image_tower.set_checkpointing(True)
        before = state_of(encoder)
        encoder.image_tower.trace(images_for(encoder), [-1])
        assert state_of(encoder) == before

    def test_switching_it_off_leaves_nothing_behind(self, encoder):
        before = state_of(encoder)
        encoder.image_tower.set_checkpointing(True)
        encoder.image_tower.set_checkpointing(True)
        assert state_of(encoder) != before
        encoder.image_tower.set_checkpointing(False)
        assert state_of(encoder) == before

    def test_where_it_saves_nothing_training_is_refused(self, encoder):
        tower = encoder.image_tower
        check_trainable(encoder, tower, "all")
        tower.set_checkpointing(True)
        check_trainable(encoder, tower, [-1])
        with pytest.raises(UnsupportedTowerError, match=r"saves nothing while layers = 'all'.*layers = \[-1\]"):
            check_trainable(encoder, tower, "all")


class TestCheckTrainable:
    """What would give a wrong gradient, or none, is refused with its reason before training."""

    def test_a_plain_encoder_passes(self, encoder):
        check_trainable(nn.Sequential(encoder), encoder.image_tower, [-1])

    def test_layers_that_do_not_exist(self, encoder):
        with pytest.raises(ValueError, match=r"layers = \[9\]"):
            check_trainable(encoder, encoder.image_tower, [9])

    def test_a_compiled_step(self, encoder):
        with pytest.raises(UnsupportedTowerError, match=r"the training step is compiled.*no second derivative"):
            check_trainable(torch.compile(encoder), encoder.image_tower, "all")

    def test_a_compiled_block_of_the_tower(self, encoder):
        encoder.image_tower.blocks()[1].compile()
        with pytest.raises(UnsupportedTowerError, match=r"blocks\.1 is compiled"):
            check_trainable(encoder, encoder.image_tower, [-1])
        with pytest.raises(UnsupportedTowerError, match=r"blocks\.1 is compiled"):
            encoder.image_tower.trace(images_for(encoder), [-1])

    def test_a_compiled_text_tower_passes(self, native_encoder):
        native_encoder.model.transformer = torch.compile(native_encoder.model.transformer)
        check_trainable(native_encoder, native_encoder.image_tower, "all")

    def test_blocks_that_accelerate_wrapped_for_checkpointing(self, native_encoder):
        blocks = native_encoder.model.visual.transformer.resblocks
        blocks[0] = checkpoint_wrapper(blocks[0])
        with pytest.raises(UnsupportedTowerError, match=r"resblocks\.0 is wrapped.*set_checkpointing"):
            check_trainable(native_encoder, native_encoder.image_tower, [-1])

    def test_fsdp1(self, encoder):
        sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its __init__ wants several processes
        nn.Module.__init__(sharded)
        sharded.module = encoder
        with pytest.raises(UnsupportedTowerError, match=r"FSDP1.*fsdp_version: 2"):
            check_trainable(sharded, encoder.image_tower, "all")


class TestCheckTower:
    """The capability self-test names what is wrong."""

    def tampered(self, encoder, change):
        tower = encoder.image_tower
        original = tower.explicit_attention

        @contextmanager
        def explicit_attention(block, keep):
            with original(block, lambda attention: keep(change(attention))):
                yield

        tower.explicit_attention = explicit_attention
        return tower

    def test_a_sound_tower_passes_and_stays_as_it_was(self, encoder):
        before = state_of(encoder)
        check_tower(encoder.image_tower, encoder.preprocessing.size)
        assert state_of(encoder) == before

    def test_weights_that_are_no_numbers(self, encoder):
        with torch.no_grad():
            next(encoder.image_tower.parameters()).fill_(torch.nan)
        with pytest.raises(UnsupportedTowerError, match="the weights hold NaN"):
            check_tower(encoder.image_tower, encoder.preprocessing.size)

    def test_attention_off_the_path_is_inert(self, encoder):
        tower = self.tampered(encoder, lambda attention: attention.detach().clone().requires_grad_())
        with pytest.raises(UnsupportedTowerError, match="no gradient"):
            check_tower(tower, encoder.preprocessing.size)

    def test_rows_that_are_no_distribution(self, encoder):
        tower = self.tampered(encoder, lambda attention: attention * 2)
        with pytest.raises(UnsupportedTowerError, match="sum to 1"):
            check_tower(tower, encoder.preprocessing.size)

    def test_a_wrong_number_of_tokens(self, encoder):
        tower = encoder.image_tower
        tower.grid = (1, 1)
        with pytest.raises(UnsupportedTowerError, match="1x1 grid"):
            check_tower(tower, encoder.preprocessing.size)

    def test_features_that_change_under_tracing(self, encoder):
        tower = encoder.image_tower
        block = tower.blocks()[-1]
        original = tower.explicit_attention

        @contextmanager
        def explicit_attention(current, keep):
            hook = block.register_forward_hook(lambda _m, _i, output: output + 0.01 * torch.randn_like(output))
            with original(current, keep):
                yield
            hook.remove()

        tower.explicit_attention = explicit_attention
        with pytest.raises(UnsupportedTowerError, match="tracing changes the features"):
            check_tower(tower, encoder.preprocessing.size)


def test_weights_returned_by_multihead_attention_have_no_gradient():
    """Why attention is recomputed explicitly: the usual forward hook gives pictures, not gradients."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    tokens = torch.randn(1, 5, 8)
    output, weights = attention(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)
    assert torch.autograd.grad(output.sum(), weights, allow_unused=True) == (None,)
