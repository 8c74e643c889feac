import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from evidence_ft.backbones import open_clip as backbone
from evidence_ft.classifier import FineTuning, prompt_classifier
from evidence_ft.encoder import CheckpointError
from evidence_ft.evaluation import evaluate
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.methods import clip_adapter, coop, flcp, ft, lora, lp, lp_ft, tip_adapter, zero_shot
from evidence_ft.model import BaseModelRef, EvidenceModel, load_tuning, save_model
from evidence_ft.transforms import ModelInputs, SampleTransform
from tests.conftest import build_encoder
from tests.in_memory import InMemory

CLASSES = ("cat", "dog")
TUNED = {
    "zero_shot": (zero_shot, zero_shot.Config()),
    "lp": (lp, lp.Config()),
    "lp, random": (lp, lp.Config(head="random")),
    "flcp": (flcp, flcp.Config()),
    "flcp, image tower": (flcp, flcp.Config(text="frozen")),
    "flcp, LoRA in the text tower": (flcp, flcp.Config(vision="frozen", text="lora")),
    "ft": (ft, ft.Config()),
    "ft, LoRA": (ft, ft.Config(vision="lora")),
    "lora on flcp": (lora, lora.Config()),
    "lora on flcp, fixed scale": (lora, lora.Config(train_logit_scale=False)),
    "lora on ft": (lora, lora.Config(objective="ft")),
    "coop": (coop, coop.Config()),
    "coop, each class": (coop, coop.Config(init="random", context_length=2, class_specific=True)),
    "clip_adapter": (clip_adapter, clip_adapter.Config()),
    "tip_adapter": (tip_adapter, tip_adapter.Config()),
    "tip_adapter, trained": (tip_adapter, tip_adapter.Config(fine_tune=True)),
    "lp_ft": (lp_ft, lp_ft.Config()),
}
STORED = {
    "zero_shot": set(),
    "lp": {"head.safetensors"},
    "flcp": {"open_clip_config.json", "open_clip_model.safetensors"},
    "lora on flcp": {"adapter_config.json", "adapter_model.safetensors"},
    "lora on ft": {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that can be loaded by name."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    build_encoder("native").save(folder)
    return f"local-dir:{folder}"


class Tuned:
    """A method on a base model, its trained weights moved as training would move them."""

    def __init__(self, base, name):
        encoder = backbone.load(base)
        self.base = BaseModelRef.of(encoder)
        method, self.config = TUNED[name]
        self.tuning: FineTuning = method.prepare(encoder, CLASSES, self.config)
        generator = torch.Generator().manual_seed(3)
        if self.tuning.read_training_set is not None:
            width = encoder.encode_text(["a"]).shape[1]
            self.tuning.read_training_set(torch.randn(6, width, generator=generator), torch.arange(6) % 2)
        with torch.no_grad():
            for part in (encoder, self.tuning.head):
                for parameter in part.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    def save(self, folder, **changes):
        arguments = {"class_names": CLASSES, "method_config": self.config, "base": self.base} | changes
        save_model(folder, self.tuning, **arguments)
        return folder


def outcomes(tuning):
    inputs = ModelInputs(InMemory(12, size=(48, 32)), SampleTransform(tuning.encoder.preprocessing), seed=0)
    table = evaluate(tuning.classifier(), inputs, gradient_attention.heatmap, accelerator=Accelerator(cpu=True))
    return table.table.to_pydict()


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


def test_an_exported_adapter_is_merged_into_the_backbones_own_layout(base, tmp_path):
    folder = Tuned(base, "lora on flcp").save(tmp_path / "model")
    model = EvidenceModel.from_pretrained(folder)
    model.export(tmp_path / "merged")
    merged = open_clip.create_model(f"local-dir:{tmp_path / 'merged'}").eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = model.classifier.tower(images)
        untuned = backbone.load(base).image_tower(images)
        torch.testing.assert_close(merged.encode_image(images), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(untuned, expected, atol=1e-3)


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
        (lambda folder: (folder / "evidence_ft.json").write_text("{"), "evidence_ft.json is damaged: file: "),
        (lambda folder: change_manifest(folder, format_version=2), "format_version 2, expected 1; load it with the"),
        (lambda folder: change_manifest(folder, colour="red"), "damaged: colour: Extra inputs"),
        (lambda folder: change_manifest(folder, class_names=[]), "damaged: class_names: "),
        (lambda folder: change_manifest(folder, method={"name": "lpp"}), "no methods named 'lpp'; did you mean 'lp'"),
        (lambda folder: change_manifest(folder, method={"name": "a.b"}), "'a.b', which is not part of evidence_ft"),
        (lambda folder: change_manifest(folder, method={"name": "lp", "wait": 1}), "method.wait: Extra inputs"),
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
    for left in (".model.new", ".model.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("{")
    Tuned(base, "lp").save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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


# In use


@pytest.fixture
def model(base, tmp_path):
    return EvidenceModel.from_pretrained(Tuned(base, "lp").save(tmp_path / "model", layers=(-1,)))


def pictures(tmp_path):
    dataset = InMemory(5, size=(48, 32))
    images = [dataset[row].image for row in range(5)]
    paths = []
    for row, image in enumerate(images):
        paths.append(tmp_path / f"{row}.png")
        image.save(paths[-1])
    return images, paths


def test_predictions_are_those_of_the_evaluation(model, tmp_path):
    images, paths = pictures(tmp_path)
    expected = outcomes(model.tuning)
    found = model.predict(images, batch_size=2)
    assert found.labels.tolist() == expected["prediction"][:5]
    assert found.names == [CLASSES[label] for label in expected["prediction"][:5]]
    assert found.probabilities.max(dim=1).values.tolist() == pytest.approx(expected["confidence"][:5])
    assert torch.allclose(found.probabilities.sum(dim=1), torch.ones(5))
    from_files = model.predict([paths[0], str(paths[1]), images[2]])
    torch.testing.assert_close(from_files.probabilities, found.probabilities[:3])
    assert model.predict(paths[0]).names == found.names[:1]


def test_images_of_any_mode_are_read_as_people_see_them(model):
    grey = Image.new("L", (48, 32), 77)
    torch.testing.assert_close(model.predict(grey).probabilities, model.predict(grey.convert("RGB")).probabilities)


def test_heatmaps_are_those_of_the_tower(model, tmp_path):
    images, paths = pictures(tmp_path)
    inputs = ModelInputs(InMemory(5, size=(48, 32)), SampleTransform(model.preprocessing), seed=0)
    pixels = torch.stack([inputs[row].images for row in range(5)])
    trace = model.classifier.tower.trace(pixels, (-1,))
    labels = torch.tensor([0, 1, 1, 0, 1])
    expected = gradient_attention.heatmap(trace, model.classifier.score_of(labels), create_graph=False)
    found = model.explain(images, [0, "dog", 1, "cat", 1], batch_size=2)
    assert (found.shape, found.dtype) == ((5, 4, 6), torch.float32)
    torch.testing.assert_close(found, expected.detach())
    predicted = model.predict(paths).labels.tolist()
    torch.testing.assert_close(model.explain(paths), model.explain(images, predicted))
    assert not torch.allclose(model.explain(images, layers="all"), model.explain(images))


def test_another_heatmap_can_explain(model):
    image = Image.new("RGB", (48, 32))
    flat = model.explain(image, heatmap=lambda trace, score, *, create_graph: torch.ones(1, *trace.grid))
    assert torch.equal(flat, torch.ones(1, 4, 6))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["emu"], "no class 'emu'; the model knows 'cat', 'dog'"), ([2], "no class 2"), ([0, 1], "2 labels for 1 images")],
)
def test_a_class_that_the_model_does_not_know_is_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        model.explain([Image.new("RGB", (48, 32))], labels)


def test_nothing_to_look_at_is_refused(model):
    with pytest.raises(ValueError, match="no images"):
        model.predict([])
    with pytest.raises(ValueError, match="image 0: found int, expected a PIL image or a path"):
        model.predict([3])


# The hub, without one


def test_a_hub_id_is_fetched_without_pickles(base, tmp_path, monkeypatch):
    folder = Tuned(base, "lp").save(tmp_path / "model")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert EvidenceModel.from_pretrained("me/cats", revision="v1").class_names == CLASSES
    assert (asked["name"], asked["revision"]) == ("me/cats", "v1")
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith(("bin", "pt", "pth", "pkl", "*"))]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    def offline(*_args, **_options):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'me/cats' is no folder here.*OfflineModeIsEnabled.* Without network"):
        EvidenceModel.from_pretrained("me/cats")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere"])
def test_a_path_that_leads_nowhere_does_not_ask_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        EvidenceModel.from_pretrained(name)


def test_a_model_is_uploaded_with_a_card_that_escapes_names(base, tmp_path, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            uploaded.update(private=private, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message, delete_patterns):
            assert "*.safetensors" in delete_patterns  # a head of another model must not stay
            uploaded["files"] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    folder = Tuned(base, "lp").save(tmp_path / "model", class_names=("cat|<b>", "dog"))
    model = EvidenceModel.from_pretrained(folder)
    metrics = {"test": {"accuracy": 0.75, "PT": float("nan"), "n": 12}}
    address = model.push_to_hub("me/cats", private=True, token="t", metrics=metrics, details={"weight": "a|b"})
    assert address == "https://hub/me/cats/commit/1"
    assert (uploaded["private"], uploaded["token"]) == (True, "t")
    assert set(uploaded["files"]) == {"evidence_ft.json", "head.safetensors", "README.md"}
    card = uploaded["files"]["README.md"].decode()
    assert "cat\\|&lt;b&gt;, dog" in card
    assert "<b>" not in card
    assert "| test | 0.750 | - | 12 |" in card
    assert "| weight | a\\|b |" in card
    assert 'EvidenceModel.from_pretrained("me/cats")' in card
    assert EvidenceModel.from_pretrained(tmp_path / "uploaded").class_names == ("cat|<b>", "dog")


def test_saving_into_a_folder_keeps_what_others_put_beside_the_model(tmp_path, base):
    folder = Tuned(base, "lp").save(tmp_path / "model")
    notes = folder / "notes.md"
    notes.write_text("mine")
    with pytest.raises(FileExistsError, match=r"'notes\.md'"):
        Tuned(base, "lp").save(folder)
    assert notes.read_text() == "mine"
    notes.unlink()
    assert (Tuned(base, "lp").save(folder) / "head.safetensors").is_file()
