"""What pydantic raises, as a person wants to read it."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from evidence_ft.complaints import complaints, dotted


class Settings(BaseModel, extra="forbid"):
    epochs: int = 1
    rate: FiniteFloat = Field(0.1, gt=0)
    flip: bool = True
    kind: Literal["fixed", "ratio"] = "fixed"
    layers: tuple[int, ...] | Literal["all"] = "all"
    size: tuple[float, float] = (1, 1)
    file: Path = Path()
    shots: int | None = None
    name: str = Field("a", pattern=r"^\w+$")

    @model_validator(mode="after")
    def _agree(self):
        if self.epochs == 7:
            raise ValueError("seven epochs are too many")
        return self


def complaints_about(tree, **options):
    with pytest.raises(ValidationError) as raised:
        Settings.model_validate(tree)
    return complaints(raised.value, **options)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"epochs": "ten"}, "epochs = 'ten': expected a whole number"),
        ({"epochs": 3.5}, "epochs = 3.5: expected a whole number"),
        ({"epochs": None}, "epochs = None: expected a whole number"),
        ({"rate": "fast"}, "rate = 'fast': expected a number"),
        ({"rate": 0}, "rate = 0: expected more than 0"),
        ({"rate": float("inf")}, "rate = inf: expected a finite number"),
        ({"flip": "perhaps"}, "flip = 'perhaps': expected true or false"),
        ({"kind": "x"}, "kind = 'x': expected 'fixed' or 'ratio'"),
        ({"size": [1, 2, 3]}, "size = [1, 2, 3]: expected at most 2 entries"),
        ({"file": 3}, "file = 3: expected a path"),
        ({"shots": "all"}, "shots = 'all': expected a whole number"),
        ({"name": "a b"}, r"name = 'a b': expected text like ^\w+$"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"epochs": 7}, "seven epochs are too many"),
        ([1], "found [1]: expected a section with keys"),
    ],
)
def test_a_complaint_says_what_was_found_and_what_was_expected(tree, expected):
    assert complaints_about(tree) == [expected]


def test_members_of_a_union_are_one_complaint_under_the_key_they_share():
    assert complaints_about({"layers": "top"}, key_of=lambda path: str(path[0])) == [
        "layers = 'top': expected a list or 'all'"
    ]


def test_each_key_has_its_complaint():
    found = complaints_about({"epochs": "x", "kind": "x"}, key_of=lambda path: dotted(["training", *path]))
    assert [each.partition(" ")[0] for each in found] == ["training.epochs", "training.kind"]
