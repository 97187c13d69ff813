"""What monitors saw, as plots; and the bounded-approximation experiment: eigenvalues during real training."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArgumentError, NumericalError
from ...framework.optimizer.second_order import SecondOrder
from ..theorem import Curve, Inequality, Plot
from .eigenvalue_monitor import EigenvalueBounds
from .readings import Memory, Reading, WatchCertificate
from .watching import watch

__all__ = ["BoundedRun", "bounded_plots", "bounded_run", "read_readings", "reading_plots"]


def read_readings(path: Path) -> list[Reading]:
    """Readings of a file that ``JsonLines`` wrote; a number that was not finite comes back as not-a-number.

    Raises:
        ArgumentError: if the file is missing or damaged.
    """
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            measured, bound = (float("nan") if entry[key] is None else entry[key] for key in ("measured", "bound"))
            inequality = Inequality(entry["claim"], measured, bound, entry["direction"], tolerance=entry["tolerance"])
            found.append(Reading(entry["step"], entry["monitor"], entry["layer"], inequality))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArgumentError(
            f"{path} cannot be read after line {len(found)} ({type(error).__name__}: {error}); watch the run again "
            "with osculate train --watch"
        ) from None
    return found


def reading_plots(readings: Iterable[Reading]) -> tuple[Plot, ...]:
    """One plot per claim of every monitor: over steps, the layer closest to its bound, or furthest beyond it."""
    grouped: dict[tuple[str, str], dict[int, Reading]] = {}
    for reading in readings:
        steps = grouped.setdefault((reading.monitor, reading.inequality.name), {})
        other = steps.get(reading.step)
        if other is None or _urgency(reading) < _urgency(other):
            steps[reading.step] = reading
    return tuple(_plot(key, list(own.values())) for key, own in grouped.items())


def _urgency(reading: Reading) -> tuple[bool, float]:
    """Violations before what held, then by margin; what is not a number comes first."""
    margin = reading.inequality.margin
    return reading.inequality.holds, -math.inf if math.isnan(margin) else margin


def _plot(key: tuple[str, str], readings: Sequence[Reading]) -> Plot:
    steps = [float(entry.step) for entry in readings]
    measured = [entry.inequality.measured for entry in readings]
    bound = [entry.inequality.bound for entry in readings]
    broken = sum(not entry.inequality.holds for entry in readings)
    layers = Counter(entry.layer for entry in readings if entry.layer).most_common(1)
    where = f", mostly layer {layers[0][0]}" if layers else ""
    title = f"{key[0]}: {key[1]}\n" + (f"VIOLATED at {broken} steps" if broken else "held") + where
    curves = (Curve("measured", steps, measured), Curve("bound", steps, bound, "bound"))
    positive = all(value > 0.0 for value in (*measured, *bound) if not math.isnan(value))
    return Plot(title, "step", "", curves, y_log=positive)


@dataclass(frozen=True)
class BoundedRun:
    """One training run in which every H was watched.

    Attributes:
        readings: all of them.
        certificate: what they add up to.
        losses: of the mini-batch at every step.
        trouble: why the run ended early, else empty.
    """

    readings: list[Reading]
    certificate: WatchCertificate
    losses: list[float]
    trouble: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: per layer and claim, [step, measured, bound]."""
        curves: dict[str, dict[str, list[list[Any]]]] = {}
        for reading in self.readings:
            row = reading.as_dict()
            own = curves.setdefault(reading.layer, {}).setdefault(reading.inequality.name, [])
            own.append([row["step"], row["measured"], row["bound"]])
        return {
            "certificate": self.certificate.as_dict(),
            "trouble": self.trouble,
            "losses": [value if math.isfinite(value) else None for value in self.losses],
            "curves": curves,
        }


def bounded_run(optimizer: SecondOrder, train: Callable[[], float], *, steps: int, every: int = 1) -> BoundedRun:
    """Train and watch the eigenvalues of every quasi-Newton matrix beside their bounds.

    Args:
        optimizer: that ``train`` steps.
        train: takes one step and returns the loss; a NumericalError of it ends the run.
        steps: >= 1.
        every: steps between two examinations, >= 1.
    """
    memory, trouble = Memory(), ""
    losses: list[float] = []
    with watch(optimizer, [EigenvalueBounds()], sinks=[memory], every=every) as observed:
        try:
            for _ in range(steps):
                losses += [train()]
        except NumericalError as error:
            trouble = str(error)
    return BoundedRun(memory.readings, observed.certificate(), losses, trouble)


_CLAIMS = (
    ("lambda_max(H)", "largest eigenvalue of any H_g", max),
    ("lambda_min(H)", "smallest eigenvalue of any H_g", min),
    ("lambda_min(H^-1 H+)", "U1: smallest eigenvalue of H^-1 H+, any H_g", min),
    ("lambda_max(E)", "largest eigenvalue of any A^1/2 H_a A^1/2", max),
    ("lambda_min(E)", "smallest eigenvalue of any A^1/2 H_a A^1/2", min),
)


def bounded_plots(runs: Mapping[str, BoundedRun], name: str = "") -> tuple[Plot, ...]:
    """Extreme eigenvalues over all layers, each beside its bound at that layer; then the training loss.

    Args:
        runs: by name of the damping of pairs.
        name: of the method, for the titles.
    """
    before = f"{name}: " if name else ""
    plots = []
    for claim, title, extreme in _CLAIMS:
        curves: list[Curve] = []
        for label, run in runs.items():
            curves += _extremes(run, label, claim, extreme)
        if curves:
            plots.append(Plot(before + title, "step", claim, tuple(curves), y_log=True))
    losses = [Curve(label, range(len(run.losses)), run.losses) for label, run in runs.items()]
    return (*plots, Plot(f"{before}training", "step", "loss of the mini-batch", tuple(losses), y_log=True))


def _extremes(run: BoundedRun, label: str, claim: str, extreme: Callable[..., Inequality]) -> list[Curve]:
    by_step: dict[int, list[Inequality]] = {}
    for reading in run.readings:
        if reading.inequality.name == claim:
            by_step.setdefault(reading.step, []).append(reading.inequality)
    if not by_step:
        return []
    steps = [float(step) for step in by_step]
    picked = [extreme(entries, key=lambda entry: entry.measured) for entries in by_step.values()]
    return [
        Curve(label, steps, [entry.measured for entry in picked]),
        Curve(f"{label}, bound", steps, [entry.bound for entry in picked], "bound"),
    ]
