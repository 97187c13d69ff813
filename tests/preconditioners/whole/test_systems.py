"""Damped least squares by every system against a dense solve."""

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osculate.errors import ArgumentError, NumericalError
from osculate.preconditioners.whole.systems import System, chosen_system, products_of
from torch import Tensor

SYSTEMS: list[System] = [
    osc.SingularValues(),
    osc.NormalEquations(),
    osc.ResidualKernel(),
    osc.ConjugateGradients(iterations=500, tolerance=1e-13),
    osc.SystemBySize(),
    osc.SystemBySize(exact=1),
    osc.SystemBySize(entries=1, iterative=osc.ConjugateGradients(500, 1e-13)),
]


def drawn(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator).double() for shape in ((rows, columns), (rows,), (columns,)))  # type: ignore[return-value]


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000), st.sampled_from([1e-3, 0.1, 10.0]), st.booleans())
def test_solutions(system: System, rows: int, columns: int, seed: int, damping: float, with_rest: bool) -> None:
    matrix, residual, rest = drawn(rows, columns, seed)
    solver = chosen_system(system, rows, columns).prepare(matrix, products_of(matrix))
    right = matrix.T @ residual + (rest if with_rest else 0.0)
    exact = torch.linalg.solve(matrix.T @ matrix + damping * torch.eye(columns).double(), right)
    found = solver.solve(residual, rest if with_rest else None, damping)
    assert (found - exact).norm() <= 1e-7 * exact.norm().clamp(min=1e-12)


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_the_largest_eigenvalue_is_within_its_bounds(system: System, rows: int, columns: int, seed: int) -> None:
    matrix = drawn(rows, columns, seed)[0]
    exact = float(torch.linalg.matrix_norm(matrix, 2) ** 2)
    largest = chosen_system(system, rows, columns).prepare(matrix, products_of(matrix)).largest
    assert 0.4 * exact <= largest <= min(rows, columns) * exact * (1 + 1e-9)


def test_singular_values_keep_digits_that_normal_equations_lose() -> None:
    """Small singular values to full relative precision: what the last digits of a least-squares problem hang on."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(30, 10, generator=generator).double())[0]
    right = torch.linalg.qr(torch.randn(10, 10, generator=generator).double())[0]
    values = torch.logspace(0, -10, 10).double()
    matrix, wanted = left * values @ right.T, torch.ones(10).double()
    residual, damping = matrix @ wanted, 1e-26
    errors = {}
    for system in (osc.SingularValues(), osc.NormalEquations()):
        found = system.prepare(matrix, products_of(matrix)).solve(residual, None, damping)
        errors[type(system).__name__] = float((found - wanted).norm())
    assert errors["SingularValues"] < 1e-4 < 1e-2 < errors["NormalEquations"]


def test_a_semi_definite_matrix_without_damping_worth_its_name() -> None:
    matrix = torch.zeros(3, 4).double()
    matrix[0] = 1.0
    found = osc.NormalEquations().prepare(matrix, products_of(matrix)).solve(torch.ones(3).double(), None, 1e-300)
    assert found.isfinite().all()
    with pytest.raises(NumericalError, match="finite"):
        broken = matrix * float("nan")
        osc.NormalEquations().prepare(broken, products_of(broken)).solve(torch.ones(3).double(), None, 1.0)


@pytest.mark.parametrize(
    ("system", "rows", "columns", "words"),
    [
        (osc.NormalEquations(limit=3), 10, 4, "4 parameters are more than limit=3"),
        (osc.ResidualKernel(limit=3), 4, 10, "4 residuals are more than limit=3"),
        (osc.SingularValues(limit=3), 4, 10, "limit=3"),
    ],
)
def test_what_is_too_large_is_refused_by_name(system: System, rows: int, columns: int, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        chosen_system(system, rows, columns)


def test_the_size_decides() -> None:
    system = osc.SystemBySize(exact=10, limit=100, entries=10_000)
    kinds = {(5, 20): "SingularValues", (50, 20): "NormalEquations", (20, 50): "ResidualKernel"}
    for size, name in kinds.items():
        assert type(chosen_system(system, *size)).__name__ == name
    for size in ((200, 200), (50, 400)):
        assert chosen_system(system, *size).matrix_free
