"""Quasi-Newton updates seen from outside: the matrix before and after a step, and the pair between them.

The factors are not instrumented. A copy of the state before a step and the state after it determine the pair that was
used: it is computed again by the same damping rule from the same averages, with the same H.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...framework.optimizer.blocks import Block
from ...framework.optimizer.observers import StepTrace
from ...preconditioners.factors.bfgs import BFGS, HessianActionBFGS
from ...preconditioners.factors.factor import Side
from ...preconditioners.factors.lbfgs import LBFGS
from ...preconditioners.linalg import add_to_diagonal
from ...preconditioners.operations import compute_many
from ...preconditioners.structures.kronecker import Kronecker

__all__ = ["Update", "remembered", "updates_of"]

_FACTORS = (BFGS, LBFGS, HessianActionBFGS)


@dataclass(frozen=True)
class Update:
    """What one step did to one quasi-Newton matrix H. Matrices and vectors in float64, on their device.

    Attributes:
        layer: name of the layer.
        side: of the Kronecker product.
        factor: the part that made the update.
        state: its state after the step.
        damping: of this side, mu2 for secant pairs.
        before: (d, d) H before.
        after: (d, d) H after.
        step: (d,) s as used.
        change: (d,) y as used.
        accepted: whether the pair was used.
        second_moment: (d, d) A + damping I of the Hessian action, else ``None``.
        epsilon: unit of rounding of the precision in which H is kept.
    """

    layer: str
    side: Side
    factor: Any
    state: Any
    damping: float
    before: Tensor
    after: Tensor
    step: Tensor
    change: Tensor
    accepted: bool
    second_moment: Tensor | None
    epsilon: float

    @property
    def place(self) -> str:
        """Layer and side."""
        return f"{self.layer} {self.side}"


def remembered(blocks: Sequence[Block]) -> dict[str, Any]:
    """Copies of the states of all blocks that have a quasi-Newton factor, by key."""
    return {block.key: copy.deepcopy(block.state) for block in blocks if any(_factors(block))}


def updates_of(blocks: Sequence[Block], before: Mapping[str, Any], trace: StepTrace) -> list[Update]:
    """Every update of one step.

    Args:
        blocks: of the optimizer, after the step.
        before: what :func:`remembered` returned before it.
        trace: of the step.
    """
    if "rejected_pairs" not in trace.report.events:  # nobody looked back: the guard took the step away
        return []
    found = []
    for block in blocks:
        if block.key not in before or block.layer.name not in trace.statistics:
            continue
        for side, factor in _factors(block):
            states = getattr(before[block.key], side), getattr(block.state, side)
            damping = getattr(trace.sides[block.key], side)
            make = _action if isinstance(factor, HessianActionBFGS) else _secant
            found.append(make(block, side, factor, states, damping, trace))
    return found


def _factors(block: Block) -> Iterator[tuple[Side, Any]]:
    part = block.part
    if isinstance(part, Kronecker):
        if isinstance(part.inputs, _FACTORS):
            yield "inputs", part.inputs
        if isinstance(part.outputs, _FACTORS):
            yield "outputs", part.outputs


def _secant(block: Block, side: Side, factor: Any, states: tuple[Any, Any], damping: float, trace: StepTrace) -> Update:
    """Damp the averaged pair again, with H from before the step."""
    old, new = states
    matrix = factor.to_dense(old, damping)
    average = new.pair
    product = factor.left(old, average.change.unsqueeze(1)).squeeze(1)
    pair = factor.pairs.damp(average.step, average.change, product, damping)
    taken = not (torch.equal(old.pair.step, average.step) and torch.equal(old.pair.change, average.change))
    reference = trace.statistics[block.layer.name].mean_gradient
    assert reference is not None
    accepted = taken and bool(factor.skip.accepts(pair.step, pair.change, reference))
    after = factor.to_dense(new, damping)
    return Update(
        block.layer.name,
        side,
        factor,
        new,
        damping,
        matrix.double(),
        after.double(),
        pair.step.double(),
        pair.change.double(),
        accepted,
        None,
        torch.finfo(matrix.dtype).eps,
    )


def _action(block: Block, side: Side, factor: Any, states: tuple[Any, Any], damping: float, trace: StepTrace) -> Update:
    """The Hessian action s = H v, y = (A + damping I) s with the mean input v."""
    old, new = states
    if block.inverses_due(trace.report.step):  # H was replaced by the damped inverse of A within this step
        (request,) = block.part.matrices(block.state, trace.sides[block.key])[:1]
        factor.install(old, compute_many([request]))
    mean = trace.statistics[block.layer.name].mean_input().to(old.inverse.dtype)
    step = old.inverse @ mean
    change = torch.addmv(damping * step, new.second_moment, step)
    second_moment = add_to_diagonal(new.second_moment.double(), damping)
    return Update(
        block.layer.name,
        side,
        factor,
        new,
        damping,
        old.inverse.double(),
        new.inverse.double().clone(),
        step.double(),
        change.double(),
        bool(factor.skip.accepts(step, change, mean)),
        second_moment,
        torch.finfo(mean.dtype).eps,
    )
