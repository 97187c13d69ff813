"""Estimators, quadratic forms and step-size rules that break one promise each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import osculate as osc
import torch
from osculate.curvature import LayerStatistics, Needs
from osculate.stepsize import StepEvidence
from osculate.stepsize.averaged_forms import AveragedForms
from torch import Tensor


class EstimatorBoasts(osc.EmpiricalFisher):
    provides = osc.EmpiricalFisher.provides | Needs.PAIRS


class EstimatorInconsistent(osc.EmpiricalFisher):
    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        filled = super().fill(statistics)
        assert filled.roots is not None
        return replace(filled, roots=(filled.roots[0], 2.0 * filled.roots[1]))


class EstimatorOrdered(osc.EmpiricalFisher):
    """Vectors alone; the first one counts twice."""

    provides = Needs.INPUTS | Needs.VECTORS

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        filled = super().fill(statistics)
        assert filled.vectors is not None
        made = filled.vectors
        return replace(filled, vectors=lambda: tuple(torch.cat([2.0 * v[:1], v[1:]]) for v in made()))


class EstimatorUnits(osc.EmpiricalFisher):
    """Gradients as the loss has them, N times too short for a mean."""

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        return super().fill(replace(statistics, gradient_scale=1.0))


class EstimatorDoubles(osc.EmpiricalFisher):
    """Another dense matrix than the vectors stand for."""

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        filled = super().fill(statistics)
        assert filled.matrix is not None
        made = filled.matrix
        return replace(filled, matrix=lambda: 2.0 * made())


class EstimatorNegative(osc.EmpiricalFisher):
    """A dense matrix alone, and that with the wrong sign."""

    provides = Needs.INPUTS | Needs.MATRIX

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        filled = super().fill(statistics)
        assert filled.matrix is not None
        made = filled.matrix
        return replace(filled, vectors=None, matrix=lambda: -made())


class EstimatorImpure(osc.EmpiricalFisher):
    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        assert statistics.output_gradient is not None
        statistics.output_gradient.mul_(2.0)
        return super().fill(statistics)


class EstimatorPretends(osc.EmpiricalFisher):
    estimates = "fisher"


@dataclass(frozen=True)
class FormLopsided(osc.SampledScores):
    def measure(self, evidence: Any) -> Tensor:
        found = super().measure(evidence)
        return found + found.triu(1)


@dataclass(frozen=True)
class FormSaturates(osc.SampledScores):
    definite = False
    estimates = ""

    def measure(self, evidence: Any) -> Tensor:
        found = super().measure(evidence)
        return found / (1.0 + found.diagonal().sum())


@dataclass(frozen=True)
class FormNegative(osc.SampledScores):
    estimates = ""

    def measure(self, evidence: Any) -> Tensor:
        return -super().measure(evidence)


@dataclass(frozen=True)
class FormDoubled(osc.SampledScores):
    def measure(self, evidence: Any) -> Tensor:
        return 2.0 * super().measure(evidence)


@dataclass(frozen=True)
class FormImpure(osc.SampledScores):
    def measure(self, evidence: Any) -> Tensor:
        found = super().measure(evidence)
        for values in evidence.directions.values():
            values[0].mul_(2.0)
        return found


@dataclass(frozen=True)
class Slopes:
    """Honest: alpha = lr slope / |d|^2, nothing where nothing moves."""

    needs = Needs.NORMS
    curvature = None
    length_free = True

    def due(self, step: int) -> bool:
        return True

    def init(self, count: int, like: Tensor) -> AveragedForms:
        return AveragedForms.zeros(count, like)

    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        assert evidence.slopes is not None and evidence.squared_norms is not None
        sizes = evidence.lr * evidence.slopes.clamp(min=0.0) / evidence.squared_norms
        return torch.where(torch.isfinite(sizes), sizes, torch.zeros_like(sizes))


class StepInfinite(Slopes):
    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        assert evidence.slopes is not None and evidence.squared_norms is not None
        return evidence.lr * evidence.slopes.clamp(min=0.0) / evidence.squared_norms


class StepBackwards(Slopes):
    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        assert evidence.slopes is not None
        return super().propose(state, replace(evidence, slopes=evidence.slopes.abs())) * evidence.slopes.sign()


class StepUpcasts(Slopes):
    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        return super().propose(state, evidence).double()


class StepOrdered(Slopes):
    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        sizes = super().propose(state, evidence)
        return sizes * torch.arange(1, len(sizes) + 1).to(sizes)


class StepDeaf(Slopes):
    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        return super().propose(state, replace(evidence, lr=1.0))


class StepLong(osc.ConstantStep):
    length_free = True


class StepImpure(Slopes):
    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        sizes = super().propose(state, evidence)
        assert evidence.slopes is not None
        evidence.slopes.mul_(2.0)
        return sizes


class StepForgetful(Slopes):
    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        state.seen = getattr(state, "seen", 0) + 1
        return state.seen * super().propose(state, evidence)


class StepHaunted(Slopes):
    """Goes along last steps that are not there."""

    recalls = True

    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        assert evidence.squared_norms is not None
        return torch.where(evidence.squared_norms > 0, super().propose(state, evidence), evidence.lr)


class CouplingUnits(osc.Separate):
    def curvature(self, forms: Tensor, norms: Tensor) -> Tensor:
        return super().curvature(forms, norms) + 1.0


class CouplingOrdered(osc.Separate):
    def curvature(self, forms: Tensor, norms: Tensor) -> Tensor:
        return super().curvature(forms, norms) * torch.arange(1, len(norms) + 1).to(norms)


class CouplingLow(osc.Separate):
    majorises = True


class CouplingImpure(osc.Separate):
    def curvature(self, forms: Tensor, norms: Tensor) -> Tensor:
        found = super().curvature(forms, norms).clone()
        forms.mul_(2.0)
        return found


class SlopeUnits(osc.MomentumSlope):
    def value(self, state: Any, momentum: Tensor, gradient: Tensor) -> Tensor:
        return momentum + 1.0


class SlopeOrdered(osc.MomentumSlope):
    def value(self, state: Any, momentum: Tensor, gradient: Tensor) -> Tensor:
        return momentum * torch.arange(1, len(momentum) + 1).to(momentum)


class SignFragile(osc.Safeguarded):
    """Divides by the curvature of all layers."""

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        total = matrix.diagonal().sum()
        return super().choose(solution, matrix, right) * (total / total)


class SignNegative(osc.Unrestricted):
    """Does not say that it is signed."""

    signed = False


class SignTimid(osc.Safeguarded):
    """Never dares more than 1/L."""

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        diagonal = matrix.diagonal()
        return torch.where(diagonal > 0, right / (len(right) * diagonal), torch.zeros_like(right))


class SignClipped(osc.Clipped):
    """Promises what it does not keep."""

    descends = True


class SignOrdered(osc.Clipped):
    """Stops the first layer if another one is negative."""

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        result = super().choose(solution, matrix, right)
        result[0] *= 1.0 - float((solution < 0).any())
        return result


class SignImpure(osc.Clipped):
    """Clips what it was given."""

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        return solution.clamp_(min=0.0)


MEASURES: dict[str, Any] = {
    "estimator-provides": EstimatorBoasts(),
    "estimator-consistent": EstimatorInconsistent(),
    "estimator-permuted-samples": EstimatorOrdered(),
    "estimator-mean-versus-sum": EstimatorUnits(),
    "estimator-matrix": EstimatorDoubles(),
    "estimator-definite": EstimatorNegative(),
    "estimator-purity": EstimatorImpure(),
    "estimator-fisher": EstimatorPretends(),
    "form-symmetric": FormLopsided(),
    "form-quadratic": FormSaturates(),
    "form-definite": FormNegative(),
    "form-expectation": FormDoubled(),
    "form-purity": FormImpure(),
    "step-finite": StepInfinite(),
    "step-nonnegative": StepBackwards(),
    "step-shape": StepUpcasts(),
    "step-order": StepOrdered(),
    "step-learning-rate": StepDeaf(),
    "step-length": StepLong(),
    "step-purity": StepImpure(),
    "step-save-load-continue": StepForgetful(),
    "step-no-last-step": StepHaunted(),
    "coupling-scale": CouplingUnits(),
    "coupling-order": CouplingOrdered(),
    "coupling-majorises": CouplingLow(),
    "coupling-purity": CouplingImpure(),
    "slope-scale": SlopeUnits(),
    "slope-order": SlopeOrdered(),
    "sign-finite": SignFragile(),
    "sign-nonnegative": SignNegative(),
    "sign-minimum": SignTimid(),
    "sign-descends": SignClipped(),
    "sign-order": SignOrdered(),
    "sign-purity": SignImpure(),
}
