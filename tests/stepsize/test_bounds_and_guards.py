"""Constant steps, the relative bound around any rule, and the guard that judges a step by its own mini-batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close
from osculate import ArgumentError
from osculate.curvature import Needs, SampledScores
from osculate.stepsize import (
    Backtrack,
    ConstantStep,
    JointLayerwise,
    LayerwiseQuadratic,
    NoGuard,
    RelativeBound,
    StepEvidence,
    Trial,
)
from torch import Tensor

positive = st.floats(1e-3, 1e3)


def evidence_of(lr: float, directions: Tensor, parameters: Tensor, forms: Tensor | None = None) -> StepEvidence:
    names = [str(k) for k in range(len(directions))]
    ones = torch.ones_like(directions)
    return StepEvidence(names, lr, ones, ones, directions.square(), parameters, forms)


def test_a_constant_step_is_the_learning_rate() -> None:
    rule = ConstantStep()
    assert rule.propose(rule.init(2, torch.zeros(1)), StepEvidence(["a", "b"], 0.3)) == 0.3
    assert not rule.needs and not rule.due(0) and rule.curvature is None


@given(positive, positive, st.lists(st.tuples(positive, positive), min_size=1, max_size=5))
def test_no_layer_moves_by_more_than_the_limit(lr: float, limit: float, norms: list[tuple[float, float]]) -> None:
    directions, parameters = torch.tensor(norms, dtype=torch.float64).unbind(1)
    rule = RelativeBound(ConstantStep(), limit)
    alpha = rule.propose(rule.init(len(norms), directions), evidence_of(lr, directions, parameters))
    assert (alpha * directions <= limit * parameters * (1 + 1e-12)).all()
    free = lr * directions <= limit * parameters
    assert (alpha[free] == lr).all() and (alpha[~free] < lr).all()


def test_layers_at_zero_and_directions_at_zero_are_not_bounded() -> None:
    directions, parameters = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    rule = RelativeBound(ConstantStep(), 0.1)
    close(rule.propose(None, evidence_of(0.5, directions, parameters)), torch.full((3,), 0.5))


@pytest.mark.parametrize("inner", [LayerwiseQuadratic(every=2), JointLayerwise(every=2)])
def test_a_bound_leaves_small_steps_of_its_rule_alone(inner: LayerwiseQuadratic) -> None:
    rule, loose = RelativeBound(inner, 1e-3), RelativeBound(inner, math.inf)
    directions, parameters = torch.tensor([1.0, 2.0]).double(), torch.tensor([1e6, 3.0]).double()
    evidence = evidence_of(1.0, directions, parameters, torch.eye(2).double())
    like = torch.zeros(1, dtype=torch.float64)
    expected = inner.propose(inner.init(2, like), evidence)
    alpha = rule.propose(rule.init(2, like), evidence)
    close(alpha, torch.stack([expected[0], expected.new_tensor(1e-3 * 3 / 2)]))
    close(loose.propose(loose.init(2, like), evidence), expected)
    assert rule.needs == inner.needs | Needs.NORMS
    assert isinstance(rule.curvature, SampledScores)
    assert [rule.due(step) for step in range(3)] == [True, False, True]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1", None])
def test_limits_are_checked(value: float) -> None:
    with pytest.raises(ArgumentError, match="limit"):
        RelativeBound(limit=value)


@pytest.mark.parametrize(
    ("before", "after", "accepted"),
    [
        (2.0, 1.0, True),
        (2.0, 2.2, True),
        (2.0, 2.2001, False),
        (2.0, float("nan"), False),
        (2.0, float("inf"), False),
        (0.0, 5.0, True),
        (-1.0, 5.0, True),
        (-1.0, float("nan"), False),
    ],
)
def test_backtracking_compares_with_the_allowed_growth(before: float, after: float, accepted: bool) -> None:
    assert Backtrack(growth=1.1).accepts(None, Trial(before, after)) == accepted
    assert NoGuard().accepts(None, Trial(before, after))
    assert NoGuard().attempts == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"growth": 1.0}, "growth"),
        ({"growth": 0.5}, "growth"),
        ({"growth": float("nan")}, "growth"),
        ({"growth": "2"}, "growth"),
        ({"shrink": 0.0}, "shrink"),
        ({"shrink": 1.0}, "shrink"),
        ({"attempts": 0}, "attempts"),
        ({"attempts": 2.0}, "attempts"),
    ],
)
def test_guards_are_checked(options: dict[str, float], word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        Backtrack(**options)
