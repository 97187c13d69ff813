"""Inverses off the critical path: computed beside the following steps, used at the step that their schedule says.

A schedule with a lag makes an inverse a few steps older than it is anyway, and takes its cost out of the step at which
it is due. The matrices are copied at that step (statistics go on writing into them) and handed to one thread of the
optimizer's own; on CUDA also to a stream of its own, which waits for the copies, and for which the step that installs
waits. Which inverse a step uses follows from the schedule alone, never from how long anything took. Other devices have
no streams that torch lets threads choose alike: there inverses are computed at once, and used as late.

What it takes is a processor that has nothing else to do; beside other work on both cores a run was slower with a lag.
Measured: `kfac` with inverses every 20 steps on a network of the MNIST autoencoder's shape, random inputs (16 matrices
of orders 30 to 1001, mini-batches of 64, float32, two threads on two cores that others used too, four cycles each in
turn), lag 0 and 5: the step at which inverses are due took 380 and 213 ms (medians of wall time), a quiet one 195 and
187, all of a cycle 225 and 193 on average; of processor time 136 and 138.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, CompatibilityError
from ...preconditioners.damping.split import SideDamping
from ...preconditioners.linalg import Computed
from ...preconditioners.operations import Request, compute_many
from .blocks import Block

__all__ = ["Lagging", "Pending", "requests_of", "require_may_lag", "restored"]

_Done = tuple[list[Computed], list[tuple[torch.device, torch.cuda.Event]]]


def requests_of(
    blocks: Iterable[Block], sides: Callable[[Block], SideDamping]
) -> tuple[list[tuple[Block, slice]], list[Request]]:
    """What blocks want to be computed: each with its place in one flat list."""
    places: list[tuple[Block, slice]] = []
    flat: list[Request] = []
    for block in blocks:
        start = len(flat)
        flat.extend(block.part.matrices(block.state, sides(block)))
        places.append((block, slice(start, len(flat))))
    return places, flat


def require_may_lag(blocks: Iterable[Block]) -> None:
    """Check that no structure with a lag may throw away what it has learnt since its inverses were begun.

    Raises:
        CompatibilityError: naming the first that may.
    """
    for block in blocks:
        if block.part.schedule.lag and block.asked.looks_back:
            raise CompatibilityError(
                f"{type(block.part).__name__} on {block.layer.name!r} learns from every step, and its schedule has "
                f"lag={block.part.schedule.lag}: an inverse that was begun earlier may overwrite that; take lag=0"
            )


class _Task:
    """Requests of one step, computed in a thread; whoever wants the results first waits."""

    def __init__(self, requests: Sequence[Request], future: Future[_Done] | None, found: list[Computed] | None = None):
        self._requests, self._future, self._found = requests, future, found

    def __getstate__(self) -> dict[str, Any]:
        """Of a finished one: copies do not share what is still being computed."""
        return {"_requests": (), "_future": None, "_found": self.results()}

    def results(self) -> list[Computed]:
        """One per request.

        Raises:
            Exception: what the thread has raised, once; if the results are wanted again, they are computed here.
        """
        if self._found is not None:
            return self._found
        future = self._future
        if future is None:
            self._found = compute_many(self._requests)
        else:
            try:
                self._found, events = future.result()
            except Exception:
                self._future = None
                raise
            for device, event in events:
                torch.cuda.current_stream(device).wait_event(event)
            for value in _tensors(self._found) if events else ():
                if value.is_cuda:
                    value.record_stream(torch.cuda.current_stream(value.device))
        self._requests, self._future = (), None
        return self._found


@dataclass(frozen=True)
class Pending:
    """Inverses of one block that are first used at a later step.

    Attributes:
        block: the block.
        lands: the step.
        task: which computes them, and those of other blocks.
        place: of this block's among the task's results.
    """

    block: Block
    lands: int
    task: _Task
    place: slice

    def results(self) -> list[Computed]:
        """What is to be installed; waits for it."""
        return self.task.results()[self.place]


class Lagging:
    """What one optimizer has begun and not used yet.

    Attributes:
        pending: by key of the block; never two of one block.
    """

    def __init__(self) -> None:
        self.pending: dict[str, Pending] = {}
        self._worker: _Worker | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the thread; what is pending finishes first."""
        return {"pending": self.pending, "_worker": None}

    def begin(self, blocks: Sequence[Block], sides: Callable[[Block], SideDamping], step: int) -> None:
        """Begin the inverses of blocks that have something to compute them of, all in one batched request."""
        places, flat = requests_of([block for block in blocks if block.state.has_gathered], sides)
        if not flat:
            return
        copies = [replace(entry, matrix=entry.matrix.clone(), start=_copied(entry.start)) for entry in flat]
        kinds = {entry.matrix.device.type for entry in copies}
        if kinds <= {"cpu", "cuda"}:
            self._worker = self._worker or _Worker()
            task = _Task(copies, self._worker.begin(copies))
        else:
            task = _Task((), None, compute_many(copies))
        for block, place in places:
            self.pending[block.key] = Pending(block, step + block.part.schedule.lag, task, place)

    def landing(self, step: int, keep: bool) -> list[Pending]:
        """What step ``step`` is to install; waits for it.

        Args:
            step: the step.
            keep: whether the step may be undone: structures are given copies then, since they may write into them.
        """
        found = [entry for entry in self.pending.values() if entry.lands <= step]
        for entry in found:
            entry.task.results()
        if not keep:
            return found
        return [_of_copies(entry) for entry in found]

    def install(self, landed: Sequence[Pending]) -> tuple[int, int]:
        """Give structures the results of :meth:`landing`. Returns (matrices, rescues)."""
        matrices = rescues = 0
        for entry in landed:
            results = entry.results()
            entry.block.part.install(entry.block.state, results)
            matrices, rescues = matrices + len(results), rescues + sum(result.rescues for result in results)
            del self.pending[entry.block.key]
        return matrices, rescues

    def forget(self, blocks: Iterable[Block]) -> None:
        """Drop what newer inverses overtake: a state may be continued with another schedule."""
        if self.pending:
            for block in blocks:
                self.pending.pop(block.key, None)

    def require_nothing_pending(self) -> None:
        """Check that a checkpoint by parameter is whole.

        Raises:
            ArgumentError: if something is pending.
        """
        if self.pending:
            last = max(entry.lands for entry in self.pending.values())
            raise ArgumentError(
                f"inverses that were begun lately are first used at step {last} (lag), and a checkpoint by parameter, "
                "which torch.distributed.checkpoint reads into what a fresh optimizer has, would lose them; save "
                f"after step {last}, or before the inverses are due, or save optimizer.state_dict() "
                "(consolidate_state_dict() first where owners divide the work)"
            )

    def to_dict(self) -> dict[str, Any]:
        """By block, the step and the results, for which it waits; tensors are not copied."""
        return {
            key: {"lands": entry.lands, "results": [vars(result) for result in entry.results()]}
            for key, entry in self.pending.items()
        }

    def close(self) -> None:
        """End the thread; what is pending is kept, so that a state can still be saved."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def restored(blocks: Mapping[str, Block], saved: Mapping[str, Any]) -> dict[str, Pending]:
    """What :meth:`Lagging.to_dict` has told, for the blocks of another optimizer; tensors are copied.

    Raises:
        ArgumentError: if it does not fit a block; nothing has been written.
    """
    found: dict[str, Pending] = {}
    for key, values in saved.items():
        block = blocks[key]
        asked = block.part.matrices(block.state, SideDamping(1.0, 1.0, 1.0))  # for their shapes
        try:
            lands = int(values["lands"])
            results = [Computed(**entry) for entry in values["results"]]
            shapes = [None if result.value is None else tuple(result.value.shape) for result in results]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"the state is damaged: the pending inverses of {key!r} ({error})") from error
        own = [tuple(entry.matrix.shape) for entry in asked]
        if len(own) != len(shapes) or any(a is not None and a != b for a, b in zip(shapes, own, strict=True)):
            raise ArgumentError(
                f"the pending inverses of {key!r} in the saved state have shapes {shapes}, this model needs {own}; "
                "load into an optimizer built for the same model and method"
            )
        given = [_like(result, entry.matrix) for result, entry in zip(results, asked, strict=True)]
        found[key] = Pending(block, lands, _Task((), None, given), slice(0, len(given)))
    return found


class _Worker:
    """One thread, and on every CUDA device one stream."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "osculate-inverses")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, requests: Sequence[Request]) -> Future[_Done]:
        """Compute requests when those before are computed, and what their matrices are copied from is."""
        streams = [self._stream(d) for d in dict.fromkeys(r.matrix.device for r in requests) if d.type == "cuda"]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        for entry in requests if streams else ():
            for value in (entry.matrix, entry.start):
                if value is not None and value.is_cuda:
                    value.record_stream(self._stream(value.device))
        return self._pool.submit(_compute, requests, streams)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        found = self._streams.get(device)
        if found is None:
            torch.linalg.cholesky(torch.ones(1, 1, device=device))  # its library must not be loaded by two threads
            found = self._streams[device] = torch.cuda.Stream(device)
        return found

    def close(self) -> None:
        """End the thread when it is done."""
        self._pool.shutdown(wait=True)


@torch.no_grad()
def _compute(requests: Sequence[Request], streams: Sequence[torch.cuda.Stream]) -> _Done:
    """In the thread: results, and the events after which they are there."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        found = compute_many(requests)
        return found, [(stream.device, stream.record_event()) for stream in streams]


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


def _of_copies(entry: Pending) -> Pending:
    results = [replace(r, value=_copied(r.value), spectrum=_copied(r.spectrum)) for r in entry.results()]
    return replace(entry, task=_Task((), None, results), place=slice(0, len(results)))


def _like(result: Computed, own: Tensor) -> Computed:
    """Copies of saved tensors in the precision and on the device of this optimizer's."""
    value, spectrum = (None if v is None else v.detach().to(own, copy=True) for v in (result.value, result.spectrum))
    return replace(result, value=value, spectrum=spectrum)


def _tensors(results: Iterable[Computed]) -> list[Tensor]:
    return [value for result in results for value in (result.value, result.spectrum) if value is not None]
