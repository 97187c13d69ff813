"""Damping of secant pairs: the theorems D1-D4 and U1-U4 of PAPERS 1.4, and agreement with the transcriptions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate import ArgumentError
from osculate.preconditioners import DoubleDamping, NoDamping, PairDamping, PowellThenLM
from osculate.preconditioners.linalg import bfgs_inverse_update_
from osculate.preconditioners.pairs.damping import DampedPair, powell_on_inverse
from reference import pairs as reference
from torch import Tensor

SLACK = 1 + 1e-7
seeds = st.integers(0, 2**31)
sizes = st.integers(2, 5)
firsts = st.sampled_from([0.05, 0.2, 0.5])
seconds = st.sampled_from([0.01, 0.1, 0.5, 0.9])
conditions = st.sampled_from([1.0, 1e2, 1e4, 1e6])


def case(seed: int, size: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """H, s, y; the curvature s'y has either sign, is tiny, or is what H predicts."""
    generator = generator_of(seed)
    H = random_spd(size, generator, condition)
    s, y = torch.randn(2, size, generator=generator, dtype=torch.float64)
    kind = seed % 4
    if kind == 1:  # adversarial: y nearly along an eigenvector of H
        y = torch.linalg.eigh(H)[1][:, seed % size] + 1e-3 * y
    if kind == 2:
        y = torch.linalg.inv(H) @ s * 10 ** float(y[0])
    if kind == 3:
        y = y * 10 ** float(3 * s[0])
    return H, s, y


def spectrum(H: Tensor) -> tuple[float, float]:
    values = torch.linalg.eigvalsh(H)
    return float(values[0]), float(values[-1])


def updated(H: Tensor, pair: DampedPair) -> Tensor:
    result = H.clone()
    bfgs_inverse_update_(result, pair.step, pair.change, H @ pair.change, torch.tensor(True))
    return result


@given(seeds, sizes, conditions, firsts, seconds)
def test_double_damping_theorems(seed: int, size: int, condition: float, mu1: float, mu2: float) -> None:
    H, s, y = case(seed, size, condition)
    mu, M = spectrum(H)
    a = max(1 / mu1, M)
    pair = DoubleDamping(mu1).damp(s, y, H @ y, mu2)
    curvature = pair.step @ pair.change
    noise = 1e-9 * float((y @ H @ y).abs() + pair.step.norm() * y.norm())
    assert mu1 * (y @ H @ y) <= pair.step @ y * SLACK + noise  # D1
    assert mu2 * (pair.step @ pair.step) <= curvature * SLACK  # D2
    assert pair.change @ H @ pair.change <= a * curvature * SLACK + noise  # D3
    assert pair.change @ pair.change <= max(1, 1 / (mu1 * mu)) * curvature * SLACK + noise  # D4


@given(seeds, sizes, conditions, firsts, st.sampled_from([0.01, 0.5, 0.9, 1.0, 3.0]))
def test_powell_then_lm_theorems(seed: int, size: int, condition: float, mu1: float, mu2: float) -> None:
    H, s, y = case(seed, size, condition)
    mu, M = spectrum(H)
    pair = PowellThenLM(mu1).damp(s, y, H @ y, mu2)
    curvature = pair.step @ pair.change
    noise = 1e-9 * float((y @ H @ y).abs() + pair.step.norm() * y.norm())
    assert mu1 * (y @ H @ y) <= pair.step @ y * SLACK + noise
    assert mu2 * (pair.step @ pair.step) <= curvature * SLACK
    assert pair.change @ H @ pair.change <= (1 / mu1 + mu2 * M) * curvature * SLACK + noise
    assert pair.change @ pair.change <= (1 / (mu1 * mu) + mu2) * curvature * SLACK + noise


@given(seeds, sizes, st.sampled_from([1.0, 1e2, 1e4]), firsts, seconds)
def test_one_update_stays_between_its_bounds(seed: int, size: int, condition: float, mu1: float, mu2: float) -> None:
    H, s, y = case(seed, size, condition)
    mu, M = spectrum(H)
    a = max(1 / mu1, M)
    after = updated(H, DoubleDamping(mu1).damp(s, y, H @ y, mu2))
    root = torch.linalg.cholesky(torch.linalg.inv(H))  # B = root root'
    low, high = spectrum(after)
    slack = 1 + 1e-10 * high / low
    assert spectrum(root.T @ after @ root)[0] * SLACK * slack >= 1 / (1 + a)  # U1
    assert 1 / low <= (1 / mu + max(1, 1 / (mu1 * mu))) * SLACK * slack  # U2
    assert high <= ((math.sqrt(M) + math.sqrt(a / mu2)) ** 2 + 1 / mu2) * SLACK  # U3
    step, _ = powell_on_inverse(s, y, H @ y, mu1)
    only = updated(H, DampedPair(step, y, torch.tensor(True), torch.tensor(False)))
    low, high = spectrum(only)
    assert spectrum(root.T @ only @ root)[0] * SLACK * (1 + 1e-10 * high / low) >= mu1 / (1 + mu1)  # U4


@given(seeds, sizes, conditions, firsts, seconds)
def test_rules_agree_with_the_transcriptions(seed: int, size: int, condition: float, mu1: float, mu2: float) -> None:
    H, s, y = case(seed, size, condition)
    arrays = (s.numpy(), y.numpy(), (H @ y).numpy())
    before = [value.clone() for value in (s, y, H)]
    for rule, plain in (
        (DoubleDamping(mu1), reference.double_damping(*arrays, mu1, mu2)),
        (PowellThenLM(mu1), reference.powell_then_lm(*arrays, mu1, mu2)),
    ):
        pair = rule.damp(s, y, H @ y, mu2)
        scale = 1 + float(np.linalg.norm(plain.s)) + float(np.linalg.norm(plain.y))
        close(pair.step / scale, torch.from_numpy(plain.s) / scale, 1e-9)
        close(pair.change / scale, torch.from_numpy(plain.y) / scale, 1e-9)
        assert (bool(pair.first), bool(pair.second)) == (plain.powell, plain.lm)
    assert all(torch.equal(a, b) for a, b in zip(before, (s, y, H), strict=True))


@given(seeds, sizes, firsts, seconds)
def test_good_pairs_are_left_alone(seed: int, size: int, mu1: float, mu2: float) -> None:
    generator = generator_of(seed)
    B = random_spd(size, generator, 2.0) + torch.eye(size, dtype=torch.float64)  # eigenvalues above 1 > mu2
    s = torch.randn(size, generator=generator, dtype=torch.float64)
    y = B @ s
    pair = DoubleDamping(mu1).damp(s, y, torch.linalg.inv(B) @ y, mu2)
    assert not pair.first and not pair.second
    assert torch.equal(pair.step, s) and torch.equal(pair.change, y)


@pytest.mark.parametrize("rule", [DoubleDamping(), PowellThenLM(), NoDamping()])
@pytest.mark.parametrize("zero", ["step", "change", "both"])
def test_degenerate_pairs_stay_finite(rule: PairDamping, zero: str) -> None:
    """The first step of an average, a dead layer: no 0/0 may come out of a damping rule."""
    s, y = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    s, y = (torch.zeros(2) if zero in (name, "both") else value for name, value in (("step", s), ("change", y)))
    pair = rule.damp(s, y, y, 0.5)
    assert pair.step.isfinite().all() and pair.change.isfinite().all()
    if isinstance(rule, NoDamping):
        assert torch.equal(pair.step, s) and torch.equal(pair.change, y) and not pair.first and not pair.second
    elif zero == "change":
        assert pair.step @ pair.change > 0  # damped into a usable pair


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 2.0, float("nan"), float("inf"), "0.2", None])
def test_mu1_is_checked(value: float) -> None:
    for rule in (DoubleDamping, PowellThenLM):
        with pytest.raises(ArgumentError, match="mu1"):
            rule(value)


def test_mu2_is_checked() -> None:
    for value in (0.0, 1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ArgumentError, match="PowellThenLM"):
            DoubleDamping().validate(value)
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="> 0"):
            PowellThenLM().validate(value)
    DoubleDamping().validate(0.999)
    PowellThenLM().validate(20.0)
    NoDamping().validate(0.0)
