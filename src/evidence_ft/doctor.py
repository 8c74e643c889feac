"""What works here and what does not, with what to type: ``evidence-ft doctor``.

Must itself work where nothing else does. No model library is imported before the check that needs it, a check that
fails takes no other with it, and what the libraries print meanwhile does not get between the lines.
"""

import io
import json
import os
import pkgutil
import platform
import shutil
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TextIO, TypeAlias

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from evidence_ft import __version__
from evidence_ft.installation import (
    OFFLINE_SWITCHES,
    OURS,
    InstallationError,
    explained,
    installed,
    is_on,
    offline_switch,
    one_line,
    origin,
    pair_problem,
    requirements,
    supported,
    version_problem,
)

Status: TypeAlias = Literal["ok", "absent", "warning", "failed"]
"""As needed; not there, and not needed; works, but will be refused or lead astray; must be mended."""

_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "peft", "accelerate")
_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
_WIDTH = 80


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: see `Status`.
        found: what is there, in a few words.
        message: what is wrong, or worth knowing.
        fix: command that mends it.
        seconds: it took, where that is of interest.
        details: what machines may want to know.
    """

    name: str
    status: Status
    found: str = ""
    message: str = ""
    fix: str = ""
    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def main(output: TextIO, *, as_json: bool = False) -> int:
    """Check everything and write it down, each section as soon as it is known.

    Args:
        output: where to.
        as_json: one JSON object, ``{"ok", "evidence_ft", "checks"}``, instead of a table.

    Returns:
        The exit code: 1 if a check failed, otherwise 0.
    """
    found: dict[str, list[Check]] = {}
    seen: set[str] = set()
    for title, checks in diagnose():
        found[title] = checks
        if not as_json:
            output.write(table(title, checks, seen))
            output.flush()
    failed = [check for checks in found.values() for check in checks if check.status == "failed"]
    if as_json:
        flat = [{"section": title, **asdict(check)} for title, checks in found.items() for check in checks]
        report = {"ok": not failed, "evidence_ft": __version__, "checks": flat}
        output.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    else:
        output.write(_verdict(failed, [check for checks in found.values() for check in checks]))
    return 1 if failed else 0


def diagnose() -> Iterator[tuple[str, list[Check]]]:
    """Title and checks of each section, one after the other."""
    sections: Sequence[tuple[str, Callable[[], Iterator[Check]]]] = (
        ("versions", versions),
        ("torch and torchvision", pair),
        ("devices", devices),
        ("accelerate", accelerate),
        ("backbones", backbones),
        ("caches", caches),
        ("trackers", trackers),
    )
    for title, check in sections:
        with _quiet():
            checks = list(_guarded(title, check))
        yield title, checks


def _guarded(title: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """What a section finds; where it breaks down, that too is a finding."""
    try:
        yield from check()
    except Exception as error:  # whatever a broken library came up with
        yield Check(title, "failed", message=one_line(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries print, warn and draw out of the report."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def versions() -> Iterator[Check]:
    """Python and the packages this one asks for; those that are not named here only where they are wrong."""
    python = metadata.metadata(OURS)["Requires-Python"]
    fits = SpecifierSet(python).contains(platform.python_version(), prereleases=True)
    wrong = "" if fits else f"Python is {platform.python_version()}, expected {python}"
    yield _version("python", platform.python_version(), python, wrong)
    yield _version("evidence_ft", __version__, "")
    for package in _LIBRARIES:
        problem = version_problem(package)
        message, fix = problem or ("", "")
        yield _version(package, installed(package), str(supported(package) or ""), message, fix)
    known = {canonicalize_name(package) for package in _LIBRARIES}
    others = [each.name for each in requirements() if canonicalize_name(each.name) not in known]
    problems = {package: problem for package in others if (problem := version_problem(package))}
    for package, (message, fix) in problems.items():
        yield _version(package, installed(package), str(supported(package) or ""), message, fix)
    if not problems:
        yield Check(f"{len(others)} other packages", "ok", "in the supported ranges")


def _version(name: str, version: str | None, wanted: str, message: str = "", fix: str = "") -> Check:
    found = f"{version or 'not installed'}{f' (supported: {wanted})' if wanted else ''}"
    details = {"version": version, "supported": wanted or None}
    return Check(name, "failed" if message else "ok", found, message, fix, details=details)


def pair() -> Iterator[Check]:
    """Whether torchvision was made for the torch that is here, by its metadata and by using it."""
    torch, torchvision = installed("torch"), installed("torchvision")
    wanted = supported("torch", by="torchvision")
    details = {"torch": torch, "torchvision": torchvision, "torchvision_expects_torch": str(wanted) if wanted else None}
    problem = pair_problem(_error_of_torchvision())
    if problem is not None:
        yield Check("pair", "failed", f"torch {torch}, torchvision {torchvision}", *problem, details=details)
        return
    expects = f"expects torch {wanted}" if wanted else "does not say which torch it expects"
    yield Check("pair", "ok", f"torchvision {torchvision} {expects} and works", details=details)


def _error_of_torchvision() -> Exception | None:
    """What comes of importing it and of calling what it brings compiled: some versions fail only then."""
    try:
        torch, torchvision = import_module("torch"), import_module("torchvision")
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except Exception as error:  # whatever a library compiled for another one came up with
        return error
    return None


def devices() -> Iterator[Check]:
    """What there is to compute on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch: Any = import_module("torch")
    except Exception as error:  # a damaged build raises what the loader of its libraries does
        yield Check("CPU", "ok", f"{cores} cores", details={"cores": cores})
        yield Check("torch", "failed", message=f"cannot be imported: {one_line(error)}", fix="pip install torch")
        return
    threads = torch.get_num_threads()
    yield Check("CPU", "ok", f"{cores} cores, {threads} threads", details={"cores": cores, "threads": threads})
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        yield Check("CUDA", "absent", f"torch is built for {build}, but sees no GPU" if build else "torch has none")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(index)
        yield _gpu(f"cuda:{index}", name, bf16=bf16, memory=total, free=free)
    if torch.backends.mps.is_available():
        bf16, memory = _has_bf16_on_mps(torch), torch.mps.recommended_max_memory()
        yield _gpu("mps", platform.processor(), bf16=bf16, memory=memory, free=memory)


def _gpu(name: str, model: str, *, bf16: bool, memory: int, free: int) -> Check:
    details = {"model": model, "bf16": bf16, "bytes": memory, "free_bytes": free}
    found = f"{model}, {_size(free)} of {_size(memory)} free, bf16: {'yes' if bf16 else 'no'}"
    return Check(name, "ok", found, details=details)


def _has_bf16_on_mps(torch: Any) -> bool:
    try:
        torch.ones(1, dtype=torch.bfloat16, device="mps").sum()
    except (TypeError, RuntimeError):
        return False
    return True


def accelerate() -> Iterator[Check]:
    """What a recipe would run with: what ``accelerate launch`` has set, or what its configuration file says."""
    try:
        config_args: Any = import_module("accelerate.commands.config.config_args")
    except Exception as error:  # whatever a broken library came up with
        yield Check("accelerate", "failed", message=f"cannot be imported: {one_line(error)}")
        return
    path = Path(config_args.default_config_file)
    launched = not {"ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"}.isdisjoint(os.environ)
    config: Mapping[str, Any] = {}
    if launched:
        found = "not read: a launcher started this process, and has set what follows"
        yield Check("config file", "ok", found, details={"launched": True, "path": None})
    elif path.is_file():
        config = _read_yaml(path)
        message = "counts for accelerate launch without --config_file; python alone does not read it"
        yield Check("config file", "ok", str(path), message, details={"launched": False, "path": str(path)})
    else:
        message = "accelerate launch uses its defaults, or --config_file configs/accelerate/<one>.yaml"
        yield Check("config file", "absent", f"none at {path}", message, details={"launched": False, "path": None})
    yield from _accelerate_settings(_effective(config, os.environ))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    tree = import_module("yaml").safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no configuration of accelerate: expected keys such as 'mixed_precision'")
    return tree


def _effective(config: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """Settings by name: the environment's, which a launcher sets, before the file's, before the defaults."""
    fsdp, dynamo = config.get("fsdp_config") or {}, config.get("dynamo_config") or {}
    uses_fsdp = environment.get("ACCELERATE_USE_FSDP", str(config.get("distributed_type") == "FSDP")).lower() == "true"
    settings = {
        "processes": environment.get("WORLD_SIZE", config.get("num_processes", 1)),
        "mixed precision": environment.get("ACCELERATE_MIXED_PRECISION", config.get("mixed_precision", "no")),
        "dynamo": environment.get("ACCELERATE_DYNAMO_BACKEND", dynamo.get("dynamo_backend", "no")),
        "FSDP": environment.get("FSDP_VERSION", fsdp.get("fsdp_version", 1)) if uses_fsdp else "no",
        "gradient accumulation": environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
    }
    # YAML reads a bare no as False.
    return {name: "no" if value is False else str(value).lower() for name, value in settings.items()}


_REFUSED: Mapping[tuple[str, str], str] = {
    ("mixed precision", "fp16"): "refused: fp16 underflows in heatmap gradients; use bf16 or no",
    ("FSDP", "1"): "refused: flat parameters have no gradient of a gradient; set fsdp_version: 2",
}


def _accelerate_settings(settings: Mapping[str, str]) -> Iterator[Check]:
    for name, value in settings.items():
        message = _REFUSED.get((name, value), "")
        if name == "dynamo" and value != "no":
            message = "refused: compiled graphs have no second derivative; remove dynamo_config"
        if name == "gradient accumulation" and value != "1":
            message = "refused: it would count twice; leave it at 1, and set training.gradient_accumulation"
        shown = f"version {value}" if name == "FSDP" and value != "no" else value
        yield Check(name, "warning" if message else "ok", shown, message, details={"value": value})


def backbones() -> Iterator[Check]:
    """Each file of ``backbones``: whether it can be imported, and a tiny random model of it explained."""
    package = import_module("evidence_ft.backbones")
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        yield _backbone(name)


def _backbone(name: str) -> Check:
    try:
        with explained(f"evidence_ft.backbones.{name}"):
            module: ModuleType = import_module("evidence_ft.config").component("backbones", name)
    except InstallationError as error:
        status: Status = "absent" if error.extra else "failed"
        return Check(name, status, "cannot be imported", *error.problem, details={"imports": False, "self_test": None})
    except Exception as error:  # whatever a broken library came up with
        details = {"imports": False, "self_test": None}
        return Check(name, "failed", "cannot be imported", one_line(origin(error)), details=details)
    if not hasattr(module, "tiny"):
        return Check(name, "absent", "imports; no self-test", details={"imports": True, "self_test": None})
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as directory:
            try_out(module, Path(directory))
    except Exception as error:  # a self-test is there to find out what can go wrong
        seconds = round(time.monotonic() - began, 2)
        details = {"imports": True, "self_test": False}
        return Check(name, "failed", "self-test failed", one_line(error), seconds=seconds, details=details)
    seconds = round(time.monotonic() - began, 2)
    return Check(name, "ok", "self-test passed", seconds=seconds, details={"imports": True, "self_test": True})


def try_out(backbone: ModuleType, directory: Path) -> None:
    """Write the backbone's tiny model, load it, and explain a random image as training would: with a gradient.

    Args:
        backbone: exports ``tiny`` and ``load``.
        directory: empty; for the model.

    Raises:
        RuntimeError: the heatmap, or its gradient, is none; besides whatever the backbone and its library raise.
    """
    torch: Any = import_module("torch")
    heatmap = import_module("evidence_ft.heatmaps.gradient_attention").heatmap
    encoder = backbone.load(backbone.tiny(directory))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, *encoder.preprocessing.size, generator=generator)
    tower = encoder.image_tower
    trace = tower.trace(image)
    direction = torch.randn(trace.features.shape[1:], generator=generator)
    heat = heatmap(trace, lambda features: features @ direction, create_graph=True)
    if heat.shape != (1, *tower.grid) or not heat.isfinite().all() or not heat.any():
        raise RuntimeError(f"heatmap of shape {tuple(heat.shape)} has no finite mass on a grid of {tower.grid}")
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    gradients = [each for each in torch.autograd.grad(heat.sum(), trained, allow_unused=True) if each is not None]
    if not any(each.any() for each in gradients) or not all(each.isfinite().all() for each in gradients):
        raise RuntimeError("the heatmap has no finite gradient; a loss on it would train nothing")


def caches() -> Iterator[Check]:
    """Where models are kept, and whether the hub may be asked for more."""
    try:
        constants: Any = import_module("huggingface_hub.constants")
        yield _place("HF_HOME", Path(constants.HF_HOME))
        yield _place("hub cache", Path(constants.HF_HUB_CACHE))
    except Exception as error:  # whatever a broken library came up with
        yield Check("hub cache", "failed", message=f"huggingface_hub cannot be imported: {one_line(error)}")
    try:
        yield _place("torch hub", Path(import_module("torch").hub.get_dir()))
    except Exception as error:  # likewise; that torch is broken was said above
        yield Check("torch hub", "absent", message=one_line(error))
    for variable in (*OFFLINE_SWITCHES, "HF_DATASETS_OFFLINE"):
        message = "models are looked up in the hub cache alone" if variable == offline_switch() else ""
        value = os.environ.get(variable)
        yield Check(variable, "ok", value or "not set", message, details={"value": value, "offline": is_on(variable)})


def _place(name: str, path: Path) -> Check:
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    free = shutil.disk_usage(there).free
    message = "" if writable else f"{there} cannot be written: nothing can be downloaded; set {_variable(name)}"
    found = f"{path} ({_size(free)} free{'' if path.exists() else ', not made yet'})"
    details = {"path": str(path), "exists": path.exists(), "writable": writable, "free_bytes": free}
    return Check(name, "ok" if writable else "warning", found, message, details=details)


def _variable(name: str) -> str:
    return {"hub cache": "HF_HUB_CACHE", "torch hub": "TORCH_HOME"}.get(name, name)


def trackers() -> Iterator[Check]:
    """What ``report_to`` can name."""
    for name in _TRACKERS:
        version = installed(name)
        fix = "" if version else f"pip install {name}"
        status: Status = "ok" if version else "absent"
        yield Check(name, status, version or "not installed", fix=fix, details={"version": version})


def _size(amount: int) -> str:
    """Bytes for readers.

    Example:
        >>> _size(3 * 2**30)
        '3.0 GiB'
    """
    return f"{amount / 2**30:.1f} GiB"


_MARKS: Mapping[Status, str] = {"ok": "ok", "absent": "-", "warning": "warning", "failed": "FAILED"}


def table(title: str, checks: Sequence[Check], seen: set[str] | None = None) -> str:
    """A section, to be read in a terminal of 80 columns.

    Args:
        title: of the section.
        checks: its lines.
        seen: messages that need not be repeated; those written here are added.

    Example:
        >>> print(table("trackers", [Check("wandb", "absent", "not installed", fix="pip install wandb")]), end="")
        trackers
          -        wandb        not installed
                                pip install wandb
        <BLANKLINE>
    """
    seen = set() if seen is None else seen
    width = max([12, *(len(check.name) for check in checks)])
    lines = [title]
    for check in checks:
        took = "" if check.seconds is None else f" ({check.seconds:.1f} s)"
        start = f"  {_MARKS[check.status]:<8} {check.name:<{width}} "
        lines += _wrapped(start, f"{check.found}{took}")
        repeated = bool(check.message) and check.message in seen
        seen.add(check.message)
        lines += _wrapped(" " * len(start), "as above" if repeated else check.message)
        if check.fix and not repeated:
            lines.append(" " * len(start) + check.fix)  # in one piece, to be copied
    return "\n".join(lines) + "\n\n"


def _wrapped(start: str, text: str) -> list[str]:
    """Text behind its start, broken between words, and within one that fills a line, as paths do."""
    later = " " * len(start)
    lines = textwrap.wrap(text, _WIDTH - len(start), break_on_hyphens=False) or ([""] if start.strip() else [])
    return [f"{later if index else start}{line}".rstrip() for index, line in enumerate(lines)]


def _verdict(failed: Sequence[Check], checks: Sequence[Check]) -> str:
    warned = sum(check.status == "warning" for check in checks)
    warnings_ = f"{warned} warning(s)" if warned else "no warnings"
    if not failed:
        return f"Everything that is needed works; {warnings_}.\n"
    text = f"{len(failed)} failed ({', '.join(check.name for check in failed)}); {warnings_}. Mend the first one first."
    return textwrap.fill(text, _WIDTH) + "\n"
