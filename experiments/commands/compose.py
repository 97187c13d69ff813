"""The compatibility table: which structures take which estimators and damping rules, and why the others are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ... import registry
from ...errors import UnknownNameError
from ...framework.methods.compositions import Composition, compositions
from ..runs.on_screen import FittedTable, say

__all__ = ["show_compositions"]

LEGAL, IGNORED = "+", "="


def show_compositions(console: Console, names: Sequence[str] = ()) -> None:
    """Print the counts, one table per kind of part that must fit the structure, and the reasons.

    Args:
        console: where to print.
        names: pieces of the structures' names, case does not matter; none: all.

    Raises:
        UnknownNameError: if a piece is in no structure's name.
    """
    entries = _chosen(list(compositions(registry.examples())), names)
    legal = sum(entry.method is not None for entry in entries)
    console.print(f"{len(entries)} compositions: {legal} legal, {len(entries) - legal} refused at construction")
    console.print(
        f"[bold]{LEGAL}[/] legal   [bold]{IGNORED}[/] legal, and ignored: the structure does not ask for it   "
        "a, b, ... refused, see the reasons below"
    )
    reasons: dict[str, str] = {}
    for field in ("curvature", "damping"):
        _print_matrix(console, field, entries, reasons)
    console.print("[bold]reasons", highlight=False)
    for reason, letter in reasons.items():
        say(console, f"{letter}: {reason}")


def _chosen(entries: list[Composition], names: Sequence[str]) -> list[Composition]:
    structures = {entry.labels["preconditioner"] for entry in entries}
    for name in names:
        if not any(name.lower() in structure.lower() for structure in structures):
            raise UnknownNameError("structure", name, {structure.partition("(")[0] for structure in structures})
    pieces = [name.lower() for name in names] or [""]
    return [entry for entry in entries if any(piece in entry.labels["preconditioner"].lower() for piece in pieces)]


def _letter(reasons: dict[str, str], entry: Composition) -> str:
    """The letter of the reason why a composition was refused; new ones are added.

    What differs from cell to cell only by the names of the parts is one reason.
    """
    text = re.sub(r"^.*? (?=needs |inverts |has no )", "the structure ", entry.refusal or "")
    text = re.sub(r"the (curvature )?estimator \w+ ", "this estimator ", text, count=1)
    text = re.sub(r"and [^;]+? has none", "and one here has none", text)
    return reasons.setdefault(text, _letters(len(reasons)))


def _letters(index: int) -> str:
    return ("" if index < 26 else chr(ord("a") + index // 26 - 1)) + chr(ord("a") + index % 26)


def _print_matrix(console: Console, field: str, entries: Sequence[Composition], reasons: dict[str, str]) -> None:
    columns = list(registry.examples()[field])
    table = FittedTable("structure", *(str(index + 1) for index in range(len(columns))), box=None, pad_edge=False)
    for structure in dict.fromkeys(entry.labels["preconditioner"] for entry in entries):
        own = [entry for entry in entries if entry.labels["preconditioner"] == structure]
        table.add_row(escape(structure), *(_cell(field, name, own, reasons) for name in columns))
    names = ", ".join(f"{index + 1} {name}" for index, name in enumerate(columns))
    console.print(f"\n[bold]structure x {field}[/]: {escape(names)}", highlight=False)
    console.print(table)


def _cell(field: str, name: str, own: Sequence[Composition], reasons: dict[str, str]) -> str:
    """One structure with one part: legal with some choice of the rest, refused with every one, or never varied."""
    tried = [entry for entry in own if entry.labels[field] == name]
    if not tried:
        return IGNORED
    if any(entry.method is not None for entry in tried):
        return LEGAL
    return _letter(reasons, next((entry for entry in tried if _otherwise_legal(field, entry, own)), tried[0]))


def _otherwise_legal(field: str, refused: Composition, own: Sequence[Composition]) -> bool:
    """Whether another part in this field would have done: then this part is the reason, not something else."""
    fixed = {key: value for key, value in refused.labels.items() if key != field}
    legal = [entry.labels for entry in own if entry.method is not None]
    return any(all(labels[key] == value for key, value in fixed.items()) for labels in legal)
