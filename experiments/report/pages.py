"""Pages that need nothing but a browser: tables that sort and search, pictures inside the file.

The pages are templates in ``templates/``; what is put into them is escaped there, so that no name can break a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...analysis.theorem import Plot, Verdict
from .report_referee import seed_warnings
from .study_records import StudyRecord
from .tables import cell, numeric_columns
from .theorem_figures import equation_pieces, equation_svg, plots_figure
from .verify_records import counts

__all__ = ["study_page", "verify_page"]


def study_page(record: StudyRecord, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, bytes]) -> str:
    """The page of a study's report.

    Args:
        record: the study.
        tables: by name; empty ones are left out.
        figures: PNG files by name.
    """
    title = str(record.description.get("title") or record.name)
    warnings = seed_warnings(record)
    return _render("study.html", title=title, study=record, tables=tables, figures=figures, warnings=warnings)


def verify_page(verdicts: Sequence[Verdict], environment: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """The page of ``osculate verify``; equations are pictures drawn by matplotlib.

    Args:
        verdicts: in the order to show.
        environment: versions and device, shown as they are.
        setting: seed, device and widths.
    """
    surroundings = {**setting, "widths": setting.get("widths") or "the theorem's own", **environment}
    shown = {"verdicts": verdicts, "counts": counts(verdicts), "surroundings": surroundings}
    return _render("verify.html", title="osculate verify", **shown)


def _render(template: str, **values: object) -> str:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (_inline, _text, _sort_key, _shown, _drawn, numeric_columns, equation_pieces, equation_svg)
    pages.filters |= {made.__name__.lstrip("_"): made for made in filters}
    return pages.get_template(template).render(values)


def _inline(content: bytes, kind: str) -> str:
    """Address of content that is part of the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _text(value: Any, between: str = "=") -> str:
    """Plain values in words: x=1, y=2; a range as a study's dry run writes it: lr log [0.03, 1.0]."""
    if isinstance(value, Mapping):
        inner = {key: _text(entry, " ") if isinstance(entry, Mapping) else entry for key, entry in value.items()}
        return ", ".join(f"{key}{between}{'none' if entry is None else entry}" for key, entry in inner.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value)


def _shown(value: object) -> str:
    return cell(value, written=lambda text: text.replace("-", "−").replace("inf", "∞") if "inf" in text else text)


def _sort_key(value: float) -> str:
    """What the page's script sorts by: infinite values come last, what is not a number counts as empty."""
    if value != value:
        return ""
    return {float("inf"): "Infinity", -float("inf"): "-Infinity"}.get(value, repr(value))


def _drawn(plots: Sequence[Plot]) -> bytes:
    buffer = io.BytesIO()
    plots_figure(plots).savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
