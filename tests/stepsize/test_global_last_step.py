"""One pair of numbers for the whole network."""

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close
from osculate.errors import ArgumentError, CompatibilityError
from osculate.stepsize.protocol import StepEvidence
from torch import Tensor


def evidence_of(layers: int, seed: int, lr: float | Tensor = 1.0) -> tuple[StepEvidence, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2 * layers, 2 * layers + 1, generator=generator).double()
    slopes = torch.randn(2 * layers, generator=generator).double()
    norms = torch.rand(2 * layers, generator=generator).double() + 0.1
    names = [str(place) for place in range(layers)]
    return StepEvidence(names, lr, slopes, 2 * slopes, norms, forms=root @ root.T), root @ root.T, slopes


def chosen(rule: osc.GlobalWithLastStep, evidence: StepEvidence) -> Tensor:
    return rule.propose(rule.init(len(evidence.names), torch.zeros(()).double()), evidence)


@given(st.integers(1, 5), st.integers(0, 500))
def test_the_pair_minimises_the_model(layers: int, seed: int) -> None:
    evidence, forms, slopes = evidence_of(layers, seed)
    found = chosen(osc.GlobalWithLastStep(), evidence)
    assert found.shape == (2 * layers,)
    assert found[:layers].unique().numel() == 1 and found[layers:].unique().numel() == 1
    basis = torch.zeros(2 * layers, 2).double()
    basis[:layers, 0], basis[layers:, 1] = 1.0, 1.0
    right = torch.cat([slopes[:layers], 2 * slopes[layers:]])
    exact = torch.linalg.solve(basis.T @ forms @ basis, basis.T @ right)
    close(found, basis @ exact, 1e-6 * float(exact.norm().clamp(min=1.0)))


def test_the_first_step_has_no_last_one() -> None:
    evidence, _, _ = evidence_of(3, 0)
    assert evidence.forms is not None and evidence.squared_norms is not None and evidence.gradient_slopes is not None
    for tensor in (evidence.forms[3:], evidence.forms[:, 3:], evidence.squared_norms[3:], evidence.gradient_slopes[3:]):
        tensor.zero_()
    found = chosen(osc.GlobalWithLastStep(), evidence)
    assert found.isfinite().all() and not found[3:].any() and found[:3].any()


def test_learning_rates_of_layers() -> None:
    lr = torch.tensor([1.0, 0.5, 0.0]).double()
    ones = chosen(osc.GlobalWithLastStep(), evidence_of(3, 1)[0])
    close(chosen(osc.GlobalWithLastStep(), evidence_of(3, 1, lr)[0]), lr.repeat(2) * ones, 1e-12)


def test_damping_shortens() -> None:
    evidence = evidence_of(2, 3)[0]
    free, damped = (chosen(osc.GlobalWithLastStep(damping=value), evidence) for value in (0.0, 1e3))
    assert damped.norm() < 0.1 * free.norm()


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="damping"):
        osc.GlobalWithLastStep(damping=-1.0)
    with pytest.raises(CompatibilityError, match="between layers"):
        osc.GlobalWithLastStep(osc.SignedHessian())
