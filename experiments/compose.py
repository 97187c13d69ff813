"""The compatibility table: which structures take which estimators and damping rules, and why the others are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import registry
from ..framework.compositions import Composition, compositions

__all__ = ["print_compositions"]

LEGAL, IGNORED = "+", "="


def print_compositions(console: Console) -> None:
    """Print the counts, one table per kind of part that must fit the structure, and the reasons."""
    entries = list(compositions(registry.examples()))
    legal = sum(entry.method is not None for entry in entries)
    console.print(f"{len(entries)} compositions: {legal} legal, {len(entries) - legal} refused at construction")
    console.print(
        f"[bold]{LEGAL}[/] legal   [bold]{IGNORED}[/] legal, and ignored: the structure does not ask for it   "
        "a, b, ... refused, see the reasons below"
    )
    reasons = _Reasons()
    for field in ("curvature", "damping"):
        _print_matrix(console, field, entries, reasons)
    console.print("[bold]reasons", highlight=False)
    for letter, reason in reasons.lines():
        console.print(f"{letter}: {escape(reason)}", highlight=False, soft_wrap=True)


class _Reasons:
    """Distinct reasons under letters; what differs from cell to cell only by the names of the parts is one reason."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def letter(self, entry: Composition) -> str:
        """The letter of the reason why a composition was refused."""
        text = re.sub(r"^.*? (?=needs |inverts |has no )", "the structure ", entry.refusal or "")
        text = re.sub(r"the (curvature )?estimator \w+ ", "this estimator ", text, count=1)
        return self.letters.setdefault(text, _letters(len(self.letters)))

    def lines(self) -> Iterator[tuple[str, str]]:
        """(letter, reason)."""
        yield from ((letter, text) for text, letter in self.letters.items())


def _letters(index: int) -> str:
    return ("" if index < 26 else chr(ord("a") + index // 26 - 1)) + chr(ord("a") + index % 26)


def _print_matrix(console: Console, field: str, entries: Sequence[Composition], reasons: _Reasons) -> None:
    columns = list(registry.examples()[field])
    table = Table("structure", *(str(index + 1) for index in range(len(columns))), box=None, pad_edge=False)
    for structure in dict.fromkeys(entry.labels["preconditioner"] for entry in entries):
        own = [entry for entry in entries if entry.labels["preconditioner"] == structure]
        table.add_row(escape(structure), *(_cell(field, name, own, reasons) for name in columns))
    names = ", ".join(f"{index + 1} {name}" for index, name in enumerate(columns))
    console.print(f"\n[bold]structure x {field}[/]: {escape(names)}", highlight=False)
    console.print(table)


def _cell(field: str, name: str, own: Sequence[Composition], reasons: _Reasons) -> str:
    """One structure with one part: legal with some choice of the rest, refused with every one, or never varied."""
    tried = [entry for entry in own if entry.labels[field] == name]
    if not tried:
        return IGNORED
    if any(entry.method is not None for entry in tried):
        return LEGAL
    return reasons.letter(tried[0])
