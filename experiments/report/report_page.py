"""The page of a report: everything in one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from .html_page import number_cell, page, pairs, picture, table, text_cell
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


def report_page(record: StudyRecord, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        record: the study.
        tables: by name; empty ones are left out.
        figures: PNG files by name.
    """
    description = record.description
    sections = [_section(name, frame, figures) for name, frame in tables.items() if len(frame)]
    title = str(description.get("title") or record.name)
    links = [f'<a href="#{name}">{_TITLES[name]}</a>' for name, frame in tables.items() if len(frame)]
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in description.get("notes", []))
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<ul class="open">{notes}</ul>' if notes else "",
        _gaps(record),
        f"<nav>{''.join(links)}<a href='#study'>Study</a></nav>",
        *sections,
        '<h2 id="study">Study</h2>',
        _study(description, record),
    ]
    return page(title, body)


def _gaps(record: StudyRecord) -> str:
    if not record.gaps:
        return '<p class="good">Every run that the study names is here, and ended.</p>' if record.description else ""
    items = "".join(f"<li>{escape(gap)}</li>" for gap in record.gaps)
    return (
        f'<details id="gaps"><summary class="bad">Incomplete: {len(record.gaps)} things are missing, damaged or '
        f"unfinished</summary><ul>{items}</ul></details>"
    )


def _section(name: str, frame: pd.DataFrame, figures: Mapping[str, bytes]) -> str:
    pictures = [
        picture(figure, title) for title, figure in figures.items() if title.startswith(_FIGURES.get(name, ("?",)))
    ]
    head = f'<section id="{name}"><h2>{_TITLES[name]}</h2><p class="note">{escape(HOW_TO_READ[name])}</p>'
    whole = _frame(frame, f"table-{name}")
    if name in ("scores", "runs", "budget"):
        whole = f"<details><summary>{len(frame)} rows</summary>{whole}</details>"
    return "\n".join([head, *pictures, whole, "</section>"])


def _frame(frame: pd.DataFrame, name: str) -> str:
    """A data frame as a table that sorts and searches."""
    numeric = {
        str(column)
        for column in frame.columns
        if frame[column].map(lambda value: isinstance(value, int | float | Spread)).all()
    }
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return table([str(column) for column in frame.columns], rows, numeric, name)


def _cell(value: object) -> str:
    if isinstance(value, Spread):
        below = f"<small>{_number(value.low)} &ndash; {_number(value.high)}</small>" if value.low == value.low else ""
        text = f"{_number(value.median)} [{_number(value.q25)}, {_number(value.q75)}]{below}"
        return number_cell(value.median, text)
    if isinstance(value, float):
        return number_cell(value, _number(value))
    if isinstance(value, int):
        return number_cell(value, str(value))
    text = str(value)
    return text_cell(text, "bad" if text in ("missed", "broken down") else "open" if text == "unfinished" else "")


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "&infin;" if value > 0 else "&minus;&infin;"
    return f"{value:.4g}"


def _study(description: Mapping[str, Any], record: StudyRecord) -> str:
    known = {
        "name": record.name,
        "base": record.base or "none",
        "seeds": description.get("seeds", []),
        "budget": description.get("budget", {}),
        "protocol": description.get("protocol", "not stated"),
    }
    arms = description.get("arms", {})
    heads = ["arm", "method", "settings", "search space", "trials"]
    rows = [
        [text_cell(label), *(text_cell(_text(entry.get(key))) for key in ("method", "settings", "space", "trials"))]
        for label, entry in (
            (label, {"settings": entry.get("options", {}), **entry, "space": _space(entry.get("space"))})
            for label, entry in arms.items()
        )
    ]
    problems = [
        [text_cell(entry["name"]), *(text_cell(_text(entry.get(key))) for key in ("options", "target", "tuning"))]
        for entry in description.get("problems", [])
    ]
    parts = [pairs(known)]
    if rows:
        parts.append(table(heads, rows, name="table-arms"))
    if problems:
        parts.append(table(["problem", "options", "target", "tuning metric"], problems))
    if description.get("environment"):
        parts.append("<h3>Environment</h3>" + pairs(description["environment"]))
    return "\n".join(parts)


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
