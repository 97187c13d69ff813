"""How commands speak: a line, a bar while something lasts, and the choice of what to show."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ...errors import UnknownNameError, near_misses
from ..runs.on_screen import FittedTable, say

__all__ = ["bar", "names_with_texts", "say", "show_named"]

Entry = TypeVar("Entry")

_MANY = 60
"""Names that are too many for a message; kinds are listed instead."""


class _Description(ProgressColumn):
    """As many words of a task's description as stand beside the bar."""

    _BESIDE = 58

    def __init__(self, console: Console):
        super().__init__()
        self._room = console.width - self._BESIDE

    def render(self, task: Task) -> Text:
        text = Text.from_markup(task.description)
        return Text(textwrap.shorten(text.plain, max(1, self._room), placeholder=""))


def bar(console: Console) -> Progress:
    """A bar on a terminal, which vanishes at the end; nothing in a log. Its description ends where the line does."""
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    return Progress(
        *columns,
        TimeRemainingColumn(),
        _Description(console),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def names_with_texts(rows: Mapping[str, str], width: int = 0) -> Table:
    """Names in a column of their own, a text beside each that goes on below itself; without lines.

    Args:
        rows: texts by name, none of them markup.
        width: of the names, at least.
    """
    table = FittedTable.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold", min_width=width)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(escape(name.ljust(width)), escape(text))
    return table


def show_named(
    console: Console,
    kind: str,
    words: Sequence[str],
    entries: Mapping[str, Entry],
    page: Callable[[Entry], RenderableType],
    listed: Callable[[list[Entry]], RenderableType],
    matching: Callable[[str], Iterable[str]] | None = None,
    kinds: Iterable[str] = (),
) -> None:
    """Print what ``words`` name: full names one by one in full, anything else as a list.

    Args:
        console: where to print.
        kind: of thing, for messages.
        words: names, or pieces of names; none means all.
        entries: everything by name, in the order of the list.
        page: one of them in full.
        listed: several.
        matching: names that a word means; by default those that hold it.
        kinds: further words that mean something, for messages.

    Raises:
        UnknownNameError: a word means nothing.
    """
    if words and all(word in entries for word in words):
        for word in words:
            console.print(page(entries[word]))
        return
    chosen = set() if words else set(entries)
    for word in words:
        found = set(matching(word) if matching else (name for name in entries if word.lower() in name.lower()))
        if not found:
            known = [*entries, *kinds]
            if len(known) > _MANY and not near_misses(word, known):
                known = [*kinds]
            raise UnknownNameError(kind, word, known)
        chosen |= found
    console.print(listed([entry for name, entry in entries.items() if name in chosen]))
