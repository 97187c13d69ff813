"""Which runs of a study broke down, at which step and why: one row for all that went the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .tables import screen_table

__all__ = ["COLUMNS", "Breakdown", "breakdown_rows", "breakdown_screen", "in_short"]

COLUMNS = ("problem", "arm", "runs", "after steps", "why")


@dataclass(frozen=True)
class Breakdown:
    """One run that counts as a miss.

    Args:
        problem: its label.
        arm: its label.
        run: the run's folder, such as ``final-1``.
        steps: optimizer steps that it had taken; ``None`` where that is not known, or none was to be taken.
        why: the reason in words.
    """

    problem: str
    arm: str
    run: str
    steps: int | None
    why: str


def breakdown_rows(found: Iterable[Breakdown]) -> list[dict[str, str]]:
    """One row per problem, arm and reason, with the runs and the least and most steps that they took."""
    groups: dict[tuple[str, str, str], list[Breakdown]] = {}
    for entry in found:
        groups.setdefault((entry.problem, entry.arm, in_short(entry.why)), []).append(entry)
    return [
        {"problem": problem, "arm": arm, "runs": _runs(own), "after steps": _steps(own), "why": why}
        for (problem, arm, why), own in groups.items()
    ]


def breakdown_screen(rows: Sequence[Mapping[Any, Any]]) -> Table:
    """The rows as a table for the screen."""
    return screen_table("broke down", rows, {name: name for name in COLUMNS})


def in_short(why: str) -> str:
    """The reason without the number of the step, which has a column, and without the advice that follows."""
    text = why.partition(";")[0].strip() or "no reason was recorded"
    first, colon, rest = text.partition(": ")
    return rest if colon and first.startswith("step ") and first[5:].isdigit() else text


def _runs(own: Sequence[Breakdown]) -> str:
    """Such as ``final-1 2 3``: the phase once, then the numbers of its runs."""
    phases: dict[str, list[str]] = {}
    for entry in own:
        phase, _, number = entry.run.rpartition("-")
        phases.setdefault(phase, []).append(number)
    return ", ".join(
        f"{phase}-{' '.join(numbers)}" if phase else " ".join(numbers) for phase, numbers in phases.items()
    )


def _steps(own: Sequence[Breakdown]) -> str:
    known = [entry.steps for entry in own if entry.steps is not None]
    if not known:
        return ""
    return str(min(known)) if min(known) == max(known) else f"{min(known)} to {max(known)}"
