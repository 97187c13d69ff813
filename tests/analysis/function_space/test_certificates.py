"""Certificates on linear models with a chosen spectrum of K, where everything is known, and on corrupted ones."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osculate.analysis.function_space.certificates import certified_interval, damping_grid, linear_limit, run
from osculate.analysis.function_space.function_models import LinearModel, dense_tanh
from osculate.analysis.function_space.function_space import FunctionSpace, spectrum
from osculate.analysis.function_space.function_structures import PerOutputBlocks, Solved, Structure
from osculate.errors import ArgumentError
from torch import Tensor

DAMPING = 0.1


def orthogonal(order: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q


def with_spectrum(kappa: list[float], blocks: int, targets: Tensor | None = None) -> LinearModel:
    """``blocks`` blocks J_b = Q diag(s) Q_b' with sum_b G_b (G_b + n lambda)^{-1} = Q diag(kappa) Q'."""
    order = len(kappa)
    shares = torch.tensor(kappa, dtype=torch.float64) / blocks
    squares = order * DAMPING * shares / (1.0 - shares)
    left = orthogonal(order, 0)
    features = [left @ torch.diag(squares.sqrt()) @ orthogonal(order, 1 + block).T for block in range(blocks)]
    return LinearModel(torch.stack(features, 1), left[:, 0] * 2.0 if targets is None else targets)


@given(st.lists(st.floats(0.05, 3.9), min_size=1, max_size=5))
def test_k_has_the_chosen_spectrum(kappa: list[float]) -> None:
    model = with_spectrum(kappa, 4)
    kernel = PerOutputBlocks().solve(FunctionSpace(model), model.initial, model.targets, DAMPING).kernel
    torch.testing.assert_close(spectrum(kernel), torch.tensor(sorted(kappa), dtype=torch.float64), atol=1e-9, rtol=1e-9)
    assert linear_limit(kernel) == pytest.approx(min((2 * k - 1) / k**2 for k in kappa), rel=1e-6, abs=1e-6)


def test_the_limit_is_exact() -> None:
    """kappa = 0.8 gives (2 kappa - 1) / kappa^2 = 0.9375, kappa = 2 gives 0.75: the start along kappa = 2 is worst."""
    model = with_spectrum([2.0, 0.8, 1.0], 4)
    space = FunctionSpace(model)
    at, above = run(space, PerOutputBlocks(), DAMPING, 0.75, 5), run(space, PerOutputBlocks(), DAMPING, 0.7501, 5)
    assert at.worst_ratio == pytest.approx(0.25, rel=1e-12)
    assert above.worst_ratio > 1 - 0.7501
    assert at.certified and not above.certified
    assert max(entry.stability for entry in at.records) < 1e-12
    assert at.rate == pytest.approx(0.25, rel=1e-12)
    assert at.records[0].form == pytest.approx(2.0 * at.records[0].error, rel=1e-10)


def test_small_eigenvalues_are_never_certified() -> None:
    model = with_spectrum([2.0, 0.49], 4)
    for eta in (0.01, 0.3, 0.7):
        done = run(FunctionSpace(model), PerOutputBlocks(), DAMPING, eta, 3)
        assert done.share == 0.0
        assert linear_limit(torch.diag(torch.tensor([2.0, 0.49], dtype=torch.float64))) < 0


@pytest.mark.parametrize("eta", [0.05, 0.2, 0.6, 1.3])
def test_the_bound_holds_on_a_net_and_certificates_mean_what_they_say(eta: float) -> None:
    space = FunctionSpace(dense_tanh(8, 6, 200, torch.Generator().manual_seed(0)))
    for damping in (1e-3, 1e-2, 0.1):
        done = run(space, PerOutputBlocks(), damping, eta, 8)
        for entry in done.records:
            assert entry.ratio <= entry.bound * (1 + 1e-9)
            assert not entry.certified or entry.ratio <= 1 - eta
            assert entry.certified == (eta <= 1 and entry.bound <= 1 - eta)
            assert entry.squared_norm <= entry.form / (8 * damping) * (1 + 1e-9)


@dataclass(frozen=True)
class Corrupted:
    """A structure whose K is not the one its direction belongs to."""

    inner: Structure
    factor: float

    def solve(self, space: FunctionSpace, theta: Tensor, residual: Tensor, damping: float) -> Solved:
        solved = self.inner.solve(space, theta, residual, damping)
        return replace(solved, kernel=self.factor * solved.kernel)


@pytest.mark.parametrize("factor", [0.5, 0.999, 1.5])
def test_a_wrong_k_is_caught(factor: float) -> None:
    """On a linear model the step is (I - eta K) e to rounding, and on a net up to C'."""
    model = with_spectrum([1.6, 1.2, 0.9], 4)
    done = run(FunctionSpace(model), Corrupted(PerOutputBlocks(), factor), DAMPING, 0.5, 3)
    right = run(FunctionSpace(model), PerOutputBlocks(), DAMPING, 0.5, 3)
    assert all(entry.defect > 1e-4 for entry in done.records)
    assert all(entry.defect < 1e-12 for entry in right.records)
    net = FunctionSpace(dense_tanh(8, 6, 2000, torch.Generator().manual_seed(0)))
    done = run(net, Corrupted(PerOutputBlocks(), factor), 0.05, 0.002, 3)
    right = run(net, PerOutputBlocks(), 0.05, 0.002, 3)
    assert all(entry.defect <= entry.stability for entry in right.records)
    assert any(entry.defect > entry.stability for entry in done.records) == (factor != 0.999)


def test_a_run_ends_when_the_error_runs_away_or_vanishes() -> None:
    model = with_spectrum([3.0, 3.0], 4)
    assert len(run(FunctionSpace(model), PerOutputBlocks(), DAMPING, 40.0, 50).records) < 10
    assert len(run(FunctionSpace(model), PerOutputBlocks(), DAMPING, 1 / 3, 50).records) == 1
    with pytest.raises(ArgumentError, match="eta"):
        run(FunctionSpace(model), PerOutputBlocks(), DAMPING, 0.0)
    with pytest.raises(ArgumentError, match="damping"):
        run(FunctionSpace(model), PerOutputBlocks(), -1.0)


def test_default_step_size_is_one_over_kappa_max() -> None:
    done = run(FunctionSpace(with_spectrum([2.5, 1.0], 4)), PerOutputBlocks(), DAMPING, steps=1)
    assert done.records[0].eta == pytest.approx(0.4, rel=1e-9)


def test_intervals() -> None:
    grid = damping_grid(1e-3, 1.0, 4)
    assert grid == pytest.approx([1e-3, 1e-2, 0.1, 1.0])
    assert certified_interval(grid, [False, True, True, False]) == (grid[1], grid[2])
    assert certified_interval(grid, [True, False, True, True]) == (grid[2], grid[3])
    assert all(math.isnan(end) for end in certified_interval(grid, [False] * 4))
