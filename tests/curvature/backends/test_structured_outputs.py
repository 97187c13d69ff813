"""Models that return dictionaries, tuples, dataclasses or several heads: which tensor the likelihood reads."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import osculate as osc
import pytest
import torch
from osculate.curvature.backends.outputs import read_output, resolve_heads, select_output
from torch import Tensor, nn
from torch.nn import functional

Two = namedtuple("Two", ["score", "count"])
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@dataclass
class Found:
    """As others return it: beside the logits a loss and something hidden."""

    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class Wrapped(nn.Module):
    """A classifier whose result is packed by ``pack(logits, hidden)``."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last, self.pack = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), pack

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        return self.pack(self.last(hidden), hidden)


class ActorCritic(nn.Module):
    """A policy over three actions and a value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"policy": self.policy(hidden), "value": self.value(hidden)}


PACKS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "tensor": (lambda logits, hidden: logits, None),
    "dataclass": (lambda logits, hidden: Found(logits, hidden, logits.sum()), None),
    "dict": (lambda logits, hidden: {"loss": logits.sum(), "logits": logits, "hidden": hidden}, None),
    "ordered dict": (lambda logits, hidden: OrderedDict(hidden=hidden, logits=logits), None),
    "namespace": (lambda logits, hidden: SimpleNamespace(logits=logits, hidden=hidden), None),
    "only one": (lambda logits, hidden: {"loss": logits.sum(), "scores": logits, "ids": LABELS}, None),
    "loss and logits": (lambda logits, hidden: (logits.sum(), logits), None),
    "key": (lambda logits, hidden: {"a": logits, "b": hidden}, "a"),
    "index": (lambda logits, hidden: (hidden, logits), 1),
    "index from the end": (lambda logits, hidden: [logits, hidden], -2),
    "named tuple": (lambda logits, hidden: Two(logits, hidden), "score"),
    "index of a dict": (lambda logits, hidden: {"a": hidden, "b": logits}, 1),
    "attribute": (lambda logits, hidden: Found(hidden, logits), "hidden"),
    "function": (lambda logits, hidden: {"out": [hidden, {"deep": logits}]}, lambda result: result["out"][1]["deep"]),
}


def step(model: nn.Module, optimizer: osc.SecondOrder, logits_of: Callable[[Any], Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(logits_of(model(X)), LABELS)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(
    ("method", "backend"),
    [("kfac", "hooks"), ("joint-kfac", "hooks"), ("ngd-exact", "hooks"), ("tnt", "hooks"), ("kfac", "func")],
)
def test_the_step_is_that_of_the_model_that_returns_the_logits(pack: str, method: str, backend: str) -> None:
    make, choice = PACKS[pack]
    plain, model = Wrapped(PACKS["tensor"][0]), Wrapped(make)
    step(plain, osc.build(method, plain, likelihood="categorical", backend=backend), lambda result: result)
    optimizer = osc.build(method, model, likelihood="categorical", output=choice, backend=backend)
    step(model, optimizer, lambda result: select_output(result, choice))
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)


def ggn(model: nn.Module, likelihoods: dict[str, str], layer: str) -> Tensor:
    """Mean Gauss-Newton block of one layer, by automatic differentiation of all heads."""
    values = {name: value.detach() for name, value in model.named_parameters()}
    names = [f"{layer}.weight", f"{layer}.bias"]

    def heads(*chosen: Tensor) -> Tensor:
        found = torch.func.functional_call(model, {**values, **dict(zip(names, chosen, strict=True))}, (X,))
        return torch.cat([found[name] for name in likelihoods], 1)

    chosen = tuple(values[name] for name in names)
    jacobian = torch.cat([j.flatten(2) for j in torch.autograd.functional.jacobian(heads, chosen)], 2)
    total = torch.zeros(jacobian.shape[2], jacobian.shape[2], dtype=torch.float64)
    for own, row in zip(jacobian, heads(*chosen), strict=True):
        start, hessian = 0, torch.zeros(len(row), len(row), dtype=torch.float64)
        for name, kind in likelihoods.items():
            width = model(X)[name].shape[1]
            p = row[start : start + width].softmax(0)
            block = p.diag() - p.outer(p) if kind == "categorical" else torch.eye(width, dtype=torch.float64)
            hessian[start : start + width, start : start + width] = block
            start += width
        total += own.T @ hessian @ own
    return total / len(X)


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize(
    "likelihoods", [{"policy": "categorical", "value": "gaussian"}, {"value": "gaussian", "policy": "categorical"}]
)
def test_the_curvature_of_two_heads_is_the_sum_of_both(backend: str, likelihoods: dict[str, str]) -> None:
    method = osc.Method(osc.Dense(), osc.ExactGGN(), defaults={"lr": 1.0, "damping": 0.1})
    for layer in ("body", "policy", "value"):
        model = ActorCritic()
        optimizer = osc.build(method, model, likelihood=likelihoods, backend=backend)
        found = model(X)
        (functional.cross_entropy(found["policy"], LABELS) + 0.5 * found["value"].square().mean()).backward()
        matrix = osc.ExactGGN().fill(optimizer.collect()[layer]).matrix()
        optimizer.close()
        torch.testing.assert_close(matrix, ggn(model, likelihoods, layer), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["kfac", "lw-adamw", "joint-kfac", "ekfac"])
def test_both_backends_sample_the_same_labels_of_all_heads(method: str) -> None:
    ends = []
    for backend in ("hooks", "func"):
        model = ActorCritic()
        heads = {"policy": "categorical", "value": "gaussian"}
        optimizer = osc.build(method, model, likelihood=heads, backend=backend)
        for _ in range(2):
            optimizer.zero_grad()
            found = model(X)
            (functional.cross_entropy(found["policy"], LABELS) + 0.5 * found["value"].square().mean()).backward()
            if optimizer.needs_closure:
                pytest.skip("steps by a closure")
            optimizer.step()
        ends.append([value.detach() for value in model.parameters()])
    for own, other in zip(*ends, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_per_sample_gradients_of_two_heads_by_func_are_those_of_the_hooks() -> None:
    method = osc.Method(osc.Dense(), osc.EmpiricalFisher(), defaults={"lr": 1.0, "damping": 0.1})
    found = []
    for backend in ("hooks", "func"):
        model = ActorCritic()
        heads = {"policy": "categorical", "value": "gaussian"}
        optimizer = osc.build(method, model, likelihood=heads, backend=backend)
        result = model(X)
        (functional.cross_entropy(result["policy"], LABELS) + result["value"].square().mean()).backward()
        found.append(optimizer.collect()["body"].loss_vectors())
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, str]] = {
    "several": (lambda logits, hidden: {"a": logits, "b": hidden}, None, r"a dict \('a', 'b'\) with several tensors"),
    "a tuple of two": (lambda logits, hidden: (logits, hidden), None, r"a tuple \(0, 1\) with several tensors"),
    "one and more inside": (lambda logits, hidden: (logits, [hidden]), None, r"several tensors \(0, and deeper\)"),
    "nothing": (lambda logits, hidden: {"loss": logits.sum()}, None, "no tensor with a batch axis"),
    "a loss": (lambda logits, hidden: logits.sum(), None, "a single number, which has no batch axis"),
    "no such key": (lambda logits, hidden: {"a": logits}, "logits", r"a dict \('a'\), which has no 'logits'"),
    "no such index": (lambda logits, hidden: (logits, hidden), 4, "has no 4"),
    "an index into a tensor": (lambda logits, hidden: logits, 0, "one Tensor of shape"),
    "a function to no tensor": (lambda logits, hidden: (logits, hidden), lambda result: result, "is tuple"),
}


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_found_is_refused_with_the_way_out(case: str, backend: str) -> None:
    make, choice, message = WRONG[case]
    model = Wrapped(make)
    optimizer = osc.build("kfac", model, likelihood="categorical", output=choice, backend=backend)
    with pytest.raises(osc.ArgumentError, match=message) as caught:
        model(X)
    optimizer.close()
    assert "output=" in str(caught.value) or "backend='hooks'" in str(caught.value)


def test_a_method_that_samples_nothing_does_not_ask_what_the_model_returns() -> None:
    model = Wrapped(WRONG["several"][0])
    step(model, osc.build("kbfgs", model), lambda result: result["a"])


def test_heads_are_checked_when_the_optimizer_is_built() -> None:
    model = ActorCritic()
    for likelihood, message in (
        ({}, "name or index of each head"),
        ({1.5: "gaussian"}, "name or index of each head"),
        ({"policy": "categoric"}, "did you mean 'categorical'"),
        ({"policy": None}, "head 'policy' has no likelihood"),
    ):
        with pytest.raises(osc.ArgumentError, match=message):
            osc.build("kfac", model, likelihood=likelihood)
    with pytest.raises(osc.ArgumentError, match="says it twice"):
        osc.build("kfac", model, likelihood={"policy": "categorical"}, output="policy")
    with pytest.raises(osc.ArgumentError, match="output must be"):
        osc.build("kfac", model, likelihood="categorical", output=1.5)


def test_heads_with_different_numbers_of_rows_are_refused() -> None:
    heads = resolve_heads({0: "gaussian", 1: "gaussian"})
    with pytest.raises(osc.ArgumentError, match="count"):
        read_output(heads, (torch.ones(3, 2), torch.ones(4, 2)))


def test_a_function_that_computes_a_tensor_serves_the_hooks_only() -> None:
    def half(result: Tensor) -> Tensor:
        return result[:, :2]

    model = Wrapped(PACKS["tensor"][0])
    optimizer = osc.build("kfac", model, likelihood="categorical", output=half)
    functional.cross_entropy(half(model(X)), LABELS % 2).backward()
    with pytest.warns(osc.LossWarning, match="computes another tensor"):
        optimizer.step()
    model = Wrapped(PACKS["tensor"][0])
    optimizer = osc.build("kfac", model, likelihood="categorical", output=half, backend="func")
    with pytest.raises(osc.ArgumentError, match="computes another one from it"):
        model(X)
    optimizer.close()


def test_backpack_reads_one_tensor_of_a_structure_and_refuses_several_heads() -> None:
    ends = []
    for backend in ("hooks", "backpack"):
        model = Wrapped(PACKS["dict"][0])
        step(
            model, osc.build("kfac", model, likelihood="categorical", backend=backend), lambda result: result["logits"]
        )
        ends.append([value.detach() for value in model.parameters()])
    for own, other in zip(*ends, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    actor = ActorCritic()
    optimizer = osc.build("kfac", actor, likelihood={"policy": "categorical"}, backend="backpack")
    with pytest.raises(osc.CompatibilityError, match="reads one tensor"):
        actor(X)
    optimizer.close()


def test_a_function_by_which_the_optimizer_reads_is_kept_when_layers_join_and_in_copies() -> None:
    model = Wrapped(PACKS["key"][0])
    model.first.requires_grad_(False)
    optimizer = osc.build("kfac", model, likelihood="categorical", output="a")
    step(model, optimizer, lambda result: result["a"])
    model.first.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.first.parameters())})
    step(model, optimizer, lambda result: result["a"])
    twin, other = copy.deepcopy((model, optimizer))
    for own, chosen in ((model, optimizer), (twin, other)):
        step(own, chosen, lambda result: result["a"])
    for own, copied in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, copied)
