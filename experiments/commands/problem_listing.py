"""What ``osculate problems`` shows: the table of problems, and one of them in full."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ...errors import UnknownNameError
from ..problems import PROBLEMS, Problem, get_problem
from .docstrings import describe
from .listing import options_table, pairs_table

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
    if words and all(word in PROBLEMS for word in words):
        for word in words:
            console.print(_page(get_problem(word)))
        return
    chosen = list(PROBLEMS) if not words else []
    for word in words:
        found = [name for name in PROBLEMS if word.lower() in name]
        if not found:
            raise UnknownNameError("problem", word, PROBLEMS)
        chosen += found
    table = Table("problem", "summary", "likelihood", "batch", title="problems", caption=_CAPTION)
    for name in PROBLEMS:
        if name in chosen:
            problem = get_problem(name)
            table.add_row(f"[bold]{name}", escape(problem.summary), problem.likelihood, _batch(problem))
    console.print(table)


def _page(problem: Problem) -> RenderableType:
    facts: dict[str, Any] = {
        "data": problem.source.title,
        "licence": problem.source.licence,
        "citation": problem.source.citation,
        "address": problem.source.address or "none",
        "likelihood": problem.likelihood,
        "batch": _batch(problem),
        "epochs": problem.epochs,
        "target": "none" if problem.target is None else f"{problem.target.metric} {problem.target.value:g}",
        "augmentation": "none" if problem.augmentation is None else str(problem.augmentation),
    }
    for method, numbers in problem.settings.items():
        facts[f"{method} takes"] = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
    factory: Any = PROBLEMS[problem.name]
    taken = factory.args if isinstance(factory, functools.partial) else ()
    described = describe(factory.func if isinstance(factory, functools.partial) else factory)
    heading = f"[bold]{problem.name}[/]  {escape(problem.summary)}"
    return Group(heading, "", pairs_table(facts), "", options_table(described.arguments[len(taken) :]), "")


def _batch(problem: Problem) -> str:
    return "all" if problem.batch_size is None else str(problem.batch_size)
