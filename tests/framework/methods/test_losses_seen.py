"""Plain loops: the loss that bounds steps is read whatever form the output has, or it is said that it is not."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import osculate as osc
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = X[:, :3].argmax(1)
BITS = (X[:, :3] > 0).double()


class Shaped(nn.Module):
    """A small net whose output gets some form at the end."""

    def __init__(self, width: int, form: Callable[[Tensor], Any]):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, width)).double()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


def read(method: str, model: nn.Module, loss: Callable[[], Tensor], **build: Any) -> tuple[float | None, float, int]:
    """What was read in the second of two steps, what it was, and how many warnings both gave."""
    optimizer = osc.build(method, model, **build)
    found: list[Tensor | None] = []
    own = optimizer.seen_loss
    optimizer.seen_loss = lambda value: found.append(own(value)) or found[-1]  # type: ignore[method-assign, func-returns-value]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
    last = found[-1]
    told = sum(entry.category is osc.LossWarning for entry in said)
    return None if last is None else float(last), value.item(), told


def positions(classes: int, *places: int) -> Tensor:
    return torch.randint(0, classes, (len(X), *places), generator=torch.Generator().manual_seed(2))


FORMS: dict[str, tuple[int, Callable[[Tensor], Any], Callable[[Any], Tensor], dict[str, Any], bool]] = {
    "rows": (3, lambda z: z, lambda out: functional.cross_entropy(out, LABELS), {}, True),
    "a dictionary": (3, lambda z: {"logits": z}, lambda out: functional.cross_entropy(out["logits"], LABELS), {}, True),
    "a tuple": (3, lambda z: (z,), lambda out: functional.cross_entropy(out[0], LABELS), {}, True),
    "a chosen entry": (
        3, lambda z: (z, z.tanh()), lambda out: functional.cross_entropy(out[0], LABELS), {"output": 0}, True,
    ),
    "samples second": (
        3, lambda z: z.unflatten(0, (4, 8)).transpose(0, 1), lambda out: functional.cross_entropy(
            out.transpose(0, 1).flatten(0, 1), LABELS), {"samples": 1}, True,
    ),
    "classes, places": (15, lambda z: z.unflatten(1, (3, 5)), lambda out: functional.cross_entropy(
        out, positions(3, 5)), {}, True),
    "places, classes": (15, lambda z: z.unflatten(1, (5, 3)), lambda out: functional.cross_entropy(
        out.flatten(0, 1), positions(3, 5).flatten()), {}, True),
    "classes, places, alike": (9, lambda z: z.unflatten(1, (3, 3)), lambda out: functional.cross_entropy(
        out, positions(3, 3)), {}, True),
    "an image": (24, lambda z: z.unflatten(1, (3, 2, 4)), lambda out: functional.cross_entropy(
        out, positions(3, 2, 4)), {}, True),
}  # fmt: skip


@pytest.mark.parametrize("likelihood", ["categorical", None])
@pytest.mark.parametrize("method", ["mbf", "kfac", "joint-kfac"])
@pytest.mark.parametrize("name", FORMS)
def test_a_cross_entropy_is_read_in_every_form(name: str, method: str, likelihood: str | None) -> None:
    width, form, loss, build, _ = FORMS[name]
    if likelihood is None and method != "mbf":
        return
    model = Shaped(width, form)
    found, true, told = read(method, model, lambda: loss(model(X)), likelihood=likelihood, **build)
    assert found is not None and math.isclose(found, true, rel_tol=1e-5) and told == 0


@pytest.mark.parametrize("likelihood", ["bernoulli", None])
@pytest.mark.parametrize("method", ["mbf", "kfac"])
@pytest.mark.parametrize("form", ["rows", "flat", "one", "dictionary"])
def test_a_binary_cross_entropy_is_read(form: str, method: str, likelihood: str | None) -> None:
    if likelihood is None and method != "mbf":
        return
    loss = functional.binary_cross_entropy_with_logits
    width = 3 if form in ("rows", "dictionary") else 1
    shaped = {"flat": lambda z: z.flatten(), "dictionary": lambda z: {"logits": z}}.get(form, lambda z: z)
    model = Shaped(width, shaped)
    targets = BITS if width == 3 else BITS[:, 0] if form == "flat" else BITS[:, :1]

    def value() -> Tensor:
        out = model(X)
        return loss(out["logits"] if form == "dictionary" else out, targets)

    found, true, told = read(method, model, value, likelihood=likelihood)
    assert found is not None and math.isclose(found, true, rel_tol=1e-5) and told == 0


@pytest.mark.parametrize("method", ["mbf", "kfac"])
def test_weighted_bits_are_read_and_soft_ones_are_said(method: str) -> None:
    model = Shaped(3, lambda z: z)
    weight = torch.tensor([0.2, 1.0, 5.0]).double()
    found, true, told = read(
        method,
        model,
        lambda: functional.binary_cross_entropy_with_logits(model(X), BITS, pos_weight=weight),
        likelihood="bernoulli",
    )
    assert found is not None and math.isclose(found, true, rel_tol=1e-5) and told == 0
    soft = 0.1 + 0.8 * torch.rand(32, 3, generator=torch.Generator().manual_seed(3)).double()
    found, _, told = read(
        method,
        model,
        lambda: functional.binary_cross_entropy_with_logits(model(X), soft),
        likelihood="bernoulli",
    )
    assert found is None and told == 1


@pytest.mark.parametrize("method", ["mbf", "kfac"])
def test_a_squared_error_is_read_where_its_weight_is_known_and_else_said(method: str) -> None:
    model = Shaped(3, lambda z: z)
    for likelihood, knows in (("gaussian", False), (osc.Gaussian(weight=2 / 3), True)):
        found, true, told = read(method, model, lambda: functional.mse_loss(model(X), BITS), likelihood=likelihood)
        assert (found is not None) == knows and told == (not knows)
        assert found is None or math.isclose(found, true, rel_tol=1e-5)


def test_several_passes_make_one_loss() -> None:
    for likelihood, loss in (
        (osc.Gaussian(weight=2 / 3), lambda out, rows: functional.mse_loss(out, BITS[rows])),
        ("categorical", lambda out, rows: functional.cross_entropy(out, LABELS[rows])),
        ("bernoulli", lambda out, rows: functional.binary_cross_entropy_with_logits(out, BITS[rows])),
    ):
        torch.manual_seed(0)
        model = Shaped(3, lambda z: z)
        optimizer = osc.build("mbf", model, likelihood=likelihood)
        total = 0.0
        for rows in (slice(0, 16), slice(16, 32)):
            value = 0.5 * loss(model(X[rows]), rows)
            value.backward()
            total += value.item()
        found = optimizer.seen_loss(None)
        assert found is not None and math.isclose(float(found), total, rel_tol=1e-5)


def test_an_output_that_is_computed_or_changed_is_said_once() -> None:
    model = Shaped(3, lambda z: z)
    half = osc.build("mbf", model, likelihood="categorical", output=lambda out: out[:, :2])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            half.zero_grad()
            functional.cross_entropy(model(X)[:, :2], LABELS % 2).backward()
            half.step()
    assert [entry.category for entry in said] == [osc.LossWarning] and "no gradient of it was seen" in str(
        said[0].message
    )
    half.close()
    optimizer = osc.build("mbf", model, likelihood="categorical")
    functional.cross_entropy(model(X).div_(0.5), LABELS).backward()
    with pytest.warns(osc.LossWarning, match="changed in place"):
        optimizer.step()


def test_a_copy_and_an_optimizer_with_more_layers_read_on() -> None:
    model = Shaped(3, lambda z: z)
    model.net[0].requires_grad_(False)
    optimizer = osc.build("mbf", model, likelihood="categorical")
    model.net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.net[0].parameters())})
    value = functional.cross_entropy(model(X), LABELS)
    value.backward()
    found = optimizer.seen_loss(None)
    assert found is not None and math.isclose(float(found), value.item(), rel_tol=1e-5)
    other_model, other = copy.deepcopy((model, optimizer))
    other.zero_grad()
    functional.cross_entropy(other_model(X), LABELS).backward()
    found = other.seen_loss(None)
    assert found is not None and math.isclose(float(found), value.item(), rel_tol=1e-5)


# -- what is no Sigmoid, what has no curvature, who is gone ----------------------------------------------------------


class Ends(nn.Module):
    """Numbers in [0, 1] that no Sigmoid has made."""

    def __init__(self, mixed: bool):
        super().__init__()
        torch.manual_seed(1)
        self.mixed, self.net = mixed, nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return 0.999 * out.softmax(1) + 0.0003 if self.mixed else out.clamp(0, 1)


@pytest.mark.parametrize("method", ["kfac", "mbf"])
@pytest.mark.parametrize("mixed", [False, True])
def test_numbers_that_happen_to_be_in_the_unit_interval_are_not_called_a_sigmoid(mixed: bool, method: str) -> None:
    model = Ends(mixed)
    optimizer = osc.build(method, model, likelihood="categorical")
    out = model(X)
    (functional.nll_loss(out.log(), LABELS) if mixed else functional.cross_entropy(out / 0.1, LABELS)).backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()
    assert not any("Sigmoid" in str(entry.message) or "BCE" in str(entry.message) for entry in said)


@pytest.mark.parametrize("likelihood", ["from-loss", "gaussian"])
@pytest.mark.parametrize("kind", ["hinge", "absolute", "squared hinge"])
@pytest.mark.parametrize("method", ["kfac", "joint-kfac", "lw-sgdm"])
def test_a_loss_without_curvature_is_named_once(method: str, kind: str, likelihood: str) -> None:
    model = Shaped(1, lambda z: z)
    optimizer = osc.build(method, model, likelihood=likelihood)
    signs = 2 * BITS[:, :1] - 1

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = model(X)
        margins = torch.relu(1 - signs * out)
        value = {"hinge": margins, "squared hinge": margins.square(), "absolute": (out - 3).abs()}[kind].mean()
        value.backward()
        return value

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(closure)
    texts = [str(entry.message) for entry in said if entry.category is osc.LossWarning]
    assert [("no curvature in the model's output" in text) for text in texts] == [True] * (kind != "squared hinge")


@pytest.mark.parametrize("name", ["kfac", "mbf", "kbfgs", "joint-kfac", "adam", "ekfac", "tnt"])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_that_is_dropped_is_gone_at_once(name: str, steps: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = osc.build(name, model, likelihood="categorical")

    def closure(optimizer: osc.SecondOrder) -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(model(X), LABELS)
        value.backward()
        return value

    gc.collect()
    gc.disable()
    try:
        for _ in range(steps):
            optimizer.step(lambda own=optimizer: closure(own))  # type: ignore[misc]
        kept = weakref.ref(optimizer), weakref.ref(optimizer.capture)
        del optimizer
        assert kept[0]() is None and kept[1]() is None
    finally:
        gc.enable()


def test_a_successor_is_not_refused_by_its_predecessor() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    gc.collect()
    gc.disable()
    try:
        optimizer = osc.build("kfac", model, likelihood="from-loss")
        optimizer = osc.build("mbf", model)
        functional.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    finally:
        gc.enable()


@pytest.mark.parametrize("limit", ["a", None, [0.1]])
@pytest.mark.parametrize("name", ["ngd-exact", "kfac", "ekfac", "mbf"])
def test_a_limit_that_is_no_number_is_refused_in_words(name: str, limit: object) -> None:
    with pytest.raises(osc.ArgumentError, match="must be a number"):
        osc.build(name, nn.Linear(3, 2), likelihood="categorical", limit=limit)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["kfac", "mbf", "kbfgs", "adam", "lbfgs"])
def test_a_complex_loss_is_refused_before_anything_is_written(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 3)).double()
    before = [value.detach().clone() for value in model.parameters()]
    optimizer = osc.build(name, model, **({} if name == "lbfgs" else {"likelihood": "categorical"}))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(model(X), LABELS)
        value.backward()
        return value.to(torch.complex128)

    with pytest.raises(osc.ArgumentError, match="real loss"):
        optimizer.step(closure)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
