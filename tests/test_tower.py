from contextlib import contextmanager

import pytest
import torch
from torch import nn

from evidence_ft.heatmaps import gradient_attention
from evidence_ft.tower import UnsupportedTowerError, check_tower, resolve_layers


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


def test_activation_checkpointing_is_refused_with_the_way_out(encoder):
    encoder.model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match="set_grad_checkpointing"):
        encoder.image_tower.trace(images_for(encoder))


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"layers = \[12\], but the image tower has 12 blocks"):
        resolve_layers([12], depth=12)
    with pytest.raises(ValueError, match="layers = "):
        resolve_layers([], depth=12)
    assert resolve_layers([-1, 11, 0], depth=12) == [0, 11]


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
