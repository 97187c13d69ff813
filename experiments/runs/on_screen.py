"""What is printed fits the screen: no word is broken and nothing is cut, in lines and in tables."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

__all__ = ["FittedTable", "print_text", "say"]

_TABLES = 2
"""More tables below each other than these are hard to read."""


def say(console: Console, text: str, style: str | None = None, markup: bool = False) -> None:
    """Print a line as it is: nothing in it is coloured, and a long path is not broken.

    On a terminal lines that are too long go on in the next one between two words; in a file every line stays one.

    Args:
        console: where to print.
        text: the line.
        style: of the whole.
        markup: whether brackets in it are markup.
    """
    shown = Text.from_markup(text) if markup else Text(text)
    print_text(console, shown, style, console.width if console.is_terminal else None)


def print_text(console: Console, text: Text, style: str | None = None, width: int | None = None) -> None:
    """Print a text whose lines end between two words.

    Args:
        console: where to print.
        text: with its colours.
        style: of the whole.
        width: of a line; a longer word has one of its own. ``None``: as long as they are.
    """
    for line in text.split("\n", allow_blank=True):
        for piece in [line] if width is None else line.divide(_ends(line.plain, width)):
            piece.rstrip()
            console.print(piece, style=style, highlight=False, soft_wrap=True)


def _ends(line: str, width: int) -> list[int]:
    """Where a line is broken: before words that do not fit any more."""
    ends, start = [], 0
    for word in re.finditer(r"\S+", line):
        if word.end() - start > width and line[start : word.start()].strip():
            ends.append(word.start())
            start = word.start()
    return ends


class _Need(NamedTuple):
    """Width of a column at which no word is broken, and at which no line is."""

    least: int
    most: int


class FittedTable(Table):
    """A table in which no word is broken and nothing is cut, on a screen of any width.

    Columns share the width by what is in them. Where not even their longest words fit beside each other, the rest of
    the columns follows in a second table below, with the first column again (the first two where only both tell the
    rows apart). Only a word that is wider than the screen leaves beside them is broken, and goes on in the next line.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needs = [_need(console, column) for column in self.columns]
        keys = self._keys()
        groups = _groups(needs, keys, options.max_width, self._overhead)
        if len(groups) > _TABLES:  # then names, too, go on below themselves
            needs = [
                _Need(_longest(console, column), need.most) for column, need in zip(self.columns, needs, strict=True)
            ]
            groups = _groups(needs, keys, options.max_width, self._overhead)
        for number, group in enumerate(groups):
            part = self._part(group, first=number == 0, last=number == len(groups) - 1)
            widths = _shares([needs[place] for place in group], options.max_width - self._overhead(len(group)))
            for column, width in zip(part.columns, widths, strict=True):
                column.width, column.no_wrap, column.overflow = width, False, "fold"
            whole = min(options.max_width, sum(widths) + self._overhead(len(group)))
            if part.title and _longest_word(console, part.title) > whole:
                yield Text("\n".join(_lines(console, part.title)), style="table.title", justify="center")
                part.title = None
            yield from Table.__rich_console__(part, console, options)

    def _keys(self) -> int:
        """How many of the first columns tell the rows apart; one where two do not, or there is a single row."""
        columns = [[str(cell) for cell in column.cells] for column in self.columns[:2]]
        rows = list(zip(*columns, strict=True))
        return 2 if len(set(columns[0])) < len(rows) == len(set(rows)) and len(columns) > 1 else 1

    def _overhead(self, columns: int) -> int:
        """Width of lines and padding."""
        _, right, _, left = self.padding
        return columns * (left + right) + (0 if self.box is None else columns + 1)

    def _part(self, places: Sequence[int], first: bool, last: bool) -> Table:
        part = copy.copy(self)
        part.columns = [replace(self.columns[place]) for place in places]
        for index, column in enumerate(part.columns):
            column._index = index
        if not first:
            part.title = None
        if not last:
            part.caption = None
        return part


def _lines(console: Console, cell: object) -> list[str]:
    text = cell if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)
    return text.plain.splitlines()


def _longest_word(console: Console, cell: object) -> int:
    return max((len(word) for line in _lines(console, cell) for word in line.split()), default=0)


def _need(console: Console, column: Column) -> _Need:
    most = max((len(line) for cell in [column.header, *column.cells] for line in _lines(console, cell)), default=1)
    return _Need(max(1, most) if column.no_wrap else _longest(console, column), max(1, most))


def _longest(console: Console, column: Column) -> int:
    return max(1, *(_longest_word(console, cell) for cell in [column.header, *column.cells]))


def _groups(needs: Sequence[_Need], keys: int, width: int, overhead: Callable[[int], int]) -> list[list[int]]:
    """Columns that stand beside each other; the first ones, which tell the rows apart, lead every group."""
    leading = list(range(min(keys, len(needs))))
    groups = [leading]
    for place in range(len(leading), len(needs)):
        tried = [*groups[-1], place]
        full = sum(needs[index].least for index in tried) + overhead(len(tried)) > width
        if full and len(groups[-1]) > len(leading):
            groups.append([*leading, place])
        else:
            groups[-1] = tried
    return groups


def _shares(needs: Sequence[_Need], width: int) -> list[int]:
    """Width of every column: its words first, then what it lacks most; less than a word only where there is no more."""
    shares = [need.least for need in needs]
    while sum(shares) > width and max(shares) > 1:
        shares[shares.index(max(shares))] -= 1
    while sum(shares) < width:
        lacks = [need.most / share for need, share in zip(needs, shares, strict=True)]
        if max(lacks) <= 1:
            break
        shares[lacks.index(max(lacks))] += 1
    return shares
