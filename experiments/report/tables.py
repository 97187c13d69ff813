"""Tables of measurements: what a cell shows, as a CSV file, and on the screen."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runs.on_screen import FittedTable
from ..runs.targets import writing

__all__ = ["Spread", "cell", "numeric_columns", "print_table", "screen_table", "write_rows"]


class Spread(NamedTuple):
    """Median over seeds, quartiles, and the interval of the median."""

    median: float
    q25: float
    q75: float
    low: float
    high: float


def cell(value: object, digits: int = 4, written: Callable[[str], str] = str) -> str:
    """What a cell shows: nothing for what is not known, and ``median [lower quartile, upper quartile]`` of a spread.

    Args:
        value: anything.
        digits: of numbers that are not whole, >= 1.
        written: how the medium writes the text of such a number, ``inf`` among them; empty for what is not a number.
    """
    if isinstance(value, Spread):
        median, q25, q75 = (cell(entry, digits, written) for entry in value[:3])
        return f"{median} [{q25}, {q75}]"
    if isinstance(value, float):
        return written("" if math.isnan(value) else f"{value:.{digits}g}")
    return "" if value is None else str(value)


def numeric_columns(frame: pd.DataFrame) -> list[str]:
    """Which columns hold nothing but numbers and spreads."""
    return [str(name) for name in frame if all(isinstance(value, int | float | Spread) for value in frame[name])]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; the columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(row) for row in rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(buffer.getvalue(), encoding="utf-8")


def screen_table(
    title: str,
    rows: Sequence[Mapping[Any, Any]],
    columns: Mapping[str, str],
    digits: int = 4,
    fold: bool = True,
    **look: Any,
) -> Table:
    """A table of chosen columns for the screen, without those in which no row has anything.

    Args:
        title: above it, not markup.
        rows: to show.
        columns: heading by name in the rows; text is left-aligned.
        digits: of numbers.
        fold: whether text may go on in the next line.
        **look: further keywords of :class:`rich.table.Table`.
    """
    table = FittedTable(title=escape(title), **look)
    known = [name for name in columns if not rows or any(cell(row.get(name), digits) for row in rows)]
    columns = {name: columns[name] for name in known}
    for name, heading in columns.items():
        text = any(isinstance(row.get(name), str) for row in rows)
        justify: Literal["left", "right"] = "left" if text else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=text and not fold)
    for row in rows:
        table.add_row(*(escape(cell(row.get(name), digits)) for name in columns))
    return table


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a table of many columns, of which a narrow screen gets some below the others; see :func:`screen_table`."""
    console.print(screen_table(title, rows, columns, digits=3, fold=False, box=box.SIMPLE_HEAD))
