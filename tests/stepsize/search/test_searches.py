"""Searches on functions whose minima are known: the conditions they promise hold at the step they return."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osculate.stepsize.search.protocol import Search
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class Along:
    """A function of a few numbers as an objective."""

    def __init__(self, function: Function, start: Tensor):
        self.function, self.start, self.calls = function, start, 0

    def loss(self, step: Tensor) -> float:
        self.calls += 1
        value = float(self.function(self.start + step))
        return value if math.isfinite(value) else math.inf

    def residuals(self, step: Tensor) -> Tensor:
        raise AssertionError("a line search needs none")

    def loss_and_gradient(self, step: Tensor) -> tuple[float, Tensor]:
        self.calls += 1
        point = (self.start + step).requires_grad_()
        value = self.function(point)
        if not bool(value.isfinite()):
            return math.inf, torch.zeros_like(point)
        (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient


@dataclass
class Steepest:
    """A model that knows a gradient and a direction."""

    loss: float
    gradient: Tensor
    along: Tensor
    scale: float = 1.0

    @property
    def residuals(self) -> Tensor:
        raise AssertionError

    def direction(self, damping: float) -> Tensor:
        return self.along

    def predicted(self, step: Tensor) -> float:
        return -0.5 * float(self.gradient @ step)

    def correction(self, second: Tensor, damping: float) -> Tensor:
        raise AssertionError

    def change(self, step: Tensor) -> Tensor:
        raise AssertionError


FUNCTIONS: dict[str, Function] = {
    "bowl": lambda x: (x**2 * torch.arange(1, len(x) + 1)).sum(),
    "rosenbrock": lambda x: 100 * (x[1:] - x[:-1] ** 2).square().sum() + (1 - x[:-1]).square().sum(),
    "quartic": lambda x: (x**4).sum() + 0.1 * (x**2).sum(),
    "barrier": lambda x: (x**2).sum() - torch.log(2.0 - x).sum(),
    "wavy": lambda x: (x**2).sum() + torch.sin(5 * x).sum(),
}
LINES: list[Search] = [osc.StrongWolfe(), osc.StrongWolfe(slope=0.1), osc.HagerZhang(), osc.GridSearch()]


def prepared(name: str, seed: int, length: float, start: Tensor | None = None) -> tuple[Along, Steepest]:
    generator = torch.Generator().manual_seed(seed)
    point = torch.randn(3, generator=generator).double().clamp(-1.5, 1.5) if start is None else start
    objective = Along(FUNCTIONS[name], point)
    loss, gradient = objective.loss_and_gradient(torch.zeros_like(point))
    return objective, Steepest(loss, gradient, -length * gradient)


@pytest.mark.parametrize("search", LINES, ids=repr)
@pytest.mark.parametrize("name", FUNCTIONS)
@given(st.integers(0, 200), st.sampled_from([1e-4, 1e-2, 1.0, 50.0]))
def test_every_step_goes_down(search: Search, name: str, seed: int, length: float) -> None:
    objective, model = prepared(name, seed, length)
    before = objective.calls
    found = search.run(search.init(), objective, model, 1e-3)
    assert found.evaluations == objective.calls - before
    assert found.step is not None
    assert found.loss < model.loss or found.loss == pytest.approx(model.loss, rel=1e-10)
    assert objective.loss(found.step) == pytest.approx(found.loss, rel=1e-12)
    if found.gradient is not None:
        exact = objective.loss_and_gradient(found.step)[1]
        assert torch.equal(found.gradient, exact)


@pytest.mark.parametrize("search", [osc.StrongWolfe(), osc.StrongWolfe(slope=0.1)], ids=repr)
@pytest.mark.parametrize("name", FUNCTIONS)
@given(st.integers(0, 200), st.sampled_from([1e-4, 1e-2, 1.0, 50.0]))
def test_strong_wolfe_conditions(search: osc.StrongWolfe, name: str, seed: int, length: float) -> None:
    objective, model = prepared(name, seed, length)
    found = search.run(None, objective, model, 1e-3)
    assert found.step is not None and found.gradient is not None
    slope, start = float(found.gradient @ model.along), float(model.gradient @ model.along)
    chosen = found.numbers["length"]
    assert found.loss <= model.loss + search.decrease * chosen * start + 1e-12 * abs(model.loss)
    assert abs(slope) <= search.slope * abs(start)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(st.integers(0, 200), st.sampled_from([1e-4, 1e-2, 1.0, 50.0]))
def test_approximate_wolfe_conditions(name: str, seed: int, length: float) -> None:
    search = osc.HagerZhang()
    objective, model = prepared(name, seed, length)
    found = search.run(None, objective, model, 1e-3)
    assert found.step is not None and found.gradient is not None
    slope, start = float(found.gradient @ model.along), float(model.gradient @ model.along)
    assert slope >= search.sigma * start
    wolfe = found.loss <= model.loss + search.delta * found.numbers["length"] * start
    assert wolfe or slope <= (2 * search.delta - 1) * start


@pytest.mark.parametrize("search", [osc.StrongWolfe(), osc.HagerZhang()], ids=repr)
def test_searches_are_good_to_the_rounding_of_the_gradient(search: Search) -> None:
    """Near a minimum differences of losses are noise, and slopes still tell."""

    def function(x: Tensor) -> Tensor:
        return 1.0 + 0.5 * (x * torch.tensor([1.0, 3.0, 10.0])).square().sum()

    objective = Along(function, torch.full((3,), 1e-9).double())
    loss, gradient = objective.loss_and_gradient(torch.zeros(3).double())
    newton = -gradient / torch.tensor([1.0, 9.0, 100.0]).double()
    found = search.run(search.init(), objective, Steepest(loss, gradient, newton), 1e-3)
    assert found.step is not None
    assert float((objective.start + found.step).norm()) < 1e-12


@pytest.mark.parametrize("search", LINES, ids=repr)
def test_at_a_minimum_nothing_moves_uphill(search: Search) -> None:
    objective, model = prepared("bowl", 0, 1.0, torch.zeros(3).double())
    found = search.run(search.init(), objective, model, 1e-3)
    assert found.step is None or float(found.step.norm()) == 0.0


@pytest.mark.parametrize("search", [osc.StrongWolfe(), osc.HagerZhang()], ids=repr)
def test_a_direction_uphill_is_replaced_by_the_gradient(search: Search) -> None:
    objective, model = prepared("bowl", 1, 1.0)
    model.along = model.gradient.clone()
    found = search.run(search.init(), objective, model, 1e-3)
    assert found.step is not None and found.loss < model.loss
