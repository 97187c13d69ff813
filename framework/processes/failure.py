"""When a process dies or hangs: an error that names it, within the time-out of the collective that missed it.

A collective that fails says at most with whom a connection broke, and one that is not answered says nothing. The
processes that are left then call the roll: each signs in at the store through which the group was formed and waits a
moment for the others; whoever is missing is named. In a run that goes well nothing of this is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from ...errors import ProcessError

__all__ = ["attempted", "tells_of_processes"]

Value = TypeVar("Value")

_PATIENCE = 5.0
"""Seconds for which the others are waited for, once a collective has failed here."""


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
        absent = _absent(group)
        who = f"process {absent[0]} has" if len(absent) == 1 else f"processes {', '.join(map(str, absent))} have"
        found = f"{who} died or hangs" if absent else "every process still answers"
        raise ProcessError(
            f"the exchange of {what} between processes failed: {found}. {aftermath}. Start again from the last "
            "checkpoint, on as many processes as are left. The time after which a missing process is noticed is the "
            "timeout of torch.distributed.init_process_group. "
            f"What was reported: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error


_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "timeout", "broken pipe")


def tells_of_processes(error: Exception) -> bool:
    """Whether an error of the user's evaluation comes from an exchange inside it, as DDP and FSDP2 make them."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
    )


def _absent(group: Any) -> list[int]:
    """Ranks of the processes that do not sign in."""
    ranks = distributed.get_process_group_ranks(group if group is not None else distributed.group.WORLD)
    own = distributed.get_rank()
    try:
        store = distributed.distributed_c10d._get_default_store()
        key = "osculate/roll"
        store.set(f"{key}/{own}", "here")
        missing = [rank for rank in ranks if rank != own]
        end = time.monotonic() + _PATIENCE
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
            time.sleep(0.05)
        # Whoever came later than this process waits for nobody else: leave it time to read the list.
        store.wait([f"{key}/{own}"], timedelta(seconds=1))
        return missing
    except (RuntimeError, ConnectionError):
        return [ranks[0]]  # the store lives with the first process
