"""Rows of measurements as a CSV file and as a table on the screen."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..runs.targets import writing

__all__ = ["print_table", "write_rows"]

_WIDTH = 120
"""Of a table on a narrower screen: its lines then continue, which is easier to read than words cut into pieces."""


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


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a table of chosen columns.

    Args:
        console: where.
        title: above it.
        rows: to show.
        columns: heading by name in the rows; text is left-aligned.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name, heading in columns.items():
        text = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(heading, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    Console(file=console.file, width=max(_WIDTH, console.width), highlight=False).print(table)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
