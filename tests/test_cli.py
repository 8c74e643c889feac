"""The command line: what it says of itself, and its exit codes."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from evidence_ft import __version__, cli, doctor

ROOT = Path(__file__).resolve().parents[1]


def test_help_names_every_command_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    assert "doctor    check the installation" in capsys.readouterr().out


def test_help_of_a_command_says_what_its_exit_code_means(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "--help"])
    assert exit_.value.code == 0
    assert "Exits with 1 if something needed fails" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"evidence-ft {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["docter"], ["doctor", "--jsn"]])
def test_a_command_line_that_cannot_be_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: evidence-ft" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("absent", 0), ("warning", 0), ("failed", 1)])
def test_the_exit_code_says_whether_what_is_needed_works(status, code, monkeypatch, capsys):
    check = doctor.Check("x", status, "found", "a message")
    monkeypatch.setattr(doctor, "diagnose", lambda: iter([("section", [check])]))
    assert cli.main(["doctor"]) == cli.main(["doctor", "--json"]) == code
    assert "a message" in capsys.readouterr().out


def test_the_console_script_is_this_command_line():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["evidence-ft"]
    module, _, function = script.partition(":")
    assert getattr(import_module(module), function) is cli.main


@pytest.mark.slow
def test_help_needs_no_model_library():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['evidence-ft', 'doctor', '--help']\n"
        "try:\n"
        "    runpy.run_module('evidence_ft', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "import evidence_ft.doctor\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'open_clip', 'timm', 'peft', 'accelerate', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
