"""What processes send and keep is, byte by byte, what the formula says; and the work is divided as it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from osculate.curvature.layers.discovery import discover_layers
from osculate.errors import ArgumentError
from osculate.experiments.runs.sharing import NETWORKS, forecast, outline
from osculate.framework.methods import registry
from osculate.framework.optimizer.forecast import Laid, rows_of, traffic_of_wrapper
from osculate.framework.processes.ownership import owners_of
from process_bench import METHODS, cases
from process_runs import started
from torch import nn


@pytest.fixture(scope="session")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, Any]]]]:
    """What each of 2 and of 4 processes has counted."""
    return {world: started("process_bench.py", world, tmp_path_factory) for world in (2, 4)}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("index", range(len(cases())), ids=lambda index: "-".join(map(str, cases()[index].key)))
def test_counted_is_foreseen(counted: dict[int, list[list[dict[str, Any]]]], world: int, index: int) -> None:
    """Statistics, gradients, directions, numbers and state of every process: equal, not nearly."""
    for found, foreseen in zip(counted[world], forecast(cases()[index], world), strict=True):
        by_wrapper = {name for name in foreseen["traffic"] if " of " in name}
        sent = {name: value for name, value in found[index]["traffic"].items() if value}
        assert sent == {name: value for name, value in foreseen["traffic"].items() if name not in by_wrapper}
        assert found[index]["state"] == foreseen["state"]
        assert not found[index]["shortened"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_owners_only_sends_no_more_than_gradients_and_moments(
    counted: dict[int, list[list[dict[str, Any]]]], world: int, method: str
) -> None:
    """Gradients to the owners, directions back, statistics once: DDP's own exchange and the moments."""
    (index,) = [i for i, case in enumerate(cases()) if case.key == ("small-autoencoder", method, "owners-only", 16)]
    sent = [sum(v for k, v in rank[index]["traffic"].items() if k != "numbers") for rank in counted[world]]
    allowed = forecast(cases()[index], world)[0]["allowed"]
    if method == "joint-kfac-momentum":  # spreads its last steps beside its directions
        numbers = sum(p.numel() for p in NETWORKS["small-autoencoder"].make().parameters())
        allowed += cases()[index].steps * 4 * numbers * (world - 1) / world
    rounding = 2 * cases()[index].steps * 16
    assert 0 < sum(sent) / world <= allowed + rounding


def share_of_busiest(network: str, method: str, count: int) -> tuple[float, float]:
    """Inverse work of the busiest process over the P-th part; and what no division by layers can be below.

    Somebody has k + 1 of the k P + 1 dearest layers, for every k.
    """
    known = NETWORKS[network]
    example = torch.empty(2, *known.shape, device="meta")
    work = outline(known.make().to("meta"), example, registry.method(method)).work
    owners = owners_of(work, count)
    loads = [sum(entry.inverses for name, entry in work.items() if owners[name] == rank) for rank in range(count)]
    part = sum(loads) / count
    dearest = sorted((entry.inverses for entry in work.values()), reverse=True)
    least = [sum(dearest[k * count - k : k * count + 1]) for k in range((len(dearest) - 1) // count + 1)]
    return max(loads) / part, max(part, *least) / part


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("network", ["mnist-autoencoder", "resnet-32"])
@pytest.mark.parametrize("method", ["kfac", "kfac-conv", "joint-kfac", "ekfac", "shampoo", "tnt", "soap", "mbf"])
def test_nobody_inverts_much_more_than_his_part(network: str, method: str, count: int) -> None:
    """At most 1.25 / P of all inverse work, from shapes alone."""
    assert 1.0 <= share_of_busiest(network, method, count)[0] <= 1.25


@pytest.mark.parametrize("network", ["mnist-autoencoder", "resnet-32"])
@pytest.mark.parametrize("method", ["kfac", "shampoo", "soap", "kbfgs"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_or_no_division_by_layers_does_better(network: str, method: str, count: int) -> None:
    """K-BFGS has 36 % of its inverse work in one matrix of the autoencoder, ResNet-32 ten layers of one size."""
    busiest, bound = share_of_busiest(network, method, count)
    assert busiest <= 1.06 * bound + 1e-9


def test_rows_are_those_of_the_layers() -> None:
    """A kernel's inputs count before they are unfolded."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5)).to("meta")
    found = rows_of(model, discover_layers(model), torch.empty(4, 2, 4, 4, device="meta"))
    assert (found["0"].inputs, found["0"].outputs, found["0"].positions) == (32, 12, 4)
    assert (found["2"].inputs, found["2"].outputs, found["2"].positions) == (12, 5, 1)


def test_pieces_are_those_of_chunks() -> None:
    """Rows as ``torch.chunk`` deals them out; the last processes may have none."""
    for rows, count in ((8, 4), (5, 4), (9, 4), (3, 4), (1, 2)):
        parameter, laid = torch.empty(rows, 7), Laid("fsdp", count, {}, 1)
        expected = [chunk.numel() for chunk in parameter.chunk(count)]
        expected += [0] * (count - len(expected))
        assert [laid.piece(parameter, rank) for rank in range(count)] == expected


def test_what_the_wrappers_send() -> None:
    """DDP: gradients once around and back; FSDP2: scattered once, parameters gathered twice, the root's once."""
    weights = [torch.empty(10, 10), torch.empty(20)]
    assert traffic_of_wrapper(weights, Laid("owners", 4, {}, 1)) == {"gradients of DDP": 2 * 0.75 * 120 * 4}
    assert not traffic_of_wrapper(weights, Laid("owners-only", 4, {}, 1))
    assert traffic_of_wrapper(weights, Laid("fsdp", 4, {}, 1), weights[1:]) == {
        "gradients of FSDP2": 0.75 * 120 * 4,
        "parameters of FSDP2": 0.75 * 220 * 4,
    }


def test_a_layout_says_what_it_cannot_be() -> None:
    """By name, with the way out."""
    with pytest.raises(ArgumentError, match="one of replicated, owners, owners-only, fsdp, got 'all'"):
        Laid("all", 2, {}, 1)
    with pytest.raises(ArgumentError, match="'owners' goes with owners"):
        Laid("owners", 2, None, 1)
    with pytest.raises(ArgumentError, match="'replicated' goes without owners"):
        Laid("replicated", 2, {"0": 1}, 1)
