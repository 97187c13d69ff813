"""What goes wrong on one of many processes: all stop, nothing is half written, and somebody is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from process_failures import STEP, TIMEOUT
from process_refusals import CERTIFIED, DISAGREEMENTS, INTERRUPTED, JOINED, RAISES, WAYS, refused
from process_runs import started


@pytest.fixture(scope="session")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes were told."""
    return started("process_refusals.py", 2, tmp_path_factory)


@pytest.mark.parametrize("method", ["kfac", "joint-kfac"])
@pytest.mark.parametrize("name", CERTIFIED)
def test_records_are_certified_in_every_process_and_refused_in_all(
    refusals: list[dict[str, Any]], method: str, name: str
) -> None:
    """Each compares its own records with its own gradient, before the exchange; what one of them sees stops all."""
    one, other = (found[f"{method}: {name}"] for found in refusals)
    assert one == other
    if "zeroed" in name:
        assert "'first', 'last' does not explain" in one
    elif "by hand" in name and "not asked" not in name:
        assert "layers 'first' does not explain" in one
    else:
        assert one == "stepped"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["kfac", "kbfgs", "adam"])
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_what_one_process_finds_stops_all(refusals: list[dict[str, Any]], way: str, method: str, what: str) -> None:
    """No parameter and no state changes anywhere, and the step after it is taken by all."""
    good, bad = (found[f"{way}, {method}: {what}"] for found in refusals)
    for found in (good, bad):
        assert found["same"] and found["moved"], found
        assert found["skipped"] == ("infinite" in what)
    if what.startswith("skipped"):
        assert good["said"] == bad["said"] == "stepped"
    elif "infinite" in what:
        assert all(found["said"].startswith("NumericalError: step 3") for found in (good, bad))
        assert "not finite in layers 0" in bad["said"]
    elif "vanishes" in what:
        assert good["said"] == bad["said"]
        assert "parameter 0 of layer_table() has a gradient on processes [0] only" in good["said"]
    else:
        assert good["said"].startswith("ProcessError: process 1 has refused this step")
        assert bad["said"].startswith("ArgumentError: the closure must return the scalar loss, got a dictionary")


@pytest.mark.parametrize("way", WAYS)
def test_inverses_that_fail_in_a_thread_stop_all(refusals: list[dict[str, Any]], way: str) -> None:
    """Where they are waited for, before anything is written; the step after it computes them anew."""
    good, bad = (found[f"{way}, kfac: {RAISES}"] for found in refusals)
    assert good["same"] and good["moved"] and bad["same"] and bad["moved"]
    assert good["said"].startswith("ProcessError: process 1 has refused this step")
    assert bad["said"] == "MemoryError: no room for this matrix"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("method", "when"), INTERRUPTED)
def test_what_a_closure_raises_after_its_exchanges_is_told(
    refusals: list[dict[str, Any]], way: str, method: str, when: str
) -> None:
    """Before, nobody is told: the others wait for its gradients, and get them if it tries again. All go on then."""
    good, bad = (found[f"{way}, {method}: raises {when}"] for found in refusals)
    if when == "before its backward":
        assert good["said"] == "stepped" and bad["said"] == "OwnError: no data"
    else:
        assert good["said"].startswith("ProcessError: process 1 has refused this step: see what it has raised")
        assert bad["said"] == "OwnError: no disk"
    assert good["same"] and bad["same"]
    for one, two in zip(good["parameters"], bad["parameters"], strict=True):
        assert torch.equal(one, two) and one.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_overflow_skips_the_step_on_all_or_is_refused(
    refusals: list[dict[str, Any]], way: str, everywhere: bool
) -> None:
    """A GradScaler looks at this process's own gradients; over pieces torch lets all know what one has found."""
    for found in (rank[f"{way}: overflown everywhere: {everywhere}"] for rank in refusals):
        assert found["same"]
        if everywhere or way == "fsdp":
            assert found["said"] == ["stepped", "the GradScaler found a gradient that is not finite", "stepped"]
        else:
            assert "processes [1] have a GradScaler that found a gradient that is not finite" in found["said"][1]


def test_who_has_raised_waits_no_longer_than_for_a_roll_call(refusals: list[dict[str, Any]]) -> None:
    """Where the others do not come to the table after all, and it takes no further step."""
    other, one = (found["left alone"] for found in refusals)
    assert one["broken"] == "what each process has found" and other["broken"] is None
    assert 0.9 < one["seconds"] < 30


@pytest.mark.parametrize(("method", "counts"), JOINED)
def test_join_is_refused_and_nobody_hangs(refusals: list[dict[str, Any]], method: str, counts: tuple[int, int]) -> None:
    """On every process at its first step; one that has no mini-batch leaves when the others do."""
    for found, count in zip(refusals, counts, strict=True):
        told = found[f"{method}: join of {counts}"]
        assert told["same"]
        assert told["said"] == "never stepped" if not count else "give all processes as many batches" in told["said"]


SAID = {
    "fsdp, packed attention": "'(root)', a MultiheadAttention itself",
    "fsdp, ignored parameters": "'0.weight' is outside of fully_shard",
    "fsdp, replicated": "does not go with sharded parameters",
    "fsdp, func": "backend='func' runs the layers itself",
    "fsdp, each for itself": "'0.weight' is sharded over processes, and process_group=None",
    "owners-only, hook taken": "the communication hook of DistributedDataParallel, which is taken",
    "owners-only, not wrapped": "the model is not wrapped",
    "Hessian products": "products with the Hessian of the joint mini-batch",
    "a warm start that ends early": "processes [1] have come to the end of what warm_start was given",
    "a state for nobody": "to must be the number of a process, 0 to 1, got 2",
    "nobody averages": "so nobody averages them: wrap the model in DistributedDataParallel",
    "nobody averages over meshes": "processes [0, 1] hold the same pieces of all parameters, and gradients that differ",
    "unfrozen inside DistributedDataParallel": "the gradients of the processes differ",
    "ignored by DistributedDataParallel": "does not exchange the gradient of parameter '0.weight'",
    "owners-only, scaled": "a GradScaler would take every step for an overflow",
    "a part of a state": "owns 1 of 2 blocks and has no other's state; call optimizer.consolidate_state_dict",
}


@pytest.mark.parametrize("name", refused())
def test_what_cannot_be_right_is_refused_by_name(refusals: list[dict[str, Any]], name: str) -> None:
    """On every process, when it is built, with the way out."""
    for found in refusals:
        assert SAID[name] in found[f"refused: {name}"]


LOST = [("dies", "owners", "evaluation"), ("dies", "owners", "exchange"), ("dies", "fsdp", "evaluation")]
LOST += [("hangs", "replicated", "evaluation"), ("hangs", "owners", "exchange")]


@pytest.mark.parametrize(("how", "way", "where"), LOST)
def test_a_process_that_is_lost_is_named(
    tmp_path_factory: pytest.TempPathFactory, how: str, way: str, where: str
) -> None:
    """Within the time-out of the group, with parameters as they were before the step."""
    found = started("process_failures.py", 3, tmp_path_factory, how, way, where, lost=[1], seconds=120)
    for rank in (0, 2):
        assert found[rank], "nobody noticed"
        assert found[rank]["step"] == STEP and found[rank]["same"]
        assert "process 1 did not answer within 5 s" in found[rank]["said"], found[rank]["said"]
        assert found[rank]["seconds"] < 3 * TIMEOUT + 20
        assert "process" in found[rank]["again"]
