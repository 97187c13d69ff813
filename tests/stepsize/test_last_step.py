"""Joint steps along directions and last steps: the transcription, the minimum over all of them, bounds and refusals."""

import math
from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from measuring import close, generator_of
from osculate.curvature import ExactHessian, HessianRowSums, Needs, SampledBatchScores, SignedHessian
from osculate.stepsize import (
    ConstantStep,
    JointLayerwise,
    JointWithLastStep,
    KLClip,
    RelativeBound,
    Safeguarded,
    StepEvidence,
    Unrestricted,
)
from reference.last_step import chosen_sizes
from torch import Tensor

seeds = st.integers(0, 2**31)
counts = st.integers(1, 5)


def case(seed: int, count: int, *, samples: int = 40, lr: Any = 1.0, dtype: Any = torch.float64) -> StepEvidence:
    """Positive definite forms along 2L directions of different lengths, slopes of either sign."""
    generator = generator_of(seed)
    lengths = torch.randn(2 * count, generator=generator, dtype=torch.float64).exp()
    scores = torch.randn(samples, 2 * count, generator=generator, dtype=torch.float64) * lengths
    slopes = torch.randn(2, 2 * count, generator=generator, dtype=torch.float64) * lengths
    names = [str(index) for index in range(count)]
    norms = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    values = (slopes[0], slopes[1], lengths.square(), norms, scores.T @ scores / samples)
    return StepEvidence(names, lr, *(value.to(dtype) for value in values))


def sizes_of(rule: Any, *sequence: StepEvidence) -> Tensor:
    """Of the last of several steps."""
    assert sequence[0].slopes is not None
    state = rule.init(len(sequence[0].names), sequence[0].slopes.new_zeros(()))
    return [rule.propose(state, evidence) for evidence in sequence][-1]


def without_last(evidence: StepEvidence, *layers: int) -> StepEvidence:
    """The same where some layers have no last step."""
    count = len(evidence.names)
    rows = [count + layer for layer in layers]
    changed = {
        name: getattr(evidence, name).clone() for name in ("slopes", "gradient_slopes", "squared_norms", "forms")
    }
    for value in changed.values():
        value[rows] = 0.0
    changed["forms"][:, rows] = 0.0
    return StepEvidence(evidence.names, evidence.lr, parameter_norms=evidence.parameter_norms, **changed)


def given_slopes(evidence: StepEvidence) -> np.ndarray:
    """Momentum's along the directions, the gradient's along the last steps."""
    count = len(evidence.names)
    return torch.cat([evidence.slopes[:count], evidence.gradient_slopes[count:]]).numpy()  # type: ignore[index]


@given(seeds, counts, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.1, 1.0]), st.floats(0.1, 3.0))
def test_the_rule_is_the_transcription(seed: int, count: int, ridge: float, relative: float, lr: float) -> None:
    rule = JointWithLastStep(decay=0.0, ridge=ridge, relative_ridge=relative)
    whole = case(seed, count, lr=lr)
    for evidence in (whole, without_last(whole, *range(count)), without_last(whole, 0)):
        norms = evidence.squared_norms.sqrt().numpy()  # type: ignore[union-attr]
        full = whole.squared_norms.sqrt().numpy()  # type: ignore[union-attr]
        matrix = whole.forms.numpy() / np.outer(full, full)  # type: ignore[union-attr]
        expected = chosen_sizes(matrix, given_slopes(evidence), norms, ridge, relative)
        close(sizes_of(rule, evidence), lr * torch.from_numpy(expected), 1e-6)


@given(seeds, counts)
def test_at_the_first_step_it_is_the_joint_rule(seed: int, count: int) -> None:
    evidence = without_last(case(seed, count), *range(count))
    assert evidence.slopes is not None and evidence.squared_norms is not None and evidence.forms is not None
    alone = StepEvidence(
        evidence.names,
        1.0,
        evidence.slopes[:count],
        squared_norms=evidence.squared_norms[:count],
        forms=evidence.forms[:count, :count],
    )
    found = sizes_of(JointWithLastStep(), evidence)
    close(found[:count], sizes_of(JointLayerwise(relative_ridge=0.3), alone), 1e-9)
    assert (found[count:] == 0).all()


@given(seeds, counts)
def test_no_step_along_fewer_directions_lowers_the_model_further(seed: int, count: int) -> None:
    evidence = case(seed, count)
    forms, slopes = evidence.forms, torch.from_numpy(given_slopes(evidence))

    def gain(sizes: Tensor) -> float:
        return float(slopes @ sizes - 0.5 * sizes @ forms @ sizes)

    options: dict[str, Any] = {"decay": 0.0, "relative_ridge": 0.0}
    best = gain(sizes_of(JointWithLastStep(sign=Unrestricted(), **options), evidence))
    alone = torch.linalg.solve(forms[:count, :count], slopes[:count])  # type: ignore[index]
    fewer = gain(torch.cat([alone, torch.zeros_like(alone)]))
    assert best >= fewer - 1e-8 * abs(fewer)
    close(forms @ sizes_of(JointWithLastStep(sign=Unrestricted(), **options), evidence), slopes, 1e-7)
    for sign in (Safeguarded(), osc.Clipped()):  # beta is the minimum for the alpha that was chosen
        found = sizes_of(JointWithLastStep(sign=sign, **options), evidence)
        assert (found[:count] >= 0).all()
        residual = slopes - forms @ found  # type: ignore[operator]
        close(residual[count:], torch.zeros_like(residual[count:]), 1e-7)
    assert gain(sizes_of(JointWithLastStep(sign=Safeguarded(), **options), evidence)) >= 0.0


def test_a_last_step_that_was_not_there_does_not_halve_the_average() -> None:
    """Along p_1 = alpha d_0 the curvature of the first step is that of d_0."""
    first, ones = without_last(case(0, 1), 0), torch.ones(2).double()
    rule = JointWithLastStep(decay=0.8)
    state = rule.init(1, torch.zeros(()).double())
    one = StepEvidence(["0"], 1.0, ones, ones, ones, ones[:1], 3.0 * torch.eye(2).double())
    rule.propose(state, StepEvidence(["0"], 1.0, ones, ones, *(first.squared_norms, ones[:1], first.forms)))
    rule.propose(state, one)
    old = float(first.forms[0, 0] / first.squared_norms[0])  # type: ignore[index]
    expected = (0.16 * old + 0.2 * 3.0) / 0.36
    close(state.forms.diagonal(), torch.full((2,), expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_that_is_the_last_step_shares_it(dtype: torch.dtype) -> None:
    """No ridge: one of the two takes the whole step, and nothing blows up."""
    ones = torch.ones(2, dtype=dtype)
    evidence = StepEvidence(["0"], 1.0, ones, ones, ones, ones[:1], 7.0 * torch.ones(2, 2, dtype=dtype))
    found = sizes_of(JointWithLastStep(relative_ridge=0.0, decay=0.0), evidence)
    assert found.dtype == dtype
    close(found.sum().double(), torch.tensor(1 / 7).double(), 1e-5)
    assert found.abs().max() < 1


def test_learning_rates_of_groups_scale_both_steps_of_their_layers() -> None:
    lr = torch.tensor([0.5, 2.0, 1.0]).double()
    close(sizes_of(JointWithLastStep(), case(3, 3, lr=lr)), lr.repeat(2) * sizes_of(JointWithLastStep(), case(3, 3)))


@given(seeds, counts, st.floats(1e-3, 10.0))
def test_the_bound_holds_for_the_whole_step_of_a_layer(seed: int, count: int, limit: float) -> None:
    evidence = case(seed, count)
    assert evidence.squared_norms is not None and evidence.parameter_norms is not None
    free = sizes_of(JointWithLastStep(), evidence)
    found = sizes_of(RelativeBound(JointWithLastStep(), limit), evidence)
    lengths = (found.abs() * evidence.squared_norms.sqrt()).reshape(2, -1).sum(0)
    assert (lengths <= limit * evidence.parameter_norms * (1 + 1e-12)).all()
    factor = (found / free).nan_to_num(1.0).reshape(2, -1)
    assert (factor <= 1 + 1e-12).all()
    moves = (free.reshape(2, -1) != 0).all(0)
    close(factor[0, moves], factor[1, moves])  # the direction of the step stays
    loose = RelativeBound(RelativeBound(JointWithLastStep(), math.inf))
    assert loose.recalls and not RelativeBound(ConstantStep()).recalls


def test_layers_at_zero_and_steps_of_length_zero_are_not_bounded() -> None:
    evidence = case(1, 2)
    assert evidence.parameter_norms is not None
    evidence.parameter_norms[0] = 0.0
    free, found = (sizes_of(rule, evidence) for rule in (JointWithLastStep(), RelativeBound(JointWithLastStep(), 1e-9)))
    assert torch.equal(found[[0, 2]], free[[0, 2]]) and (found[[1, 3]].abs() < free[[1, 3]].abs()).all()
    nothing = without_last(case(1, 2), 0, 1)
    assert sizes_of(RelativeBound(JointWithLastStep()), nothing).isfinite().all()


def test_what_does_not_fit_is_refused_at_construction() -> None:
    for form in (SignedHessian(), HessianRowSums()):
        with pytest.raises(osc.CompatibilityError, match=f"JointWithLastStep.*{type(form).__name__}"):
            JointWithLastStep(form)
    for make in (lambda: KLClip(JointWithLastStep()), lambda: KLClip(RelativeBound(JointWithLastStep()))):
        with pytest.raises(osc.CompatibilityError, match=r"KLClip .* bound it by RelativeBound"):
            make()
    assert Needs.BATCH_SCORES in JointWithLastStep(SampledBatchScores()).needs
    assert Needs.PRODUCTS | Needs.SLOPES in JointWithLastStep(ExactHessian()).needs
    assert JointWithLastStep(sign=Unrestricted()).signed and not JointWithLastStep().signed
    assert [JointWithLastStep(every=3).due(step) for step in range(4)] == [True, False, False, True]


def test_a_rule_around_it_that_does_not_pass_recalls_on_is_told() -> None:
    whole = case(2, 2)
    short = StepEvidence(whole.names, 1.0, *(value[:2] for value in (whole.slopes, whole.slopes, whole.squared_norms)))  # type: ignore[index]
    with pytest.raises(osc.ArgumentError, match="must pass its `recalls = True` on"):
        sizes_of(JointWithLastStep(), short)


@pytest.mark.parametrize(
    ("name", "value"), [("every", 0), ("decay", 1.0), ("ridge", -1.0), ("relative_ridge", math.inf), ("sign", 1)]
)
def test_bad_arguments_are_named(name: str, value: float) -> None:
    with pytest.raises(osc.ArgumentError, match=name):
        JointWithLastStep(**{name: value})


@given(seeds, counts)
def test_forms_that_are_not_semidefinite_give_finite_steps(seed: int, count: int) -> None:
    evidence = case(seed, count, samples=3)
    assert evidence.forms is not None
    flips = torch.randn(2 * count, generator=generator_of(seed + 1), dtype=torch.float64).sign()
    indefinite = evidence.forms * torch.outer(flips, torch.ones_like(flips))
    evidence.forms.copy_(0.5 * (indefinite + indefinite.T))
    assume(bool(evidence.forms.isfinite().all()))
    found = sizes_of(JointWithLastStep(decay=0.0), evidence)
    assert found.isfinite().all() and (found[:count] >= 0).all()
