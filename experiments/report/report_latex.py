r"""Tables in LaTeX, with booktabs: one file that compiles by itself, one per table to include in a paper.

pandas writes the rows (its Styler escapes text); only numbers and symbols are prepared here. Cells read
``median [lower quartile, upper quartile]``; a miss is :math:`\infty`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from .report_tables import Spread

__all__ = ["document", "escape", "latex_table"]

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
\usepackage[landscape,margin=12mm]{geometry}
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


def _number(value: float) -> str:
    if math.isnan(value):
        return "--"
    if math.isinf(value):
        return r"$\infty$" if value > 0 else r"$-\infty$"
    mantissa, mark, exponent = f"{value:.4g}".partition("e")
    return f"${mantissa} \\cdot 10^{{{int(exponent)}}}$" if mark else f"${mantissa}$"


def _cell(value: object) -> str:
    if isinstance(value, Spread):
        return f"{_number(value.median)} [{_number(value.q25)}, {_number(value.q75)}]"
    if isinstance(value, float):
        return _number(value)
    return escape(str(value))


def latex_table(frame: pd.DataFrame, caption: str, label: str) -> str:
    r"""A ``longtable``, which breaks over pages, with booktabs' rules; the document needs both packages.

    Args:
        frame: text, numbers and :class:`Spread`.
        caption: plain text.
        label: for ``\ref``; letters, digits and dashes.
    """
    numeric = [all(isinstance(value, int | float | Spread) for value in frame[column]) for column in frame]
    cells = frame.map(_cell)
    cells.columns = pd.Index([escape(str(column)) for column in frame.columns])
    body = cells.style.hide(axis="index").to_latex(
        environment="longtable",
        hrules=True,
        column_format="".join("r" if right else "l" for right in numeric),
        caption=escape(caption),
        label=label,
    )
    return "{\\scriptsize\\setlength{\\tabcolsep}{3pt}\n" + body.rstrip() + "\n}\n"


def document(tables: Mapping[str, str], title: str) -> str:
    """A document with all tables.

    Args:
        tables: as :func:`latex_table` returns them.
        title: plain text.
    """
    return _PREAMBLE + f"\\section*{{{escape(title)}}}\n" + "\\clearpage\n".join(tables.values()) + "\\end{document}\n"
