"""How commands speak: a line, a bar while something lasts, and the choice of what to show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...errors import UnknownNameError

__all__ = ["bar", "say", "show_named"]

Entry = TypeVar("Entry")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: nothing in it is markup or coloured, and a long path is not broken."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def bar(console: Console) -> Progress:
    """A bar on a terminal, which vanishes at the end; nothing in a log."""
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    return Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def show_named(
    console: Console,
    kind: str,
    words: Sequence[str],
    entries: Mapping[str, Entry],
    page: Callable[[Entry], RenderableType],
    table: Callable[[list[Entry]], RenderableType],
    matching: Callable[[str], Iterable[str]] | None = None,
    kinds: Iterable[str] = (),
) -> None:
    """Print what ``words`` name: full names one by one in full, anything else as rows of a table.

    Args:
        console: where to print.
        kind: of thing, for messages.
        words: names, or pieces of names; none means all.
        entries: everything by name, in the order of the table.
        page: one of them in full.
        table: several.
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
            raise UnknownNameError(kind, word, [*entries, *kinds])
        chosen |= found
    console.print(table([entry for name, entry in entries.items() if name in chosen]))
