"""Pages that need nothing but a browser, light or dark: tables that sort and search, pictures and files inside.

The pages are templates in ``templates/``; what is put into them is escaped there, so that no name can break a page.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...analysis.theorem import Plot, Verdict
from .report_referee import seed_warnings
from .study_records import StudyRecord
from .svg import DARK, dark_colours, figure_svg
from .tables import Spread, cell, numeric_columns
from .theorem_figures import equation_pieces, equation_svg, plots_figure
from .verify_records import counts

__all__ = ["study_page", "verify_page"]


def study_page(
    record: StudyRecord, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, str], files: Mapping[str, str]
) -> str:
    """The page of a study's report.

    Args:
        record: the study.
        tables: by name; empty ones are left out.
        figures: see :func:`svg.figure_svg`; by name.
        files: the tables as CSV, by name.
    """
    title = str(record.description.get("title") or record.name)
    warnings = seed_warnings(record)
    shown = dict(tables) | {"overview": _narrow(tables["overview"])}
    values = {"study": record, "tables": shown, "figures": figures, "files": files, "warnings": warnings}
    return _render("study.html", figures.values(), title=title, **values)


def verify_page(verdicts: Sequence[Verdict], environment: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """The page of ``osculate verify``; equations are pictures drawn by matplotlib.

    Args:
        verdicts: in the order to show.
        environment: versions and device, shown as they are.
        setting: seed, device and widths.
    """
    surroundings = {**setting, "widths": setting.get("widths") or "the theorem's own", **environment}
    figures = {
        verdict.theorem.name: figure_svg(plots_figure(plots), _caption(verdict.theorem.name, plots))
        for verdict in verdicts
        if (plots := verdict.evidence.plots)
    }
    shown = {"verdicts": verdicts, "counts": counts(verdicts), "surroundings": surroundings, "figures": figures}
    return _render("verify.html", figures.values(), title="osculate verify", **shown)


def _caption(name: str, plots: Sequence[Plot]) -> str:
    return f"{name}: {', '.join(plot.title for plot in plots)}"


def _narrow(overview: pd.DataFrame) -> pd.DataFrame:
    """How the runs ended in one column of words, so that the measures have room; the CSV has the counts."""
    counts = [name for name in ("finished", "broke down", "unfinished", "not begun") if name in overview]
    words = [
        ", ".join(f"{number} {name}" for name, number in row.items() if number) or "none"
        for row in overview[counts].to_dict("records")
    ]
    left = overview.drop(columns=counts)
    left.insert(min(2, len(left.columns)), "runs", words)
    return left


def _render(template: str, pictures: Iterable[str], **values: object) -> str:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: tuple[Callable[..., Any], ...] = (
        *(_encoded, _inline, _text, _sort_key, _shown, _quartiles, _interval),
        *(numeric_columns, equation_pieces, equation_svg),
    )
    pages.filters |= {made.__name__.lstrip("_"): made for made in filters}
    return pages.get_template(template).render(values, background=DARK, dark_colours=dark_colours(pictures))


def _encoded(text: str) -> bytes:
    return text.encode()


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


def _shown(value: object, digits: int = 4) -> str:
    return cell(
        value, digits, written=lambda text: text.replace("-", "−").replace("inf", "∞") if "inf" in text else text
    )


def _quartiles(value: Spread) -> str:
    return f"[{_shown(value.q25, 3)}, {_shown(value.q75, 3)}]"


def _interval(value: Spread) -> str:
    return f"{_shown(value.low, 3)} – {_shown(value.high, 3)}" if value.low == value.low else ""


def _sort_key(value: float) -> str:
    """What the page's script sorts by: infinite values come last, what is not a number counts as empty."""
    if value != value:
        return ""
    return {float("inf"): "Infinity", -float("inf"): "-Infinity"}.get(value, repr(value))
