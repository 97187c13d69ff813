"""The command that runs the contract suite."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...framework.contracts import Certificate, Row, Subject, certify, resolve, subjects_of
from ..runs.environment import choose_device, prepare_process
from ..runs.on_screen import FittedTable
from ..runs.records import write_json
from ..runs.targets import require_file
from .flags import DeviceFlag, Place
from .screen import bar, say

__all__ = ["Certify"]


@dataclass(frozen=True)
class Certify(DeviceFlag):
    """Check every contract of a part or method; print a table of what held.

    A target is osculate (everything registered), a module of your own, or module:part, where the part is an instance, a
    class or function that needs no arguments, or osculate:NAME with NAME a registered method.

    Exit status: 0 if every contract held, 1 if one is violated or nothing was checked, 2 bad input.
    """

    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """What to certify: osculate, module, or module:part."""
    contracts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Names of contracts. Default: all of the part's kind."""
    json: Place = None
    """File to write the whole certificate to. Default: none."""

    def run(self, console: Console) -> int:
        """Certify, print, write, and return the exit status."""
        if self.json is not None:
            require_file(self.json, "--json")
        prepare_process()
        if "" not in sys.path:
            sys.path.insert(0, "")  # a console script does not look into the current folder
        device = str(choose_device(self.device))
        subjects = subjects_of(resolve(self.target), self.target.partition(":")[2] or None)
        with bar(console) as progress:
            task = progress.add_task("", total=len(subjects))

            def note(subject: Subject, done: int, total: int) -> None:
                progress.update(task, completed=done, description=escape(f"{subject.kind} {subject.name}"))

            certificate = certify(subjects, contracts=self.contracts or None, device=device, progress=note)
            progress.update(task, completed=len(subjects), description="done")
        console.print(_table(certificate))
        for row in certificate.violations:
            text = f"[red]violated[/] {escape(f'{row.kind} {row.subject}')}, [bold]{row.contract}[/]: "
            say(console, text + escape(row.detail), markup=True)
        for silence in [] if certificate.ok else certificate.silences():
            say(console, f"[red]nothing checked[/] {escape(silence)}", markup=True)
        say(console, certificate.summary())
        if self.json is not None:
            write_json(self.json, {"target": self.target, "device": device} | certificate.to_dict())
        return 0 if certificate.ok else 1


def _table(certificate: Certificate) -> Table:
    """One line per subject; the contracts themselves where there is only one subject."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in certificate.rows:
        grouped.setdefault((row.kind, row.subject), []).append(row)
    if len(grouped) == 1:
        table = FittedTable("contract", "status", "why", title=escape(" ".join(next(iter(grouped)))))
        for row in certificate.rows:
            table.add_row(row.contract, _STYLED[row.status], escape(row.detail))
        return table
    table = FittedTable("kind", "part", "held", "violated", "not applicable", title="contracts")
    previous = None
    for (kind, name), rows in grouped.items():
        if previous not in (None, kind):
            table.add_section()
        counts = {status: sum(row.status == status for row in rows) for status in _STYLED}
        violated = f"[red]{counts['violated']}" if counts["violated"] else ""
        table.add_row(kind, f"[bold]{escape(name)}", str(counts["held"]), violated, str(counts["not applicable"] or ""))
        previous = kind
    return table


_STYLED = {"held": "[green]held", "violated": "[red]violated", "not applicable": "[dim]not applicable"}
