"""Runs in function space with everything a linear-convergence certificate needs measured at every step (PAPERS 2.5).

A step is certified with rate 1 - eta if

    kappa_min - C' >= 1 / (1 + sqrt(1 - eta))   and   kappa_max + C' <= (1 + sqrt(1 - eta)) / eta,

kappa the extreme eigenvalues of K and C' = sup |J(theta_s) - J(theta)| |d| / |e| over the step. The a-priori C' from
Lipschitz constants is hopeless at widths that can be run, so the supremum is measured, at points along the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import require_finite_nonnegative, require_interval
from .function_space import FunctionSpace, spectrum
from .function_structures import Solved, Structure

__all__ = [
    "FunctionRun",
    "StepRecord",
    "certified_interval",
    "damping_grid",
    "linear_limit",
    "measured_stability",
    "run",
]

_POINTS = (0.25, 0.5, 0.75, 1.0)
"""Where along a step the Jacobian is compared with the one at its start."""


@dataclass(frozen=True)
class StepRecord:
    """What one step from theta_k to theta_{k+1} measured.

    Attributes:
        error: |e_k|^2.
        next_error: |e_{k+1}|^2.
        kappa_min: smallest eigenvalue of K.
        kappa_max: largest eigenvalue of K.
        stability: C'.
        defect: |e_{k+1} - (I - eta K) e_k| / (eta |e_k|), which C' bounds if K is the right one.
        squared_norm: |d|^2 of the direction.
        form: e' K e.
        distance: |theta_{k+1} - theta_0|.
        eta: the step size.
    """

    error: float
    next_error: float
    kappa_min: float
    kappa_max: float
    stability: float
    defect: float
    squared_norm: float
    form: float
    distance: float
    eta: float

    @property
    def ratio(self) -> float:
        """|e_{k+1}|^2 / |e_k|^2."""
        return self.next_error / self.error

    @property
    def bound(self) -> float:
        """Rate that always holds: (max(|1 - eta kappa_min|, |1 - eta kappa_max|) + eta C')^2."""
        linear = max(abs(1.0 - self.eta * self.kappa_min), abs(1.0 - self.eta * self.kappa_max))
        return (linear + self.eta * self.stability) ** 2

    @property
    def certified(self) -> bool:
        """Whether the two conditions hold, that is whether the bound is at most 1 - eta."""
        if not 0.0 < self.eta <= 1.0:
            return False
        root = 1.0 + math.sqrt(1.0 - self.eta)
        low = self.kappa_min - self.stability >= 1.0 / root
        return low and self.kappa_max + self.stability <= root / self.eta


@dataclass(frozen=True)
class FunctionRun:
    """A full-batch run.

    Attributes:
        records: one per step taken; fewer than asked for if the error ran away or vanished.
        residuals: e_0, e_1, ..., (n,) each.
        damping: lambda > 0.
        final: theta at the end.
    """

    records: tuple[StepRecord, ...]
    residuals: tuple[Tensor, ...]
    damping: float
    final: Tensor

    @property
    def certified(self) -> bool:
        """Whether every step is certified, and stayed within the radius R on which the theorem asks it."""
        inside = all(entry.distance <= self.radius * (1.0 + 1e-12) for entry in self.records)
        return bool(self.records) and all(entry.certified for entry in self.records) and inside

    @property
    def share(self) -> float:
        """Share of certified steps, in [0, 1]."""
        return sum(entry.certified for entry in self.records) / max(1, len(self.records))

    @property
    def radius(self) -> float:
        """R = 2 sqrt(kappa_max / (n lambda)) |e_0|, kappa_max the largest of the run."""
        largest = max(entry.kappa_max for entry in self.records)
        scale = len(self.residuals[0]) * self.damping
        return 2.0 * math.sqrt(largest * self.records[0].error / scale) if scale else math.inf

    @property
    def rate(self) -> float:
        """Geometric mean of the ratios."""
        last = self.records[-1].next_error
        if last == 0.0 or not math.isfinite(last):
            return last
        return float((last / self.records[0].error) ** (1.0 / len(self.records)))

    @property
    def worst_ratio(self) -> float:
        """Largest ratio of a step."""
        return max(entry.ratio for entry in self.records)


def linear_limit(kernel: Tensor) -> float:
    """Largest eta with |(I - eta K) e|^2 <= (1 - eta) |e|^2 for all e: min_i (2 kappa_i - 1) / kappa_i^2.

    Not positive if an eigenvalue of K is at most 1/2: then no eta has this rate.
    """
    eigenvalues = spectrum(kernel)
    return float(((2.0 * eigenvalues - 1.0) / eigenvalues.square()).min())


def measured_stability(space: FunctionSpace, theta: Tensor, move: Tensor, solved: Solved, residual: Tensor) -> float:
    """C' = max over points of the step of |J(theta_s) - J(theta)|, times |d| / |e|."""
    change = space.jacobian_change(theta, [theta + share * move for share in _POINTS])
    return float(change.max() * solved.direction.norm() / residual.norm())


def run(
    space: FunctionSpace, structure: Structure, damping: float, eta: float | None = None, steps: int = 40
) -> FunctionRun:
    """theta <- theta - eta (F + lambda I)^{-1} grad L, measured.

    Args:
        space: the problem.
        structure: of F.
        damping: lambda >= 0.
        eta: step size > 0; ``None``: 1 / kappa_max at theta_0, at most 1.
        steps: at most this many; a run ends early when the error leaves [1e-26, 1e6] times its start.
    """
    require_finite_nonnegative("damping", damping)
    theta, residuals, records = space.model.initial, [], []
    residual = space.residual(theta)
    residuals.append(residual)
    for _ in range(steps):
        solved = structure.solve(space, theta, residual, damping)
        kappa = spectrum(solved.kernel)
        if eta is None:
            eta = min(1.0, 1.0 / float(kappa[-1]))
        require_interval("eta", eta, 0.0, math.inf, closed="()")
        move = -eta * solved.direction
        stability = measured_stability(space, theta, move, solved, residual)
        theta = theta + move
        following = space.residual(theta)
        predicted = solved.kernel @ residual
        values = (  # fetched from the device together
            residual.square().sum(),
            following.square().sum(),
            kappa[0],
            kappa[-1],
            solved.direction.square().sum(),
            residual @ predicted,
            (theta - space.model.initial).norm(),
            (following - residual + eta * predicted).norm() / (eta * residual.norm()),
        )
        error, next_error, low, high, squared_norm, form, distance, defect = torch.stack(values).tolist()
        records.append(StepRecord(error, next_error, low, high, stability, defect, squared_norm, form, distance, eta))
        residual = following
        residuals.append(residual)
        size = records[-1].next_error / records[0].error
        if not 1e-26 < size < 1e6:
            break
    return FunctionRun(tuple(records), tuple(residuals), damping, theta)


def certified_interval(dampings: Sequence[float], certified: Sequence[bool]) -> tuple[float, float]:
    """The longest run of neighbouring certified dampings, as (low, high); (nan, nan) if there is none."""
    best: tuple[int, int] = (0, -1)
    start = None
    for index, good in enumerate([*certified, False]):
        if good and start is None:
            start = index
        elif not good and start is not None:
            best = max(best, (start, index - 1), key=lambda pair: pair[1] - pair[0])
            start = None
    return (dampings[best[0]], dampings[best[1]]) if best[1] >= best[0] else (math.nan, math.nan)


def damping_grid(low: float, high: float, count: int) -> list[float]:
    """``count`` values from ``low`` to ``high``, both included, in equal ratios."""
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist()
