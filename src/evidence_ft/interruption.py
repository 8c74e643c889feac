"""Signals that ask training to stop: they are noted, and acted upon between two steps.

This module knows nothing of training.
"""

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818  # no error: training does what it was told
    """Training was asked to stop (SIGTERM, Ctrl-C) and has done so after a whole step.

    Attributes:
        checkpoint: where it can be resumed; None where the trainer has no directory.
        exit_code: for a command line: 75, "temporary failure, try again" of ``sysexits.h``.
    """

    exit_code = 75

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        where = f"resume from {checkpoint}" if checkpoint else "nothing was saved: the trainer has no directory"
        super().__init__(f"training was interrupted after step {step}; {where}")
        self.checkpoint = checkpoint


@contextmanager
def noted_signals() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and SIGINT are noted; a second one of its kind acts as it did before.

    Only the main thread may listen; elsewhere nothing is noted.
    """
    noted: deque[int] = deque()
    previous: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, previous[number])
        _log.warning("%s: stopping after this step; once more to stop at once", signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            # None stands for a handler that was not set from Python, and cannot be put back.
            previous[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, note)
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def outlive_one_signal(_worker: int) -> None:
    """A scheduler and Ctrl-C signal all processes of a group: were loaders to die, the last step could not be saved.

    A second signal ends them, as one of the two does that a process sends its children when it exits.
    """
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if noted:
            os._exit(0)
        noted.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
