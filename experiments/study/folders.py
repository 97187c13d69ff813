"""What a study leaves on disk: how it was meant, and one folder for each of its runs.

| file | holds |
|---|---|
| ``study.toml`` | the file as it ran |
| ``study.json`` | the study with everything resolved: arms, problems, seeds, budget, protocol, environment, notes |
| ``journal.log`` | the book of the runs (Optuna's journal), unless a database keeps it |
| ``runs/PROBLEM/ARM/tune-N``, ``.../final-SEED`` | one run each, as ``osculate train`` writes it |
| ``.../trial.json`` | which run that is, its settings, and its value (null for a miss) |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import ArgumentError
from ..runs.environment import choose_device, describe_environment
from ..runs.records import RunFolder, write_json
from ..runs.targets import writing
from ..runs.wholeness import contradiction_in
from .definition import Study
from .ledger import FINAL, Ledger, Slot

__all__ = [
    "NOT_FINISHED",
    "breakdown",
    "describe_study",
    "give_up",
    "recorded_value",
    "reopen_damaged",
    "run_folder",
    "settle",
    "told",
    "write_study",
    "write_trial",
]

NOT_FINISHED = "not finished"
"""Reason in ``trial.json`` of a run that may still go on."""

_NUMBERS = ("lr", "damping", "weight_decay")


def run_folder(out: Path, slot: Slot) -> RunFolder:
    """Return the folder of a run."""
    return RunFolder(out / "runs" / slot.folder)


def write_study(out: Path, study: Study, ledger: Ledger, source: Path | None) -> None:
    """Write ``study.json`` and, where there is a file, ``study.toml``."""
    write_json(out / "study.json", describe_study(study, ledger))
    target = out / "study.toml"
    if source is not None and (not target.exists() or not target.samefile(source)):
        with writing(target):
            shutil.copyfile(source, target)


def describe_study(study: Study, ledger: Ledger) -> dict[str, Any]:
    """Return the study as plain values, see LAYOUT in the module's docstring."""
    return {
        "name": study.name,
        "title": study.title,
        "notes": list(study.notes),
        "base": study.base,
        "arms": {arm.label: _arm(study, number) for number, arm in enumerate(study.arms)},
        "problems": [
            {
                "name": problem.label,
                "problem": problem.name,
                "options": dict(problem.options),
                "batch_size": problem.batch_size,
                "target": None if problem.target is None else asdict(problem.target),
                "seeds": list(study.final_seeds(problem)),
                "tuning": ledger.metric(problem.label),
                "budget": asdict(study.problem_budget(problem)),
                "tuning_budget": asdict(study.tuning_budget(problem)),
            }
            for problem in study.problems
        ],
        "seeds": list(study.seeds),
        "budget": asdict(study.budget) | {"limit": study.limit, "evaluations": study.evaluations},
        "protocol": _protocol(study),
        "environment": describe_environment(choose_device(study.device)),
    }


def _arm(study: Study, number: int) -> dict[str, Any]:
    arm = study.arms[number]
    config = arm.config(study.problems[0], {}, 0, study.device)
    numbers = {name: getattr(config, name) for name in _NUMBERS if getattr(config, name) is not None}
    plain = arm.as_dict()
    del plain["settings"]
    own = {"options": numbers | dict(config.method_options), "parts": dict(config.parts)}
    on = {
        problem.label: {
            "settings": dict(there.settings),
            "space": there.as_dict()["space"],
            "trials": study.trials(there),
        }
        for problem in study.problems
        if (there := arm.on.get(problem.label)) is not None
    }
    return plain | own | {"trials": study.trials(arm), "settings": dict(arm.settings)} | ({"on": on} if on else {})


def _protocol(study: Study) -> str:
    tuned = [arm for arm in study.arms if any(arm.at(problem.label).space for problem in study.problems)]
    sampling = f"grids whole or in seeded order, other spaces {study.tuning.sampler}"
    tuning = (
        f"{len(tuned)} of {len(study.arms)} arms tuned with {study.tuning.trials} trials each at most ({sampling}; "
        f"points decided before the first run; seed {study.tuning.seed}; {_pruning(study)}{_shorter(study)}), "
        if tuned
        else "no arm tuned, "
    )
    return (
        f"{tuning}the best setting by the last value of the tuning metric run again on {_counts(study)} other seeds; "
        "initial parameters and order of the data are the same for all arms of a seed; a breakdown is a miss"
    )


def _counts(study: Study) -> str:
    """How many final seeds there are, of all problems."""
    return " or ".join(map(str, sorted({len(study.final_seeds(problem)) for problem in study.problems})))


def _pruning(study: Study) -> str:
    return "no pruning" if study.tuning.pruner == "none" else f"pruned by the {study.tuning.pruner}"


def _shorter(study: Study) -> str:
    """In words, the budget of the tuning runs where it is smaller than that of the final ones."""
    own = {"epochs": study.tuning.epochs, "seconds": study.tuning.seconds}
    bounds = " or ".join(f"{value:g} {name}" for name, value in own.items() if value is not None)
    return f"; at most {bounds} a run" if bounds else ""


def write_trial(
    folder: RunFolder, slot: Slot, seed: int, settings: Mapping[str, Any], value: float | None, reason: str = ""
) -> None:
    """Write ``trial.json``: which run this is, and its value (``None`` for a miss)."""
    write_json(
        folder.path / "trial.json",
        {
            "problem": slot.problem,
            "arm": slot.arm,
            "phase": slot.phase,
            "trial": None if slot.phase == FINAL else slot.index,
            "seed": seed,
            "settings": dict(settings),
            "value": value,
            "reason": reason,
        },
    )


def told(study: Study, slot: Slot, point: Mapping[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """Return the seed of a run and all its settings.

    Args:
        study: to which it belongs.
        slot: the run.
        point: its searched settings; ``None``: there are none, since every tuning run of its arm was a miss.
    """
    arm = next(arm for arm in study.arms if arm.label == slot.arm).at(slot.problem)
    return slot.index if slot.phase == FINAL else study.tuning.seed, {**arm.settings, **(point or {})}


def give_up(out: Path, ledger: Ledger, slot: Slot, reason: str) -> None:
    """Record in ``trial.json`` that a run which was killed is a miss, even if it never came to write anything."""
    seed, settings = told(ledger.study, slot, ledger.point(slot, ledger.entries()))
    write_trial(run_folder(out, slot), slot, seed, settings, None, reason)


def settle(out: Path, ledger: Ledger) -> list[Slot]:
    """Record the misses of the book whose folders still speak of a run that goes on: their processes died.

    Folders of runs that another machine did, in a folder of its own, are left alone.

    Returns:
        The runs that were settled.
    """
    settled = []
    for slot, entry in ledger.entries().items():
        file = run_folder(out, slot).path / "trial.json"
        if entry.state == "done" and entry.value is None and _open(file):
            give_up(out, ledger, slot, entry.status or "broken down")
            settled.append(slot)
    return settled


def reopen_damaged(out: Path, ledger: Ledger) -> list[str]:
    """Let the runs be done again that finished, and whose files do not say so any more.

    Folders of runs that another machine did, in a folder of its own, are left alone.

    Returns:
        One line for each of them, with what is wrong.
    """
    told = []
    for slot, entry in ledger.entries().items():
        if entry.state != "done" or entry.value is None:
            continue
        if wrong := contradiction_in(run_folder(out, slot), ledger.metric(slot.problem)):
            ledger.reopen(entry)
            told.append(f"{slot} is done again: {wrong}")
    return told


def _open(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["reason"] == NOT_FINISHED)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def breakdown(folder: RunFolder) -> tuple[str, int | None]:
    """Return why a run in a folder is a miss and how many steps it had taken, as far as its files tell."""
    told: dict[str, Any] = {}
    for name in ("status.json", "trial.json"):
        with suppress(OSError, ValueError, TypeError):
            told |= {key: value for key, value in json.loads((folder.path / name).read_text("utf-8")).items() if value}
    steps = told.get("iterations", 0 if told.get("status") == "broken down" else None)
    return str(told.get("reason", "")), steps


def recorded_value(folder: RunFolder, metric: str) -> tuple[str, float | None] | None:
    """Return how a run in a folder ended and its value; ``None`` if it has not ended, or its metrics are not whole.

    Args:
        folder: of the run.
        metric: whose last value counts.

    Raises:
        ArgumentError: the run does not measure that metric.
    """
    try:
        status = json.loads((folder.path / "status.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if status == "finished":
        if contradiction_in(folder, metric):
            return None
        last = folder.read_metrics()[-1]
        if metric not in last:
            raise ArgumentError(f"runs of this problem have no {metric}; they have {', '.join(last)}")
        return status, last[metric]
    return (status, None) if status in ("broken down", "no step taken") else None
