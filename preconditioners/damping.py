"""Additive damping: how the one number lambda of the method reaches the matrices that are inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ..errors import require_finite_nonnegative

__all__ = ["ConstantDamping", "Damping", "SideDamping", "Split"]


@dataclass(frozen=True)
class SideDamping:
    """Damping of one layer: ``whole`` for a matrix over the layer, ``inputs`` / ``outputs`` for Kronecker factors."""

    whole: float
    inputs: float
    outputs: float


class Damping(Protocol):
    """A rule from lambda >= 0 and the number S >= 1 of shared positions to the damping of each matrix.

    Optional: ``splits = True`` promises that the dampings of the two sides multiply to that of the whole.
    """

    def sides(self, value: float, positions: int) -> SideDamping:
        """Damping of a layer with ``positions`` shared positions."""


@dataclass(frozen=True)
class ConstantDamping:
    """lambda on every matrix that is inverted."""

    def sides(self, value: float, positions: int) -> SideDamping:
        """(lambda, lambda, lambda)."""
        require_finite_nonnegative("damping", value)
        return SideDamping(value, value, value)


@dataclass(frozen=True)
class Split:
    """sqrt(lambda) per Kronecker side, sqrt(lambda S) and sqrt(lambda / S) for S positions (PAPERS 1.2 and 1.6).

    The product of the sides is lambda in both cases; for a convolution A sums over positions, so its damping does too.
    """

    splits = True

    def sides(self, value: float, positions: int) -> SideDamping:
        """(lambda, sqrt(lambda S), sqrt(lambda / S))."""
        require_finite_nonnegative("damping", value)
        return SideDamping(value, math.sqrt(value * positions), math.sqrt(value / positions))
