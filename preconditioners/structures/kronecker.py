"""Kronecker-factored structure: one factor over the inputs, one over the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import FactorDeclarations, StructureDeclarations, declared, derived
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import CompatibilityError, require_positive_integer
from ..averages import Average
from ..damping.split import MeanEigenvalues, SideDamping
from ..factors.factor import Factor, IdentityFactor
from ..linalg import Computed
from ..protocol import Events, Observation, Request, ScalingLaw, Schedule, count_events
from ..state import State

__all__ = ["Kronecker", "KroneckerState", "in_layer_order", "too_long"]


@dataclass
class KroneckerState(State):
    """States of the two factors."""

    inputs: State
    outputs: State


@dataclass(frozen=True)
class Kronecker(StructureDeclarations):
    """Preconditioned momentum ``H_g [M_W | M_b] H_a`` with the bias as last column.

    ``Covariance`` on both sides is K-FAC; ``HessianActionBFGS`` inside and ``BFGS`` outside is K-BFGS; ``LBFGS``
    outside is K-BFGS(L); ``Root(4)`` on both sides is Shampoo, ``GradientCovariance`` is TNT.

    Args:
        inputs: factor over the layer's inputs (order d_in + 1 with a bias).
        outputs: factor over its outputs (order d_out).
        schedule: when statistics and inverses are renewed.
        limit: layers with a side of more than this order are declined (the method's fallback takes them, visibly):
            a matrix of order 5120, the default, is 100 MiB in float32, and a side has two or three. Kernels of 512
            channels (4609) pass, vocabularies do not. >= 1.

    Raises:
        CompatibilityError: if a factor makes no sense on its side.

    Memory: the factors'. Cost of one product with dense factors: 2 d_out d_in (d_in + d_out) flops.
    """

    inputs: Factor
    outputs: Factor
    schedule: Schedule = field(default_factory=Schedule)
    limit: int = 5120
    joint = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)
        if "inputs" not in self.inputs.sides:
            raise CompatibilityError(_wrong_side(self.inputs, "inputs"))
        if "outputs" not in self.outputs.sides:
            raise CompatibilityError(_wrong_side(self.outputs, "outputs"))

    @property  # not cached itself: pyright takes no cached property for a property of a protocol
    def needs(self) -> Needs:
        """Union over both sides."""
        return self._needs

    @cached_property
    def _needs(self) -> Needs:
        return self.inputs.needs("inputs") | self.outputs.needs("outputs")

    @cached_property
    def factors(self) -> tuple[FactorDeclarations, FactorDeclarations]:
        """Inputs and outputs with all that a factor may declare; a factor that only has the verbs is taken in here."""
        return declared(self.inputs, FactorDeclarations), declared(self.outputs, FactorDeclarations)

    @derived
    def scaling(self) -> ScalingLaw | None:
        """The product of both sides' laws; ``None`` if one side states none."""
        inner, outer = (factor.scaling for factor in self.factors)
        if inner is None or outer is None:
            return None
        (first, inputs), (second, outputs) = inner("inputs"), outer("outputs")
        return ScalingLaw(first + second, inputs=inputs, outputs=outputs)

    @derived
    def linear(self) -> bool:
        """Of both sides."""
        return all(factor.linear for factor in self.factors)

    @derived
    def definite(self) -> bool:
        """Of both sides."""
        return all(factor.definite for factor in self.factors)

    @derived
    def additive(self) -> bool:
        """Of both sides."""
        return all(factor.additive for factor in self.factors)

    @derived
    def takes_moments(self) -> Mapping[str, Any]:
        """Of the sides whose factors do."""
        return {
            side: factor.takes_moment(side)
            for side, factor in zip(("inputs", "outputs"), self.factors, strict=True)
            if factor.takes_moment is not None and "takes_moment" in factor.together
        }

    @derived
    def waits(self) -> bool:
        """Both sides."""
        return all(factor.waits for factor in self.factors)

    @derived
    def dtypes(self) -> tuple[Any, ...]:
        """Of the side that states more than the usual ones."""
        inner, outer = self.factors
        return inner.dtypes or outer.dtypes

    @derived
    def pairs(self) -> Any:
        """Of the outputs, whose pairs are gradients'; an input side has the exact action of its matrix."""
        return self.factors[1].pairs

    def numbers(self, layer: Layer) -> int | None:
        """Both sides; ``None`` if one side states none."""
        rows, columns = layer.matrix_shape
        inner, outer = (factor.numbers for factor in self.factors)
        return None if inner is None or outer is None else int(inner(columns)) + int(outer(rows))

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Weight and bias of layers that are matrices within the limit."""
        return tuple(layer.parameters) if layer.is_matrix and max(layer.matrix_shape) <= self.limit else ()

    def declines(self, layer: Layer) -> str:
        """A side beyond the limit."""
        return too_long(layer, self.limit, self.numbers(layer)) if layer.is_matrix else ""

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
        sides = zip((self.inputs, self.outputs), self.factors, strict=True)
        return tuple(type(side).__name__ for side, factor in sides if factor.mean_eigenvalue is None)

    def mean_eigenvalues(self, state: KroneckerState) -> MeanEigenvalues:
        """Of both undamped factors; one synchronisation."""
        inner, outer = (factor.mean_eigenvalue for factor in self.factors)
        assert inner is not None and outer is not None
        pair = torch.stack([inner(state.inputs), outer(state.outputs)])
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
        events: Events = {}
        count_events(events, self.outputs.observe_step(state.outputs, before, after, "outputs", damping.outputs))
        count_events(events, self.inputs.observe_step(state.inputs, before, after, "inputs", damping.inputs))
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


def too_long(layer: Layer, limit: int, numbers: int | None) -> str:
    """Why a layer with a side beyond the limit is declined, and what its state would take; empty for others.

    Args:
        layer: a layer with a matrix.
        limit: largest order of a side.
        numbers: how many numbers the state would hold; ``None``: not stated.
    """
    longest = max(layer.matrix_shape)
    if longest <= limit:
        return ""
    size = 0 if numbers is None else numbers * layer.parameters["weight"].element_size()
    taken = f", and its state would take {size / 2**20:,.0f} MiB" if size else ""
    return f"a side of {longest} is beyond limit={limit}{taken}"


def _dense(factor: Factor, state: State, damping: float, size: int, like: Tensor) -> Tensor:
    if isinstance(factor, IdentityFactor):
        return torch.eye(size, dtype=like.dtype, device=like.device)
    return factor.to_dense(state, damping)


def _wrong_side(factor: Factor, side: str) -> str:
    return (
        f"{type(factor).__name__} cannot serve the {side} of a Kronecker structure, only "
        f"{' and '.join(sorted(factor.sides))}; for the {side} use Covariance(), IdentityFactor() or "
        f"{'HessianActionBFGS()' if side == 'inputs' else 'BFGS() or LBFGS()'}"
    )
