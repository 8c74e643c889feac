"""Trackers that a training reports to, such as TensorBoard: which there are, and when they start and end."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from evidence_ft.checkpoints import flattened
from evidence_ft.files import named

_RUN_IS_CALLED = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}


def check(names: Sequence[str]) -> None:
    """Refuse trackers that cannot be had, before anything is loaded.

    Raises:
        ValueError: no such tracker, or its package is not installed.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no tracker {name!r}; {hint}there are {named(known, 20)}")
        if name not in installed:
            raise ValueError(
                f"tracker {name!r} is not installed: pip install {name.replace('_', '-')}, or leave it out; installed: "
                f"{named(installed, 20)}"
            )


def start(accelerator: Accelerator, project: str, settings: Mapping[str, Any], run: str | None = None) -> None:
    """Tell the accelerator's trackers of a run and its settings.

    Args:
        accelerator: made with ``log_with``.
        project: that the run belongs to.
        settings: a tree, which becomes dotted names.
        run: its name, for trackers that name runs; None for a name of theirs.
    """
    told = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flattened(settings).items()
    }
    options = {} if run is None else {tracker: {key: run} for tracker, key in _RUN_IS_CALLED.items()}
    accelerator.init_trackers(project, told, options)


def stop(accelerator: Accelerator) -> None:
    """End the run; another one can be started."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
