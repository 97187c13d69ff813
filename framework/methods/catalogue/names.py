"""The words that options of the methods take, and the parts they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from ....curvature.estimators import EmpiricalFisher, Estimator, SampledFisher
from ....curvature.layers.adapters import KINDS
from ....curvature.quadratic_forms import (
    ExactHessian,
    HessianRowSums,
    QuadraticForm,
    SampledBatchScores,
    SampledScores,
    SignedHessian,
)
from ....errors import ArgumentError
from ....preconditioners.damping.own_units import CurvatureUnits
from ....preconditioners.damping.split import ConstantDamping, Damping
from ....preconditioners.pairs.damping import (
    DoubleDamping,
    MergedDoubleDamping,
    NoDamping,
    PairDamping,
    PowellB0,
    PowellH,
    PowellThenLM,
)
from ....preconditioners.structures.partitions import (
    FlatChunk,
    Partition,
    PerInputAveraged,
    PerOutput,
    PerOutputAveraged,
)
from ....stepsize.bounded import RelativeBound
from ....stepsize.ceiling import Ceiling
from ....stepsize.constant import ConstantStep
from ....stepsize.guard import Backtrack, Guard, NoGuard
from ....stepsize.protocol import StepSize

__all__ = [
    "CONVOLUTIONS",
    "UNITS",
    "bounded_step",
    "chosen",
    "fisher_estimator",
    "pair_damping",
    "partition",
    "quadratic_form",
    "step_guard",
]

Part = TypeVar("Part")

CONVOLUTIONS = tuple(kind for kind in KINDS if kind.startswith("Conv"))
"""Kinds of layers whose weight consists of kernels."""

PARTITIONS: dict[str, type[Partition]] = {
    "per-output": PerOutput,
    "per-output-averaged": PerOutputAveraged,
    "per-input-averaged": PerInputAveraged,
    "flat-chunk": FlatChunk,
}

PAIRS: dict[str, type[PairDamping]] = {
    "double": DoubleDamping,
    "powell-then-lm": PowellThenLM,
    "powell-h": PowellH,
    "merged": MergedDoubleDamping,
    "powell-b0": PowellB0,
    "none": NoDamping,
}

UNITS: dict[str, type[Damping]] = {"curvature": CurvatureUnits, "absolute": ConstantDamping}

FORMS: dict[str, type[QuadraticForm]] = {
    "sampled": SampledScores,
    "sampled-batch": SampledBatchScores,
    "signed-hessian": SignedHessian,
    "exact-hessian": ExactHessian,
    "hessian-row-sums": HessianRowSums,
}


def fisher_estimator(statistics: str) -> Estimator:
    """The Fisher matrix by name: ``sampled`` labels, or ``empirical`` (the true ones)."""
    estimators: dict[str, Estimator] = {"sampled": SampledFisher(), "empirical": EmpiricalFisher()}
    if statistics not in estimators:
        raise ArgumentError(f"statistics must be 'sampled' or 'empirical', got {statistics!r}")
    return estimators[statistics]


def chosen(option: str, word: str, table: Mapping[str, Callable[[], Part]]) -> Part:
    """What a word of an option stands for, made anew.

    Raises:
        ArgumentError: for another word; the message lists all.
    """
    if word not in table:
        raise ArgumentError(f"{option} must be one of {', '.join(table)}, got {word!r}")
    return table[word]()


def partition(blocks: str) -> Partition:
    """Blocks of dense layers: ``per-output``, ``per-output-averaged``, ``per-input-averaged`` or ``flat-chunk``."""
    return chosen("blocks", blocks, PARTITIONS)


def pair_damping(name: str | None) -> PairDamping:
    """A pair damping by name: ``double``, ``powell-then-lm``, ``powell-h``, ``merged``, ``powell-b0`` or ``none``.

    ``None`` is what command lines make of the word.
    """
    return chosen("pairs", "none" if name is None else name, PAIRS)


def quadratic_form(name: str) -> QuadraticForm:
    """An estimator of quadratic forms by name, PAPERS 3.3 (a), (a'), (b), (c), (d) in the order of the table."""
    return chosen("curvature", name, FORMS)


def step_guard(growth: float, guard: str = "backtrack") -> Guard:
    """Backtracking when the mini-batch loss grows by more than ``growth`` > 1; infinity means no guard.

    Args:
        growth: the factor.
        guard: ``backtrack`` (grows beyond the loss before the step) or ``ceiling`` (beyond the lowest mean, too).
    """
    guards: dict[str, Callable[[], Guard]] = {
        "backtrack": lambda: Backtrack(growth),
        "ceiling": lambda: Ceiling(growth),
    }
    found = chosen("guard", guard, guards)
    return NoGuard() if growth == float("inf") else found


def bounded_step(limit: float, decrease: float = 0.5) -> StepSize:
    """lr, and no step moves a layer by more than ``limit`` times its norm; infinity means lr alone.

    Nor does a step promise to take away more than ``decrease`` of the loss, see :class:`.RelativeBound`.
    """
    return ConstantStep() if limit == float("inf") else RelativeBound(limit=limit, decrease=decrease)
