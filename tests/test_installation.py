"""Which versions fit together is read from metadata, and an error that comes of a misfit says so."""

import sys

import pytest
from packaging.version import Version

from evidence_ft.installation import (
    InstallationError,
    explained,
    installed,
    pair_problem,
    requirements,
    supported,
    version_problem,
)

WHEELS = "https://download.pytorch.org/whl"


def distribution(folder, name, version, *lines):
    """Metadata as pip writes them, of a package that is nowhere else."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("\n".join(("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, "")))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Adds packages by their metadata; they win over what is really installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name, version, *needs):
        distribution(tmp_path, name, version, *(f"Requires-Dist: {need}" for need in needs))

    return add


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """What this package says it needs."""
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = ("torch>=2.11", "torchvision>=0.26", "open_clip_torch<4,>=3.2", "timm>=1.0.15")
    needs = [*(f"Requires-Dist: {line}" for line in lines), "Provides-Extra: text"]
    needs.append('Requires-Dist: sentencepiece>=0.2; extra == "text"')
    distribution(tmp_path, "evidence_ft", "0.1.0", *needs)


def test_a_version_that_is_supported_is_no_problem(ours, packages):
    packages("timm", "1.0.15")
    assert version_problem("timm") is None


def test_a_version_that_is_not_supported_is_named_with_the_range_and_what_to_type(ours, packages):
    packages("timm", "1.0.14")
    assert version_problem("timm") == ("timm is 1.0.14, expected >=1.0.15", 'pip install "timm>=1.0.15"')


def test_a_package_that_is_not_installed_is_named(ours, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:1])  # the fixture's folder alone
    assert version_problem("timm") == ("timm is not installed", 'pip install "timm>=1.0.15"')


def test_what_an_extra_needs_is_not_needed_without_it(ours):
    assert supported("sentencepiece") is None
    assert [need.name for need in requirements(extra="text")] == ["sentencepiece"]


def test_the_installed_pair_fits():
    assert pair_problem() is None


@pytest.mark.parametrize(
    ("torch", "needs", "fix"),
    [
        ("2.15.0", "torch (==2.11.0)", 'pip install --upgrade torch==2.15.0 "torchvision>=0.26"'),
        ("2.10.0", "torch==2.11.0", 'pip install --upgrade "torch>=2.11" "torchvision>=0.26"'),
        (
            "2.15.0+cu126",
            "torch==2.11.0",
            f'pip install --upgrade torch==2.15.0+cu126 "torchvision>=0.26" --index-url {WHEELS}/cu126',
        ),
    ],
    ids=["too_new", "not_supported_itself", "from_another_index"],
)
def test_a_wrong_pair_is_named_with_what_was_expected_and_what_to_type(ours, packages, torch, needs, fix):
    packages("torch", torch)
    packages("torchvision", "0.26.0", needs)
    assert pair_problem() == (f"torchvision 0.26.0 expects torch ==2.11.0, but torch {torch} is installed", fix)


def test_a_build_for_another_accelerator_is_the_same_version(packages):
    packages("torch", "2.11.0+cpu")
    packages("torchvision", "0.26.0+cpu", "torch==2.11.0")
    assert pair_problem() is None


def test_a_pair_that_fits_by_its_metadata_and_does_not_work_is_to_be_installed_again(packages):
    packages("torch", "2.11.0")
    packages("torchvision", "0.26.0", "torch==2.11.0")
    message, fix = pair_problem(RuntimeError("operator torchvision::nms does not exist"))
    assert "does not work (RuntimeError: operator torchvision::nms does not exist)" in message
    assert fix == "pip install --force-reinstall --no-deps torch==2.11.0 torchvision==0.26.0"


def misleading_error():
    """As transformers ends where torchvision does not fit: the cause is named nowhere in the last message."""
    try:
        raise RuntimeError("operator torchvision::nms does not exist")
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'CLIPModel'.") from error


def test_a_misleading_import_error_is_explained_by_the_pair(ours, packages):
    packages("torch", "2.15.0")
    packages("torchvision", "0.26.0", "torch==2.11.0")
    with pytest.raises(InstallationError) as caught, explained("hf_clip"):
        misleading_error()
    assert str(caught.value) == (
        "hf_clip cannot be imported: torchvision 0.26.0 expects torch ==2.11.0, but torch 2.15.0 is installed "
        "(RuntimeError: operator torchvision::nms does not exist); type: pip install --upgrade torch==2.15.0 "
        '"torchvision>=0.26" (evidence-ft doctor checks the rest)'
    )


def test_a_missing_package_is_named_as_pip_knows_it(ours, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:1])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InstallationError) as caught, explained("x"):
        import open_clip  # noqa: F401
    assert caught.value.problem.message == "x needs the package open_clip_torch, which is not there"
    assert caught.value.problem.fix == 'pip install "open_clip_torch<4,>=3.2"'
    assert caught.value.extra is None


def test_a_package_that_is_installed_and_not_there_is_to_be_installed_again(ours, packages, monkeypatch):
    packages("timm", "1.0.20")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InstallationError, match="--force-reinstall"), explained("x"):
        import timm  # noqa: F401


def test_a_package_of_an_extra_is_installed_by_that(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InstallationError) as caught, explained("x"):
        import sentencepiece  # noqa: F401
    assert caught.value.problem.fix == 'pip install "evidence-ft[text]"'
    assert caught.value.extra == "text"


def test_a_library_that_is_too_old_is_named(ours, packages):
    packages("timm", "1.0.14")
    with pytest.raises(InstallationError, match=r"timm is 1\.0\.14, expected >=1\.0\.15"), explained("x"):
        from timm import nothing_of_this_name  # noqa: F401


@pytest.mark.parametrize("error", [RuntimeError("of a model"), ImportError("of one's own"), ValueError("any")])
def test_errors_that_have_nothing_to_do_with_what_is_installed_pass(error):
    with pytest.raises(type(error)) as caught, explained("x"):
        raise error
    assert caught.value is error


def test_versions_are_those_that_are_imported():
    import torch

    assert Version(installed("torch")).release == Version(torch.__version__).release
