"""One step of many processes: who does what, and what travels. One process has none of this.

Every process evaluates its share of the mini-batch. Then each layer has an owner, which gets what its structures take
of everybody's records (:mod:`~..processes.records`), keeps momentum and state, computes inverses and directions, and
spreads the directions; or all processes own all layers. What decides about a step is decided by all: one table with
what each has found goes round before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.backends.backend import Backend
from ...curvature.layers.layer import Layer
from ...curvature.layers.sharding import is_sharded, laid_out, local
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError, ProcessError
from ..processes.exchanges import Exchanges
from ..processes.pieces import Entry, Pieces, batch_shares
from ..processes.ranks import Ranks
from ..processes.records import Travel, brought_together, kind_of_rows, require_same_layers
from .blocks import Block, full_precision
from .early import EarlyMoments

__all__ = ["Meeting", "Spread", "Together"]

_FINE, _UNSOUND, _RAISED, _SKIPPED, _ENDED, _OVERFLOWN = 0.0, 1.0, 2.0, 3.0, 4.0, 5.0
_HEAD = 6
"""Numbers of a table's row before those of layers: verdict, number of the step, a sum over lr, damping
and decay, norm of the gradients, two flags."""

_APART = {
    _SKIPPED: "have skipped this mini-batch (their closures returned None), and others have not; skip it on all, or "
    "give every process a part of it",
    _ENDED: "have come to the end of what warm_start was given, and others have not; give every process as many "
    "mini-batches",
    _OVERFLOWN: "have a GradScaler that found a gradient that is not finite, and others have not; change gradients "
    "after backward() on all alike",
}

_SAME = 1e-3
"""Averaged gradients are the same bit for bit on all processes; what nobody has averaged differs by far more."""


@dataclass
class Meeting:
    """What all processes have found in one evaluation.

    Attributes:
        unsound: processes that found something that is not finite.
        samples: by layer, how many samples each process adds; 0 where another one has the same.
        doubts: by certified layer, how far its records are from explaining its gradient; above 1: they do not.
        settled: layers and sides whose moments have been added up already.
        moments: these, by layer and side, where this process owns them.
    """

    unsound: list[int]
    samples: dict[str, list[int]]
    doubts: dict[str, float]
    settled: set[tuple[str, str]] = field(default_factory=set)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(slots=True)
class Spread:
    """One block's directions, on every process.

    Attributes:
        block: the block.
        directions: one per parameter: the whole, or this process's piece of it.
        lasts: the block's last steps, the same, for rules that recall.
    """

    block: Block
    directions: Tensors
    lasts: Tensors = ()


class Together:
    """The processes of one optimizer, and who owns what.

    Args:
        ranks: the processes.
        model: the model.
        layers: all, in order.
        owners: by layer; ``None``: every process has all of them.
        reduces_gradients: whether gradients reach their owners only.

    Attributes:
        pieces: of sharded parameters.
        place: which share of the mini-batch this process has.
    """

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        layers: Sequence[Layer],
        owners: dict[str, int] | None,
        reduces_gradients: bool = False,
    ):
        self.ranks, self.owners, self.reduces_gradients = ranks, owners, reduces_gradients
        self.place, self._speakers = batch_shares(model, ranks)
        self._listening = self._broken_off = self._awaited = False
        self._exchanges = Exchanges(ranks.groups, model.parameters())
        self.early: EarlyMoments | None = None
        self.adopt(model, layers)

    def allow_early(self) -> None:
        """Let second moments set out before the step; every process must ask."""
        self.early = EarlyMoments(self.ranks, self.owners, self._speakers[self.ranks.rank], self.device)

    def adopt(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Take in the layers that are served now.

        Raises:
            ArgumentError: if nobody averages the gradient of a parameter.
        """
        self.require_averaged(model, layers)
        self.pieces = Pieces(self.ranks, dict(model.named_parameters()))
        self.rekey(model, layers)

    def require_averaged(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Check that DistributedDataParallel knows every parameter that is trained."""
        known = getattr(self.ranks.wrapper, "_module_parameters", None)
        if known is None:
            return
        exchanged = set(map(id, known))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for layer in layers:
            for parameter in layer.parameters.values():
                if id(parameter) not in exchanged and parameter.requires_grad:
                    raise ArgumentError(
                        "DistributedDataParallel does not exchange the gradient of parameter "
                        f"{names.get(id(parameter))!r}: it was frozen when the model was wrapped, or is ignored; wrap "
                        "the model while all that will ever be trained requires a gradient, and freeze it then"
                    )

    def __getstate__(self) -> dict[str, Any]:
        """A copy sends nothing early: that is between groups which the originals have made."""
        return self.__dict__ | {"early": None, "_mine": {}, "_exchanges": Exchanges((), ())}

    def rekey(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Of a copy: the same of its own parameters; nothing is sent."""
        self.layers = layers
        self.device = next(iter(layers[0].parameters.values())).device
        self.pieces.rekey(dict(model.named_parameters()))
        self._mine = {id(p): self.owns(layer) for layer in layers for p in layer.parameters.values()}

    def owns(self, layer: Layer) -> bool:
        """Whether this process has the layer's state."""
        return self.owners is None or self.owners[layer.name] == self.ranks.rank

    @property
    def divides_gradients(self) -> bool:
        """Whether no process has all gradients."""
        return bool(self.pieces) or self.reduces_gradients

    def require_no_scaler(self) -> None:
        """Check that nobody looks at all gradients for infinite ones.

        Raises:
            ArgumentError: if a process has not got them.
        """
        if self.reduces_gradients:
            raise ArgumentError(
                "division='owners-only' leaves NaN in the gradients of layers that other processes own, and a "
                "GradScaler would take every step for an overflow; use division='owners', or bfloat16 without a scaler"
            )

    def counts(self, parameter: Tensor) -> float:
        """What a parameter's gradient here counts in a sum over all processes."""
        if self.reduces_gradients:
            return float(self._mine.get(id(parameter), False))
        return self.pieces.share(parameter)

    # -- before anything is written ----------------------------------------------------------------------------------

    @contextmanager
    def announcing(self, blocks: Sequence[Block], certifies: bool) -> Iterator[None]:
        """What this process raises inside, before it has met the others, is told them: none waits in vain.

        Of what an evaluation raises itself only what comes after its exchanges: before these are over, the others wait
        for this process there.

        Args:
            blocks: all.
            certifies: whether doubts are told at this meeting.
        """
        self._listening, self._broken_off, self._awaited = True, False, False
        try:
            yield
        except Exception:
            if self._awaited:  # in the exchanges of the evaluation, where it may try again
                raise
            if self.early is not None:
                self.early.settle()
            if self._listening and self._broken_off:
                self.ranks.leave(self._row(_RAISED, blocks, certifies))
            elif self._listening:
                self._say(_RAISED, blocks, certifies)
            raise

    def _say(self, verdict: float, blocks: Sequence[Block], certifies: bool) -> list[list[float]]:
        """Tell the others a verdict in the place of what was found; returns what all have told."""
        self._listening = False
        return self.ranks.table(self._row(verdict, blocks, certifies))

    def _row(self, verdict: float, blocks: Sequence[Block], certifies: bool) -> Tensor:
        number = _HEAD + (2 + 3 * certifies) * len(self.layers) + sum(len(block.names) for block in blocks)
        row = torch.zeros(number, dtype=torch.float64, device=self.device)
        row[0] = verdict
        return row

    def skip(self, blocks: Sequence[Block], certifies: bool, overflown: bool = False) -> None:
        """This process takes no step with this mini-batch.

        Args:
            blocks: all.
            certifies: whether doubts are told at this meeting.
            overflown: whether that is because its GradScaler has found an infinite gradient; else it has no mini-batch.

        Raises:
            ArgumentError: if others do.
        """
        if self.early is not None:
            self.early.settle()
        self._require_nobody_apart(self._say(_OVERFLOWN if overflown else _SKIPPED, blocks, certifies))

    def end(self, blocks: Sequence[Block]) -> None:
        """This process has no further mini-batch for the warm start.

        Raises:
            ArgumentError: if others have.
        """
        self._require_nobody_apart(self._say(_ENDED, blocks, False))

    def evaluated(self, closure: Callable[[], Any], kind: Hashable) -> Any:
        """Run the user's closure, in which DDP and FSDP2 exchange gradients.

        Args:
            closure: the user's.
            kind: evaluations of one kind exchange the same.
        """
        before, self._listening = self._listening, False
        self._exchanges.begin()
        try:
            found = self.ranks.evaluating(closure)
        except Exception as error:
            complete = not isinstance(error, ProcessError) and self._exchanges.complete(kind)
            self._listening = self._broken_off = before and complete
            self._awaited = not complete
            raise
        self._exchanges.end(kind)
        self._listening = before
        return found

    def meet(
        self,
        sound: Tensor,
        found: Mapping[str, LayerStatistics],
        reached: Sequence[bool],
        doubts: Mapping[str, Tensor] | None,
        moments: bool = False,
        squares: Tensor | None = None,
        step: int = 0,
        numbers: Sequence[float] = (),
    ) -> Meeting:
        """Tell the others what this process has found. One collective and one synchronisation.

        Args:
            sound: 0-dimensional, finite if all that was found is.
            found: records by layer.
            reached: of every parameter of every block, whether it has a gradient.
            doubts: of certified layers, see :class:`.Certificate`; ``None``: of this step nobody tells any.
            moments: whether this is the meeting of a step, in which moments may have set out early.
            squares: 0-dimensional, sum of squared gradients, which all processes with the same pieces must have the
                same; ``None``: not so.
            step: its number.
            numbers: of the parameter groups, which every process must have the same.

        Raises:
            ProcessError: if another process has raised.
            ArgumentError: on every process, if they have not done the same.
        """
        entries = [found.get(layer.name) for layer in self.layers]
        counts = [0 if entry is None else entry.samples for entry in entries]
        kinds = [0 if entry is None else kind_of_rows(entry) for entry in entries]
        flag = torch.where(torch.isfinite(sound), _FINE, _UNSOUND).double().reshape(1)
        early = self.early if moments else None
        ready = [0.0, 0.0] if early is None else [float(early.valid(found)), float(early.plain(found))]
        plain = torch.tensor([*ready, *counts, *kinds, *map(float, reached)], dtype=torch.float64)
        length = flag.new_zeros(1) if squares is None else squares.to(flag).sqrt().reshape(1)
        settings = sum(value / (2.0 + index) for index, value in enumerate(numbers))
        told = [flag, flag.new_tensor([float(step), settings]), length, plain.to(flag.device, non_blocking=True)]
        if doubts is not None:
            told += [_told(doubts.get(layer.name), flag) for layer in self.layers]
        self._listening = False
        rows = self.ranks.table(torch.cat(told))
        self._require_nobody_raised(rows)
        self._require_nobody_apart(rows)
        self._require_same_step(rows)
        number, parameters = len(self.layers), len(reached)
        columns = [[int(row[_HEAD + index]) for row in rows] for index in range(number)]
        seen = [
            {int(row[_HEAD + number + i]) for row, n in zip(rows, columns[i], strict=True) if n} for i in range(number)
        ]
        require_same_layers(self.layers, columns, seen)
        start = _HEAD + 2 * number
        self._require_same_gradients([row[start : start + parameters] for row in rows])
        if not any(row[0] for row in rows):
            for twins in self.pieces.twins:
                self._require_exchanged([rows[rank][3] for rank in twins], twins, bool(self.pieces))
        samples = {
            layer.name: [n if speaks else 0 for n, speaks in zip(column, self._speakers, strict=True)]
            for layer, column in zip(self.layers, columns, strict=True)
            if any(column)
        }
        unsound = [rank for rank, row in enumerate(rows) if row[0] == _UNSOUND]
        doubted = {} if doubts is None else self._doubts([row[start + parameters :] for row in rows])
        meeting = Meeting(unsound, samples, doubted)
        if early is not None:
            valid, goes_on = (all(row[index] for row in rows) for index in (4, 5))
            valid = valid and not any(map(_is_uneven, samples.values()))  # the rows of some count more
            meeting.settled = {(name, side) for name, side, _ in early.chosen()} if valid else set()
            meeting.moments = early.finish(valid, samples)
            early.learn(goes_on, found, samples)
        return meeting

    @staticmethod
    def _require_nobody_apart(rows: Sequence[Sequence[float]]) -> None:
        for verdict, words in _APART.items():
            found = [rank for rank, row in enumerate(rows) if row[0] == verdict]
            if found and len(found) < len(rows):
                raise ArgumentError(f"processes {found} {words}; no parameter and no state has changed")

    @staticmethod
    def _require_same_step(rows: Sequence[Sequence[float]]) -> None:
        steps = [int(row[1]) for row in rows]
        if len(set(steps)) > 1:
            raise ArgumentError(
                f"the processes are at steps {steps}: one of them has missed some (an error in its closure that was "
                "caught?), and their states differ; start again from the last checkpoint"
            )
        if len({row[2] for row in rows}) > 1:
            raise ArgumentError(
                "lr, damping or weight_decay in the parameter groups differ between processes; set the same on all (a "
                "scheduler that looks at a loss must look at the loss of all)"
            )

    @staticmethod
    def _require_nobody_raised(rows: Sequence[Sequence[float]]) -> None:
        raised = [rank for rank, row in enumerate(rows) if row[0] == _RAISED]
        if raised:
            raise ProcessError(
                f"process {raised[0]} has refused this step: see what it has raised. No parameter and no state has "
                "changed"
            )

    @staticmethod
    def _require_same_gradients(rows: Sequence[Sequence[float]]) -> None:
        for index, column in enumerate(zip(*rows, strict=True)):
            if len(set(column)) > 1:
                have = [rank for rank, value in enumerate(column) if value]
                raise ArgumentError(
                    f"parameter {index} of layer_table() has a gradient on processes {have} only; every process must "
                    "train the same parameters in a step: let the loss depend on all of them (DistributedDataParallel "
                    "has find_unused_parameters=True), or freeze them everywhere"
                )

    @staticmethod
    def _require_exchanged(norms: Sequence[float], ranks: Sequence[int], sharded: bool) -> None:
        if max(norms) - min(norms) <= _SAME * max(norms):
            return
        if sharded:
            raise ArgumentError(
                f"processes {list(ranks)} hold the same pieces of all parameters, and gradients that differ (norms "
                f"{', '.join(f'{norm:.6g}' for norm in norms)}), so nobody averages them: let the device mesh of "
                "fully_shard reach over all processes, (copies, pieces) for copies, or build with "
                "process_group=mesh.get_group() for parts of the processes that are for themselves"
            )
        raise ArgumentError(
            f"the gradients of the processes differ (norms {', '.join(f'{norm:.6g}' for norm in norms)}), so "
            "nobody averages them: wrap the model in DistributedDataParallel or shard it with fully_shard, average "
            "them yourself before step(), or build with process_group=None for processes that are for themselves"
        )

    def _doubts(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Of every certified layer, from what all processes have told."""
        found: dict[str, float] = {}
        for index, layer in enumerate(self.layers):
            told = [row[3 * index : 3 * index + 3] for row in rows]
            if any(allowed < 0 for _, allowed, _ in told):
                found[layer.name] = max(doubt if doubt == doubt else float("inf") for doubt, _, _ in told)
            elif any(allowed > 0 for _, allowed, _ in told):  # each holds a piece of the gradient of all
                spoken = [entry for entry, speaks in zip(told, self._speakers, strict=True) if speaks]
                explained = sum(entry[0] for entry in spoken) / len(spoken)
                allowed = sum(entry[1] for entry in spoken) / len(spoken)
                found[layer.name] = abs(explained - sum(entry[2] for entry in told)) / allowed
        return found

    # -- what the owners get -----------------------------------------------------------------------------------------

    def statistics(
        self, own: Mapping[str, LayerStatistics], travels: Mapping[str, Travel], meeting: Meeting
    ) -> dict[str, LayerStatistics]:
        """Records of the joint mini-batch of the layers that this process owns."""
        settled, moments = meeting.settled, meeting.moments
        return brought_together(self.ranks, own, travels, self.owners, meeting.samples, settled, moments)

    def everybodys(
        self, own: Mapping[str, LayerStatistics], travels: Mapping[str, Travel], samples: Mapping[str, Sequence[int]]
    ) -> dict[str, LayerStatistics]:
        """Records of the joint mini-batch, on every process."""
        return brought_together(self.ranks, own, travels, None, samples)

    def weighed(
        self, found: dict[str, LayerStatistics], samples: Mapping[str, Sequence[int]], capture: Backend
    ) -> dict[str, LayerStatistics]:
        """This process's records as parts of the joint loss, where processes have different numbers of samples.

        The joint loss is the mean of the processes' own: each counts 1 / P, whatever its n. A sample's own gradient is
        therefore N / P times the raw one, not n times, and a weight that was read off a gradient N / (P n) times as
        large. The loop may have weighted the losses by n P / N, so that samples count the same; then these are 1.

        Args:
            found: by layer.
            samples: by layer, of every process.
            capture: that recorded them.
        """
        if capture.loss_reduction != "mean" or not any(map(_is_uneven, samples.values())):
            return found
        read = any(reader.found is not None or reader.reads_curvature for reader in capture.readers)
        result = dict(found)
        for name, entry in found.items():
            counts = list(filter(None, samples[name]))
            factor = sum(counts) / (len(counts) * entry.samples)
            changes: dict[str, Any] = {"gradient_scale": entry.gradient_scale * factor}
            if entry.mean_gradient is not None:
                changes["mean_gradient"] = entry.mean_gradient * factor
            for key in ("sampled_gradient", "curvature_roots") if read else ():
                value = getattr(entry, key)
                if value is not None:
                    changes[key] = value * math.sqrt(factor)
            if read and entry.sampled_parameter_gradients is not None:
                scaled = tuple(value * math.sqrt(factor) for value in entry.sampled_parameter_gradients)
                changes["sampled_parameter_gradients"] = scaled
            result[name] = entry.with_fields(**changes)
        return result

    def share_of(self, samples: Mapping[str, Sequence[int]], layer: str) -> float:
        """Which part of a layer's joint samples this process has recorded."""
        counts = samples[layer]
        return counts[self.ranks.rank] / sum(counts)

    def whole(self, parameters: Sequence[tuple[Tensor, int]], values: Sequence[Tensor], what: str) -> list[Tensor]:
        """Whole tensors at the owners of their layers, from the pieces of all.

        Args:
            parameters: with their owners, in the same order everywhere.
            values: of each, laid out over processes like it or otherwise; the whole where it is not sharded.
            what: they are.

        Returns:
            Of each the whole where this process owns it; else what was given.
        """
        sharded = [index for index, (parameter, _) in enumerate(parameters) if is_sharded(parameter)]
        found = list(values)
        if not sharded:
            return found
        entries = [
            Entry(*parameters[index], full_precision(_piece(parameters[index][0], values[index]))) for index in sharded
        ]
        for index, value in zip(sharded, self.pieces.to_owners(entries, what), strict=True):
            if value is not None:
                found[index] = value
        return found

    def owner(self, block: Block) -> int:
        """The process that owns a block; this one where all do."""
        return self.ranks.rank if self.owners is None else self.owners[block.layer.name]

    # -- what everybody gets -----------------------------------------------------------------------------------------

    def spread(self, own: Mapping[str, Spread], moving: Sequence[Block], recalls: bool, complete: bool) -> list[Spread]:
        """Directions of all blocks on every process.

        Args:
            own: of the blocks that this process owns, by key, whole.
            moving: all blocks that take part, in the same order everywhere.
            recalls: whether last steps go with them.
            complete: whether every process needs the whole of them; else of sharded parameters its piece.
        """
        if self.owners is None:
            return [own[block.key] for block in moving]
        items: list[tuple[Block, int, Tensor | None]] = []
        for block in moving:
            mine = own.get(block.key)
            values = [None] * (len(block.names) * (1 + recalls)) if mine is None else [*mine.directions, *mine.lasts]
            pairs = zip(block.parameters * (1 + recalls), values, strict=True)
            items += [(block, index % len(block.names), value) for index, (_, value) in enumerate(pairs)]
        found: list[Tensor] = [None] * len(items)  # type: ignore[list-item]
        cut = [index for index, (block, n, _) in enumerate(items) if is_sharded(block.parameters[n]) and not complete]
        entries = [Entry(items[i][0].parameters[items[i][1]], self.owner(items[i][0]), items[i][2]) for i in cut]
        for index, value in zip(cut, self.pieces.from_owners(entries, "directions") if cut else (), strict=True):
            found[index] = value
        left = sorted(set(range(len(items))) - set(cut))
        for index, value in zip(left, self._broadcast([items[index] for index in left]), strict=True):
            found[index] = value
        result: list[Spread] = []
        position = 0
        for block in moving:
            count = len(block.names)
            directions = tuple(found[position : position + count])
            lasts = tuple(found[position + count : position + 2 * count]) if recalls else ()
            mine = own.get(block.key)
            if mine is not None:  # its own memory, not what was sent
                lasts = mine.lasts
            result.append(Spread(block, directions, lasts))
            position += count * (1 + recalls)
        return result

    def _broadcast(self, items: Sequence[tuple[Block, int, Tensor | None]]) -> list[Tensor]:
        """Whole tensors on every process, from their owners: one flat tensor per owner and precision."""
        result: list[Tensor] = [None] * len(items)  # type: ignore[list-item]
        grouped: dict[torch.dtype, dict[int, list[int]]] = {}
        for index, (block, _, _) in enumerate(items):
            owner = self.owner(block)
            grouped.setdefault(block.storage[0].dtype, {}).setdefault(owner, []).append(index)
        for dtype, by_owner in grouped.items():
            flat: list[Tensor | None] = []
            for rank in range(self.ranks.count):
                chosen = by_owner.get(rank, [])
                if rank == self.ranks.rank and chosen:
                    values = [items[index][2] for index in chosen]
                    flat.append(torch.cat([value.reshape(-1) for value in values if value is not None]))
                    continue
                size = sum(items[index][0].parameters[items[index][1]].numel() for index in chosen)
                device = items[0][0].parameters[0].device
                flat.append(torch.empty(size, dtype=dtype, device=device) if size else None)
            self.ranks.begin_spread(flat, "directions").wait()
            for rank, chosen in by_owner.items():
                parameters = [items[index][0].parameters[items[index][1]] for index in chosen]
                total = flat[rank]
                assert total is not None
                pieces = total.split([parameter.numel() for parameter in parameters])
                for index, parameter, piece in zip(chosen, parameters, pieces, strict=True):
                    given = items[index][2]
                    result[index] = piece.view(parameter.shape) if given is None else given
        return result

    def here(self, parameter: Tensor, value: Tensor) -> Tensor:
        """What of a direction belongs to this process: its piece, where it was given the whole of a sharded one."""
        if not is_sharded(parameter) or value.shape != parameter.shape:
            return value
        return self.pieces.here(parameter, value)

    def squares(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(K,) squared norms of sharded tensors.

        Args:
            tensors: each with the parameter it is laid out as.
        """
        found = [self.pieces.share(p) * full_precision(local(value)).square().sum() for p, value in tensors]
        return self.ranks.total(torch.stack(found))


def _piece(parameter: Tensor, value: Tensor) -> Tensor:
    """What belongs to this process's piece of a parameter; a collective where the value is laid out otherwise."""
    return local(laid_out(value, parameter))


def _is_uneven(samples: Sequence[int]) -> bool:
    """Whether processes add different numbers of samples."""
    return len(set(filter(None, samples))) > 1


def _told(doubt: Tensor | None, like: Tensor) -> Tensor:
    """Three numbers: explained, allowed and actual of a sharded layer; else the doubt itself, -1 and 0."""
    if doubt is None:
        return like.new_zeros(3)
    if doubt.ndim:
        return doubt.to(like)
    return torch.stack([doubt.to(like), like.new_full((), -1.0), like.new_zeros(())])
