"""Rules on a few numbers, partitions and likelihoods that break one promise each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import osculate as osc
import torch
from osculate.curvature import Gaussian
from osculate.preconditioners import SideDamping
from osculate.preconditioners.pairs.damping import DampedPair
from osculate.stepsize.guard import Level, Trial
from torch import Tensor


class PairImpure(osc.PowellThenLM):
    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        pair = super().damp(step, change, product, damping)
        change.mul_(2.0)
        return pair


class PairNegative(osc.NoDamping):
    keeps_positive = True


class PairFloor(osc.DoubleDamping):
    def curvature_floor(self, damping: float) -> float:
        return 3.0 * damping


class PairBounds(osc.PowellH):
    """Claims a bound on y'y that Powell's stage does not keep."""

    def bounds(self, damping: float, low: Tensor, high: Tensor) -> Any:
        return replace(super().bounds(damping, low, high), growth=0.1 / high)


class Unbounded(osc.PowellThenLM):
    """Bounds s'y, and no more."""

    bounds: Any = None


class PairUnits(Unbounded):
    """A shift with a length of its own."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        pair = super().damp(step, change, product, damping)
        return replace(pair, change=pair.change + pair.step / (1.0 + pair.step.norm(dim=-1, keepdim=True)))


class PairCoordinates(Unbounded):
    """The first coordinate is damped more."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        pair = super().damp(step, change, product, damping)
        first = torch.zeros_like(pair.step)
        first[..., 0] = 1.0
        return replace(pair, change=pair.change + first * pair.step)


class PairSilent(osc.PowellThenLM):
    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        pair = super().damp(step, change, product, damping)
        never = torch.zeros_like(pair.first)
        return replace(pair, first=never, second=never)


class PairDivides(osc.PowellThenLM):
    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        pair = super().damp(step, change, product, damping)
        return replace(pair, change=pair.change * ((step * step).sum(-1) / (step * step).sum(-1)).unsqueeze(-1))


class PairLooks(Unbounded):
    """Decides in Python."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        return super().damp(step, change, product, damping if float(torch.dot(step, change)) > 0.0 else 2.0 * damping)


class PairUpcasts(osc.PowellThenLM):
    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        pair = super().damp(step, change, product, damping)
        return replace(pair, step=pair.step.double(), change=pair.change.double())


class DampingGivesUp(osc.ConstantDamping):
    def sides(self, value: float, positions: int, eigenvalues: Any = None) -> SideDamping:
        return replace(super().sides(value, positions), outputs=value if value > 1e-6 else 0.0)


class DampingReturns(osc.ConstantDamping):
    def sides(self, value: float, positions: int, eigenvalues: Any = None) -> SideDamping:
        return replace(super().sides(value, positions), whole=value if value < 2.0 else 0.5)


class DampingOneSided(osc.Split):
    def sides(self, value: float, positions: int, eigenvalues: Any = None) -> SideDamping:
        return replace(super().sides(value, positions), outputs=math.sqrt(value))


class DampingUnchecked(osc.ConstantDamping):
    def sides(self, value: float, positions: int, eigenvalues: Any = None) -> SideDamping:
        return SideDamping(abs(value), abs(value), abs(value))


class DampingCounts(osc.ConstantDamping):
    """A thousandth more at every other call."""

    def sides(self, value: float, positions: int, eigenvalues: Any = None) -> SideDamping:
        found = super().sides(value, positions, eigenvalues)
        calls = getattr(self, "calls", 0)
        object.__setattr__(self, "calls", calls + 1)
        return replace(found, whole=found.whole * (1.0 + 1e-3 * (calls % 2)))


class DampingUnbounded(osc.LevenbergMarquardt):
    """Forgets its bounds."""

    def adapted(self, value: float, actual: float, predicted: float) -> float:
        return value * (0.5 if actual > predicted else 2.0)


class DampingBlind(osc.LevenbergMarquardt):
    """Takes a loss that is no number as it comes."""

    def adapted(self, value: float, actual: float, predicted: float) -> float:
        return super().adapted(value, actual, predicted) + 0.0 * actual


class DampingNegative(osc.LevenbergMarquardt):
    """Follows the reduction down below zero."""

    def adapted(self, value: float, actual: float, predicted: float) -> float:
        return super().adapted(value, actual, predicted) if math.isfinite(actual) and actual >= 0.0 else -value


class DampingHalfDeclared(osc.ConstantDamping):
    """Would adapt lambda, but nobody asks it: it does not say when, nor within which bounds."""

    def adapted(self, value: float, actual: float, predicted: float) -> float:
        return value


class MomentumDrifts(osc.EMA):
    """Other coefficients at each call."""

    def coefficients(self) -> tuple[float, float]:
        calls = getattr(self, "calls", 0)
        object.__setattr__(self, "calls", calls + 1)
        keep = 0.9 if calls % 2 else 0.5
        return keep, 1.0 - keep


class MomentumUnstable(osc.HeavyBall):
    def coefficients(self) -> tuple[float, float]:
        return 1.0, 1.0


class MomentumBiased(osc.EMA):
    unbiased = True


class DecayAlways(osc.Coupled):
    def gradient_factor(self, value: float) -> float:
        return max(super().gradient_factor(value), 1e-3)


class DecayTwice(osc.Coupled):
    def shrinkage(self, value: float, step_size: float | Tensor) -> float | Tensor:
        return step_size * value


class DecaySquared(osc.Coupled):
    def gradient_factor(self, value: float) -> float:
        return super().gradient_factor(value) ** 2


class DecayUnchecked(osc.Coupled):
    def gradient_factor(self, value: float) -> float:
        return value


class DecayCounts(osc.Coupled):
    """Decays a little less each time."""

    def gradient_factor(self, value: float) -> float:
        calls = getattr(self, "calls", 0)
        object.__setattr__(self, "calls", calls + 1)
        return super().gradient_factor(value) * (1.0 - 1e-13 * calls)


class _Average:
    normalised = False
    unbiased = False
    found = (0.9, 0.1)

    def coefficients(self, weight: float) -> tuple[float, float, float]:
        return *self.found, 1.0


class AverageNegative(_Average):
    found = (-0.1, 1.1)


class AverageWeights(_Average):
    normalised = True
    found = (0.9, 0.2)


class AverageBiased(_Average):
    normalised = True
    unbiased = True


class AverageCounts(_Average):
    """Other coefficients at every other call."""

    calls = 0

    def coefficients(self, weight: float) -> tuple[float, float, float]:
        self.calls += 1
        return 0.9, 0.1 + 1e-3 * (self.calls % 2), 1.0


class GuardEndless(osc.Backtrack):
    shrink = 1.0  # type: ignore[misc]

    def __init__(self) -> None:
        object.__setattr__(self, "growth", 1.1)
        object.__setattr__(self, "attempts", 3)


class GuardBlind(osc.Backtrack):
    def accepts(self, state: None, trial: Trial) -> bool:
        return math.isnan(trial.after) or super().accepts(state, trial)


class GuardStubborn(osc.Backtrack):
    def accepts(self, state: None, trial: Trial) -> bool:
        return math.isfinite(trial.after) and trial.after <= trial.before - 0.999 * abs(trial.before)


class GuardFickle(osc.Backtrack):
    def accepts(self, state: None, trial: Trial) -> bool:
        return super().accepts(state, trial) and not 0.5 < trial.after < 0.9


class GuardPatient(osc.Nonmonotone):
    """Counts verdicts in its state, and judges by the count."""

    def accepts(self, state: Any, trial: Trial) -> bool:
        state.weight += 1e-9
        return super().accepts(state, trial)


class GuardForgetful(osc.Nonmonotone):
    """Its state saves the level, and not how many steps made it."""

    def init(self) -> Any:
        @dataclass
        class Forgetting(Level):
            def to_dict(self) -> dict[str, float]:
                return {**super().to_dict(), "weight": 1.0}

        return Forgetting()


class PartitionFlips(osc.PerOutput):
    def join(self, vectors: Tensor, like: Any) -> Any:
        return (vectors.flip(0),)


class PartitionRepeats(osc.PerOutput):
    """One row stands in two blocks."""

    def shape(self, layer: Any) -> tuple[int, int]:
        rows, columns = super().shape(layer)
        return rows + 1, columns

    def split(self, values: Any) -> Tensor:
        return torch.cat([values[0], values[0][:1]])

    def join(self, vectors: Tensor, like: Any) -> Any:
        return (vectors[:-1],)


class PartitionMiscounts(osc.PerOutput):
    def shape(self, layer: Any) -> tuple[int, int]:
        rows, columns = super().shape(layer)
        return rows + 1, columns


class PartitionImpure(osc.PerOutput):
    def join(self, vectors: Tensor, like: Any) -> Any:
        result = vectors.clone()
        vectors.zero_()
        return (result,)


class LikelihoodCurved(Gaussian):
    def curvature_root(self, output: Tensor) -> Tensor:
        return 2.0 * super().curvature_root(output)


class LikelihoodShifted(Gaussian):
    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample(output, generator) + 0.5


class LikelihoodCrowded(Gaussian):
    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        return super().negative_log_likelihood(output, target) + 0.1 * len(output) ** 2


class LikelihoodGlobal(Gaussian):
    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return output + torch.randn_like(output)


class LikelihoodImpure(Gaussian):
    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        loss = super().negative_log_likelihood(output, target)
        target.add_(1.0)
        return loss


RULES: dict[str, Any] = {
    "pair-purity": PairImpure(),
    "pair-positive": PairNegative(),
    "pair-floor": PairFloor(),
    "pair-bounds": PairBounds(),
    "pair-scale": PairUnits(),
    "pair-rotation": PairCoordinates(),
    "pair-flags": PairSilent(),
    "pair-degenerate": PairDivides(),
    "pair-dtype": PairUpcasts(),
    "pair-mapped": PairLooks(),
    "damping-positive": DampingGivesUp(),
    "damping-monotone": DampingReturns(),
    "damping-product": DampingOneSided(),
    "damping-range": DampingUnchecked(),
    "damping-purity": DampingCounts(),
    "damping-adapted": DampingUnbounded(),
    "momentum-closed-form": MomentumDrifts(),
    "momentum-stable": MomentumUnstable(),
    "momentum-unbiased": MomentumBiased(),
    "decay-zero": DecayAlways(),
    "decay-once": DecayTwice(),
    "decay-linear": DecaySquared(),
    "decay-range": DecayUnchecked(),
    "decay-purity": DecayCounts(),
    "average-coefficients": AverageNegative(),
    "average-weights": AverageWeights(),
    "average-unbiased": AverageBiased(),
    "average-purity": AverageCounts(),
    "guard-numbers": GuardEndless(),
    "guard-nonfinite": GuardBlind(),
    "guard-descent": GuardStubborn(),
    "guard-monotone": GuardFickle(),
    "guard-purity": GuardPatient(),
    "guard-save-load-continue": GuardForgetful(),
    "partition-bijection": PartitionFlips(),
    "partition-cover": PartitionRepeats(),
    "partition-shape": PartitionMiscounts(),
    "partition-purity": PartitionImpure(),
    "likelihood-curvature": LikelihoodCurved(),
    "likelihood-score": LikelihoodShifted(),
    "likelihood-additive": LikelihoodCrowded(),
    "likelihood-generator": LikelihoodGlobal(),
    "likelihood-purity": LikelihoodImpure(),
}

ADAPTED: tuple[Any, ...] = (DampingUnbounded(), DampingBlind(), DampingNegative(), DampingHalfDeclared())
"""Adaptive dampings whose lambda leaves its range in one way each."""
