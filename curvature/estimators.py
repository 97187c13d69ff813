"""Curvature estimators: which matrix the statistics stand for.

An estimator says what it provides, what the backend must record for that, and fills ``roots`` / ``vectors`` of a
:class:`LayerStatistics`. ``m`` is the mini-batch size, an overbar the mini-batch mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..checking import require_fields
from .declarations import EstimatorDeclarations
from .records.needs import Needs, Record
from .records.statistics import LayerStatistics, Tensors

__all__ = [
    "BatchMean",
    "EmpiricalFisher",
    "Estimator",
    "ExactGGN",
    "ExactHessianBlock",
    "InputsOnly",
    "SampledBatchMean",
    "SampledFisher",
    "SecantPairs",
    "WithPairs",
    "records_for_pairs",
]


class Estimator(Protocol):
    """Which curvature matrix is measured, and from what. May declare more: :class:`.EstimatorDeclarations`."""

    provides: Needs
    needs_likelihood: bool
    definite: bool
    """Whether the matrix has no negative eigenvalue; if not, only structures with ``takes_indefinite`` take it."""

    def records(self, needs: Needs) -> Record:
        """What the backend must record so that a part with these needs can be served."""

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """The statistics with ``roots``, ``vectors``, ``matrix`` set as far as this estimator provides them."""


_WHOLE = Needs.VECTORS | Needs.MATRIX


def _inputs(needs: Needs) -> Record:
    return Record.INPUTS if Needs.INPUTS in needs else Record.NOTHING


def records_for_pairs(needs: Needs) -> Record:
    """What both evaluations record for structures that look back."""
    means = Record.MEANS if Needs.PAIRS in needs else Record.NOTHING
    return means | (Record.COUNT if Needs.CHANGES in needs else Record.NOTHING)


def _with_one_vector(statistics: LayerStatistics, gradients: Tensors) -> LayerStatistics:
    """The record with one gradient as its only vector."""
    return statistics.with_vectors(lambda: tuple(value.unsqueeze(0) for value in gradients))


def _with_whole(
    statistics: LayerStatistics, measured: Tensors | None, vectors: Callable[[], Tensors]
) -> LayerStatistics:
    """The record of a layer without rows: its vectors, where the backend has measured whole gradients."""
    return statistics if measured is None else statistics.with_vectors(vectors)


@dataclass(frozen=True)
class InputsOnly(EstimatorDeclarations):
    """Nothing but layer inputs: methods without curvature at the output side, forward-only warm starts."""

    provides = Needs.INPUTS
    needs_likelihood = False
    definite = True

    def records(self, needs: Needs) -> Record:
        """Inputs if anybody wants them."""
        return _inputs(needs)

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """Unchanged."""
        return statistics


@dataclass(frozen=True)
class BatchMean(InputsOnly):
    """Outer product of the mini-batch mean gradient, ``gbar gbar'``, true labels.

    What the released MBF code averages over steps (PAPERS 2.3). Its expectation is about F/m plus the outer product of
    the mean gradient, so damping and learning rate live on another scale than for per-sample estimators (factor m).
    Costs nothing beyond the gradient: no hooks run.
    """

    provides = Needs.INPUTS | Needs.VECTORS | Needs.MATRIX
    per_sample = False

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """One vector: the mean gradient itself."""
        assert statistics.gradients is not None
        return _with_one_vector(statistics, statistics.gradients)


@dataclass(frozen=True)
class SampledBatchMean(EstimatorDeclarations):
    """Outer product of the mini-batch mean gradient with labels sampled from the model: unbiased for F/m.

    One extra backward. MBF's warm start (PAPERS 2.3).
    """

    provides = Needs.INPUTS | Needs.VECTORS | Needs.MATRIX
    needs_likelihood = True
    definite = True

    def records(self, needs: Needs) -> Record:
        """The parameter gradient of the sampled loss."""
        return _inputs(needs) | (Record.SAMPLED_PARAMETERS if needs & _WHOLE else Record.NOTHING)

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """One vector: the mean gradient for the sampled labels."""
        gradients = statistics.sampled_parameter_gradients
        return statistics if gradients is None else _with_one_vector(statistics, gradients)


@dataclass(frozen=True)
class EmpiricalFisher(EstimatorDeclarations):
    """Per-sample gradients with the true labels: the textbook empirical Fisher, mean_i g_i g_i'.

    No extra pass: the user's own backward provides the rows.
    """

    provides = Needs.INPUTS | Needs.ROOTS | Needs.VECTORS | Needs.MATRIX
    needs_likelihood = False
    definite = True

    def records(self, needs: Needs) -> Record:
        """Output gradients; inputs too where whole gradient vectors are built."""
        wanted = _inputs(needs)
        if Needs.ROOTS in needs:
            wanted |= Record.GRADIENTS
        if needs & _WHOLE:
            wanted |= Record.GRADIENTS | Record.INPUTS | Record.PER_SAMPLE
        return wanted

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """Rows of the user's backward with the factor that makes them per-sample."""
        if statistics.output_gradient is None:
            return _with_whole(statistics, statistics.sample_gradients.loss, statistics.loss_vectors)
        statistics.require_own_rows()
        roots = statistics.gradient_rows(), statistics.gradient_scale
        return statistics.with_vectors(statistics.loss_vectors, roots=roots)


@dataclass(frozen=True)
class SampledFisher(EstimatorDeclarations):
    """Per-sample gradients with one label per sample drawn from the model: unbiased for the Fisher (= GGN).

    One extra backward to the pre-activations only, about 0.27 of a gradient on the MNIST autoencoder. Where a row
    belongs to several samples (learned positions) it holds the sum of their gradients: labels are drawn for each sample
    independently, so the outer product of the sum is unbiased as well.
    """

    provides = Needs.INPUTS | Needs.ROOTS | Needs.VECTORS | Needs.MATRIX | Needs.SCORES
    needs_likelihood = True
    definite = True
    estimates = "fisher"

    def records(self, needs: Needs) -> Record:
        """Sampled output gradients; inputs too where whole gradient vectors or scores are built."""
        wanted = _inputs(needs)
        if needs & (Needs.ROOTS | Needs.SCORES | _WHOLE):
            wanted |= Record.SAMPLED
        if needs & (Needs.SCORES | _WHOLE):
            wanted |= Record.INPUTS
        if needs & _WHOLE:
            wanted |= Record.PER_SAMPLE
        return wanted

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """Rows of the sampled backward; they are per-sample already."""
        if statistics.sampled_gradient is None:
            return _with_whole(statistics, statistics.sample_gradients.sampled, statistics.sampled_vectors)
        if statistics.mixed:
            statistics.require_own_rows()
        return statistics.with_vectors(statistics.sampled_vectors, roots=(statistics.sampled_rows(), 1.0))


@dataclass(frozen=True)
class SecantPairs(EstimatorDeclarations):
    """Pairs s = mean(h+ - h), y = mean(g+ - g) from a second evaluation of the same mini-batch after the step.

    K-BFGS, PAPERS 1.2 items 6 and 7. The second pass goes down to pre-activations only: about 0.63 of a gradient. For
    structures that pair the parameters themselves (``Needs.CHANGES``, ours) it is a whole gradient.
    """

    provides = Needs.INPUTS | Needs.PAIRS | Needs.CHANGES
    needs_likelihood = False
    definite = True

    def records(self, needs: Needs) -> Record:
        """Batch means at the pre-activations; for changes of the parameters the number of samples."""
        return _inputs(needs) | records_for_pairs(needs)

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """Unchanged: the means are the statistics."""
        return statistics


@dataclass(frozen=True)
class ExactGGN(EstimatorDeclarations):
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
        wanted = _inputs(needs)
        if needs & (Needs.ROOTS | _WHOLE):
            wanted |= Record.CURVATURE_ROOTS
        if needs & _WHOLE:
            wanted |= Record.INPUTS | Record.PER_SAMPLE
        return wanted

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """V rows per sample and position, to be summed over v; vectors grow by sqrt(V), because they are averaged."""

        def vectors() -> Tensors:
            found = statistics.root_vectors()
            factor = math.sqrt(found[0].shape[0] / statistics.samples)
            return tuple(value * factor for value in found)

        if statistics.curvature_roots is None:
            return _with_whole(statistics, statistics.sample_gradients.roots, vectors)
        statistics.require_own_rows()
        return statistics.with_vectors(vectors, roots=(statistics.root_rows(), 1.0))


@dataclass(frozen=True)
class ExactHessianBlock(EstimatorDeclarations):
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
        return _inputs(needs) | (Record.COUNT if Needs.MATRIX in needs else Record.NOTHING)

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """The block that the optimizer's Hessian products give."""
        return statistics if statistics.hessian is None else statistics.with_fields(matrix=statistics.hessian)


@dataclass(frozen=True)
class WithPairs(EstimatorDeclarations, forwards="estimator"):
    """The curvature of ``estimator``, and the secant pairs of K-BFGS from a second evaluation after the step. Ours.

    For hybrids such as ``Kronecker(inputs=HessianActionBFGS(), outputs=Covariance())``, whose input side learns after
    every step while its output side reads per-sample gradients.

    Args:
        estimator: provides the curvature; any estimator.
    """

    estimator: Estimator = field(default_factory=EmpiricalFisher)

    def __post_init__(self) -> None:
        require_fields(self)

    @property
    def provides(self) -> Needs:
        """What the estimator provides, and pairs of both kinds."""
        return self.estimator.provides | Needs.INPUTS | Needs.PAIRS | Needs.CHANGES

    @property
    def needs_likelihood(self) -> bool:
        """As the estimator."""
        return self.estimator.needs_likelihood

    @property
    def definite(self) -> bool:
        """As the estimator."""
        return self.estimator.definite

    def records(self, needs: Needs) -> Record:
        """The estimator's records, and those of the pairs."""
        return self.estimator.records(needs) | records_for_pairs(needs)

    def fill(self, statistics: LayerStatistics) -> LayerStatistics:
        """As the estimator: the means are in the record already."""
        return self.estimator.fill(statistics)
