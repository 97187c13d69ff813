"""Levenberg-Marquardt: rho against its definition, lambda in the groups, composition, saving; Factored in a method."""

from __future__ import annotations

import copy
import math
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import batches, closure_of, cross_entropy, data, differences, everything, make, train
from torch import Tensor, nn

KFAC = osc.Kronecker(osc.Covariance(), osc.Covariance(), osc.Schedule(inverses=1))


def judged(rule: osc.LevenbergMarquardt, lr: float, **options: Any) -> osc.Method:
    return osc.Method(
        KFAC,
        osc.EmpiricalFisher(),
        damping=rule,
        defaults={"lr": lr, "damping": 0.1},
        **({"momentum": osc.NoMomentum()} | options),
    )


def reductions(model: nn.Module, before: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(actual, predicted) between two models by the definition: a Hessian-vector product along the whole step."""
    parameters = list(before.parameters())
    step = [(p - q).detach() for p, q in zip(model.parameters(), parameters, strict=True)]
    loss = cross_entropy(before(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, step, strict=True))
    products = torch.autograd.grad(slope, parameters)  # type: ignore[arg-type]
    quadratic = sum(float((h * d).sum()) for h, d in zip(products, step, strict=True))
    actual = float(loss.detach() - cross_entropy(model(x), y).detach())
    return actual, -float(slope.detach()) - 0.5 * quadratic  # type: ignore[union-attr]


@settings(max_examples=12)
@given(st.floats(1e-2, 30.0), st.integers(1, 3), st.sampled_from([osc.NoMomentum(), osc.EMA(0.5)]))
def test_lambda_follows_the_ratio_of_the_definition(lr: float, every: int, momentum: Any) -> None:
    rule = osc.LevenbergMarquardt(curvature=osc.ExactHessian(), every=every, omega=0.9)
    model = make()
    optimizer = osc.build(judged(rule, lr, momentum=momentum), model)
    expected = 0.1
    for step, (x, y) in enumerate(batches(count=6)):
        before = copy.deepcopy(make())
        before.load_state_dict(model.state_dict())
        optimizer.step(closure_of(optimizer, model, x, y))
        assert optimizer.last_report.damping == pytest.approx(expected, rel=1e-12)  # the one this step was taken with
        if (step + 1) % every:
            assert optimizer.last_report.loss_after is None  # no second evaluation where none is needed
            assert optimizer.param_groups[0]["damping"] == expected
            continue
        actual, predicted = reductions(model, before, x, y)
        rho = actual / predicted if predicted > 0 else 0.5
        if min(abs(rho - 0.25), abs(rho - 0.75)) < 1e-6:
            return
        expected *= 0.9**every if rho > 0.75 else 0.9**-every if rho < 0.25 else 1.0
        assert optimizer.param_groups[0]["damping"] == pytest.approx(expected, rel=1e-12)
        expected = optimizer.param_groups[0]["damping"]


def test_an_exact_model_lowers_lambda_every_time() -> None:
    """Half squares of a linear model: rho = 1 whatever the step, also for momentum."""
    model = nn.Linear(4, 2).double()
    x, target = torch.randn(20, 4).double(), torch.randn(20, 2).double()
    rule = osc.LevenbergMarquardt(curvature=osc.ExactHessian(), every=2)
    optimizer = osc.build(judged(rule, 0.5, momentum=osc.EMA(0.5)), model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - target).square().sum() / 20
        loss.backward()
        return loss

    for step in range(8):
        optimizer.step(closure)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(0.1 * 0.95 ** (2 * ((step + 1) // 2)), rel=1e-12)


@pytest.mark.parametrize(
    ("actual", "predicted", "factor"),
    [
        (0.76, 1.0, 0.95**5),
        (0.75, 1.0, 1.0),
        (0.25, 1.0, 1.0),
        (0.24, 1.0, 0.95**-5),
        (-3.0, 1.0, 0.95**-5),
        (-3.0, -1.0, 1.0),
        (3.0, 0.0, 1.0),
        (math.nan, 1.0, 0.95**-5),
        (-math.inf, -1.0, 0.95**-5),
        (1.0, math.nan, 1.0),
    ],
)
def test_the_rule(actual: float, predicted: float, factor: float) -> None:
    rule = osc.LevenbergMarquardt()
    assert rule.adapted(2.0, actual, predicted) == pytest.approx(2.0 * factor)
    tight = osc.LevenbergMarquardt(minimum=1.9, maximum=2.1)
    assert 1.9 <= tight.adapted(2.0, actual, predicted) <= 2.1
    assert [step for step in range(12) if rule.due(step)] == [4, 9]


def test_the_whole_proposed_step_is_judged_even_if_a_guard_shortens_it() -> None:
    rule = osc.LevenbergMarquardt(curvature=osc.ExactHessian(), every=1)
    found = []
    for guard in (osc.NoGuard(), osc.Armijo(), osc.Backtrack(attempts=1)):
        model, (x, y) = make(seed=1), data()  # negative curvature along the step: the model falls, the loss rises
        optimizer = osc.build(judged(rule, 30.0, guard=guard), model)
        optimizer.step(closure_of(optimizer, model, x, y))
        found.append(optimizer.param_groups[0]["damping"])
        assert optimizer.last_report.shortened > 0 or isinstance(guard, osc.NoGuard)
    assert found[0] == found[1] == found[2] == pytest.approx(0.1 / 0.95)


def test_every_group_is_multiplied_and_clamped() -> None:
    rule = osc.LevenbergMarquardt(curvature=osc.ExactHessian(), every=1, minimum=0.09)
    model, (x, y) = make(), data()
    optimizer = osc.build(judged(rule, 1e-3), model, groups=[{"params": "4.*", "damping": 1.0}])
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.95)
    assert optimizer.param_groups[1]["damping"] == pytest.approx(0.095)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.param_groups[1]["damping"] == 0.09


@pytest.mark.parametrize("form", [osc.SampledScores(), osc.SampledBatchScores(), osc.ExactHessian()])
@pytest.mark.parametrize("step_size", [osc.ConstantStep(), osc.JointLayerwise(every=3), osc.KLClip()])
def test_any_form_beside_any_step_size_continues_bit_for_bit(form: Any, step_size: Any) -> None:
    rule = osc.LevenbergMarquardt(osc.Factored(), curvature=form, every=2)
    method = judged(rule, 0.3, step_size=step_size, guard=osc.Nonmonotone())
    model, other = make(), make()
    optimizer = osc.build(method, model, likelihood="categorical")
    train(optimizer, model, batches(count=3))
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    resumed = osc.build(method, other, likelihood="categorical")
    resumed.load_state_dict(saved)
    for one, net in ((optimizer, model), (resumed, other)):
        train(one, net, batches(count=5))
    assert optimizer.param_groups[0]["damping"] != 0.1
    assert differences(everything(model), everything(other)) == []
    assert differences(optimizer.state_dict(), resumed.state_dict()) == []


def test_measuring_and_looking_back_happen_only_where_they_are_due() -> None:
    model, (x, y) = make(), data()
    optimizer = osc.build(judged(osc.LevenbergMarquardt(every=3), 0.1), model, likelihood="categorical")
    assert optimizer.needs_closure and optimizer.method.looks_back and optimizer.method.needs_likelihood
    costs = []
    for _ in range(6):
        before = optimizer.gradient_evaluations
        optimizer.step(closure_of(optimizer, model, x, y))
        costs.append(optimizer.gradient_evaluations - before)
    assert costs == [1, 1, 3, 1, 1, 3]  # a gradient; and where due a sampled one and a look back
    with pytest.raises(osc.ClosureRequiredError):
        optimizer.step()


# -- Factored in a method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "cnn", "called-twice"])
def test_a_method_inverts_with_the_traces_of_its_own_factors(net: str) -> None:
    model = make(net)
    method = osc.Method(KFAC, osc.EmpiricalFisher(), damping=osc.Factored(), defaults={"lr": 0.01, "damping": 0.3})
    optimizer = osc.build(method, model)
    train(optimizer, model, batches(net, 3))
    seen = 0
    for block in optimizer.blocks:
        if not isinstance(block.part, osc.Kronecker):
            continue
        state: Any = block.state
        A, G = state.inputs.second_moment, state.outputs.second_moment
        pi = math.sqrt(float(A.trace() / len(A)) / float(G.trace() / len(G)))
        for matrix, inverse, damping in (
            (A, state.inputs.inverse, pi * math.sqrt(0.3)),
            (G, state.outputs.inverse, math.sqrt(0.3) / pi),
        ):
            eye = torch.eye(len(matrix), dtype=torch.float64)
            torch.testing.assert_close(inverse @ (matrix + damping * eye), eye, rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen >= 2


# -- what does not fit ----------------------------------------------------------------------------------------------

PAIRED = osc.Kronecker(osc.HessianActionBFGS(), osc.BFGS())
REFUSED: list[tuple[Any, tuple[str, ...]]] = [
    (lambda: osc.Method(damping=osc.Factored()), ("Factored", "Identity", "ConstantDamping()")),
    (
        lambda: osc.Method(osc.MiniBlock(), osc.BatchMean(), damping=osc.Factored(), defaults={"damping": 0.1}),
        ("Factored", "MiniBlock"),
    ),
    (
        lambda: osc.Method(PAIRED, osc.SecantPairs(), damping=osc.Factored(), defaults={"damping": 0.1}),
        ("Factored", "BFGS", "Split()"),
    ),
    (
        lambda: osc.Method(
            osc.Kronecker(osc.Covariance(), osc.IdentityFactor()),
            damping=osc.LevenbergMarquardt(osc.Factored()),
            defaults={"damping": 0.1},
        ),
        ("LevenbergMarquardt", "IdentityFactor"),
    ),
    (lambda: osc.Method(damping=osc.LevenbergMarquardt()), ("LevenbergMarquardt", "Identity", "ConstantDamping()")),
    (lambda: osc.LevenbergMarquardt(osc.LevenbergMarquardt()), ("twice", "Split()")),
    (lambda: osc.LevenbergMarquardt(curvature=osc.SignedHessian()), ("SignedHessian", "ExactHessian()")),
    (lambda: osc.LevenbergMarquardt(every=0), ("every", "0")),
    (lambda: osc.LevenbergMarquardt(omega=1.0), ("omega", "1.0")),
    (lambda: osc.LevenbergMarquardt(minimum=0.0), ("minimum", "0.0")),
    (lambda: osc.LevenbergMarquardt(minimum=1.0, maximum=0.5), ("maximum", "0.5")),
    (lambda: osc.LevenbergMarquardt(maximum=math.inf), ("maximum", "inf")),
    (lambda: osc.LevenbergMarquardt(low=0.8), ("low", "0.8")),
    (lambda: osc.LevenbergMarquardt(high=math.nan), ("high", "nan")),
    (
        lambda: osc.Method(KFAC, osc.EmpiricalFisher(), osc.LevenbergMarquardt()),
        ("damping", "LevenbergMarquardt", "0.0", "defaults"),
    ),
    (
        lambda: osc.Method(PAIRED, osc.SecantPairs(), damping=osc.LevenbergMarquardt(), defaults={"damping": 0.3}),
        ("double damping", "10000"),
    ),
    (
        lambda: osc.Method(
            KFAC,
            osc.EmpiricalFisher(),
            damping=osc.LevenbergMarquardt(),
            weight_decay=osc.Decoupled(),
            defaults={"damping": 0.1, "weight_decay": 0.1},
        ),
        ("LevenbergMarquardt", "Decoupled", "Coupled()"),
    ),
]


@pytest.mark.parametrize(("compose", "words"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_way_out(compose: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(osc.ArgumentError) as caught:
        compose()
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_fits_after_all() -> None:
    bounded = osc.LevenbergMarquardt(maximum=0.9)
    method = osc.Method(PAIRED, osc.SecantPairs(), damping=bounded, defaults={"lr": 0.1, "damping": 0.3})
    model = make()
    losses = train(osc.build(method, model, likelihood="categorical"), model, [data()] * 12)
    assert losses[-1] < losses[0]
    decay = {"lr": 0.1, "damping": 0.1}
    fisher = osc.EmpiricalFisher()
    osc.Method(KFAC, fisher, osc.LevenbergMarquardt(), weight_decay=osc.Decoupled(), defaults=decay)
    osc.Method(osc.ByLayer({"Linear": KFAC}), osc.EmpiricalFisher(), damping=osc.Factored(), defaults=decay)
