"""The ``residuals`` backend: the curvature of a loss that is a sum over residuals, J'WJ, nothing sampled.

``step`` is given a function that returns residuals by name. Their Jacobian, row by row, stands in the same record as
what other backends measure: one vector per residual, whose outer products add up to the Gauss-Newton matrix of the
loss. Sampled labels have nothing to add to it; where a method asks for them, it gets the exact rows. Only their mean,
the one gradient that ``SampledBatchMean`` and ``SampledBatchScores`` ask for, needs random signs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ArgumentError, CompatibilityError
from ..layers.layer import Layer
from ..records.needs import Record
from ..records.statistics import LayerStatistics, SampleGradients
from ..residuals.jacobian import Jacobian, JacobianReader, Uses
from ..residuals.rows import RowsLayer
from .backend import Backend
from .sampling import seeded_generator

__all__ = ["ResidualBackend"]

_ROWS = Record.GRADIENTS | Record.SAMPLED | Record.CURVATURE_ROOTS


class ResidualBackend(Backend):
    """See the module. Costs one backward pass per component of the residuals; memory one gradient per residual."""

    name: ClassVar[str] = "residuals"
    takes_residuals: ClassVar[bool] = True
    rows_of: frozenset[str] = frozenset()
    """Layers whose structures want rows of their products, and not only whole gradients; the optimizer says which."""

    def _forget(self) -> None:
        self._found: Jacobian | None = None
        self._again: tuple[int, dict[int, Uses]] | None = None
        self._asked: Mapping[str, Record] = {}

    def _attach(self) -> list[Any]:
        named = {id(value): name for name, value in self.model.named_parameters()}
        parameters = [value for layer in self.layers for value in layer.parameters.values()]
        self._places = {id(value): place for place, value in enumerate(parameters)}
        self.reader = JacobianReader(parameters, [named[id(value)] for value in parameters])
        return []

    def closure(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The user's function of residuals as one that evaluates the loss and fills ``.grad``."""
        return lambda: self._run(function)

    def _run(self, function: Callable[[], Any]) -> Tensor:
        parameters, self.reader.keeps_data = self.reader.parameters, self.data is not None
        with torch.enable_grad():
            if self._kind == "gradient":
                places = [
                    self._places[id(layer.parameters["weight"])] for layer in self.layers if self._wants_rows(layer)
                ]
                look = self.step < 3 or self.step % 100 == 0
                found = self.reader.evaluate(function, look=look, uses=places)
                self._keep_data()
                self._found, self._asked = found, self._wanted
                loss, gradients = found.loss, found.gradients()
            else:
                moving = [value for value in parameters if value.requires_grad]
                value, count, uses = self.reader.look_back(function, self._paired())
                self._again = count, uses
                self._keep_data()
                given = torch.autograd.grad(value, moving, allow_unused=True) if moving and value.requires_grad else ()
                by_id = {id(p): g for p, g in zip(moving, given, strict=False)}
                loss = value.detach()
                for parameter in parameters:
                    parameter.grad = by_id.get(id(parameter))
                return loss
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype) if parameter.requires_grad else None
        return loss

    def _keep_data(self) -> None:
        """What was evaluated, for those who compare it with a second evaluation."""
        if self.data is not None:
            self.data.append(self.reader.given)
            self.reader.given = ()

    def _paired(self) -> list[int]:
        """Places of weights whose means are compared before and after a step."""
        layers = [layer for layer in self.layers if Record.MEANS in self._wanted.get(layer.name, Record.NOTHING)]
        return [self._places[id(layer.parameters["weight"])] for layer in layers if layer.is_matrix]

    def _wants_rows(self, layer: Layer) -> bool:
        """Whether a structure wants rows of the layer's products (Kronecker factors)."""
        asked = self._wanted.get(layer.name, Record.NOTHING)
        rows = bool(asked & _ROWS) or Record.MEANS in asked
        return rows and layer.name in self.rows_of and layer.is_matrix

    def collect(self) -> dict[str, LayerStatistics]:
        """The record of each layer."""
        found, asked, again = self._found, self._asked, self._again
        self._found, self._again = None, None
        if found is None and again is not None:
            count, uses = again
            plain = {
                layer.name: LayerStatistics(layer, count, 1) for layer in self.layers if layer.name in self._wanted
            }
            return {name: self._with_means(entry, uses.get(self._weight(entry.layer))) for name, entry in plain.items()}
        if found is None:
            return {}
        generator = seeded_generator(self.seed * 1_000_003 + self.step, found.values.device)
        signs = torch.randint(0, 2, found.values.shape, generator=generator, device=found.values.device)
        signs = (2 * signs - 1).to(found.values.dtype)
        return {
            layer.name: self._record(layer, asked[layer.name], found, signs)
            for layer in self.layers
            if asked.get(layer.name, Record.NOTHING)
        }

    def _record(self, layer: Layer, asked: Record, found: Jacobian, signs: Tensor) -> LayerStatistics:
        """Of one layer.

        Args:
            layer: the layer.
            asked: of it.
            found: of the mini-batch.
            signs: (V,) random, the same for all layers: a mean of rows with random signs is to the Gauss-Newton matrix
                what the mean gradient for sampled labels is to the Fisher matrix, V E[g g'] = J'WJ; without them every
                pair of residuals would count.
        """
        places = [self._places[id(value)] for value in layer.parameters.values()]
        count = len(found.values)
        roots = (count * found.curvatures).sqrt()
        exact = tuple(_times(roots, found.rows[place]) for place in places)
        per_loss = tuple(_times(found.slopes, found.rows[place]) for place in places)
        gradients = SampleGradients(per_loss, exact, tuple(value.unsqueeze(1) for value in exact))
        record = LayerStatistics(layer, count, 1, float(count), sample_gradients=gradients)
        if Record.SAMPLED_PARAMETERS in asked:
            record = record.with_fields(
                sampled_parameter_gradients=tuple(_times(signs, value).mean(0) for value in exact)
            )
        uses = found.uses.get(self._weight(layer))
        if uses is None:
            return record
        if Record.GRADIENTS in asked:
            raise CompatibilityError(
                f"layer {layer.name!r}: Kronecker factors of residuals are those of their Gauss-Newton matrix; take "
                "curvature=ExactGGN() or SampledFisher() in the place of the empirical Fisher matrix"
            )
        if not uses.complete:
            reasons = [
                f"block {name!r} is differentiated row by row: {why}" for name, why in self.reader.coupled.items()
            ]
            raise CompatibilityError(
                f"layer {layer.name!r}: Kronecker factors need every product with its weight, row by row, and "
                + (
                    f"{'; '.join(reasons)}. Take a structure "
                    if reasons
                    else "the residuals contain derivatives of the network by torch.autograd.grad, whose backward "
                    "passes multiply with it again. Compute them with osculate.derivatives(model, x), which carries "
                    "them forward through layers, or take a structure "
                )
                + "that needs whole gradients: Dense(), MiniBlock(), Diagonal(), or build('lm')"
            )
        width = layer.matrix_shape[1]
        seen = RowsLayer.of(layer)
        if Record.MEANS in asked:
            record = self._with_means(record, uses)
        return record.with_fields(
            layer=seen,
            samples=count,
            row_count=len(uses.outputs),
            inputs=uses.inputs[:, :width] * (count / found.points) ** 0.5,
            sampled_gradient=uses.outputs * count**0.5,
            curvature_roots=(uses.outputs * count**0.5).unsqueeze(1),
            ragged=True,
        )

    def _weight(self, layer: Layer) -> int:
        """The place of its weight among the parameters; -1 if it has none."""
        return self._places.get(id(layer.parameters.get("weight")), -1)

    @staticmethod
    def _with_means(record: LayerStatistics, uses: Uses | None) -> LayerStatistics:
        """The record with the mean product of a weight and the mean derivative of a residual's share of the loss."""
        if uses is None or not uses.rows:
            return record
        gradient = uses.gradient * (record.samples / uses.rows)
        return record.with_fields(mean_preactivation=uses.preactivation, mean_gradient=gradient)

    def finish_forward(self, loss: Tensor | None) -> None:
        """Warm starts have no residuals.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("backend='residuals' measures inside step(residuals) only: leave warm_start out")

    def discard_complete(self) -> None:
        """Nothing is recorded before ``step``."""

    def complete_passes(self) -> list[Any]:
        """None."""
        return []

    def forget_passes(self, entries: list[Any]) -> None:
        """None."""

    def extended(self, layers: Any) -> Any:
        """A backend for more layers."""
        result = super().extended(layers)
        result.rows_of = self.rows_of
        return result


def _times(factors: Tensor, rows: Tensor) -> Tensor:
    return rows * factors.reshape(-1, *[1] * (rows.ndim - 1))
