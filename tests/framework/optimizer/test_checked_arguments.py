"""What a user hands to build, step, warm_start, load_state_dict and the registry is refused before anything changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import osculate as osc
import pytest
import torch
from osculate.curvature.likelihoods import Categorical
from small_nets import batches, build, data, differences, everything, leaves, make, train
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"likelihood": 3}, "likelihood must be .* got 3; name 'categorical'"),
        ({"likelihood": Categorical}, "likelihood must be .* got the class Categorical"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"grad_scaler": 3}, "grad_scaler must be a GradScaler or None, got 3"),
        ({"backend": 3}, "backend must be a name, got 3; take 'hooks'"),
        ({"strict": "yes"}, "strict must be True or False, got 'yes'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"damping": "0.1"}, "damping must be a number, got '0.1'"),
        ({"groups": 3}, "groups must be a list of dictionaries"),
        ({"groups": {"params": ["*"]}}, "groups must be a list of dictionaries"),
        ({"groups": [{"params": ["*"], "lr": "a"}]}, r"lr of param_groups\[0\] must be a number, got 'a'"),
        ({"loss_reduction": 3}, "loss_reduction must be 'mean' or 'sum', got 3"),
        ({"on_nonfinite": None}, "on_nonfinite must be 'raise' or 'skip', got None"),
        ({"process_group": 3}, "process_group must be 'auto'"),
    ],
)
def test_build_names_what_it_cannot_take(given: dict[str, Any], message: str) -> None:
    model = make()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(osc.ArgumentError, match=message):
        osc.build("kfac", model, **({"likelihood": "categorical"} | given))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(osc.ArgumentError, match=r"weight, bias are on the meta device.*to_empty"):
        osc.build("sgdm", nn.Linear(3, 2, device="meta"))


@pytest.mark.parametrize("seed", [-1, 2**40, 2**63 - 1, 2**64 + 5])
@pytest.mark.parametrize("name", ["kfac", "joint-sgdm"])
def test_every_whole_number_is_a_seed(name: str, seed: int) -> None:
    ends = []
    for chosen in (seed, seed, seed + 1):
        model = make()
        train(build(name, model, seed=chosen), model, batches(count=2))
        ends.append(everything(model))
    assert differences(ends[0], ends[1]) == []
    assert differences(ends[0], ends[2]) != []


@pytest.mark.parametrize("name", ["sgdm", "kbfgs"])
def test_a_closure_that_cannot_be_called_is_refused(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    before = leaves((everything(model), optimizer.state_dict()))
    with pytest.raises(osc.ArgumentError, match="closure must be a function, got 3"):
        optimizer.step(3)  # type: ignore[arg-type]
    assert differences(before, leaves((everything(model), optimizer.state_dict()))) == []


@pytest.mark.parametrize(
    ("closures", "message"),
    [
        (None, "takes one function per mini-batch.*NoneType"),
        (lambda: None, "takes one function per mini-batch"),
        (["good", 3], "entry 1 of the closures of warm_start must be a function, got 3"),
        ([], "is empty"),
        ([lambda: None], "ran 1 times without effect"),
    ],
)
def test_a_warm_start_from_nothing_is_refused_and_leaves_no_trace(closures: Any, message: str) -> None:
    model = make()
    optimizer = build("kbfgs", model)
    x, _ = data()
    if isinstance(closures, list):
        closures = [(lambda: model(x)) if entry == "good" else entry for entry in closures]
    before = leaves(optimizer.state_dict())
    with pytest.raises(osc.ArgumentError, match=message):
        optimizer.warm_start(closures)
    assert differences(before, leaves(optimizer.state_dict())) == []
    optimizer.warm_start([lambda: model(x)])


@pytest.mark.parametrize("key", ["lr", "damping", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, "a", float("nan"), None, True, torch.ones(2)])
def test_numbers_written_into_a_group_are_checked_before_the_step(key: str, value: Any) -> None:
    model = make()
    optimizer = build("kfac", model)
    nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.param_groups[0][key] = value
    before = everything(model)
    with pytest.raises(osc.ArgumentError, match=f"^{key} .*(number|lie in)"):
        optimizer.step()
    assert differences(before, everything(model)) == []


def test_a_tensor_may_hold_a_learning_rate_and_a_missing_one_is_named() -> None:
    model = make()
    optimizer = build("sgdm", model)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    train(optimizer, model, [data()])
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(osc.ArgumentError, match=r"param_groups\[0\] lacks lr"):
        optimizer.step()


def _without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: None, "the dictionary that state_dict.* got NoneType"),
        (lambda state: torch.optim.Adam(make().parameters()).state_dict(), "not a state of an osculate optimizer"),
        (_without("format", "method", "group_of"), r"format 1 \(osculate 0.1\), this version reads format 2"),
        (lambda state: state | {"format": 3}, "format 3, this version reads format 2"),
        (_without("guard"), "damaged: its 'guard' is NoneType"),
        (lambda state: state | {"progress": {}}, "'progress' does not match: missing"),
        (lambda state: state | {"progress": state["progress"] | {"step": "a"}}, "'progress', step has str"),
        (lambda state: state | {"param_groups": [{}]}, r"param_groups\[0\] lacks lr"),
        (lambda state: state | {"param_groups": [state["param_groups"][0] | {"lr": -1.0}]}, "lr must be a finite"),
    ],
)
def test_a_state_that_is_none_is_refused(spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    model = make()
    optimizer = build("kfac", model)
    train(optimizer, model, [data()])
    target = build("kfac", make())
    before = leaves(target.state_dict())
    with pytest.raises(osc.ArgumentError, match=message):
        target.load_state_dict(spoil(optimizer.state_dict()))
    assert differences(before, leaves(target.state_dict())) == []


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({}, {"momentum": osc.EMA(0.8)}, r"momentum EMA, this optimizer has EMA\(decay=0.8\)"),
        ({"momentum": osc.EMA(0.8)}, {"momentum": osc.HeavyBall(0.8)}, r"EMA\(decay=0.8\).*HeavyBall\(decay=0.8\)"),
        (
            {"preconditioner": osc.Diagonal()},
            {"preconditioner": osc.Diagonal(power=1.0)},
            "preconditioner Diagonal, this optimizer has",
        ),
    ],
)
def test_a_state_of_other_parts_of_the_same_shape_is_refused(
    saved: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    model = make()
    first, second = osc.build(osc.Method(**saved), model), osc.build(osc.Method(**own), make())
    train(first, model, [data()])
    state = first.state_dict()
    with pytest.raises(osc.ArgumentError, match=message):
        second.load_state_dict(state)
    state["method"] = second.state_dict()["method"]  # the way out that the message names
    second.load_state_dict(state)


def test_what_no_state_depends_on_may_change_in_a_run() -> None:
    model = make()
    first = osc.build(osc.Method(), model)
    second = osc.build(osc.Method(guard=osc.Backtrack(), weight_decay=osc.Decoupled()), make())
    train(first, model, [data()])
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["progress"]["step"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: osc.registry.register_part("damping", osc.Split()), r"takes a class, got Split\(\)"),
        (lambda: osc.registry.register_part(3, osc.Split), "unknown kind of part '3'"),
        (lambda: osc.registry.register_part("step size", int), "int is no step size: it has none of the verbs due,"),
        (lambda: osc.registry.register_part("structure", int), r"int is no structure.*precondition"),
        (lambda: osc.registry.register(3, osc.Method), "name must be a name, got 3"),
        (lambda: osc.registry.register("mine", osc.Method()), "factory must be a function, got Method"),
        (lambda: osc.Method(damping=osc.LevenbergMarquardt()), "Identity has no matrix that is damped"),
    ],
)
def test_the_registry_and_methods_name_what_they_cannot_take(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(osc.ArgumentError, match=message):
        call()


@dataclass(frozen=True)
class Steps(osc.ConstantStep):
    """Returns what it is told to."""

    value: Any = None

    def propose(self, state: None, evidence: osc.StepEvidence) -> Any:
        return self.value


class Directions(osc.Identity):
    """Makes of the momentum what it is told to."""

    def __init__(self, make: Callable[[tuple[Tensor, ...]], Any]):
        object.__setattr__(self, "make", make)

    def precondition(self, state: Any, momentum: tuple[Tensor, ...]) -> Any:
        return self.make(momentum)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"step_size": Steps(None)}, "what Steps.propose returns must be a number, got None"),
        ({"step_size": Steps([0.1, 0.2])}, "what Steps.propose returns must be a number"),
        ({"step_size": Steps(True)}, "what Steps.propose returns must be a number, got True"),
        ({"step_size": Steps(torch.ones(1, 2))}, "one per layer"),
        ({"preconditioner": Directions(lambda m: None)}, "Directions.precondition must .* returned NoneType"),
        ({"preconditioner": Directions(lambda m: m[0])}, "Directions.precondition must return one tensor per"),
        ({"preconditioner": Directions(lambda m: m[:1])}, "Directions.precondition must return one tensor per"),
        ({"preconditioner": Directions(lambda m: tuple(v.sum() for v in m))}, r"returned \(\(\) torch.float64"),
        ({"preconditioner": Directions(lambda m: tuple(v.float() for v in m))}, "torch.float32"),
    ],
)
def test_bad_answers_of_a_part_write_no_parameter(part: dict[str, Any], message: str) -> None:
    model = make()
    optimizer = osc.build(osc.Method(**part), model)
    nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
    before = everything(model)
    with pytest.raises(osc.ArgumentError, match=message):
        optimizer.step()
    assert differences(before, everything(model)) == []


def test_directions_that_are_not_finite_are_traced_to_their_part() -> None:
    model = make()
    optimizer = osc.build(osc.Method(Directions(lambda m: tuple(v * float("nan") for v in m))), model)
    train(optimizer, model, [data()])
    with pytest.raises(osc.NumericalError, match=re.escape("parameters of layer 0 are not finite")):
        train(optimizer, model, [data()])


def test_copies_for_undoing_are_made_only_at_steps_that_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = osc.framework.optimizer.second_order.Undo

    def counted(*given: Any) -> Any:
        made.append(given[3])
        return original(*given)

    monkeypatch.setattr(osc.framework.optimizer.second_order, "Undo", counted)
    model = make()
    kronecker = osc.Kronecker(osc.Covariance(), osc.Covariance())
    damping = osc.LevenbergMarquardt(every=3)
    method = osc.Method(kronecker, osc.EmpiricalFisher(), damping, defaults={"lr": 0.01, "damping": 0.1})
    train(osc.build(method, model, likelihood="categorical"), model, batches(count=7))
    assert made == [2, 5]
