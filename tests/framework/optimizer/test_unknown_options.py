"""A keyword that a method does not have: the nearest of the method and of ``build``, and where all are explained."""

from __future__ import annotations

from typing import Any

import osculate as osc
import pytest
from torch import nn


def refusal(method: str, **options: Any) -> str:
    with pytest.raises(osc.UnknownNameError) as raised:
        osc.build(method, nn.Linear(3, 2), likelihood="gaussian", **options)
    return str(raised.value)


@pytest.mark.parametrize("method", sorted(osc.registry.methods()))
def test_a_letter_too_few_in_any_option(method: str) -> None:
    for option in osc.registry.methods()[method].options:
        text = refusal(method, **{option[:-2] + option[-1]: 1})
        assert repr(option) in text.partition("?")[0]
        assert f"'osculate methods {method}'" in text and "help(osculate.build)" in text


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("weigth_decay", "weight_decay"), ("dampng", "damping"), ("loss_reduce", "loss_reduction"), ("strct", "strict")],
)
def test_what_build_itself_takes_may_be_meant(wrong: str, meant: str) -> None:
    assert f"did you mean {meant!r}" in refusal("kfac", **{wrong: 1})


def test_a_word_like_none_lists_the_options() -> None:
    text = refusal("kfac", zzz=1)
    assert "known: eager, inverses_every" in text and "statistics_every. 'osculate methods kfac'" in text
    assert "lr, damping, weight_decay" in text


def test_methods_over_the_whole_model() -> None:
    with pytest.raises(osc.UnknownNameError, match=r"did you mean 'geodesic'\? 'osculate methods lm' .*: damping"):
        osc.build("lm", nn.Linear(3, 2), geodesics=1)
    with pytest.raises(osc.UnknownNameError, match="did you mean 'damping'"):
        osc.build("lm", nn.Linear(3, 2), dampin=1)


@pytest.mark.parametrize("structure", [osc.Eigenbasis(), osc.Dense(), osc.Diagonal()])
def test_damping_in_units_of_what_a_structure_does_not_have(structure: Any) -> None:
    with pytest.raises(osc.CompatibilityError) as raised:
        osc.Method(preconditioner=structure, damping=osc.CurvatureUnits(), curvature=osc.SampledFisher())
    text = str(raised.value)
    assert f"{type(structure).__name__} has none" in text and "mean eigenvalue" in text
    for way_out in ("ConstantDamping()", "Kronecker(Covariance(), Covariance())", "MiniBlock(...)"):
        assert way_out in text
    with pytest.raises(osc.CompatibilityError, match="has none; use ConstantDamping") as balanced:
        osc.Method(preconditioner=structure, damping=osc.Factored(), curvature=osc.SampledFisher())
    assert "MiniBlock" not in str(balanced.value)
