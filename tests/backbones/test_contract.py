"""What every backbone must do. A new file in ``backbones`` is tested by being there, through its `tiny`.

A family's own tests export further kinds of its models as ``VARIANTS``: names, and what writes a model into a folder
and returns its backbone and checkpoint.
"""

import copy
import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from evidence_ft import backbones
from evidence_ft.adaptation import LoraConfig, Towers, adapt, load_adapter, save_adapter
from evidence_ft.alignments import outside_mass
from evidence_ft.encoder import DualEncoder
from evidence_ft.heatmaps import gradient_attention
from tests import by_definition

LAYERS = ("all", [-1])
TEXTS = ["a photo of a cat", "a dog"]
EVERY_ROLE = LoraConfig(rank=2, targets=("q", "k", "v", "out", "mlp"))

CANNOT_MATTER = {
    r"mask_token": "stands for patches that are hidden in pre-training, and none is",
}
"""Parameters that no loss on a heatmap can reach, beside the biases of keys: these add the same to all scores of a row,
which its softmax does not see."""


def tiny_of(name: str, folder: Path) -> tuple[str, str]:
    return name, importlib.import_module(f"evidence_ft.backbones.{name}").tiny(folder)


def every_variant():
    names = [module.name for module in pkgutil.iter_modules(backbones.__path__)]
    variants = {name: partial(tiny_of, name) for name in names}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path != Path(__file__):
            family = path.stem.removeprefix("test_")
            module = importlib.import_module(f"tests.backbones.{path.stem}")
            variants |= {f"{family}-{name}": make for name, make in getattr(module, "VARIANTS", {}).items()}
    return variants


VARIANTS = every_variant()


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def original(request, tmp_path_factory):
    """Loaded once, and nothing about it zero by chance: fresh biases are zero, where a lost one is not missed."""
    backbone, checkpoint = VARIANTS[request.param](tmp_path_factory.mktemp("tiny"))
    encoder = importlib.import_module(f"evidence_ft.backbones.{backbone}").load(checkpoint)
    generator = torch.Generator().manual_seed(0)
    scales = {
        id(parameter) for parameter in (getattr(encoder, "logit_scale", None), getattr(encoder, "logit_bias", None))
    }
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            if id(parameter) not in scales:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder


@pytest.fixture
def encoder(original):
    return copy.deepcopy(original)


@pytest.fixture
def dual(encoder):
    if not isinstance(encoder, DualEncoder):
        pytest.skip("a model of images alone")
    return encoder


def images_for(encoder, count=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, *encoder.preprocessing.size, generator=generator, dtype=torch.float64)
    return images.to(next(encoder.image_tower.parameters()))


def assert_close(found, expected, relative=1e-5):
    """To a share of the largest entry."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def load_again(encoder, folder):
    return importlib.import_module(f"evidence_ft.backbones.{encoder.backbone}").load(f"local-dir:{folder}")


def outputs(encoder):
    with torch.no_grad():
        features = [encoder.image_tower(images_for(encoder))]
        return [*features, encoder.encode_text(TEXTS)] if isinstance(encoder, DualEncoder) else features


def state_of(module):
    """Everything a trace could leave behind: attributes, hooks and settings of every part, and all tensors."""
    parts = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            inner = value.items() if isinstance(value, dict) else ()
            plain = isinstance(value, bool | int | float | str)
            parts[name, key] = (value if plain else id(value), [(k, id(v)) for k, v in inner])
        parts[name, "config"] = getattr(getattr(part, "config", None), "_attn_implementation", None)
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in module.parameters()]
    return parts, flags, [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]


def assert_same_state(found, expected):
    assert found[:2] == expected[:2]
    for one, other in zip(found[2], expected[2], strict=True):
        assert torch.equal(one, other)


def score(features: Tensor) -> Tensor:
    """A class's logit, as of a text: not linear in the features."""
    generator = torch.Generator().manual_seed(2)
    text = F.normalize(torch.randn(features.shape[-1], generator=generator, dtype=torch.float64), dim=0)
    return 10 * F.normalize(features, dim=-1) @ text.to(features)


class EvidenceLoss(nn.Module):
    """The alignment loss of a tower's heatmaps, in percent, so that derivatives are far above tolerances."""

    def __init__(self, encoder, layers, count=2):
        super().__init__()
        self.tower, self.layers, self.images = encoder.image_tower, layers, images_for(encoder, count)
        generator = torch.Generator().manual_seed(3)
        self.masks = (torch.rand(count, *self.tower.grid, generator=generator) > 0.5).to(self.images)

    def forward(self) -> Tensor:
        heat = gradient_attention.heatmap(self.tower.trace(self.images, self.layers), score, create_graph=True)
        return 100 * outside_mass.loss(heat, self.masks).sum()

    def along(self, steps: Tensor) -> Tensor:
        """The loss with every parameter moved in a random direction, each along with a few others by one step."""
        generator = torch.Generator().manual_seed(4)
        moved = {}
        for index, (name, start) in enumerate(self.named_parameters()):
            direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
            length = start.detach().norm().item() or 1.0
            moved[name] = start.detach() + steps[index % len(steps)] * length * direction / direction.norm()
        return functional_call(self, moved, ())


def in_double(encoder, monkeypatch):
    """In float64, also where the library has softmax compute in float32 whatever comes in."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda scores, dim=None, dtype=None, **_: softmax(scores, dim=dim))
    return encoder.double()


class TestTrace:
    @pytest.mark.parametrize("layers", LAYERS, ids=str)
    def test_features_are_the_same_traced_and_untraced(self, encoder, layers):
        images = images_for(encoder)
        assert_close(encoder.image_tower.trace(images, layers).features, encoder.image_tower(images))

    def test_it_leaves_the_model_as_it_was(self, encoder):
        before = state_of(encoder)
        encoder.image_tower.trace(images_for(encoder))
        encoder.image_tower.trace(images_for(encoder), [-1])
        assert_same_state(state_of(encoder), before)

    def test_it_leaves_the_model_as_it_was_where_it_fails(self, encoder):
        def fail(*_args):
            raise MemoryError

        hook = encoder.image_tower.blocks()[-1].register_forward_hook(fail)
        before = state_of(encoder)
        with pytest.raises(MemoryError):
            encoder.image_tower.trace(images_for(encoder))
        assert_same_state(state_of(encoder), before)
        hook.remove()

    def test_reading_the_last_blocks_tokens_gives_the_features(self, encoder):
        tower, kept = encoder.image_tower, []
        hook = tower.blocks()[-1].register_forward_hook(lambda _module, _args, output: kept.append(output))
        expected = tower(images_for(encoder))
        hook.remove()
        tokens = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        assert_close(tower.read(tokens).features, expected)

    def test_attention_and_pooling_are_distributions_over_the_tokens(self, encoder):
        tower = encoder.image_tower
        trace = tower.trace(images_for(encoder))
        tokens = tower.num_prefix_tokens + tower.grid[0] * tower.grid[1]
        assert len(trace.attention) == len(tower.blocks())
        for attention in (*trace.attention, trace.pooling):
            assert attention.shape[-1] == tokens
            assert attention.min() >= 0
            torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=0, atol=1e-5)

    def test_images_do_not_influence_each_other(self, encoder):
        images = images_for(encoder)
        whole = encoder.image_tower.trace(images).attention[-1]
        assert_close(encoder.image_tower.trace(images[1:2]).attention[-1], whole[1:2])


class TestHeatmap:
    @pytest.mark.parametrize("layers", LAYERS, ids=str)
    def test_it_equals_its_definition_image_by_image(self, encoder, layers, monkeypatch):
        tower = in_double(encoder, monkeypatch).image_tower
        images = images_for(encoder)
        heatmaps = gradient_attention.heatmap(tower.trace(images, layers), score, create_graph=False)
        for image, heatmap in zip(images, heatmaps, strict=True):
            trace = tower.trace(image[None], layers)
            probed = trace.pooling.requires_grad
            maps = (*trace.attention, trace.pooling) if probed else trace.attention
            pairs = [
                (
                    attention[0].detach(),
                    torch.autograd.grad(score(trace.features)[0], attention, retain_graph=True)[0][0],
                )
                for attention in maps
            ]
            expected = by_definition.generic_attention_attribution(
                *zip(*pairs[: len(trace.attention)], strict=True),
                probe=pairs[-1] if probed else None,
                shares=None if probed else trace.pooling[0].mean(0)[0].tolist(),
            )
            assert expected.max() > 0
            assert_close(heatmap.flatten(), expected[tower.num_prefix_tokens :])

    @pytest.mark.parametrize("layers", LAYERS, ids=str)
    def test_a_frozen_tower_has_that_of_a_trained_one(self, encoder, layers):
        images = images_for(encoder)
        expected = gradient_attention.heatmap(encoder.image_tower.trace(images, layers), score, create_graph=False)
        encoder.requires_grad_(False)
        with torch.no_grad():
            trace = encoder.image_tower.trace(images, layers)
            found = gradient_attention.heatmap(trace, score, create_graph=False)
        assert_close(found, expected)

    def test_it_is_in_float32_under_autocast(self, encoder):
        with torch.autocast("cpu", torch.bfloat16):
            trace = encoder.image_tower.trace(images_for(encoder))
            found = gradient_attention.heatmap(trace, score, create_graph=True)
            loss = outside_mass.loss(found, torch.ones_like(found)).sum()
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert found.flatten(1).any(dim=1).all()
        (loss + found.sum()).backward()
        gradients = [value.grad for value in encoder.image_tower.parameters() if value.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)


def plain_layer_norm(x, _shape, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


def no_steps():
    return torch.zeros(4, dtype=torch.float64, requires_grad=True)


class TestTraining:
    """Through the heatmap: its own gradient is part of what is differentiated."""

    @pytest.mark.parametrize("layers", LAYERS, ids=str)
    def test_a_loss_on_it_reaches_every_parameter_that_can_matter(self, encoder, layers, monkeypatch):
        in_double(encoder, monkeypatch).requires_grad_(True)
        names = {id(parameter): name for name, parameter in encoder.model.named_parameters()}
        trained = encoder.tower_parameters("vision")
        gradients = torch.autograd.grad(EvidenceLoss(encoder, layers)(), trained, allow_unused=True)
        largest = max(gradient.abs().max() for gradient in gradients if gradient is not None)
        reached = {
            names[id(parameter)]: gradient is not None and bool(gradient.abs().max() > 1e-9 * largest)
            for parameter, gradient in zip(trained, gradients, strict=True)
        }
        excused = "|".join((*CANNOT_MATTER, *map(re.escape, key_biases(encoder))))
        missed = [name for name, was in reached.items() if not was and not re.search(rf"({excused})$", name)]
        assert not missed

    @pytest.mark.parametrize("layers", LAYERS, ids=str)
    def test_the_gradient_matches_finite_differences(self, encoder, layers, monkeypatch):
        loss = EvidenceLoss(in_double(encoder, monkeypatch), layers)
        start = no_steps()
        assert torch.autograd.grad(loss.along(start), start)[0].abs().max() > 0.01  # far above the tolerance
        assert gradcheck(loss.along, (start,), atol=1e-6, rtol=1e-4, fast_mode=True)

    def test_the_gradient_of_that_gradient_matches_finite_differences(self, encoder, monkeypatch):
        # Training needs second derivatives of the tower, this check third ones. Those of torch's layer norm are wrong
        # (it takes mean and deviation for constants there), and those of fused attention do not exist.
        monkeypatch.setattr(F, "layer_norm", plain_layer_norm)
        loss = EvidenceLoss(in_double(encoder, monkeypatch), [-1])
        with sdpa_kernel(SDPBackend.MATH):
            assert gradgradcheck(loss.along, (no_steps(),), atol=1e-4, rtol=1e-4, fast_mode=True)


def key_biases(encoder) -> Sequence[str]:
    projections: Mapping[str, Sequence[str]] = encoder.projections("vision")
    alone = set(projections["k"]) - set(projections["q"])
    return [f"{name}.bias" for name in sorted(alone)]


def disturb(encoder):
    """Low-rank matrices as after training: what they add is no longer zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def low_rank_of(encoder):
    return {name: value for name, value in encoder.model.named_parameters() if "lora_" in name}


class TestLora:
    @pytest.fixture
    def adapted(self, encoder):
        towers = Towers("lora", "lora" if isinstance(encoder, DualEncoder) else "frozen", False, EVERY_ROLE)
        adapt(encoder, towers)
        return encoder

    def test_splitting_attention_changes_neither_outputs_nor_weights(self, encoder):
        expected, fingerprint = outputs(encoder), encoder.fingerprint()
        layout = {name: (value.shape, value.dtype) for name, value in encoder.weights().items()}
        encoder.split_attention()
        for found, before in zip(outputs(encoder), expected, strict=True):
            assert_close(found, before)
        assert {name: (value.shape, value.dtype) for name, value in encoder.weights().items()} == layout
        assert encoder.fingerprint() == fingerprint

    def test_every_block_has_every_role(self, encoder):
        encoder.split_attention()
        for tower in ("vision", "text") if isinstance(encoder, DualEncoder) else ("vision",):
            projections = encoder.projections(tower)
            assert set(projections) == set(EVERY_ROLE.targets)
            for names in projections.values():
                assert names
                assert all(type(encoder.model.get_submodule(name)).__mro__.count(nn.Linear) for name in names)
        depth = len(encoder.image_tower.blocks())
        assert all(len(names) % depth == 0 for names in encoder.projections("vision").values())

    def test_adapters_learn_and_frozen_weights_stay_bit_identical(self, adapted):
        before = {name: value.clone() for name, value in adapted.model.state_dict().items()}
        expected = adapted.weights().keys()
        disturb(adapted)
        low_rank = low_rank_of(adapted)
        optimizer = torch.optim.AdamW(low_rank.values(), lr=1e-2, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = EvidenceLoss(adapted, [-1])() + adapted.image_tower(images_for(adapted)).square().mean()
            if isinstance(adapted, DualEncoder):
                loss = loss + adapted.encode_text(TEXTS).square().mean()
            loss.backward()
            assert not [name for name, value in low_rank.items() if value.grad is None or not value.grad.any()]
            optimizer.step()
            assert adapted.weights().keys() == expected  # merges
        changed = {name for name, value in adapted.model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == low_rank.keys()

    def test_it_is_merged_where_the_encoder_is_saved(self, adapted, tmp_path):
        disturb(adapted).save(tmp_path)
        again = load_again(adapted, tmp_path)
        assert not low_rank_of(again)
        assert again.fingerprint() == adapted.fingerprint()
        for found, expected in zip(outputs(again), outputs(adapted), strict=True):
            assert_close(found, expected)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
    def test_it_is_written_as_a_peft_folder(self, adapted, original, tmp_path):
        save_adapter(disturb(adapted), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        ours, theirs = copy.deepcopy(original), copy.deepcopy(original)
        load_adapter(ours, tmp_path)
        theirs.split_attention()
        peft.PeftModel.from_pretrained(theirs.model, str(tmp_path)).eval()
        for again in (ours, theirs):
            for found, expected in zip(outputs(again), outputs(adapted), strict=True):
                assert_close(found, expected)


class TestFiles:
    def test_a_saved_encoder_is_the_same_when_it_is_loaded(self, encoder, tmp_path):
        encoder.save(tmp_path / "new" / "folder")
        again = load_again(encoder, tmp_path / "new" / "folder")
        assert again.fingerprint() == encoder.fingerprint()
        assert again.preprocessing == encoder.preprocessing
        for found, expected in zip(outputs(again), outputs(encoder), strict=True):
            assert torch.equal(found, expected)

    def test_weights_are_safetensors_that_anyone_may_read(self, encoder, tmp_path):
        encoder.save(tmp_path)
        assert list(tmp_path.glob("*.safetensors"))
        assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".bin", ".pt", ".pth", ".pkl")]
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in tmp_path.rglob("*") if path.is_file())


class TestText:
    def test_a_prompts_own_words_as_context_give_its_features(self, dual):
        context = dual.embed_words("a photo of a")
        assert context.shape[1] == dual.text_width
        expected = dual.encode_text(["a photo of a cat", "a photo of a red circle"])
        assert_close(dual.encode_with_context(["cat", "red circle"], context), expected)

    def test_the_batch_does_not_change_a_texts_features(self, dual):
        assert_close(dual.encode_text(TEXTS)[1:], dual.encode_text(TEXTS[1:]))

    def test_only_the_context_receives_gradients(self, dual):
        dual.requires_grad_(False)
        context = (
            torch.zeros(2, 3, dual.text_width).normal_(generator=torch.Generator().manual_seed(6)).requires_grad_()
        )
        dual.encode_with_context(["cat", "red circle"], context).square().sum().backward()
        assert context.grad.abs().sum(dim=-1).all()

    def test_texts_differ(self, dual):
        one, other = dual.encode_text(TEXTS)
        assert (one - other).abs().max() > 1e-3 * one.abs().max()
