"""Recipes as a user runs them, a few steps long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    *("--data.train-images", "32", "--data.test-images", "16", "--training.epochs", "1"),
    *("--training.batch-size", "8", "--evaluation.gallery", "2", "--run.device", "cpu"),
]


def launch(*arguments, processes=1, cwd):
    command = [
        *(Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", str(processes)),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(ROOT / "recipes" / "flcp_evidence.py", *arguments),
    ]
    options = {"cwd": cwd, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 300}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_the_main_recipe_prints_the_table_and_leaves_the_report(tmp_path):
    result = launch(*QUICK, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = tmp_path / "runs" / "quickstart" / "comparison.html"
    assert str(report) in result.stdout
    assert "accuracy" in result.stdout.lower()
    arms = json.loads(report.with_suffix(".json").read_text())["arms"]
    assert set(arms) == {"zero_shot", "baseline", "evidence"}
    assert set(arms["evidence"]) == {"test", "shifted"}


@pytest.mark.slow
def test_two_processes_run_it_too_and_count_every_image_once(tmp_path):
    result = launch(*QUICK, "--data.test-images", "17", "--run.arms", "evidence", processes=2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    arms = json.loads((tmp_path / "runs" / "quickstart" / "comparison.json").read_text())["arms"]
    assert arms["evidence"]["test"]["n"] == 17


@pytest.mark.slow
def test_a_mistake_ends_with_its_message_and_no_run(tmp_path):
    result = launch("--data.format", "manifest", "--data.file", "nowhere.csv", cwd=tmp_path)
    assert result.returncode != 0
    assert "error: " in result.stderr
    assert "nowhere.csv" in result.stderr
    assert 'recipes/flcp_evidence.py", line' not in result.stderr  # no traceback of ours
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_pretraining_the_toy_model_leaves_a_model_that_loads(tmp_path):
    from evidence_ft.backbones import open_clip as backbone

    command = [sys.executable, ROOT / "recipes" / "pretrain_toy_clip.py", "--output", tmp_path / "toy"]
    short = ["--images", "64", "--epochs", "1", "--batch-size", "32"]
    subprocess.run([str(part) for part in [*command, *short]], check=True, capture_output=True, timeout=300)
    encoder = backbone.load(str(tmp_path / "toy"))
    shipped = backbone.load("toy_clip")
    assert encoder.config == shipped.config
    assert encoder.tokenizer(["a photo of a star"]).tolist() == shipped.tokenizer(["a photo of a star"]).tolist()
