"""Dense structure: one matrix over all parameters of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import derived
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import Tensors
from ...errors import require_positive_integer
from ..averages import Average, MovingAverage
from ..damping.split import SideDamping
from ..linalg import Computed, add_to_diagonal
from ..operations import AbsoluteInverse, Eigenvectors, Inverse, Operation
from ..protocol import Observation, Request, ScalingLaw, Schedule
from ..state import State
from .identity import Stateless

__all__ = ["Absolute", "Dense", "DenseState", "Semidefinite", "Spectrum"]


class Spectrum(Protocol):
    """A rule for the eigenvalues of a symmetric matrix before it is inverted."""

    @property
    def operation(self) -> Operation:
        """What is computed of the undamped matrix."""

    @property
    def takes_indefinite(self) -> bool:
        """Whether negative eigenvalues make sense."""

    def damped(self, matrix: Tensor, damping: float) -> Tensor:
        """The matrix that is inverted, positive definite."""


@dataclass(frozen=True)
class Semidefinite:
    """M + damping I for positive semi-definite M (Fisher, Gauss-Newton), by Cholesky; tenfold damping on failure."""

    operation = Inverse()
    takes_indefinite = False

    def damped(self, matrix: Tensor, damping: float) -> Tensor:
        """M + damping I."""
        return add_to_diagonal(matrix, damping)


@dataclass(frozen=True)
class Absolute:
    """|M| + damping I, the absolute values of the eigenvalues: the Hessian, saddle-free (arXiv:1406.2572v1)."""

    operation = AbsoluteInverse()
    takes_indefinite = True

    def damped(self, matrix: Tensor, damping: float) -> Tensor:
        """|M| + damping I."""
        (found,) = Eigenvectors().compute([Request(matrix, damping)])
        assert found.value is not None and found.spectrum is not None
        return (found.value * (found.spectrum.abs() + damping).unsqueeze(-2)) @ found.value.mT


@dataclass
class DenseState(State):
    """Averaged matrix, undamped, and the last good inverse: (P, P) each."""

    matrix: Tensor
    inverse: Tensor
    weight: float
    replaced = frozenset(("inverse",))


@dataclass(frozen=True)
class Dense(Stateless):
    """direction = (F + lambda I)^{-1} M with F the whole matrix of one layer: weight row-major, then bias.

    With a Fisher this is the natural gradient layer by layer, with an exact Hessian and ``Absolute`` saddle-free
    Newton. For small layers, and as the truth that cheaper structures are compared with.

    Args:
        spectrum: rule for the eigenvalues.
        average: rule over steps for F.
        schedule: when statistics and inverses are renewed.
        limit: layers with more than this many parameters are declined (the method's fallback takes them, visibly).
            Default 4096: 64 MiB in float32, twice that with the inverse. >= 1.

    Memory: 2 P^2 numbers for P parameters. Cost: P^3 per inverse.
    """

    spectrum: Spectrum = field(default_factory=Semidefinite)
    average: Average = field(default_factory=lambda: MovingAverage(0.9))
    schedule: Schedule = field(default_factory=Schedule)
    limit: int = 4096

    needs = Needs.MATRIX
    scaling = ScalingLaw(2.0, whole=2.0)
    joint = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)

    @derived
    def takes_indefinite(self) -> bool:
        """As the spectrum rule says."""
        return self.spectrum.takes_indefinite

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Every parameter of a layer with statistics, within the limit."""
        size = sum(parameter.numel() for parameter in layer.parameters.values())
        return tuple(layer.parameters) if layer.adapter is not None and size <= self.limit else ()

    def declines(self, layer: Layer) -> str:
        """More parameters than the limit."""
        size = sum(parameter.numel() for parameter in layer.parameters.values())
        if layer.adapter is None or size <= self.limit:
            return ""
        taken = 2 * size**2 * next(iter(layer.parameters.values())).element_size() / 2**20
        return f"{size} parameters are beyond limit={self.limit}, and its state would take {taken:,.0f} MiB"

    def numbers(self, layer: Layer) -> int:
        """Matrix and inverse."""
        return 2 * sum(parameter.numel() for parameter in layer.parameters.values()) ** 2

    def bounds(self, state: DenseState, layer: Layer, damping: SideDamping) -> tuple[float, float]:
        """(lambda, infinity)."""
        return damping.whole, float("inf")

    def init(self, layer: Layer, parameters: Tensors) -> DenseState:
        """Zero matrix, identity inverse."""
        size, like = sum(parameter.numel() for parameter in parameters), parameters[0]
        return DenseState(like.new_zeros(size, size), torch.eye(size, dtype=like.dtype, device=like.device), 0.0)

    def update(self, state: DenseState, observation: Observation, average: Average | None = None) -> None:
        """F <- keep F + add new."""
        assert observation.statistics is not None and observation.statistics.matrix is not None
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        state.matrix.mul_(keep).add_(observation.statistics.matrix().to(state.matrix.dtype), alpha=add)

    def matrices(self, state: DenseState, damping: SideDamping) -> Sequence[Request]:
        """The matrix, damped by the whole lambda."""
        return (Request(state.matrix, damping.whole, self.spectrum.operation),)

    def install(self, state: DenseState, results: Sequence[Computed]) -> None:
        """Keep the last good inverse if the factorisation failed."""
        if results[0].value is not None:
            state.inverse = results[0].value

    def precondition(self, state: DenseState, momentum: Tensors) -> Tensors:
        """One product with the inverse."""
        product = state.inverse @ torch.cat([value.flatten() for value in momentum])
        pieces = product.split([value.numel() for value in momentum])
        return tuple(piece.reshape(value.shape) for piece, value in zip(pieces, momentum, strict=True))

    def to_dense(self, state: DenseState, layer: Layer, damping: SideDamping) -> Tensor:
        """The matrix that is inverted."""
        return self.spectrum.damped(state.matrix, damping.whole)
