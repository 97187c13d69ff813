"""From directions to moves: gathers what the step-size rule wants to know of every layer, and asks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature.layers import Layer
from ..curvature.products import GraphKeepingBackward
from ..curvature.quadratic_forms import DirectionalEvidence
from ..curvature.statistics import LayerStatistics, Needs, Tensors
from ..stepsize.protocol import StepEvidence, StepSize
from .blocks import Block
from .momentum import Momentum, WeightDecay

__all__ = ["Move", "Proposal", "StepRule"]


@dataclass(frozen=True)
class Move:
    """One block's part of a step: theta <- theta - step_size * direction."""

    parameters: Tensors
    directions: Tensors
    step_size: float | Tensor

    def take(self, fraction: float, shrinkage: float | Tensor) -> None:
        """theta <- (1 - fraction shrinkage) theta - fraction step_size direction."""
        for parameter, direction in zip(self.parameters, self.directions, strict=True):
            if isinstance(shrinkage, Tensor) or shrinkage:
                parameter.mul_(1.0 - fraction * shrinkage)
            if isinstance(self.step_size, Tensor):
                parameter.addcmul_(direction, self.step_size, value=-fraction)
            else:
                parameter.add_(direction, alpha=-fraction * self.step_size)


@dataclass(frozen=True)
class Proposal:
    """A step that has not been taken yet: the moves of all blocks, and the step size of every layer."""

    moves: list[Move]
    step_sizes: dict[str, float | Tensor]

    def take(self, fraction: float, weight_decay: WeightDecay, value: float) -> None:
        """Take a fraction in (0, 1] of the step, decoupled weight decay first."""
        for move in self.moves:
            move.take(fraction, weight_decay.shrinkage(value, move.step_size))


class StepRule:
    """A step-size rule with its state and the layers it speaks about."""

    def __init__(self, rule: StepSize, layers: Sequence[Layer], seed: int):
        self.rule, self.layers, self.seed = rule, layers, seed
        example = next(iter(layers[0].parameters.values())).detach()
        self.state = rule.init(len(layers), example)

    def to_dict(self) -> dict[str, Any]:
        """Saved state; empty for rules without one."""
        return {} if self.state is None else dict(self.state.to_dict())

    def load_dict(self, values: dict[str, Any]) -> None:
        """Load it."""
        if self.state is not None:
            self.state.load_dict(values)

    def propose(
        self,
        step: int,
        lr: float,
        blocks: Sequence[Block],
        directions: Mapping[str, Tensors],
        momentum: Momentum,
        statistics: Mapping[str, LayerStatistics],
        products: GraphKeepingBackward | None,
    ) -> Proposal:
        """Moves of all blocks; on the CPU step sizes become plain numbers, elsewhere they stay on the device."""
        evidence = self._evidence(step, lr, blocks, directions, momentum, statistics, products)
        sizes = self.rule.propose(self.state, evidence)
        by_layer: dict[str, float | Tensor]
        if isinstance(sizes, Tensor):
            values = sizes.tolist() if sizes.device.type == "cpu" else list(sizes.unbind())
            by_layer = dict(zip(evidence.names, values, strict=True))
        else:
            by_layer = {name: float(sizes) for name in evidence.names}
        moves = [Move(block.parameters, directions[block.key], by_layer[block.layer.name]) for block in blocks]
        return Proposal(moves, by_layer)

    def _evidence(
        self,
        step: int,
        lr: float,
        blocks: Sequence[Block],
        directions: Mapping[str, Tensors],
        momentum: Momentum,
        statistics: Mapping[str, LayerStatistics],
        products: GraphKeepingBackward | None,
    ) -> StepEvidence:
        names = [layer.name for layer in self.layers]
        if not self.rule.needs:
            return StepEvidence(names, lr)
        pieces = _pieces(self.layers, blocks, directions, momentum)
        forms = None
        if self.rule.due(step) and self.rule.needs & (Needs.SCORES | Needs.BATCH_SCORES | Needs.PRODUCTS):
            layer_directions = {
                layer.name: tuple(pieces[layer.name][name][0] for name in layer.parameters) for layer in self.layers
            }
            product = products.product if products is not None else None
            generator = torch.Generator(device=pieces[names[0]][next(iter(self.layers[0].parameters))][0].device)
            generator.manual_seed(self.seed * 1_000_003 + step)
            measured = DirectionalEvidence(names, layer_directions, statistics, product, generator)
            forms = self.rule.curvature.measure(measured)  # type: ignore[attr-defined]
        flat = [list(pieces[name].values()) for name in names]
        slopes = torch.stack([_total([torch.sum(d * m) if c else d.new_zeros(()) for d, m, c in e]) for e in flat])
        norms = torch.stack([_total([d.square().sum() for d, _, _ in entries]) for entries in flat])
        parameters = torch.stack(
            [_total([p.detach().square().sum() for p in layer.parameters.values()]).sqrt() for layer in self.layers]
        )
        return StepEvidence(names, lr, slopes, norms, parameters, forms)


def _pieces(
    layers: Sequence[Layer], blocks: Sequence[Block], directions: Mapping[str, Tensors], momentum: Momentum
) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
    """Per layer and parameter: direction, momentum, factor of the momentum (0 where the parameter has no gradient)."""
    found: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {layer.name: {} for layer in layers}
    for block in blocks:
        factor = momentum.correction(block.updates)
        for name, direction, view in zip(block.names, directions[block.key], block.views, strict=True):
            found[block.layer.name][name] = (direction, view, factor)
    for layer in layers:
        for name, parameter in layer.parameters.items():
            if name not in found[layer.name]:
                zero = torch.zeros_like(parameter)
                found[layer.name][name] = (zero, zero, 0.0)
    return found


def _total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
