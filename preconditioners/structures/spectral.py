"""Spectral normalisation: the direction is the momentum with its singular values pushed to one (Muon)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...checking import require_fields
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import Tensors
from ...errors import CompatibilityError, require_interval, require_positive_integer
from ..averages import Average
from ..damping.split import SideDamping
from ..linalg import has_bfloat16_units, newton_schulz_of_many
from ..protocol import Observation, Schedule
from ..state import State
from .identity import Stateless

__all__ = [
    "AspectRatio",
    "MatchAdam",
    "SingularValues",
    "Spectral",
    "SpectralState",
    "UpdateScale",
]


class UpdateScale(Protocol):
    """A rule from the shape of a matrix to the factor on its orthogonalised momentum."""

    def factor(self, rows: int, columns: int) -> float:
        """The factor."""


@dataclass(frozen=True)
class AspectRatio:
    """sqrt(max(1, rows / columns)): the rule of Jordan's original Muon."""

    def factor(self, rows: int, columns: int) -> float:
        """The rule."""
        return math.sqrt(max(1.0, rows / columns))


@dataclass(frozen=True)
class MatchAdam:
    """scale * sqrt(max(rows, columns)): entries as large as Adam's, so that both share one learning rate.

    Implements: arXiv:2502.16982v1, section 2.2.

    Args:
        scale: > 0, root mean square of an entry of the direction.
    """

    scale: float = 0.2

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("scale", self.scale, 0.0, float("inf"), closed="()")

    def factor(self, rows: int, columns: int) -> float:
        """The rule."""
        return self.scale * math.sqrt(max(rows, columns))


@dataclass
class SpectralState(State):
    """The layer, which knows its weight as a matrix, and the precision of the iteration; nothing is saved.

    Attributes:
        layer: whose weight it is.
        dtype: in which the products run, chosen when the optimizer is built; ``None``: the momentum's own.
    """

    layer: Layer
    dtype: torch.dtype | None = None

    def to_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def matrix(self, weight: Tensor) -> Tensor:
        """(d_out, d_in) of a tensor in the shape of the weight."""
        assert self.layer.adapter is not None
        return self.layer.adapter.weight_as_matrix(self.layer.module, weight)

    def weight(self, matrix: Tensor) -> Tensor:
        """And back."""
        assert self.layer.adapter is not None
        return self.layer.adapter.matrix_as_weight(self.layer.module, matrix)


@dataclass(frozen=True)
class Spectral(Stateless):
    """direction = scale * NewtonSchulz(M), about U V' for M = U S V': the weight of a matrix layer, flattened.

    Implements: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; ``torch.optim.Muon``). The coefficients
    make five iterations enough for singular values between about 0.7 and 1.2, not exactly 1.

    Not linear in the momentum: there is no matrix behind it, and ``to_dense`` raises. Biases are left to ``otherwise``
    or the method's fallback. Its authors keep embeddings and the output layer out as well, as the method ``muon`` does:
    ``ByLayer({"(last)": Diagonal(), "*": Spectral()}, otherwise=Diagonal())``.

    Args:
        scale: rule for the size of the direction.
        coefficients: (a, b, c) of the quintic.
        iterations: >= 1.
        epsilon: > 0, smallest Frobenius norm divided by.
        dtype: of the iteration, torch takes ``torch.bfloat16`` everywhere. ``None`` (default): chosen for each layer
            when the optimizer is built, ``bfloat16`` for float32 parameters on a device with units for it, else the
            parameters' own; the layer's state shows it.

    Memory: none. Cost: about 4 n^2 m + 2 n^3 flops per iteration for sides n <= m.
    """

    scale: UpdateScale = field(default_factory=AspectRatio)
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    iterations: int = 5
    epsilon: float = 1e-7
    dtype: torch.dtype | None = None

    needs = Needs.NOTHING
    schedule = Schedule()
    joint = False
    linear = False

    def __post_init__(self) -> None:
        require_fields(self)
        for coefficient in self.coefficients:
            require_interval("each of the coefficients", coefficient, -math.inf, math.inf, closed="()")
        require_positive_integer("iterations", self.iterations)
        require_interval("epsilon", self.epsilon, 0.0, float("inf"), closed="()")

    def numbers(self, layer: Layer) -> int:
        """None."""
        return 0

    def work(self, layer: Layer) -> float:
        """Of all iterations."""
        short, long = sorted(layer.weight_shape)
        return self.iterations * (4.0 * short**2 * long + 2.0 * short**3)

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """The weight of layers that multiply by a matrix; an embedding looks rows up, it gets the fallback."""
        looked_up = isinstance(layer.module, nn.Embedding | nn.EmbeddingBag)
        return ("weight",) if layer.is_matrix and not looked_up else ()

    def init(self, layer: Layer, parameters: Tensors) -> SpectralState:
        """Nothing gathered, ever; only the precision is chosen."""
        single = bool(parameters) and parameters[0].dtype == torch.float32
        units = single and has_bfloat16_units(parameters[0].device)
        return SpectralState(layer, self.dtype or (torch.bfloat16 if units else None))

    def update(self, state: SpectralState, observation: Observation, average: Average | None = None) -> None:
        """Nothing to learn."""

    def precondition(self, state: SpectralState, momentum: Tensors) -> Tensors:
        """The orthogonalised momentum, scaled."""
        return self.precondition_many([state], [momentum])[0]

    def precondition_many(self, states: Sequence[SpectralState], momenta: Sequence[Tensors]) -> list[Tensors]:
        """The same for many layers, the iterations of matrices of one shape in one batch."""
        matrices = [state.matrix(momentum[0]) for state, momentum in zip(states, momenta, strict=True)]
        results = list(matrices)
        for dtype in {state.dtype for state in states}:
            chosen = [index for index, state in enumerate(states) if state.dtype == dtype]
            found = newton_schulz_of_many(
                [matrices[index] for index in chosen], self.coefficients, self.iterations, self.epsilon, dtype
            )
            for index, value in zip(chosen, found, strict=True):
                results[index] = value
        scaled = [value * self.scale.factor(*value.shape) for value in results]
        return [(state.weight(value),) for state, value in zip(states, scaled, strict=True)]

    def reference(self) -> SingularValues:
        """The same direction from singular values: what compositions with this part are compared with."""
        return SingularValues(**{entry.name: getattr(self, entry.name) for entry in fields(self)})

    def to_dense(self, state: SpectralState, layer: Layer, damping: SideDamping) -> Tensor:
        """There is none.

        Raises:
            CompatibilityError: always; structures with ``linear = False`` have no matrix.
        """
        raise CompatibilityError(
            "Spectral is not linear in the momentum, so no curvature matrix stands behind it; a linear relative is "
            "Kronecker(Root(4), Root(4)) with NoMomentum()"
        )


@dataclass(frozen=True)
class SingularValues(Spectral):
    """The slow reference: the polynomial applied to every singular value of a decomposition in double precision."""

    def precondition(self, state: SpectralState, momentum: Tensors) -> Tensors:
        """The orthogonalised momentum, scaled."""
        (value,) = momentum
        matrix = state.matrix(value).double()
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values = values / values.norm().clamp(min=self.epsilon)
        a, b, c = self.coefficients
        for _ in range(self.iterations):
            values = a * values + b * values**3 + c * values**5
        result = self.scale.factor(*matrix.shape) * (left * values) @ right
        return (state.weight(result.to(value.dtype)),)
