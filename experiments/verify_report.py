"""The report of ``osculate verify``: one HTML file that needs nothing but a browser.

Equations are pictures drawn by matplotlib, figures are inside the page, tables are sorted by a few lines of script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..analysis.theorem import Evidence, Inequality, Verdict
from .theorem_figures import equation_pieces, equation_svg, plots_figure
from .verify_records import counts

__all__ = ["report"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 76rem; margin: 0 auto; }
body { padding: 1rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.6rem; border-top: 1px solid #ccc; padding-top: 1.2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.good { color: #06662f; } .bad { color: #a8071a; font-weight: 600; } .open { color: #8a5a00; font-weight: 600; }
.equation img { vertical-align: middle; margin: .3rem 1.6rem .3rem 0; max-width: 100%; }
.source, .note { color: #555; font-size: .88rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
details { margin: .6rem 0; } summary { cursor: pointer; } code { white-space: pre-wrap; }
"""

_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = Array.from(table.tBodies[0].rows);
      rows.sort((a, b) => {
        const x = Number(key(a)), y = Number(key(b));
        const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
});
"""

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
        _pairs(dict(setting) | dict(environment)),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = "<title>osculate verify</title>"
    page = f'<!doctype html>\n<html lang="en"><head>{head}{title}<style>{_STYLE}</style></head>\n<body>\n'
    return page + "\n".join(body) + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"


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
    return _table(heads, rows)


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
        parts += ["<h3>Constants</h3>", _pairs({key: f"{value:.6g}" for key, value in evidence.constants.items()})]
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
    return _table(["inequality", "measured", "", "bound", "margin", "instances", "status"], rows)


def _figure(verdict: Verdict) -> str:
    if not verdict.evidence.plots:
        return ""
    buffer = io.BytesIO()
    plots_figure(verdict.evidence.plots).savefig(buffer, format="png", dpi=100)
    name = escape(f"{verdict.theorem.name}: {', '.join(plot.title for plot in verdict.evidence.plots)}")
    return f'<figure><img alt="{name}" src="{_inline("image/png", buffer.getvalue())}"></figure>'


def _equation(piece: str) -> str:
    picture = equation_svg(piece)
    if picture is None:
        return f"<code>{escape(piece)}</code> "
    return f'<img alt="{escape(piece)}" src="{_inline("image/svg+xml", picture.encode())}">'


def _inline(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [[f"<td>{escape(str(key))}</td>", f"<td>{escape(_plain(value))}</td>"] for key, value in values.items()]
    return _table(["what", "value"], rows)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "the theorem's own"
    return str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(_head(head) for head in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f'<table class="sortable"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _head(name: str) -> str:
    kind = ' class="number"' if name in _NUMBERS else ""
    return f'<th scope="col"{kind}><button type="button">{escape(name) or "&nbsp;"}</button></th>'


def _number(value: float, style: str = ".6g") -> str:
    return f'<td class="number" data-value="{value!r}">{value:{style}}</td>'


def _status(name: str) -> str:
    return f'<td class="{_CLASSES[name]}">{escape(name)}</td>'
