"""Every file of a family exports its verb, with the family's signature, and says where it comes from."""

import importlib
import inspect
import pkgutil

import pytest
from pydantic import BaseModel

VERBS = {
    "heatmaps": ("heatmap", ["trace", "score", "create_graph"]),
    "alignments": ("loss", ["heatmaps", "masks"]),
    "backbones": ("load", ["checkpoint"]),
    "datasets": ("load", ["config", "split"]),
    "methods": ("prepare", ["encoder", "class_names", "config"]),
}


def modules():
    for family in VERBS:
        package = importlib.import_module(f"evidence_ft.{family}")
        for module in pkgutil.iter_modules(package.__path__):
            yield pytest.param(family, module.name, id=f"{family}.{module.name}")


@pytest.mark.parametrize(("family", "name"), list(modules()))
def test_a_member_exports_its_familys_verb(family, name):
    module = importlib.import_module(f"evidence_ft.{family}.{name}")
    verb, parameters = VERBS[family]
    assert list(inspect.signature(getattr(module, verb)).parameters) == parameters
    if family in ("datasets", "methods"):
        assert issubclass(module.Config, BaseModel)
        assert all(field.description for field in module.Config.model_fields.values())
    if family in ("heatmaps", "alignments"):
        assert "arXiv" in module.__doc__


def test_every_family_has_members():
    assert {parameter.values[0] for parameter in modules()} == set(VERBS)
