"""One process and many: what comes out of 2 and of 4, in every way to divide the work, is what one process makes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import osculate as osc
import pytest
import torch
from process_runs import started
from process_worker import SITUATIONS, STEPS, cases, names, run, situation, situations
from small_nets import leaves

PARAMETERS, STATE = 1e-10, 1e-10
SINGLE = 2e-4  # of single precision


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saved."""
    return started("process_worker.py", 2, tmp_path_factory)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four processes saved."""
    return started("process_worker.py", 4, tmp_path_factory)


@cache
def alone(name: str) -> dict[str, Any]:
    """The same run in one process."""
    return situation(name, "one") if name in SITUATIONS else run(name, "one")


def merged(ranks: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The states of all processes; where several have the same they must agree."""
    found: dict[str, Any] = {}
    for rank in ranks:
        for name, value in rank[key].items():
            if name in found:
                close(value, found[name], STATE)
            found[name] = value
    return found


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal numbers and tensors in the same places."""
    left, right = leaves({"": found}), leaves({"": expected})
    assert set(left) == set(right)
    for path, value in right.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
            assert torch.isfinite(value).all(), path
            difference = float((left[path] - value).abs().max()) if value.numel() else 0.0
            assert difference <= tolerance * scale, f"{path}: {difference}"
        elif isinstance(value, torch.Tensor):
            assert torch.equal(left[path], value), path
        else:
            assert left[path] == pytest.approx(value, rel=max(1e-9, tolerance), abs=tolerance), path


def compare(ranks: list[dict[str, Any]], name: str, way: str, tolerance: float = PARAMETERS) -> None:
    found = [rank[f"{name}: {way}"] for rank in ranks]
    for rank in found:
        assert "raised" not in rank, rank.get("raised")
    expected = alone(name)
    for rank in found:
        close(rank["parameters"], expected["parameters"], tolerance)
        close(rank["losses"], expected["losses"], tolerance)
        close(rank["rule"], expected["rule"], tolerance)
    close(merged(found, "state"), expected["state"], tolerance)
    close(merged(found, "lasts"), expected["lasts"], tolerance)


@pytest.mark.parametrize(("name", "way"), cases(2))
def test_two_processes_are_one(two: list[dict[str, Any]], name: str, way: str) -> None:
    """Parameters, losses and every tensor of the state after 20 steps, to 1e-10."""
    compare(two, name, way)


@pytest.mark.parametrize(("name", "way"), cases(4))
def test_four_processes_are_one(four: list[dict[str, Any]], name: str, way: str) -> None:
    """The same; also on meshes of two dimensions."""
    compare(four, name, way)


@pytest.mark.parametrize(("world", "name", "way"), [(world, *entry) for world in (2, 4) for entry in situations(world)])
def test_odd_models_and_loops(request: pytest.FixtureRequest, world: int, name: str, way: str) -> None:
    """Other compositions, networks, losses and loops."""
    ranks = request.getfixturevalue({2: "two", 4: "four"}[world])
    compare(ranks, name, way, SINGLE if "dtype" in SITUATIONS[name] else PARAMETERS)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", names())
def test_owners_share_the_states(request: pytest.FixtureRequest, world: int, name: str) -> None:
    """Each block has one owner, and every process that has a layer has the same of it."""
    ranks = request.getfixturevalue({2: "two", 4: "four"}[world])
    for way in ("owners", "fsdp"):
        owned = [set(rank[f"{name}: {way}"]["state"]) for rank in ranks]
        assert sum(map(len, owned)) == len(set().union(*owned)) == len(alone(name)["state"])


@pytest.mark.parametrize("world", [2, 4])
def test_moments_set_out_early(request: pytest.FixtureRequest, world: int) -> None:
    """From the second step on, behind the backward pass; not while micro-batches are accumulated, nor as rows."""
    ranks = request.getfixturevalue({2: "two", 4: "four"}[world])
    for rank in ranks:
        for way in ("replicated", "owners", "fsdp"):
            assert rank[f"kfac: {way}"]["early"] == STEPS - 1
            assert rank[f"kbfgs: {way}"]["early"] == STEPS - 1
            assert rank[f"ekfac: {way}"]["early"] is None
            assert rank[f"accumulated, kfac: {way}"]["early"] == 0


def test_nobody_compares_nothing() -> None:
    """The runs above are not empty."""
    assert len(names()) >= 26 and {"kbfgs", "kbfgs-l", "kfac", "mbf", "soap", "muon"} <= set(names())
    left = set(osc.registry.methods()) - set(names())
    for name in left:
        method = osc.registry.method(name)
        assert osc.Needs.PRODUCTS in method.measures_at(None) | method.asks
    assert isinstance(alone("kfac")["parameters"], Mapping)
