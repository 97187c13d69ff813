"""What a study left on disk, read into frames: run folders and ``study.json``, nothing else.

Run folders made by hand (``osculate train --out STUDY/runs/PROBLEM/ARM/final-0``) count like the study's own; so does a
folder of runs without any ``study.json``. What is missing, damaged or still running is said, never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import ArgumentError
from ..runs.records import RunFolder
from ..runs.wholeness import contradiction
from .plain_runs import seeds_run_twice, told_apart

__all__ = ["STATES", "StudyRecord", "read_study", "side_by_side"]

STATES = ("finished", "missed", "unfinished")
"""``missed``: broke down, or took no step: it counts as infinite. ``unfinished``: running, interrupted or damaged: its
outcome is unknown, so it enters no statistic and every table counts it."""

_STATE = {"finished": "finished", "broken down": "missed", "no step taken": "missed"}
_RUN_COLUMNS = ["run", "problem", "arm", "phase", "trial", "seed", "value", "state", "status", "reason", "settings"]
_RUN_COLUMNS += ["broke after"]
_SHARED = ("problem", "options", "batch_size", "target", "tuning")
"""What studies must agree on for runs of one problem to stand side by side."""

_OPEN = (None, "", "not finished")
"""Reasons in ``trial.json`` of a run that may still go on."""

_SETTINGS = ("lr", "damping", "weight_decay", "batch_size")

_NUMBERED = re.compile(r"(tune|final)-(\d+)$")


@dataclass(frozen=True)
class StudyRecord:
    """Everything a report needs of a study.

    Attributes:
        name: of the study; the folder's name where there is no ``study.json``.
        description: ``study.json`` as it is; empty where there is none.
        runs: one row per run: ``run`` (its path within the study), ``problem``, ``arm``, ``phase`` (``tune`` or
            ``final``), ``trial``, ``seed``, ``value`` (of the tuning metric), ``state`` (of :data:`STATES`),
            ``status``, ``reason``, ``settings`` (a dictionary), ``broke after`` (steps; NaN unless it broke down).
        courses: one row per evaluation: ``run`` and the numbers of ``metrics.jsonl``.
        layer_steps: one row per evaluation and layer: ``run``, ``epoch``, ``layer``, ``step``.
        gaps: sentences about what is missing, damaged or unfinished.
        samples: training samples of every problem, where a run says how many.
    """

    name: str
    description: Mapping[str, Any]
    runs: pd.DataFrame
    courses: pd.DataFrame
    layer_steps: pd.DataFrame
    gaps: tuple[str, ...] = ()
    samples: Mapping[str, int] = field(default_factory=dict)
    _by_run: dict[str, pd.DataFrame] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def problems(self) -> list[str]:
        """Names, those of ``study.json`` first."""
        named = [entry["name"] for entry in self.description.get("problems", [])]
        return list(dict.fromkeys([*named, *self.runs["problem"]]))

    @property
    def arms(self) -> list[str]:
        """Labels, those of ``study.json`` first."""
        return list(dict.fromkeys([*self.description.get("arms", {}), *self.runs["arm"]]))

    @property
    def base(self) -> str | None:
        """Label of the arm the others are compared with, if the study names one that it has."""
        base = self.description.get("base")
        return base if base in self.arms else None

    def target(self, problem: str) -> tuple[str, float] | None:
        """Metric and value of a problem's target, if it has one."""
        target = self._problem(problem).get("target")
        return (target["metric"], float(target["value"])) if target else None

    def seeds(self, problem: str) -> list[int]:
        """Seeds of the final runs that the study announced for a problem."""
        return list(self._problem(problem).get("seeds") or self.description.get("seeds", []))

    def tuning_metric(self, problem: str) -> str:
        """Metric that trials are ranked by."""
        return str(self._problem(problem).get("tuning") or "valid_loss")

    def varied(self, arm: str) -> tuple[str, str] | None:
        """Which part of the base an arm replaces, and by what."""
        varied = self.description.get("arms", {}).get(arm, {}).get("varied")
        return (str(varied["part"]), str(varied["value"])) if varied else None

    def finals(self, problem: str, arm: str) -> pd.DataFrame:
        """Final runs of an arm on a problem whose outcome is known, by seed; a seed run twice counts once."""
        chosen = self.of(problem, arm, "final")
        return chosen[chosen.state != "unfinished"].drop_duplicates("seed").sort_values("seed")

    def of(self, problem: str, arm: str, phase: str) -> pd.DataFrame:
        """Runs of an arm on a problem, ``tune`` or ``final``."""
        runs = self.runs
        return runs[(runs.problem == problem) & (runs.arm == arm) & (runs.phase == phase)]

    def course(self, run: str) -> pd.DataFrame:
        """Evaluations of one run in order."""
        if not self._by_run:
            self._by_run.update({str(name): frame for name, frame in self.courses.groupby("run", sort=False)})
        return self._by_run.get(run, self.courses.iloc[:0])

    def _problem(self, name: str) -> Mapping[str, Any]:
        entries = self.description.get("problems", [])
        return next((entry for entry in entries if entry["name"] == name), {})


def read_study(folder: Path) -> StudyRecord:
    """Read a study's folder.

    Args:
        folder: with ``study.json`` and run folders below ``runs``; or any folder with run folders below it.

    Raises:
        ArgumentError: there is no such folder, nothing in it to report, or ``study.json`` is damaged.
    """
    if not folder.is_dir():
        raise ArgumentError(f"no study at {str(folder)!r}: name the folder that 'osculate study' wrote")
    description = _description(folder / "study.json")
    tuning = {entry["name"]: entry.get("tuning") for entry in description.get("problems", [])}
    gaps: list[str] = []
    rows: list[list[Any]] = []
    courses: list[dict[str, Any]] = []
    steps: list[list[tuple[str, float, str, float]]] = []
    plain: dict[str, dict[str, Any]] = {}
    for path in _run_folders(folder):
        name = path.relative_to(folder).as_posix()
        lines = _evaluations(path, name, gaps)
        rows.append(_run_row(path, name, lines, tuning, gaps))
        plain |= _plain(path, name)
        courses.extend({"run": name} | _numbers(line) for line in lines)
        steps.extend(_layer_rows(name, line) for line in lines)
    if not rows and not description:
        raise ArgumentError(f"{str(folder)!r} holds neither study.json nor runs; name the folder of a study")
    runs = pd.DataFrame(rows, columns=_RUN_COLUMNS).astype({"value": float, "broke after": float})
    runs = told_apart(runs, plain)
    gaps += seeds_run_twice(runs)
    samples: dict[str, int] = {}
    for run, problem in zip(runs["run"], runs["problem"], strict=True):
        _count_samples(folder / run, problem, samples)
    layers = pd.DataFrame([row for group in steps for row in group], columns=["run", "epoch", "layer", "step"])
    table = pd.DataFrame(courses) if courses else pd.DataFrame(columns=["run", "epoch", "iterations", "seconds"])
    gaps += _missing(description, runs)
    name = description.get("name") or folder.resolve().name
    return StudyRecord(name, description, runs, table, layers, tuple(gaps), samples)


def side_by_side(studies: Sequence[StudyRecord]) -> StudyRecord:
    """Several studies as one, each arm labelled with its study; problems of one name are one problem.

    Args:
        studies: at least one; a single one is returned as it is.

    Raises:
        ArgumentError: two studies set different targets, tuning metrics or options for one problem: their runs cannot
            share a table.
    """
    if len(studies) == 1:
        return studies[0]
    named = dict(zip(_distinct([study.name for study in studies]), studies, strict=True))
    title = " and ".join(str(study.description.get("title") or study.name) for study in studies)
    notes = [f"{name}: {note}" for name, study in named.items() for note in study.description.get("notes", [])]
    description: dict[str, Any] = {
        "name": " and ".join(named),
        "title": title,
        "notes": notes + _different_budgets(studies),
        "problems": _shared_problems(studies),
        "arms": {
            f"{name}: {arm}": entry | {"varied": None}
            for name, study in named.items()
            for arm, entry in study.description.get("arms", {}).items()
        },
        "studies": {name: dict(study.description) for name, study in named.items()},
    }
    return StudyRecord(
        str(description["name"]),
        description,
        pd.concat([_renamed(study.runs, name, "run", "arm") for name, study in named.items()], ignore_index=True),
        pd.concat([_renamed(study.courses, name, "run") for name, study in named.items()], ignore_index=True),
        pd.concat([_renamed(study.layer_steps, name, "run") for name, study in named.items()], ignore_index=True),
        tuple(f"{name}: {gap}" for name, study in named.items() for gap in study.gaps),
        {problem: count for study in studies for problem, count in study.samples.items()},
    )


def _shared_problems(studies: Sequence[StudyRecord]) -> list[Any]:
    """Problems of all studies, each once.

    Raises:
        ArgumentError: two studies mean different things by one name.
    """
    problems: dict[str, Any] = {}
    for study in studies:
        for entry in study.description.get("problems", []):
            first = problems.setdefault(entry["name"], entry)
            if any(first.get(key) != entry.get(key) for key in _SHARED):
                raise ArgumentError(
                    f"the studies define problem {entry['name']!r} differently ({first} and {entry}); their runs "
                    "cannot be compared"
                )
    return list(problems.values())


def _different_budgets(studies: Sequence[StudyRecord]) -> list[str]:
    budgets: dict[str, list[Any]] = {}
    for study in studies:
        for entry in study.description.get("problems", []):
            budgets.setdefault(entry["name"], []).append(entry.get("budget") or study.description.get("budget"))
    unequal = [name for name, found in budgets.items() if any(entry != found[0] for entry in found)]
    return [f"the studies trained {name} with different budgets: final values do not compare" for name in unequal]


def _renamed(frame: pd.DataFrame, name: str, *columns: str) -> pd.DataFrame:
    """The frame with a study's name before the entries of some columns."""
    return frame.assign(**{column: f"{name}: " + frame[column].astype(str) for column in columns})


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes twice."""
    return [
        name if names.count(name) == 1 else f"{name} {names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    ]


def _json_object(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is no file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or no object.
    """
    if not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _description(file: Path) -> dict[str, Any]:
    try:
        content = _json_object(file)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{file} cannot be read ({error}); restore it, or remove it to report bare runs") from error
    for key, kind in (("arms", dict), ("problems", list), ("seeds", list), ("notes", list)):
        value = content.get(key, kind())
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        tables = key not in ("arms", "problems") or all(isinstance(entry, dict) for entry in entries)
        named = key != "problems" or (tables and all(isinstance(entry.get("name"), str) for entry in entries))
        if not isinstance(value, kind) or not tables or not named:
            raise ArgumentError(
                f"{file} is damaged: its {key} read {str(value)[:60]!r}; restore it with the study's own command, or "
                "remove it to report bare runs"
            )
    return content


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders that a run wrote, in order; what a report wrote is none."""
    files = [path for name in ("config.json", "trial.json", "metrics.jsonl") for path in folder.rglob(name)]
    yield from sorted({path.parent for path in files if path.parent != folder}, key=lambda path: (_natural(path), path))


def _natural(path: Path) -> list[tuple[int, str]]:
    pieces = re.split(r"(\d+)", path.as_posix())
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _evaluations(path: Path, name: str, gaps: list[str]) -> list[dict[str, Any]]:
    try:
        return RunFolder(path).read_metrics()
    except ArgumentError as error:
        gaps.append(f"{name} is damaged: {error}")
        return []


def _object(file: Path, name: str, gaps: list[str]) -> dict[str, Any]:
    try:
        return _json_object(file)
    except (OSError, ValueError) as error:
        gaps.append(f"{name} is damaged: {file.name} cannot be read ({error})")
        return {}


def _run_row(
    path: Path, name: str, lines: Sequence[Mapping[str, Any]], tuning: Mapping[str, Any], gaps: list[str]
) -> list[Any]:
    before = len(gaps)
    trial, config = _object(path / "trial.json", name, gaps), _object(path / "config.json", name, gaps)
    status = _object(path / "status.json", name, gaps)
    _drop_misfits(trial, name, gaps)
    numbered = _NUMBERED.search(path.name)
    phase = trial.get("phase") or (numbered[1] if numbered else "final")
    number = int(numbered[2]) if numbered else 0
    known = str(status.get("status", "no status"))
    state = _STATE.get(known, "unfinished")
    reason = str(trial.get("reason") or status.get("reason") or "")
    if state == "unfinished" and trial.get("value") is None and trial.get("reason") not in _OPEN:
        known, state = "broken down", "missed"  # the study gave it up: over its limit, or refused before it began
    if other := _other_settings(trial, config):
        known, state = "another run", "unfinished"
        gaps.append(f"{name} holds another run than its trial.json names: {other}")
    elif state == "finished" and (len(gaps) > before or not lines):
        state = "unfinished"
        gaps.append(f"{name} says it finished, but its files do not hold a whole run")
    elif state == "finished" and (
        contradicted := contradiction(status, lines, trial, tuning.get(str(trial.get("problem"))))
    ):
        state = "unfinished"
        gaps.append(f"{name} is damaged: {contradicted}")
    elif state == "unfinished":
        gaps.append(f"{name} did not end: {known}")
    value = trial.get("value")
    return [
        name,
        trial.get("problem") or config.get("problem") or (path.parts[-3] if len(path.parts) > 2 else name),
        trial.get("arm") or _arm(path, config),
        phase,
        trial.get("trial", number if phase == "tune" else None),
        trial["seed"] if trial.get("seed") is not None else _seed(config, number),
        math.nan if value is None else float(value),
        state,
        known,
        reason,
        trial.get("settings") or {key: config[key] for key in ("lr", "damping") if config.get(key) is not None},
        _broke_after(status, lines) if state == "missed" else math.nan,
    ]


def _other_settings(trial: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Where the numbers that a study names are not those that the run was configured with."""
    named = trial.get("settings") or {}
    pairs = {name: (config[name], named[name]) for name in _SETTINGS if name in named and config.get(name) is not None}
    return ", ".join(
        f"{name} is {ran!r}, not {told!r}" for name, (ran, told) in pairs.items() if _is_number(told) and ran != told
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _broke_after(status: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> float:
    """Steps that a run had taken when it broke down; those of its last evaluation where it was killed."""
    steps = status.get("iterations", lines[-1].get("iterations") if lines else None)
    return float(steps) if isinstance(steps, int | float) and not isinstance(steps, bool) else math.nan


def _plain(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """The configuration of a run that no study made and whose folder names no arm; damage is told elsewhere."""
    if _NUMBERED.search(path.name):
        return {}
    with suppress(OSError, ValueError):
        if not _json_object(path / "trial.json").get("arm") and (config := _json_object(path / "config.json")):
            return {name: config}
    return {}


def _count_samples(path: Path, problem: str, samples: dict[str, int]) -> None:
    """Note how many training samples a run had, if it says so; damage is told elsewhere."""
    with suppress(OSError, ValueError):
        count = _json_object(path / "config.json").get("training_samples")
        if isinstance(count, int) and not isinstance(count, bool):
            samples[problem] = max(count, samples.get(problem, 0))


def _seed(config: Mapping[str, Any], number: int) -> int:
    seed = config.get("seed", number)
    return seed if isinstance(seed, int) else number


def _drop_misfits(trial: dict[str, Any], name: str, gaps: list[str]) -> None:
    """Leave out, and say, what in ``trial.json`` is of another kind than a study writes."""
    kinds = {str: ("problem", "arm", "reason"), dict: ("settings",), int: ("seed", "trial"), int | float: ("value",)}
    wrong = [
        key
        for kind, keys in kinds.items()
        for key in keys
        if trial.get(key) is not None and (not isinstance(trial[key], kind) or isinstance(trial[key], bool))
    ]
    if trial.get("phase") not in (None, "tune", "final"):
        wrong.append("phase")
    gaps += [f"{name} is damaged: {key} in trial.json is {trial.pop(key)!r}" for key in wrong]


def _arm(path: Path, config: Mapping[str, Any]) -> str:
    return path.parent.name if _NUMBERED.search(path.name) else str(config.get("method") or path.name)


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """Plain numbers of an evaluation; what stood for not finite (null) is not a number."""
    return {
        key: math.nan if value is None else value
        for key, value in line.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _layer_rows(name: str, line: Mapping[str, Any]) -> list[tuple[str, float, str, float]]:
    steps = line.get("layer_steps") or {}
    return [(name, line.get("epoch", math.nan), layer, step) for layer, step in steps.items() if step is not None]


def _missing(description: Mapping[str, Any], runs: pd.DataFrame) -> list[str]:
    """Final runs and trials that the study announced and that left no folder."""
    gaps = []
    for problem in description.get("problems", []):
        for arm, entry in description.get("arms", {}).items():
            mine = runs[(runs.problem == problem["name"]) & (runs.arm == arm)]
            there = set(mine.loc[mine.phase == "final", "seed"])
            absent = [seed for seed in problem.get("seeds") or description.get("seeds", []) if seed not in there]
            own = entry.get("on", {}).get(problem["name"], entry)
            trials = int(own.get("trials") or 0) - int((mine.phase == "tune").sum())
            where = f"{problem['name']}, {arm}"
            if absent:
                gaps.append(f"{where}: no final run with seed {', '.join(map(str, absent))}")
            if trials > 0 and own.get("space"):
                gaps.append(f"{where}: {trials} of {own['trials']} tuning trials have not begun")
    return gaps
