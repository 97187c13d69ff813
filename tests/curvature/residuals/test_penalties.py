"""Penalties of residuals: slopes and curvatures are the derivatives of the values."""

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close
from osculate.curvature.residuals.penalty import Penalty
from osculate.errors import ArgumentError

PENALTIES = [osc.HalfSquare(), osc.Huber(0.7), osc.PseudoHuber(1.3), osc.Cauchy(0.9)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@given(st.lists(st.floats(-5, 5).filter(lambda value: abs(abs(value) - 0.7) > 1e-3), min_size=1, max_size=6))
def test_derivatives(penalty: Penalty, numbers: list[float]) -> None:
    residual = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    value = penalty.value(residual)
    assert (value >= 0).all()
    (slope,) = torch.autograd.grad(value.sum(), residual, create_graph=True)
    close(penalty.slope(residual).detach(), slope.detach(), 1e-12)
    (bend,) = torch.autograd.grad(slope.sum(), residual)
    close(penalty.curvature(residual).detach(), bend.clamp(min=0.0), 1e-10)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_near_zero_all_are_half_squares(penalty: Penalty) -> None:
    small = torch.tensor([1e-6, -1e-7], dtype=torch.float64)
    close(penalty.value(small), 0.5 * small**2, 1e-8)
    close(penalty.curvature(torch.zeros(2).double()), torch.ones(2).double(), 0.0)


@pytest.mark.parametrize("kind", [osc.Huber, osc.PseudoHuber, osc.Cauchy])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_bad_scales(kind: type[osc.Huber], scale: float) -> None:
    with pytest.raises(ArgumentError, match="scale"):
        kind(scale)
