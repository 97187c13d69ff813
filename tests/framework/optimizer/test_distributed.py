"""DistributedDataParallel with two gloo processes: what comes out is what one process makes of the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import osculate as osc
import pytest
import torch
from distributed_worker import cases, run
from small_nets import build, differences, leaves, make

WORKER = Path(__file__).resolve().parents[2] / "distributed_worker.py"
CERTIFICATES = WORKER.with_name("distributed_certificates.py")
CASES = cases()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes saved."""
    return saved(WORKER, tmp_path_factory.mktemp("ranks"))


def saved(script: Path, folder: Path) -> list[dict[str, Any]]:
    """Run two processes; what each of them saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [
        [sys.executable, str(script), str(rank), "2", str(folder / "init"), str(folder / str(rank))] for rank in (0, 1)
    ]
    started = [subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for line in words]
    for process in started:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return [torch.load(folder / str(rank), weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{name}-{net}" for name, net, _ in CASES])
def test_two_processes_are_one_with_the_joint_batch(ranks: list[dict[str, Any]], index: int) -> None:
    """Parameters, losses and every tensor of the state, to rounding."""
    joint = run(*CASES[index], slice(None), False)
    for rank in ranks:
        found = rank["results"][index]
        close(found["parameters"], joint["parameters"])
        close(found["state"], joint["state"])
        close({"losses": found["losses"]}, {"losses": joint["losses"]})


def close(found: Any, expected: Any) -> None:
    left, right = leaves(found), leaves(expected)
    assert set(left) == set(right)
    for path, value in right.items():
        if isinstance(value, torch.Tensor):
            # eigenvectors of nearly equal eigenvalues turn with the last digits of the matrix
            scale = max(1.0, float(value.abs().max())) * (1e4 if "basis" in path or "moments" in path else 1.0)
            torch.testing.assert_close(
                left[path], value, rtol=1e-10, atol=1e-10 * scale, msg=lambda m, p=path: f"{p}: {m}"
            )
        else:
            assert left[path] == pytest.approx(value), path


def test_all_ranks_hold_the_same_states(ranks: list[dict[str, Any]]) -> None:
    for one, other in zip(ranks[0]["results"], ranks[1]["results"], strict=True):
        assert differences(one["parameters"], other["parameters"]) == []
        close(one["state"], other["state"])


def test_accumulation_without_exchange_counts_every_micro_batch(ranks: list[dict[str, Any]]) -> None:
    joint = run("kfac", "mlp", {"statistics": "empirical"}, slice(None), False)
    for rank in ranks:
        close(rank["accumulated"]["parameters"], joint["parameters"])
        close(rank["accumulated"]["state"], joint["state"])


def test_without_a_group_every_process_is_for_itself(ranks: list[dict[str, Any]]) -> None:
    for index, rank in enumerate(ranks):
        own = run("kfac", "mlp", {"statistics": "empirical"}, slice(index * 8, index * 8 + 8), False)
        close(rank["alone"]["parameters"], own["parameters"])


def test_each_rank_draws_its_own_labels(ranks: list[dict[str, Any]]) -> None:
    for one, other in zip(ranks[0]["results"], ranks[1]["results"], strict=True):
        assert one["labels"] != other["labels"]


def test_records_are_certified_in_every_process_and_refused_in_all(tmp_path: Path) -> None:
    """Each compares its own records with its own gradient, before the exchange; what one of them sees stops all."""
    one, other = saved(CERTIFICATES, tmp_path)
    assert one == other and len(one) == 22
    for name, said in one.items():
        if "zeroed" in name:
            assert "'first', 'last' does not explain" in said, (name, said)
        elif "by hand" in name and "not asked" not in name:
            assert "layers 'first' does not explain" in said, (name, said)
        else:
            assert said == "stepped", (name, said)


def test_a_wrong_group_is_refused() -> None:
    with pytest.raises(osc.ArgumentError, match="process_group must be 'auto', None or a process group, got 'world'"):
        build("kfac", make(), process_group="world")
