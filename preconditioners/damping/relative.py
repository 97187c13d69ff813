"""Damping in units of what it is added to. Ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...curvature.declarations import DampingDeclarations
from .split import MeanEigenvalues, SideDamping, Split

__all__ = ["RelativeDamping"]


@dataclass(frozen=True)
class RelativeDamping(DampingDeclarations):
    """sqrt(lambda) tr A / d_a and sqrt(lambda) tr G / d_g: each Kronecker side relative to its own mean eigenvalue.

    Other units of the inputs or of the loss change the direction of a layer by a factor only. An absolute lambda is
    large where a network fits its data, because G fades with the errors, and the direction there becomes that of
    gradient descent; and it is small where the outputs are in large units. Steps along such directions must not take
    their length from them: with ``ConstantStep`` they grow without bound while G fades.

    A layer whose factor has trace zero or not finite is damped as by ``Split``; so is one without Kronecker factors.
    """

    uses_eigenvalues = True

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """(lambda, sqrt(lambda) mean eigenvalue of A, sqrt(lambda) mean eigenvalue of G)."""
        split = Split().sides(value, positions)
        if eigenvalues is None:
            return split
        pair = (eigenvalues.inputs, eigenvalues.outputs)
        if not all(math.isfinite(entry) and entry > 0.0 for entry in pair):
            return split
        inputs, outputs = (math.sqrt(value) * entry for entry in pair)
        if value and not (inputs > 0.0 and outputs > 0.0):  # below the smallest number
            return split
        return SideDamping(value, inputs, outputs)
