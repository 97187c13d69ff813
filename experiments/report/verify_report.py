"""The report of ``osculate verify``: one HTML file that needs nothing but a browser.

Equations are pictures drawn by matplotlib, figures are inside the page, tables are sorted by a few lines of script.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...analysis.theorem import Evidence, Inequality, Verdict
from .html_page import inline, number_cell, page, pairs, picture, table, text_cell
from .theorem_figures import equation_pieces, equation_svg, plots_figure
from .verify_records import counts

__all__ = ["report"]

_INTRODUCTION = (
    "Every claim is checked in double precision on the library's own parts. A margin is the distance to the bound "
    "relative to the bound, of the worst instance; equalities carry the largest relative difference. Every negative "
    "control is the same check in a setting where the claim must fail. Click a heading to sort."
)

_NUMBERS = {"measured", "bound", "margin", "instances", "seconds"}

_CLASSES = {"held": "good", "violated": "bad", "assumption not met": "open", "fails": "good", "passes": "bad"}


def report(verdicts: Sequence[Verdict], environment: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        verdicts: in the order to show.
        environment: versions and device, shown as they are.
        setting: seed, device and widths.
    """
    body = [
        "<h1>osculate verify</h1>",
        _summary(verdicts),
        f"<p>{_INTRODUCTION}</p>",
        _overview(verdicts),
        *(_section(verdict) for verdict in verdicts),
        "<h2>Environment</h2>",
        pairs(dict(setting) | {"widths": setting.get("widths") or "the theorem's own"} | dict(environment)),
    ]
    return page("osculate verify", body)


def _summary(verdicts: Sequence[Verdict]) -> str:
    found = counts(verdicts)
    parts = [f"{number} {escape(name)}" for name, number in found.items()]
    good = found["violated"] == 0 and found["controls that pass"] == 0
    return f'<p class="{"good" if good else "bad"}">{len(verdicts)} theorems: {", ".join(parts)}</p>'


def _overview(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        closest, name = verdict.evidence.closest, escape(verdict.theorem.name)
        number = "".join(character for character in verdict.theorem.name if character.isdigit())
        rows.append(
            [
                f'<td data-value="{number}"><a href="#{name}">{name}</a></td>',
                _status(verdict.status),
                f"<td>{escape(verdict.theorem.claim)}</td>",
                f"<td>{escape(closest.name)}</td>",
                _number(closest.measured),
                _number(closest.bound),
                _number(closest.margin),
                _status("fails" if verdict.control_fails else "passes"),
                _number(verdict.seconds, ".1f"),
            ]
        )
    heads = ["", "status", "claim", "closest inequality", "measured", "bound", "margin", "control", "seconds"]
    return table(heads, rows, _NUMBERS)


def _section(verdict: Verdict) -> str:
    theorem, evidence = verdict.theorem, verdict.evidence
    name = escape(theorem.name)
    parts = [
        f'<section id="{name}"><h2>{name} <span class="{_CLASSES[verdict.status]}">{verdict.status}</span></h2>',
        f"<p>{escape(theorem.claim)}</p>",
        f'<p class="equation">{"".join(_equation(piece) for piece in equation_pieces(theorem.equation))}</p>',
        f'<p class="source">Source: {escape(theorem.source)}</p>',
        "<h3>What was checked</h3>",
        _inequalities(evidence.inequalities),
    ]
    if evidence.assumptions:
        parts += ["<h3>Assumptions, measured</h3>", _inequalities(evidence.assumptions)]
    if evidence.constants:
        parts += ["<h3>Constants</h3>", pairs({key: f"{value:.6g}" for key, value in evidence.constants.items()})]
    for control, found in zip(theorem.controls, verdict.controls, strict=True):
        parts.append(_control(control.claim, found))
    parts.append(_figure(verdict))
    return "\n".join([*parts, "</section>"])


def _control(claim: str, evidence: Evidence) -> str:
    outcome = "fails" if evidence.refuted else "passes"
    text = "fails, as it must" if evidence.refuted else "passes: the checker cannot tell"
    head = f'<summary>Negative control: {escape(claim)}. It <span class="{_CLASSES[outcome]}">{text}</span></summary>'
    broken = [entry for entry in evidence.assumptions if not entry.holds]
    note = "<p class='note'>Assumptions broken by the control:</p>" + _inequalities(broken) if broken else ""
    return f"<details>{head}{_inequalities(evidence.inequalities)}{note}</details>"


def _inequalities(entries: Sequence[Inequality]) -> str:
    rows = [
        [
            f"<td>{escape(entry.name)}</td>",
            _number(entry.measured),
            f"<td>{'&le;' if entry.direction == '<=' else '&ge;'}</td>",
            _number(entry.bound),
            _number(entry.margin),
            _number(entry.instances, ".0f"),
            _status("held" if entry.holds else "violated"),
        ]
        for entry in entries
    ]
    return table(["inequality", "measured", "", "bound", "margin", "instances", "status"], rows, _NUMBERS)


def _figure(verdict: Verdict) -> str:
    if not verdict.evidence.plots:
        return ""
    name = f"{verdict.theorem.name}: {', '.join(plot.title for plot in verdict.evidence.plots)}"
    buffer = io.BytesIO()
    plots_figure(verdict.evidence.plots).savefig(buffer, format="png", dpi=100)
    return picture(buffer.getvalue(), name)


def _equation(piece: str) -> str:
    picture = equation_svg(piece)
    if picture is None:
        return f"<code>{escape(piece)}</code> "
    return f'<img alt="{escape(piece)}" src="{inline("image/svg+xml", picture.encode())}">'


def _number(value: float, style: str = ".6g") -> str:
    return number_cell(value, f"{value:{style}}")


def _status(name: str) -> str:
    return text_cell(name, _CLASSES[name])
