"""``Diagonal`` where nothing was ever measured: no 0 / 0, with the default epsilon untouched to the last bit."""

import osculate as osc
import pytest
import torch
from osculate.curvature.records.statistics import Tensors
from osculate.preconditioners.structures.diagonal import Diagonal, DiagonalState
from torch import nn


def directions(part: Diagonal, moments: Tensors, momentum: Tensors) -> Tensors:
    return part.precondition(DiagonalState(moments, 1.0), momentum)


@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [
        (torch.float32, 0.0),
        (torch.float64, 0.0),
        (torch.bfloat16, 0.0),
        (torch.float32, 1e-50),
        (torch.bfloat16, 1e-50),
    ],
)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_without_epsilon_a_zero_curvature_gives_no_step(power: float, epsilon: float, dtype: torch.dtype) -> None:
    moment = torch.tensor([0.0, 4.0, 0.0], dtype=dtype)
    momentum = torch.tensor([0.0, 3.0, 1e-30], dtype=dtype)  # the last one: its square is not a number of float32
    (found,) = directions(Diagonal(power=power, epsilon=epsilon), (moment,), (momentum,))
    assert found.dtype == dtype
    assert found.tolist() == [0.0, 3.0 / 4.0**power, 0.0]
    assert moment.tolist() == [0.0, 4.0, 0.0]


def test_a_positive_epsilon_is_plain_division() -> None:
    torch.manual_seed(0)
    moment, momentum = torch.rand(50), torch.randn(50)
    moment[:10] = 0
    (found,) = directions(Diagonal(epsilon=1e-8), (moment,), (momentum,))
    assert torch.equal(found, momentum / (moment.sqrt() + 1e-8))


@pytest.mark.parametrize("method", ["adam", "adamw", "adagrad", "rmsprop"])
def test_parameters_that_see_no_gradient_stay_where_they_are(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    before = model.weight.detach().clone()
    optimizer = osc.build(method, model, epsilon=0.0, weight_decay=0.0)
    inputs = torch.randn(8, 4)
    inputs[:, 1] = 0
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    assert torch.isfinite(model.weight).all()
    assert torch.equal(model.weight[:, 1], before[:, 1])
    assert not torch.equal(model.weight[:, 0], before[:, 0])
