"""Bad input is refused with the value, the rule and the way out, and leaves everything as it was."""

from __future__ import annotations

import math
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import (
    METHODS,
    WITHOUT_CLOSURE,
    batches,
    build,
    closure_of,
    cross_entropy,
    data,
    differences,
    everything,
    leaves,
    make,
    train,
)
from torch import nn


def refusal(action: Any, *words: str, kind: type[Exception] = osc.ArgumentError) -> None:
    """The action raises, and the message contains all words."""
    with pytest.raises(kind) as caught:
        action()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


@pytest.mark.parametrize(
    ("name", "near"),
    [("kbfg", "kbfgs"), ("KFAC", "kfac"), ("mbf_released", "mbf-released"), ("adamW", "adamw"), ("lwsgdm", "lw-sgdm")],
)
def test_an_unknown_method_lists_its_neighbours(name: str, near: str) -> None:
    refusal(lambda: osc.build(name, make()), repr(name), "did you mean", repr(near), kind=osc.UnknownNameError)


def test_an_unknown_name_without_neighbours_lists_all() -> None:
    refusal(lambda: osc.build("zzzzzz", make()), "known", *METHODS)


def test_unknown_options_and_likelihoods_list_their_neighbours() -> None:
    refusal(lambda: osc.build("kbfgs-l", make(), memori=3), "'memori'", "'memory'", "kbfgs-l")
    refusal(lambda: osc.build("kfac", make(), likelihood="categoricl"), "'categoricl'", "'categorical'")
    refusal(lambda: osc.build(osc.Method(), make(), memory=3), "memory", "parts")
    refusal(lambda: osc.build("mbf", make(), blocks="rows"), "'rows'", "per-output")
    refusal(lambda: osc.build("kbfgs", make(), pairs="triple"), "'triple'", "double")
    refusal(lambda: osc.build("kfac", make(), statistics="exact"), "'exact'", "sampled", "empirical")
    refusal(lambda: osc.build("sgdm", make(), loss_reduction="avg"), "'avg'", "mean", "sum")
    refusal(lambda: osc.build("sgdm", make(), on_nonfinite="ignore"), "'ignore'", "raise", "skip")


OUT_OF_RANGE: list[tuple[str, dict[str, Any]]] = [
    ("sgdm", {"lr": -1e-9}),
    ("sgdm", {"lr": math.nan}),
    ("sgdm", {"lr": math.inf}),
    ("adam", {"weight_decay": -0.1}),
    ("adam", {"weight_decay": math.inf}),
    ("kfac", {"damping": 0.0}),
    ("kfac", {"damping": -1.0}),
    ("kfac", {"damping": math.nan}),
    ("mbf", {"damping": 0.0}),
    ("kbfgs", {"damping": 1.0}),
    ("kbfgs", {"damping": 3.0}),
    ("kbfgs", {"damping": 0.0}),
    ("kbfgs-l", {"damping": 1.5}),
    ("kbfgs-l", {"memory": 0}),
    ("kbfgs-l", {"memory": 2.5}),
    ("kbfgs", {"momentum": 1.0}),
    ("kbfgs", {"growth": 0.9}),
    ("sgdm", {"momentum": -0.1}),
    ("adam", {"beta2": 1.0}),
    ("adam", {"epsilon": -1e-8}),
    ("mbf", {"statistics_every": 0}),
    ("mbf", {"inverses_every": True}),
    ("kfac", {"eager": -1}),
]


@pytest.mark.parametrize(("name", "options"), OUT_OF_RANGE, ids=str)
def test_numbers_out_of_range_are_refused_at_construction(name: str, options: dict[str, Any]) -> None:
    (value,) = options.values()
    with pytest.raises(osc.ArgumentError) as caught:
        build(name, make(), **options)
    printed = (str(value), repr(value), f"{value:g}", f"{math.sqrt(value):g}" if value > 0 else "")
    assert any(text and text in str(caught.value) for text in printed), caught.value


def test_double_damping_names_the_way_out() -> None:
    refusal(lambda: build("kbfgs", make(), damping=1.0), "damping below 1", "PowellThenLM")
    build("kbfgs", make(), damping=3.0, pairs="powell-then-lm")


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "mbf"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize("key", ["lr", "damping", "weight_decay"])
def test_numbers_that_a_schedule_drives_out_of_range_are_refused_by_the_step(name: str, key: str, value: float) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=1))
    before = everything(model), leaves(optimizer.state_dict())
    good = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    refusal(lambda: optimizer.step(closure_of(optimizer, model, *data())), "damping" if key == "damping" else key)
    optimizer.param_groups[0][key] = good
    assert differences(before, (everything(model), leaves(optimizer.state_dict()))) == []


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_learning_rate_is_taken_or_refused(lr: float) -> None:
    model = make()
    if 0 <= lr < math.inf:
        assert osc.build("sgdm", model, lr=lr).param_groups[0]["lr"] == lr
    else:
        refusal(lambda: osc.build("sgdm", model, lr=lr), "lr")


KFAC_FACTORS = osc.Kronecker(osc.Covariance(), osc.Covariance())
INCOMPATIBLE: list[tuple[Any, tuple[str, ...]]] = [
    (lambda: osc.Method(KFAC_FACTORS), ("Covariance", "per-sample gradients", "EmpiricalFisher()", "SampledFisher()")),
    (lambda: osc.Method(KFAC_FACTORS, osc.BatchMean()), ("BatchMean", "EmpiricalFisher()", "SampledFisher()")),
    (lambda: osc.Method(KFAC_FACTORS, osc.SecantPairs()), ("SecantPairs", "EmpiricalFisher()")),
    (
        lambda: osc.Method(osc.Kronecker(osc.HessianActionBFGS(), osc.BFGS()), osc.EmpiricalFisher()),
        ("BFGS", "secant pairs", "EmpiricalFisher", "SecantPairs()"),
    ),
    (lambda: osc.Method(osc.MiniBlock()), ("MiniBlock", "gradient vectors", "BatchMean()")),
    (lambda: osc.Method(osc.MiniBlock(), osc.SecantPairs()), ("MiniBlock", "SecantPairs", "SampledFisher()")),
    (lambda: osc.Method(fallback=osc.MiniBlock()), ("fallback", "MiniBlock", "Identity()", "Diagonal()")),
    (lambda: osc.Method(fallback=KFAC_FACTORS), ("fallback", "Kronecker")),
    (lambda: osc.Kronecker(osc.BFGS(), osc.BFGS()), ("BFGS", "inputs", "HessianActionBFGS()")),
    (lambda: osc.Kronecker(osc.Covariance(), osc.HessianActionBFGS()), ("outputs", "BFGS()", "LBFGS()")),
    (
        lambda: osc.Method(
            osc.ByLayer({"Linear": KFAC_FACTORS, "Conv2d": osc.MiniBlock()}),
            osc.BatchMean(),
            defaults={"damping": 1.0},
        ),
        ("Kronecker", "BatchMean"),
    ),
    (
        lambda: osc.Method(osc.MiniBlock(), osc.BatchMean(), warm_start=osc.InputsOnly(), defaults={"damping": 1.0}),
        ("warm start", "InputsOnly"),
    ),
    (lambda: osc.Method(osc.MiniBlock(), osc.BatchMean(), defaults={"lr": 1.0}), ("damping must be > 0", "MiniBlock")),
    (lambda: osc.ByLayer({}), ("at least one entry",)),
]


@pytest.mark.parametrize(("compose", "words"), INCOMPATIBLE)
def test_parts_that_do_not_fit_are_refused_at_construction(compose: Any, words: tuple[str, ...]) -> None:
    refusal(compose, *words)


def test_methods_that_sample_labels_ask_for_a_likelihood() -> None:
    for name in ("kfac", "joint-kfac", "lw-sgdm"):
        refusal(lambda name=name: osc.build(name, make()), "likelihood=", "categorical", "bernoulli", "gaussian")


@pytest.mark.parametrize("name", ["kbfgs", "kfac"])
def test_strict_refuses_what_gets_the_fallback(name: str) -> None:
    refusal(lambda: build(name, make("tokens"), strict=True), "norm (LayerNorm): weight, bias")
    rows = {row.layer: row for row in build(name, make("tokens")).layer_table()}
    assert {layer: row.fallback for layer, row in rows.items()} == {
        "embedding": False, "mix": False, "norm": True, "head": False,
    }  # fmt: skip
    assert rows["mix"].part.startswith("Kronecker(") and rows["norm"].part == "Identity"
    assert rows["mix"].shape == (4, 6) and rows["mix"].kind == "Linear" and rows["embedding"].kind == "Embedding"
    build(name, make("mlp"), strict=True)
    build("sgdm", make("tokens"), strict=True)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    frozen = make()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    for model in (nn.ReLU(), frozen):
        refusal(lambda model=model: osc.build("sgdm", model), "no trainable parameters")


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_a_step_without_a_gradient_is_refused(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    before = leaves(optimizer.state_dict())
    refusal(optimizer.step, "loss.backward()")
    changed = differences(before, leaves(optimizer.state_dict()))
    assert set(changed) <= {"/progress/gradient_evaluations"}
    train(optimizer, model, [data()])


# -- numbers that are not finite ------------------------------------------------------------------------------------


def poisoned(kind: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = cross_entropy(model(x), y)
    if kind == "gradient":  # the loss is finite, one layer's gradient is not
        model.get_parameter("2.weight").register_hook(lambda gradient: gradient * math.inf)
        return cross_entropy(model(x), y)
    return loss * (math.nan if kind == "nan" else math.inf)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("name", METHODS)
def test_a_non_finite_loss_or_gradient_writes_nothing(name: str, kind: str) -> None:
    for policy in ("raise", "skip"):
        model = make()
        optimizer = build(name, model, on_nonfinite=policy)
        train(optimizer, model, batches(count=2))
        before = everything(model), leaves(optimizer.state_dict())
        x, y = data()

        def closure(model=model, optimizer=optimizer, x=x, y=y) -> torch.Tensor:  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            loss = poisoned(kind, model, x, y)
            loss.backward()
            return loss

        words = {"nan": "loss is nan", "inf": "loss is inf", "gradient": "not finite in layers 2"}[kind]
        if policy == "raise":
            refusal(lambda closure=closure, o=optimizer: o.step(closure), words, "skip", kind=osc.NumericalError)
        else:
            optimizer.step(closure)
            assert words in str(optimizer.last_report.skipped)
            assert optimizer.last_report.as_dict()["skipped"] == 1
        changed = differences(before, (everything(model), leaves(optimizer.state_dict())))
        assert set(changed) <= {"/1/progress/gradient_evaluations", "/1/progress/skipped_steps"}
        model.get_parameter("2.weight")._backward_hooks = None
        losses = train(optimizer, model, [(x, y)] * 4)
        assert all(map(math.isfinite, losses))


def test_skipping_does_not_depend_on_the_names_of_layers() -> None:
    model = nn.Sequential()
    model.add_module("backward", nn.Linear(6, 3))
    optimizer = osc.build("sgdm", model, on_nonfinite="skip")
    (cross_entropy(model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)) * math.nan).backward()
    optimizer.step()
    assert "backward" in str(optimizer.last_report.skipped)


# -- closures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "loss", torch.zeros(2), (torch.zeros(()),)])
def test_a_closure_that_returns_no_loss_is_refused(value: Any) -> None:
    model = make()
    optimizer = build("kbfgs", model)
    before = everything(model)
    inner = closure_of(optimizer, model, *data())

    def closure() -> Any:
        inner()
        return value

    refusal(lambda: optimizer.step(closure), "must return the scalar loss", "return loss")
    assert differences(before, everything(model)) == []
    train(optimizer, model, [data()])


def test_a_closure_may_return_a_number() -> None:
    model, other = make(), make()
    first, second = build("kbfgs", model), build("kbfgs", other)
    inner = closure_of(first, model, *data())
    first.step(lambda: float(inner().detach()))
    second.step(closure_of(second, other, *data()))
    assert differences(everything(model), everything(other)) == []


def test_a_closure_that_draws_another_batch_is_refused() -> None:
    model = make()
    optimizer = build("kbfgs", model)
    stream = iter([data(samples=16), data(samples=9)])

    def closure() -> torch.Tensor:
        x, y = next(stream)
        return closure_of(optimizer, model, x, y)()

    refusal(lambda: optimizer.step(closure), "'0'", "16 samples", "9 samples", "same mini-batch")


def test_one_unbatched_sample_is_refused() -> None:
    model = make()
    optimizer = build("kfac", model)
    x, y = data()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x[0]), y[0])
        loss.backward()
        return loss

    refusal(lambda: optimizer.step(closure), "unbatched")


def test_every_error_has_one_base_class() -> None:
    for error in (osc.ArgumentError, osc.CompatibilityError, osc.ClosureRequiredError, osc.NumericalError):
        assert issubclass(error, osc.OsculateError)
    assert issubclass(osc.ArgumentError, ValueError)
