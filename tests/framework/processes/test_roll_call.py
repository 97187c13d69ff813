"""Who answers after an exchange has failed, how long they are waited for, and what a broken-off evaluation has sent."""

from __future__ import annotations

from datetime import timedelta
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
from osculate.framework.processes import exchanges, failure
from osculate.framework.processes.exchanges import Exchanges
from osculate.framework.processes.failure import absent_from_roll, patience, time_out
from torch import distributed


def group_with(limit: float | None) -> Any:
    """A process group whose second backend says after how many seconds its collectives fail."""
    options = SimpleNamespace() if limit is None else SimpleNamespace(_timeout=timedelta(seconds=limit))

    def backend(device: str) -> Any:
        if device == "none":
            raise RuntimeError("no backend for this device")
        return SimpleNamespace(options=options)

    return SimpleNamespace(_device_types=["none", "cpu"], _get_backend=backend)


@pytest.mark.parametrize(("limit", "seconds"), [(3600, 360), (600, 60), (60, 6), (50, 5), (6, 5), (2, 2), (None, 180)])
def test_an_answer_is_waited_for_as_the_time_out_allows(limit: float | None, seconds: float) -> None:
    """A tenth of it, but five seconds where it has as many; of a backend that does not say: of half an hour."""
    assert patience(group_with(limit)) == pytest.approx(seconds)
    assert time_out(group_with(limit)) == (None if limit is None else timedelta(seconds=limit))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """That of three processes, of which this is the second."""
    made = distributed.HashStore()
    monkeypatch.setattr(failure.distributed, "get_process_group_ranks", lambda group: [0, 1, 2])
    monkeypatch.setattr(failure.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(failure.distributed.distributed_c10d, "_get_default_store", lambda: made)
    return made


@pytest.mark.parametrize("late", [[], [0], [2], [0, 2]])
def test_who_is_slow_answers_in_time(store: Any, late: list[int]) -> None:
    """Only those that do not answer at all are named; if everybody does, nobody waits to the end."""
    timers = [Timer(0.1, store.set, (f"osculate/roll/{rank}", "here")) for rank in late]
    for timer in timers:
        timer.start()
    missing = absent_from_roll("theirs", 20.0 if len(late) == 2 else 0.5)
    for timer in timers:
        timer.join()
    assert missing == [rank for rank in (0, 2) if rank not in late]


def test_a_store_that_is_gone_went_with_the_first_process(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless that had answered before: then those are named that it has not heard of either."""

    def gone(*_: Any) -> None:
        raise distributed.DistNetworkError("connection reset by peer")

    broken = SimpleNamespace(set=gone, check=gone)
    monkeypatch.setattr(failure.distributed.distributed_c10d, "_get_default_store", lambda: broken)
    assert absent_from_roll("theirs", 1.0) == [0]
    answers = iter([True, False])  # of processes 0 and 2, and then no more
    broken.set, broken.check = print, lambda keys: next(answers)
    monkeypatch.setattr(failure.time, "sleep", gone)
    assert absent_from_roll("theirs", 1.0) == [2]


@pytest.mark.parametrize(
    ("made", "now", "complete"),
    [
        ([1, 3, 1, 1], 1, True),
        ([1, 3, 1, 1], 0, False),  # before its exchanges
        ([2, 2, 2], 1, False),  # between the two
        ([1, 3], 1, False),  # nobody knows yet how many an evaluation makes
        ([1], 1, False),
        ([], 0, False),
        ([0, 0], 0, False),  # its exchanges are made elsewhere
    ],
)
def test_an_evaluation_that_has_made_as_many_exchanges_as_the_last_two_is_over(
    monkeypatch: pytest.MonkeyPatch, made: list[int], now: int, complete: bool
) -> None:
    """Counted in every group once."""
    numbers = {"world": 7, "own": 5}
    groups = [SimpleNamespace(group_name=name) for name in ("world", "own", "own")]

    def resolved(name: str) -> Any:
        return SimpleNamespace(_get_sequence_number_for_group=lambda: numbers[name])

    monkeypatch.setattr(exchanges, "_resolved", resolved)
    counted = Exchanges(groups, [])
    for index, count in enumerate(made):
        counted.begin()
        numbers["own"] += count
        counted.end(index)  # of whatever kind: no parameter is sharded
    counted.begin()
    numbers["own"] += now
    assert counted.complete("another kind") is complete
