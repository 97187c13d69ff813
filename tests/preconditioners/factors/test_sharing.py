"""Sharing rules against loops over samples, calls and positions; where one is exact."""

from __future__ import annotations

import pytest
import torch
from measuring import close, measure
from osculate import ArgumentError
from osculate.curvature import EmpiricalFisher, LayerStatistics, Record
from osculate.preconditioners import Covariance, Expand, Kronecker, PlainAverage, Reduce, Sharing, SideDamping, Sum
from osculate.preconditioners.protocol import Observation
from torch import Tensor, nn


class Twice(nn.Module):
    """One layer called on sequences of lengths 4 and 3."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.inner(x)).flatten(1).sum(1) + self.inner(x[:, :, :-1]).flatten(1).square().sum(1))[
            :, None
        ]


def statistics(bias: bool = True, groups: int = 1) -> LayerStatistics:
    torch.manual_seed(0)
    model = Twice(nn.Conv1d(4, 2, 2, bias=bias, groups=groups)).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    (entry,) = measure(model, [x], Record.INPUTS | Record.GRADIENTS).values()
    return EmpiricalFisher().fill(entry)


def factors(entry: LayerStatistics, rule: Sharing) -> tuple[Tensor, Tensor]:
    """Undamped A and G as K-FAC averages them."""
    part = Kronecker(Covariance(sharing=rule), Covariance(sharing=rule))
    state = part.init(entry.layer, tuple(entry.layer.parameters.values()))
    part.update(state, Observation(entry, (), ()), PlainAverage())
    return state.inputs.second_moment, state.outputs.second_moment


def by_loop(entry: LayerStatistics, rule: Sharing) -> tuple[Tensor, Tensor]:
    """The definitions, sample by sample and call by call."""
    layer = entry.layer
    inputs = entry.input_rows().reshape(entry.samples, entry.positions, layer.groups, -1)
    gradients = entry.preactivation_gradients()
    a_total, g_total, count = 0.0, 0.0, 0
    for n in range(entry.samples):
        start = 0
        pieces = []
        for size in entry.calls:
            pieces.append(range(start, start + size))
            start += size
        if isinstance(rule, Reduce):
            pieces = [range(start)]
        if isinstance(rule, Expand):
            pieces = [range(s, s + 1) for s in range(start)]
        for piece in pieces:
            g = sum(gradients[n, s] for s in piece)
            g_total, count = g_total + torch.outer(g, g), count + 1
            for group in range(layer.groups):
                a = sum(inputs[n, s, group] for s in piece) / len(piece)
                a = torch.cat([a, torch.ones(1)]) if layer.has_bias else a
                a_total = a_total + torch.outer(a, a) / layer.groups
    return a_total / entry.samples, g_total / count


@pytest.mark.parametrize("rule", [Expand(), Reduce(), Sum()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_follow_their_definition(rule: Sharing, bias: bool, groups: int) -> None:
    entry = statistics(bias, groups)
    assert entry.calls == (5, 4) and entry.layer.has_bias == bias
    for found, expected in zip(factors(entry, rule), by_loop(entry, rule), strict=True):
        close(found, expected)


def test_expand_is_the_default() -> None:
    entry = statistics()
    part = Kronecker(Covariance(), Covariance())
    state = part.init(entry.layer, tuple(entry.layer.parameters.values()))
    part.update(state, Observation(entry, (), ()), PlainAverage())
    for found, expected in zip((state.inputs, state.outputs), factors(entry, Expand()), strict=True):
        assert torch.equal(found.second_moment, expected)


def test_rules_agree_without_sharing() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    (entry,) = measure(model, [x]).values()
    entry = EmpiricalFisher().fill(entry)
    reference = factors(entry, Expand())
    for rule in (Reduce(), Sum()):
        for found, expected in zip(factors(entry, rule), reference, strict=True):
            close(found, expected)


def test_reduce_is_exact_for_a_mean_of_linear_positions() -> None:
    """One sample, a linear map averaged over positions: A kron G is the empirical Fisher (arXiv:2311.00636v2, 3.2)."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    model, x = Mean().double(), torch.randn(1, 4, 3, dtype=torch.float64)
    (entry,) = measure(model, [x]).values()
    entry = EmpiricalFisher().fill(entry)
    part = Kronecker(Covariance(sharing=Reduce()), Covariance(sharing=Reduce()))
    state = part.init(entry.layer, tuple(entry.layer.parameters.values()))
    part.update(state, Observation(entry, (), ()), PlainAverage())
    inner, outer = state.inputs.second_moment, state.outputs.second_moment
    order = entry.layer.entries()
    dense = torch.kron(outer, inner)[order][:, order]
    vector = torch.cat([value.flatten() for value in entry.gradients])
    close(dense, torch.outer(vector, vector))


@pytest.mark.parametrize("rule", [Reduce(), Sum()], ids=lambda rule: type(rule).__name__)
def test_rows_without_samples_cannot_be_reduced(rule: Sharing) -> None:
    model = nn.Linear(3, 2).double()
    batches = [torch.randn(2, length, 3, dtype=torch.float64) for length in (2, 3)]
    (entry,) = measure(model, batches).values()
    entry = EmpiricalFisher().fill(entry)
    inner, outer = factors(entry, Expand())
    rows, gradients = entry.input_rows(), entry.gradient_rows() * entry.gradient_scale
    close(outer, gradients.T @ gradients / 10)
    close(inner[:3, :3], rows.T @ rows / 4)
    assert inner[3, 3] == 2.5
    with pytest.raises(ArgumentError, match="Expand"):
        factors(entry, rule)


@pytest.mark.parametrize("rule", [Expand(), Reduce(), Sum()], ids=lambda rule: type(rule).__name__)
def test_dense_forms_are_positive_definite(rule: Sharing) -> None:
    entry = statistics()
    part = Kronecker(Covariance(sharing=rule), Covariance(sharing=rule))
    state = part.init(entry.layer, tuple(entry.layer.parameters.values()))
    part.update(state, Observation(entry, (), ()), PlainAverage())
    dense = part.to_dense(state, entry.layer, SideDamping(0.1, 0.1, 0.1))
    assert (torch.linalg.eigvalsh(dense) > 0).all()
