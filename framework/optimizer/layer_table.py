"""The table of all parameters as one reads it: still the list of its rows, printed in columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

from .report import LayerRow

__all__ = ["LayerTable"]

_GAP = "  "
_SILENT: tuple[object, ...] = ("", None, (), False)  # and 0, which equals False
_NAMED = 40
"""Letters of the names of parameters; more of them are counted."""


class LayerTable(list[LayerRow]):
    """What ``optimizer.layer_table()`` returns: a list of :class:`LayerRow` that prints as an aligned table.

    One column per field of the rows, a column in which nothing is said left out; many parameters are counted; bytes in
    KiB and MiB; the total below. A notebook shows it as an HTML table. ``list(table)`` is the bare list.
    """

    def __str__(self) -> str:
        heads, cells, numeric = self._cells()
        if not cells:
            return "no parameters"
        lines = [heads, *cells]
        widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
        rule = ["-" * width for width in widths]
        return "\n".join(
            _GAP.join(
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in (heads, rule, *cells, self._total(heads))
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        heads, cells, numeric = self._cells()

        def row(line: Sequence[str], tag: str) -> str:
            sides = ["right" if right else "left" for right in numeric]
            inner = (
                f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'
                for text, side in zip(line, sides, strict=True)
            )
            return f"<tr>{''.join(inner)}</tr>"

        body = "".join(row(line, "td") for line in [*cells, self._total(heads)])
        return f"<table><thead>{row(heads, 'th')}</thead><tbody>{body}</tbody></table>"

    def _cells(self) -> tuple[list[str], list[list[str]], list[bool]]:
        """Headings, rows of text, and which columns are right-aligned."""
        names = [field.name for field in dataclasses.fields(LayerRow)]
        values = {name: [getattr(row, name) for row in self] for name in names}
        told = [name for name in names if name == "bytes" or any(value not in _SILENT for value in values[name])]
        cells = [[_shown(name, getattr(row, name)) for name in told] for row in self]
        numeric = [
            all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in values[name])
            for name in told
        ]
        return told, cells, numeric

    def _total(self, heads: Sequence[str]) -> list[str]:
        whole = _shown("bytes", sum(row.bytes for row in self))
        count = f"{len(self)} row{'' if len(self) == 1 else 's'}"
        return [whole if name == "bytes" else count if place == 0 else "" for place, name in enumerate(heads)]


def _shown(name: str, value: Any) -> str:
    if name == "bytes":
        scale, unit = next(
            ((2**power, unit) for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if value >= 2**power), (1, "B")
        )
        return f"{value / scale:.1f} {unit}" if unit != "B" else f"{value} B"
    if name == "shape":
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, tuple):
        text = ", ".join(map(str, value))
        return text if len(text) <= _NAMED else f"{len(value)} {name}"
    return "" if value is None else str(value)
