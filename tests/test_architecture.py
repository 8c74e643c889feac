import ast
import subprocess
import sys
from pathlib import Path

import evidence_ft

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(evidence_ft.__file__).parent


def test_the_import_contracts_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_recipe_is_thin():
    programs = {"pretrain_toy_clip", "methods_on_shapes"}
    recipes = [path for path in (ROOT / "recipes").glob("*.py") if path.stem not in programs]
    assert recipes
    for recipe in recipes:
        assert len(recipe.read_text().splitlines()) <= 30, recipe.name


def test_importing_the_package_loads_no_model_library():
    code = "import sys, evidence_ft; assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_type_marker_is_part_of_the_package():
    assert (SOURCE / "py.typed").is_file()


def test_nothing_in_the_package_runs_what_a_file_says():
    for path in SOURCE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        assert not named & {"pickle.load", "pickle.loads", "yaml.load"}, path.name
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
        assert len(calls) == sum(ast.unparse(node) == "torch.load" for node in nodes), path.name  # under no other name
        for call in calls:
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            assert options.get("weights_only") == "True", path.name
