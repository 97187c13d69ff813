"""The theorems on secant pairs and quasi-Newton updates, checked on the transcriptions in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.lbfgs import PairStore
from reference.pairs import (
    double_damping,
    inverse_bfgs_update,
    merged_double_damping,
    powell_h_only,
    powell_then_lm,
)

SLACK = 1 + 1e-7

seeds = st.integers(0, 2**32 - 1)
dimensions = st.integers(2, 6)
powell_constants = st.sampled_from([0.05, 0.2, 0.5])
identity_constants = st.sampled_from([0.01, 0.1, 0.5, 0.9])


def spd(generator: np.random.Generator, n: int, log_condition: float = 4.0) -> np.ndarray:
    """A random symmetric positive definite matrix with eigenvalues around one."""
    Q, _ = np.linalg.qr(generator.standard_normal((n, n)))
    eigenvalues = 10.0 ** generator.uniform(-log_condition / 2, log_condition / 2, n)
    return (Q * eigenvalues) @ Q.T


def pair(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A random pair; its curvature s.y has either sign."""
    return generator.standard_normal(n), generator.standard_normal(n) * 10.0 ** generator.uniform(-1, 1)


@given(seeds, dimensions, powell_constants, identity_constants)
def test_double_damping_bounds(seed: int, n: int, mu1: float, mu2: float) -> None:
    generator = np.random.default_rng(seed)
    H, (s, y) = spd(generator, n), pair(generator, n)
    eigenvalues = np.linalg.eigvalsh(H)
    largest, smallest = eigenvalues[-1], eigenvalues[0]
    damped = double_damping(s, y, H @ y, mu1, mu2)
    sy = damped.s @ damped.y
    assert mu1 * (y @ H @ y) <= damped.s @ y * SLACK + 1e-9
    assert mu2 * (damped.s @ damped.s) <= sy * SLACK
    assert damped.y @ H @ damped.y <= max(1 / mu1, largest) * sy * SLACK
    assert damped.y @ damped.y <= max(1, 1 / (mu1 * smallest)) * sy * SLACK


@given(seeds, dimensions, powell_constants, identity_constants)
def test_powell_then_lm_bounds(seed: int, n: int, mu1: float, mu2: float) -> None:
    generator = np.random.default_rng(seed)
    H, (s, y) = spd(generator, n), pair(generator, n)
    eigenvalues = np.linalg.eigvalsh(H)
    damped = powell_then_lm(s, y, H @ y, mu1, mu2)
    sy = damped.s @ damped.y
    assert mu2 * (damped.s @ damped.s) <= sy * SLACK
    assert damped.y @ H @ damped.y <= (1 / mu1 + mu2 * eigenvalues[-1]) * sy * SLACK
    assert damped.y @ damped.y <= (1 / (mu1 * eigenvalues[0]) + mu2) * sy * SLACK


@given(seeds, dimensions, powell_constants, identity_constants)
def test_damping_leaves_good_pairs_alone(seed: int, n: int, mu1: float, mu2: float) -> None:
    generator = np.random.default_rng(seed)
    B = spd(generator, n, 0.5)  # y = B s and H = B^-1: s.y = y.Hy > mu1 y.Hy
    s = generator.standard_normal(n)
    y = (1 + mu2) * B @ s
    damped = double_damping(s, y, np.linalg.inv(B) @ y / (1 + mu2), mu1, min(mu2, 0.5))
    assert not damped.powell and not damped.lm
    assert np.array_equal(damped.s, s) and np.array_equal(damped.y, y)


@given(seeds, dimensions, powell_constants)
def test_merged_double_damping_reaches_the_larger_bound(seed: int, n: int, mu: float) -> None:
    generator = np.random.default_rng(seed)
    H, (s, y) = spd(generator, n), pair(generator, n)
    damped = merged_double_damping(s, y, H, mu)
    assert mu * max(y @ H @ y, s @ s) <= damped.s @ damped.y * SLACK + 1e-9
    assert not (damped.powell and damped.lm)


@given(seeds, dimensions, powell_constants, identity_constants)
def test_one_update_keeps_the_inverse_between_its_bounds(seed: int, n: int, mu1: float, mu2: float) -> None:
    generator = np.random.default_rng(seed)
    H, (s, y) = spd(generator, n, 3.0), pair(generator, n)
    eigenvalues = np.linalg.eigvalsh(H)
    largest, smallest = eigenvalues[-1], eigenvalues[0]
    a = max(1 / mu1, largest)
    damped = double_damping(s, y, H @ y, mu1, mu2)
    updated = inverse_bfgs_update(H, damped.s, damped.y)
    assert np.allclose(updated @ damped.y, damped.s, atol=1e-8 * np.linalg.norm(updated))  # the secant equation
    root = np.linalg.cholesky(np.linalg.inv(H))  # B = root root^T, so root^T H+ root >= 1 / (1 + a)
    assert np.linalg.eigvalsh(root.T @ updated @ root)[0] * SLACK >= 1 / (1 + a)
    spectrum = np.linalg.eigvalsh(updated)
    assert 1 / spectrum[0] <= (1 / smallest + max(1, 1 / (mu1 * smallest))) * SLACK
    assert spectrum[-1] <= ((np.sqrt(largest) + np.sqrt(a / mu2)) ** 2 + 1 / mu2) * SLACK
    powell = powell_h_only(s, y, H @ y, mu1)
    only = inverse_bfgs_update(H, powell.s, powell.y)
    assert np.linalg.eigvalsh(root.T @ only @ root)[0] * SLACK >= mu1 / (1 + mu1)


@given(seeds, st.integers(1, 4), st.sampled_from([(0.5, 1.0), (0.2, 0.5), (0.9, 0.9), (0.1, 0.3)]))
def test_limited_memory_is_uniformly_bounded_with_the_skip_test(seed: int, p: int, mu: tuple[float, float]) -> None:
    mu2, mu3 = mu
    generator, n, store = np.random.default_rng(seed), 4, PairStore(p)
    while len(store.S) < p:
        s = generator.standard_normal(n)
        y = spd(generator, n, 1.5) @ s
        if s @ y >= mu2 * s @ s and y @ y <= s @ y / mu3:
            assert store.offer(s, y, np.zeros(n), 1e-4) == 0
    spectrum, c = np.linalg.eigvalsh(store.dense(n)), 1 / (mu2 * mu3)
    series = p if c == 1 else (c**p - 1) / (c - 1)
    assert 1 / (1 + p / mu3) <= spectrum[0] * SLACK
    assert spectrum[-1] <= (c**p + series / mu2) * SLACK


@given(seeds, st.integers(1, 5), st.integers(0, 8), st.integers(2, 6))
def test_three_forms_of_limited_memory_agree(seed: int, memory: int, offers: int, n: int) -> None:
    generator, store = np.random.default_rng(seed), PairStore(memory)
    kept: list[np.ndarray] = []
    for _ in range(offers):
        s = generator.standard_normal(n)
        y = spd(generator, n, 1.0) @ s
        assert store.offer(s, y, y, 1e-4) == 0
        kept.append(s)
    assert len(store.S) == min(memory, offers)
    assert all(np.array_equal(a, b) for a, b in zip(store.S, kept[-memory:], strict=False))
    H, v = store.dense(n), generator.standard_normal((n, 3))
    scale = np.linalg.norm(H)
    assert np.linalg.norm(store.compact(n) - H) <= 1e-9 * scale
    assert np.linalg.norm(store.two_loop(v) - H @ v) <= 1e-9 * scale * np.linalg.norm(v)
    assert np.allclose(store.two_loop(v[:, 0]), store.two_loop(v)[:, 0], rtol=1e-10)


def test_a_rejected_pair_pushes_none_out() -> None:
    store, basis = PairStore(2), np.eye(3)
    for vector in basis[:2]:
        assert store.offer(vector, vector, vector, 1e-4) == 0
    assert store.offer(basis[2], -basis[2], basis[2], 1e-4) == 2
    assert store.offer(basis[2], 1e-5 * basis[2], basis[2], 1e-4) == 2
    assert store.offer(np.array([np.inf, 0, 0]), basis[2], basis[2], 1e-4) == 3
    assert [s.tolist() for s in store.S] == basis[:2].tolist()
    assert store.offer(basis[2], basis[2], basis[2], 1e-4) == 0
    assert [s.tolist() for s in store.S] == basis[1:].tolist()


@given(seeds, dimensions)
def test_hessian_action_moves_towards_the_inverse(seed: int, n: int) -> None:
    """With a fixed A_LM, E = A^(1/2) H A^(1/2) interlaces: its spectrum never leaves [min(1, .), max(1, .)]."""
    generator = np.random.default_rng(seed)
    A, H = spd(generator, n, 2.0), spd(generator, n, 2.0)
    root = np.linalg.cholesky(A)  # root^T H root has the spectrum of E
    distance, spectrum = np.inf, np.linalg.eigvalsh(root.T @ H @ root)
    for _ in range(4 * n):
        s = H @ generator.standard_normal(n)
        H = inverse_bfgs_update(H, s, A @ s)
        E = root.T @ H @ root
        new = np.linalg.eigvalsh(E)
        assert min(1, spectrum[0]) <= new[0] * SLACK and new[-1] <= max(1, spectrum[-1]) * SLACK
        assert np.linalg.norm(E - np.eye(n)) <= distance * SLACK
        distance, spectrum = np.linalg.norm(E - np.eye(n)), new
    s = H @ np.ones(n)
    repeated = inverse_bfgs_update(H, s, A @ s)
    assert np.allclose(inverse_bfgs_update(repeated, s, A @ s), repeated, rtol=1e-6, atol=1e-8 * np.linalg.norm(H))


def test_damping_keeps_the_inverse_small_where_curvature_is_indefinite() -> None:
    """Noisy indefinite curvature, 2000 updates: with double damping the largest eigenvalue stays ten times smaller."""
    n, largest = 20, {}
    for name in ("damped", "plain"):
        generator = np.random.default_rng(3)
        G = spd(generator, n, 2.0) - 0.5 * np.eye(n)
        H, top = np.eye(n), 0.0
        for _ in range(2000):
            s = generator.standard_normal(n)
            y = G @ s + 0.5 * generator.standard_normal(n)
            if name == "damped":
                damped = double_damping(s, y, H @ y, 0.2, np.sqrt(0.3))
                s, y = damped.s, damped.y
            elif s @ y <= 1e-4 * s @ s:
                continue
            H = inverse_bfgs_update(H, s, y)
            top = max(top, float(np.linalg.eigvalsh(H)[-1]))
        largest[name] = top
    assert largest["damped"] * 10 <= largest["plain"], largest


def test_double_damping_with_too_much_damping_reverses_the_pair() -> None:
    """Why lambda >= 1 must be refused: theta leaves [0, 1]."""
    s, y = np.array([1.0, 0.0]), np.array([0.5, 1.0])
    damped = double_damping(s, y, 0.1 * y, 0.2, 1.5)
    theta = (1 - 1.5) / (1 - 0.5)
    assert damped.y == pytest.approx(theta * y + (1 - theta) * s)
    assert theta < 0 and damped.y[1] < 0 < y[1]
