"""Rules with one factor for all layers: SelfConcordant, GlobalQuadratic, KLClip, against formulas written out again."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate import ArgumentError, CompatibilityError
from osculate.curvature import ExactHessian, HessianRowSums, Needs, SampledScores, SignedHessian
from osculate.stepsize import (
    ConstantStep,
    GlobalQuadratic,
    JointLayerwise,
    KLClip,
    RelativeBound,
    SelfConcordant,
    StepEvidence,
)
from torch import Tensor

seeds = st.integers(0, 2**31)
layers = st.integers(1, 5)


def evidence_of(seed: int, count: int, lr: float | Tensor = 1.0, with_forms: bool = True) -> StepEvidence:
    """Random slopes of both signs, norms over six orders of magnitude, and a consistent positive definite M."""
    generator = generator_of(seed)
    slopes, gradient, exponents = torch.randn(3, count, generator=generator, dtype=torch.float64)
    norms = 10**exponents
    forms = random_spd(count, generator, 1e3) * torch.outer(norms, norms)
    names = [str(index) for index in range(count)]
    return StepEvidence(
        names,
        lr,  # type: ignore[arg-type]
        slopes=slopes * norms,
        gradient_slopes=gradient * norms,
        squared_norms=norms.square(),
        parameter_norms=torch.ones_like(norms),
        forms=forms if with_forms else None,
    )


def proposal(rule: Any, evidence: StepEvidence) -> Tensor:
    like = torch.zeros(1, dtype=torch.float64)
    proposed = rule.propose(rule.init(len(evidence.names), like), evidence)
    return proposed if isinstance(proposed, Tensor) else torch.tensor(proposed, dtype=torch.float64)


@given(seeds, layers, st.sampled_from([0.0, 0.3, 1.0, 7.0]), st.floats(0.1, 3.0))
def test_self_concordant_steps_are_the_formula(seed: int, count: int, constant: float, lr: float) -> None:
    evidence = evidence_of(seed, count, lr)
    assert evidence.gradient_slopes is not None and evidence.forms is not None
    rho = float(np.sum(evidence.gradient_slopes.numpy()))
    delta = math.sqrt(float(np.sum(evidence.forms.numpy())))
    expected = lr * rho / (delta * (constant * rho + delta)) if rho > 0 else 0.0
    alpha = proposal(SelfConcordant(constant=constant), evidence)
    close(alpha, torch.full((count,), expected, dtype=torch.float64))
    if constant:
        assert (alpha <= lr / (constant * delta) * (1 + 1e-12)).all()
    quadratic = rho / delta**2  # the quadratic model's own step is never shorter
    assert (alpha <= lr * max(quadratic, 0.0) * (1 + 1e-12)).all()


@given(seeds, layers, st.sampled_from([0.0, 1e-3, 2.0]), st.floats(0.1, 3.0))
def test_the_global_step_minimises_the_damped_model(seed: int, count: int, damping: float, lr: float) -> None:
    evidence = evidence_of(seed, count, lr)
    assert evidence.slopes is not None and evidence.forms is not None and evidence.squared_norms is not None
    r, M, n = evidence.slopes.numpy(), evidence.forms.numpy(), evidence.squared_norms.numpy()
    alpha = proposal(GlobalQuadratic(damping=damping), evidence)

    def model(step: float) -> float:
        ones = np.full(count, step)
        return float(-ones @ r + 0.5 * ones @ (M + damping * np.diag(n)) @ ones)

    chosen = float(alpha[0]) / lr
    assert torch.equal(alpha, alpha[:1].expand(count))
    if r.sum() <= 0:
        assert chosen == 0
    else:
        assert chosen == pytest.approx(r.sum() / (M.sum() + damping * n.sum()), rel=1e-9)
        assert all(model(chosen) <= model(factor * chosen) for factor in (0.5, 0.99, 1.01, 2.0))


@given(seeds, st.floats(0.1, 3.0))
def test_one_layer_makes_the_global_step_the_joint_step(seed: int, lr: float) -> None:
    evidence = evidence_of(seed, 1, lr)
    joint = JointLayerwise(decay=0.0, relative_ridge=0.0)
    close(proposal(GlobalQuadratic(), evidence), proposal(joint, evidence), 1e-8)


@given(seeds, layers)
def test_old_forms_are_scaled_to_the_present_lengths(seed: int, count: int) -> None:
    """Twice the direction with the same curvature: half the step, also where no form is measured."""
    first = evidence_of(seed, count)
    assert first.gradient_slopes is not None and first.slopes is not None and first.squared_norms is not None
    doubled = StepEvidence(
        first.names,
        1.0,
        slopes=2 * first.slopes,
        gradient_slopes=2 * first.gradient_slopes,
        squared_norms=4 * first.squared_norms,
    )
    for rule in (SelfConcordant(), GlobalQuadratic()):
        state = rule.init(count, torch.zeros(1, dtype=torch.float64))
        alpha = rule.propose(state, first)
        close(2 * rule.propose(state, doubled), alpha)


@given(seeds, layers, st.floats(1e-6, 1e3), st.floats(1e-3, 1e2))
def test_the_predicted_divergence_is_clipped_at_kappa(seed: int, count: int, kappa: float, lr: float) -> None:
    evidence = evidence_of(seed, count, lr)
    assert evidence.gradient_slopes is not None
    slopes = evidence.gradient_slopes.numpy()
    for rule in (ConstantStep(), GlobalQuadratic()):
        free = proposal(rule, evidence).expand(count).numpy()
        alpha = proposal(KLClip(rule, kappa), evidence).numpy()
        assert abs(float(np.sum(alpha**2 * slopes))) <= kappa * (1 + 1e-9)
        length = abs(float(np.sum(free**2 * slopes)))
        expected = free * (min(1.0, math.sqrt(kappa / length)) if length else 1.0)
        np.testing.assert_allclose(alpha, expected, rtol=1e-9)
    closed = lr * min(1.0, math.sqrt(kappa / (lr**2 * abs(float(slopes.sum())))))  # one learning rate: the libraries'
    close(proposal(KLClip(kappa=kappa), evidence), torch.full((count,), closed, dtype=torch.float64), 1e-9)


def test_a_clip_that_is_not_reached_or_infinite_changes_nothing() -> None:
    evidence = evidence_of(3, 3, 0.1)
    for kappa in (1e9, math.inf):
        close(proposal(KLClip(kappa=kappa), evidence), torch.full((3,), 0.1, dtype=torch.float64))
    still = StepEvidence(["0"], 0.1, gradient_slopes=torch.zeros(1))
    close(proposal(KLClip(), still), torch.full((1,), 0.1))


def test_half_precision_does_not_underflow_in_the_clip() -> None:
    evidence = StepEvidence(["0", "1"], 1e-6, gradient_slopes=torch.tensor([6e4, 6e4], dtype=torch.float16))
    assert proposal(KLClip(kappa=math.inf), evidence).isfinite().all()


@pytest.mark.parametrize("rule", [SelfConcordant(), GlobalQuadratic(), KLClip(), KLClip(GlobalQuadratic())])
def test_a_learning_rate_may_differ_between_layers(rule: Any) -> None:
    each = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    alpha, one = proposal(rule, evidence_of(7, 3, each)), proposal(rule, evidence_of(7, 3, 1.0))
    close(alpha / alpha[1], each)
    if not isinstance(rule, KLClip):
        close(alpha, each * one)


@pytest.mark.parametrize("rule", [SelfConcordant(every=2), GlobalQuadratic(every=2), KLClip(GlobalQuadratic(every=2))])
def test_what_the_rules_ask_for(rule: Any) -> None:
    assert Needs.SCORES in rule.needs and isinstance(rule.curvature, SampledScores)
    assert [rule.due(step) for step in range(3)] == [True, False, True]
    assert (Needs.SLOPES in rule.needs) == (not isinstance(rule, GlobalQuadratic))
    assert RelativeBound(rule).needs == rule.needs | Needs.NORMS


@pytest.mark.parametrize("rule", [SelfConcordant(), GlobalQuadratic()])
def test_no_curvature_and_negative_curvature_move_nothing(rule: Any) -> None:
    ones = torch.ones(2, dtype=torch.float64)
    for forms in (torch.zeros(2, 2).double(), -torch.eye(2).double()):
        evidence = StepEvidence(["0", "1"], 1.0, slopes=ones, gradient_slopes=ones, squared_norms=ones, forms=forms)
        assert (proposal(rule, evidence) == 0).all()


@pytest.mark.parametrize("rule", [SelfConcordant, GlobalQuadratic])
@pytest.mark.parametrize("form", [SignedHessian(), HessianRowSums()])
def test_forms_without_blocks_between_layers_are_refused(rule: Any, form: Any) -> None:
    with pytest.raises(CompatibilityError, match=rf"{rule.__name__}.*{type(form).__name__}.*ExactHessian\(\)"):
        rule(form)
    rule(ExactHessian())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: SelfConcordant(constant=-1.0), "constant"),
        (lambda: SelfConcordant(constant=math.inf), "constant"),
        (lambda: SelfConcordant(every=0), "every"),
        (lambda: SelfConcordant(decay=1.0), "decay"),
        (lambda: GlobalQuadratic(damping=-1.0), "damping"),
        (lambda: GlobalQuadratic(every=1.5), "every"),
        (lambda: GlobalQuadratic(decay=-0.1), "decay"),
        (lambda: KLClip(kappa=0.0), "kappa"),
        (lambda: KLClip(kappa=math.nan), "kappa"),
        (lambda: KLClip(kappa="1"), "kappa"),
    ],
)
def test_numbers_are_checked(make: Any, word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        make()
