"""Plain vision transformers: which methods take them, from which start, and what the others say."""

import pytest
import torch
from torch import nn

from evidence_ft.backbones import hf_vit, timm_vit
from evidence_ft.classifier import LinearHead
from evidence_ft.encoder import Encoder, OwnHead
from evidence_ft.methods import clip_adapter, coop, flcp, ft, lora, lp, lp_ft, tip_adapter, zero_shot
from evidence_ft.model import BaseModelRef, load_tuning, save_model
from tests.conftest import build_encoder
from tests.methods.fitting import NAMES, fit, losses, parameters, random_batch, read_training_set, trained

BACKBONES = {"timm_vit": timm_vit, "hf_vit": hf_vit}
METHODS = {
    "lp": (lp, {}),
    "ft": (ft, {}),
    "lp_ft": (lp_ft, {"l2": 1e-3, "probe_iterations": 3}),
    "lora": (lora, {"objective": "ft"}),
}


@pytest.fixture(scope="module", params=BACKBONES)
def checkpoint(request, tmp_path_factory):
    return request.param, BACKBONES[request.param].tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def plain(checkpoint):
    """Knows the classes cat, dog, sea lion, red_circle, and "tench, Tinca tinca"."""
    backbone, name = checkpoint
    return BACKBONES[backbone].load(name)


def library_logits(encoder, images):
    with torch.no_grad():
        found = encoder.model(images)
    return found if isinstance(found, torch.Tensor) else found.logits


def logits(tuning, images):
    classifier = tuning.classifier()
    with torch.no_grad():
        return classifier.head(classifier.tower(images))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("start", ["own", "random"])
def test_a_batch_is_learned_with_evidence(plain, name, start):
    module, settings = METHODS[name]
    tuning = module.prepare(plain, NAMES, module.Config(head=start, **settings))
    batch = random_batch(plain)
    read_training_set(tuning, batch)
    before = {each: parameter.detach().clone() for each, parameter in parameters(tuning).items()}
    history = fit(tuning, batch, steps=8, learning_rate=1e-2)
    moved = {each for each, parameter in parameters(tuning).items() if not torch.equal(parameter, before[each])}
    assert min(history[-3:]) < history[0]
    assert moved == set(trained(tuning))
    if name != "lp":
        _, evidence = losses(tuning, batch)
        evidence.backward()
        for block in plain.image_tower.blocks():
            assert any(p.grad is not None and p.grad.any() for p in block.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lp", "ft", "lora"])
def test_the_own_start_gives_the_logits_of_the_library(plain, name):
    module, settings = METHODS[name]
    names = ["cat", "dog", "sea lion", "red circle", "tench, Tinca tinca"]
    tuning = module.prepare(plain, names, module.Config(head="own", **settings))
    images = random_batch(plain).images
    assert torch.equal(logits(tuning, images), library_logits(plain, images))


def test_zero_shot_is_the_model_as_it_is(plain):
    tuning = zero_shot.prepare(plain, ["Sea_Lion", "Tinca tinca"], zero_shot.Config())
    images = random_batch(plain).images
    torch.testing.assert_close(logits(tuning, images), library_logits(plain, images)[:, [2, 4]])
    assert not tuning.trains
    assert not tuning.head.state_dict()


@pytest.mark.parametrize(
    ("module", "settings", "needed_by"),
    [
        (flcp, {}, "method flcp"),
        (coop, {}, "method coop"),
        (clip_adapter, {}, "method clip_adapter"),
        (tip_adapter, {}, "method tip_adapter"),
        (lora, {}, "method lora with objective 'flcp'"),
        (lp, {}, "head = 'zero_shot'"),
        (ft, {}, "head = 'zero_shot'"),
        (lp_ft, {}, "head = 'zero_shot'"),
        (lora, {"objective": "ft"}, "head = 'zero_shot'"),
    ],
)
def test_what_needs_texts_says_so_and_what_works(plain, module, settings, needed_by):
    with pytest.raises(
        ValueError, match=f"{needed_by} needs a text tower, which backbone '{plain.backbone}'"
    ) as refusal:
        module.prepare(plain, NAMES, module.Config(**settings))
    assert "choose method lp, lp_ft, ft, or lora with objective 'ft', each with head = 'own'" in str(refusal.value)


@pytest.mark.parametrize(("module", "settings"), [(lp, {"head": "own"}), (zero_shot, {})])
def test_classes_that_the_model_does_not_know_are_named(plain, module, settings):
    with pytest.raises(ValueError, match="no class named 'unicorn', 'griffin' among its 5") as refusal:
        module.prepare(plain, ["cat", "unicorn", "griffin"], module.Config(**settings))
    assert ("set head to 'random'" in str(refusal.value)) == (module is lp)


def test_a_model_with_texts_has_no_own_start():
    with pytest.raises(ValueError, match="without a classifier of its own; or set head to 'zero_shot' or 'random'"):
        lp.prepare(build_encoder(), NAMES, lp.Config(head="own"))


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_is_read_back(checkpoint, plain, name, tmp_path):
    module, settings = METHODS[name]
    config, base = module.Config(head="own", **settings), BaseModelRef.of(plain)
    tuning = module.prepare(plain, NAMES, config)
    batch = random_batch(plain)
    fit(tuning, batch, steps=2)
    save_model(tmp_path / "model", tuning, class_names=NAMES, method_config=config, base=base)
    again, manifest = load_tuning(tmp_path / "model")
    torch.testing.assert_close(logits(again, batch.images), logits(tuning, batch.images))
    assert (manifest.backbone, manifest.logit_scale) == (checkpoint[0], None)
    assert manifest.encoder == {"lp": "base", "lora": "adapter"}.get(name, "whole")
    assert set(manifest.trained) == ({"head"} if name == "lp" else {"vision", "head"})


class TestLinearHead:
    def test_reads_features_as_they_are_where_it_is_told_to(self, generator):
        layer, features = nn.Linear(10, 3), torch.randn(4, 10, generator=generator)
        head = LinearHead(layer.weight, layer.bias, unit_length=False)
        assert torch.equal(head(features), layer(features))

    def test_of_a_plain_model_reads_them_as_they_are_and_of_others_at_unit_length(self, plain):
        features = torch.ones(1, 24)
        one = lp.prepare(plain, NAMES, lp.Config(head="random")).head
        assert not torch.equal(one(features), one(2 * features))
        other = lp.prepare(build_encoder(), NAMES, lp.Config(head="random")).head
        torch.testing.assert_close(other(features[:, :10]), other(2 * features[:, :10]))


class TestOwnHead:
    HEAD = OwnHead(
        torch.arange(8.0).view(4, 2), torch.arange(4.0), ("crane, bird", "crane, machine", "sea_lion", "a, b")
    )

    @pytest.mark.parametrize(("names", "rows"), [(["Sea lion", "bird"], [2, 0]), (["crane, machine", "A, B"], [1, 3])])
    def test_rows_are_found_by_name_or_synonym(self, names, rows):
        weight, bias = self.HEAD.of(names)
        assert torch.equal(weight, self.HEAD.weight[rows])
        assert torch.equal(bias, self.HEAD.bias[rows])

    def test_a_synonym_of_two_classes_is_refused(self):
        with pytest.raises(
            ValueError, match=r"'crane' names 2 classes .*'crane, bird', 'crane, machine'; give the whole"
        ):
            self.HEAD.of(["sea lion", "crane"])

    def test_many_missing_names_are_counted(self):
        with pytest.raises(ValueError, match=r"no class named '0', '1', '2', '3', '4' and 2 more among its 4"):
            self.HEAD.of([str(number) for number in range(7)])

    def test_a_head_without_names_is_refused(self):
        with pytest.raises(ValueError, match="has 4 classes, but its checkpoint does not name them"):
            self.HEAD._replace(class_names=None).of(["cat"])


def test_a_plain_encoder_has_no_scale_to_constrain(plain):
    before = plain.fingerprint()
    plain.constrain()
    assert plain.fingerprint() == before
    assert isinstance(plain, Encoder)
