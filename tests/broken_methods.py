"""Methods that break one promise each, through one part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import osculate as osc
import torch
from broken_structures import Capped, Forgetful, Indefinite, Named, Ordered, Squares, SquaresState, Tensors
from osculate.curvature import Layer, LayerStatistics, Needs
from osculate.preconditioners import Observation
from osculate.stepsize import StepEvidence
from torch import Tensor, nn


@dataclass
class CountingState(SquaresState):
    """Squares, and the number of updates."""

    count: int = 0


class Exploding(Squares):
    """Tame for seven steps."""

    def init(self, layer: Layer, parameters: Tensors) -> CountingState:
        return CountingState(super().init(layer, parameters).squares)

    def update(self, state: Any, observation: Observation, average: Any = None) -> None:
        super().update(state, observation, average)
        state.count += 1

    def precondition(self, state: Any, momentum: Tensors) -> Tensors:
        factor = 1.0 if state.count <= 7 else float("inf")
        return tuple(factor * value for value in super().precondition(state, momentum))


class Counting(Squares):
    """Counts passes of its layer since the last direction; ``counts`` says which."""

    def init(self, layer: Layer, parameters: Tensors) -> SquaresState:
        state = super().init(layer, parameters)
        state.passes = 0  # type: ignore[attr-defined]

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            state.passes += self.counts()  # type: ignore[attr-defined]

        layer.module.register_forward_hook(hook)
        return state

    def counts(self) -> bool:
        raise NotImplementedError

    def precondition(self, state: Any, momentum: Tensors) -> Tensors:
        extra, state.passes = self.factor(state.passes), 0
        return tuple(extra * value for value in super().precondition(state, momentum))

    def factor(self, passes: int) -> float:
        raise NotImplementedError


class CountsMicroBatches(Counting):
    """A second pass with gradients before a step makes the step longer."""

    def counts(self) -> bool:
        return torch.is_grad_enabled()

    def factor(self, passes: int) -> float:
        return 2.0 if passes > 1 else 1.0


class CountsIdlePasses(Counting):
    """A pass without gradients before a step makes the step longer."""

    def counts(self) -> bool:
        return not torch.is_grad_enabled()

    def factor(self, passes: int) -> float:
        return 2.0 if passes else 1.0


class SpecialSum(Squares):
    """Takes a factor of one, that of a summed loss, for two."""

    needs = Needs.ROOTS

    def moment(self, statistics: LayerStatistics) -> Sequence[Tensor]:
        assert statistics.roots is not None
        rows, factor = statistics.roots
        size = (rows * (2.0 if factor == 1.0 else factor)).square().mean()
        return [size * torch.ones_like(parameter) for parameter in statistics.layer.parameters.values()]


@dataclass
class SpareState(SquaresState):
    """Squares, and something in single precision."""

    spare: Tensor


class Single(Squares):
    def init(self, layer: Layer, parameters: Tensors) -> SpareState:
        return SpareState(super().init(layer, parameters).squares, torch.zeros(1, dtype=torch.float32))


class WritesGradients(Squares):
    """The gradients it is shown are the parameters' own."""

    def update(self, state: Any, observation: Observation, average: Any = None) -> None:
        super().update(state, observation, average)
        observation.gradients[0].mul_(2.0)


class Throws(Squares):
    """Throws dice, and does not look at them."""

    def precondition(self, state: Any, momentum: Tensors) -> Tensors:
        torch.rand(())
        return super().precondition(state, momentum)


class Restless(osc.ConstantStep):
    """A thousandth more than was asked for."""

    proportional = False

    def propose(self, state: Any, evidence: StepEvidence) -> float:
        return super().propose(state, evidence) + 1e-3


def using(structure: Squares, **parts: Any) -> osc.Method:
    """A method around one structure."""
    return osc.Method(structure, osc.EmpiricalFisher(), defaults={"lr": 0.05, "damping": 0.1}, **parts)


METHODS: dict[str, osc.Method] = {
    "method-trains": using(Exploding()),
    "method-descends": using(Indefinite()),
    "method-save-load-continue": using(Forgetful()),
    "method-permuted-samples": using(Ordered()),
    "method-duplicated-batch": using(Capped()),
    "method-micro-batches": using(CountsMicroBatches()),
    "method-mean-versus-sum": using(SpecialSum()),
    "method-renamed-layers": using(Named()),
    "method-idle-passes": using(CountsIdlePasses()),
    "method-dtype": using(Single()),
    "method-purity": using(WritesGradients()),
    "method-zero-lr": using(Squares(), step_size=Restless()),
    "method-random-state": using(Throws()),
}
HONEST = using(Squares())
