import yaml

from evidence_ft.model_card import model_card

MANIFEST = {
    "base": {"checkpoint": "hf-hub:owner/clip", "sha256": "0" * 64},
    "encoder": "adapter",
    "trained": ("vision",),
    "method": {"name": "lora", "templates": ["a photo of a {}"]},
    "class_names": ("cat", "dog"),
    "heatmap": "gradient_attention",
    "layers": "all",
}


def card(**changes):
    given = {"title": "cats", "repo_id": "me/cats", "manifest": MANIFEST, "metrics": {}, "details": {}} | changes
    return model_card(**given)


def test_the_front_matter_names_the_base_model_of_the_hub():
    _, front, _ = card().split("---", 2)
    assert yaml.safe_load(front)["base_model"] == "owner/clip"
    local = MANIFEST | {"base": {"checkpoint": "local-dir:/home/me/clip", "sha256": "0" * 64}}
    _, front, _ = card(manifest=local).split("---", 2)
    assert "base_model" not in yaml.safe_load(front)


def test_metrics_make_one_row_each_and_gaps_are_dashes():
    lines = card(metrics={"baseline": {"accuracy": 0.5}, "tuned": {"accuracy": 0.75, "PT": 1.0}}).splitlines()
    assert "|  | accuracy | PT |" in lines
    assert "| baseline | 0.500 | - |" in lines
    assert "| tuned | 0.750 | 1.000 |" in lines


def test_without_metrics_nothing_is_said_of_them():
    assert "PT:" not in card()


def test_what_comes_from_users_cannot_become_markup():
    named = MANIFEST | {"class_names": ("<script>", "a|b\n# c")}
    text = card(title="`x` [y](z)", manifest=named, details={"note": "*bold*"})
    assert r"# \`x\` \[y\](z)" in text
    assert r"&lt;script&gt;, a\|b \# c" in text
    assert r"| note | \*bold\* |" in text
