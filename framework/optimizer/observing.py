"""Taking statistics into the blocks' states, renewing their inverses, and the initial pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...curvature.backends.table import Backend
from ...curvature.estimators import Estimator
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError
from ...preconditioners.averages import PlainAverage
from ...preconditioners.damping.split import SideDamping
from ...preconditioners.operations import compute_many
from ...preconditioners.protocol import Observation, refining
from .arguments import require_callable
from .blocks import Block, accumulate, grouped_by_part
from .closure import Closure, preserved
from .recording import fill, records_for_forward, require_filled, require_pairs
from .session import Session

__all__ = ["observe", "refine", "refresh", "warm_up"]


def observe(
    session: Session,
    statistics: Mapping[str, LayerStatistics],
    gradients: Mapping[str, Tensors | None],
    decays: Mapping[str, tuple[float, ...]],
) -> list[tuple[Block, Observation]]:
    """Momentum and, where they are due, statistics of every block that has a gradient.

    Args:
        session: whose blocks.
        statistics: of this mini-batch, by layer.
        gradients: by block; ``None`` for one that sits the step out.
        decays: by block, weight decay of each parameter.

    Returns:
        The blocks that were updated, with what they were given: :func:`refine` goes on from there.

    Raises:
        ArgumentError: if a structure does not find what it declared; no block has been changed.
    """
    method, blocks, due = session.method, session.blocks, session.plan.at(session._step, session._warm).due
    looks_back = method.looks_back_at(session._step)
    active: list[tuple[Block, bool, Tensors, LayerStatistics | None]] = []
    for block, is_due in zip(blocks, due, strict=True):
        values = gradients[block.key]
        if values is None:
            continue
        measured = statistics.get(block.layer.name)
        # Who needs nothing of the estimator is shown the gradients alone, which it is given in any case.
        record = fill(method.curvature, block.layer, measured) if block.part.needs else measured
        if is_due and record is not None:
            require_filled(block, record)
        if looks_back:
            require_pairs(block, measured)
        if record is not None and measured is not None:
            block.positions = record.positions
        active.append((block, is_due and (record is not None or not block.part.needs), values, record))
    # What of a group's decay enters the gradient: all of it where it is coupled, nothing where it is decoupled.
    distinct = set().union(*decays.values())
    factors = {value: method.weight_decay.gradient_factor(value) for value in distinct}
    coupled = {block.key: tuple(factors[value] for value in decays[block.key]) for block, *_ in active}
    accumulate(
        [block for block, *_ in active],
        method.momentum,
        [values for _, _, values, _ in active],
        [coupled[block.key] for block, *_ in active],
    )
    updated = [
        (block, Observation(record, values, block.vector, coupled[block.key], block.parameters))
        for block, is_due, values, record in active
        if is_due
    ]
    seen = {id(block): observation for block, observation in updated}
    for structure, group in grouped_by_part([block for block, _ in updated]):
        structure.update_blocks([block.state for block in group], [seen[id(block)] for block in group])
    return updated


def refine(updated: Sequence[tuple[Block, Observation]]) -> None:
    """Statistics that are measured in what the refresh of this step has installed."""
    for block, observation in updated:
        if (part := refining(block.part)) is not None:
            part.refine(block.state, observation)


def refresh(blocks: Sequence[Block], sides: Callable[[Block], SideDamping], step: int) -> tuple[int, int]:
    """Compute what is due, all layers in one batched request. Returns (matrices, rescues)."""
    due = [block for block in blocks if block.inverses_due(step)]
    requests = [(block, block.part.matrices(block.state, sides(block))) for block in due]
    flat = [request for _, entries in requests for request in entries]
    if not flat:
        return 0, 0
    results = compute_many(flat)
    position = 0
    for block, entries in requests:
        block.part.install(block.state, results[position : position + len(entries)])
        position += len(entries)
    return len(flat), sum(result.rescues for result in results)


def warm_up(
    model: nn.Module,
    capture: Backend,
    collect: Callable[[], Mapping[str, LayerStatistics]],
    blocks: Sequence[Block],
    estimator: Estimator,
    closures: Iterable[Closure],
) -> bool:
    """Plain averages of the estimator's statistics over the closures' mini-batches. Returns whether there were any.

    No parameter, buffer, gradient or global random state is changed.

    Raises:
        ArgumentError: if the closures are no functions, there are none, or no layer records anything.
    """
    if not isinstance(closures, Iterable) or isinstance(closures, str | Tensor):
        raise ArgumentError(
            f"warm_start takes one function per mini-batch, e.g. (lambda x=x: model(x) for x, _ in loader), got "
            f"{type(closures).__name__}"
        )
    warm, count = False, 0
    capture.clear()
    capture.arm(records_for_forward(blocks, estimator), "forward")
    with preserved(model), torch.no_grad():
        for count, closure in enumerate(closures, 1):
            require_callable(f"entry {count - 1} of the closures of warm_start", closure)
            capture.step = 2**31 + count - 1
            with torch.enable_grad():
                closure()
            warm |= _average_in(blocks, estimator, collect())
    if not warm and any(block.part.needs for block in blocks):
        found = "is empty (a generator that was used before?)" if not count else f"ran {count} times without effect"
        raise ArgumentError(
            f"nothing was recorded: what was given to warm_start {found}; give one function per mini-batch that runs "
            "the model given to osculate.build, e.g. (lambda x=x: model(x) for x, _ in loader)"
        )
    return warm


def _average_in(blocks: Sequence[Block], estimator: Estimator, statistics: Mapping[str, LayerStatistics]) -> bool:
    """One mini-batch of the warm start."""
    found = False
    for block in blocks:
        record = fill(estimator, block.layer, statistics.get(block.layer.name))
        if record is not None and block.part.needs:
            require_filled(block, record)
            block.part.update(block.state, Observation(record, (), block.storage), PlainAverage())
            found = True
    return found
