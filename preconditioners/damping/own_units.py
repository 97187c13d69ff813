"""Damping in units of the curvature that it damps: a dimensionless lambda."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...curvature.declarations import DampingDeclarations
from .split import MeanEigenvalues, SideDamping, Split

__all__ = ["CurvatureUnits"]


@dataclass(frozen=True)
class CurvatureUnits(DampingDeclarations):
    """lambda in units of the layer's own mean eigenvalue: lambda tr F / d on F, sqrt(lambda) tr / d per factor. Ours.

    A number that suits one loss suits it in other units too: when the loss is c times as large, F and its damping are
    c^2 times as large (for a second moment of gradients), the direction is 1 / c times the old one, and the relative
    weight of all its components stays. The published settings of Mini-Block Fisher (arXiv:2202.04124) are absolute, and
    its blocks, of products of mini-batch gradients, span many orders of magnitude between layers, problems and the two
    ends of a run.

    For two factors it is K-FAC's factored damping (arXiv:1503.05671v7, section 6.3, :class:`.Factored`) with lambda in
    units of (tr A / d_a) (tr G / d_g). A layer whose trace is zero or not finite (no gradient yet, a dead layer) is
    damped as by :class:`.Split`, by the plain lambda.
    """

    splits = True
    uses_eigenvalues = True
    uses_whole = True

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """(lambda a g, sqrt(lambda) a, sqrt(lambda) g) with the mean eigenvalues a and g; one matrix has g = 1."""
        split = Split().sides(value, positions)
        if eigenvalues is None:
            return split
        inputs, outputs = eigenvalues.inputs, eigenvalues.outputs
        whole, root = value * inputs * outputs, math.sqrt(value)
        sides = whole, root * inputs, root * outputs
        apart = inputs > 0.0 and outputs > 0.0 and all(map(math.isfinite, sides))
        if not (apart and (value == 0.0 or min(sides) > 0.0)):
            return split  # dead, not finite, or below the smallest number
        return SideDamping(*sides)
