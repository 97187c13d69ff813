r"""Tables in LaTeX, with booktabs: one file that compiles by itself, one per table to include in a paper.

pandas writes the rows (its Styler escapes text); only numbers and symbols are prepared here. Cells read
``median [lower quartile, upper quartile]``; a miss is :math:`\infty`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from .tables import Spread, cell, numeric_columns

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


def _number(text: str) -> str:
    mantissa, mark, exponent = text.replace("inf", r"\infty").partition("e")
    if not text:
        return "--"
    return f"${mantissa} \\cdot 10^{{{int(exponent)}}}$" if mark else f"${mantissa}$"


def _cell(value: object) -> str:
    return cell(value, written=_number) if isinstance(value, float | Spread) else escape(str(value))


def latex_table(frame: pd.DataFrame, caption: str, label: str) -> str:
    r"""A ``longtable``, which breaks over pages, with booktabs' rules; the document needs both packages.

    Args:
        frame: text, numbers and :class:`Spread`.
        caption: plain text.
        label: for ``\ref``; letters, digits and dashes.
    """
    numeric = numeric_columns(frame)
    cells = frame.map(_cell)
    cells.columns = pd.Index([escape(str(column)) for column in frame.columns])
    body = cells.style.hide(axis="index").to_latex(
        environment="longtable",
        hrules=True,
        column_format="".join("r" if name in numeric else "l" for name in frame),
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
