"""Words that no command and no option has: what was probably meant, and what to type for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import tyro
from rich.console import Console, Group

from ...errors import ArgumentError, near_misses
from .screen import names_with_texts, say

__all__ = ["refuse_mistyped", "refuse_surplus", "show_what_can_be_shown"]

SHOWN = {
    "osculate methods": "every method with one line; --details for papers and numbers",
    "osculate methods kfac": "one method in full: options, defaults, paper, its parts",
    "osculate methods --parts": "what methods are made of, by kind",
    "osculate methods --parts damping": "the parts of one kind",
    "osculate methods --parts Kronecker": "one part in full: arguments, defaults",
    "osculate methods --compose Kronecker": "what fits together, and why not",
    "osculate problems": "every problem with one line",
    "osculate problems digits-classifier": "one problem in full: data, batch, target, options",
    "osculate study --list": "the shipped studies",
    "osculate study smoke --dry-run": "one study: arms, spaces, number of runs",
    "osculate study --format": "how the file of a study is written",
    "osculate diagnose runs/RUN": "how well a run's preconditioner fits the curvature",
    "osculate report runs/STUDY": "figures and tables of a study",
    "osculate COMMAND --help": "the options of a command",
}
"""Commands that show something, with an example for each."""

_COMMANDS = {
    **dict.fromkeys(("show", "list", "ls", "info"), "methods problems"),
    **dict.fromkeys(("part", "parts"), "methods --parts"),
    **dict.fromkeys(("compose", "compositions"), "methods --compose"),
    **dict.fromkeys(("run", "fit", "optimize", "optimise"), "train"),
    **dict.fromkeys(("race", "benchmark"), "compare bench"),
    **dict.fromkeys(("tune", "sweep", "search"), "study"),
    **dict.fromkeys(("plot", "draw", "figures", "tables"), "report"),
    **dict.fromkeys(("check", "test"), "verify certify"),
    "help": "--help",
    "version": "--version",
}
"""What other programs call it; the commands of this one, separated by blanks unless an option follows."""

_OPTIONS = {
    **dict.fromkeys(("learning-rate", "step-size"), ("lr",)),
    **dict.fromkeys(("optimizer", "optimiser", "algorithm"), ("method", "methods")),
    **dict.fromkeys(("dataset", "data", "task", "model"), ("problem", "problems")),
    **dict.fromkeys(("time", "max-seconds", "timeout"), ("seconds",)),
    **dict.fromkeys(("output", "output-dir", "out-dir", "folder", "dir"), ("out",)),
    **dict.fromkeys(("gpu", "cuda"), ("device",)),
    **dict.fromkeys(("jobs", "processes"), ("workers", "processes")),
    **dict.fromkeys(("schedule", "scheduler"), ("lr-schedule",)),
    **dict.fromkeys(("warmup", "lr-warmup", "warm-up"), ("lr-warm-up", "warm-start")),
    "wd": ("weight-decay",),
}
"""What other programs call it, beside the options of the command that mean it."""

_PLACED = get_args(tyro.conf.Positional[str])[1]


def refuse_mistyped(words: Sequence[str], commands: Mapping[str, type[Any]]) -> None:
    """Check the command and the names of its options, before anything is parsed.

    Args:
        words: behind the program's name.
        commands: dataclasses by name, whose fields are the options.

    Raises:
        ArgumentError: a command or an option does not exist; the near misses are listed.
    """
    if not words:
        raise ArgumentError("a command is missing; 'osculate --help' lists them, 'osculate compare' is a good start")
    if words[0] not in commands:
        raise ArgumentError(_unknown_command(words[0], commands))
    for place, word in enumerate(words[1:], 1):
        if word == "--":
            return
        name = word.partition("=")[0][2:].replace("_", "-")
        if word.startswith("--") and name not in _options(commands[words[0]]) and name != "help":
            raise ArgumentError(_unknown_option(name, words[0], commands))
        followed = "=" in word or (place + 1 < len(words) and not words[place + 1].startswith("--"))
        if name in _lists(commands[words[0]]) and not followed:
            raise ArgumentError(f"--{name} needs at least one value; 'osculate {words[0]} --help' says what it takes")


def refuse_surplus(command: str, words: Sequence[str], names: Mapping[str, Iterable[str]]) -> None:
    """Say what becomes of words that no option of a command asks for.

    Args:
        command: its name.
        words: those that are left.
        names: of methods, problems and so on, by the option that takes them.

    Raises:
        ArgumentError: there is one.
    """
    if not words:
        return
    word = words[0]
    hints = [f"--{option} {word}" for option, known in names.items() if word in known]
    hint = f"did you mean {_either(hints)}? " if hints else ""
    what = "option" if word.startswith("-") else "word"
    usage = f"'osculate {command} --help' has all options"
    raise ArgumentError(f"'osculate {command}' can do nothing with the {what} {word!r}; {hint}{usage}")


def show_what_can_be_shown(console: Console) -> None:
    """Print what commands show, with an example for each."""
    say(console, "What can be shown, with an example for each:\n")
    console.print(Group(names_with_texts({f"  {example}": text for example, text in SHOWN.items()})))


def _options(kind: type[Any]) -> frozenset[str]:
    """Names of options, with the negation that switches have."""
    names = {entry.name.replace("_", "-") for entry in dataclasses.fields(kind)} - _without_names(kind)
    return frozenset({*names, *(f"no-{name}" for name in names)})


def _lists(kind: type[Any]) -> set[str]:
    """Options of any number of values, of which none would be as if they were left out."""
    return {entry.name.replace("_", "-") for entry in dataclasses.fields(kind) if entry.default == ()}


def _without_names(kind: type[Any]) -> frozenset[str]:
    """What is told by its place alone."""
    hints = get_type_hints(kind, include_extras=True)
    return frozenset(name.replace("_", "-") for name, hint in hints.items() if _PLACED in get_args(hint)[1:])


def _unknown_command(word: str, commands: Mapping[str, type[Any]]) -> str:
    if word.startswith("-"):
        return (
            f"option {word!r} before a command; it is 'osculate COMMAND {word} ...', and 'osculate --help' lists them"
        )
    meant = _COMMANDS.get(word.lower(), "")
    found = (
        [f"osculate {meant}"] if " --" in meant or meant.startswith("-") else [f"osculate {m}" for m in meant.split()]
    )
    found = found or [f"osculate {name}" for name in near_misses(word, commands)]
    hint = f"did you mean {_either(map(repr, found))}? " if found else ""
    shown = "; 'osculate show --help' says what can be shown" if "methods" in meant else ""
    return f"unknown command {word!r}; {hint}'osculate --help' lists the commands{shown}"


def _unknown_option(name: str, command: str, commands: Mapping[str, type[Any]]) -> str:
    own = _options(commands[command])
    spelled = [entry for entry in own if entry.startswith("no-") is name.startswith("no-")]
    found = [entry for entry in _OPTIONS.get(name, ()) if entry in own] or near_misses(name, spelled, cutoff=0.6)
    if name in _without_names(commands[command]):
        return f"'osculate {command}' takes its {name} without --{name}; see 'osculate {command} --help'"
    others = [other for other, kind in commands.items() if name in _options(kind)]
    hint = f"did you mean {_either(f'--{entry}' for entry in found)}? " if found else ""
    if others:
        hint += f"{_either(f'{other!r}' for other in others[:3])} has one of this name. "
    return f"'osculate {command}' has no option --{name}; {hint}'osculate {command} --help' lists its options"


def _either(phrases: Iterable[str]) -> str:
    return " or ".join(phrases)
