import pytest
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from pydantic import BaseModel, ValidationError

from evidence_ft.config import parse, parse_command_line
from evidence_ft.prompts import Templates, class_features, fill


class Settings(BaseModel):
    templates: Templates


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a {}", ("a {}",)),
        (["a {}", "the {}"], ("a {}", "the {}")),
        (("a {}",), ("a {}",)),
    ],
)
def test_one_template_or_a_list_of_them_can_be_given(given, read):
    assert Settings(templates=given).templates == read


@pytest.mark.parametrize(("name", "number"), [("clip_7", 7), ("clip_80", 80)])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_name_stands_for_clips_own_templates(name, number, as_list):
    templates = Settings(templates=[name] if as_list else name).templates
    assert len(templates) == number
    assert "itap of a {}." in templates
    assert set(fill(templates, ["cat"])) <= {template("cat") for template in OPENAI_IMAGENET_TEMPLATES}


def test_a_name_can_stand_beside_templates_of_ones_own():
    assert Settings(templates=["clip_7", "a {}"]).templates[6:] == ("a photo of the small {}.", "a {}")


def test_templates_that_were_read_are_read_again_as_they_are():
    templates = Settings(templates="clip_80").templates
    assert Settings(templates=templates).templates == templates


@pytest.mark.parametrize("given", ["a photo", "a {} and a {}", "a {name}", "a {} {x}", "clip_8"])
def test_a_template_without_exactly_one_place_is_refused(given):
    for templates in (given, ["a {}", given]):
        with pytest.raises(ValidationError, match=r"expected exactly one \{\}.*or clip_7 or clip_80"):
            Settings(templates=templates)


@pytest.mark.parametrize("given", [[], 7, [7], None])
def test_templates_must_be_texts_and_at_least_one(given):
    with pytest.raises(ValidationError):
        Settings(templates=given)


def test_yaml_and_flags_take_templates_alike(tmp_path):
    assert parse({"method": {"name": "flcp", "templates": "a {}"}}).method.templates == ("a {}",)
    file = tmp_path / "config.yaml"
    file.write_text("method: {templates: clip_7}\n")
    assert len(parse_command_line(file, "", []).method.templates) == 7
    flags = ["--method.templates", "a photo of a {}", "an image of a {}"]
    assert parse_command_line(file, "", flags).method.templates == ("a photo of a {}", "an image of a {}")
    assert len(parse_command_line(file, "", ["--method.templates", "clip_80"]).method.templates) == 80


def test_underscores_in_names_read_as_spaces():
    assert fill("a {}!", ["sea_lion", "cat"]) == ["a sea lion!", "a cat!"]


def test_an_ensemble_is_the_mean_of_features_of_unit_length(native_encoder):
    features = class_features(native_encoder, ["cat", "dog"], ["a photo of a {}", "an image of the {}", "{}"])
    for row, name in enumerate(["cat", "dog"]):
        total = torch.zeros(10)
        for text in (f"a photo of a {name}", f"an image of the {name}", name):
            feature = native_encoder.encode_text([text])[0]
            total += feature / feature.norm()
        torch.testing.assert_close(features[row], total / total.norm())


def test_one_template_is_its_own_ensemble(native_encoder):
    features = class_features(native_encoder, ["cat", "dog"], "a {}")
    texts = native_encoder.encode_text(["a cat", "a dog"])
    torch.testing.assert_close(features, texts / texts.norm(dim=1, keepdim=True))
