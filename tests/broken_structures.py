"""Structures that break one promise each, for the test that every contract can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from osculate.curvature import Layer, LayerStatistics, Needs
from osculate.preconditioners import MiniBlock, Observation, ScalingLaw, Schedule, SideDamping, State
from osculate.preconditioners.structures.identity import Stateless
from torch import Tensor

RIDGE = 0.3
Tensors = tuple[Tensor, ...]


@dataclass
class SquaresState(State):
    """Averaged squares per parameter."""

    squares: Tensors


@dataclass(frozen=True)
class Squares(Stateless):
    """Honest: direction = momentum / (mean of the samples' squared gradients + 0.3), averaged over steps."""

    needs = Needs.VECTORS
    schedule = Schedule()
    joint = False
    scaling = ScalingLaw(2.0, offset=RIDGE)

    def serves(self, layer: Layer) -> tuple[str, ...]:
        return tuple(layer.parameters) if layer.adapter is not None else ()

    def numbers(self, layer: Layer) -> int:
        return sum(parameter.numel() for parameter in layer.parameters.values())

    def init(self, layer: Layer, parameters: Tensors) -> SquaresState:
        return SquaresState(tuple(torch.zeros_like(parameter) for parameter in parameters))

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        assert statistics.vectors is not None
        return [value.square().mean(0) for value in statistics.vectors()]

    def update(self, state: SquaresState, observation: Observation, average: Any = None) -> None:
        assert observation.statistics is not None
        for old, new in zip(state.squares, self.moment(observation.statistics), strict=True):
            old.mul_(0.5).add_(new, alpha=0.5)

    def scales(self, state: SquaresState) -> list[Tensor]:
        return [value + RIDGE for value in state.squares]

    def precondition(self, state: SquaresState, momentum: Tensors) -> Tensors:
        return tuple(value / scale for value, scale in zip(momentum, self.scales(state), strict=True))

    def to_dense(self, state: SquaresState, layer: Layer, damping: SideDamping) -> Tensor:
        return torch.diag(torch.cat([scale.flatten() for scale in self.scales(state)]))


class WrongSolve(Squares):
    """Directions half as long again as the matrix says."""

    def precondition(self, state: SquaresState, momentum: Tensors) -> Tensors:
        return tuple(1.5 * value for value in super().precondition(state, momentum))


class Indefinite(Squares):
    """Consistent, but uphill."""

    scaling = ScalingLaw(2.0, offset=-RIDGE)

    def scales(self, state: SquaresState) -> list[Tensor]:
        return [-value for value in super().scales(state)]


class IndefiniteWhereRepeated(Squares):
    """As it should be, unless a parameter has the same gradient in every sample."""

    def init(self, layer: Layer, parameters: Tensors) -> SquaresState:
        state = super().init(layer, parameters)
        state.repeated = [torch.zeros_like(parameter, dtype=torch.bool) for parameter in parameters]  # type: ignore[attr-defined]
        return state

    def update(self, state: SquaresState, observation: Observation, average: Any = None) -> None:
        super().update(state, observation, average)
        assert observation.statistics is not None and observation.statistics.vectors is not None
        spread = [value.std(0, correction=0) for value in observation.statistics.vectors()]
        state.repeated = [value < 1e-12 for value in spread]  # type: ignore[attr-defined]

    def scales(self, state: SquaresState) -> list[Tensor]:
        flags: list[Tensor] = state.repeated  # type: ignore[attr-defined]
        return [torch.where(flag, -value, value) for flag, value in zip(flags, super().scales(state), strict=True)]


class Flattened(Squares):
    """Directions as vectors, whatever shape the momentum had."""

    def precondition(self, state: SquaresState, momentum: Tensors) -> Tensors:
        return tuple(value.flatten() for value in super().precondition(state, momentum))


class StoresNothing(MiniBlock):
    """Installs what there is, and where there is nothing an inverse of NaNs."""

    def install(self, state: Any, results: Any) -> None:
        super().install(state, results)
        if any(result.value is None for result in results):
            state.inverse = torch.full_like(state.inverse, torch.nan)


class WrongBounds(Squares):
    """States a spectrum that it does not have."""

    def bounds(self, state: SquaresState, layer: Layer, damping: SideDamping) -> tuple[float, float]:
        return 10.0 * RIDGE, float("inf")


class Impure(Squares):
    """Writes into the momentum once the direction is there."""

    def precondition(self, state: SquaresState, momentum: Tensors) -> Tensors:
        result = super().precondition(state, momentum)
        momentum[0].mul_(2.0)
        return result


class Forgetful(Squares):
    """Counts its updates where no dictionary finds the count."""

    def update(self, state: SquaresState, observation: Observation, average: Any = None) -> None:
        super().update(state, observation, average)
        state.seen = getattr(state, "seen", 0) + 1  # type: ignore[attr-defined]

    def scales(self, state: SquaresState) -> list[Tensor]:
        return [value * (1 + getattr(state, "seen", 0)) + RIDGE for value in state.squares]


class Upcasting(Squares):
    """Directions in double precision, whatever the parameters are."""

    def precondition(self, state: SquaresState, momentum: Tensors) -> Tensors:
        return tuple(value.double() for value in super().precondition(state, momentum))


class WrongMemory(Squares):
    """One number more on paper than in the state."""

    def numbers(self, layer: Layer) -> int:
        return super().numbers(layer) + 1


class Named(Squares):
    """Long names are damped more."""

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        return [len(statistics.layer.name) * value for value in super().moment(statistics)]


class Undeclared(Squares):
    """Reads the inputs without having asked for them."""

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        extra = 1.0 if statistics.inputs is None else 1.0 + statistics.inputs.square().mean()
        return [extra * value for value in super().moment(statistics)]


class Ordered(Squares):
    """Every other sample counts half as much again."""

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        assert statistics.vectors is not None
        found = []
        for value in statistics.vectors():
            weights = 1.0 + 0.5 * (torch.arange(len(value), device=value.device) % 2).to(value)
            found.append(torch.einsum("n,n...->...", weights, value.square()) / len(value))
        return found


class Capped(Squares):
    """Looks at twelve samples at most."""

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        assert statistics.vectors is not None
        return [value[:12].square().mean(0) for value in statistics.vectors()]


class SquareOfMean(MiniBlock):
    """The outer product of the mean gradient, where the mean outer product is due."""

    def update(self, state: Any, observation: Observation, average: Any = None) -> None:
        assert observation.statistics is not None and observation.statistics.vectors is not None
        made = observation.statistics.vectors
        statistics = replace(
            observation.statistics, vectors=lambda: tuple(value.mean(0, keepdim=True) for value in made())
        )
        super().update(state, replace(observation, statistics=statistics), average)


class WrongLaw(Squares):
    """Says it squares, but takes absolute values."""

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        assert statistics.vectors is not None
        return [value.abs().mean(0) for value in statistics.vectors()]


class Unscaled(Squares):
    """Takes the rows without the factor that makes them gradients of each sample's own loss."""

    needs = Needs.ROOTS

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        assert statistics.roots is not None
        size = statistics.roots[0].square().mean()
        return [size * torch.ones_like(parameter) for parameter in statistics.layer.parameters.values()]


class Normalising(Squares):
    """Divides by the length of the momentum, zero or not."""

    linear = False

    def precondition(self, state: SquaresState, momentum: Tensors) -> Tensors:
        length = torch.stack([value.square().sum() for value in momentum]).sum().sqrt()
        return tuple(value / length for value in super().precondition(state, momentum))


class Undamped(Squares):
    """Divides by the bare squares, unless every single one is zero."""

    linear = False
    scaling = ScalingLaw(2.0)

    def scales(self, state: SquaresState) -> list[Tensor]:
        largest = torch.stack([value.max() for value in state.squares]).max()
        return [torch.where(largest > 0, value, torch.ones_like(value)) for value in state.squares]


class Unbiased(Squares):
    """Estimates a variance from N - 1 degrees of freedom, which one sample does not have."""

    linear = False

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        assert statistics.vectors is not None
        found = []
        for value in statistics.vectors():
            variance = (value - value.mean(0)).square().sum(0) / torch.tensor(len(value) - 1.0)
            found.append(value.square().mean(0) + 0.0 * variance)
        return found


class Overflowing(Squares):
    """Takes the sixteenth power on the way."""

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        return [value.pow(16.0).pow(1.0 / 16.0) for value in super().moment(statistics)]


STRUCTURES: dict[str, Any] = {
    "dense-solve": WrongSolve(),
    "positive-definite": Indefinite(),
    "spectrum-bounds": WrongBounds(),
    "direction-layout": Flattened(),
    "failed-inverse": StoresNothing(),
    "purity": Impure(),
    "save-load-continue": Forgetful(),
    "dtype-and-device": Upcasting(),
    "memory": WrongMemory(),
    "renamed-layers": Named(),
    "declared-needs": Undeclared(),
    "permuted-samples": Ordered(),
    "duplicated-batch": Capped(),
    "batch-splitting": SquareOfMean(),
    "scaled-loss": WrongLaw(),
    "mean-versus-sum": Unscaled(),
    "zero-gradients": Normalising(),
    "rank-deficient-batch": Undamped(),
    "one-sample": Unbiased(),
    "huge-and-tiny-scales": Overflowing(),
}
