"""What a run leaves behind comes back as it was, or with an error that names the file."""

import json
import math
import subprocess

import pytest
import yaml

from evidence_ft import runs
from evidence_ft.files import RunFileError
from evidence_ft.outcomes import Outcomes
from evidence_ft.runs import DataRecord, RunRecord, SkippedSample, StoredFile

NAN = float("nan")


def record_with(**changes):
    fields = {
        "arm": "evidence",
        "name": "toy",
        "seed": 0,
        "config": {"evaluation": {"threshold": 0.5, "layers": [-1]}, "training": {"learning_rate": 1e-5}},
        "environment": {"python": "3.11"},
        "model": {"checkpoint": "tiny", "sha256": "0" * 64},
        "data": {
            "test": DataRecord(
                fingerprint="f",
                n=5,
                annotated=4,
                skipped=(SkippedSample(sample_id="x", reason="unreadable"),),
            )
        },
        "training": {"steps": 10, "seconds": 2.5},
        "results": {"test": {"n": 5, "PT": 0.5, "IR": NAN}},
        "outcomes": {"test": StoredFile(file="outcomes/test.parquet", sha256="0" * 64)},
    }
    return RunRecord(**(fields | changes))


def test_a_record_comes_back_as_it_was(tmp_path):
    written = record_with(results={"test": {"n": 5, "PT": 0.5}})
    assert written.write(tmp_path) == tmp_path / "run.json"
    assert RunRecord.read(tmp_path) == written


def test_nan_is_null_in_a_record(tmp_path):
    record_with().write(tmp_path)
    assert RunRecord.read(tmp_path).results["test"] == {"n": 5, "PT": 0.5, "IR": None}
    assert json.loads((tmp_path / "run.json").read_text())["results"]["test"]["IR"] is None


def test_counts_stay_whole_numbers(tmp_path):
    record_with().write(tmp_path)
    assert isinstance(RunRecord.read(tmp_path).results["test"]["n"], int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree | {"sead": 1}, r"run\.json: unknown key 'sead'"),
        (
            lambda tree: {key: value for key, value in tree.items() if key != "seed"},
            r"run\.json: seed is missing",
        ),
        (lambda tree: tree | {"format_version": 2}, r"run\.json has format_version 2, expected 1"),
        (
            lambda tree: tree | {"data": {"test": {"n": -1}}},
            r"run\.json: data\.test\.fingerprint is missing.*data\.test\.n = -1",
        ),
        (lambda tree: tree | {"arm": "../x"}, r"run\.json: arm"),
        (lambda tree: [tree], r"run\.json: found \["),
    ],
)
def test_a_wrong_record_is_refused_with_file_and_key(tmp_path, change, message):
    path = record_with().write(tmp_path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(RunFileError, match=message):
        RunRecord.read(tmp_path)


def test_missing_and_broken_records_are_named(tmp_path):
    with pytest.raises(RunFileError, match=r"run\.json does not exist"):
        RunRecord.read(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFileError, match=r"run\.json is not JSON"):
        RunRecord.read(tmp_path)


@pytest.mark.parametrize("file", ["/etc/passwd", "../other/test.parquet", "outcomes\\test.parquet"])
def test_a_record_points_nowhere_else(file):
    with pytest.raises(ValueError, match="leaves the arm's directory"):
        StoredFile(file=file, sha256="0" * 64)


def two_outcomes(prediction=(0, 1), split="test"):
    return Outcomes.from_columns(
        sample_id=["a", "b"],
        label=[0, 1],
        prediction=prediction,
        confidence=[0.9, 0.8],
        rma=[0.75, NAN],
        mask_share=[0.5, NAN],
        heatmap_mass=[1.0, 2.0],
        mask_source=["mask", "none"],
        class_names=["cat", "dog"],
        split=split,
    )


def record_of(outcomes, directory):
    path = directory / "outcomes" / "test.parquet"
    outcomes.write(path)
    return record_with(outcomes={"test": StoredFile.of(path, directory)})


def test_outcomes_are_found_through_their_record(tmp_path):
    record = record_of(two_outcomes(), tmp_path)
    assert record.outcomes["test"].file == "outcomes/test.parquet"
    assert record.read_outcomes(tmp_path, "test").sample_ids == ("a", "b")


def test_outcomes_that_changed_since_are_refused(tmp_path):
    record = record_of(two_outcomes(), tmp_path)
    two_outcomes(prediction=[1, 1]).write(tmp_path / "outcomes" / "test.parquet")
    with pytest.raises(RunFileError, match=r"test\.parquet have changed since run\.json"):
        record.read_outcomes(tmp_path, "test")


def test_outcomes_of_another_split_are_refused(tmp_path):
    record = record_of(two_outcomes(split="val"), tmp_path)
    with pytest.raises(RunFileError, match="are of split 'val', expected 'test'"):
        record.read_outcomes(tmp_path, "test")
    with pytest.raises(RunFileError, match="has no outcomes of 'val'; it has 'test'"):
        record.read_outcomes(tmp_path, "val")


def test_outcomes_that_are_gone_are_named(tmp_path):
    with pytest.raises(RunFileError, match=r"test\.parquet do not exist"):
        record_with().read_outcomes(tmp_path, "test")


def test_steps_are_read_in_order_and_the_later_line_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "task_loss": 0.5}\n{"step": 1, "task_loss": null}\n{"step": 2, "task_loss": 0.25}\n'
        '{"step": 3, "task_loss": NaN}\n'
    )
    steps = runs.read_steps(path)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[1]["task_loss"] == 0.25
    assert math.isnan(steps[0]["task_loss"])
    assert math.isnan(steps[2]["task_loss"])


@pytest.mark.parametrize("line", ['{"step": 1', '{"task_loss": 1.0}', "[1]", '{"step": "one"}', '{"step": null}'])
def test_a_broken_step_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(RunFileError, match=r"metrics\.jsonl, line 2"):
        runs.read_steps(path)


def test_missing_steps_are_named(tmp_path):
    with pytest.raises(RunFileError, match=r"metrics\.jsonl cannot be read"):
        runs.read_steps(tmp_path / "metrics.jsonl")


def test_a_config_keeps_its_order_and_its_letters(tmp_path):
    config = {"run": {"name": "Übung", "arms": ["b", "a"]}, "data": {"root": None}}
    path = runs.write_config(tmp_path, config)
    assert path.name == "config.yaml"
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == ["run", "data"]
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config


def test_the_environment_names_versions_and_no_places(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    environment = runs.environment(device="cpu", num_processes=2)
    assert environment["packages"]["torch"] == runs.metadata.version("torch")
    assert environment["num_processes"] == 2
    assert environment["device"] == "cpu"
    assert set(environment) == {"packages", "python", "platform", "device", "num_processes", "git"}
    assert environment["platform"] == f"{runs.platform.system()} {runs.platform.machine()}"
    assert str(tmp_path) not in json.dumps(environment)


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(runs, "_PACKAGES", ("torch", "no-such-package"))
    assert list(runs.environment()["packages"]) == ["torch"]


def git(*arguments, cwd):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


def test_the_environment_knows_the_commit_and_whether_files_differ(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.environment()["git"] is None
    git("init", cwd=tmp_path)
    git("commit", "--allow-empty", "-m", "first", cwd=tmp_path)
    clean = runs.environment()["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "new.txt").write_text("new")
    assert runs.environment()["git"] == clean | {"dirty": True}
