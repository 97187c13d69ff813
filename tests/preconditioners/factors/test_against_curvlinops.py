"""K-FAC's factors against curvlinops, an independent implementation, in float64; and where K-FAC is exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from measuring import FixedTargets, close, generator_of, measure
from osculate.curvature import (
    Categorical,
    EmpiricalFisher,
    Estimator,
    ExactGGN,
    Gaussian,
    LayerStatistics,
    Record,
    SampledFisher,
)
from osculate.preconditioners import Covariance, Expand, Kronecker, PlainAverage, Reduce, Sharing
from osculate.preconditioners.protocol import Observation
from torch import Tensor, nn

RECORDS = Record.INPUTS | Record.GRADIENTS | Record.CURVATURE_ROOTS


class Tokens(nn.Module):
    """Linear layers on sequences, averaged over positions at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))).mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "dense, no bias": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)), (6, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, (2, 3), (1, 2), (1, 0), bias=False), nn.Tanh(),
            nn.Flatten(), nn.Linear(20, 3),
        ),
        (4, 2, 4, 5),
    ),
    "sequences": (Tokens, (5, 4, 3)),
}  # fmt: skip


def made(net: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[net]
    x = torch.randn(shape, generator=generator_of(1), dtype=torch.float64)
    return make().double(), x, torch.randint(0, 3, shape[:1], generator=generator_of(2))


def theirs(model: nn.Module, x: Tensor, y: Tensor, fisher: str, rule: Sharing) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, G) per layer; the bias as last column."""
    curvlinops = pytest.importorskip("curvlinops", exc_type=ImportError)
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], fisher_type=fisher,
        kfac_approx=type(rule).__name__.lower(), separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    operator.compute_kronecker_factors()
    saved = operator.state_dict()
    return {name: (value, saved["gradient_covariances"][name]) for name, value in saved["input_covariances"].items()}


def ours(entry: LayerStatistics, rule: Sharing) -> tuple[Tensor, Tensor]:
    """(A, G) in the convention of arXiv:2311.00636: the number of positions belongs to G."""
    part = Kronecker(Covariance(sharing=rule), Covariance(sharing=rule))
    state = part.init(entry.layer, tuple(entry.layer.parameters.values()))
    part.update(state, Observation(entry, (), ()), PlainAverage())
    moved = entry.positions if isinstance(rule, Expand) else 1
    return state.inputs.second_moment / moved, state.outputs.second_moment * moved


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", [Expand(), Reduce()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("fisher", "estimator"), [("type-2", ExactGGN()), ("empirical", EmpiricalFisher())])
def test_factors_equal_those_of_curvlinops(net: str, rule: Sharing, fisher: str, estimator: Estimator) -> None:
    model, x, y = made(net)
    expected = theirs(model, x, y, fisher, rule)
    statistics = measure(
        model, [x], RECORDS, loss=lambda out: nn.functional.cross_entropy(out, y), likelihood=Categorical()
    )
    assert statistics.keys() == expected.keys()
    for name, entry in statistics.items():
        for found, other in zip(ours(estimator.fill(entry), rule), expected[name], strict=True):
            close(found, other, 1e-8)


@pytest.mark.parametrize("rule", [Expand(), Reduce()], ids=lambda rule: type(rule).__name__)
def test_sampled_factors_equal_the_exact_ones_of_curvlinops_in_expectation(rule: Sharing) -> None:
    """Every label of two sequences, weighted with its probability."""
    model, x, y = made("sequences")
    x, y = x[:2], y[:2]
    expected = theirs(model, x, y, "type-2", rule)
    probability = model(x).detach().softmax(1)
    totals = {name: torch.zeros_like(value) for name, (_, value) in expected.items()}
    for labels in itertools.product(range(3), repeat=2):
        likelihood = FixedTargets(Categorical(), torch.tensor(labels))
        statistics = measure(model, [x], Record.INPUTS | Record.SAMPLED, likelihood=likelihood)
        for name, entry in statistics.items():
            totals[name] += probability[range(2), labels].prod() * ours(SampledFisher().fill(entry), rule)[1]
    for name, total in totals.items():
        close(total, expected[name][1], 1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_exact_on_a_deep_linear_network(bias: bool) -> None:
    """The block of every layer: with constant Jacobians behind it, A kron G is the Gauss-Newton matrix itself."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in ((3, 5), (5, 4), (4, 2)))).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    for entry in measure(model, [x], RECORDS, likelihood=Gaussian()).values():
        exact = ExactGGN().fill(entry)
        inner, outer = ours(exact, Expand())
        order = entry.layer.entries()
        close(torch.kron(outer, inner)[order][:, order], exact.matrix())
