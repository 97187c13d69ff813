"""Sharded parameters: which piece each process holds, gradients on their way to the owners and directions back.

Under FSDP2 and tensor parallelism no process has a whole parameter; a structure must see the whole of its layer. So the
owner of a layer gets the pieces of its gradient, and every process gets back its piece of the direction: 1 / P of the
numbers each way, as the pieces are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.layers.sharding import is_managed, is_sharded, piece_of
from ...errors import ArgumentError
from .ranks import Ranks

__all__ = ["Entry", "Pieces", "batch_shares"]


@dataclass(frozen=True)
class Entry:
    """One parameter in an exchange.

    Attributes:
        parameter: which.
        owner: the process that has, or gets, the whole.
        value: what this process has to give: its piece, or as the owner the whole; ``None`` if nothing.
    """

    parameter: Tensor
    owner: int
    value: Tensor | None


class Pieces:
    """Where the pieces of all sharded parameters lie; every process builds the same table.

    Args:
        ranks: the processes.
        parameters: by name, in an order that is the same everywhere.

    Attributes:
        twins: groups of processes that hold the same pieces of all parameters, by two or more; all where none is cut.

    Raises:
        ArgumentError: if a parameter lies on some of the processes only, or in pieces that cannot be told.
    """

    def __init__(self, ranks: Ranks, parameters: Mapping[str, Tensor]):
        self.ranks = ranks
        self._device = next(iter(parameters.values())).device
        own: dict[str, Any] = {}
        for name, parameter in parameters.items():
            if is_sharded(parameter):
                size = parameter.device_mesh.size()  # type: ignore[attr-defined]
                if ranks.count % size:
                    raise ArgumentError(
                        f"parameter {name!r} lies on a mesh of {size} processes, and {ranks.count} share the "
                        "mini-batch; use meshes over equal parts of them"
                    )
                own[name] = piece_of(parameter)
        everywhere = ranks.objects({name: [(s.start, s.stop) for s in piece] for name, piece in own.items()})
        self._named = {name: [tuple(slice(*bounds) for bounds in told[name]) for told in everywhere] for name in own}
        held = [[[(s.start, s.stop) for s in places[r]] for places in self._named.values()] for r in range(ranks.count)]
        groups = [[rank for rank, other in enumerate(held) if other == own] for own in held]
        self.twins = [group for rank, group in enumerate(groups) if group[0] == rank and len(group) > 1]
        self.rekey(parameters)

    def rekey(self, parameters: Mapping[str, Tensor]) -> None:
        """Of a copy: the same of its own parameters, by name."""
        self._places = {id(parameters[name]): places for name, places in self._named.items()}
        self._first = {key: _first_holders(places) for key, places in self._places.items()}

    def __bool__(self) -> bool:
        return bool(self._places)

    def _speaks(self, parameter: Tensor, rank: int) -> bool:
        """Whether a process is the first that holds its piece; copies of it are not sent."""
        return self._first[id(parameter)][rank]

    def share(self, parameter: Tensor) -> float:
        """1 / the number of processes that hold the piece of this one: what its entries count in a sum over all."""
        places = self._places.get(id(parameter))
        return 1.0 / self.ranks.count if places is None else 1.0 / places.count(places[self.ranks.rank])

    def to_owners(self, entries: Sequence[Entry], what: str) -> list[Tensor | None]:
        """The whole tensors, each at its owner, from everybody's pieces; ``None`` elsewhere.

        Args:
            entries: all sharded parameters that take part, in the same order everywhere, with this process's pieces.
            what: they are.
        """
        found: list[Tensor | None] = [None] * len(entries)
        for dtype, chosen in _by_dtype(entries).items():
            pieces: list[list[Tensor]] = [[] for _ in range(self.ranks.count)]
            sizes = [0] * self.ranks.count
            for index in chosen:
                entry = entries[index]
                assert entry.value is not None
                if self._speaks(entry.parameter, self.ranks.rank):
                    pieces[entry.owner].append(entry.value.reshape(-1))
                if entry.owner == self.ranks.rank:
                    for rank, place in enumerate(self._places[id(entry.parameter)]):
                        sizes[rank] += _size(place) if self._speaks(entry.parameter, rank) else 0
            got = self._exchanged(pieces, sizes, dtype, what)
            for index in chosen:
                parameter = entries[index].parameter
                if entries[index].owner != self.ranks.rank:
                    continue
                whole = found[index] = torch.empty(parameter.shape, dtype=dtype, device=self._device)
                for rank, place in enumerate(self._places[id(parameter)]):
                    if self._speaks(parameter, rank):
                        whole[place] = _taken(got, rank, place)
        return found

    def from_owners(self, entries: Sequence[Entry], what: str) -> list[Tensor]:
        """Everybody's pieces of whole tensors that only the owners have.

        Args:
            entries: all sharded parameters that take part, in the same order everywhere; owners give their values.
            what: they are.
        """
        found: list[Tensor] = [entry.parameter for entry in entries]
        for dtype, chosen in _by_dtype(entries).items():
            pieces: list[list[Tensor]] = [[] for _ in range(self.ranks.count)]
            sizes = [0] * self.ranks.count
            for index in chosen:
                entry = entries[index]
                places = self._places[id(entry.parameter)]
                sizes[entry.owner] += _size(places[self.ranks.rank])
                if entry.owner == self.ranks.rank:
                    assert entry.value is not None
                    for rank, place in enumerate(places):
                        pieces[rank].append(entry.value[place].reshape(-1))
            got = self._exchanged(pieces, sizes, dtype, what)
            for index in chosen:
                entry = entries[index]
                found[index] = _taken(got, entry.owner, self._places[id(entry.parameter)][self.ranks.rank])
        return found

    def here(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The part of a whole tensor that belongs to this process's piece of a parameter; a view."""
        places = self._places.get(id(parameter))
        return whole if places is None else whole[places[self.ranks.rank]]

    def _exchanged(
        self, pieces: Sequence[Sequence[Tensor]], sizes: Sequence[int], dtype: torch.dtype, what: str
    ) -> list[Tensor]:
        nothing = torch.empty(0, dtype=dtype, device=self._device)
        return self.ranks.exchange([torch.cat([nothing, *some]) for some in pieces], sizes, what)


def _first_holders(places: Sequence[tuple[slice, ...]]) -> list[bool]:
    """Of every process, whether no earlier one holds the same piece."""
    seen: set[tuple[tuple[int, int], ...]] = set()
    found: list[bool] = []
    for place in places:
        key = tuple((entry.start, entry.stop) for entry in place)
        found.append(key not in seen)
        seen.add(key)
    return found


def _by_dtype(entries: Sequence[Entry]) -> dict[torch.dtype, list[int]]:
    """Places of the entries by the precision in which they travel: that of the states."""
    found: dict[torch.dtype, list[int]] = {}
    for index, entry in enumerate(entries):
        half = entry.parameter.dtype in (torch.float16, torch.bfloat16)
        found.setdefault(torch.float32 if half else entry.parameter.dtype, []).append(index)
    return found


def _size(place: Sequence[slice]) -> int:
    return math.prod(entry.stop - entry.start for entry in place)


def _taken(got: list[Tensor], rank: int, place: Sequence[slice]) -> Tensor:
    """The next piece of what came from one process."""
    size = _size(place)
    piece, got[rank] = got[rank][:size], got[rank][size:]
    shape = [entry.stop - entry.start for entry in place]
    return piece.view(shape)


def batch_shares(model: nn.Module, ranks: Ranks) -> tuple[int, list[bool]]:
    """Which share of the joint mini-batch this process has, and whose shares make up the whole.

    Every process has its own, unless layers are parallelised by tensor parallelism: then processes that differ only
    there see the same samples, and the records of the first of them stand for all.

    Args:
        model: the model.
        ranks: the processes.

    Raises:
        ArgumentError: if processes see shares of batches that are cut differently.
    """
    if not any(map(is_sharded, model.parameters())):
        return ranks.rank, [True] * ranks.count
    own = _data_ranks(model, ranks)
    told = ranks.objects((torch.distributed.get_rank(), own))
    groups = sorted({tuple(group) for _, group in told})
    if len({len(group) for group in groups}) != 1 or sum(map(len, groups)) != ranks.count:
        raise ArgumentError(
            f"the processes share mini-batches in groups {groups}, which are no equal parts of all {ranks.count}; use "
            "one device mesh for all layers"
        )
    return own.index(torch.distributed.get_rank()), [rank in groups[0] for rank, _ in told]


def _data_ranks(model: nn.Module, ranks: Ranks) -> list[int]:
    """The processes that have the other samples, this one included, in order."""
    if ranks.wrapper is not None:
        group: Any = ranks.wrapper.process_group
        return sorted(torch.distributed.get_process_group_ranks(group))
    found: set[int] = set()
    for module in model.modules():
        if is_managed(module):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None:
                    found.update(group.mesh_info.mesh.mesh.flatten().tolist())
    return sorted(found) or [torch.distributed.get_rank()]
