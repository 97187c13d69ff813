"""What a step of many processes sends, computes and keeps, from shapes alone: nothing is run.

A reduction to one process or a broadcast from one of n numbers costs each process n (P - 1) / P, one to all
2 n (P - 1) / P, an exchange what goes to the others (:class:`.Ranks`). What is forecast is what :attr:`.Ranks.traffic`
counts, and beside it what the wrapper exchanges by itself, which nobody counts: ``DistributedDataParallel`` all D
numbers of the gradients, 2 D (P - 1) / P; FSDP2 D (P - 1) / P for gradients that are scattered, and as much each time
that parameters are gathered, ahead of a layer's forward and of its backward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...curvature.declarations import FormDeclarations, StepSizeDeclarations, declared
from ...curvature.layers.layer import Layer
from ...curvature.quadratic_forms import QuadraticForm
from ...curvature.records.needs import Needs, Record
from ...errors import ArgumentError
from ..methods.method import Method
from ..processes.packing import packed_size, rows_are_fewer
from ..processes.records import Travel
from .blocks import Block
from .recording import records_for_step
from .travelling import travels_of_step

__all__ = ["DIVISIONS", "Laid", "Rows", "rows_of", "traffic_of_step", "traffic_of_wrapper"]

DIVISIONS = ("replicated", "owners", "owners-only", "fsdp")
"""``"fsdp"``: owners on parameters that FSDP2 shards along their first dimension; the others on DDP."""


@dataclass(frozen=True)
class Rows:
    """How many numbers of one sample a layer's record holds.

    Attributes:
        inputs: of its inputs, all positions.
        outputs: of gradients at its outputs, all positions.
        positions: rows of one sample.
    """

    inputs: int
    outputs: int
    positions: int


def rows_of(model: nn.Module, layers: Sequence[Layer], example: Tensor) -> dict[str, Rows]:
    """Sizes of the rows of layers that are matrices, from one forward pass (on the meta device it computes nothing).

    Args:
        model: to be run.
        layers: of it.
        example: a mini-batch of N >= 1 samples.
    """
    found: dict[str, Rows] = {}
    handles = []
    for layer in layers:
        if not layer.is_matrix:
            continue

        def hook(module: nn.Module, given: tuple[Tensor, ...], made: Tensor, layer: Layer = layer) -> None:
            samples = len(example)
            outputs = made.numel() // samples
            found[layer.name] = Rows(given[0].numel() // samples, outputs, outputs // layer.matrix_shape[0])

        handles.append(layer.module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class Laid:
    """How a model is laid out over processes.

    Args:
        division: a name from :data:`DIVISIONS`.
        count: number of processes P >= 1.
        owners: by layer; left out where all own all.
        samples: of every process in a step, as many for each.
        size: bytes of a number of parameters, states and records.
    """

    division: str
    count: int
    owners: Mapping[str, int] | None
    samples: int
    size: int = 4

    def __post_init__(self) -> None:
        if self.division not in DIVISIONS:
            raise ArgumentError(f"division must be one of {', '.join(DIVISIONS)}, got {self.division!r}")
        if (self.owners is None) != (self.division == "replicated"):
            raise ArgumentError(f"division {self.division!r} goes {'without' if self.owners else 'with'} owners")

    @property
    def one_way(self) -> float:
        """Of what goes once over the ring, the share that each process sends."""
        return (self.count - 1) / self.count

    def piece(self, parameter: Tensor, rank: int) -> int:
        """Numbers of a parameter that lie on a process under FSDP2: rows as ``torch.chunk`` deals them out."""
        rows, each = parameter.shape[0], math.ceil(parameter.shape[0] / self.count)
        return max(0, min(each, rows - rank * each)) * (parameter.numel() // max(rows, 1))


def traffic_of_wrapper(parameters: Sequence[Tensor], laid: Laid, root: Sequence[Tensor] = ()) -> Counter[str]:
    """Bytes that each process sends in one gradient for DDP or FSDP2 themselves, on a ring.

    Args:
        parameters: all.
        laid: over processes.
        root: of these, the parameters of FSDP2's root, which stay whole between the passes.
    """
    numbers = sum(value.numel() for value in parameters)
    found: Counter[str] = Counter()
    if laid.division in ("replicated", "owners"):
        found["gradients of DDP"] = round(2 * laid.one_way * numbers * laid.size)
    elif laid.division == "fsdp":
        kept = sum(value.numel() for value in root)
        found["gradients of FSDP2"] = round(laid.one_way * numbers * laid.size)
        found["parameters of FSDP2"] = round(laid.one_way * (2 * numbers - kept) * laid.size)
    return found


def traffic_of_step(
    blocks: Sequence[Block],
    layers: Sequence[Layer],
    method: Method,
    laid: Laid,
    rank: int,
    rows: Mapping[str, Rows],
    step: int,
    closely: bool = False,
    closure: bool = True,
) -> Counter[str]:
    """Bytes that a process sends in a step, by what they carry: what :attr:`.Ranks.traffic` counts.

    Args:
        blocks: all; their parameters may be on the meta device, their states are not read.
        layers: all, in order.
        method: the composition.
        laid: over processes.
        rank: of the process.
        rows: of layers whose records are read.
        step: its number.
        closely: whether records are certified in this step.
        closure: whether the step is given a closure, and so knows the loss.
    """
    found: Counter[str] = Counter()
    found["statistics"] = _statistics(blocks, layers, method, laid, rank, rows, step)
    found["gradients"] = _gradients(blocks, laid, rank)
    found["directions"] = _directions(blocks, method, laid, rank, step)
    found["numbers"] = _numbers(blocks, layers, method, laid, rank, step, closely, closure)
    return Counter({name: value for name, value in found.items() if value})


_ROWS = (Record.INPUTS, Record.GRADIENTS, Record.SAMPLED)


def _row(record: Record, rows: Rows) -> int:
    """Numbers of one sample that travel as rows."""
    return sum(rows.inputs if flag is Record.INPUTS else rows.outputs for flag in _ROWS if flag in record)


def _statistics(
    blocks: Sequence[Block],
    layers: Sequence[Layer],
    method: Method,
    laid: Laid,
    rank: int,
    rows: Mapping[str, Rows],
    step: int,
) -> int:
    """Sums go to the owner around a ring, rows straight to the owner, or to everybody."""
    travels = travels_of_step(blocks, method.curvature, step, False)
    records = records_for_step(blocks, layers, method, step, False)
    by_name = {layer.name: layer for layer in layers}
    sums: Counter[int] = Counter()
    sent = 0
    for name, travel in travels.items():
        if not records.get(name):
            continue
        owner = 0 if laid.owners is None else laid.owners[name]
        taken = _taken(travel, rows.get(name), laid)
        sums[owner] += _summed(by_name[name], travel, taken, records[name])
        others = laid.count - 1 if laid.owners is None else int(owner != rank)
        if name in rows:
            sent += others * laid.samples * _row(taken, rows[name]) * laid.size
    share = laid.one_way * (2 if laid.owners is None else 1)
    sent += sum(round(share * number * laid.size) for number in sums.values())
    if method.looks_back_at(step):
        again: Counter[int] = Counter()
        for name in dict.fromkeys(block.layer.name for block in blocks if block.asked.looks_back):
            pairs = any(block.asked.pairs for block in blocks if block.layer.name == name)
            owner = 0 if laid.owners is None else laid.owners[name]
            again[owner] += pairs * 2 * by_name[name].matrix_shape[0]
        sent += sum(round(share * number * laid.size) for number in again.values())
    return sent


def _taken(travel: Travel, rows: Rows | None, laid: Laid) -> Record:
    """The records whose rows travel: those that somebody takes, and those that are fewer than their moment."""
    taken = travel.rows
    for side, moment in travel.moments.items():
        assert rows is not None
        numbers = laid.samples * _row(travel.saved[side], rows)
        if rows_are_fewer(numbers, moment.order, laid.count, laid.owners is None):
            taken |= travel.saved[side]
    return taken


def _summed(layer: Layer, travel: Travel, taken: Record, recorded: Record) -> int:
    """Numbers that are added up."""
    total = sum(packed_size(moment.order) for side, moment in travel.moments.items() if not taken & travel.saved[side])
    if Record.MEANS in recorded:
        total += 2 * layer.matrix_shape[0]
    if Record.SAMPLED_PARAMETERS in travel.rows:
        total += sum(value.numel() for value in layer.parameters.values())
    if travel.mean_input and Record.INPUTS in recorded and Record.INPUTS not in taken:
        total += layer.matrix_shape[1] - layer.has_bias
    return total


def _gradients(blocks: Sequence[Block], laid: Laid, rank: int) -> int:
    """To their owners, where the wrapper does not bring them to all."""
    if laid.owners is None or laid.division == "owners":
        return 0
    sent = 0
    for block in blocks:
        for value in block.parameters:
            if laid.division == "owners-only":
                sent += round(laid.one_way * value.numel() * laid.size)
            elif laid.owners[block.layer.name] != rank:
                sent += laid.piece(value, rank) * laid.size
    return sent


def _directions(blocks: Sequence[Block], method: Method, laid: Laid, rank: int, step: int) -> int:
    """From the owners: pieces to who has them, or the whole to everybody."""
    if laid.owners is None:
        return 0
    copies = 1 + declared(method.step_size, StepSizeDeclarations).recalls
    measures = bool(_forms(method, step))
    sent, whole = 0, Counter[int]()
    for block in blocks:
        owner = laid.owners[block.layer.name]
        for value in block.parameters:
            if laid.division != "fsdp" or measures:
                whole[owner] += copies * value.numel()
            elif owner == rank:
                sent += copies * laid.size * (value.numel() - laid.piece(value, rank))
    return sent + sum(round(laid.one_way * number * laid.size) for number in whole.values())


def _forms(method: Method, step: int) -> list[QuadraticForm]:
    """Quadratic forms along the directions of a step."""
    judge, rule = method.adaptive_damping, method.step_size
    found = [rule.curvature] if rule.curvature is not None and rule.due(step) else []
    if judge is not None and judge.due(step) and judge.curvature not in found:
        found.append(judge.curvature)
    return found


def _numbers(
    blocks: Sequence[Block],
    layers: Sequence[Layer],
    method: Method,
    laid: Laid,
    rank: int,
    step: int,
    closely: bool,
    closure: bool,
) -> int:
    """What all tell each other about a step, losses, and what a step-size rule measures."""
    rule, count = method.step_size, laid.count
    parameters = sum(len(block.names) for block in blocks)
    told = 8 * (6 + 2 * len(layers) + parameters)
    meetings = [told + 8 * 3 * len(layers) * closely] + [told] * method.looks_back_at(step)
    everywhere: list[int] = [laid.size] * (closure * len(meetings))  # losses
    stated = declared(rule, StepSizeDeclarations)
    if stated.uses_loss and not closure:
        everywhere.append(laid.size)
    columns = len(layers) * (1 + stated.recalls)
    judged = method.adaptive_damping is not None and method.adaptive_damping.due(step)
    if laid.owners is not None and rule.needs:
        everywhere.append((2 + (Needs.SLOPES in rule.needs)) * columns * laid.size)
    if laid.owners is not None and judged and Needs.SLOPES not in rule.needs:
        everywhere.append(3 * columns * laid.size)
    if laid.division == "fsdp" and Needs.NORMS in rule.needs:
        everywhere.append(laid.size * sum(len(layer.parameters) for layer in layers))
    adding = [form for form in _forms(method, step) if declared(form, FormDeclarations).adds_up]
    everywhere += [laid.size * columns ** (1 if Needs.BATCH_SCORES in form.needs else 2) for form in adding]
    if laid.division in ("owners-only", "fsdp") and method.guard.attempts and Needs.SLOPES in method.guard.needs:
        everywhere.append(laid.size)
    changing = {block.layer.name for block in blocks if Needs.CHANGES in block.needs}
    if method.looks_back_at(step) and laid.division != "fsdp":
        for layer in layers:
            everywhere += [laid.size * p.numel() for p in layer.parameters.values() if layer.name in changing]
    return sum(round((count - 1) * size) for size in meetings) + sum(
        round(2 * laid.one_way * size) for size in everywhere
    )
