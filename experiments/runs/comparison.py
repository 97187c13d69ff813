"""Race several methods on one problem, each for the same wall-clock time.

All methods start from the same parameters and see the same mini-batches in the same order. One that breaks down is
reported, and the others go on. What is finished is on disk before the next method starts.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import ArgumentError, OsculateError, near_misses
from ..problems import Data, Problem, get_problem
from .batches import data_checksum, move_data
from .config import Budget, RunConfig
from .effort import Effort
from .environment import choose_device, describe_environment
from .interrupts import interruptible
from .progress import Display
from .records import write_json
from .runs import Resume, describe_run
from .targets import exclusive
from .training import BoundedShare, measure, prepare

__all__ = ["Comparison", "Curve", "compare", "comparison_table", "load_comparison", "method_configs"]

EVALUATION_SHARE = 0.4
_OWN = ("lr", "damping", "weight_decay", "lr_schedule", "lr_warm_up")
POINTS_WITHIN_EPOCHS = 24
MOST_POINTS = 60


@dataclass(frozen=True)
class Curve:
    """One method's course.

    Args:
        method: its name.
        config: its configuration, defaults resolved.
        points: its metrics, in order; the first is before training.
        failure: why it broke down, else empty.
    """

    method: str
    config: dict[str, Any]
    points: list[dict[str, Any]]
    failure: str = ""

    @property
    def final_loss(self) -> float:
        """The last training loss; infinite where the method broke down."""
        if self.failure or not self.points:
            return math.inf
        return float(self.points[-1]["train_loss"])


@dataclass
class Comparison:
    """All curves on one problem, and where they were measured.

    Args:
        problem: name of the problem.
        budget: training time (and epochs) every method had.
        environment: see ``describe_environment``.
        curves: one per method, in the order they ran.
        floor: of the problem, what no training loss gets below; None where that is unknown.
        landmarks: of the problem, losses to be drawn beside the curves.
    """

    problem: str
    budget: Budget
    environment: dict[str, Any]
    curves: list[Curve] = field(default_factory=list)
    floor: float | None = None
    landmarks: dict[str, float] = field(default_factory=dict)

    def ranked(self) -> list[Curve]:
        """Return the curves, smallest final training loss first, breakdowns last."""
        return sorted(self.curves, key=lambda curve: curve.final_loss)


def method_configs(common: RunConfig, methods: Sequence[str], options: Mapping[str, Any]) -> list[RunConfig]:
    """Return one configuration per method.

    Args:
        common: what all share; its own method and method options are replaced.
        methods: registered names, each once.
        options: ``METHOD.name`` keys for one method's keyword (``lr`` included), plain ``name`` keys for all.

    Raises:
        ArgumentError: a method comes twice or never, or an option names a method that does not run.
    """
    if not methods or len(set(methods)) < len(methods):
        raise ArgumentError(f"methods must name each method once and at least one, got {' '.join(methods) or 'none'}")
    split = {key: key.replace("_", "-").partition(".") for key in options if "." in key}
    strangers = sorted({owner for owner, _, _ in split.values()} - set(methods))
    if strangers:
        near = [entry for stranger in strangers for entry in near_misses(stranger, methods)]
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ArgumentError(
            f"option for {', '.join(strangers)}, but only {', '.join(methods)} run{hint}; name it "
            "with --methods too, or leave the option out"
        )
    shared = {key: value for key, value in options.items() if "." not in key}
    configs = []
    for method in methods:
        own = {key.partition(".")[2]: options[key] for key, (owner, _, _) in split.items() if owner == method}
        numbers = {name: own.pop(name) for name in _OWN if name in own}
        configs.append(dataclasses.replace(common, method=method, method_options=shared | own, **numbers))
    return configs


def compare(
    configs: Sequence[RunConfig],
    budget: Budget,
    file: Path,
    data_dir: Path | None,
    display: Display,
    resume: Resume = Resume.NEVER,
    effort: Effort | None = None,
) -> Comparison:
    """Run the methods one after another, and write what is known to ``file`` after each.

    Args:
        configs: one per method, alike but for the method; see ``method_configs``.
        budget: of each method.
        file: the JSON file.
        data_dir: where the data sets lie; None downloads or generates them.
        display: shows the progress.
        resume: with AUTO and REQUIRE, curves that ``file`` holds of the same configuration are kept, not run again.
        effort: times what the methods take together, on the wall and of the processor.

    Raises:
        ArgumentError: a value is out of range (all methods are built once before the first one trains), or ``file``
            holds another comparison and ``resume`` wants it continued.
    """
    problem = get_problem(configs[0].problem, **configs[0].problem_options)
    device = choose_device(configs[0].device)
    data = move_data(problem.load(data_dir), device)
    checksum = data_checksum(data)
    descriptions = [describe_run(config, prepare(config, problem, data, budget), checksum) for config in configs]
    comparison = Comparison(
        problem.name, budget, describe_environment(device), floor=problem.floor, landmarks=dict(problem.landmarks)
    )
    earlier = _earlier(file, comparison, resume)
    with exclusive(file.parent), display, effort or Effort(), interruptible() as interrupted:
        for config, description in zip(configs, descriptions, strict=True):
            kept = next((curve for curve in earlier if curve.config == description), None)
            curve = kept or _run(config, description, (problem, data), budget, display, interrupted)
            if interrupted():
                break
            comparison.curves.append(curve)
            write_json(file, dataclasses.asdict(comparison))
    return comparison


def load_comparison(file: Path) -> Comparison:
    """Read what ``compare`` wrote.

    Raises:
        ArgumentError: the file is missing, damaged or something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["budget"] = Budget(**content["budget"])
        content["curves"] = [Curve(**curve) for curve in content["curves"]]
        return Comparison(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArgumentError(f"{file} is not a comparison ({error}); name another folder with --out") from error


def comparison_table(comparison: Comparison) -> pd.DataFrame:
    """Return one row per method, the smallest final training loss first."""
    return pd.DataFrame([_row(curve, comparison.budget) for curve in comparison.ranked()])


def _row(curve: Curve, budget: Budget) -> dict[str, Any]:
    start, last = (curve.points[0], curve.points[-1]) if curve.points else ({}, {})
    iterations = last.get("iterations", 0)
    pure = last.get("seconds", 0.0) - last.get("warm_start_seconds", 0.0)
    cut = ": the time was over in the warm start" if budget.out_of_time(last.get("seconds", 0.0)) else ""
    note = "" if iterations or not last else f"no step taken{cut}"
    return {
        "method": curve.method,
        "train loss": math.nan if curve.failure else curve.final_loss,
        "test loss": math.nan if curve.failure else last.get("test_loss", math.nan),
        "accuracy": last.get("test_accuracy", math.nan),
        "epochs": float(last.get("epoch", 0)),
        "ms/step": 1e3 * pure / iterations if iterations else math.nan,
        "warm start s": start.get("warm_start_seconds", math.nan),
        "gradients": last.get("gradient_evaluations", 0),
        "lr": curve.config.get("lr"),
        "damping": curve.config.get("damping"),
        **({"relative L2": last["relative_l2"]} if "relative_l2" in last else {}),
        "note": f"broke down: {curve.failure.partition(';')[0]}" if curve.failure else note,
    }


def _earlier(file: Path, comparison: Comparison, resume: Resume) -> list[Curve]:
    if resume is Resume.NEVER or (resume is Resume.AUTO and not file.exists()):
        return []
    found = load_comparison(file)
    if (found.problem, found.budget) != (comparison.problem, comparison.budget):
        raise ArgumentError(
            f"{file} compares on {found.problem} with {found.budget}, not on {comparison.problem} with "
            f"{comparison.budget}; start over with --resume never, or name another folder with --out"
        )
    return [curve for curve in found.curves if not curve.failure]


def _run(
    config: RunConfig,
    description: dict[str, Any],
    material: tuple[Problem, Data],
    budget: Budget,
    display: Display,
    interrupted: Callable[[], bool],
) -> Curve:
    curve = Curve(config.method, description, [])
    run = prepare(config, *material, budget)
    seconds = budget.seconds
    between = (math.inf, 0.0) if seconds is None else (seconds / POINTS_WITHIN_EPOCHS, seconds / MOST_POINTS)
    schedule = BoundedShare(EVALUATION_SHARE, *between)
    display.begin(config.method)
    try:
        for metrics in measure(run, budget, schedule, display.step, interrupted):
            curve.points.append(metrics.as_dict())
            display.measured(metrics)
    except OsculateError as error:  # one that cannot go on is no reason to lose the others
        display.failed(str(error))
        return dataclasses.replace(curve, failure=str(error))
    return curve
