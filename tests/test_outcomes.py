"""Outcomes come back as they were, or with an error that names the file and the column."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save as save_tensors

from evidence_ft.files import RunFileError
from evidence_ft.metrics import Rationality
from evidence_ft.outcomes import Gallery, Outcomes, summarise

NAN = float("nan")

COLUMNS = {
    "sample_id": ["a", "b", "c", "d", "e"],
    "label": [0, 1, 2, 0, 1],
    "prediction": [0, 1, 0, 0, 2],
    "confidence": [0.9, 0.8, 0.7, 0.6, 0.5],
    "rma": [0.75, 0.25, 0.5, NAN, 0.0],
    "mask_share": [0.5, 0.25, 0.125, NAN, 0.75],
    "heatmap_mass": [1.0, 2.0, 3.0, 4.0, 0.0],
    "mask_source": ["mask", "box", "mask", "none", "box"],
    "swapped_prediction": [0, 2, 2, None, 1],
    "class_names": ["cat", "dog", "Übergröße <b>"],
    "split": "test",
}


def outcomes_with(**changes):
    return Outcomes.from_columns(**(COLUMNS | changes))


def a_gallery():
    generator = torch.Generator().manual_seed(0)
    return Gallery(
        images=torch.randint(256, (3, 8, 12, 3), generator=generator, dtype=torch.uint8),
        masks=torch.randint(2, (3, 8, 12), generator=generator, dtype=torch.uint8),
        heatmaps=torch.rand(3, 2, 3, generator=generator),
        rows=torch.tensor([4, 0, 2]),
    )


def test_outcomes_come_back_as_they_were(tmp_path):
    written = outcomes_with()
    written.write(tmp_path / "outcomes" / "test.parquet")
    read = Outcomes.read(tmp_path / "outcomes" / "test.parquet")
    assert read.table.schema.equals(written.table.schema, check_metadata=True)
    assert read.table.drop_columns(["rma", "mask_share"]).equals(written.table.drop_columns(["rma", "mask_share"]))
    torch.testing.assert_close(read.rma, written.rma, equal_nan=True)
    torch.testing.assert_close(read.mask_share, written.mask_share, equal_nan=True)


def test_the_table_on_disk_is_as_documented(tmp_path):
    outcomes_with().write(tmp_path / "test.parquet")
    schema = pq.read_schema(tmp_path / "test.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "sample_id": "string",
        "label": "int32",
        "prediction": "int32",
        "confidence": "float",
        "rma": "float",
        "mask_share": "float",
        "heatmap_mass": "float",
        "mask_source": "string",
        "swapped_prediction": "int32",
    }
    assert json.loads(schema.metadata[b"class_names"]) == ["cat", "dog", "Übergröße <b>"]
    assert schema.metadata[b"split"] == b"test"
    assert schema.metadata[b"format_version"] == b"1"


def test_the_same_outcomes_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        outcomes_with().write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_columns_as_tensors():
    outcomes = outcomes_with()
    assert outcomes.n == 5
    assert outcomes.class_names == ("cat", "dog", "Übergröße <b>")
    assert outcomes.split == "test"
    assert outcomes.sample_ids == ("a", "b", "c", "d", "e")
    assert outcomes.mask_sources == ("mask", "box", "mask", "none", "box")
    assert outcomes.labels.tolist() == [0, 1, 2, 0, 1]
    assert outcomes.predictions.tolist() == [0, 1, 0, 0, 2]
    assert outcomes.correct.tolist() == [True, True, False, True, False]
    torch.testing.assert_close(outcomes.confidence, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]))
    torch.testing.assert_close(outcomes.swapped_correct, torch.tensor([1.0, 0.0, 1.0, NAN, 1.0]), equal_nan=True)


def test_another_threshold_needs_no_model():
    outcomes = outcomes_with()
    assert outcomes.rationality() == Rationality(RR=1, RW=1, WR=1, WW=1)
    assert outcomes.rationality(0.2) == Rationality(RR=2, RW=0, WR=1, WW=1)
    # Of the right and annotated a and b, only a has a mask that covers half of the image.
    assert outcomes.uniform_PT() == 0.5
    assert outcomes.uniform_PT(0.2) == 1.0


def test_summary_by_hand():
    assert summarise(outcomes_with()) == {
        "n": 5,
        "n_annotated": 4,
        "correct": 3,
        "RR": 1,
        "RW": 1,
        "WR": 1,
        "WW": 1,
        "accuracy": 3 / 5,
        "PT": 1 / 2,
        "IR": 1 / 2,
        "RR_share": 1 / 4,
        "mean_RMA": 1.5 / 4,
        "empty_heatmaps": 1,
        "swapped_n": 4,
        "swapped_accuracy": 3 / 4,
        "uniform_PT": 1 / 2,
    }


def test_tensors_make_the_same_table():
    tensors = {
        name: torch.tensor(COLUMNS[name])
        for name in ("label", "prediction", "confidence", "rma", "mask_share", "heatmap_mass")
    }
    tensors["swapped_prediction"] = torch.tensor([0, 2, 2, -1, 1])
    torch.testing.assert_close(outcomes_with(**tensors).rma, outcomes_with().rma, equal_nan=True)
    assert (
        outcomes_with(**tensors)
        .table.drop_columns(["rma", "mask_share"])
        .equals(outcomes_with().table.drop_columns(["rma", "mask_share"]))
    )


def test_without_swapped_images_there_is_nothing_to_count():
    outcomes = outcomes_with(swapped_prediction=None)
    assert outcomes.swapped_n == 0
    assert math.isnan(summarise(outcomes)["swapped_accuracy"])


def test_a_table_without_images_is_a_table():
    empty = {name: [] for name in COLUMNS if name not in ("class_names", "split")}
    outcomes = outcomes_with(**empty)
    assert outcomes.n == 0
    assert outcomes.in_order_of([]).n == 0
    assert math.isnan(summarise(outcomes)["accuracy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_id": ["a", "b", "a", "d", "e"]}, "column sample_id has 'a' more than once"),
        ({"label": [0, 1, 2, 0]}, "column label has 4 values for 5 sample ids"),
        ({"label": [0, 1, 3, 0, 1]}, "column label is 3 for 'c', expected one of 3 classes"),
        ({"prediction": [0, 1, -1, 0, 2]}, "column prediction is -1 for 'c'"),
        ({"prediction": [0, 1, None, 0, 2]}, "column prediction has 1 nulls"),
        ({"prediction": [0, 1, "dog", 0, 2]}, "outcomes of test cannot be put into a table"),
        ({"confidence": [0.9, 0.8, 0.7, 0.6, NAN]}, "column confidence is nan for 'e'"),
        ({"confidence": [9.0, 0.8, 0.7, 0.6, 0.5]}, "column confidence is 9.0 for 'a'"),
        ({"rma": [1.5, 0.25, 0.5, NAN, 0.0]}, "column rma is 1.5 for 'a', expected a share"),
        ({"rma": [0.75, NAN, 0.5, NAN, 0.0]}, "rma and mask_share disagree on whether 'b' has evidence"),
        (
            {"rma": [0.75, 0.25, 0.5, NAN, 0.1]},
            "column rma is 0.1 for 'e', expected 0: its heatmap_mass is 0",
        ),
        ({"mask_source": ["none", "box", "mask", "none", "box"]}, "for 'a', expected NaN: its mask_source"),
        ({"mask_source": ["mask", "blob", "mask", "none", "box"]}, "column mask_source is blob for 'b'"),
        ({"heatmap_mass": [-1.0, 2.0, 3.0, 4.0, 0.0]}, "column heatmap_mass is -1.0 for 'a'"),
        ({"heatmap_mass": [1.0, 2.0, 3.0, NAN, 0.0]}, "column heatmap_mass is nan for 'd'"),
        ({"swapped_prediction": [0, 2, 3, None, 1]}, "column swapped_prediction is 3 for 'c'"),
    ],
)
def test_outcomes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        outcomes_with(**changes)


def test_an_annotated_image_may_have_no_evidence_in_view():
    outcomes = outcomes_with(rma=[NAN, 0.25, 0.5, NAN, 0.0], mask_share=[NAN, 0.25, 0.125, NAN, 0.75])
    assert outcomes.n_annotated == 3


def test_reading_names_the_file_and_the_column(tmp_path):
    table = outcomes_with().table
    broken = table.set_column(5, "mask_share", table.column("mask_share").cast(pa.float64()))
    pq.write_table(broken, tmp_path / "test.parquet")
    with pytest.raises(RunFileError, match=r"test\.parquet: column mask_share is double, expected float"):
        Outcomes.read(tmp_path / "test.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["rma"]), "columns are .* expected"),
        (lambda table: table.replace_schema_metadata({}), "no class_names in the metadata"),
        (
            lambda table: table.replace_schema_metadata(table.schema.metadata | {b"format_version": b"99"}),
            "format_version is 99, expected 1",
        ),
    ],
)
def test_a_foreign_table_is_refused(tmp_path, change, message):
    pq.write_table(change(outcomes_with().table), tmp_path / "test.parquet")
    with pytest.raises(RunFileError, match=message):
        Outcomes.read(tmp_path / "test.parquet")


def test_missing_and_broken_outcomes_are_named(tmp_path):
    with pytest.raises(RunFileError, match=r"test\.parquet do not exist"):
        Outcomes.read(tmp_path / "test.parquet")
    (tmp_path / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(RunFileError, match=r"test\.parquet"):
        Outcomes.read(tmp_path / "test.parquet")


def test_tables_are_joined_by_id_not_by_position():
    shuffled = outcomes_with().in_order_of(["e", "c", "a", "d", "b"])
    assert shuffled.sample_ids == ("e", "c", "a", "d", "b")
    assert shuffled.labels.tolist() == [1, 2, 0, 0, 1]
    assert shuffled.class_names == outcomes_with().class_names


@pytest.mark.parametrize("ids", [["a", "b", "c", "d", "z"], ["a", "b", "c", "d"], ["a", "b", "c", "d", "d"]])
def test_other_ids_are_refused_by_name(ids):
    with pytest.raises(ValueError, match="only in these outcomes: 'e'"):
        outcomes_with().in_order_of(ids)


def test_a_gallery_comes_back_as_it_was(tmp_path):
    a_gallery().write(tmp_path / "gallery" / "test.safetensors")
    read = Gallery.read(tmp_path / "gallery" / "test.safetensors")
    assert all(torch.equal(*pair) for pair in zip(read, a_gallery(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 8, 12, 3)}, "images is torch.float32"),
        ({"rows": torch.tensor([0, 1])}, "their numbers differ"),
        ({"masks": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "do not match"),
        ({"images": torch.zeros(3, 8, 12, 1, dtype=torch.uint8)}, "do not match"),
    ],
)
def test_a_gallery_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        a_gallery()._replace(**changes).write(tmp_path / "test.safetensors")


def test_missing_and_broken_galleries_are_named(tmp_path):
    with pytest.raises(RunFileError, match=r"gallery .*test\.safetensors does not exist"):
        Gallery.read(tmp_path / "test.safetensors")
    (tmp_path / "test.safetensors").write_bytes(b"broken")
    with pytest.raises(RunFileError, match=r"gallery .*test\.safetensors: "):
        Gallery.read(tmp_path / "test.safetensors")
    (tmp_path / "test.safetensors").write_bytes(save_tensors({"images": torch.zeros(1)}))
    with pytest.raises(RunFileError, match="it holds 'images', expected 'images', 'masks'"):
        Gallery.read(tmp_path / "test.safetensors")
