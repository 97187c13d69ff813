"""The command ``osculate``."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import platform
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO, Union

import torch
import tyro
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from ... import __version__
from ...errors import OsculateError
from ..problems import PROBLEMS
from ..rivals.catalogue import runnable
from ..runs.on_screen import print_text
from .bounded import BoundedTraining
from .certify import Certify
from .compare_structures import CompareStructures
from .convergence_map import ConvergenceMap
from .diagnose import Diagnose, Microscope
from .flags import NUMBERS, StyleFlag
from .mistyped import refuse_mistyped, refuse_surplus, show_what_can_be_shown
from .report import Report
from .screen import names_with_texts, say
from .show import Bench, Methods, Problems
from .study import RunStudy
from .submission import ExportSubmission
from .train import Compare, Replay, Train
from .verify import Verify

__all__ = ["execute", "main"]

_DESCRIPTION = """Second-order optimizers for deep networks, composed from small parts.

Start with 'osculate compare': it races the methods on an embedded problem and draws the figure.
"""
_FOOTER = """'osculate COMMAND --help' explains a command, 'osculate show --help' says what can be shown.
'osculate train --method kbfgs' trains with one method."""

GROUPS: dict[str, dict[str, tuple[type[Any], str]]] = {
    "train": {
        "train": (Train, "train one problem with one method"),
        "bounded-training": (BoundedTraining, "train with every damping of pairs, check every bound"),
    },
    "compare": {
        "compare": (Compare, "race methods on a problem: a table and a figure"),
        "bench": (Bench, "time a step of every method, or count its operations"),
        "microscope": (Microscope, "one step of several methods from the same checkpoint"),
        "compare-structures": (CompareStructures, "all structures beside the exact curvature"),
    },
    "study": {
        "study": (RunStudy, "tune every arm, then run the best on fresh seeds"),
        "report": (Report, "figures, tables and a page of a study"),
        "export-submission": (ExportSubmission, "an AlgoPerf submission of a method"),
    },
    "look": {
        "methods": (Methods, "list the methods and their parts, or show one in full"),
        "problems": (Problems, "list the problems, or show one in full"),
        "diagnose": (Diagnose, "how well a run's preconditioner fits the curvature"),
        "convergence-map": (ConvergenceMap, "where linear convergence is certified"),
    },
    "check": {
        "verify": (Verify, "check theorems by running them"),
        "certify": (Certify, "check every contract of a part or method"),
        "replay": (Replay, "replay recorded trajectories of the authors' code"),
    },
}
"""Commands by what one wants to do, each with a short line; ``osculate COMMAND --help`` has the rest."""

_HELP = ("-h", "--help")
_VERSION = ("-V", "--version")


class _Caught(io.StringIO):
    """What is printed meanwhile; what may be coloured and drawn is for the true output to say."""

    def __init__(self, real: TextIO):
        super().__init__()
        self._real = real

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._real.encoding

    def isatty(self) -> bool:
        return self._real.isatty()


def _parse(words: Sequence[str]) -> Any:
    """The command that ``words`` name, with its options; help is printed between the words, not through them."""
    commands = {name: command for group in GROUPS.values() for name, (command, _) in group.items()}
    if words and words[0].startswith("--tyro-"):  # completion for a shell
        kinds = [Annotated[command, tyro.conf.subcommand(name)] for name, command in commands.items()]
        every: Any = Union[tuple(kinds)]  # noqa: UP007  # of types that are known only here
        return tyro.cli(every, prog="osculate", args=words)
    refuse_mistyped(words, commands)
    parse = functools.partial(
        tyro.cli,
        commands[words[0]],
        prog=f"osculate {words[0]}",
        args=words[1:],
        config=(tyro.conf.EnumChoicesFromValues,),
    )
    if not any(word in _HELP for word in words):
        with NUMBERS:
            command, surplus = parse(return_unknown_args=True)
        refuse_surplus(words[0], surplus, {"method": runnable(), "problem": PROBLEMS})
        return command
    caught = _Caught(sys.stdout)
    try:
        with contextlib.redirect_stdout(caught):
            return parse()
    finally:
        console = Console()
        for line in caught.getvalue().splitlines():
            print_text(console, Text.from_ansi(line), width=console.width)


def _show_help(console: Console) -> None:
    """The commands by what one wants to do."""
    say(console, "usage: osculate COMMAND [...]\n")
    shown: list[RenderableType] = []
    names = max(len(name) for group in GROUPS.values() for name in group)
    for title, group in GROUPS.items():
        rows = {f"  {name}": line for name, (_, line) in group.items()}
        shown += [f"[bold underline]{title}[/]", names_with_texts(rows, names + 2), ""]
    console.print(_DESCRIPTION, highlight=False, markup=False)
    console.print(Group(*shown))
    console.print(_FOOTER, highlight=False, markup=False)


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
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in _HELP:
        _show_help(Console())
        sys.exit(0)
    if words and words[0] in _VERSION:
        say(Console(), f"osculate {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        sys.exit(0)
    if len(words) > 1 and words[0] == "show" and words[1] in _HELP:
        show_what_can_be_shown(Console())
        sys.exit(0)
    try:
        command = _parse(words)
    except OsculateError as error:
        _print_error(error)
        sys.exit(2)
    try:
        with command.drawing() if isinstance(command, StyleFlag) else contextlib.nullcontext():
            return int(command.run(Console()))
    except OsculateError as error:
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130


def _print_error(error: OsculateError) -> None:
    panel = Panel(escape(str(error)), title=type(error).__name__, title_align="left", border_style="red")
    Console(stderr=True).print(panel)
