"""A keyword that a method does not have: the nearest of the method and of ``build``, and where all are explained."""

from __future__ import annotations

from typing import Any

import osculate as osc
import pytest
from osculate.errors import OTHER_WORDS
from osculate.experiments.commands import mistyped
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


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learning_rate", "lr"),
        ("wd", "weight_decay"),
        ("precondition_frequency", "inverses_every"),
        ("L2", "weight_decay"),
    ],
)
def test_what_other_libraries_call_it(wrong: str, meant: str) -> None:
    assert f"did you mean {meant!r}?" in refusal("kfac", **{wrong: 1})


def test_the_command_line_means_the_same_by_these_words() -> None:
    """Where the words of options and of commands have one in common, it is for the same thing."""
    own = {word: {entry.replace("-", "_") for entry in meant} for word, meant in mistyped._OPTIONS.items()}
    for word, meant in OTHER_WORDS.items():
        assert own.get(word.replace("_", "-"), set(meant)) == set(meant)
    assert {"learning-rate", "step-size", "wd"} <= {word.replace("_", "-") for word in OTHER_WORDS}


def test_an_unknown_method_is_told_of_all() -> None:
    with pytest.raises(osc.UnknownNameError, match=r"known: adagrad, .*\bbfgs\b.*\blm\b.*\btnt"):
        osc.build("newton", nn.Linear(3, 2))
    with pytest.raises(osc.UnknownNameError, match=r"did you mean 'lbfgs'"):
        osc.build("l-bfgs", nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("kfac", {"inverses_every": 2.5}, r"^inverses_every of kfac must be an integer, got 2.5; the default is 20$"),
        ("kfac", {"lag": 1, "inverses_every": "3"}, r"^inverses_every of kfac must be an integer, got '3'"),
        (
            "kfac",
            {"inverses_every": 0},
            r"^inverses_every=0 of kfac: inverses interval must be an integer >= 1, got 0$",
        ),
        ("mbf", {"statistics_every": None}, r"^statistics_every of mbf must be an integer, got None; the default is"),
        ("kbfgs-l", {"memory": 0}, r"memory"),
        ("spring", {"momentum": 2.0}, r"^momentum must lie"),
        ("kfac", {"lag": 20}, r"^lag must be >= 0 and less"),
    ],
)
def test_a_value_that_a_part_refuses_is_refused_by_the_name_of_the_option(
    method: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(osc.ArgumentError, match=text):
        osc.build(method, nn.Linear(3, 2), **options)


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
