"""Recipes as a user runs them, a few steps long."""

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evidence_ft import experiment
from evidence_ft.config import read
from evidence_ft.interruption import Interrupted
from tests.test_report import BASELINE, EVIDENCE, ZERO_SHOT, write_arm

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    *("--data.train-images", "32", "--data.test-images", "16", "--training.epochs", "1"),
    *("--training.batch-size", "8", "--evaluation.gallery", "2", "--run.device", "cpu"),
]


TRAINED = ("zero_shot", "baseline")
COMPARED = ("zero_shot", "baseline", "evidence")
RECIPES = {
    "zero_shot": ("zero_shot", ("zero_shot",)),
    "lp": ("lp", TRAINED),
    "flcp": ("flcp", TRAINED),
    "ft": ("ft", TRAINED),
    "lora": ("lora", TRAINED),
    "prompt": ("coop", TRAINED),
    "adapter": ("clip_adapter", TRAINED),
    "lp_evidence": ("lp", COMPARED),
    "flcp_evidence": ("flcp", COMPARED),
    "ft_evidence": ("ft", COMPARED),
    "lora_evidence": ("lora", COMPARED),
}


def commands_of(recipe):
    """What a recipe's docstring says can be typed, without the launcher."""
    text = ast.get_docstring(ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text()))
    lines = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("    accelerate launch")]
    return [shlex.split(" ".join(line[line.index(f"recipes/{recipe}.py") + 1 :])) for line in lines]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_of_a_recipe_is_understood(recipe, monkeypatch):
    found = []
    monkeypatch.setattr(experiment, "run", found.append)
    monkeypatch.chdir(ROOT)
    commands = commands_of(recipe)
    for arguments in commands:
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *arguments])
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    assert len(found) == len(commands) >= 2
    method, arms = RECIPES[recipe]
    assert (found[0].method.name, found[0].run.arms) == (method, arms)
    assert [] in commands
    assert found[commands.index([])].data.format == "shapes"


class TestMethodsOnShapes:
    """The table of methods, made from what runs left behind."""

    @pytest.fixture
    def recipe(self):
        spec = importlib.util.spec_from_file_location("methods_on_shapes", ROOT / "recipes" / "methods_on_shapes.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
        del sys.modules[spec.name]

    def test_every_method_has_its_arms(self, recipe, tmp_path):
        found = {}
        for method in read(ROOT / "configs" / "shapes.yaml")["methods"]:
            config = recipe.settings_of(recipe.Job(ROOT / "configs" / "shapes.yaml", tmp_path, method, 2))
            assert (config.run.directory, config.run.name, config.run.seed) == (tmp_path / method, "seed2", 2)
            found[method] = config.run.arms
        four, two = ("baseline", "evidence", "swap", "evidence_swap"), ("baseline", "evidence")
        assert found == {
            **dict.fromkeys(("flcp", "ft", "lora"), four),
            **dict.fromkeys(("lp", "coop", "clip_adapter", "tip_adapter_f", "lp_ft", "wise_ft"), two),
            **dict.fromkeys(("zero_shot", "tip_adapter"), ("baseline",)),
        }

    def test_what_has_finished_is_kept_and_what_has_other_settings_is_run_anew(self, recipe, tmp_path, monkeypatch):
        states = {"baseline": "finished", "evidence": "other", "swap": "interrupted", "evidence_swap": "new"}
        ran = []
        monkeypatch.setattr(experiment, "arm_state", lambda _, arm: states[arm])
        monkeypatch.setattr(experiment, "run_arms", lambda config: ran.append((config.run.arms, config.run.resume)))
        assert recipe.run_job(recipe.Job(ROOT / "configs" / "shapes.yaml", tmp_path, "flcp", 0)) is None
        assert ran == [(("evidence",), False), (("swap", "evidence_swap"), True)]

    def test_after_an_interruption_nothing_more_is_begun(self, recipe, tmp_path, monkeypatch):
        def interrupted(config):
            began.append(config.run.directory.name)
            raise Interrupted(3, None)

        began = []
        monkeypatch.setattr(experiment, "run_arms", interrupted)
        jobs = [recipe.Job(ROOT / "configs" / "shapes.yaml", tmp_path, method, 0) for method in ("lp", "ft")]
        (failure,) = recipe.run_all(jobs, workers=1)
        assert failure.interrupted
        assert began == ["lp"]

    @pytest.fixture
    def runs(self, tmp_path):
        for seed, (baseline, evidence) in enumerate([(BASELINE, EVIDENCE), (ZERO_SHOT, EVIDENCE)]):
            self.write(tmp_path, seed, "baseline", baseline, 0.0)
            self.write(tmp_path, seed, "evidence", evidence, 1.0)
        return tmp_path

    def write(self, runs, seed, arm, outcomes, weight, learning_rate=0.1):
        training = {"learning_rate": learning_rate, "background_swap": 0.0, "epochs": 1, "batch_size": 2}
        environment = {"platform": "Linux", "device": "cpu", "git": None}
        write_arm(
            runs / "lp" / f"seed{seed}",
            arm,
            **outcomes | {"swapped": BASELINE["swapped"]},
            weight=weight,
            steps=4,
            evaluation={"interpolation": 1.0},
            config={"training": training, "data": {"format": "shapes"}},
            record={"seed": seed, "environment": environment, "training": {"steps": 4, "seconds": 1.5}},
        )

    def test_results_are_means_over_seeds(self, recipe, runs):
        recipe.write_table(recipe.collect(runs, ["ft", "lp"]), runs / "out", "a command")
        results = json.loads((runs / "out" / "results.json").read_text())
        # By hand, see tests/test_report.py: zero_shot predicts "dog" throughout, and never looks at the evidence.
        assert results == {
            "lp": {
                "baseline": {
                    "test": {
                        "accuracy": pytest.approx((4 / 6 + 3 / 6) / 2),
                        "PT": pytest.approx((1 / 3 + 0) / 2),
                        "IR": None,  # undefined for one of the seeds
                        "RR": pytest.approx((1 / 5 + 0) / 2),
                        "swapped_accuracy": 0.5,
                    }
                },
                "evidence": {
                    "test": {
                        "accuracy": pytest.approx(4 / 6),
                        "PT": pytest.approx(3 / 4),
                        "IR": 1.0,
                        "RR": pytest.approx(3 / 5),
                        "swapped_accuracy": 0.5,
                    }
                },
            }
        }

    def test_the_table_has_intervals_and_paired_differences(self, recipe, runs):
        text = recipe.tables(recipe.collect(runs, ["lp"]))
        assert "## test" in text
        rows = [line.split(" | ") for line in text.splitlines() if "evidence \N{MINUS SIGN} baseline" in line]
        (row,) = rows
        assert row[2] == "0 1"
        # Accuracy rises by 0 and 1/6: 8.3 on average, with a standard deviation of 11.8.
        assert re.fullmatch(r"\+8\.3 ± 11\.8 \[.*, .*\]", row[3])
        assert row[5] == "\N{EN DASH}"
        assert row[7].startswith("+0.0 ± 0.0 [+0.0, +0.0]")  # the same outcomes: the same draws leave no interval

    def test_seeds_that_saw_other_images_have_no_mean(self, recipe, runs):
        self.write(runs, 1, "evidence", {**EVIDENCE, "ids": [f"other{row}" for row in range(6)]}, 1.0)
        with pytest.raises(SystemExit, match=r"seed1/evidence was judged on other images of test"):
            recipe.collect(runs, ["lp"])

    def test_no_workers_are_refused(self, recipe, runs):
        with pytest.raises(SystemExit, match="workers is 0; give at least 1"):
            recipe.main(recipe.Command(runs=runs, workers=0))

    def test_settings_that_differ_between_seeds_are_pointed_out(self, recipe, runs):
        assert recipe.warnings(recipe.collect(runs, ["lp"])) == []
        self.write(runs, 1, "evidence", EVIDENCE, 1.0, learning_rate=9.0)
        (warning,) = recipe.warnings(recipe.collect(runs, ["lp"]))
        assert warning == "lp, evidence, seed 1 was run with other training.learning_rate."


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
def test_a_terminated_recipe_ends_with_75_and_the_same_command_continues(tmp_path):
    more = ("--training.epochs", "10", "--run.arms", "baseline")
    command = [sys.executable, ROOT / "recipes" / "lora.py", *QUICK, *more]
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    arm = tmp_path / "runs" / "lora" / "baseline"
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, **options) as process:
        while process.poll() is None and not (arm / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, complaint = process.communicate(timeout=300)
    assert process.returncode == 75, complaint
    assert "--run.resume continues" in complaint
    assert (arm / "checkpoints").is_dir()
    assert not (arm / "run.json").exists()
    resumed = [str(part) for part in [*command, "--run.resume"]]
    subprocess.run(resumed, check=True, capture_output=True, timeout=300, **options)
    steps = [json.loads(line)["step"] for line in (arm / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    assert (arm / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_terminated_table_of_methods_ends_its_workers(tmp_path):
    settings = {
        "run": {"device": "cpu"},
        "data": {"format": "shapes", "train_images": 64, "test_images": 16},
        "training": {"batch_size": 16, "epochs": 500, "learning_rate": 1e-3},
        "methods": {"lp": {}, "coop": {}},
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings))
    command = [sys.executable, ROOT / "recipes" / "methods_on_shapes.py", "--config", tmp_path / "tiny.yaml"]
    command += ["--workers", "2", "--seeds", "0", "--runs", tmp_path / "runs", "--output", tmp_path / "out"]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
        logs = [tmp_path / "runs" / method / "seed0" / "baseline" / "metrics.jsonl" for method in ("lp", "coop")]
        while process.poll() is None and not all(log.exists() for log in logs):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=300)
    assert process.returncode == 75
    assert told.count("training was interrupted after step") == 2
    for log in logs:
        assert list((log.parent / "checkpoints").glob("step-*"))  # saved before they ended
        lines = log.read_text()
        time.sleep(0.2)
        assert log.read_text() == lines


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
