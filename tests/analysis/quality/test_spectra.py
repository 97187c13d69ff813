"""Products against dense matrices of known spectrum."""

from __future__ import annotations

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osculate.analysis.quality.spectra import (
    SymmetricOperator,
    conjugate_gradients,
    lanczos,
    signs,
    spectral_density,
)
from torch import Tensor


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return basis @ torch.diag(values) @ basis.T


def operator(dense: Tensor) -> SymmetricOperator:
    return SymmetricOperator(dense.shape[0], lambda vector: dense @ vector)


@pytest.mark.parametrize("size", [10, 150])
def test_extremes_and_norm_of_a_chosen_spectrum(size: int) -> None:
    values = torch.linspace(-3.0, 7.0, size, dtype=torch.float64)
    found = operator(matrix(values))
    assert found.extremes() == (pytest.approx(-3.0, rel=1e-6), pytest.approx(7.0, rel=1e-6))
    assert found.norm() == pytest.approx(7.0, rel=1e-6)
    assert (found - operator(torch.eye(size, dtype=torch.float64))).norm() == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("size", [12, 120])
def test_generalised_extremes_equal_those_of_the_dense_problem(size: int) -> None:
    first = matrix(torch.linspace(0.1, 5.0, size, dtype=torch.float64))
    metric = matrix(torch.linspace(1.0, 2.0, size, dtype=torch.float64), seed=1)
    expected = torch.linalg.eigvals(torch.linalg.solve(metric, first)).real.sort().values
    pair = operator(metric), operator(torch.linalg.inv(metric))
    low, high = operator(first).extremes(pair)
    assert low == pytest.approx(float(expected[0]), rel=1e-6) and high == pytest.approx(float(expected[-1]), rel=1e-6)


def test_random_signs_estimate_the_frobenius_norm() -> None:
    dense = matrix(torch.linspace(0.0, 4.0, 90, dtype=torch.float64))
    exact = float(torch.linalg.matrix_norm(dense))
    generator = torch.Generator().manual_seed(2)
    products = torch.stack([dense @ probe for probe in signs(operator(dense), 40, generator)])
    assert float((products.square().sum() / 40).sqrt()) == pytest.approx(exact, rel=0.1)


@given(seed=st.integers(0, 10_000), size=st.integers(2, 20))
@settings(max_examples=25, deadline=None)
def test_lanczos_quadrature_is_exact_at_full_length(seed: int, size: int) -> None:
    """v'M^k v for every k up to 2 d - 1: here k = 1, 2, 3."""
    generator = torch.Generator().manual_seed(seed)
    dense = matrix(torch.randn(size, dtype=torch.float64, generator=generator), seed)
    start = torch.randn(size, dtype=torch.float64, generator=generator)
    nodes, weights = lanczos(operator(dense), start, size)
    unit = start / start.norm()
    assert float(weights.sum()) == pytest.approx(1.0)
    for power in (1, 2, 3):
        expected = unit @ torch.linalg.matrix_power(dense, power) @ unit
        assert float((weights * nodes**power).sum()) == pytest.approx(float(expected), rel=1e-8, abs=1e-9)


def test_the_density_finds_a_cluster_and_its_share() -> None:
    values = torch.cat([torch.full((90,), 0.1), torch.linspace(5.0, 6.0, 10)]).double()
    density = spectral_density(operator(matrix(values)), probes=200, steps=20)
    assert density.below(1.0) == pytest.approx(0.9, abs=0.03)
    assert density.moment(1) == pytest.approx(float(values.mean()), rel=0.1)


def test_conjugate_gradients_solve_and_refuse_indefinite_matrices() -> None:
    dense = matrix(torch.linspace(0.5, 50.0, 40, dtype=torch.float64))
    right = torch.ones(40, dtype=torch.float64)
    solution = conjugate_gradients(operator(dense), right, tolerance=1e-12)
    assert torch.allclose(dense @ solution, right, atol=1e-9)
    with pytest.raises(osc.ArgumentError, match="positive definite"):
        conjugate_gradients(operator(-dense), right)
