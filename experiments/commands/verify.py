"""The command that checks the theory by running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape

from ...analysis.theorem import Setting, Theorem, Verdict, verify
from ..runs.environment import choose_device, describe_environment, prepare_process
from ..runs.records import write_json
from .flags import DeviceFlag, Place, StyleFlag
from .screen import bar, say

__all__ = ["Verify"]

_COLOURS = {"held": "green", "violated": "red", "assumption not met": "yellow"}


@dataclass(frozen=True)
class Verify(DeviceFlag, StyleFlag):
    """Check theorems by running them: every claim with its numbers, its margin and a control that must fail.

    Writes verify.json, verify.csv, a figure per theorem and report.html, which needs no network.

    Exit status: 0 if nothing is violated and every negative control fails, 1 if not, 2 for bad input.
    """

    theorems: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names, such as T2 T11. Default: all."""
    seed: int = 0
    """Of every random choice, >= 0."""
    widths: tuple[int, ...] = ()
    """Hidden widths for theorems about wide networks. Default: each theorem's own."""
    out: Place = None
    """Folder for results. Default: runs/verify-DEVICE."""

    def run(self, console: Console) -> int:
        """Check, print, write, and return the exit status."""
        from ...analysis.theorems.catalogue import find_theorems

        chosen = find_theorems(self.theorems)
        setting = Setting(self.seed, str(choose_device(self.device)), self.widths)
        prepare_process()
        verdicts = _verify_all(chosen, setting, console)
        self._write(verdicts, setting, console)
        return _conclude(verdicts, console)

    def _write(self, verdicts: Sequence[Verdict], setting: Setting, console: Console) -> None:
        from ..report.figures import save_figure
        from ..report.pages import verify_page
        from ..report.tables import write_rows
        from ..report.theorem_figures import plots_figure
        from ..report.verify_records import inequality_rows, passed, verdict_values

        out = self.out or Path("runs") / f"verify-{self.device.replace(':', '-')}"
        environment = describe_environment(choose_device(self.device))
        values = [verdict_values(verdict) for verdict in verdicts]
        whole = {"ok": passed(verdicts), "setting": asdict(setting), "environment": environment, "theorems": values}
        write_json(out / "verify.json", whole)
        write_rows(out / "verify.csv", [row for verdict in verdicts for row in inequality_rows(verdict)])
        for verdict in verdicts:
            if verdict.evidence.plots:
                save_figure(plots_figure(verdict.evidence.plots), out / verdict.theorem.name)
        page = verify_page(verdicts, environment, asdict(setting))
        (out / "report.html").write_text(page, encoding="utf-8")
        say(console, f"report.html, verify.json, verify.csv and figures lie in {out}")


def _verify_all(theorems: Sequence[Theorem], setting: Setting, console: Console) -> list[Verdict]:
    """One after the other, each printed as soon as it is known."""
    verdicts: list[Verdict] = []
    with bar(console) as progress:
        task = progress.add_task("", total=len(theorems))
        for theorem in theorems:
            progress.update(task, description=escape(f"{theorem.name} {theorem.claim[:60]}"))
            verdicts.append(verify(theorem, setting))
            progress.update(task, advance=1)
            say(console, _line(verdicts[-1]), markup=True)
    return verdicts


def _line(verdict: Verdict) -> str:
    """Name, status, claim, closest inequality, control, seconds."""
    closest = verdict.evidence.closest
    broken = [entry for entry in verdict.evidence.assumptions if not entry.holds]
    shown = broken[0] if broken else closest
    margin = "attained up to rounding" if abs(shown.margin) <= shown.tolerance else f"margin {shown.margin:.2g}"
    numbers = f"{shown.measured:.6g} {shown.direction} {shown.bound:.6g}, {margin}"
    control = "control fails as it must" if verdict.control_fails else "[red]control passes: the check cannot fail[/]"
    colour = _COLOURS[verdict.status]
    return (
        f"[bold]{verdict.theorem.name:<4}[/][{colour}]{verdict.status}[/]  {escape(verdict.theorem.claim)}  "
        f"[dim]|[/] {escape(shown.name)}: {escape(numbers)} [dim]|[/] {control} [dim]|[/] {verdict.seconds:.1f} s"
    )


def _conclude(verdicts: Sequence[Verdict], console: Console) -> int:
    from ..report.verify_records import counts, passed

    text = ", ".join(f"{number} {name}" for name, number in counts(verdicts).items())
    say(console, f"{len(verdicts)} theorems: {text}", markup=True)
    return 0 if passed(verdicts) else 1
