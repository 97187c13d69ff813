"""Kronecker-factored structure: one factor over the inputs, one over the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import FactorDeclarations, declared
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import CompatibilityError, require_positive_integer
from ..averages import Average
from ..damping.split import MeanEigenvalues, SideDamping
from ..factors.factor import Factor, IdentityFactor, Side
from ..linalg import Computed
from ..protocol import Events, Observation, Request, ScalingLaw, Schedule
from ..state import State

__all__ = ["Kronecker", "KroneckerState", "in_layer_order"]


@dataclass
class KroneckerState(State):
    """States of the two factors."""

    inputs: State
    outputs: State


@dataclass(frozen=True)
class Kronecker:
    """Preconditioned momentum ``H_g [M_W | M_b] H_a`` with the bias as last column.

    ``Covariance`` on both sides is K-FAC; ``HessianActionBFGS`` inside and ``BFGS`` outside is K-BFGS; ``LBFGS``
    outside is K-BFGS(L); ``Root(4)`` on both sides is Shampoo, ``GradientCovariance`` is TNT.

    Args:
        inputs: factor over the layer's inputs (order d_in + 1 with a bias).
        outputs: factor over its outputs (order d_out).
        schedule: when statistics and inverses are renewed.
        limit: layers with a side of more than this order are declined (the method's fallback takes them, visibly):
            a matrix of order 8192, the default, is 256 MiB in float32. >= 1.

    Raises:
        CompatibilityError: if a factor makes no sense on its side.

    Memory: the factors'. Cost of one product with dense factors: 2 d_out d_in (d_in + d_out) flops.
    """

    inputs: Factor
    outputs: Factor
    schedule: Schedule = field(default_factory=Schedule)
    limit: int = 8192
    joint = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)
        if "inputs" not in self.inputs.sides:
            raise CompatibilityError(_wrong_side(self.inputs, "inputs"))
        if "outputs" not in self.outputs.sides:
            raise CompatibilityError(_wrong_side(self.outputs, "outputs"))

    @cached_property
    def needs(self) -> Needs:
        """Union over both sides."""
        return self.inputs.needs("inputs") | self.outputs.needs("outputs")

    @property
    def scaling(self) -> ScalingLaw | None:
        """The product of both sides' laws; ``None`` if one side states none."""
        inner, outer = _law(self.inputs, "inputs"), _law(self.outputs, "outputs")
        if inner is None or outer is None:
            return None
        return ScalingLaw(inner[0] + outer[0], inputs=inner[1], outputs=outer[1])

    @property
    def linear(self) -> bool:
        """Of both sides."""
        return all(declared(side, FactorDeclarations).linear for side in (self.inputs, self.outputs))

    @property
    def definite(self) -> bool:
        """Of both sides."""
        return all(declared(side, FactorDeclarations).definite for side in (self.inputs, self.outputs))

    @property
    def additive(self) -> bool:
        """Of both sides."""
        return all(declared(side, FactorDeclarations).additive for side in (self.inputs, self.outputs))

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """Of the side that states more than the usual ones."""
        sides = (self.inputs, self.outputs)
        return next((found for side in sides if (found := declared(side, FactorDeclarations).dtypes)), ())

    def numbers(self, layer: Layer) -> int | None:
        """Both sides; ``None`` if one side states none."""
        rows, columns = layer.matrix_shape
        found = [declared(side, FactorDeclarations).numbers for side in (self.inputs, self.outputs)]
        counts = [int(number(size)) for number, size in zip(found, (columns, rows), strict=True) if number is not None]
        return sum(counts) if len(counts) == 2 else None

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Weight and bias of layers that are matrices within the limit."""
        return tuple(layer.parameters) if layer.is_matrix and max(layer.matrix_shape) <= self.limit else ()

    def init(self, layer: Layer, parameters: Tensors) -> KroneckerState:
        """Fresh states of both sides."""
        rows, columns = layer.matrix_shape
        return KroneckerState(self.inputs.init(columns, parameters[0]), self.outputs.init(rows, parameters[0]))

    def update(self, state: KroneckerState, observation: Observation, average: Average | None = None) -> None:
        """Both sides."""
        if not self.needs:
            return
        assert observation.statistics is not None
        self.inputs.update(state.inputs, observation.statistics, "inputs", average)
        self.outputs.update(state.outputs, observation.statistics, "outputs", average)

    def without_eigenvalues(self) -> tuple[str, ...]:
        """Names of the factors that cannot tell their mean eigenvalue, which ``Factored`` damping needs of both."""
        factors = (self.inputs, self.outputs)
        return tuple(type(factor).__name__ for factor in factors if not hasattr(factor, "mean_eigenvalue"))

    def mean_eigenvalues(self, state: KroneckerState) -> MeanEigenvalues:
        """Of both undamped factors; one synchronisation."""
        inner: Any = self.inputs
        outer: Any = self.outputs
        pair = torch.stack([inner.mean_eigenvalue(state.inputs), outer.mean_eigenvalue(state.outputs)])
        return MeanEigenvalues(*pair.tolist())

    def matrices(self, state: KroneckerState, damping: SideDamping) -> Sequence[Request]:
        """Inputs first."""
        inner = [Request(m, damping.inputs, self.inputs.operation) for m in self.inputs.matrices(state.inputs)]
        outer = [Request(m, damping.outputs, self.outputs.operation) for m in self.outputs.matrices(state.outputs)]
        return inner + outer

    def install(self, state: KroneckerState, results: Sequence[Computed]) -> None:
        """Inputs first."""
        count = len(self.inputs.matrices(state.inputs))
        self.inputs.install(state.inputs, results[:count])
        self.outputs.install(state.outputs, results[count:])

    def precondition(self, state: KroneckerState, momentum: Tensors) -> Tensors:
        """H_g M H_a."""
        (matrix,) = momentum
        return (self.outputs.left(state.outputs, self.inputs.right(state.inputs, matrix)),)

    def observe_step(
        self, state: KroneckerState, before: LayerStatistics, after: LayerStatistics | None, damping: SideDamping
    ) -> Events:
        """Both sides; counts of the same event are summed."""
        events: Events = dict(self.outputs.observe_step(state.outputs, before, after, "outputs", damping.outputs))
        inner = self.inputs.observe_step(state.inputs, before, after, "inputs", damping.inputs)
        for name, count in inner.items():
            events[name] = events[name].long() + count.long() if name in events else count
        return events

    def to_dense(self, state: KroneckerState, layer: Layer, damping: SideDamping) -> Tensor:
        """Inverse of H_g (x) H_a as a matrix over (weight row-major, then bias)."""
        rows, columns = layer.matrix_shape
        weight = layer.parameters["weight"].detach()
        inner = _dense(self.inputs, state.inputs, damping.inputs, columns, weight)
        outer = _dense(self.outputs, state.outputs, damping.outputs, rows, weight)
        inner, outer = (torch.cholesky_inverse(torch.linalg.cholesky(side)) for side in (inner, outer))
        return in_layer_order(layer, torch.kron(outer, inner))


def in_layer_order(layer: Layer, dense: Tensor) -> Tensor:
    """A matrix over [W | b] row by row as one over the parameters' own entries (weight, then bias)."""
    order = layer.entries().to(dense.device)
    return dense[order][:, order]


def _dense(factor: Factor, state: State, damping: float, size: int, like: Tensor) -> Tensor:
    if isinstance(factor, IdentityFactor):
        return torch.eye(size, dtype=like.dtype, device=like.device)
    return factor.to_dense(state, damping)


def _law(factor: Factor, side: Side) -> tuple[float, float] | None:
    law = declared(factor, FactorDeclarations).scaling
    return None if law is None else law(side)


def _wrong_side(factor: Factor, side: str) -> str:
    return (
        f"{type(factor).__name__} cannot serve the {side} of a Kronecker structure, only "
        f"{' and '.join(sorted(factor.sides))}; for the {side} use Covariance(), IdentityFactor() or "
        f"{'HessianActionBFGS()' if side == 'inputs' else 'BFGS() or LBFGS()'}"
    )
