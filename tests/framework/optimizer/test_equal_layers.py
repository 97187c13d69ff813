"""Layers of equal sizes share decompositions: what is kept of them is saved, loaded and refused as of any others."""

from __future__ import annotations

import copy

import osculate as osc
import pytest
import torch
from torch import Tensor, nn

METHODS = ("kbfgs", "kbfgs-l", "kfac", "mbf", "shampoo", "joint-kfac")


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 50))


def train(optimizer: osc.SecondOrder, model: nn.Module, first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(20, 50, generator=generator), torch.randint(0, 50, (20,), generator=generator)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_run_goes_on_bit_for_bit(method: str) -> None:
    model = make()
    optimizer = osc.build(method, model, likelihood="categorical")
    train(optimizer, model, 0, 3)
    twin = make()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = osc.build(method, twin, likelihood="categorical")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, 3, 4)
    train(resumed, twin, 3, 4)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("method", ["kfac", "kbfgs", "mbf"])
def test_a_warm_start_on_what_is_not_finite_changes_nothing(method: str) -> None:
    model = make()
    optimizer = osc.build(method, model, likelihood="categorical")
    before = copy.deepcopy(optimizer.state_dict()["state"])
    good, bad = torch.randn(20, 50), torch.full((20, 50), torch.nan)
    with pytest.raises(osc.NumericalError, match="mini-batch 1 of the warm start"):
        optimizer.warm_start([lambda: model(good), lambda: model(bad)])
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0.0, atol=0.0)
    train(optimizer, model, 0, 2)
