"""What becomes of negative joint steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osculate.stepsize import Clipped, JointLayerwise, Safeguarded, StepEvidence, Unrestricted
from torch import Tensor


def semidefinite(layers: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(rank, layers, generator=generator, dtype=torch.float64)
    root = root + 2.0 * torch.randn(rank, 1, generator=generator, dtype=torch.float64)
    return root.T @ root, torch.rand(layers, generator=generator, dtype=torch.float64)


def model_value(steps: Tensor, matrix: Tensor, right: Tensor) -> float:
    return float(0.5 * steps @ matrix @ steps - right @ steps)


def propose(sign: Clipped | Safeguarded | Unrestricted, matrix: Tensor, right: Tensor) -> Tensor:
    rule = JointLayerwise(decay=0.0, relative_ridge=0.0, sign=sign)
    evidence = StepEvidence([str(i) for i in right], 1.0, right, right, torch.ones_like(right), None, matrix)
    return rule.propose(rule.init(len(right), right), evidence)


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_guarantees(layers: int, seed: int) -> None:
    """Nothing is worse than steps of 1/L by itself, and the unrestricted minimum is the best of all."""
    matrix, right = semidefinite(layers, layers + 2, seed)
    safe, best = propose(Safeguarded(), matrix, right), propose(Unrestricted(), matrix, right)
    alone = float((right.square() / (2 * layers * matrix.diagonal())).sum())
    assert bool((safe >= 0).all())
    assert model_value(safe, matrix, right) <= -alone * (1 - 1e-9)
    assert model_value(best, matrix, right) <= model_value(safe, matrix, right) * (1 - 1e-6)
    if bool((best > 0).all()):
        torch.testing.assert_close(safe, best, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(propose(Clipped(), matrix, right), best)


def test_clipping_can_raise_the_model() -> None:
    matrix = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    right = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert model_value(propose(Clipped(), matrix, right), matrix, right) > 100.0
    assert model_value(propose(Safeguarded(), matrix, right), matrix, right) == pytest.approx(-0.5)
    assert bool((propose(Unrestricted(), matrix, right) < 0).any())


@pytest.mark.parametrize("sign", [Safeguarded(), Clipped(), Unrestricted()])
def test_nothing_to_do_and_no_minimum(sign: Clipped | Safeguarded | Unrestricted) -> None:
    zero, right = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert bool((propose(sign, zero, right) == 0).all())
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    assert bool(torch.isfinite(propose(sign, indefinite, right)).all())


def test_signs_are_declared_and_clipping_stays_the_default() -> None:
    assert JointLayerwise().sign == Clipped()
    assert not JointLayerwise().signed
    assert not JointLayerwise(sign=Safeguarded()).signed
    assert JointLayerwise(sign=Unrestricted()).signed
