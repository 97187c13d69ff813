"""Pages that need nothing but a browser: tables that sort and search, pictures inside the file."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["inline", "number_cell", "page", "pairs", "picture", "table", "text_cell"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 76rem; margin: 0 auto; }
body { padding: 1rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.6rem; border-top: 1px solid #ccc; padding-top: 1.2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: #555; display: block; }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0; cursor: pointer; }
th button { text-align: inherit; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
input[type=search] { font: inherit; padding: .2rem .5rem; margin: .3rem 0 .5rem; width: 18rem; max-width: 100%; }
output { color: #555; font-size: .86rem; margin-left: .6rem; }
.good { color: #06662f; } .bad { color: #a8071a; font-weight: 600; } .open { color: #8a5a00; font-weight: 600; }
.equation img { vertical-align: middle; margin: .3rem 1.6rem .3rem 0; max-width: 100%; }
.source, .note { color: #555; font-size: .88rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
nav a { margin-right: 1rem; }
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
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const x = Number(key(a)), y = Number(key(b));
        const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x === y ? 0 : x - y;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
});
document.querySelectorAll("input[type=search]").forEach(field => {
  const rows = Array.from(document.getElementById(field.dataset.table).tBodies[0].rows);
  const count = field.parentElement.querySelector("output");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach(row => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    });
    count.textContent = words.length ? shown + " of " + rows.length : "";
  });
});
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole page with style and script inside.

    Args:
        title: plain text.
        body: pieces of HTML in order.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    start = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
    return start + "\n".join(body) + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[str] = (), name: str = "") -> str:
    """A table whose headings sort it; with a name, a field above it searches its rows.

    Args:
        heads: plain text.
        rows: of cells, as :func:`text_cell` and :func:`number_cell` make them.
        numeric: heads that stand to the right, above numbers.
        name: of the table within the page, letters, digits and dashes; empty for no search.
    """
    cells = "".join(_head(head, head in numeric) for head in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    identity = f' id="{name}"' if name else ""
    whole = f'<table class="sortable"{identity}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
    field = (
        f'<input type="search" data-table="{name}" placeholder="search" aria-label="search the table"><output></output>'
    )
    return (f"<div>{field}</div>" if name else "") + f'<div class="scroll">{whole}</div>'


def _head(name: str, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    return f'<th scope="col"{kind}><button type="button">{escape(name) or "&nbsp;"}</button></th>'


def text_cell(text: str, kind: str = "") -> str:
    """A cell of plain text; ``kind`` is a class of the style, such as ``bad``."""
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def number_cell(value: float, text: str) -> str:
    """A cell that sorts by its value.

    Args:
        value: infinite ones come last; not a number counts as empty.
        text: HTML to show.
    """
    key = "" if value != value else "Infinity" if value == float("inf") else repr(value)
    key = "-Infinity" if value == -float("inf") else key
    return f'<td class="number" data-value="{key}">{text}</td>'


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values; nested ones are joined."""
    rows = [[text_cell(str(key)), text_cell(_plain(value))] for key, value in values.items()]
    return table(["what", "value"], rows)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def picture(png: bytes, name: str) -> str:
    """A picture inside the page.

    Args:
        png: the file.
        name: read out where the picture is not seen.
    """
    return f'<figure><img alt="{escape(name)}" src="{inline("image/png", png)}"></figure>'


def inline(kind: str, content: bytes) -> str:
    """Address of content that is part of the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
