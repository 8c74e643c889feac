"""A tuned model comes back from its folder as it was, or with one clear error."""

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from evidence_ft.backbones import open_clip as backbone
from evidence_ft.classifier import FineTuning, prompt_classifier
from evidence_ft.encoder import CheckpointError
from evidence_ft.methods import flcp
from evidence_ft.model import EvidenceModel
from evidence_ft.saved_model import BaseModelRef, load_tuning, save_model
from tests.conftest import build_encoder
from tests.tuned import CLASSES, TUNED, Tuned, outcomes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that can be loaded by name."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    build_encoder("native").save(folder)
    return f"local-dir:{folder}"


STORED = {
    "zero_shot": set(),
    "lp": {"head.safetensors"},
    "flcp": {"open_clip_config.json", "open_clip_model.safetensors"},
    "lora on flcp": {"adapter_config.json", "adapter_model.safetensors"},
    "lora on ft": {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"},
}


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_model_comes_back_with_identical_outcomes(name, base, tmp_path):
    tuned = Tuned(base, name)
    before = outcomes(tuned.tuning)
    tuned.save(tmp_path / "model")
    loaded, manifest = load_tuning(tmp_path / "model")
    assert outcomes(loaded) == before
    assert manifest.class_names == CLASSES
    assert loaded.encoder.logit_scale.item() == tuned.tuning.encoder.logit_scale.item()


@pytest.mark.parametrize("name", [name for name in TUNED if name not in ("zero_shot", "tip_adapter")])
def test_what_was_trained_makes_a_difference(name, base):
    # Otherwise the test above could not fail.
    moved = Tuned(base, name).tuning
    method, config = TUNED[name]
    with torch.random.fork_rng():
        fresh = method.prepare(backbone.load(base), CLASSES, config)
    assert outcomes(moved)["confidence"] != outcomes(fresh)["confidence"]


@pytest.mark.parametrize("name", STORED)
def test_frozen_parts_are_not_copied(name, base, tmp_path):
    Tuned(base, name).save(tmp_path / "model")
    found = {path.name for path in (tmp_path / "model").iterdir()} - {"README.md"}
    assert found == {"evidence_ft.json"} | STORED[name]


def test_a_fully_trained_encoder_is_loaded_by_open_clip_too(base, tmp_path):
    tuned = Tuned(base, "flcp")
    tuned.save(tmp_path / "model")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(image), tuned.tuning.encoder.image_tower(image))


def test_an_encoder_that_changed_is_kept_whatever_was_meant_to_be_trained(base, tmp_path):
    tuned = Tuned(base, "lp")
    with torch.no_grad():
        next(tuned.tuning.encoder.image_tower.parameters()).add_(1.0)
    before = outcomes(tuned.tuning)
    loaded, manifest = load_tuning(tuned.save(tmp_path / "model"))
    assert manifest.encoder == "whole"
    assert outcomes(loaded) == before


@pytest.mark.parametrize("name", ["flcp", "lora on flcp", "zero_shot"])
def test_a_model_without_a_base_to_load_is_kept_whole(name, base, tmp_path):
    tuned = Tuned(base, name)
    before = outcomes(tuned.tuning)
    tuned.save(tmp_path / "model", base=tuned.base._replace(checkpoint=None))
    loaded, _ = load_tuning(tmp_path / "model")
    for column, values in outcomes(loaded).items():
        if column in ("confidence", "rma", "heatmap_mass"):  # LoRA was merged, which rounds
            assert values == pytest.approx(before[column], rel=1e-4)
        else:
            assert values == before[column]


def test_one_tower_in_full_and_the_other_by_lora_are_kept_together(base, tmp_path, monkeypatch):
    monkeypatch.setitem(TUNED, "mixed", (flcp, flcp.Config(vision="full", text="lora")))
    tuned = Tuned(base, "mixed")
    before = outcomes(tuned.tuning)
    loaded, manifest = load_tuning(tuned.save(tmp_path / "model"))
    assert manifest.encoder == "whole"
    assert manifest.trained == ("vision", "text", "logit_scale")
    assert outcomes(loaded)["confidence"] == pytest.approx(before["confidence"], rel=1e-4)


def test_loading_takes_no_random_numbers(base, tmp_path):
    folder = Tuned(base, "lora on flcp").save(tmp_path / "model")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_tuning(folder)
    assert torch.equal(torch.rand(1), expected)


def test_a_loaded_model_can_be_saved_again(base, tmp_path):
    Tuned(base, "lora on ft").save(tmp_path / "model")
    model = EvidenceModel.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/evidence_ft.json").read_text() == (tmp_path / "model/evidence_ft.json").read_text()
    for file in ("adapter_model.safetensors", "head.safetensors"):
        first, second = load_file(tmp_path / "model" / file), load_file(tmp_path / "again" / file)
        assert all(torch.equal(first[name], second[name]) for name in first | second)


# What is damaged, or another


def change_manifest(folder, **changes):
    path = folder / "evidence_ft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_head(folder, **tensors):
    state = load_file(folder / "head.safetensors")
    state.update({name: value for name, value in tensors.items() if value is not None})
    save_file(
        {name: value for name, value in state.items() if tensors.get(name, 1) is not None}, folder / "head.safetensors"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "evidence_ft.json").unlink(), "holds no evidence_ft.json; expected a folder written"),
        (lambda folder: (folder / "evidence_ft.json").write_text("{"), "evidence_ft.json is damaged: "),
        (lambda folder: change_manifest(folder, format_version=2), "format_version 2, expected 1; load it with the"),
        (lambda folder: change_manifest(folder, colour="red"), "damaged: unknown key 'colour'"),
        (lambda folder: change_manifest(folder, class_names=[]), "damaged: class_names = "),
        (lambda folder: change_manifest(folder, method={"name": "lpp"}), "no methods named 'lpp'; did you mean 'lp'"),
        (lambda folder: change_manifest(folder, method={"name": "a.b"}), "'a.b', which is not part of evidence_ft"),
        (lambda folder: change_manifest(folder, method={"name": "lp", "wait": 1}), "unknown key 'method.wait'"),
        (lambda folder: change_manifest(folder, backbone="openclip"), "no backbones named 'openclip'"),
        (lambda folder: (folder / "head.safetensors").unlink(), "missing: 'bias', 'weight'; not expected: none"),
        (lambda folder: (folder / "head.safetensors").write_text("{"), "head.safetensors cannot be read"),
        (lambda folder: damage_head(folder, bias=None), "missing: 'bias'; not expected: none"),
        (lambda folder: damage_head(folder, scale=torch.ones(1)), "missing: none; not expected: 'scale'"),
        (lambda folder: damage_head(folder, bias=torch.ones(3)), "does not fit the method: .*size mismatch for bias"),
    ],
)
def test_a_damaged_folder_is_refused_with_one_clear_error(damage, message, base, tmp_path):
    folder = Tuned(base, "lp").save(tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_tuning(folder)


@pytest.mark.parametrize("name", ["lp", "lora on flcp"])
def test_another_base_model_is_refused(name, tmp_path):
    folder = tmp_path / "base"
    build_encoder("native", seed=0).save(folder)
    saved = Tuned(f"local-dir:{folder}", name).save(tmp_path / "model")
    build_encoder("native", seed=1).save(folder)
    with pytest.raises(CheckpointError, match=r"has SHA-256 .* was tuned from one with .* base="):
        load_tuning(saved)


def test_a_base_model_that_has_moved_is_named_again(tmp_path):
    build_encoder("native").save(tmp_path / "base")
    saved = Tuned(f"local-dir:{tmp_path / 'base'}", "lp").save(tmp_path / "model")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tuned from the base model 'local-dir:.*base'.* name it with base="):
        EvidenceModel.from_pretrained(saved)
    assert EvidenceModel.from_pretrained(saved, base=f"local-dir:{tmp_path / 'elsewhere'}").class_names == CLASSES


def test_a_folder_with_something_else_in_it_is_not_replaced(base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something other than a saved model"):
        Tuned(base, "lp").save(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_a_saved_model_is_replaced_as_a_whole(base, tmp_path):
    Tuned(base, "lora on ft").save(tmp_path / "model")
    Tuned(base, "lp").save(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"evidence_ft.json", "head.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_earlier_model_alone(base, tmp_path, monkeypatch):
    Tuned(base, "lp").save(tmp_path / "model")
    tuned = Tuned(base, "flcp")

    def half(folder):
        (folder / "open_clip_config.json").write_text("{")
        raise OSError("no space left on device")

    monkeypatch.setattr(tuned.tuning.encoder, "save", half)
    with pytest.raises(OSError, match="no space"):
        tuned.save(tmp_path / "model")
    assert load_tuning(tmp_path / "model")[1].method["name"] == "lp"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_cleared_away(base, tmp_path):
    Tuned(base, "lp").save(tmp_path / "model")
    for left in (".model.new", ".model.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("{")
    Tuned(base, "lp").save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_process_killed_between_its_two_renames_has_not_lost_the_old_model(base, tmp_path, monkeypatch):
    Tuned(base, "lp").save(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.old")
    tuned = Tuned(base, "flcp")
    monkeypatch.setattr(tuned.tuning.encoder, "save", lambda folder: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        tuned.save(tmp_path / "model")
    assert load_tuning(tmp_path / "model")[1].method["name"] == "lp"


def test_where_the_new_model_cannot_take_its_place_the_old_one_stays(base, tmp_path, monkeypatch):
    Tuned(base, "lp").save(tmp_path / "model")
    replace = Path.replace

    def no_space(path, target):
        if path.suffix == ".new":
            raise OSError("no space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        Tuned(base, "flcp").save(tmp_path / "model")
    assert load_tuning(tmp_path / "model")[1].method["name"] == "lp"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize("kind", ["lp", "lora on flcp"])
def test_weights_may_be_read_by_whom_the_files_beside_them_may_be(base, tmp_path, kind, mask):
    before = os.umask(mask)
    try:
        Tuned(base, kind).save(tmp_path / "model")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def own_prepare(encoder, class_names):
    encoder.requires_grad_(False)
    return FineTuning(encoder, None, lambda: prompt_classifier(encoder, class_names, "an old {}"))


def test_a_method_of_ones_own_is_handed_over_and_never_imported_by_name(base, tmp_path):
    tuned = Tuned(base, "zero_shot")
    own = own_prepare(tuned.tuning.encoder, CLASSES)
    save_model(
        tmp_path / "model", own, class_names=CLASSES, method_config={"name": "tests.own_prepare"}, base=tuned.base
    )
    with pytest.raises(CheckpointError, match=r"'tests.own_prepare', which is not part of evidence_ft.* method="):
        load_tuning(tmp_path / "model")
    loaded, _ = load_tuning(tmp_path / "model", method=own_prepare)
    assert outcomes(loaded) == outcomes(own)


def test_a_file_that_a_saved_folder_has_lost_is_named(tmp_path):
    encoder = backbone.load("toy_clip")
    tuning = flcp.prepare(encoder, CLASSES, flcp.Config())
    reference = BaseModelRef.of(encoder)._replace(checkpoint=None)
    save_model(tmp_path / "model", tuning, class_names=CLASSES, method_config=flcp.Config(), base=reference)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 'tokenizer\.json', which its evidence_ft\.json lists; copy the"):
        load_tuning(tmp_path / "model")


def test_saving_into_a_folder_keeps_what_others_put_beside_the_model(tmp_path, base):
    folder = Tuned(base, "lp").save(tmp_path / "model")
    notes = folder / "notes.md"
    notes.write_text("mine")
    with pytest.raises(FileExistsError, match=r"'notes\.md'"):
        Tuned(base, "lp").save(folder)
    assert notes.read_text() == "mine"
    notes.unlink()
    assert (Tuned(base, "lp").save(folder) / "head.safetensors").is_file()


def test_a_manifest_that_is_no_text_is_damaged(base, tmp_path):
    folder = Tuned(base, "lp").save(tmp_path / "model")
    (folder / "evidence_ft.json").write_bytes((folder / "evidence_ft.json").read_text().encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"evidence_ft\.json is damaged"):
        load_tuning(folder)
