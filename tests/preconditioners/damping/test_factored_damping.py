"""K-FAC's factored damping: the formula, what it balances, and the scale that it makes irrelevant."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate import ArgumentError
from osculate.preconditioners import (
    BFGS,
    ConstantDamping,
    Covariance,
    Factored,
    GradientCovariance,
    HessianActionBFGS,
    Kronecker,
    LevenbergMarquardt,
    MeanEigenvalues,
    SideDamping,
    Split,
)
from osculate.preconditioners.factors.factor import CovarianceState
from osculate.preconditioners.structures.kronecker import KroneckerState
from torch import Tensor

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 5)
lambdas = st.floats(1e-6, 1e3)


def factors(seed: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = generator_of(seed)
    return 100 * random_spd(inputs, generator), 0.01 * random_spd(outputs, generator)


def eigenvalues(A: Tensor, G: Tensor) -> MeanEigenvalues:
    """Means of the eigenvalues themselves, not of the diagonal."""
    return MeanEigenvalues(float(torch.linalg.eigvalsh(A).mean()), float(torch.linalg.eigvalsh(G).mean()))


@given(seeds, sizes, sizes, lambdas, st.integers(1, 100))
def test_the_two_cross_terms_have_the_same_trace(
    seed: int, inputs: int, outputs: int, value: float, positions: int
) -> None:
    """(A + a I) (x) (G + g I): tr(A) g d_g = tr(G) a d_a with a g = lambda, which leaves one choice of a and g."""
    A, G = factors(seed, inputs, outputs)
    sides = Factored().sides(value, positions, eigenvalues(A, G))
    assert sides.whole == value
    assert sides.inputs * sides.outputs == pytest.approx(value)
    first = float(torch.kron(A, sides.outputs * torch.eye(outputs).double()).trace())
    second = float(torch.kron(sides.inputs * torch.eye(inputs).double(), G).trace())
    assert first == pytest.approx(second)


@given(seeds, sizes, sizes, lambdas, st.floats(1e-3, 1e3))
def test_the_scale_of_one_side_against_the_other_does_not_matter(
    seed: int, inputs: int, outputs: int, value: float, scale: float
) -> None:
    """A and G are known up to a factor that cancels in A (x) G: the damped product does not depend on it."""
    A, G = factors(seed, inputs, outputs)

    def damped(A: Tensor, G: Tensor, rule: Any) -> Tensor:
        sides = rule.sides(value, 1, eigenvalues(A, G))
        eyes = torch.eye(inputs).double(), torch.eye(outputs).double()
        return torch.kron(A + sides.inputs * eyes[0], G + sides.outputs * eyes[1])

    reference = damped(A, G, Factored())
    size = float(reference.abs().max())
    close(damped(scale * A, G / scale, Factored()) / size, reference / size)


@given(lambdas, st.integers(1, 50), st.floats(1e-3, 1e3))
def test_positions_enter_through_the_trace(value: float, positions: int, scale: float) -> None:
    """With equal mean eigenvalues per position, a sum over S positions makes the split that ``Split`` makes."""
    found = Factored().sides(value, positions, MeanEigenvalues(positions * scale, scale))
    split = Split().sides(value, positions)
    assert found.inputs == pytest.approx(split.inputs) and found.outputs == pytest.approx(split.outputs)


@pytest.mark.parametrize(
    "traces",
    [
        None,
        MeanEigenvalues(0.0, 1.0),
        MeanEigenvalues(1.0, 0.0),
        MeanEigenvalues(math.nan, 1.0),
        MeanEigenvalues(1.0, math.inf),
    ],
)
def test_a_dead_side_is_damped_as_by_split(traces: MeanEigenvalues | None) -> None:
    assert Factored().sides(0.3, 4, traces) == Split().sides(0.3, 4)


def test_extreme_scales_stay_finite_and_positive() -> None:
    for pair in ((1e-300, 1e300), (1e300, 1e-300)):
        sides = Factored().sides(1e-3, 1, MeanEigenvalues(*pair))
        assert 0 < sides.inputs < math.inf and 0 < sides.outputs < math.inf


def test_a_kronecker_structure_tells_its_mean_eigenvalues() -> None:
    A, G = factors(3, 4, 2)
    structure = Kronecker(Covariance(), Covariance())
    state = KroneckerState(CovarianceState(A, A, 1.0), CovarianceState(G, G, 1.0))
    found, expected = structure.mean_eigenvalues(state), eigenvalues(A, G)
    assert found.inputs == pytest.approx(expected.inputs) and found.outputs == pytest.approx(expected.outputs)
    assert structure.without_eigenvalues() == ()
    assert Kronecker(HessianActionBFGS(), Covariance()).without_eigenvalues() == ()
    assert Kronecker(HessianActionBFGS(), BFGS()).without_eigenvalues() == ("BFGS",)


def test_the_mean_is_of_the_matrix_that_is_inverted() -> None:
    """Tensor normal training scales its second moments to one mean eigenvalue: pi is 1, whatever the moments."""
    A, G = factors(5, 4, 2)
    G = G * (A.trace() / 4) / (G.trace() / 2)  # both moments of one gradient have the same trace per number of entries
    structure = Kronecker(GradientCovariance(), GradientCovariance())
    found = structure.mean_eigenvalues(KroneckerState(CovarianceState(A, A, 1.0), CovarianceState(G, G, 1.0)))
    assert found.inputs == pytest.approx(found.outputs) == pytest.approx(math.sqrt(float(A.trace() / 4)))


def test_other_rules_take_no_notice() -> None:
    traces = MeanEigenvalues(3.0, 0.1)
    for rule in (ConstantDamping(), Split(), LevenbergMarquardt()):
        assert rule.sides(0.3, 4, traces) == rule.sides(0.3, 4)
    wrapped = LevenbergMarquardt(Factored())
    assert wrapped.uses_eigenvalues and not LevenbergMarquardt().uses_eigenvalues
    assert wrapped.sides(0.3, 4, traces) == Factored().sides(0.3, 4, traces)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None, "1"])
@pytest.mark.parametrize("side", ["whole", "inputs", "outputs"])
def test_dampings_of_sides_are_checked(side: str, bad: Any) -> None:
    with pytest.raises(ArgumentError, match=side):
        SideDamping(**({"whole": 1.0, "inputs": 1.0, "outputs": 1.0} | {side: bad}))
    with pytest.raises(ArgumentError, match="damping"):
        Factored().sides(bad, 1, MeanEigenvalues(1.0, 1.0))
