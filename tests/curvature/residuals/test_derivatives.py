"""Derivatives carried forward through the layers against autograd's backward ones."""

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close
from osculate.errors import ArgumentError, CompatibilityError
from torch import Tensor, nn


class Sine(nn.Module):
    """An activation that no table knows."""

    def forward(self, value: Tensor) -> Tensor:
        return torch.sin(3.0 * value)


ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.ReLU, Sine]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from(ACTIVATIONS)), min_size=0, max_size=3),
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(0, 500),
)
def test_all_derivatives(
    inputs: int, hidden: list[tuple[int, type[nn.Module]]], outputs: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    width = inputs
    for size, act in hidden:
        layers.append(nn.Sequential(nn.Linear(width, size, bias=seed % 2 == 0), act()))
        width = size
    model = nn.Sequential(*layers, nn.Identity(), nn.Linear(width, outputs)).double()
    points = torch.rand(rows, inputs).double().requires_grad_()
    chosen = [inputs - 1, 0]
    found = osc.derivatives(model, points, second=chosen, laplacian=True)
    value = model(points)
    close(found.value.detach(), value.detach(), 1e-12)
    for column in range(outputs):
        (slope,) = torch.autograd.grad(value[:, column].sum(), points, create_graph=True)
        close(found.first[..., column].detach(), slope.detach(), 1e-10)
        bends = torch.zeros(rows, inputs).double()
        for axis in range(inputs):
            if slope.requires_grad:
                bend = torch.autograd.grad(slope[:, axis].sum(), points, retain_graph=True, allow_unused=True)[0]
                bends[:, axis] = 0.0 if bend is None else bend[:, axis]
        close(found.second[..., column].detach(), bends[:, chosen], 1e-9)
        assert found.laplacian is not None
        close(found.laplacian[:, column].detach(), bends.sum(1), 1e-9)


def test_they_can_be_differentiated_by_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    points = torch.rand(3, 2).double()
    parameters = list(model.parameters())
    forward = osc.derivatives(model, points, laplacian=True).laplacian
    assert forward is not None
    ours = torch.autograd.grad(forward.sum(), parameters, allow_unused=True)
    moved = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(moved).sum(), moved, create_graph=True)
    bends = [torch.autograd.grad(slope[:, axis].sum(), moved, create_graph=True)[0][:, axis] for axis in range(2)]
    exact = torch.autograd.grad(torch.stack(bends).sum(), parameters, allow_unused=True)
    for one, other in zip(ours, exact, strict=True):
        close(torch.zeros(1) if one is None else one, torch.zeros(1) if other is None else other, 1e-10)


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.Softmax(1), nn.BatchNorm1d(3), nn.Dropout(0.5)])
def test_modules_without_a_rule_are_named(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 3), module, nn.Linear(3, 1)).double()
    with pytest.raises(CompatibilityError, match=rf"Sequential\.1 \({type(module).__name__}\).*create_graph=True"):
        osc.derivatives(model, torch.rand(4, 2).double(), laplacian=True)


def test_bad_points() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ArgumentError, match="matrix"):
        osc.derivatives(model, torch.rand(4))
    with pytest.raises(ArgumentError, match=r"inputs \[2\]"):
        osc.derivatives(model, torch.rand(4, 2), second=[2])
