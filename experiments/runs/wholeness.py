"""Whether the files of a run agree: the metrics with what the status, the trial and the checkpoint say of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import RunFolder
from .targets import DamagedError
from .training import EveryEpoch, Schedule
from .training_run import TrainingRun

__all__ = ["contradiction", "contradiction_in", "evaluations_lost"]


def contradiction(
    status: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    trial: Mapping[str, Any] | None = None,
    metric: str | None = None,
) -> str:
    """In which way the metrics of a finished run are not those it wrote; empty where nothing speaks against them.

    Args:
        status: what ``status.json`` holds.
        lines: of ``metrics.jsonl``.
        trial: what ``trial.json`` holds, of a run of a study.
        metric: whose last value is the trial's, where that is known.
    """
    if status.get("status") != "finished":
        return ""
    if not lines:
        return "status.json says that it finished, but metrics.jsonl is missing or empty"
    first, last, steps = lines[0].get("iterations"), lines[-1].get("iterations"), status.get("iterations")
    if isinstance(steps, int) and last != steps:
        return f"metrics.jsonl ends after {last} iterations, but status.json says {steps}"
    if first:
        return f"metrics.jsonl begins after {first} iterations; the evaluations before are lost"
    value, measured = (trial or {}).get("value"), lines[-1].get(metric or "")
    known = [number for number in (value, measured) if isinstance(number, int | float)]
    if len(known) == 2 and not math.isclose(*known, rel_tol=1e-9):
        return f"{metric} ends at {measured:.6g} in metrics.jsonl, but trial.json says {value:.6g}"
    return ""


def contradiction_in(folder: RunFolder, metric: str | None = None) -> str:
    """The same of what is in a folder; files that cannot be read count.

    Args:
        folder: of a run, finished or not.
        metric: of a study's tuning.
    """
    try:
        status, trial = (_read(folder.path / name) for name in ("status.json", "trial.json"))
        return contradiction(status, folder.read_metrics(), trial, metric) if status else ""
    except DamagedError as error:
        return str(error)


def evaluations_lost(run: TrainingRun, iterations: int, schedule: Schedule, folder: RunFolder) -> list[int]:
    """Iterations at which a run was evaluated before its checkpoint, and which ``metrics.jsonl`` does not have.

    Args:
        run: as prepared.
        iterations: of the checkpoint; its own evaluation is left out, since it can be made again.
        schedule: of the evaluations.
        folder: of the run.

    Raises:
        DamagedError: the metrics cannot be read.
    """
    there = {line["iterations"] for line in folder.read_metrics()}
    wanted = {0}
    if isinstance(schedule, EveryEpoch):
        batches = run.order.batches_per_epoch * run.problem.interval
        ends = range(1, iterations * schedule.times // batches + 1)
        wanted |= {-(-end * batches // schedule.times) for end in ends}
    return sorted(step for step in wanted - there if step < iterations)


def _read(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is missing or no JSON object: other checks speak of that."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
