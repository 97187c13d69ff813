"""The factor on all steps that new mini-batches choose: its formula, what leaves it alone, bounds and refusals."""

import itertools
import math
from dataclasses import replace
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of
from osculate.curvature import HessianRowSums, Needs, SampledBatchScores, SignedHessian
from osculate.stepsize import (
    ConstantStep,
    GlobalQuadratic,
    JointLayerwise,
    JointWithLastStep,
    KLClip,
    LayerwiseQuadratic,
    RelativeBound,
    StepEvidence,
    TrailScaled,
    Unrestricted,
)
from torch import Tensor

seeds = st.integers(0, 2**31)
counts = st.integers(1, 5)


def case(seed: int, count: int, rho: float | None = None, *, loss: float = 1.0, lr: Any = 1.0) -> StepEvidence:
    """Evidence along L directions and their trails; along all trails together the slope is ``rho`` times the form."""
    generator = generator_of(seed)
    lengths = torch.randn(2 * count, generator=generator, dtype=torch.float64).exp()
    scores = torch.randn(40, 2 * count, generator=generator, dtype=torch.float64) * lengths
    slopes = torch.randn(2, 2 * count, generator=generator, dtype=torch.float64) * lengths
    forms = scores.T @ scores / 40
    if rho is not None:
        slopes[1, count:] *= -rho * forms[count:, count:].sum() / slopes[1, count:].sum()
    norms = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    names = [str(index) for index in range(count)]
    return StepEvidence(names, lr, loss * slopes[0], loss * slopes[1], lengths.square(), norms, loss * forms)


def of_layers(evidence: StepEvidence) -> StepEvidence:
    """Without the trails."""
    count = len(evidence.names)
    assert evidence.slopes is not None and evidence.gradient_slopes is not None
    assert evidence.squared_norms is not None and evidence.forms is not None
    return replace(
        evidence,
        slopes=evidence.slopes[:count],
        gradient_slopes=evidence.gradient_slopes[:count],
        squared_norms=evidence.squared_norms[:count],
        forms=evidence.forms[:count, :count],
    )


def factors(rule: TrailScaled, *sequence: StepEvidence) -> list[float]:
    """The factor after each step, which all steps of the rule inside must have got."""
    count, found = len(sequence[0].names), []
    zero = torch.zeros((), dtype=torch.float64)
    state, inner = rule.init(count, zero), rule.rule.init(count, zero)
    for evidence in sequence:
        sizes = rule.propose(state, evidence)
        assert sizes.shape == (2 * count,) and not sizes[count:].any()
        factor = float(state.log_factor.exp())
        expected = torch.as_tensor(rule.rule.propose(inner, of_layers(evidence)), dtype=torch.float64)
        close(sizes[:count], factor * expected.expand(count))
        found.append(factor)
    return found


INNER = (JointLayerwise(), JointLayerwise(sign=Unrestricted()), LayerwiseQuadratic(), GlobalQuadratic())


@given(seeds, counts, st.floats(-3, 3), st.sampled_from(INNER))
def test_the_factor_follows_the_share_of_the_way_back(seed: int, count: int, rho: float, inner: Any) -> None:
    rule = TrailScaled(inner, threshold=0.25, gain=0.1, longest=2.0)
    expected, log = [], 0.0
    for _ in range(3):
        log = min(log - 0.1 * max(-1.0, min(1.0, rho - 0.25)), math.log(2.0))
        expected.append(math.exp(log))
    found = factors(rule, *(case(seed + step, count, rho) for step in range(3)))
    assert found == pytest.approx(expected, rel=1e-9)


@given(seeds, counts, st.floats(1e-6, 1e6))
def test_units_of_the_loss_do_not_matter(seed: int, count: int, unit: float) -> None:
    one, other = ([case(seed + step, count, loss=loss) for step in range(3)] for loss in (1.0, unit))
    assert factors(TrailScaled(), *one) == pytest.approx(factors(TrailScaled(), *other), rel=1e-9)


@given(seeds, counts, st.floats(0.05, 4.0))
def test_the_factor_has_a_largest_value_and_falls_slowly(seed: int, count: int, longest: float) -> None:
    found = [1.0, *factors(TrailScaled(gain=0.5, longest=longest), *(case(seed + step, count) for step in range(6)))]
    for before, after in itertools.pairwise(found):
        assert math.exp(-0.5) * min(before, longest) <= after * (1 + 1e-12) and after <= longest * (1 + 1e-12)


@pytest.mark.parametrize("what", ["no trail", "not measured", "negative", "not finite"])
def test_where_nothing_is_known_the_factor_stays(what: str) -> None:
    evidence = case(1, 3)
    assert evidence.forms is not None and evidence.gradient_slopes is not None
    forms, slopes = evidence.forms.clone(), evidence.gradient_slopes.clone()
    changed = {"no trail": 0.0, "negative": -1.0, "not finite": math.nan}.get(what, 1.0)
    forms[3:, 3:] *= changed
    slopes[3:] *= changed
    other = replace(evidence, forms=None if what == "not measured" else forms, gradient_slopes=slopes)
    rule = TrailScaled()
    state = rule.init(3, torch.zeros((), dtype=torch.float64))
    assert rule.propose(state, other).isfinite().all() and float(state.log_factor) == 0.0


def test_every_layer_has_its_learning_rate() -> None:
    rates = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    rule, one = TrailScaled(), case(3, 3)
    plain, scaled = (
        rule.propose(rule.init(3, torch.zeros((), dtype=torch.float64)), replace(one, lr=lr)) for lr in (1.0, rates)
    )
    close(scaled, rates.repeat(2) * plain)


@given(st.floats(1.01, 50.0), st.integers(1, 60))
def test_what_is_kept_is_what_a_polynomial_average_forgets(window: float, steps: int) -> None:
    """Weights of the iterates 0 ... n in the average: they sum to one, and the newest has window / (window + n)."""
    rule, weights = TrailScaled(window=window), torch.ones(1, dtype=torch.float64)
    for step in range(steps):
        kept = rule.keeps(step)
        weights = torch.cat([kept * weights, torch.tensor([1.0 - kept], dtype=torch.float64)])
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weights[-1]) == pytest.approx(window / (window + steps))


def test_it_declares_what_it_needs_and_is_forwarded() -> None:
    rule = TrailScaled(JointLayerwise(every=3))
    outer = RelativeBound(rule)
    assert rule.recalls and outer.recalls and outer.keeps == rule.keeps
    assert RelativeBound(JointWithLastStep()).keeps is None
    assert Needs.SLOPES in rule.needs and rule.curvature == JointLayerwise().curvature
    assert [rule.due(step) for step in range(4)] == [True, False, False, True]
    assert TrailScaled(JointLayerwise(sign=Unrestricted())).signed and not rule.signed
    assert not rule.length_free and not rule.proportional


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 1.0), ("window", math.inf), ("threshold", 0.0), ("threshold", 1.0), ("gain", 0.0), ("longest", 0.0)],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(osc.ArgumentError, match=f"{name}.*of TrailScaled"):
        TrailScaled(**{name: value})  # type: ignore[arg-type]


def test_rules_that_do_not_fit_are_refused() -> None:
    for recalling in (JointWithLastStep(), RelativeBound(JointWithLastStep()), TrailScaled()):
        with pytest.raises(osc.CompatibilityError, match=f"{type(recalling).__name__}.*a layer has one memory"):
            TrailScaled(recalling)
    with pytest.raises(osc.CompatibilityError, match="ConstantStep measures none"):
        TrailScaled(ConstantStep())
    for form in (SignedHessian(), HessianRowSums()):
        with pytest.raises(osc.CompatibilityError, match=f"TrailScaled.*{type(form).__name__}"):
            TrailScaled(JointLayerwise(form))
    with pytest.raises(osc.CompatibilityError, match=r"KLClip.*TrailScaled"):
        KLClip(TrailScaled())
    assert TrailScaled(JointLayerwise(SampledBatchScores())).curvature == SampledBatchScores()


def test_a_rule_around_it_that_does_not_pass_recalls_on_is_told() -> None:
    rule, evidence = TrailScaled(), of_layers(case(1, 3))
    with pytest.raises(osc.ArgumentError, match="must pass its `recalls = True` on"):
        rule.propose(rule.init(3, torch.zeros(())), evidence)


def test_a_bound_around_it_shortens_what_moves() -> None:
    evidence = case(4, 3)
    free, bounded = (
        rule.propose(rule.init(3, torch.zeros((), dtype=torch.float64)), evidence)
        for rule in (TrailScaled(), RelativeBound(TrailScaled(), 1e-6))
    )
    assert evidence.squared_norms is not None and evidence.parameter_norms is not None
    reach = bounded[:3] * evidence.squared_norms[:3].sqrt() / evidence.parameter_norms
    limit: Tensor = torch.minimum(free[:3] * evidence.squared_norms[:3].sqrt() / evidence.parameter_norms, reach + 1e-9)
    assert (reach <= 1e-6 * (1 + 1e-9)).all() and not bounded[3:].any() and (limit >= 0).all()
