"""Damping relative to each side's mean eigenvalue."""

import math

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osculate.preconditioners import CurvatureUnits, MeanEigenvalues, Split
from small_nets import batches, build, flat, make, train

positive = st.floats(1e-12, 1e12)


@given(st.floats(0, 100), st.integers(1, 50), positive, positive)
def test_each_side_gets_the_same_share_of_its_own(value: float, positions: int, inputs: float, outputs: float) -> None:
    sides = CurvatureUnits().sides(value, positions, MeanEigenvalues(inputs, outputs))
    assert sides.whole == pytest.approx(value * inputs * outputs)
    assert sides.inputs == pytest.approx(math.sqrt(value) * inputs)
    assert sides.outputs == pytest.approx(math.sqrt(value) * outputs)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.nan), (5e-324, 1.0)])
def test_where_a_side_has_no_eigenvalue_it_is_split(pair: tuple[float, float]) -> None:
    assert CurvatureUnits().sides(1e-3, 4, MeanEigenvalues(*pair)) == Split().sides(1e-3, 4)


def test_a_layer_without_factors_gets_the_whole() -> None:
    assert CurvatureUnits().sides(0.3, 4) == Split().sides(0.3, 4)


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_a_lambda_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(osc.ArgumentError, match="damping"):
        CurvatureUnits().sides(bad, 1, MeanEigenvalues(1.0, 1.0))


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_units_of_the_inputs_change_nothing(unit: float) -> None:
    """Inputs in other units, and weights that undo it: a network without biases stays the same as it trains."""
    finals = []
    for scale in (1.0, unit):
        model = make()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias = None  # type: ignore[assignment]
        with torch.no_grad():
            model[0].weight.div_(scale)  # type: ignore[index]
        rule = osc.JointLayerwise()
        method = osc.Method(
            osc.Kronecker(osc.Covariance(), osc.Covariance()),
            osc.SampledFisher(),
            damping=CurvatureUnits(),
            step_size=rule,
            defaults={"lr": 1.0, "damping": 0.01},
        )
        optimizer = osc.build(method, model, likelihood="categorical")
        train(optimizer, model, [(scale * x, y) for x, y in batches(count=3)])
        with torch.no_grad():
            model[0].weight.mul_(scale)  # type: ignore[index]
        finals.append(flat(model))
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-6, atol=1e-9)


def test_a_method_with_it_trains() -> None:
    model = make()
    losses = train(build("joint-kfac-noise-aware", model), model, batches(count=1) * 8)
    assert losses[-1] < losses[0]
