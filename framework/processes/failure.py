"""When a process dies or hangs: an error that names it, within the time-out of the collective that missed it.

A collective that fails says at most with whom a connection broke, and one that is not answered says nothing. The
processes that are left then call the roll: each signs in at the store through which the group was formed and waits for
the others, a part of the group's time-out (:func:`patience`); whoever has not answered by then is named. In a run that
goes well nothing of this is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from ...errors import ProcessError

__all__ = ["absent_from_roll", "attempted", "patience", "tells_of_processes", "time_out"]

Value = TypeVar("Value")

_PART, _LEAST, _LONGEST = 0.1, 5.0, timedelta(minutes=30)


_HALF = (
    "The parameters are those before this step; the state may be half of it, so this optimizer takes no further step "
    "and saves no state"
)


def attempted(
    action: Callable[[], Value],
    what: str,
    group: Any,
    failed: Callable[[], None],
    only_if: Callable[[Exception], bool] = lambda _: True,
    aftermath: str = _HALF,
) -> Value:
    """Run a collective.

    Args:
        action: the collective, waited for.
        what: it is for, for the message.
        group: the processes that take part; ``None``: all.
        failed: called before the error is raised.
        only_if: whether an error is one of an exchange; any other is let through.
        aftermath: what has become of the optimizer, for the message.

    Raises:
        ProcessError: if it fails, naming the processes that have not been heard of.
    """
    try:
        return action()
    except (RuntimeError, ConnectionError) as error:  # torch's DistBackendError and DistNetworkError are RuntimeErrors
        if not only_if(error):
            raise
        failed()
        seconds = patience(group)
        absent = absent_from_roll(group, seconds)
        who = f"process {absent[0]}" if len(absent) == 1 else f"processes {', '.join(map(str, absent))}"
        late = f"{who} did not answer within {seconds:g} s (dead, hanging, or busy for longer than that)"
        raise ProcessError(
            f"the exchange of {what} between processes failed: {late if absent else 'every process still answers'}. "
            f"{aftermath}. Start again from the last checkpoint, on as many processes as are left. The time after "
            "which a missing process is noticed is the timeout of torch.distributed.init_process_group; for an answer "
            "to this error a part of it is waited. "
            f"What was reported: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error


_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "timeout", "broken pipe")


def tells_of_processes(error: Exception) -> bool:
    """Whether an error of the user's evaluation comes from an exchange inside it, as DDP and FSDP2 make them."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
    )


def time_out(group: Any) -> timedelta | None:
    """After which the collectives of a group fail; ``None`` where its backend does not say.

    Args:
        group: the processes; ``None``: all.
    """
    chosen: Any = group if group is not None else distributed.group.WORLD
    for device in chosen._device_types:
        try:
            limit = getattr(chosen._get_backend(device).options, "_timeout", None)
        except (RuntimeError, AttributeError):
            continue
        if limit is not None:
            found: timedelta = limit
            return found
    return None


def patience(group: Any) -> float:
    """Seconds for which an answer is waited for once a collective has failed here: a tenth of the group's time-out.

    At least 5 s, but no longer than the time-out itself. A process that is busy elsewhere, in its own evaluation say,
    answers when it comes to its next exchange.

    Args:
        group: the processes; ``None``: all.
    """
    limit = (time_out(group) or _LONGEST).total_seconds()
    return max(_PART * limit, min(limit, _LEAST))


def absent_from_roll(group: Any, seconds: float) -> list[int]:
    """Ranks of the processes that do not sign in.

    Args:
        group: the processes; ``None``: all.
        seconds: for which they are waited for.
    """
    ranks = distributed.get_process_group_ranks(group if group is not None else distributed.group.WORLD)
    own = distributed.get_rank()
    missing = [rank for rank in ranks if rank != own]
    try:
        store = distributed.distributed_c10d._get_default_store()
        key = "osculate/roll"
        store.set(f"{key}/{own}", "here")
        end = time.monotonic() + seconds
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
            time.sleep(0.05)
        if own == 0:  # it keeps the store: leave those who came later time to read
            time.sleep(1.0)
        return missing
    except (RuntimeError, ConnectionError):
        # The store lives with the first process. If that had signed in it has read what it wanted to, and left.
        return [0] if 0 in missing or 0 not in ranks else missing
