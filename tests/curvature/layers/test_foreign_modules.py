"""Modules that look like torch's and are not, and modules of others that are linear maps: read by what they compute."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import osculate as osc
import pytest
import torch
from measuring import close, half_squares, measure
from osculate.curvature import Layer, discover_layers
from osculate.curvature.layers.adapters import LinearAdapter, TransposedLinearAdapter
from torch import Tensor, nn
from torch.nn import functional


class Columns(nn.Module):
    """x W + b in one ``addmm`` on flattened rows: a weight (d_in, d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.width, self.weight = d_out, nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], self.width)


class Rows(nn.Module):
    """``F.linear`` in a class of somebody's own, with an optional bias and an initialiser kept as a name."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.initializer = "glorot"
        self.weight = nn.Parameter(torch.randn(d_out, d_in))
        self.register_parameter("bias", nn.Parameter(torch.randn(d_out)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Cast(nn.Linear):
    """A subclass that casts and adds the bias itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T + self.bias


class Cosine(nn.Linear):
    """Rows of length one: another function of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight, dim=1), self.bias)


class Clamped(nn.Linear):
    """As good as linear while the weights are small."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.clamp(-3, 3), self.bias)


class WithDropout(nn.Linear):
    """Linear in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.dropout(x, 0.5, self.training), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """The weight is standardised in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class OwnConvForward(nn.Conv1d):
    """Torch's forward with another helper."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class NormAct(nn.BatchNorm2d):
    """Batch normalisation with the activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class InstanceAct(nn.InstanceNorm1d):
    """Another helper of the instance normalisation."""

    def _apply_instance_norm(self, x: Tensor) -> Tensor:
        return torch.tanh(super()._apply_instance_norm(x))


class Called(nn.Linear):
    """Something around the call itself."""

    def __call__(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().__call__(x)


def patched() -> nn.Module:
    module = nn.Linear(4, 3)
    module.forward = lambda x: functional.linear(torch.tanh(x), module.weight, module.bias)  # type: ignore[method-assign]
    return module


def same_forward() -> nn.Module:
    """The class's own method, written on the instance as some launchers do."""
    module = nn.Linear(4, 3)
    module.forward = types.MethodType(nn.Linear.forward, module)  # type: ignore[method-assign]
    return module


MAPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "columns": (lambda: Columns(4, 3), (5, 4)),
    "columns of sequences": (lambda: Columns(4, 3), (5, 6, 4)),
    "square columns": (lambda: Columns(4, 4), (5, 4)),
    "rows": (lambda: Rows(4, 3), (5, 2, 2, 4)),
    "rows without bias": (lambda: Rows(4, 3, bias=False), (5, 4)),
    "square rows": (lambda: Rows(3, 3), (5, 3)),
    "one column": (lambda: Columns(4, 1), (5, 4)),
    "cast": (lambda: Cast(4, 3), (5, 4)),
    "forward of its class": (same_forward, (5, 4)),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cosine": (lambda: Cosine(4, 3), "Cosine does something else than Linear"),
    "clamped": (lambda: Clamped(4, 3), "Clamped does something else than Linear"),
    "dropout inside": (lambda: WithDropout(4, 3), "WithDropout does something else than Linear"),
    "dropout inside, built in evaluation": (lambda: WithDropout(4, 3).eval(), "WithDropout"),
    "standardised weights": (lambda: Standardised(2, 3, 3), "Standardised does something else than Conv2d"),
    "own _conv_forward": (lambda: OwnConvForward(2, 3, 3), "OwnConvForward does something else than Conv1d"),
    "activation inside": (lambda: NormAct(3), "NormAct does something else than BatchNorm2d"),
    "activation inside, by a helper": (lambda: InstanceAct(3, affine=True), "InstanceAct does something else"),
    "own call": (lambda: Called(4, 3), "Called does something else than Linear"),
    "patched": (patched, "its forward was replaced on the instance"),
}


def layer_of(module: nn.Module) -> Layer:
    (layer,) = discover_layers(module)
    return layer


def by_vmap(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Per-sample gradients of ``half_squares`` by torch.func."""
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(chosen: dict[str, Tensor], sample: Tensor) -> Tensor:
        return half_squares(torch.func.functional_call(model, chosen, (sample.unsqueeze(0),)))

    return list(torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x).values())


@pytest.mark.parametrize("name", MAPS)
def test_a_linear_map_is_recognised_and_its_rows_are_right(name: str) -> None:
    make, shape = MAPS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    (entry,) = measure(model, [x]).values()
    assert entry.layer.kind == "Linear" and entry.layer.is_matrix and not entry.layer.note
    found = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
    for value, expected in zip(found, by_vmap(model, x), strict=True):
        close(value, expected)
    weight, *bias = entry.gradients or ()
    joint = entry.layer.joint_matrix((weight, *bias))
    assert joint.shape == entry.layer.matrix_shape
    for view, gradient in zip(entry.layer.parameter_views(joint), (weight, *bias), strict=True):
        close(view, gradient)


@pytest.mark.parametrize("name", MAPS)
def test_moving_along_a_direction_is_the_derivative_of_the_output(name: str) -> None:
    make, shape = MAPS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    layer = layer_of(model)
    values = {key: value.detach() for key, value in model.named_parameters()}
    tangents = {key: torch.randn(value.shape, dtype=torch.float64) for key, value in values.items()}
    ends = {key: values[key] + tangents[key] for key in values}
    moved = torch.func.functional_call(model, ends, (x,)) - torch.func.functional_call(model, values, (x,))
    assert layer.adapter is not None
    close(layer.adapter.directional(layer.module, x, tangents["weight"], tangents.get("bias")), moved)


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_of_kind_other_and_says_why(name: str) -> None:
    make, reason = OTHERS[name]
    layer = layer_of(make())
    assert layer.kind == "Other" and layer.adapter is None
    assert reason in layer.note


@pytest.mark.parametrize(
    "method", ["kfac", "ekfac", "shampoo", "soap", "muon", "kbfgs", "mbf", "lw-adamw", "joint-kfac"]
)
def test_a_step_with_columns_is_the_step_with_the_same_rows(method: str) -> None:
    """The same function written with a weight (d_in, d_out) and with torch's own layer moves the same way."""
    x, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    ends = []
    for transposed in (False, True):
        torch.manual_seed(3)
        first, last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        if transposed:
            columns = Columns(4, 5).double()
            with torch.no_grad():
                columns.weight.copy_(first.weight.T)
                columns.bias.copy_(first.bias)
            first = columns  # type: ignore[assignment]
        model = nn.Sequential(first, nn.Tanh(), last)
        optimizer = osc.build(method, model, likelihood="categorical")

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), labels)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        ends.append([first.weight.T if transposed else first.weight, first.bias, last.weight])
    for plain, other in zip(*ends, strict=True):
        close(other, plain)


@pytest.mark.parametrize("backend", ["func", "backpack"])
@pytest.mark.parametrize("method", ["kfac", "joint-kfac"])
def test_every_backend_measures_a_recognised_module_alike(method: str, backend: str) -> None:
    x, labels, ends = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3, []
    for chosen in ("hooks", backend):
        torch.manual_seed(4)
        model = nn.Sequential(Columns(4, 5), nn.Tanh(), Rows(5, 3)).double()
        optimizer = osc.build(method, model, likelihood="categorical", backend=chosen)
        for _ in range(2):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        ends.append([value.detach() for value in model.parameters()])
    for own, other in zip(*ends, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11)


def test_trying_a_module_out_leaves_no_trace() -> None:
    class Counting(Rows):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.seen: list[int] = []
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            self.calls += 1
            torch.rand(3)
            return super().forward(x)

    model, hooked = Counting(), []
    model.register_forward_hook(lambda *_: hooked.append(1))
    before, state = [value.clone() for value in model.parameters()], torch.get_rng_state()
    assert layer_of(model).kind == "Linear"
    assert not model.seen and not model.calls and not hooked and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, old) for value, old in zip(model.parameters(), before, strict=True))
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_a_module_that_fails_when_it_is_tried_is_left_alone() -> None:
    class Demanding(Rows):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 7:
                raise RuntimeError("seven rows, please")
            return super().forward(x)

    assert layer_of(Demanding(4, 3)).kind == "Other"


@pytest.mark.parametrize("early", [True, False])
def test_a_forward_hook_that_changes_the_output_does_not_change_the_rows(early: bool) -> None:
    """Whether somebody's hook was there before or after osculate's."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), torch.randn(6, 4, dtype=torch.float64)

    def triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 3 * output

    if early:
        model[0].register_forward_hook(triple)
    method = osc.Method(osc.Dense(), osc.EmpiricalFisher(), defaults={"lr": 1.0, "damping": 0.1})
    optimizer = osc.build(method, model)
    if not early:
        model[0].register_forward_hook(triple)
    half_squares(model(x)).backward()
    record = optimizer.collect()["0"]
    optimizer.close()
    for value, expected in zip(record.loss_vectors(), by_vmap(model, x), strict=True):
        close(value, expected)


def test_a_pre_hook_that_changes_the_input_changes_the_rows_with_it() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(6, 4, dtype=torch.float64)
    model[0].register_forward_pre_hook(lambda module, args: (args[0].square(),))
    (entry,) = measure(model, [x]).values()
    for value, expected in zip(entry.loss_vectors(), by_vmap(model, x), strict=True):
        close(value, expected)


class Logged(nn.Module):
    """A linear map whose forward needs a second argument: nothing that could be tried out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor, step: int) -> Tensor:
        return x @ self.weight


class Squashed(Logged):
    def forward(self, x: Tensor, step: int) -> Tensor:
        return torch.tanh(super().forward(x, step))


def test_an_adapter_can_be_registered_for_a_class_and_its_subclasses_that_keep_the_forward() -> None:
    class Named(Logged):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Named()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x, step=3))

    assert layer_of(Logged()).kind == "Other"
    handle = osc.register_adapter(Logged, TransposedLinearAdapter())
    try:
        assert [layer_of(cls()).kind for cls in (Logged, Named, Squashed)] == ["Linear", "Linear", "Other"]
        assert layer_of(Logged()).matrix_shape == (3, 4)
        model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
        (entry,) = measure(model, [x]).values()
        for value, expected in zip(entry.loss_vectors(), by_vmap(model, x), strict=True):
            close(value, expected)
    finally:
        handle.remove()
        handle.remove()
    assert layer_of(Logged()).kind == "Other"


def test_a_registered_kind_is_a_key_of_by_layer_and_comes_before_what_ships() -> None:
    class Mine(LinearAdapter):
        kind = "Mine"

    handle = osc.register_adapter(nn.Linear, Mine())
    try:
        model = nn.Sequential(nn.Linear(4, 3), Rows(3, 2))
        assert [layer.kind for layer in discover_layers(model)] == ["Mine", "Linear"]
        parts = osc.ByLayer({"Mine": osc.Kronecker(osc.Covariance(), osc.Covariance())})
        method = osc.Method(parts, osc.SampledFisher(), defaults={"damping": 0.1})
        rows = osc.build(method, model, likelihood="gaussian").layer_table()
        assert [row.fallback for row in rows] == [False, True]
    finally:
        handle.remove()
    with pytest.raises(osc.UnknownNameError, match="Mine"):
        osc.build(method, model, likelihood="gaussian")


@pytest.mark.parametrize(
    "given", [(nn.Linear(2, 2), LinearAdapter()), (nn.Module, LinearAdapter()), (nn.Linear, object())]
)
def test_a_wrong_registration_is_refused(given: tuple[Any, Any]) -> None:
    with pytest.raises(osc.ArgumentError, match=r"module_type must be a class|adapter must"):
        osc.register_adapter(*given)
    assert layer_of(nn.Linear(2, 2)).kind == "Linear"
