"""Taking statistics into the blocks' states, renewing their inverses, and the initial pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ...curvature.estimators import Estimator
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError, NumericalError
from ...preconditioners.averages import PlainAverage
from ...preconditioners.damping.split import SideDamping
from ...preconditioners.operations import compute_many
from ...preconditioners.protocol import Observation
from ..methods.momentum import WeightDecay
from .arguments import require_callable
from .blocks import Block, zeros_of
from .closure import Closure, preserved
from .lagging import Pending, requests_of
from .nonfinite import find_trouble, sum_of_everything
from .recording import fill, records_for_forward, require_filled, require_pairs
from .session import Session
from .team import BlockStep, Crew, MiniBatch
from .travelling import travels_of_warm_start

__all__ = ["observe", "observe_waiting", "refine", "refresh", "renew", "warm_up"]


def observe(session: Session, batch: MiniBatch) -> None:
    """Momentum and, where they are due, statistics of every block that has a gradient.

    Raises:
        ArgumentError: if a structure does not find what it declared; no block has been changed.
    """
    method, looks_back, team = session.method, session.due.looks_back, batch.team
    for step in batch.steps:
        block = step.block
        measured = step.record = batch.statistics.get(block.layer.name)
        if not block.asked.anything:
            continue  # who needs nothing of the estimator is shown the gradients alone, which it is given in any case
        if measured is not None and measured.unseen:
            step.due, step.record = False, None
            continue
        if looks_back and block.asked.looks_back:
            require_pairs(block, measured)
        if not step.due:
            continue
        known = step.gradients if block.whole and not team.half else _known(block, batch)
        record = step.record = fill(method.curvature, block.seen, measured if block.alone is None else None, known)
        if record is None:
            step.due = False
        else:
            require_filled(block, record)
    coupled = _coupled(method.weight_decay, batch.steps) if batch.decays else None
    recorded = batch.statistics if batch.shares is None else batch.shares  # also of layers of which nothing travels
    for step in batch.steps:
        measured = recorded.get(step.block.layer.name)
        if measured is not None and not measured.unseen:
            step.block.positions = measured.positions
    flat = None if coupled is None else [value for values in coupled for value in values]
    team.accumulate(method.momentum, batch.gradients, flat, batch.values)
    coupled, shown = coupled or team.none, _shown(batch)
    for crew in team.crews:
        chosen: list[BlockStep] = []
        waiting: list[BlockStep] = []
        for member in crew.members if crew.learns else ():
            step = batch.steps[member]
            if step.due:
                block = step.block
                step.observation = Observation(
                    step.record, step.gradients, block.vector, coupled[member], shown.get(member, block.parameters)
                )
                (waiting if step.waits else chosen).append(step)
        if chosen:
            _update(crew, chosen)
        if waiting:
            batch.waiting.append((crew, waiting))


def _known(block: Block, batch: MiniBatch) -> Tensors | None:
    """Gradients of all parameters of a block's layer, where they were brought to its owner."""
    if batch.whole is None:
        return None
    given = block.layer.parameters.values()
    return tuple(batch.whole.get(id(p), zeros_of(p)) for p in given)


def _shown(batch: MiniBatch) -> dict[int, Tensors]:
    """Whole parameters, by place of the block in the team; none where blocks have them."""
    if batch.values is None:
        return {}
    left = iter(batch.values)
    return {place: tuple(next(left) for _ in step.block.names) for place, step in enumerate(batch.steps)}


def _update(crew: Crew, steps: Sequence[BlockStep]) -> None:
    """The statistics of some blocks of a crew."""
    crew.structure.update_blocks([step.block.state for step in steps], [step.observation for step in steps])


def observe_waiting(batch: MiniBatch) -> None:
    """Statistics that nobody has needed before the second evaluation."""
    for crew, steps in batch.waiting:
        _update(crew, steps)


def _coupled(decay: WeightDecay, steps: Sequence[BlockStep]) -> list[tuple[float, ...]] | None:
    """What of the groups' decay enters the gradient: all of it where it is coupled, nothing where it is decoupled."""
    factors: dict[float, float] = {}
    for step in steps:
        for value in step.decays:
            if value not in factors:
                factors[value] = decay.gradient_factor(value)
    if not any(factors.values()):
        return None
    return [tuple(factors[value] for value in step.decays) for step in steps]


def refine(batch: MiniBatch) -> None:
    """Statistics that are measured in what the refresh of this step has installed."""
    for crew in batch.team.crews:
        for member in crew.members if crew.refining is not None else ():
            step = batch.steps[member]
            if step.observation is not None and crew.refining is not None:
                crew.refining.refine(step.block.state, step.observation)


def refresh(blocks: Sequence[Block], sides: Callable[[Block], SideDamping]) -> tuple[int, int]:
    """Compute the inverses of these blocks, all in one batched request. Returns (matrices, rescues)."""
    asked, flat = requests_of(blocks, sides)
    if not flat:
        return 0, 0
    results = compute_many(flat)
    for block, place in asked:
        block.part.install(block.state, results[place])
    return len(flat), sum(result.rescues for result in results)


def renew(session: Session, late: Sequence[Pending]) -> tuple[int, int]:
    """Install the inverses that this step was to wait for, compute those that are due, and begin those that lag.

    Returns:
        (matrices, rescues) of what was installed.
    """
    due, lagging = session.due, session.lagging
    refreshes, rescues = lagging.install(late) if late else (0, 0)
    if due.inverses:
        lagging.forget(due.inverses)
        more = refresh(due.inverses, session.sides_of(due.inverses))
        refreshes, rescues = refreshes + more[0], rescues + more[1]
    if due.lagging:
        lagging.begin(due.lagging, session.sides_of(due.lagging), session._step)
    return refreshes, rescues


def warm_up(session: Session, estimator: Estimator, closures: Iterable[Closure]) -> bool:
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
    warm, count, capture, blocks = False, 0, session.capture, session.blocks
    capture.clear()
    capture.arm(records_for_forward(blocks, estimator), "forward")
    with preserved(session.modules), torch.no_grad():
        for count, closure in enumerate(closures, 1):
            require_callable(f"entry {count - 1} of the closures of warm_start", closure)
            capture.step = 2**31 + count - 1
            with torch.enable_grad(), capture.differentiating() if capture.reads_curvature else nullcontext():
                value = closure()
                has_loss = isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad
                capture.finish_forward(value if has_loss else None)
            statistics, unsound, recorded = _joint(session, estimator)
            if unsound:
                raise NumericalError(
                    f"mini-batch {count - 1} of the warm start: what the model recorded is not finite, or its square "
                    "is not; no statistic was changed. Look at the data of that mini-batch"
                )
            warm |= _average_in(session.own_blocks, estimator, statistics) or recorded
    if session.together is not None:
        session.together.end(blocks)
    if not warm and any(block.asked.anything for block in session.own_blocks):
        found = "is empty (a generator that was used before?)" if not count else f"ran {count} times without effect"
        raise ArgumentError(
            f"nothing was recorded: what was given to warm_start {found}; give one function per mini-batch that runs "
            "the model given to osculate.build, e.g. (lambda x=x: model(x) for x, _ in loader)"
        )
    return warm


def _joint(session: Session, estimator: Estimator) -> tuple[Mapping[str, LayerStatistics], bool, bool]:
    """What a pass of the warm start has recorded, of all processes for the layers that this one owns.

    Returns:
        The records, whether something in them is not finite, and whether other processes may own what was recorded.
    """
    together = session.together
    if together is None:
        found = session.collect()
        return found, bool(found) and find_trouble(None, (), found.values(), {}), False
    with together.announcing(session.blocks, False):
        found = session.collect()
        total = sum_of_everything(None, (), found.values())
        total = torch.zeros((), device=session.device) if total is None else total
        meeting = together.meet(total, found, session.all_reached, None)
    if meeting.unsound:
        return {}, True, False
    travels = travels_of_warm_start(session.blocks, estimator)
    return together.statistics(found, travels, meeting), False, bool(meeting.samples)


def _average_in(blocks: Sequence[Block], estimator: Estimator, statistics: Mapping[str, LayerStatistics]) -> bool:
    """One mini-batch of the warm start."""
    found = False
    for block in blocks:
        measured = statistics.get(block.layer.name)
        if measured is not None and measured.unseen:
            continue
        record = None if block.alone else fill(estimator, block.layer, measured)
        if record is not None and block.asked.anything:
            require_filled(block, record)
            block.part.update(block.state, Observation(record, (), block.storage), PlainAverage())
            found = True
    return found
