"""What one evaluation of many processes left: the mini-batch as the owners of its layers see it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ...curvature.layers.sharding import held_gradient, local
from ...curvature.layers.sharding import whole as whole_of
from ...curvature.records.needs import Needs, Record
from ...curvature.records.statistics import LayerStatistics
from ...errors import ArgumentError
from .blocks import Block, full_precision
from .kinds_of_numbers import require_dense_gradients
from .nonfinite import describe_trouble, require_explained, spoiled_parameters, sum_of_everything
from .recording import require_sampled
from .session import Session
from .team import MiniBatch, Team
from .together import Together
from .travelling import travels_of_rows

__all__ = ["gather"]


def gather(session: Session, together: Together, loss: Tensor | None) -> MiniBatch | str:
    """Meet the other processes, and bring records and gradients to their owners. Nothing is written.

    Args:
        session: of this process.
        together: the processes.
        loss: of this process's share of the mini-batch.

    Returns:
        The mini-batch; or why no process takes this step.

    Raises:
        ArgumentError: if processes do not fit together, or records do not explain gradients; on every process.
        ProcessError: if another process has raised, or is missing.
    """
    due, ranks, certifies = session.due, together.ranks, session.looks_closely
    loss = None if loss is None else whole_of(loss)
    found = session.collect()
    reached = [_reached(parameter) for block in session.blocks for parameter in block.parameters]
    present = tuple(any(map(_reached, block.parameters)) for block in session.blocks)
    gradients = [full_precision(held_gradient(p)) for p in _counted(session, together) if p.grad is not None]
    squares = None
    try:
        if not together.reduces_gradients:
            squares = sum_of_everything(None, gradients, ())
        rest = sum_of_everything(None, gradients if squares is None else (), found.values())
    except (RuntimeError, TypeError):
        require_dense_gradients(session.blocks, found)
        raise
    known = [value.double() for value in (squares, rest, loss) if value is not None]
    total = torch.stack(known).sum() if known else torch.zeros((), device=session.device)
    if due.measures_scores:
        names = {block.layer.name for block, there in zip(session.blocks, present, strict=True) if there}
        require_sampled(found, names)
    seen = session.seen_loss(loss)
    doubts = session.capture.doubts if certifies else None
    numbers = [value for group in session._numbers for value in group.values()]
    meeting = together.meet(
        total, found, reached, doubts, moments=True, squares=squares, step=session._step, numbers=numbers
    )
    found = together.weighed(found, meeting.samples, session.capture)
    if not any(present):
        raise ArgumentError("no parameter has a gradient; call loss.backward() before step()")
    if meeting.unsound:
        if ranks.rank not in meeting.unsound:
            return f"process {meeting.unsound[0]} has found something that is not finite"
        team = session.plan.team(session.plan.own_part(present))
        own = [full_precision(local(torch.zeros_like(p) if p.grad is None else p.grad)) for p in team.parameters]
        return spoiled_parameters(session.blocks) or describe_trouble(loss, team, own, found)
    require_explained(meeting.doubts)
    statistics = together.statistics(found, due.travels, meeting)
    moving = [block for block, there in zip(session.blocks, present, strict=True) if there]
    team = session.plan.team(session.plan.own_part(present))
    whole = _whole_gradients(together, moving)
    given = [whole[id(parameter)] for parameter in team.parameters]
    decays = session.decays(team)
    steps = session.block_steps(team, given, decays)

    @cache
    def everybodys() -> Mapping[str, LayerStatistics]:
        record = Record.SAMPLED | Record.INPUTS | Record.SAMPLED_PARAMETERS
        return together.everybodys(found, travels_of_rows(session.layers, record), meeting.samples)

    asks = session.method.measures_at(session._step) & (Needs.SCORES | Needs.BATCH_SCORES)
    return MiniBatch(
        None if loss is None else ranks.mean(loss),
        statistics,
        None,
        team,
        given,
        steps,
        decays is not team.none,
        seen=None if seen is None else ranks.mean(seen),
        parameters=[local(parameter) for block in moving for parameter in block.parameters],
        moving=[(block, session.decays_of(block)) for block in moving],
        samples=meeting.samples,
        shares=found,
        everybodys=everybodys if asks else None,
        sharded=bool(together.pieces),
        whole=whole,
        values=_values(session, together, moving, team),
    )


def _reached(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.grad is not None


def _counted(session: Session, together: Together) -> list[Tensor]:
    """Parameters whose gradients here are those of the joint mini-batch."""
    blocks = session.own_blocks if together.reduces_gradients else session.blocks
    return [parameter for block in blocks for parameter in block.parameters]


def _whole_gradients(together: Together, moving: list[Block]) -> dict[int, Tensor]:
    """By id of the parameter, of the blocks that this process owns."""
    parameters = [(parameter, together.owner(block)) for block in moving for parameter in block.parameters]
    values = [torch.zeros_like(p) if p.grad is None or not p.requires_grad else p.grad for p, _ in parameters]
    found = together.whole(parameters, values, "gradients")
    return {id(p): full_precision(value) for (p, _), value in zip(parameters, found, strict=True)}


def _values(session: Session, together: Together, moving: list[Block], team: Team) -> list[Tensor]:
    """Parameters of the team: sharded ones whole, where coupled weight decay adds them to gradients."""
    decay = session.method.weight_decay
    coupled = any(decay.gradient_factor(value) for block in moving for value in session.decays_of(block))
    if not (coupled and together.pieces):
        return team.parameters
    parameters = [(parameter, together.owner(block)) for block in moving for parameter in block.parameters]
    found = together.whole(parameters, [parameter.detach() for parameter, _ in parameters], "parameters")
    by_id = {id(p): value for (p, _), value in zip(parameters, found, strict=True)}
    return [by_id[id(parameter)] for parameter in team.parameters]
