"""Secant pairs beside another estimator's curvature, for structures that mix both kinds of factors."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..checking import require_fields
from ..declarations import EstimatorDeclarations
from .backends.capture import Record
from .estimators import EmpiricalFisher, Estimator, records_for_pairs
from .records.statistics import LayerStatistics, Needs

__all__ = ["WithPairs"]


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
