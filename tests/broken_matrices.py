"""Operations, spectra, moments, scales, skip rules and initial matrices that break one promise each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import osculate as osc
import torch
from osculate.curvature import LayerStatistics
from osculate.preconditioners import AspectRatio, GradientMoments, Inverse, Semidefinite
from torch import Tensor


class OperationMixes(Inverse):
    """In company every result is a little smaller."""

    def compute(self, requests: Any) -> Any:
        return [replace(found, value=_scaled(found.value, len(requests))) for found in super().compute(requests)]


def _scaled(value: Tensor | None, count: int) -> Tensor | None:
    return None if value is None else value / count


class OperationImpure(Inverse):
    def compute(self, requests: Any) -> Any:
        found = super().compute(requests)
        for request in requests:
            request.matrix.mul_(2.0)
        return found


class OperationGuesses(Inverse):
    """An identity where nothing can be computed."""

    def compute(self, requests: Any) -> Any:
        guesses = [torch.eye(request.matrix.shape[-1]).to(request.matrix) for request in requests]
        found = super().compute(requests)
        return [
            replace(one, value=guess if one.value is None else one.value)
            for one, guess in zip(found, guesses, strict=True)
        ]


class SpectrumForgets(Semidefinite):
    def damped(self, matrix: Tensor, damping: float) -> Tensor:
        return super().damped(matrix, 2.0 * damping)


class SpectrumBoasts(Semidefinite):
    takes_indefinite = True


class MomentsLeak(GradientMoments):
    """The first square counts twice."""

    def squares(self, statistics: LayerStatistics, inputs_basis: Tensor, outputs_basis: Tensor) -> Tensor:
        found = super().squares(statistics, inputs_basis, outputs_basis)
        found[0] *= 2.0
        return found


class MomentsImpure(GradientMoments):
    def squares(self, statistics: LayerStatistics, inputs_basis: Tensor, outputs_basis: Tensor) -> Tensor:
        found = super().squares(statistics, inputs_basis, outputs_basis)
        inputs_basis.mul_(2.0)
        return found


class SharingDoubles(osc.Expand):
    def outputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        rows, factor = super().outputs(statistics)
        return rows, 2.0 * factor


class SharingImpure(osc.Expand):
    def outputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        rows, factor = super().outputs(statistics)
        result = rows.clone()
        rows.mul_(2.0)
        return result, factor


class ScaleVanishes(AspectRatio):
    def factor(self, rows: int, columns: int) -> float:
        return max(0.0, rows / columns - 0.1)


class SkipNothing(osc.CurvatureTest):
    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        return torch.ones(step.shape[:-1], dtype=torch.bool)


class SkipLooks(osc.CurvatureTest):
    """Decides in Python."""

    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        good = float(torch.dot(step, change)) > 0.0
        return super().accepts(step, change, reference) if good else torch.zeros((), dtype=torch.bool)


class InitialNothing(osc.NewestPair):
    """Without bounds: a pair whose squares underflow has no quotient."""

    def scale(self, step: Tensor, change: Tensor) -> Tensor:
        return torch.dot(step, change) / torch.dot(change, change)


class InitialLength(osc.NewestPair):
    """The length of the step instead of a quotient."""

    def scale(self, step: Tensor, change: Tensor) -> Tensor:
        return torch.linalg.vector_norm(step).clamp(self.smallest, self.largest)


class SkipNumber(osc.CurvatureTest):
    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        return super().accepts(step, change, reference).to(step.dtype)


MATRICES: dict[str, Any] = {
    "operation-batch": OperationMixes(),
    "operation-purity": OperationImpure(),
    "operation-nonfinite": OperationGuesses(),
    "spectrum-inverse": SpectrumForgets(),
    "spectrum-definite": SpectrumBoasts(),
    "moments-trace": MomentsLeak(),
    "moments-purity": MomentsImpure(),
    "sharing-one-position": SharingDoubles(),
    "sharing-purity": SharingImpure(),
    "scale-positive": ScaleVanishes(),
    "skip-negative": SkipNothing(),
    "skip-flag": SkipNumber(),
    "skip-mapped": SkipLooks(),
    "initial-scale-positive": InitialNothing(),
    "initial-scale-length": InitialLength(),
}
