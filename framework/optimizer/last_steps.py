"""The layers' last steps, for step-size rules that go along them too (``recalls``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...curvature.layers.layer import Layer
from ...curvature.quadratic_forms import DirectionalEvidence
from ...curvature.records.statistics import LayerStatistics, Tensors
from .blocks import zeros_of

__all__ = ["LastSteps", "name_of_last", "placed", "with_last_steps"]


class LastSteps:
    """What every parameter moved by when it last moved, up to a factor: alpha d + beta p, without weight decay.

    Zero before the first step. A parameter that sits a step out (frozen, no gradient, a step that a guard refuses)
    keeps its own; a step that a guard shortens has the same direction.

    Args:
        layers: whose parameters.

    Memory: one copy of the parameters; half precision is kept as float32.
    """

    def __init__(self, layers: Sequence[Layer]):
        self.values: dict[str, dict[str, Tensor]] = {}
        self.grow(layers)

    def grow(self, layers: Sequence[Layer]) -> None:
        """Zeros for layers that are not there yet."""
        for layer in layers:
            if layer.name not in self.values:
                self.values[layer.name] = {name: zeros_of(parameter) for name, parameter in layer.parameters.items()}

    def of(self, layer: str, names: Sequence[str]) -> Tensors:
        """Of some parameters of a layer; not a copy."""
        return tuple(self.values[layer][name] for name in names)

    def along(self, layer: Layer, name: str, served: bool) -> Tensor:
        """Of one parameter, zero where it cannot move: it is frozen, or nobody serves it in this step."""
        value = self.values[layer.name][name]
        return value if served and layer.parameters[name].requires_grad else torch.zeros_like(value)

    def to_dict(self) -> dict[str, Any]:
        """By layer and parameter."""
        return {layer: dict(values) for layer, values in self.values.items()}

    def load_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy saved ones into place."""
        for layer, values in self.values.items():
            for name, value in values.items():
                value.copy_(saved[layer][name])


def name_of_last(layer: str) -> str:
    """Name of a layer's last step among the directions."""
    return f"{layer} (last step)"


def with_last_steps(evidence: DirectionalEvidence) -> DirectionalEvidence:
    """Evidence in which statistics and products, known by layer, are found under the names of last steps too.

    Args:
        evidence: L layers' names, statistics and product; directions of the layers and of their last steps.
    """
    layers = list(evidence.names)
    both = {name: (name, name_of_last(name)) for name in layers}
    statistics: dict[str, LayerStatistics] = {
        key: evidence.statistics[name] for name in layers if name in evidence.statistics for key in both[name]
    }
    product = evidence.hessian_product

    def doubled(directions: Mapping[str, Tensors]) -> dict[str, Tensors]:
        assert product is not None
        total = {
            name: tuple(new + last for new, last in zip(directions[one], directions[two], strict=True))
            for name, (one, two) in both.items()
        }
        found = product(total)
        return {key: found[name] for name in layers for key in both[name]}

    return DirectionalEvidence(
        [*layers, *map(name_of_last, layers)],
        evidence.directions,
        statistics,
        None if product is None else doubled,
        evidence.generator,
        evidence.share,
        evidence.samples,
        evidence.total,
    )


def placed(old: Tensor, fresh: Tensor, before: int, after: int) -> None:
    """Write a state of ``before`` layers into one of ``after`` layers; new layers stand behind the others.

    An axis has one entry per layer, or two: those of the directions, then those of the last steps.

    Args:
        old: what was gathered; an axis of any other length stays as it is.
        fresh: changed in place.
        before: number of layers.
        after: number of layers, >= before.
    """
    axes: list[Tensor] = []
    for size, wanted in zip(old.shape, fresh.shape, strict=True):
        places = torch.arange(size, device=fresh.device)
        if (size, wanted) == (2 * before, 2 * after):
            places = torch.where(places < before, places, places + after - before)
        axes.append(places)
    fresh[torch.meshgrid(*axes, indexing="ij")] = old
