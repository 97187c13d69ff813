"""Secant updates over all parameters against their formulas in dense matrices, and on quadratics."""

from itertools import pairwise
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from measuring import close
from osculate.preconditioners.whole.secant import SecantUpdate
from torch import Tensor

FULL = [osc.FullBFGS(), osc.SelfScaledBFGS(), osc.SelfScaledBroyden()]


def drawn(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A positive definite matrix and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator).double()
    return root @ root.T + 0.1 * torch.eye(size).double(), torch.randn(size, generator=generator).double()


def walked(
    update: SecantUpdate, hessian: Tensor, gradient: Tensor, steps: int, length: float
) -> tuple[Any, Tensor, Tensor]:
    """A state after steps of some length along -H g on a quadratic, with the last pair."""
    state = update.init(len(gradient), gradient)
    step = change = gradient
    for _ in range(steps):
        step = -length * update.precondition(state, gradient)
        change = hessian @ step
        assert update.update(state, step, change, gradient)
        gradient = gradient + change
    return state, step, change


@pytest.mark.parametrize("update", [*FULL, osc.LimitedBFGS(3)], ids=repr)
@given(st.integers(2, 6), st.integers(0, 500), st.integers(1, 6), st.sampled_from([0.1, 0.5, 1.0]))
def test_the_secant_equation_and_the_sign(
    update: SecantUpdate, size: int, seed: int, steps: int, length: float
) -> None:
    hessian, gradient = drawn(size, seed)
    state, step, change = walked(update, hessian, gradient, steps, length)
    assume(float(step.norm()) > 1e-8)
    assert (update.precondition(state, change) - step).norm() <= 1e-7 * step.norm()
    dense = torch.stack([update.precondition(state, column) for column in torch.eye(size).double()], 1)
    close(dense, dense.T, 1e-6 * float(dense.norm()))
    assert float(torch.linalg.eigvalsh(0.5 * (dense + dense.T)).min()) > 0.0


@given(st.integers(2, 6), st.integers(0, 500))
def test_bfgs_is_the_product_form(size: int, seed: int) -> None:
    """H <- (I - s y' / s'y) H (I - y s' / s'y) + s s' / s'y (Nocedal and Wright, 6.17)."""
    hessian, gradient = drawn(size, seed)
    update = osc.FullBFGS()
    state, _, _ = walked(update, hessian, gradient, 2, 0.3)
    before = state.inverse.clone()
    step = -0.4 * before @ gradient
    change = hessian @ step
    update.update(state, step, change, gradient)
    curved = float(step @ change)
    left = torch.eye(size).double() - torch.outer(step, change) / curved
    close(state.inverse, left @ before @ left.T + torch.outer(step, step) / curved, 1e-8 * float(before.norm()))


@given(st.integers(2, 6), st.integers(0, 500))
def test_self_scaled_broyden_is_its_formula(size: int, seed: int) -> None:
    """Step by step from arXiv:2405.04230, with B = H^-1 inverted densely."""
    hessian, gradient = drawn(size, seed)
    update = osc.SelfScaledBroyden()
    state, _, _ = walked(update, hessian, gradient, 2, 0.3)
    inverse = state.inverse.clone()
    step = -0.4 * inverse @ gradient
    change = hessian @ step
    curved = float(step @ change)
    b = float(step @ torch.linalg.solve(inverse, step)) / curved
    h = float(change @ inverse @ change) / curved
    a = b * h - 1.0
    assume(a > 1e-6)
    c = (a / (1.0 + a)) ** 0.5
    low = min(1.0, h * (1.0 - c))
    theta = max((low - 1.0) / a, min(1.0 / low, (1.0 - b) / b))
    sigma, rho = 1.0 + theta * a, min(1.0, 1.0 / b)
    power = abs(sigma) ** (1.0 / (1.0 - size))
    tau = min(rho * power, sigma) if theta <= 0.0 else rho * min(power, 1.0 / theta)
    image = inverse @ change
    across = float(change @ image)
    direction = step / curved - image / across
    phi = (1.0 - theta) / sigma
    expected = (
        inverse - torch.outer(image, image) / across + phi * across * torch.outer(direction, direction)
    ) / tau + torch.outer(step, step) / curved
    update.update(state, step, change, gradient)
    close(state.inverse, expected, 1e-7 * float(expected.norm()))


@given(st.integers(2, 5), st.integers(0, 200), st.integers(1, 5))
def test_two_loops_are_the_last_updates(size: int, seed: int, steps: int) -> None:
    """L-BFGS with room for all pairs equals BFGS from its own scaled identity."""
    hessian, gradient = drawn(size, seed)
    limited = osc.LimitedBFGS(memory=10)
    state, step, change = walked(limited, hessian, gradient, steps, 0.3)
    dense = torch.eye(size).double() * float(step @ change) / float(change @ change)
    for s, y in zip(state.steps, state.changes, strict=True):
        left = torch.eye(size).double() - torch.outer(s, y) / float(s @ y)
        dense = left @ dense @ left.T + torch.outer(s, s) / float(s @ y)
    close(limited.precondition(state, gradient), dense @ gradient, 1e-8 * float(gradient.norm() * dense.norm()))


@pytest.mark.parametrize("update", [*FULL, osc.LimitedBFGS(3)], ids=repr)
def test_pairs_without_curvature_are_left_out(update: SecantUpdate) -> None:
    gradient = torch.tensor([1.0, -2.0]).double()
    state = update.init(2, gradient)
    before = update.precondition(state, gradient)
    assert not update.update(state, gradient, -gradient, gradient)
    assert not update.update(state, gradient, torch.zeros(2).double(), gradient)
    close(update.precondition(state, gradient), before, 0.0)


def test_too_many_parameters_are_declined_with_the_way_out() -> None:
    assert "LimitedBFGS" in osc.FullBFGS(limit=10).declines(11)
    assert not osc.FullBFGS(limit=10).declines(10)


@pytest.mark.parametrize("update", FULL, ids=repr)
def test_an_inverse_that_has_lost_its_sign_begins_anew(update: SecantUpdate) -> None:
    """y'Hy < 0 by rounding, as single precision brings about: no root of a negative number, and no wild H."""
    gradient = torch.tensor([1.0, -2.0])
    state = update.init(2, gradient)
    state.inverse.copy_(-torch.eye(2))
    state.updates = 5
    assert not update.update(state, gradient, 0.5 * gradient, gradient)
    close(update.precondition(state, gradient), gradient, 0.0)
    assert update.update(state, gradient, 0.5 * gradient, gradient)


@pytest.mark.parametrize("name", ["bfgs", "ssbfgs", "ssbroyden", "lbfgs"])
def test_single_precision_to_its_end(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    inputs, labels = torch.randn(40, 5), torch.randint(0, 3, (40,))
    optimizer = osc.build(name, model)  # type: ignore[call-overload]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(150)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(losses))
