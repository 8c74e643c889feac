"""What doctor says where something is wrong, and that it is there to say it."""

import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import evidence_ft.backbones
from evidence_ft import doctor
from evidence_ft.config import component
from evidence_ft.doctor import Check
from evidence_ft.encoder import unreachable
from evidence_ft.heatmaps import gradient_attention
from tests.conftest import build_encoder
from tests.test_installation import distribution

SECTIONS = ["versions", "torch and torchvision", "devices", "accelerate", "backbones", "caches", "trackers"]


def python(code, **environment):
    """Runs in a process of its own, which finds this package where this process does."""
    own = os.pathsep.join(filter(None, (environment.pop("PYTHONPATH", ""), str(Path(doctor.__file__).parents[1]))))
    command, settings = [sys.executable, "-c", code], {**os.environ, **environment, "PYTHONPATH": own}
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


DOCTOR = "import sys; from evidence_ft.cli import main; sys.exit(main(['doctor', '--json']))"


def by_name(output, section):
    return {check["name"]: check for check in json.loads(output)["checks"] if check["section"] == section}


@pytest.mark.slow
def test_where_all_is_well_every_backbone_with_a_self_test_passes_it():
    result = python(DOCTOR)
    report = json.loads(result.stdout)
    assert (result.returncode, report["ok"], result.stderr) == (0, True, "")
    assert list(dict.fromkeys(check["section"] for check in report["checks"])) == SECTIONS
    keys = {"section", "name", "status", "found", "message", "fix", "seconds", "details"}
    assert all(check.keys() == keys for check in report["checks"])
    files = {path.stem for path in Path(evidence_ft.backbones.__path__[0]).glob("*.py")} - {"__init__"}
    found = by_name(result.stdout, "backbones")
    assert set(found) == files
    for name, check in found.items():
        has_self_test = hasattr(component("backbones", name), "tiny")
        assert check["status"] == ("ok" if has_self_test else "absent")
        assert (check["seconds"] is not None) == has_self_test
    versions = by_name(result.stdout, "versions")
    assert versions["torch"]["details"] == {"version": torch.__version__.partition("+")[0], "supported": ">=2.11"}


@pytest.fixture
def wrong_torchvision(tmp_path):
    """A torchvision for another torch: says so in its metadata, and ends as such a one does when it is imported."""
    distribution(tmp_path, "torchvision", "0.26.0", "Requires-Dist: torch==2.11.0")
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    return str(tmp_path)


@pytest.mark.slow
def test_a_torchvision_for_another_torch_is_reported_and_stops_no_other_check(wrong_torchvision):
    result = python(DOCTOR, PYTHONPATH=wrong_torchvision)
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert list(dict.fromkeys(check["section"] for check in report["checks"])) == SECTIONS
    pair = by_name(result.stdout, "torch and torchvision")["pair"]
    assert pair["status"] == "failed"
    assert "torchvision 0.26.0 expects torch ==2.11.0, but torch" in pair["message"]
    assert "operator torchvision::nms does not exist" in pair["message"]
    assert pair["fix"].startswith("pip install --upgrade torch==")
    assert {"CPU"} <= set(by_name(result.stdout, "devices"))
    for check in by_name(result.stdout, "backbones").values():
        assert check["status"] == "failed"
        assert "torchvision 0.26.0 expects torch ==2.11.0" in check["message"]
        assert check["fix"] == pair["fix"]


@pytest.mark.slow
def test_whatever_is_imported_first_names_a_torchvision_for_another_torch(wrong_torchvision):
    names = ("EvidenceTrainer", "EvidenceModel", "experiment", "config", "transforms", "adaptation")
    code = (
        f"for name in {names}:\n"
        "    try:\n"
        "        exec(f'from evidence_ft import {name}')\n"
        "    except ImportError as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    result = python(code, PYTHONPATH=wrong_torchvision)
    lines = result.stdout.splitlines()
    assert len(lines) == len(names), result.stderr
    for line in lines:
        assert line.startswith("InstallationError ")
        assert "torchvision 0.26.0 expects torch ==2.11.0, but torch" in line
        assert "type: pip install --upgrade torch==" in line
        assert "evidence-ft doctor" in line


@pytest.mark.slow
def test_a_missing_package_is_named_by_doctor_and_by_the_loader():
    block = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'timm':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from evidence_ft.installation import InstallationError\n"
        "from evidence_ft.config import component\n"
        "try:\n"
        "    component('backbones', 'timm_vit')\n"
        "except InstallationError as error:\n"
        "    print(error, file=sys.stderr)\n"
    )
    result = python(block + DOCTOR)
    assert result.returncode == 1
    told = "evidence_ft.backbones.timm_vit needs the package timm, which is not there; type: pip install"
    assert told in result.stderr
    check = by_name(result.stdout, "backbones")["timm_vit"]
    assert (check["status"], check["message"]) == ("failed", told.partition(";")[0])
    assert check["fix"] == 'pip install --force-reinstall "timm>=1.0.15"'


@pytest.mark.slow
def test_a_hub_id_without_network_is_one_clear_error_of_every_backbone(tmp_path):
    code = (
        "import evidence_ft.backbones, pkgutil\n"
        "from evidence_ft.config import component\n"
        "from evidence_ft.encoder import CheckpointError\n"
        "for module in pkgutil.iter_modules(evidence_ft.backbones.__path__):\n"
        "    try:\n"
        "        component('backbones', module.name).load('hf-hub:nobody/nothing')\n"
        "    except CheckpointError as error:\n"
        "        print(module.name, error)\n"
    )
    result = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    told = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert {"open_clip", "hf_clip", "hf_siglip", "hf_blip", "timm_vit"} <= set(told), result.stderr
    for name in set(told) - {"albef"}:  # published as a file, not on the hub
        assert told[name].startswith("could not reach 'hf-hub:nobody/nothing': HF_HUB_OFFLINE is set"), told[name]
        assert "'local-dir:<folder>'" in told[name]


def test_a_mistake_in_a_hub_id_is_not_blamed_on_the_missing_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = unreachable("hf-hub:a b", ValueError("repo id must not have spaces."))
    assert "'hf-hub:a b': ValueError: repo id must not have spaces. Without network" in str(error)


class TestBackbones:
    @pytest.fixture
    def write(self, tmp_path, monkeypatch):
        """Writes a file of the family ``backbones``, which has no others meanwhile."""
        monkeypatch.setattr(evidence_ft.backbones, "__path__", [str(tmp_path)])
        before = set(sys.modules)

        def write(name, text):
            (tmp_path / f"{name}.py").write_text(text)

        yield write
        for name in set(sys.modules) - before:
            if name.startswith("evidence_ft.backbones."):
                del sys.modules[name]
                delattr(evidence_ft.backbones, name.rpartition(".")[2])

    def test_without_a_self_test_are_said_to_have_none(self, write):
        write("bare", "def load(checkpoint): ...")
        assert list(doctor.backbones()) == [
            Check("bare", "absent", "imports; no self-test", details={"imports": True, "self_test": None})
        ]

    def test_whose_self_test_fails_say_why_and_how_long_it_took(self, write):
        write("broken", "def tiny(directory): return 'x'\ndef load(checkpoint): raise ValueError(f'no {checkpoint}')")
        (check,) = doctor.backbones()
        assert (check.name, check.status, check.found) == ("broken", "failed", "self-test failed")
        assert check.message == "ValueError: no x"
        assert check.seconds is not None
        assert check.details == {"imports": True, "self_test": False}

    def test_that_need_a_package_which_is_not_there_name_it(self, write):
        write("needy", "import a_package_of_nobody")
        (check,) = doctor.backbones()
        assert check.status == "failed"
        assert check.message == "evidence_ft.backbones.needy needs the package a_package_of_nobody, which is not there"
        assert check.fix == "pip install a_package_of_nobody"

    def test_that_need_an_extra_are_not_needed(self, write, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(tmp_path))
        needs = ("Provides-Extra: more", 'Requires-Dist: a_package_of_nobody; extra == "more"')
        distribution(tmp_path, "evidence_ft", "0.1.0", *needs)
        write("needy", "import a_package_of_nobody")
        (check,) = doctor.backbones()
        assert (check.status, check.fix) == ("absent", 'pip install "evidence-ft[more]"')

    def test_that_break_down_on_import_do_not_take_the_others_with_them(self, write):
        write("broken", "raise OSError('undefined symbol')")
        write("other", "def load(checkpoint): ...")
        first, second = doctor.backbones()
        assert (first.status, first.message) == ("failed", "OSError: undefined symbol")
        assert second.status == "absent"

    def test_print_nothing_between_the_lines(self, write, capsys):
        write("loud", "print('loud')\ndef load(checkpoint): ...")
        dict(doctor.diagnose())
        assert capsys.readouterr() == ("", "")


def test_the_self_test_notices_a_heatmap_without_gradient(tmp_path, monkeypatch):
    encoder = build_encoder("native")
    backbone = SimpleNamespace(tiny=lambda directory: "", load=lambda checkpoint: encoder)
    doctor.try_out(backbone, tmp_path)
    genuine = gradient_attention.heatmap

    def inert(trace, score, *, create_graph):
        return genuine(trace, score, create_graph=create_graph).detach() + 0 * trace.features.sum()

    monkeypatch.setattr(gradient_attention, "heatmap", inert)
    with pytest.raises(RuntimeError, match="heatmap has no finite gradient"):
        doctor.try_out(backbone, tmp_path)


def test_the_self_test_notices_an_empty_heatmap(tmp_path):
    encoder = build_encoder("native")
    nn.init.zeros_(encoder.model.visual.proj)
    with pytest.raises(RuntimeError, match="no finite mass"):
        doctor.try_out(SimpleNamespace(tiny=lambda directory: "", load=lambda checkpoint: encoder), tmp_path)


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def _not_launched(self, monkeypatch):
        for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    @pytest.fixture
    def config_file(self, tmp_path, monkeypatch):
        path = tmp_path / "default_config.yaml"
        monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
        return path

    def test_without_a_file_has_its_defaults(self, config_file):
        checks = {check.name: check for check in doctor.accelerate()}
        assert checks["config file"].status == "absent"
        assert {name: check.found for name, check in checks.items() if name != "config file"} == {
            "processes": "1",
            "mixed precision": "no",
            "dynamo": "no",
            "FSDP": "no",
            "gradient accumulation": "1",
        }

    def test_warns_of_what_training_refuses(self, config_file):
        config_file.write_text(
            "distributed_type: FSDP\nnum_processes: 4\nmixed_precision: fp16\nfsdp_config: {fsdp_version: 1}\n"
            "dynamo_config: {dynamo_backend: INDUCTOR}\n"
        )
        checks = {check.name: check for check in doctor.accelerate()}
        assert checks["processes"] == Check("processes", "ok", "4", details={"value": "4"})
        warned = {name: check.message for name, check in checks.items() if check.status == "warning"}
        assert warned.keys() == {"mixed precision", "dynamo", "FSDP"}
        assert "fp16 underflows" in warned["mixed precision"]
        assert "fsdp_version: 2" in warned["FSDP"]
        assert "dynamo_config" in warned["dynamo"]

    @pytest.mark.parametrize("path", sorted(Path("configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
    def test_finds_nothing_wrong_with_the_files_that_come_with_the_package(self, config_file, path):
        config_file.write_text(path.read_text())
        assert {check.status for check in doctor.accelerate()} == {"ok"}

    def test_believes_the_launcher_rather_than_the_file(self, config_file, monkeypatch):
        config_file.write_text("mixed_precision: fp16\nnum_processes: 4\n")
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        monkeypatch.setenv("WORLD_SIZE", "2")
        checks = {check.name: check.found for check in doctor.accelerate()}
        assert (checks["mixed precision"], checks["processes"]) == ("bf16", "2")
        assert "a launcher started this process" in checks["config file"]

    def test_a_file_that_is_no_configuration_is_a_failure(self, config_file):
        config_file.write_text("- fp16\n")
        (*_, last) = doctor._guarded("accelerate", doctor.accelerate)
        assert last.status == "failed"
        assert "no configuration of accelerate" in last.message


def test_gpus_are_listed_with_their_memory_and_bf16(monkeypatch):
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        mem_get_info=lambda index: (30 * 2**30, 40 * 2**30),
        device=lambda index: nullcontext(),
        is_bf16_supported=lambda including_emulation: False,
        get_device_name=lambda index: "a GPU",
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    gpu = {check.name: check for check in doctor.devices()}["cuda:0"]
    assert gpu.found == "a GPU, 30.0 GiB of 40.0 GiB free, bf16: no"
    assert gpu.details == {"model": "a GPU", "bf16": False, "bytes": 40 * 2**30, "free_bytes": 30 * 2**30}


class TestCaches:
    def test_that_cannot_be_written_are_a_warning(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        check = doctor._place("hub cache", tmp_path / "hub")
        assert check.status == "warning"
        assert check.message == f"{tmp_path} cannot be written: nothing can be downloaded; set HF_HUB_CACHE"
        assert check.details["exists"] is False

    def test_say_that_the_hub_is_not_asked(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
        checks = {check.name: check for check in doctor.caches()}
        assert checks["HF_HUB_OFFLINE"].message == "models are looked up in the hub cache alone"
        assert checks["HF_HUB_OFFLINE"].details == {"value": "yes", "offline": True}


class TestVersions:
    def test_that_are_not_supported_fail_with_what_to_type(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(tmp_path))
        distribution(tmp_path, "timm", "0.9.0")
        distribution(tmp_path, "einops", "0.1.0")
        checks = {check.name: check for check in doctor.versions()}
        assert checks["timm"].status == "failed"
        assert checks["timm"].fix == 'pip install "timm>=1.0.15"'
        assert checks["einops"].message == "einops is 0.1.0, expected >=0.8"
        assert checks["torch"].status == "ok"


class TestTable:
    def test_fits_80_columns_except_for_what_is_to_be_copied(self):
        command = "pip install " + "x" * 90
        long = Check("a", "failed", "found " * 40, "message " * 40 + "/a/path" * 30, command)
        lines = doctor.table("title", [long, Check("b", "ok", "fine", seconds=0.25)]).splitlines()
        assert [line.strip() for line in lines if len(line) > 80] == [command]
        assert "  ok       b            fine (0.2 s)" in lines

    def test_says_the_same_thing_once(self):
        same = [Check(name, "failed", "no", "a long story", "pip install x") for name in "ab"]
        text = doctor.table("title", same)
        assert (text.count("a long story"), text.count("pip install x"), text.count("as above")) == (1, 1, 1)

    def test_ends_with_what_is_to_be_done(self, monkeypatch):
        output = io.StringIO()
        checks = [Check("a", "failed", message="m"), Check("b", "warning")]
        monkeypatch.setattr(doctor, "diagnose", lambda: iter([("title", checks)]))
        assert doctor.main(output) == 1
        assert output.getvalue().endswith("1 failed (a); 1 warning(s). Mend the first one first.\n")
