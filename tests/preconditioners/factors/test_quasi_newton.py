"""BFGS, L-BFGS and Hessian-action factors against the transcriptions, and theorem T6."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate.curvature import LayerStatistics, discover_layers
from osculate.preconditioners import (
    BFGS,
    LBFGS,
    CurvatureTest,
    DoubleDamping,
    HessianActionBFGS,
    NoDamping,
    ZeroStartAverage,
)
from osculate.preconditioners.factors.bfgs import BFGSState, HessianActionState
from osculate.preconditioners.factors.lbfgs import LBFGSState, append_pairs_
from osculate.preconditioners.linalg import inverse_of_many
from reference import pairs as reference
from reference.lbfgs import PairStore
from torch import Tensor, nn

seeds = st.integers(0, 2**31)
sizes = st.integers(2, 6)
NEWEST = ZeroStartAverage(0.0)
SKIP_TOLERANCE = 1e-4  # PAPERS 1.2, skip rules


def at_outputs(preactivation: Tensor, gradient: Tensor) -> LayerStatistics:
    """A record of the batch means at the pre-activations of one layer."""
    (layer,) = discover_layers(nn.Linear(1, len(gradient)).double())
    return LayerStatistics(layer, 4, 1, mean_preactivation=preactivation, mean_gradient=gradient)


def at_inputs(rows: Tensor, bias: bool = False) -> LayerStatistics:
    (layer,) = discover_layers(nn.Linear(rows.shape[1], 1, bias=bias).double())
    return LayerStatistics(layer, len(rows), 1, inputs=rows)


def offers(generator: torch.Generator, size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs; every third has negative curvature and must be rejected when nothing damps it."""
    result = []
    for index in range(count):
        s = torch.randn(size, generator=generator, dtype=torch.float64)
        y = random_spd(size, generator, 10.0) @ s
        result.append((s, -y if index % 3 == 2 else y))
    return result


@given(seeds, st.integers(1, 5), st.integers(0, 12), sizes)
def test_lbfgs_is_the_reference_with_overflow_and_rejections(seed: int, memory: int, count: int, size: int) -> None:
    """Two loops, compact form and p dense updates, for stores that are empty, partial, full and overflowing."""
    generator = generator_of(seed)
    factor = LBFGS(memory, NoDamping(), NEWEST, initial=0.7)
    state, store = factor.init(size, torch.zeros(1, dtype=torch.float64)), PairStore(memory, 0.7)
    zero, value = torch.zeros(size, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64)
    for s, y in offers(generator, size, count):
        reason = store.offer(s.numpy(), y.numpy(), np.full(size, 0.1), SKIP_TOLERANCE)
        gradient = torch.full((size,), 0.1, dtype=torch.float64)
        events = factor.observe_step(state, at_outputs(zero, gradient), at_outputs(s, gradient + y), "outputs", 0.5)
        assert bool(events["rejected_pairs"]) == (reason != 0)
    scale = float(np.linalg.norm(store.dense(size)))
    expected = [store.dense(size), store.compact(size)]
    dense = factor.to_dense(state, 0.5)
    for matrix in expected:
        close(dense / scale, torch.from_numpy(matrix) / scale, 1e-8)
    close(factor.left(state, value) / scale, torch.from_numpy(store.two_loop(value.numpy())) / scale, 1e-8)
    close(factor.right(state, value.T) / scale, factor.left(state, value).T / scale, 1e-12)
    assert torch.linalg.eigvalsh((dense + dense.T) / 2)[0] > 0


def test_a_rejected_pair_pushes_none_out_and_leaves_no_nan() -> None:
    factor = LBFGS(2, NoDamping(), NEWEST)
    state = factor.init(3, torch.zeros(1, dtype=torch.float64))
    basis = torch.eye(3, dtype=torch.float64)
    for vector in basis[:2]:
        append_pairs_([state], vector[None], vector[None], torch.tensor([True]))
    saved = {name: value.clone() for name, value in state.to_dict().items() if isinstance(value, Tensor)}
    for spoilt in (basis[2] * float("nan"), basis[2] * float("inf"), basis[2]):
        append_pairs_([state], spoilt[None], basis[2:], torch.tensor([False]))
    assert all(torch.equal(saved[name], state.to_dict()[name]) for name in saved)
    append_pairs_([state], basis[2:], basis[2:], torch.tensor([True]))
    assert torch.equal(state.steps, basis[1:])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copied_store_has_one_memory_of_its_own(copied: Callable[[LBFGSState], LBFGSState]) -> None:
    """Steps and changes are views of one tensor, in a copy of its own one."""
    factor = LBFGS(3, NoDamping(), NEWEST)
    state = factor.init(3, torch.zeros(1, dtype=torch.float64))
    basis = torch.eye(3, dtype=torch.float64)
    append_pairs_([state], basis[0][None], (2.0 * basis[0])[None], torch.tensor([True]))
    twin = copied(state)
    for own in (state, twin):
        append_pairs_([own], basis[1][None], (4.0 * basis[1])[None], torch.tensor([True]))
    append_pairs_([state], basis[2][None], (8.0 * basis[2])[None], torch.tensor([True]))
    close(factor.to_dense(twin, 0.0), torch.diag(torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)), 1e-12)
    close(factor.to_dense(state, 0.0), torch.diag(torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)), 1e-12)
    assert list(twin.to_dict()) == ["steps", "changes", "cross", "gram", "solver", "pair"]


@given(seeds, sizes, st.integers(1, 8), st.floats(0.0, 0.95), st.sampled_from([0.1, 0.5, 0.9]))
def test_factors_follow_the_transcription(seed: int, size: int, count: int, decay: float, mu2: float) -> None:
    """Average the undamped pair, damp it with the current H, test it, update: both output factors, step by step."""
    generator = generator_of(seed)
    dense, limited = BFGS(DoubleDamping(), ZeroStartAverage(decay)), LBFGS(20, DoubleDamping(), ZeroStartAverage(decay))
    like = torch.zeros(1, dtype=torch.float64)
    state, other = dense.init(size, like), limited.init(size, like)
    H, s_mean, y_mean = np.eye(size), np.zeros(size), np.zeros(size)
    for _ in range(count):
        h, g, s, y = torch.randn(4, size, generator=generator, dtype=torch.float64)
        before, after = at_outputs(h, g), at_outputs(h + s, g + y)
        s_mean = decay * s_mean + (1 - decay) * s.numpy()
        y_mean = decay * y_mean + (1 - decay) * y.numpy()
        pair = reference.double_damping(s_mean, y_mean, H @ y_mean, 0.2, mu2)
        reason = reference.reason_to_skip(pair.s, pair.y, g.numpy(), SKIP_TOLERANCE)
        if reason == 0:
            H = reference.inverse_bfgs_update(H, pair.s, pair.y)
        for factor, own in ((dense, state), (limited, other)):
            events = factor.observe_step(own, before, after, "outputs", mu2)
            assert bool(events["rejected_pairs"]) == (reason != 0)
            assert bool(events["damped_first"]) == pair.powell and bool(events["damped_second"]) == pair.lm
            scale = float(np.linalg.norm(H))
            close(factor.to_dense(own, mu2) / scale, torch.from_numpy(H) / scale, 1e-7)
        close(state.pair.step, torch.from_numpy(s_mean), 1e-9)
        close(state.pair.change, torch.from_numpy(y_mean), 1e-9)


@pytest.mark.parametrize("factor", [BFGS(), LBFGS(3)], ids=["dense", "limited"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["preactivation", "gradient"])
def test_a_non_finite_pair_never_enters(factor: BFGS | LBFGS, value: float, place: str) -> None:
    state = factor.init(3, torch.zeros(1, dtype=torch.float64))
    h, g, s, y = torch.randn(4, 3, dtype=torch.float64)
    factor.observe_step(state, at_outputs(h, g), at_outputs(h + s, g + y), "outputs", 0.5)
    tensors = [tensor.clone() for tensor in state.tensors()]
    bad = h.clone() if place == "preactivation" else g.clone()
    bad[1] = value
    after = at_outputs(bad, g) if place == "preactivation" else at_outputs(h, bad)
    events = factor.observe_step(state, at_outputs(h, g), after, "outputs", 0.5)
    assert bool(events["rejected_pairs"])
    assert all(torch.equal(a, b) for a, b in zip(tensors, state.tensors(), strict=True))
    factor.observe_step(state, at_outputs(h, g), at_outputs(h + s, g + y), "outputs", 0.5)
    assert all(tensor.isfinite().all() for tensor in state.tensors())


def action_state(factor: HessianActionBFGS, A: Tensor, H: Tensor) -> HessianActionState:
    state = factor.init(len(A), A)
    state.second_moment.copy_(A)
    state.inverse = H.clone()
    return state


@given(seeds, sizes, st.floats(0.01, 2.0))
def test_hessian_action_interlaces(seed: int, size: int, damping: float) -> None:
    """T6: with a fixed A the spectrum of E = A^(1/2) H A^(1/2) never leaves [min(1, .), max(1, .)]."""
    generator = generator_of(seed)
    A, H = random_spd(size, generator), random_spd(size, generator)
    damped = A + damping * torch.eye(size, dtype=A.dtype)
    factor = HessianActionBFGS()
    state, root = action_state(factor, A, H), torch.linalg.cholesky(damped)
    spectrum, distance = torch.linalg.eigvalsh(root.T @ H @ root), float("inf")
    plain = H.numpy()
    for _ in range(3 * size):
        rows = torch.randn(4, size, generator=generator, dtype=torch.float64)
        events = factor.observe_step(state, at_inputs(rows), None, "inputs", damping)
        s = plain @ rows.mean(0).numpy()
        if not bool(events["rejected_pairs"]):
            plain = reference.inverse_bfgs_update(plain, s, damped.numpy() @ s)
        close(state.inverse / np.linalg.norm(plain), torch.from_numpy(plain / np.linalg.norm(plain)), 1e-8)
        E = root.T @ state.inverse @ root
        new = torch.linalg.eigvalsh(E)
        assert new[0] >= min(1.0, float(spectrum[0])) - 1e-9
        assert new[-1] <= max(1.0, float(spectrum[-1])) * (1 + 1e-9)
        now = float((E - torch.eye(size, dtype=A.dtype)).norm())
        assert now <= distance * (1 + 1e-9) + 1e-9
        spectrum, distance = new, now
    assert torch.equal(state.second_moment, A)


@given(seeds, sizes, st.floats(0.01, 2.0))
def test_hessian_action_stays_at_the_exact_inverse(seed: int, size: int, damping: float) -> None:
    generator = generator_of(seed)
    A = random_spd(size, generator)
    factor = HessianActionBFGS()
    state = action_state(factor, A, torch.eye(size, dtype=A.dtype))
    factor.install(state, inverse_of_many(factor.matrices(state), [damping]))
    exact = state.inverse.clone()
    for _ in range(5):
        rows = torch.randn(4, size, generator=generator, dtype=torch.float64)
        factor.observe_step(state, at_inputs(rows), None, "inputs", damping)
    close(state.inverse, exact, 1e-8)


def test_hessian_action_skips_zero_and_non_finite_inputs() -> None:
    factor = HessianActionBFGS()
    A = random_spd(3, generator_of(0))
    state = action_state(factor, A, torch.linalg.inv(A))
    before = state.inverse.clone()
    for rows in (torch.zeros(4, 3), torch.full((4, 3), float("nan")), torch.full((4, 3), float("inf"))):
        events = factor.observe_step(state, at_inputs(rows.double()), None, "inputs", 0.5)
        assert bool(events["rejected_pairs"]) and torch.equal(state.inverse, before)


def test_a_failed_inverse_keeps_the_last_good_one() -> None:
    factor = HessianActionBFGS()
    state = action_state(factor, -1e9 * torch.eye(2, dtype=torch.float64), 3 * torch.eye(2, dtype=torch.float64))
    factor.install(state, inverse_of_many(factor.matrices(state), [0.1]))
    close(state.inverse, 3 * torch.eye(2, dtype=torch.float64))


def test_bfgs_starts_as_the_identity() -> None:
    for factor in (BFGS(), LBFGS(4)):
        state = factor.init(3, torch.zeros(1, dtype=torch.float64))
        close(factor.to_dense(state, 0.5), torch.eye(3, dtype=torch.float64))
        if isinstance(state, BFGSState):
            assert state.pair.weight == 0.0


@pytest.mark.parametrize(("ratio", "accepted"), [(0.99, False), (1.01, True), (-1.0, False), (0.0, False)])
def test_the_skip_rule_is_relative_to_step_and_gradient(ratio: float, accepted: bool) -> None:
    """s'y > 1e-4 |s|^2 |v|, at any scale of s and v."""
    for scale in (1e-6, 1.0, 1e6):
        s, v = scale * torch.tensor([3.0, 4.0]).double(), torch.tensor([0.0, 2.0]).double() / scale
        y = ratio * 1e-4 * v.norm() * s
        assert bool(CurvatureTest().accepts(s, y, v)) == accepted
    assert not CurvatureTest().accepts(s, s, v * float("nan"))
    assert bool(CurvatureTest().accepts(s, 1e-30 * s, torch.zeros(2).double()))
