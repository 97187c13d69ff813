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
from ...preconditioners.pairs.pipeline import damped_pairs
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
            old, new = getattr(before[block.key], side), getattr(block.state, side)
            damping = getattr(trace.sides[block.key], side)
            find = _action if isinstance(factor, HessianActionBFGS) else _secant
            step, change, accepted, second_moment = find(block, factor, old, new, damping, trace)
            matrix = factor.to_dense(old, damping)
            found.append(
                Update(
                    layer=block.layer.name,
                    side=side,
                    factor=factor,
                    state=new,
                    damping=damping,
                    before=matrix.double(),
                    after=factor.to_dense(new, damping).double().clone(),
                    step=step.double(),
                    change=change.double(),
                    accepted=accepted,
                    second_moment=second_moment,
                    epsilon=torch.finfo(matrix.dtype).eps,
                )
            )
    return found


def _factors(block: Block) -> Iterator[tuple[Side, Any]]:
    if isinstance(block.part, Kronecker):
        sides: tuple[tuple[Side, Any], ...] = (("inputs", block.part.inputs), ("outputs", block.part.outputs))
        yield from ((side, factor) for side, factor in sides if isinstance(factor, _FACTORS))


_Found = tuple[Tensor, Tensor, bool, Tensor | None]
"""s, y, whether the pair was used, and A + damping I where there is one."""


def _secant(block: Block, factor: Any, old: Any, new: Any, damping: float, trace: StepTrace) -> _Found:
    """Damp and test the averaged pair again, with H from before the step."""
    average, reference = new.pair, trace.statistics[block.layer.name].mean_gradient
    assert reference is not None
    taken = not (torch.equal(old.pair.step, average.step) and torch.equal(old.pair.change, average.change))
    pair, accepted, _ = damped_pairs(
        torch.stack([average.step, average.change]).unsqueeze(1),
        torch.tensor([taken], device=reference.device),
        reference.unsqueeze(0),
        lambda rows: factor.left(old, rows.T).T,
        factor.pairs,
        factor.skip,
        damping,
    )
    return pair.step[0], pair.change[0], bool(accepted), None


def _action(block: Block, factor: Any, old: Any, new: Any, damping: float, trace: StepTrace) -> _Found:
    """The Hessian action s = H v, y = (A + damping I) s with the mean input v."""
    if block.inverses_due(trace.report.step):  # H was replaced by the damped inverse of A within this step
        (request,) = block.part.matrices(block.state, trace.sides[block.key])[:1]
        factor.install(old, compute_many([request]))
    mean = trace.statistics[block.layer.name].mean_input().to(old.inverse.dtype)
    step = old.inverse @ mean
    change = torch.addmv(damping * step, new.second_moment, step)
    second_moment = add_to_diagonal(new.second_moment.double(), damping)
    return step, change, bool(factor.skip.accepts(step, change, mean)), second_moment
