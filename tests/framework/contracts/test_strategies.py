"""The public strategies generate what they say."""

import doctest
import importlib
import subprocess
import sys

import osculate as osc
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from osculate.framework.contracts import Case, Training, strategies
from osculate.framework.contracts.pairs import SecantPair
from torch import nn


@given(case=strategies.networks())
def test_networks_run_and_have_gradients(case: Case) -> None:
    model, (inputs, targets) = case.model(), case.batch()
    loss = case.loss(model(inputs), targets)
    loss.backward()
    assert 1 <= case.samples <= 8 and len(inputs) == len(targets) == case.samples
    assert torch.isfinite(loss) and all(p.grad is not None and p.dtype == torch.float64 for p in model.parameters())
    again = case.model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(case.batch()[0], inputs) and not torch.equal(case.batch(1)[0], inputs)


@pytest.mark.parametrize("layers", strategies.LAYERS)
@pytest.mark.parametrize("likelihood", strategies.LIKELIHOODS)
def test_every_kind_of_network_is_drawn(layers: str, likelihood: str) -> None:
    wanted = strategies.networks([layers], [likelihood])
    case = find(wanted, lambda case: case.samples == 1, settings=settings(database=None))
    assert case.name == layers and case.likelihood == likelihood
    kinds = {type(module) for module in case.model().modules()}
    assert (nn.Conv2d in kinds) == (layers == "convolution")
    assert all(module.bias is None for module in case.model().modules() if isinstance(module, nn.Linear)) == (
        layers == "bias-free"
    )


@given(data=st.data(), size=st.integers(2, 6), exponent=st.floats(0.0, 8.0))
def test_matrices_have_the_condition_number(data: st.DataObject, size: int, exponent: float) -> None:
    matrix = data.draw(strategies.spd_matrices(size=size, condition=10.0**exponent))
    values = torch.linalg.eigvalsh(matrix)
    assert matrix.shape == (size, size) and torch.equal(matrix, matrix.T)
    torch.testing.assert_close(values[-1] / values[0], torch.tensor(10.0**exponent).double(), rtol=1e-5, atol=0.0)


@given(pair=strategies.secant_pairs(curvature="negative"))
def test_pairs_of_negative_curvature(pair: SecantPair) -> None:
    assert torch.dot(pair.step, pair.change) < 0
    assert torch.linalg.eigvalsh(pair.inverse)[0] > 0 and 0 < pair.damping < 1


@given(pair=strategies.secant_pairs(curvature="positive"))
def test_pairs_of_positive_curvature(pair: SecantPair) -> None:
    assert torch.dot(pair.step, pair.change) > 0


def test_pairs_of_both_signs_are_drawn() -> None:
    for sign in (1.0, -1.0):
        pair = find(
            strategies.secant_pairs(size=3),
            lambda pair, sign=sign: sign * torch.dot(pair.step, pair.change) > 0,
            settings=settings(database=None),
        )
        assert len(pair.step) == 3


@given(pair=strategies.secant_pairs(), rule=strategies.parts("pair damping"))
def test_rules_that_promise_positive_curvature_deliver(pair: SecantPair, rule: osc.PairDamping) -> None:
    rule.validate(pair.damping)
    damped = pair.damped(rule)
    if getattr(rule, "keeps_positive", False):
        assert torch.dot(damped.step, damped.change) > 0


@given(statistics=strategies.layer_statistics())
def test_statistics_hold_together(statistics: osc.LayerStatistics) -> None:
    """The mean of the per-sample gradients is the gradient."""
    assert statistics.vectors is not None and statistics.gradients is not None
    for vectors, gradient in zip(statistics.vectors(), statistics.gradients, strict=True):
        assert len(vectors) == statistics.samples
        torch.testing.assert_close(vectors.mean(0), gradient, rtol=1e-9, atol=1e-11)


@settings(max_examples=60)
@given(method=strategies.methods(), case=strategies.networks())
def test_drawn_methods_take_finite_steps(method: osc.Method, case: Case) -> None:
    training = Training(method, case)
    for index in range(2):
        assert torch.isfinite(training.step(case.batch(index)))
    assert torch.isfinite(training.vector()).all()


@given(method=strategies.methods(needs_likelihood=False, needs_closure=False))
def test_methods_can_be_asked_for(method: osc.Method) -> None:
    assert not method.needs_likelihood and not method.needs_closure


def test_every_structure_is_drawn_with_some_estimator() -> None:
    bases = {type(base.preconditioner) for base in strategies._bases()}
    assert bases == set(osc.registry.parts()["structure"].values())


def test_bad_requests_are_named() -> None:
    with pytest.raises(osc.UnknownNameError, match="unknown layers 'convolutio'; did you mean 'convolution'"):
        find(strategies.networks(["convolutio"]), lambda case: True)
    with pytest.raises(osc.UnknownNameError, match="unknown kind of part 'dampin'"):
        strategies.parts("dampin")
    with pytest.raises(osc.ArgumentError, match=r"condition >= 1, got 2 and 0\.5"):
        find(strategies.spd_matrices(2, 0.5), lambda matrix: True)


@pytest.mark.parametrize("name", ["contracts.strategies", "contracts.contract", "contracts.certificate"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"osculate.framework.{name}"))
    assert result.failed == 0 and result.attempted > 0


def test_without_hypothesis_contracts_work_and_strategies_say_what_is_missing() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
import osculate as osc
assert osc.contracts.certify(osc.Split()).ok
try:
    osc.strategies
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "osculate.strategies needs hypothesis: python -m pip install hypothesis" in result.stdout
