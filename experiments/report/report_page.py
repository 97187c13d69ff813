"""The page of a report: everything in one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from .html_page import render
from .report_tables import Spread
from .study_records import StudyRecord

__all__ = ["HOW_TO_READ", "report_page"]

HOW_TO_READ = {
    "overview": (
        "Median over seeds, quartiles in brackets; below, the stratified bootstrap 95 % interval of the median. A run "
        "that broke down or never met its target is infinite and counts: where half of the runs miss, so does the "
        "median. Unfinished runs enter no number and are counted in a column of their own. Times to a target are "
        "interpolated linearly between evaluations; seconds include the warm start and leave evaluation out."
    ),
    "profiles": (
        "Share of problems on which an arm's median time-to-target is within a factor of the best arm's, integrated "
        "over factors from 1 to 4 and scaled to [0, 1]: 1 is the best on every problem. Interval: bootstrap over seeds "
        "within each problem and arm."
    ),
    "pairs": (
        "The same seeds, so the same initial parameters and order of data. Ratio: median over seeds of arm to "
        "reference, below 1 where the arm is better (accuracies: ratio of error rates); where both miss, neither is "
        "ahead. The reference is the study's base, else the best arm. p: exact two-sided sign test; with n pairs it "
        "cannot be less than 2^(1 - n). It is not adjusted for the number of comparisons."
    ),
    "ablation": (
        "One part of the base replaced at a time. Ratio to the base on the same seeds, below 1 where the replacement "
        "is better; over all problems the geometric mean of the problems' medians. Where both miss the ratio is 1 "
        "(neither is ahead), where only the base does it is 0. Every replacement that was run is here, those that "
        "break down too."
    ),
    "budget": (
        "Best tuning value after k of the trials, drawn without replacement: exact expectation, median and quartiles. "
        "miss: probability that all k trials miss; the expectation is infinite while that is above 0."
    ),
    "scores": "Every measure: runs with a known outcome, how many missed, median, quartiles and interval over seeds.",
    "runs": "Every run, trials included, with its settings and how it ended.",
}

_TITLES = {
    "overview": "Arms",
    "profiles": "Performance profiles",
    "pairs": "Seed by seed",
    "ablation": "Ablation",
    "budget": "Tuning budget",
    "scores": "All measures",
    "runs": "All runs",
}

_FIGURES = {"overview": ("loss-", "held-out-"), "profiles": ("profiles",), "ablation": ("ablation-",)}
_FIGURES |= {"budget": ("budget-",), "scores": ("layer-steps-",)}


_FOLDED = ("scores", "runs", "budget")
"""Tables too long to stand open."""


@dataclass(frozen=True)
class _Cell:
    """What a cell shows; with a value it sorts by that, ``below`` stands under it, ``kind`` is a class of the style."""

    text: str
    value: float | None = None
    below: str = ""
    kind: str = ""


def report_page(record: StudyRecord, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        record: the study.
        tables: by name; empty ones are left out.
        figures: PNG files by name.
    """
    description = {"notes": (), "arms": {}, "problems": (), "environment": {}} | dict(record.description)
    arms = {
        label: {"method": None, "space": None, "trials": None} | entry for label, entry in description["arms"].items()
    }
    problems = [{"options": None, "target": None, "tuning": None} | entry for entry in description["problems"]]
    known = {
        "name": record.name,
        "base": record.base or "none",
        "seeds": description.get("seeds", []),
        "budget": description.get("budget", {}),
        "protocol": description.get("protocol", "not stated"),
    }
    return render(
        "study.html",
        {"named": _text, "ranges": _space},
        title=str(description.get("title") or record.name),
        described=bool(record.description),
        description=description | {"arms": arms, "problems": problems},
        gaps=record.gaps,
        sections=[_section(name, frame, figures) for name, frame in tables.items() if len(frame)],
        known=known,
    )


def _section(name: str, frame: pd.DataFrame, figures: Mapping[str, bytes]) -> dict[str, object]:
    """A data frame as a table that sorts and searches, below its figures."""
    numeric = {
        str(column)
        for column in frame.columns
        if frame[column].map(lambda value: isinstance(value, int | float | Spread)).all()
    }
    return {
        "name": name,
        "title": _TITLES[name],
        "note": HOW_TO_READ[name],
        "pictures": {title: png for title, png in figures.items() if title.startswith(_FIGURES.get(name, ("?",)))},
        "heads": [str(column) for column in frame.columns],
        "numeric": numeric,
        "rows": [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)],
        "folded": name in _FOLDED,
    }


def _cell(value: object) -> _Cell:
    if isinstance(value, Spread):
        below = f"{_number(value.low)} – {_number(value.high)}" if value.low == value.low else ""
        text = f"{_number(value.median)} [{_number(value.q25)}, {_number(value.q75)}]"
        return _Cell(text, value.median, below)
    if isinstance(value, float):
        return _Cell(_number(value), value)
    if isinstance(value, int):
        return _Cell(str(value), value)
    text = str(value)
    kind = "bad" if text in ("missed", "broken down") else "open" if text == "unfinished" else ""
    return _Cell(text, kind=kind)


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}"


def _space(space: object) -> str:
    """Ranges as a study's dry run writes them: lr log [0.03, 1.0]."""
    if not isinstance(space, Mapping):
        return ""
    ranges = [
        f"{name} {_text(entry) if not isinstance(entry, Mapping) else ' '.join(f'{k} {v}' for k, v in entry.items())}"
        for name, entry in space.items()
    ]
    return ", ".join(ranges)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(entry)}" for key, entry in value.items())
    return "" if value is None else str(value)
