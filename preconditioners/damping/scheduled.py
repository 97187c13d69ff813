"""Damping that follows a schedule: lambda as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ...checking import require_fields
from ...errors import ArgumentError, require_interval
from .split import ChangesLambda, ConstantDamping, Damping, MeanEigenvalues, SideDamping

__all__ = ["Geometric", "Scheduled", "ScheduledDamping"]


@runtime_checkable
class ScheduledDamping(Protocol):
    """A damping rule that knows the number of the step."""

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """As every damping rule, from the lambda of the step."""

    def at(self, value: float, step: int) -> float:
        """lambda of step ``step`` (counted from 0) from the lambda of the parameter group, which stays as it is."""


@dataclass(frozen=True)
class Geometric:
    """max(rate^k, lowest): what :class:`Scheduled` multiplies lambda by at step k = 0, 1, ...

    Args:
        rate: > 0, finite; below 1 damping falls, above 1 it rises without bound.
        lowest: in [0, 1], the factor never falls below it.
    """

    rate: float = 0.999
    lowest: float = 0.01

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("rate", self.rate, 0.0, math.inf, closed="()")
        require_interval("lowest", self.lowest, 0.0, 1.0, closed="[]")

    def __call__(self, step: int) -> float:
        """The factor of one step."""
        return max(float(self.rate**step), self.lowest)


@dataclass(frozen=True)
class Scheduled(ChangesLambda):
    """lambda_k = factor(k) lambda, split over the matrices by another rule. Ours.

    lambda itself stays in the parameter groups, where users and torch's schedulers write; ``optimizer.damping`` and the
    step reports show lambda_k. A rule of secant pairs that bounds lambda (double damping: below 1) is asked about
    lambda_k before every step.

    Args:
        inner: how lambda_k is split over the matrices.
        factor: from the step k >= 0 to a finite number >= 0; any function, e.g. ``lambda k: 0.1 if k > 500 else 1.0``.
            A function is no part of a saved state, and only one with a name can be pickled.

    Raises:
        ArgumentError: if ``inner`` adapts or schedules lambda itself.
    """

    inner: Damping = field(default_factory=ConstantDamping)
    factor: Callable[[int], float] = field(default_factory=Geometric)

    scheduled = True

    def __post_init__(self) -> None:
        require_fields(self)
        self._require_splitting("change")

    def at(self, value: float, step: int) -> float:
        """factor(k) lambda.

        Raises:
            ArgumentError: if the factor is no finite number >= 0.
        """
        factor = self.factor(step)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0.0 <= factor < math.inf:
            raise ArgumentError(f"factor of Scheduled must return a finite number >= 0, got {factor!r} at step {step}")
        return factor * value
