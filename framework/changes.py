"""Parameters and their gradients at one evaluation, for structures that learn from how both change in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..curvature.layers.layer import Layer
from ..curvature.records.needs import Needs
from ..curvature.records.statistics import LayerStatistics, Tensors
from .optimizer.blocks import Block, full_precision
from .optimizer.distributed import Ranks

__all__ = ["Points", "changing_layers"]


def changing_layers(blocks: Sequence[Block]) -> list[Layer]:
    """Layers with a structure that pairs the parameters themselves."""
    found = {block.layer.name: block.layer for block in blocks if Needs.CHANGES in block.part.needs}
    return list(found.values())


@dataclass(frozen=True)
class Points:
    """Where some layers stand, in full precision.

    Attributes:
        parameters: by layer name, one per parameter.
        gradients: of the user's loss without its scale, the same; zeros for parameters that are frozen or were not
            reached.
    """

    parameters: Mapping[str, Tensors]
    gradients: Mapping[str, Tensors]

    @classmethod
    def before(cls, layers: Sequence[Layer], copies: Mapping[int, Tensor]) -> Points:
        """Ahead of the step: copies of the parameters; gradients as the optimizer steps with them, not copied.

        Args:
            layers: which.
            copies: of parameters that somebody has copied already, by their ids.
        """
        parameters = {
            layer.name: tuple(
                full_precision(copies[id(p)] if id(p) in copies else p.detach().clone())
                for p in layer.parameters.values()
            )
            for layer in layers
        }
        return cls(parameters, {layer.name: _gradients(layer) for layer in layers})

    @classmethod
    def after(cls, layers: Sequence[Layer], inverse_scale: Tensor | None, ranks: Ranks) -> Points:
        """Right after the second backward, whose gradients nobody has unscaled or exchanged. Nothing is copied."""
        found: dict[str, Tensors] = {}
        for layer in layers:
            own = _gradients(layer)
            if inverse_scale is not None:
                own = tuple(value * inverse_scale for value in own)
            found[layer.name] = tuple(ranks.mean(value) for value in own)
        parameters = {
            layer.name: tuple(full_precision(p.detach()) for p in layer.parameters.values()) for layer in layers
        }
        return cls(parameters, found)

    def into(self, records: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        """Records with the parameters and gradients of their layers; those of other layers as they are."""
        return {
            name: replace(entry, parameters=self.parameters[name], gradients=self.gradients[name])
            if name in self.parameters
            else entry
            for name, entry in records.items()
        }


def _gradients(layer: Layer) -> Tensors:
    """One per parameter, zeros where there is none."""
    return tuple(
        full_precision(p.grad if p.requires_grad and p.grad is not None else torch.zeros_like(p)).detach()
        for p in layer.parameters.values()
    )
