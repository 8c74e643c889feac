"""A tuned model in use, exported and on the hub."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from evidence_ft.backbones import open_clip as backbone
from evidence_ft.encoder import CheckpointError
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.model import EvidenceModel
from evidence_ft.transforms import ModelInputs, SampleTransform
from tests.conftest import build_encoder
from tests.in_memory import InMemory
from tests.tuned import CLASSES, Tuned, outcomes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that can be loaded by name."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    build_encoder("native").save(folder)
    return f"local-dir:{folder}"


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


def test_an_export_replaces_nothing(base, tmp_path):
    folder = Tuned(base, "lora on flcp").save(tmp_path / "model")
    model = EvidenceModel.from_pretrained(folder)
    model.export(tmp_path / "merged")
    for full in (tmp_path / "merged", folder):
        with pytest.raises(FileExistsError, match=r"is not empty, and an export replaces nothing; choose another"):
            model.export(full)
    assert (folder / "evidence_ft.json").is_file()


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
    predicted = model.predict(paths).labels
    for labels in (predicted, predicted.numpy(), predicted.tolist()):
        torch.testing.assert_close(model.explain(paths), model.explain(images, labels))
    for label in ("dog", 1, np.int64(1), torch.tensor(1)):
        torch.testing.assert_close(model.explain(images[1], label), found[1:2])
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


def test_an_upload_without_network_is_one_clear_error(base, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, *_arguments, **_options):
            raise ConnectionError("Name or service not known")

    model = EvidenceModel.from_pretrained(Tuned(base, "lp").save(tmp_path / "model"))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(
        CheckpointError, match=r"not be uploaded to 'me/cats': ConnectionError: Name .* save_pretrained"
    ):
        model.push_to_hub("me/cats")
