"""All registered structures at one checkpoint: which fits which layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...curvature.estimators import BatchMean, InputsOnly, SampledFisher, SecantPairs, WithPairs
from ...errors import ArgumentError, CompatibilityError, NumericalError
from ...framework.methods import registry
from ...framework.methods.method import Method
from ...framework.methods.momentum import NoMomentum
from ...framework.optimizer.build import build
from ...preconditioners.damping.split import ConstantDamping, Split
from .approximation import BlockQuality, Effort, ExactBlock, measure_approximation
from .exact_blocks import Probe, Target
from .microscope import settle

__all__ = ["StructureQuality", "compare_structures", "composed"]

_ESTIMATORS: tuple[Any, ...] = (
    InputsOnly(),
    SecantPairs(),
    SampledFisher(),
    BatchMean(),
    WithPairs(SampledFisher()),
)
"""Tried in this order: no more than the structure needs. Exact roots would cost one vector per sample and output."""


@dataclass(frozen=True)
class StructureQuality:
    """One structure at one checkpoint.

    Attributes:
        structure: its label in the registry.
        blocks: what was measured of each block.
        trouble: why nothing was measured, else empty.
    """

    structure: str
    blocks: tuple[BlockQuality, ...] = ()
    trouble: str = ""

    def mean(self, name: str, target: str) -> float:
        """Mean of a number of :class:`BlockQuality` over blocks, ``nan`` left out; geometric for conditions."""
        found = [getattr(block, name) for block in self.blocks if block.target == target]
        values = [value for value in found if math.isfinite(value)]
        if not values:
            return math.nan
        if name.startswith("condition"):
            return math.exp(sum(math.log(value) for value in values) / len(values))
        return float(sum(values) / len(values))


def composed(structure: Any, damping: float) -> Method:
    """A method around a structure: the first estimator that serves it, no momentum.

    Raises:
        CompatibilityError: if no estimator does.
    """
    for rule in (Split(), ConstantDamping()):
        for estimator in _ESTIMATORS:
            try:
                return Method(structure, estimator, rule, NoMomentum(), defaults={"lr": 0.05, "damping": damping})
            except ArgumentError:
                continue
    raise CompatibilityError(f"no estimator serves {type(structure).__name__} beside damping {damping:g}")


def compare_structures(
    model: nn.Module,
    probe: Probe,
    history: Sequence[Probe],
    *,
    damping: float,
    targets: Sequence[Target] = ("ggn",),
    structures: Mapping[str, Any] | None = None,
    effort: Effort | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> Iterator[StructureQuality]:
    """Give every structure the same statistics at the same parameters, and measure it.

    Args:
        model: at the checkpoint; not changed.
        probe: the mini-batch of the exact curvature.
        history: mini-batches on which statistics are gathered, see :func:`osculate.analysis.quality.microscope.settle`.
        damping: lambda > 0, of all structures and of the exact matrices.
        targets: ``"ggn"``, ``"hessian"`` or both.
        structures: by label; ``None``: all that are registered.
        effort: how much is spent.
        announce: called with the name of each structure before it is measured.
    """
    known: dict[tuple[str, tuple[str, ...], str], ExactBlock] = {}
    table = registry.examples()["structure"] if structures is None else structures
    for label, structure in table.items():
        announce(label)
        try:
            method = composed(structure, damping)
            optimizer = build(method, copy.deepcopy(model), likelihood=probe.likelihood)
            settle(optimizer, history)
        except (ArgumentError, NumericalError) as error:
            yield StructureQuality(label, trouble=str(error))
            continue
        found = measure_approximation(
            optimizer, probe, targets=targets, damping=damping, effort=effort or Effort(), known=known
        )
        optimizer.close()
        yield StructureQuality(label, tuple(found))
