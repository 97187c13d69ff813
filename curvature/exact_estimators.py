"""Exact curvature of a layer: the generalised Gauss-Newton matrix without sampling, and the Hessian block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .backends.capture import Record
from .records.statistics import LayerStatistics, Needs, Tensors

__all__ = ["ExactGGN", "ExactHessianBlock"]


@dataclass(frozen=True)
class ExactGGN:
    """The exact generalised Gauss-Newton matrix, mean_n sum_v (J_n' r_v)(J_n' r_v)', r_v the likelihood's roots.

    For the likelihoods that ship it equals the type-2 Fisher matrix E_y[g g'] with labels from the model
    (arXiv:1412.1193v11, section 9.2): what :class:`SampledFisher` estimates with one label per sample. All V roots
    (classes, or output coordinates) are backpropagated; K-FAC's factors from them are KFLR (arXiv:1706.03662v2).

    Cost: V backward passes to the pre-activations, batched; memory V times the gradients at the pre-activations.
    """

    provides = Needs.INPUTS | Needs.ROOTS | Needs.VECTORS | Needs.MATRIX
    needs_likelihood = True
    definite = True
    estimates = "fisher"
    exact = True

    def records(self, needs: Needs) -> Record:
        """Backpropagated roots; inputs too where whole vectors are built."""
        wanted = Record.INPUTS if Needs.INPUTS in needs else Record.NOTHING
        if needs & (Needs.ROOTS | Needs.VECTORS | Needs.MATRIX):
            wanted |= Record.CURVATURE_ROOTS
        if needs & (Needs.VECTORS | Needs.MATRIX):
            wanted |= Record.INPUTS | Record.PER_SAMPLE
        return wanted

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """V rows per sample and position, to be summed over v; vectors grow by sqrt(V), because they are averaged."""

        def vectors() -> Tensors:
            found = statistics.root_vectors()
            factor = math.sqrt(found[0].shape[0] / statistics.samples)
            return tuple(value * factor for value in found)

        if statistics.curvature_roots is None:
            whole = statistics.sample_gradients.roots is not None
            return statistics.with_vectors(vectors) if whole else statistics
        return replace(statistics.with_vectors(vectors), roots=(statistics.root_rows(), 1.0))


@dataclass(frozen=True)
class ExactHessianBlock:
    """The Hessian of the mini-batch mean loss over one layer's parameters: symmetric, perhaps indefinite.

    Differentiates the gradient of the user's own loss once per parameter (batched), so a step takes a closure, and no
    likelihood. For small layers. Works for every module that can be differentiated twice.

    Cost: one Hessian-vector product per parameter of the layer.
    """

    provides = Needs.INPUTS | Needs.MATRIX
    needs_likelihood = False
    definite = False
    asks = Needs.PRODUCTS

    def records(self, needs: Needs) -> Record:
        """The number of samples, which scales a summed loss."""
        wanted = Record.INPUTS if Needs.INPUTS in needs else Record.NOTHING
        return wanted | (Record.COUNT if Needs.MATRIX in needs else Record.NOTHING)

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """The block that the optimizer's Hessian products give."""
        return statistics if statistics.hessian is None else replace(statistics, matrix=statistics.hessian)
