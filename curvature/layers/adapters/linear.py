"""``nn.Linear``, and the projections inside ``nn.MultiheadAttention``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from .forwards import keeps_forward
from .protocol import LayerAdapter, MatrixAdapter

__all__ = ["LinearAdapter", "ProjectionAdapter", "ProjectionBiasAdapter", "TensorAdapter", "TransposedLinearAdapter"]


class LinearAdapter(MatrixAdapter):
    """``nn.Linear`` on inputs (N, d_in) or (N, ..., d_in); the middle axes are positions."""

    kind = "Linear"

    def matches(self, module: nn.Module) -> bool:
        """``nn.Linear`` and subclasses that keep its forward, but for the one whose forward attention never calls."""
        uncalled = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return keeps_forward(module, nn.Linear) and not uncalled

    def batched_ndim(self, module: nn.Module) -> int:
        """Samples and outputs."""
        return 2

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Product of the middle axes."""
        return math.prod(output.shape[1:-1])

    def of_positions(self) -> LayerAdapter:
        """The expanded input is an input too."""
        return self

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``a @ weight.T + bias``; a missing direction counts as zero."""
        if weight is None:
            assert bias is not None
            return bias.expand(*value.shape[:-1], bias.shape[0]).clone()
        return functional.linear(value, weight, bias)


class TransposedLinearAdapter(LinearAdapter):
    """A module that computes ``x @ weight + bias`` with a weight (d_in, d_out), as ``Conv1D`` of transformers does."""

    def matches(self, module: nn.Module) -> bool:
        """Nothing by its class: such modules are recognised by what they compute (:mod:`..recognition`)."""
        return False

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``a @ weight + bias``; a missing direction counts as zero."""
        return super().directional(module, value, None if weight is None else weight.mT, bias)

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The transposed weight."""
        return weight.mT

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The transposed matrix."""
        return matrix.mT


class ProjectionAdapter(LinearAdapter):
    """A weight of ``nn.MultiheadAttention`` and its bias: inputs (N, S, d_in), one position per token.

    Packed projections of cross-attention are one matrix whose rows see different inputs: the tokens of query, key and
    value are positions one after another, and a token's output gradient is zero in the rows that do not see it. The sum
    over positions of g a' is then the gradient, exactly.
    """

    kind = "Attention"

    def matches(self, module: nn.Module) -> bool:
        """Nothing: these layers are made by the handler of the attention module, not found by type."""
        return False


class ProjectionBiasAdapter(ProjectionAdapter):
    """The packed bias of separate projections, whose inputs may have different widths: no inputs are kept."""

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The first feature; only its shape (N, S) matters."""
        return value[..., :1]


@dataclass(frozen=True)
class TensorAdapter(LinearAdapter):
    """A parameter alone, whatever its module does with it: a matrix of numbers, nothing of which is recorded.

    What needs the gradient of a mini-batch and no rows (Shampoo, SOAP, Muon) can serve it.

    Attributes:
        shape: of the parameter; what follows the first axis is flattened.
    """

    shape: tuple[int, ...]
    kind = "Other"

    def matches(self, module: nn.Module) -> bool:
        """Nothing: it is made for a parameter, not found for a module."""
        return False

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Everything behind the first axis in a row."""
        return weight.flatten(-(len(self.shape) - 1))

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """Rows in the shape of the parameter."""
        rows: Tensor = matrix.unflatten(-1, self.shape[1:])
        return rows
