"""The command ``osculate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from ...errors import OsculateError
from .bounded import BoundedTraining
from .certify import Certify
from .compare_structures import CompareStructures
from .convergence_map import ConvergenceMap
from .diagnose import Diagnose, Microscope
from .report import Report
from .show import Bench, Methods, Problems
from .study import RunStudy
from .submission import ExportSubmission
from .train import Compare, Replay, Train
from .verify import Verify

__all__ = ["execute", "main"]

Command = (
    Train | Compare | Replay | Methods | Problems | Bench | Certify | ConvergenceMap | Report | ExportSubmission
) | (
    Annotated[RunStudy, tyro.conf.subcommand("study")]
    | Verify
    | BoundedTraining
    | Diagnose
    | Microscope
    | CompareStructures
)

DESCRIPTION = """Second-order optimizers for deep networks, composed from small parts.

Start with 'osculate compare': it races the methods on an embedded problem and draws the figure.

'osculate methods' and 'osculate problems' list what there is; 'osculate train --method kbfgs' trains with one method;
'osculate COMMAND --help' explains a command.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 2 for bad input, 130 for Ctrl-C, else the command's own.

    Args:
        arguments: words after the program's name; None takes those of this process.
    """
    try:
        sys.exit(execute(arguments))
    except BrokenPipeError:  # whoever read the output has seen enough (`| head`); nothing is left to be flushed to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; see ``main``."""
    command: Command = tyro.cli(
        Command,
        prog="osculate",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.EnumChoicesFromValues,),
    )
    try:
        return command.run(Console())
    except OsculateError as error:
        panel = Panel(escape(str(error)), title=type(error).__name__, title_align="left", border_style="red")
        Console(stderr=True).print(panel)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
