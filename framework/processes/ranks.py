"""The processes that share a mini-batch, and the collectives by which they speak.

Every collective goes through here: it is counted by what it carries, waited for, and fails with an error that names who
is missing. Parts of methods know nothing of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import ArgumentError, ProcessError
from .failure import attempted, patience, tells_of_processes

__all__ = ["Pending", "Ranks", "unwrapped"]


def unwrapped(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The module inside ``torch.compile`` and ``DistributedDataParallel``, and the latter if there is one."""
    wrapper: DistributedDataParallel | None = None
    while True:
        if isinstance(model, DistributedDataParallel):
            wrapper = model
            model = wrapper.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model, wrapper


def _portable(group: Any) -> Any:
    """A process group in a copy: the world's by its word, since groups do not pickle."""
    return "auto" if distributed.is_initialized() and group is distributed.group.WORLD else group


class Pending:
    """Collectives that have begun.

    Args:
        ranks: whose.
        handles: of torch.
        what: they carry.
        finish: makes the result, when all are over.
    """

    def __init__(self, ranks: Ranks, handles: Sequence[Any], what: str, finish: Callable[[], Any]):
        self._ranks, self._handles, self._what, self._finish = ranks, handles, what, finish

    def wait(self) -> Any:
        """The result.

        Raises:
            ProcessError: if a process is missing.
        """
        self._ranks.attempt(lambda: [handle.wait() for handle in self._handles], self._what)
        return self._finish()


class Ranks:
    """The processes that share a mini-batch.

    Args:
        group: ``"auto"``: that of the wrapper, or the world group while ``torch.distributed`` is initialised; ``None``:
            every process for itself; or a process group.
        wrapper: the ``DistributedDataParallel`` around the model, whose gradient exchange a look back must suspend.

    Attributes:
        traffic: bytes that this process has had to send, by what they carried, since the counter was last cleared: a
            reduction to one process and a broadcast cost n (P - 1) / P each, where all take turns, a reduction to all
            2 n (P - 1) / P, a gathering what is sent to the others.
        broken: why no further step is possible.
    """

    def __init__(self, group: Any, wrapper: DistributedDataParallel | None):
        if isinstance(group, str | int | float) and group != "auto":
            raise ArgumentError(f"process_group must be 'auto', None or a process group, got {group!r}")
        own = None if wrapper is None else wrapper.process_group
        if isinstance(group, str) and own is not None and own is not distributed.group.WORLD:
            group = own  # those who exchange gradients
        self.group, self.wrapper = group, wrapper
        self.traffic: Counter[str] = Counter()
        self.broken: str | None = None
        self._side: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The model of a copy is not wrapped."""
        group = self.group if self.group is None or isinstance(self.group, str) else _portable(self.group)
        return {"group": group, "wrapper": None, "traffic": Counter(), "broken": self.broken, "_side": None}

    @property
    def known(self) -> bool:
        """Whether there is a group at all."""
        return self.group is not None and distributed.is_available() and distributed.is_initialized()

    @property
    def count(self) -> int:
        """How many they are; 1 outside distributed training."""
        return distributed.get_world_size(self._group) if self.known else 1

    @property
    def rank(self) -> int:
        """Which one this process is."""
        return distributed.get_rank(self._group) if self.known else 0

    @property
    def _group(self) -> Any:
        return None if isinstance(self.group, str) else self.group

    @property
    def groups(self) -> list[Any]:
        """In which gradients are exchanged: the processes' own, and that of the wrapper."""
        own = [] if not self.known else [self._group if self._group is not None else distributed.group.WORLD]
        return own if self.wrapper is None else [*own, self.wrapper.process_group]

    def silent(self) -> AbstractContextManager[None]:
        """Context of a pass whose gradients are not exchanged."""
        context: AbstractContextManager[None] = nullcontext() if self.wrapper is None else self.wrapper.no_sync()
        return context

    def require_whole(self) -> None:
        """Check that no exchange has failed before.

        Raises:
            ProcessError: if one has.
        """
        if self.broken is not None:
            raise ProcessError(
                f"the exchange of {self.broken} between processes failed in an earlier step, and the state of this "
                "optimizer may be half of that step; start again from the last checkpoint"
            )

    def require_no_join(self) -> None:
        """Check that every process has a mini-batch for every step. Nobody is told: all find it at their first.

        Raises:
            ArgumentError: inside ``DistributedDataParallel.join()``, where some may have run out.
        """
        if getattr(getattr(self.wrapper, "_join_config", None), "enable", False):
            raise ArgumentError(
                "inside DistributedDataParallel.join() a process that has run out of batches takes part in no exchange "
                "of statistics; give all processes as many batches (DistributedSampler does, drop_last=True) and leave "
                "join() out"
            )

    def attempt(self, action: Callable[[], Any], what: str) -> Any:
        """Run something that waits for other processes.

        Raises:
            ProcessError: if it fails, naming who is missing.
        """

        def failed() -> None:
            self.broken = what

        return attempted(action, what, self._group, failed)

    def evaluating(self, closure: Callable[[], Any]) -> Any:
        """Run the user's closure, in which DDP and FSDP2 exchange gradients.

        Raises:
            ProcessError: if that fails, naming who is missing.
        """
        aftermath = "No parameter and no state has changed"
        return attempted(closure, "gradients", self._group, lambda: None, tells_of_processes, aftermath)

    def _count(self, what: str, values: Tensor, share: float) -> None:
        self.traffic[what] += round(share * values.numel() * values.element_size())

    # -- collectives -------------------------------------------------------------------------------------------------

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        return value if self.count == 1 else self.total(value) / self.count

    def total(self, value: Tensor, what: str = "numbers") -> Tensor:
        """Sum of a tensor over the processes."""
        if self.count == 1:
            return value
        total = value.detach().clone(memory_format=torch.contiguous_format)
        self._count(what, total, 2 * (self.count - 1) / self.count)
        self.attempt(lambda: distributed.all_reduce(total, group=self._group), what)
        return total

    def table(self, row: Tensor) -> list[list[float]]:
        """Rows of all processes, fetched: one synchronisation.

        Args:
            row: of this one, (K,) of float64.
        """
        rows = [torch.empty_like(row) for _ in range(self.count)]
        self._count("numbers", row, self.count - 1)
        self.attempt(lambda: distributed.all_gather(rows, row, group=self._group), "what each process has found")
        found: list[list[float]] = torch.stack(rows).tolist()
        return found

    def leave(self, row: Tensor) -> None:
        """Take part in a :meth:`table` without reading it, because something was raised here.

        The others are waited for as in a roll call, but no longer: what was raised shall be seen.

        Args:
            row: of this one.
        """
        rows = [torch.empty_like(row) for _ in range(self.count)]
        try:
            handle = distributed.all_gather(rows, row, group=self._group, async_op=True)
            handle.wait(timedelta(seconds=patience(self._group)))
        except (RuntimeError, ConnectionError):
            self.broken = "what each process has found"

    def objects(self, value: Any) -> list[Any]:
        """What every process says, for a moment in which nothing is fast: while an optimizer is built or saved."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        self.attempt(lambda: distributed.all_gather_object(found, value, group=self._group), "the layout of the model")
        return found

    def gathered(self, value: Any, to: int) -> list[Any] | None:
        """What every process says, told to one of them; ``None`` elsewhere."""
        found: list[Any] | None = [None] * self.count if self.rank == to else None

        def gather() -> None:
            distributed.gather_object(value, found, group=self._group, group_dst=to)

        self.attempt(gather, "saved states")
        return found

    def open_side(self, device: torch.device) -> None:
        """Make a second group of the same processes, for what is exchanged while DDP and FSDP2 exchange in theirs."""
        main: Any = self._group if self._group is not None else distributed.group.WORLD
        limit = getattr(main._get_backend(device).options, "_timeout", None)
        members = distributed.get_process_group_ranks(main)
        # By its name: a group that somebody holds when the process ends is torn down too late.
        made: Any = distributed.new_group(members, timeout=limit, use_local_synchronization=True)
        self._side = made.group_name

    def begin_totals(self, values: Sequence[Tensor | None], what: str, everyone: bool, early: bool = False) -> Pending:
        """Begin to add up flat tensors, each at its owner: entry r at process r, or each at every process.

        Args:
            values: one per owner, written in place; ``None``: nothing for that owner. Of equal sizes on all processes.
            what: they carry.
            everyone: whether every process gets the sums.
            early: whether this is in the side group, see :meth:`open_side`.
        """
        handles: list[Any] = []
        group: Any = self._group
        if early:
            known: Any = distributed.distributed_c10d
            group = known._resolve_process_group(self._side)

        def begin() -> None:
            for owner, value in enumerate(values):
                if value is None or not value.numel():
                    continue
                self._count(what, value, (1 + everyone) * (self.count - 1) / self.count)
                if everyone:
                    handles.append(distributed.all_reduce(value, group=group, async_op=True))
                else:
                    handles.append(distributed.reduce(value, group_dst=owner, group=group, async_op=True))

        self.attempt(begin, what)
        return Pending(self, handles, what, lambda: list(values))

    def begin_gradient(self, value: Tensor, owner: int | None) -> Any:
        """Begin to add up a gradient at its owner, or at all; returns torch's handle. Inside the user's backward."""
        if owner is None:
            return distributed.all_reduce(value, group=self._group, async_op=True)
        self._count("gradients", value, (self.count - 1) / self.count)
        return distributed.reduce(value, group_dst=owner, group=self._group, async_op=True)

    def begin_spread(self, values: Sequence[Tensor | None], what: str) -> Pending:
        """Begin to spread flat tensors from their owners: entry r from process r to all, in place."""
        handles: list[Any] = []

        def begin() -> None:
            for owner, value in enumerate(values):
                if value is not None and value.numel():
                    self._count(what, value, (self.count - 1) / self.count)
                    handles.append(distributed.broadcast(value, group_src=owner, group=self._group, async_op=True))

        self.attempt(begin, what)
        return Pending(self, handles, what, lambda: list(values))

    def exchange(self, pieces: Sequence[Tensor], sizes: Sequence[int], what: str) -> list[Tensor]:
        """Send a flat tensor to every process, and get one from each.

        Args:
            pieces: entry r is for process r; of one dtype.
            sizes: how many numbers come from each process.
            what: they carry.
        """
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        received = sent.new_empty(sum(sizes))
        elsewhere = sum(piece.numel() for rank, piece in enumerate(pieces) if rank != self.rank)
        self.traffic[what] += elsewhere * sent.element_size()
        self.attempt(
            lambda: distributed.all_to_all_single(
                received, sent, list(sizes), [piece.numel() for piece in pieces], group=self._group
            ),
            what,
        )
        return list(received.split(list(sizes)))
