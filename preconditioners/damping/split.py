"""Additive damping: how the one number lambda of the method reaches the matrices that are inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from ...curvature.declarations import DampingDeclarations, declared
from ...errors import ArgumentError, require_finite_nonnegative

__all__ = [
    "ChangesLambda",
    "ConstantDamping",
    "Damping",
    "Factored",
    "MeanEigenvalues",
    "SideDamping",
    "Split",
    "TwoSided",
]


@dataclass(frozen=True)
class SideDamping:
    """Damping of one layer: ``whole`` for a matrix over the layer, ``inputs`` / ``outputs`` for Kronecker factors.

    Raises:
        ArgumentError: if one is not a finite number >= 0.
    """

    whole: float
    inputs: float
    outputs: float

    def __post_init__(self) -> None:
        for entry in fields(self):
            require_finite_nonnegative(f"damping ({entry.name})", getattr(self, entry.name))


@dataclass(frozen=True)
class MeanEigenvalues:
    """tr A / d_a and tr G / d_g of the undamped Kronecker factors of one layer, each >= 0 where it is finite.

    Of a structure with one matrix F over the layer: tr F / d as ``inputs``, 1 as ``outputs``.
    """

    inputs: float
    outputs: float


@runtime_checkable
class TwoSided(Protocol):
    """A structure that may have two factors whose mean eigenvalues a damping rule can balance."""

    def without_eigenvalues(self) -> tuple[str, ...] | None:
        """Names of the factors that cannot tell theirs; ``None`` for a structure without factors."""

    def mean_eigenvalues(self, state: Any) -> MeanEigenvalues:
        """Of both undamped factors; one synchronisation."""


class Damping(Protocol):
    """A rule from lambda >= 0 and what is known of a layer to the damping of each matrix.

    A rule that wants the mean eigenvalues declares ``uses_eigenvalues = True``; to others they are not given. They cost
    one synchronisation per layer whenever inverses are due, or secant pairs are damped. One that wants the mean
    eigenvalue of a structure's single matrix declares ``uses_whole = True`` besides; these cost one synchronisation of
    all layers together. It may declare more: :class:`.DampingDeclarations`.
    """

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """Damping of a layer.

        Args:
            value: lambda, finite, >= 0.
            positions: S >= 1 shared positions.
            eigenvalues: of the layer's Kronecker factors, or of its one matrix; ``None`` where neither is known.
        """


class ChangesLambda(DampingDeclarations, forwards="inner"):
    """A rule that changes lambda, and leaves it to another one, in its field ``inner``, to split it."""

    inner: Damping

    def _require_splitting(self, verb: str) -> None:
        """Check that the inner rule does not change lambda too."""
        inner = declared(self.inner, DampingDeclarations)
        if inner.adapts or inner.scheduled:
            raise ArgumentError(
                f"{type(self).__name__}(inner={type(self.inner).__name__}(...)) would {verb} lambda twice; inner only "
                "splits it: ConstantDamping(), Split() or Factored()"
            )

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """As the inner rule, from the lambda of the step."""
        if eigenvalues is None:
            return self.inner.sides(value, positions)
        return self.inner.sides(value, positions, eigenvalues)


@dataclass(frozen=True)
class ConstantDamping(DampingDeclarations):
    """lambda on every matrix that is inverted."""

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """(lambda, lambda, lambda)."""
        require_finite_nonnegative("damping", value)
        return SideDamping(value, value, value)


@dataclass(frozen=True)
class Split(DampingDeclarations):
    """sqrt(lambda) per Kronecker side, sqrt(lambda S) and sqrt(lambda / S) for S positions (PAPERS 1.2 and 1.6).

    The product of the sides is lambda in both cases; for a convolution A sums over positions, so its damping does too.
    """

    splits = True

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """(lambda, sqrt(lambda S), sqrt(lambda / S))."""
        require_finite_nonnegative("damping", value)
        return SideDamping(value, math.sqrt(value * positions), math.sqrt(value / positions))


@dataclass(frozen=True)
class Factored(DampingDeclarations):
    """pi sqrt(lambda) and sqrt(lambda) / pi, pi^2 = (tr A / d_a) / (tr G / d_g): K-FAC's factored Tikhonov damping.

    Implements: arXiv:1503.05671v7, section 6.3, with the trace norm. Of all splits with the same product it makes the
    cross terms of (A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I) equally large in trace. Where A sums over S
    positions, so does its trace, so that pi contains the sqrt(S) that ``Split`` puts in by hand.

    A layer whose factor has trace zero or not finite (no gradient yet, a dead layer) is damped as by ``Split``; so is
    one without Kronecker factors, whose matrix gets the whole lambda.
    """

    splits = True
    uses_eigenvalues = True

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """(lambda, pi sqrt(lambda), sqrt(lambda) / pi)."""
        split = Split().sides(value, positions)
        if eigenvalues is None:
            return split
        pair = (eigenvalues.inputs, eigenvalues.outputs)
        if not all(math.isfinite(entry) and entry > 0.0 for entry in pair):
            return split
        pi = math.sqrt(pair[0]) / math.sqrt(pair[1])
        return SideDamping(value, pi * math.sqrt(value), math.sqrt(value) / pi)
