"""What ``osculate problems`` shows: the list of problems, and one of them in full."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape

from ..problems import PROBLEMS, Problem, get_problem
from .docstrings import describe
from .listing import options_table, pairs_table
from .screen import names_with_texts, show_named

__all__ = ["show_problems"]

_FOOTER = (
    "'osculate problems NAME' shows one in full. All take --problem-option size=small: less data, a narrower network."
)


def show_problems(console: Console, words: Sequence[str]) -> None:
    """Print the problems that ``words`` name: full names one by one in full, anything else as a list.

    Args:
        console: where to print.
        words: names, or pieces of names; none means all.

    Raises:
        UnknownNameError: a word occurs in no name.
    """
    show_named(console, "problem", words, {name: name for name in PROBLEMS}, _page, _list)


def _list(names: list[str]) -> RenderableType:
    problems = {name: get_problem(name) for name in names}
    lines = {name: f"{problem.summary}; batch {_batch(problem)}" for name, problem in problems.items()}
    return Group(names_with_texts(lines), "", _FOOTER)


def _page(name: str) -> RenderableType:
    problem = get_problem(name)
    facts: dict[str, Any] = {
        "data": problem.source.title,
        "licence": problem.source.licence,
        "citation": problem.source.citation,
        "address": problem.source.address or "none",
        "likelihood": _likelihood(problem),
        "batch": _batch(problem),
        "epochs": problem.epochs,
        "target": "none" if problem.target is None else f"{problem.target.metric} {problem.target.value:g}",
        "augmentation": "none" if problem.augmentation is None else str(problem.augmentation),
    }
    for method, numbers in problem.settings.items():
        facts[f"{method} takes"] = ", ".join(f"{name} {_setting(value)}" for name, value in numbers.items())
    factory: Any = PROBLEMS[problem.name]
    taken = factory.args if isinstance(factory, functools.partial) else ()
    described = describe(factory.func if isinstance(factory, functools.partial) else factory)
    heading = f"[bold]{problem.name}[/]  {escape(problem.summary)}"
    return Group(heading, "", pairs_table(facts), "", options_table(described.arguments[len(taken) :]), "")


def _likelihood(problem: Problem) -> str:
    return "none: residuals" if problem.likelihood is None else problem.likelihood


def _batch(problem: Problem) -> str:
    return "all" if problem.batch_size is None else str(problem.batch_size)


def _setting(value: float | str) -> str:
    """A number in short, a word as it is."""
    return value if isinstance(value, str) else f"{value:g}"
