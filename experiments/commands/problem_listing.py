"""What ``osculate problems`` shows: the table of problems, and one of them in full."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ..problems import PROBLEMS, Problem, get_problem
from .docstrings import describe
from .listing import options_table, pairs_table
from .screen import show_named

__all__ = ["show_problems"]

_CAPTION = (
    "'osculate problems NAME' shows one in full; all take --problem-option size=small, less data, narrower network"
)


def show_problems(console: Console, words: Sequence[str]) -> None:
    """Print the problems that ``words`` name: full names one by one in full, anything else as rows of a table.

    Args:
        console: where to print.
        words: names, or pieces of names; none means all.

    Raises:
        UnknownNameError: a word occurs in no name.
    """
    show_named(console, "problem", words, {name: name for name in PROBLEMS}, _page, _table)


def _table(names: list[str]) -> Table:
    table = Table("problem", "summary", "likelihood", "batch", title="problems", caption=_CAPTION)
    for problem in map(get_problem, names):
        table.add_row(f"[bold]{problem.name}", escape(problem.summary), _likelihood(problem), _batch(problem))
    return table


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
