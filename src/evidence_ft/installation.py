"""What is installed, what this package asks for, and what to type where the two do not meet.

What is asked for is read from the metadata of the installed packages, and nothing is imported but the standard library
and ``packaging``: this module answers where the model libraries cannot be imported, and says why they cannot.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

OURS = "evidence-ft"

_IMPORTED_AS = {"open_clip": "open_clip_torch", "PIL": "pillow", "yaml": "pyyaml"}
"""Packages that are imported by another name than they are installed by."""

_BUILD = re.compile(r"cpu|xpu|cu\d+|rocm[\d.]+")
"""Local versions of the builds on download.pytorch.org, which are also the names of their indices."""


OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that keep the hub's client from the network."""


class Problem(NamedTuple):
    """What is wrong with an installation, and the command that mends it."""

    message: str
    fix: str


class InstallationError(ImportError):
    """A library that cannot be imported; the message says which, why, and what to type.

    Attributes:
        problem: what is wrong, and the command that mends it.
        extra: the extra of this package that would bring the library, where none but an extra does.
    """

    def __init__(self, problem: Problem, extra: str | None = None) -> None:
        advice = f"type: {problem.fix} ({OURS} doctor checks the rest)" if problem.fix else f"try {OURS} doctor"
        super().__init__(f"{problem.message}; {advice}")
        self.problem = problem
        self.extra = extra


def installed(package: str) -> str | None:
    """Version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements(package: str = OURS, extra: str = "") -> list[Requirement]:
    """What a package says it needs: always, or for an extra alone; empty if it is not installed."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    needed = [Requirement(line) for line in lines]
    return [each for each in needed if _applies(each, extra) and not (extra and _applies(each, ""))]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def supported(package: str, by: str = OURS) -> SpecifierSet | None:
    """The versions of a package that ``by`` can work with; None if it does not say."""
    name = canonicalize_name(package)
    found = [each.specifier for each in requirements(by) if canonicalize_name(each.name) == name]
    return found[0] if found else None


def version_problem(package: str) -> Problem | None:
    """A package that is not there, or of a version that this package does not support."""
    version, wanted = installed(package), supported(package) or SpecifierSet()
    if version is None:
        return Problem(f"{package} is not installed", f"pip install {_quoted(package, wanted)}")
    if not wanted.contains(version, prereleases=True):
        return Problem(f"{package} is {version}, expected {wanted}", f"pip install {_quoted(package, wanted)}")
    return None


def pair_problem(error: BaseException | None = None) -> Problem | None:
    """Torch and torchvision that do not fit together, whose errors elsewhere name neither.

    Each torchvision is compiled for some versions of torch, and says so in its metadata.

    Args:
        error: what importing or using torchvision ended with, which is a problem whatever the metadata say.
    """
    torch, torchvision = installed("torch"), installed("torchvision")
    if torch is None or torchvision is None:
        missing = version_problem("torch" if torch is None else "torchvision")
        return missing and missing._replace(fix=_install_pair(torch))
    wanted = supported("torch", by="torchvision") or SpecifierSet()
    expects = f"torchvision {torchvision} expects torch {wanted}" if wanted else f"torchvision {torchvision}"
    cause = "" if error is None else f" ({one_line(error)})"
    if not wanted.contains(torch, prereleases=True):
        return Problem(f"{expects}, but torch {torch} is installed{cause}", _install_pair(torch))
    if error is not None:
        return Problem(
            f"{expects}, and torch {torch} is installed, but torchvision does not work{cause}",
            f"pip install --force-reinstall --no-deps torch=={torch} torchvision=={torchvision}{_index(torch)}",
        )
    return None


def _install_pair(torch: str | None) -> str:
    """The newest torchvision for the torch that is there, if that one is supported; else both anew."""
    wanted = supported("torch") or SpecifierSet()
    keeps = torch is not None and wanted.contains(torch, prereleases=True)
    pinned = f"torch=={torch}" if keeps else _quoted("torch", wanted)
    return f"pip install --upgrade {pinned} {_quoted('torchvision', supported('torchvision'))}{_index(torch or '')}"


def _index(torch: str) -> str:
    """Where builds for other accelerators than PyPI's are: a torchvision from elsewhere would not fit them."""
    build = torch.partition("+")[2]
    return f" --index-url https://download.pytorch.org/whl/{build}" if _BUILD.fullmatch(build) else ""


def _quoted(package: str, versions: SpecifierSet | None) -> str:
    return f'"{package}{versions}"' if versions else package


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say what is wrong with the installation where a library cannot be imported, instead of what comes of it.

    Args:
        what: is imported, as the message names it.

    Raises:
        InstallationError: a package is missing or too old, or torchvision does not fit torch. All other errors pass.
    """
    try:
        yield
    except InstallationError:
        raise
    except (ImportError, RuntimeError) as error:
        explanation = _explanation(what, error)
        if explanation is None:
            raise
        raise explanation from error


def _explanation(what: str, error: BaseException) -> InstallationError | None:
    errors = list(_chain(error))
    roots = [each.name.partition(".")[0] for each in errors if isinstance(each, ImportError) and each.name]
    # A package that is there may lack a module, in other versions of it: that one is not missing.
    missing = [root for root in roots if sys.modules.get(root) is None]
    if missing and "torchvision" not in missing:
        return _missing(what, missing[0])
    if any("torchvision" in str(each) for each in errors):
        problem = pair_problem(errors[-1])
    elif isinstance(error, ImportError):
        problem = pair_problem() or next(filter(None, map(_outdated, roots)), None)
    else:
        problem = None
    if problem is None:
        return None
    return InstallationError(problem._replace(message=f"{what} cannot be imported: {problem.message}"))


def _outdated(module: str) -> Problem | None:
    package = _IMPORTED_AS.get(module, module)
    return version_problem(package) if supported(package) else None


def _missing(what: str, module: str) -> InstallationError:
    package = _IMPORTED_AS.get(module, module)
    again = "--force-reinstall " if installed(package) else ""  # pip believes that it is there
    fix, extra = f"pip install {again}{_quoted(package, supported(package))}", None
    if supported(package) is None:
        extra = _extra_of(package)
        fix = f'pip install "{OURS}[{extra}]"' if extra else fix
    return InstallationError(Problem(f"{what} needs the package {package}, which is not there", fix), extra)


def _extra_of(package: str) -> str | None:
    """The extra of this package that asks for another one."""
    extras = metadata.metadata(OURS).get_all("Provides-Extra") or []
    name = canonicalize_name(package)
    return next((e for e in extras if name in {canonicalize_name(r.name) for r in requirements(extra=e)}), None)


def is_on(variable: str) -> bool:
    """Whether an environment variable is set to what Hugging Face's libraries take for yes."""
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def offline_switch() -> str | None:
    """The variable that keeps the hub's client from the network, if one does."""
    return next(filter(is_on, OFFLINE_SWITCHES), None)


def origin(error: BaseException) -> BaseException:
    """What an error comes from in the end, where libraries have wrapped it."""
    return list(_chain(error))[-1]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on to the first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def one_line(error: BaseException) -> str:
    r"""Type and message of an error.

    Example:
        >>> one_line(ValueError("two\nlines")), one_line(KeyError())
        ('ValueError: two lines', 'KeyError')
    """
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
