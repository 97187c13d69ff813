"""Powell-H, merged double damping, Powell-B0 and the two-sided skip: what they guarantee, and what they do not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate import ArgumentError
from osculate.preconditioners import (
    LBFGS,
    CurvatureTest,
    DoubleDamping,
    MergedDoubleDamping,
    PairDamping,
    PowellB0,
    PowellH,
    TwoSidedCurvatureTest,
)
from osculate.preconditioners.factors.lbfgs import append_pairs_
from osculate.preconditioners.linalg import bfgs_inverse_update_
from reference import pairs as reference
from torch import Tensor

SLACK = 1 + 1e-7
seeds = st.integers(0, 2**31)
sizes = st.integers(2, 5)
firsts = st.sampled_from([0.05, 0.2, 0.5])
conditions = st.sampled_from([1.0, 1e2, 1e4])


def case(seed: int, size: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """H, s, y; the curvature s'y has either sign, any size, or is what H predicts."""
    generator = generator_of(seed)
    H = random_spd(size, generator, condition)
    s, y = torch.randn(2, size, generator=generator, dtype=torch.float64)
    if seed % 3 == 1:
        y = torch.linalg.inv(H) @ s * 10 ** float(y[0])
    if seed % 3 == 2:
        y = y * 10 ** float(3 * s[0])
    return H, s, y


def spectrum(H: Tensor) -> tuple[float, float]:
    values = torch.linalg.eigvalsh(H)
    return float(values[0]), float(values[-1])


def updated(H: Tensor, step: Tensor, change: Tensor) -> Tensor:
    result = H.clone()
    bfgs_inverse_update_(result, step, change, H @ change, torch.tensor(True))
    return result


def relative_floor(H: Tensor, after: Tensor) -> float:
    """Smallest eigenvalue of H^{-1/2} H+ H^{-1/2}."""
    root = torch.linalg.cholesky(torch.linalg.inv(H))
    return spectrum(root.T @ after @ root)[0]


@given(seeds, sizes, conditions, firsts)
def test_powell_h_keeps_its_half_of_the_theorems(seed: int, size: int, condition: float, mu1: float) -> None:
    H, s, y = case(seed, size, condition)
    mu, _ = spectrum(H)
    pair = PowellH(mu1).damp(s, y, H @ y, 0.5)
    curvature = pair.step @ pair.change
    assert torch.equal(pair.change, y) and not pair.second
    noise = 1e-9 * float((y @ H @ y) + pair.step.norm() * y.norm())
    assert mu1 * (y @ H @ y) <= curvature * SLACK + noise  # D1, and D3 with a = 1 / mu1
    assert y @ y <= curvature / (mu1 * mu) * SLACK + noise / (mu1 * mu)  # D4
    after = updated(H, pair.step, pair.change)
    low, high = spectrum(after)
    assert relative_floor(H, after) * SLACK * (1 + 1e-10 * high / low) >= mu1 / (1 + mu1)  # U4


@given(st.floats(1e-6, 1e-2))
def test_powell_h_does_not_bound_the_new_matrix(small: float) -> None:
    """A change that is small and along the step satisfies D1, violates D2, and H+ grows like its inverse."""
    H = torch.eye(2, dtype=torch.float64)
    s = torch.tensor([1.0, 0.0], dtype=torch.float64)
    y, mu2 = small * s, 0.1
    pair = PowellH().damp(s, y, H @ y, mu2)
    assert not pair.first and pair.step @ pair.change < mu2 * pair.step @ pair.step
    assert spectrum(updated(H, pair.step, pair.change))[1] >= 0.99 / small
    double = DoubleDamping().damp(s, y, H @ y, mu2)
    assert spectrum(updated(H, double.step, double.change))[1] <= 1 / mu2 * SLACK  # what the second stage is for


@given(seeds, sizes, conditions, firsts)
def test_merged_double_damping_theorems(seed: int, size: int, condition: float, mu1: float) -> None:
    H, s, y = case(seed, size, condition)
    mu, M = spectrum(H)
    a, floor = max(1, M) / mu1, mu1 / max(1, M)
    pair = MergedDoubleDamping(mu1).damp(s, y, H @ y, 0.5)
    assert not (pair.first and pair.second)
    curvature = pair.step @ pair.change
    noise = 1e-9 * float(pair.step.norm() * pair.change.norm() + (pair.change @ H @ pair.change))
    assert floor * (pair.step @ pair.step) <= curvature * SLACK + noise
    assert pair.change @ H @ pair.change <= a * curvature * SLACK + a * noise
    assert pair.change @ pair.change <= max(1, 1 / mu) / mu1 * curvature * SLACK + max(1, 1 / mu) / mu1 * noise
    after = updated(H, pair.step, pair.change)
    low, high = spectrum(after)
    assert relative_floor(H, after) * SLACK * (1 + 1e-10 * high / low) >= 1 / (1 + a)  # U1 with this a
    assert high <= ((math.sqrt(M) + math.sqrt(a / floor)) ** 2 + 1 / floor) * SLACK  # U3 with this a and mu2


def test_merged_double_damping_does_not_know_mu2() -> None:
    """With a large H the pair is damped to mu1 y'Hy, which lies below mu2 |s|^2."""
    H = 100.0 * torch.eye(2, dtype=torch.float64)
    s, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    pair = MergedDoubleDamping(0.2).damp(s, y, H @ y, 0.5)
    assert pair.first and not pair.second
    assert pair.step @ pair.change < 0.5 * (pair.step @ pair.step)
    assert pair.step @ pair.change == pytest.approx(0.2 * float(y @ H @ y))


@given(seeds, sizes, conditions, firsts, st.sampled_from([1e-3, 0.1, 2.0]))
def test_powell_b0_bounds_the_curvature_from_below(
    seed: int, size: int, condition: float, mu1: float, floor: float
) -> None:
    H, s, y = case(seed, size, condition)
    pair = PowellB0(mu1, floor).damp(s, y, H @ y, 0.5)
    curvature = pair.step @ pair.change
    assert torch.equal(pair.step, s) and not pair.first
    noise = 1e-9 * float(s.norm() * pair.change.norm())
    assert mu1 * floor * (s @ s) <= curvature * SLACK + noise
    if s @ y > 0:  # y'y <= gamma s'y then holds for the pair itself, and damping keeps it up to 1 / mu1
        gamma = max(float((y @ y) / (s @ y)), floor)
        assert pair.change @ pair.change <= gamma / mu1 * curvature * SLACK + gamma / mu1 * noise


@given(st.floats(1e2, 1e6))
def test_powell_b0_does_not_bound_the_curvature_from_above(large: float) -> None:
    """A large change at a right angle to the step: |y|^2 / s'y grows with it, so D4 and U1 fail."""
    s, y = torch.tensor([1.0, 0.0]).double(), torch.tensor([-1e-3, large]).double()
    pair = PowellB0().damp(s, y, y, 0.5)
    assert pair.second and pair.change @ pair.change >= large * (pair.step @ pair.change)
    H = torch.eye(2, dtype=torch.float64)
    assert relative_floor(H, updated(H, pair.step, pair.change)) < 10 / large


@given(seeds, sizes, conditions, firsts)
def test_rules_agree_with_the_transcriptions(seed: int, size: int, condition: float, mu1: float) -> None:
    H, s, y = case(seed, size, condition)
    arrays = (s.numpy(), y.numpy(), (H @ y).numpy())
    before = [value.clone() for value in (s, y, H)]
    for rule, plain in (
        (PowellH(mu1), reference.powell_h_only(*arrays, mu1)),
        (MergedDoubleDamping(mu1), reference.merged_double_damping(s.numpy(), y.numpy(), H.numpy(), mu1)),
        (PowellB0(mu1, 0.3), reference.powell_b0(s.numpy(), y.numpy(), mu1, 0.3)),
    ):
        pair = rule.damp(s, y, H @ y, 0.5)
        scale = 1 + float(np.linalg.norm(plain.s)) + float(np.linalg.norm(plain.y))
        close(pair.step / scale, torch.from_numpy(plain.s) / scale, 1e-9)
        close(pair.change / scale, torch.from_numpy(plain.y) / scale, 1e-9)
        assert (bool(pair.first), bool(pair.second)) == (plain.powell, plain.lm)
    assert all(torch.equal(a, b) for a, b in zip(before, (s, y, H), strict=True))


@pytest.mark.parametrize("rule", [PowellH(), MergedDoubleDamping(), PowellB0()])
@pytest.mark.parametrize("zero", ["step", "change", "both"])
def test_degenerate_pairs_stay_finite(rule: PairDamping, zero: str) -> None:
    s, y = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    s, y = (torch.zeros(2) if zero in (name, "both") else value for name, value in (("step", s), ("change", y)))
    pair = rule.damp(s, y, y, 0.5)
    assert pair.step.isfinite().all() and pair.change.isfinite().all()
    assert pair.step @ pair.change >= 0
    rule.validate(0.0)
    rule.validate(7.0)  # no rule of these looks at mu2


@given(seeds, st.integers(1, 4), st.sampled_from([0.05, 0.3, 0.9]), st.sampled_from([0.01, 0.2, 1.0]))
def test_double_damping_with_the_two_sided_skip_bounds_limited_memory(
    seed: int, memory: int, mu2: float, mu3: float
) -> None:
    """The uniform bounds of PAPERS 1.4 (T4); without the second test an adversarial pair breaks the lower one."""
    generator, size, gamma = generator_of(seed), 3, 0.7
    factor, test = LBFGS(memory, initial=gamma), TwoSidedCurvatureTest(mu3, tolerance=0.0)
    state = factor.init(size, torch.zeros(1, dtype=torch.float64))
    c = 1 / (mu2 * mu3)
    lower = 1 / (1 / gamma + memory / mu3)
    upper = c**memory * gamma + (memory if c == 1 else (c**memory - 1) / (c - 1)) / mu2
    for _ in range(memory + 3):
        s, y = torch.randn(2, size, generator=generator, dtype=torch.float64)
        y = y * 10 ** float(2 * torch.randn((), generator=generator, dtype=torch.float64))
        H = factor.to_dense(state, 0.0)
        pair = DoubleDamping().damp(s, y, H @ y, mu2)
        accepted = test.accepts(pair.step, pair.change, s)
        append_pairs_([state], pair.step[None], pair.change[None], accepted[None])
        low, high = spectrum(factor.to_dense(state, 0.0))
        assert lower <= low * (1 + 1e-6) + 1e-10 * high and high <= upper * SLACK


def test_the_second_skip_test_is_an_upper_bound_of_curvature() -> None:
    s, v = torch.tensor([1.0, 0.0]).double(), torch.ones(2).double()
    assert TwoSidedCurvatureTest(0.5).accepts(s, 2.0 * s, v)
    assert not TwoSidedCurvatureTest(0.5).accepts(s, 2.0001 * s, v)
    assert CurvatureTest().accepts(s, 2.0001 * s, v)
    assert not TwoSidedCurvatureTest(0.5).accepts(s, -s, v)
    assert not TwoSidedCurvatureTest(0.5).accepts(s, s * math.nan, v)
    assert not TwoSidedCurvatureTest(0.5, tolerance=0.9).accepts(s, s, v)  # the lower test still counts


@pytest.mark.parametrize(
    ("make", "word"),
    [
        *((lambda rule=rule, bad=bad: rule(bad), "mu1") for rule in (PowellH, MergedDoubleDamping, PowellB0)
          for bad in (0.0, 1.0, math.nan, "0.2", None)),
        *((lambda bad=bad: PowellB0(floor=bad), "floor") for bad in (0.0, -1.0, math.inf, math.nan)),
        *((lambda bad=bad: CurvatureTest(bad), "tolerance") for bad in (-1e-4, math.inf, None)),
        *((lambda bad=bad: TwoSidedCurvatureTest(bad), "mu3") for bad in (0.0, -1.0, math.inf)),
        (lambda: TwoSidedCurvatureTest(0.1, -1.0), "tolerance"),
    ],
)  # fmt: skip
def test_numbers_are_checked(make: object, word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        make()  # type: ignore[operator]
