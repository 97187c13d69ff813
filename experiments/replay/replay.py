"""Replays recorded trajectories with the library's own optimizer and compares every recorded array.

The optimizer is driven as a user would: a model, a method, closures. Everything is computed in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ...curvature.likelihoods import Likelihood
from ...errors import ArgumentError, OsculateError
from ...framework import SecondOrder, build
from ...stepsize.guard import NoGuard
from ..runs.objectives import closure_of
from ..runs.on_screen import FittedTable, say
from .replay_methods import Recipe, RecordedTargets, recipe_of
from .replay_observed import Observer, load_initial
from .trajectory import Settings, Trajectory, build_network, is_input, load_trajectory, loss_of

__all__ = ["TOLERANCE", "Difference", "Report", "replay", "replay_file"]

TOLERANCE = 1e-8
"""Largest relative error that counts as agreement; rounding errors grow less than fivefold over the recorded runs."""

_WARM_TARGETS = ("warm_targets", "warm_fisher_targets")
_TARGETS = ("fisher_targets",)
_DETAILS = 8


@dataclass(frozen=True)
class Difference:
    """One array.

    Args:
        name: as recorded.
        error: max|x - ref| / max|ref| over the whole array (max|x| where ref is zero); infinite where the shapes
            differ or a value is not finite.
        iteration: of the largest difference; ``None`` for what is recorded before the first.
        problem: why the arrays could not be subtracted, if so.
    """

    name: str
    error: float
    iteration: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """One file.

    Args:
        name: of the file.
        algorithm: as recorded.
        iterations: T.
        comparisons: of every array that the algorithm made.
        notes: whatever else the reader must know, such as arrays that were not compared.
    """

    name: str
    algorithm: str
    iterations: int
    comparisons: Sequence[Difference]
    notes: Sequence[str] = ()

    @property
    def worst(self) -> Difference:
        """The array with the largest error."""
        return max(self.comparisons, key=lambda entry: entry.error)

    @property
    def passed(self) -> bool:
        """Whether every array agrees."""
        return self.worst.error <= TOLERANCE


def replay(files: Sequence[Path], console: Console | None = None) -> int:
    """Replay files, print a table with one row for each, and say what disagrees.

    Args:
        files: recorded trajectories (.npz). One that cannot be replayed does not stop the others.
        console: where to print. Default: standard output.

    Returns:
        0 if every array of every file agrees to ``TOLERANCE``, else 1.

    Raises:
        ArgumentError: if there are no files.
    """
    if not files:
        raise ArgumentError("no files to replay; give recorded trajectories (.npz)")
    console = console or Console()
    reports: list[Report] = []
    remarks: list[str] = []
    table = FittedTable(
        title=f"largest relative error of each file, tolerance {TOLERANCE:g}", box=SIMPLE_HEAD, padding=(0, 0)
    )
    for header in ("file", "algorithm", "steps", "error", "largest in", "result"):
        table.add_column(header, justify="right" if header in ("steps", "error") else "left", overflow="fold")
    for file in files:
        try:
            report = replay_file(file)
        except (OsculateError, RuntimeError, LookupError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, OsculateError) else f"{type(error).__name__}: "
            table.add_row(escape(file.stem), *[""] * 4, "[red]error")
            remarks.append(f"{file.name}: {kind}{error}")
            continue
        reports.append(report)
        result, worst = "[green]passed" if report.passed else "[red]failed", report.worst
        largest = worst.name + ("" if worst.iteration is None else f" at {worst.iteration}")
        steps = str(report.iterations)
        table.add_row(escape(file.stem), escape(report.algorithm), steps, f"{worst.error:.1e}", largest, result)
        remarks += [f"{report.name}: {remark}" for remark in _remarks(report)]
    console.print(table)
    passed, arrays = sum(report.passed for report in reports), sum(len(report.comparisons) for report in reports)
    remarks.append(f"{passed} of {len(files)} files agree; {arrays} arrays compared")
    for remark in remarks:
        say(console, remark)
    return 0 if passed == len(files) else 1


def _remarks(report: Report) -> Iterator[str]:
    """The arrays that disagree, largest error first, and the notes."""
    wrong = sorted((c for c in report.comparisons if not c.error <= TOLERANCE), key=lambda c: -c.error)
    for entry in wrong[:_DETAILS]:
        where = "" if entry.iteration is None else f" at iteration {entry.iteration}"
        yield entry.problem or f"{entry.name} differs by {entry.error:.1e}{where}"
    if len(wrong) > _DETAILS:
        yield f"and {len(wrong) - _DETAILS} more arrays differ"
    yield from report.notes


def replay_file(file: Path) -> Report:
    """Replay one file.

    Raises:
        ArgumentError: if it cannot be read, or the library has no counterpart of what it records.
        NumericalError: if the run breaks down.
    """
    trajectory = load_trajectory(file)
    for initial in [name for name in trajectory.arrays if re.fullmatch(r"[Wb]_init_\d+", name)]:
        name = initial.replace("_init", "")
        if name not in trajectory.arrays:
            raise ArgumentError(f"the file has no array {name!r}, the weights after each iteration; it is incomplete")
    settings = Settings(trajectory.meta["hyper"])
    recipe = recipe_of(trajectory, settings)
    run = _Run(trajectory, recipe)
    if run.shortened is not None:
        note = (
            f"the method's guard would shorten the step of iteration {run.shortened}, whose loss grows; replayed "
            "without the guard, as recorded"
        )
        run = _Run(trajectory, replace(recipe, method=replace(recipe.method, guard=NoGuard())))
        run.notes.append(note)
    outcomes = {name: value for name, value in trajectory.arrays.items() if not is_input(name)}
    unknown = [name for name in outcomes if name not in run.values]
    comparisons = [_compare(name, run.values[name], trajectory) for name in outcomes if name in run.values]
    notes = run.notes
    if unknown:
        notes.append(f"not compared, because the replay has no such array: {', '.join(unknown)}")
    if settings.unused:
        notes.append(f"settings that the replay does not use: {', '.join(settings.unused)}")
    return Report(file.name, str(trajectory.meta["algorithm"]), trajectory.iterations, comparisons, notes)


class _Run:
    """One pass over a trajectory; ``values`` holds what the file records too, by name.

    ``shortened`` is the iteration at which the guard stopped the run, or ``None``.
    """

    def __init__(self, trajectory: Trajectory, recipe: Recipe):
        self.trajectory, self.log = trajectory, recipe.log
        self.likelihood = loss_of(trajectory)
        self.targets = RecordedTargets(self.likelihood)
        self.model, layers = build_network(trajectory)
        self.optimizer: SecondOrder = build(
            recipe.method, self.model, likelihood=cast(Likelihood, self.targets), **recipe.numbers
        )
        self.observer = Observer(self.optimizer, layers, recipe.log)
        self.notes: list[str] = []
        self.shortened: int | None = None
        self.values: dict[str, NDArray[Any]] = {}
        try:
            self._warm_start()
            self._iterate()
        finally:
            self.optimizer.close()

    def _warm_start(self) -> None:
        rows = self.trajectory.warm_batches
        start = self.optimizer.method.warm_start
        sampled = start is not None and start.needs_likelihood
        arrays = self.trajectory.arrays
        made = {name: torch.tensor(arrays[name]) for name in arrays if re.fullmatch(r"[AGF]_init_\d+", name)}

        def forward(index: int) -> Tensor:
            self.targets.expected = self.trajectory.sampled(_WARM_TARGETS, index)
            output: Tensor = self.model(self.trajectory.inputs(rows[index]))
            return output

        if len(rows) and (not sampled or any(name in arrays for name in _WARM_TARGETS)):
            self.optimizer.warm_start(partial(forward, index) for index in range(len(rows)))
        elif any(bool(value.any()) for value in made.values()):  # else the run starts from zero anyway
            load_initial(self.observer, made, warm=not self.trajectory.full_batch)
            self.notes.append("no warm start to replay in the file: started from its arrays A_init, G_init, F_init")
        elif len(rows):
            raise ArgumentError(f"the file has warm_batches, but neither {_WARM_TARGETS[0]!r} nor what they made")
        self._keep({name: value.clone() for name, value in self.observer.initial().items()})

    def _iterate(self) -> None:
        columns: dict[str, list[Tensor]] = {}
        inverted: list[int] = []
        for index, rows in enumerate(self.trajectory.arrays["batches"]):
            self.log.clear()
            self.targets.expected = self.trajectory.sampled(_TARGETS, index)
            found = self._step(rows)
            if self.optimizer.last_report.shortened:
                self.shortened = index
                return
            if self.optimizer.last_report.refreshes:
                inverted.append(index)
            for name, value in found.items():
                if name in self.trajectory.arrays:
                    columns.setdefault(name, []).append(value.clone())
        self._keep({name: torch.stack(values) for name, values in columns.items()})
        self.values["inverse_iterations"] = np.array(inverted, dtype=np.int64)
        recorded = self.trajectory.arrays.get("inverse_iterations")
        if recorded is not None:  # inverses of mini-blocks are recorded only where they were recomputed
            for name in [name for name in self.values if name.startswith("F_inv_")]:
                self.values[name] = self.values[name][recorded[recorded < self.trajectory.iterations]]

    def _step(self, rows: NDArray[Any]) -> dict[str, Tensor]:
        inputs, targets = self.trajectory.inputs(rows), self.trajectory.targets(rows)

        def loss() -> Tensor:
            return self.likelihood.negative_log_likelihood(self.model(inputs), targets) / len(rows)

        before = self.optimizer.step(closure_of(self.optimizer, loss))
        assert before is not None
        after = self.optimizer.last_report.loss_after
        if after is None:
            with torch.no_grad():
                after = loss()
        return self.observer.after_step() | {"loss": before, "loss_after": torch.as_tensor(after)}

    def _keep(self, found: Mapping[str, Tensor]) -> None:
        self.values.update({name: value.detach().numpy() for name, value in found.items()})


def _compare(name: str, value: NDArray[Any], trajectory: Trajectory) -> Difference:
    reference = trajectory.arrays[name]
    if name.startswith("status_"):  # 0 says applied; the reasons for skipping have no common numbering
        reference = reference != 0
    if value.shape != reference.shape:
        problem = f"{name} has shape {reference.shape} in the file, the replay makes {value.shape}"
        return Difference(name, math.inf, problem=problem)
    if not reference.size:
        return Difference(name, 0.0)
    value, reference = value.astype(np.float64), reference.astype(np.float64)
    difference = np.abs(value - reference)
    bad = ~np.isfinite(difference)
    largest = np.unravel_index(np.argmax(np.where(bad, np.inf, difference)), difference.shape)
    error = math.inf if bad.any() else float(difference[largest] / (np.abs(reference).max() or 1.0))
    if "_init_" in name:
        return Difference(name, error)
    iteration = int(largest[0])
    if name.startswith("F_inv_") and "inverse_iterations" in trajectory.arrays:
        iteration = int(trajectory.arrays["inverse_iterations"][iteration])
    return Difference(name, error, iteration)
