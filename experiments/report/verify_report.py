"""The report of ``osculate verify``: one HTML file that needs nothing but a browser.

Equations are pictures drawn by matplotlib, figures are inside the page, tables are sorted by a few lines of script.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ...analysis.theorem import Plot, Verdict
from .html_page import render
from .theorem_figures import equation_pieces, equation_svg, plots_figure
from .verify_records import counts

__all__ = ["report"]


def report(verdicts: Sequence[Verdict], environment: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        verdicts: in the order to show.
        environment: versions and device, shown as they are.
        setting: seed, device and widths.
    """
    surroundings = {**setting, "widths": setting.get("widths") or "the theorem's own", **environment}
    return render(
        "verify.html",
        {"digits": _digits, "drawn": _drawn, "pieces": equation_pieces, "svg": equation_svg},
        title="osculate verify",
        verdicts=verdicts,
        counts=counts(verdicts),
        surroundings=surroundings,
    )


def _digits(name: str) -> str:
    """What theorems are sorted by: T2 comes before T11."""
    return "".join(filter(str.isdigit, name))


def _drawn(plots: Sequence[Plot]) -> bytes:
    buffer = io.BytesIO()
    plots_figure(plots).savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
