"""The command line: ``evidence-ft <command>``, or ``python -m evidence_ft <command>``.

A command is a function that adds itself to the parser; what it runs is imported when it is run, because the model
libraries take seconds, and because some commands must work where those cannot be imported.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from evidence_ft import __doc__ as summary
from evidence_ft import __version__

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line's by default.

    Returns:
        The exit code: 0 where all is well, 1 where it is not.

    Raises:
        SystemExit: 0 after ``--help`` or ``--version``, 2 after a command line that cannot be.
    """
    parser = argparse.ArgumentParser(prog="evidence-ft", description=summary)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for add in COMMANDS:
        add(commands)
    chosen = parser.parse_args(arguments)
    code: int = chosen.run(chosen)
    return code


def _doctor(commands: Commands) -> None:
    about = "check the installation: versions, devices, settings, and every backbone on a tiny model"
    parser = commands.add_parser(
        "doctor", help=about, description=f"{about[0].upper()}{about[1:]}. Exits with 1 if something needed fails."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(chosen: argparse.Namespace) -> int:
    from evidence_ft import doctor

    return doctor.main(sys.stdout, as_json=chosen.json)


COMMANDS: tuple[Callable[[Any], None], ...] = (_doctor,)
"""What adds each command to the parser, in the order of ``--help``."""
