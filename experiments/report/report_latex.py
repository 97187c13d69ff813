r"""Tables in LaTeX, with booktabs: one file that compiles by itself, one per table to include in a paper.

No line of a table is wider than :data:`WIDTH` points in ``\scriptsize``, by the widths of letters: that fits a paper of
one column (``longtable`` knows no other). Rows of one problem stand below its name. What is too wide has its
quartiles below the medians, then words that are the same in all rows in the caption, then words that go on below
themselves; what is still too wide goes on in another table with the same first columns.

Cells read ``median [lower quartile, upper quartile]``; a miss is :math:`\infty`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

import pandas as pd

from .tables import Spread, cell, numeric_columns

__all__ = ["GAP", "WIDTH", "document", "escape", "latex_table", "printed_width"]

WIDTH = 397.0
"""Points of a line of text: 5.5 inches."""

GAP = 6.0
"""Points between two columns."""

_LEAST = 45.0
"""Points of a column of words that is made no narrower."""

_WIDEST = 150.0
"""And of one in a table that has room."""

_NARROW, _WIDE = frozenset("ijltfI.,;:!'|()[]-_/ "), frozenset("mw%@&+=<>?")

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
}

_PREAMBLE = r"""\documentclass[10pt]{article}
\usepackage[utf8]{inputenc}
\usepackage[margin=25mm]{geometry}
\usepackage{booktabs}
\usepackage{longtable}
\begin{document}
"""


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; what the fonts of pdfLaTeX may lack becomes a question mark."""
    return "".join(_SPECIAL.get(character) or (character if _printable(character) else "?") for character in text)


def _printable(character: str) -> bool:
    """Whether a character is ASCII or a letter of western Europe."""
    return character.isprintable() and (character.isascii() or (character <= "\xff" and character.isalpha()))


def _number(text: str) -> str:
    mantissa, mark, exponent = text.replace("inf", r"\infty").partition("e")
    if not text:
        return "--"
    return f"${mantissa} \\cdot 10^{{{int(exponent)}}}$" if mark else f"${mantissa}$"


def printed_width(text: str) -> float:
    """Points that a cell of LaTeX takes in letters of 7 points, commands and braces aside; rather too many."""
    signs = text.count("$-") + text.count("{-")
    text = re.sub(r"\\(infty|cdot)", "MM", text)
    text = re.sub(r"[${}^]", "", re.sub(r"\\text\w+\{\}|\\([&%$#_{}])", lambda found: found[1] or "m", text))
    return 3.2 * signs + sum(_points(letter) for letter in text)


def _points(letter: str) -> float:
    if letter in _NARROW:
        return 3.0
    return 6.6 if letter in _WIDE else 5.6 if letter.isupper() else 4.0


def _wrapped(text: str, room: float) -> list[str]:
    """Lines of a plain text, escaped: broken behind blanks and joints, a piece that is wider has one of its own."""
    lines = [""]
    for piece in re.findall(r"[^\s(,=./_-]*[\s(,=./_-]+|[^\s(,=./_-]+", text):
        if lines[-1].strip() and printed_width(escape((lines[-1] + piece).rstrip())) > room:
            lines.append("")
        lines[-1] += piece
    return [escape(line.strip()) for line in lines]


@dataclass(frozen=True)
class _Column:
    """One column: its heading and cells, each in lines.

    Args:
        name: plain.
        values: of the rows.
        numeric: whether it holds nothing but numbers.
        room: points for words.
        spread: whether quartiles stand below medians.
    """

    name: str
    values: Sequence[object]
    numeric: bool
    room: float = _WIDEST
    spread: bool = False

    @cached_property
    def cells(self) -> list[list[str]]:
        """Lines of every row."""
        return [self._lines(value) for value in self.values]

    def _lines(self, value: object) -> list[str]:
        if isinstance(value, Spread):
            median, low, high = (
                cell(entry, digits, _number) for entry, digits in zip(value[:3], (4, 3, 3), strict=True)
            )
            return [median, f"[{low}, {high}]"] if self.spread else [f"{median} [{low}, {high}]"]
        return [cell(value, written=_number)] if isinstance(value, float) else _wrapped(str(value), self.room)

    @cached_property
    def heading(self) -> list[str]:
        """Lines of the heading, no wider than the cells where words allow it."""
        return _wrapped(self.name, max((printed_width(line) for lines in self.cells for line in lines), default=0.0))

    @cached_property
    def width(self) -> float:
        """In points."""
        return max(printed_width(line) for lines in (self.heading, *self.cells) for line in lines)

    @property
    def common(self) -> str:
        """The words that all rows have; empty where there are none."""
        same = not self.numeric and len(self.values) > 1 and len(set(map(str, self.values))) == 1
        return str(self.values[0]) if same else ""


def latex_table(frame: pd.DataFrame, caption: str, label: str, width: float = WIDTH) -> str:
    r"""A ``longtable``, which breaks over pages, with booktabs' rules; the document needs both packages.

    Args:
        frame: text, numbers and :class:`Spread`; rows of the same ``problem``, if that is the first column, together.
        caption: plain text.
        label: for ``\ref``; letters, digits and dashes. Where columns go on in further tables: the first of them.
        width: points that there are for a line.
    """
    groups, keys, numeric = [""] * len(frame), _keys(frame), numeric_columns(frame)
    columns = [_Column(str(name), list(frame[name]), str(name) in numeric) for name in frame]
    if columns[0].name == "problem" and len(columns) > 1:
        groups, columns, keys = [escape(str(name)) for name in columns[0].values], columns[1:], keys - 1
    columns, common = _fitted(columns, width)
    leading = max(1, sum(not column.numeric for column in columns[:keys]))
    parts, told = _parts(columns, leading, width), escape(caption)
    if common:
        told += escape(f" Everywhere: {', '.join(f'{name} {words}' for name, words in common.items())}.")
    texts = []
    for number, part in enumerate(parts, 1):
        which = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
        texts.append(_longtable(part, groups, told + which, label if number == 1 else f"{label}-{number}"))
    return "{\\scriptsize\\setlength{\\tabcolsep}{3pt}\n" + "".join(texts) + "}\n"


def _fitted(columns: list[_Column], width: float) -> tuple[list[_Column], dict[str, str]]:
    """Columns that are narrow enough, or as narrow as they become; and what is said in the caption instead."""
    if _width(columns) <= width:
        return columns, {}
    columns = [replace(column, spread=True) for column in columns]
    common = {}
    if _width(columns) > width:
        common = {column.name: column.common for column in columns if column.common}
        columns = [column for column in columns if not column.common] if len(common) < len(columns) else columns
    narrow = columns
    while _width(narrow) > width:
        widest = max(narrow, key=lambda column: 0.0 if column.numeric else column.width)
        narrower = replace(widest, room=widest.width - 4.0)
        if widest.numeric or narrower.room < _LEAST or narrower.width >= widest.width:
            break
        narrow = [narrower if column is widest else column for column in narrow]
    words = _width([column for column in columns if not column.numeric])
    # Where another table is needed anyway, names stay in one line, if they leave room for numbers.
    return (narrow if _width(narrow) <= width or words > width / 2 else columns), common


def _width(columns: Sequence[_Column]) -> float:
    return sum(column.width + GAP for column in columns) - GAP


def _keys(frame: pd.DataFrame) -> int:
    """How many of the first columns tell the rows apart."""
    found = (number for number in range(1, len(frame.columns)) if not frame.iloc[:, :number].duplicated().any())
    return next(found, 1)


def _parts(columns: Sequence[_Column], keys: int, width: float) -> list[list[_Column]]:
    """Columns that stand beside each other; the first ones, which tell the rows apart, lead every part."""
    parts = [list(columns[:keys])]
    for column in columns[keys:]:
        if _width([*parts[-1], column]) > width and len(parts[-1]) > keys:
            parts.append(list(columns[:keys]))
        parts[-1].append(column)
    return parts


def _longtable(columns: Sequence[_Column], groups: Sequence[str], caption: str, label: str) -> str:
    """Heading on every page; the name of a group above its rows; lines of a row on one page."""
    height = max(len(column.heading) for column in columns)
    padded = [[""] * (height - len(column.heading)) + column.heading for column in columns]
    top = [r"\toprule", *(f"{' & '.join(line)} \\\\" for line in zip(*padded, strict=True)), r"\midrule"]
    layout, number = "".join("r" if column.numeric else "l" for column in columns), len(columns)
    written = [f"\\begin{{longtable}}{{{layout}}}", f"\\caption{{{caption}}} \\label{{{label}}} \\\\", *top]
    written += [r"\endfirsthead", f"\\caption[]{{{caption}}} \\\\", *top, r"\endhead", r"\midrule"]
    written += [f"\\multicolumn{{{number}}}{{r}}{{Continued on next page}} \\\\", r"\midrule", r"\endfoot"]
    written += [r"\bottomrule", r"\endlastfoot"]
    for row, group in enumerate(groups):
        if group and (row == 0 or group != groups[row - 1]):
            written += [r"\addlinespace"] if row else []
            written.append(f"\\multicolumn{{{number}}}{{l}}{{\\textit{{{group}}}}} \\\\*")
        lines = list(zip_longest(*(column.cells[row] for column in columns), fillvalue=""))
        written += [f"{' & '.join(line)} \\\\{'*' if line is not lines[-1] else ''}" for line in lines]
    return "\n".join([*written, r"\end{longtable}"]) + "\n"


def document(tables: Mapping[str, str], title: str) -> str:
    """A document with all tables.

    Args:
        tables: as :func:`latex_table` returns them.
        title: plain text.
    """
    return _PREAMBLE + f"\\section*{{{escape(title)}}}\n" + "\\clearpage\n".join(tables.values()) + "\\end{document}\n"
