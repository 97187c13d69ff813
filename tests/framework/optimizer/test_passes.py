"""Which passes belong to the mini-batch: several backwards, gradients of inputs, pauses, and closures of every kind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import osculate as osc
import pytest
import torch
from backend_nets import EVERYTHING
from measuring import half_squares
from osculate.curvature import Gaussian, LayerStatistics, Record, discover_layers
from osculate.curvature.backends.backend import Backend
from osculate.curvature.backends.table import make_backend
from osculate.curvature.products import GraphKeepingBackward
from small_nets import build, closure_of, cross_entropy, data, differences, everything, flat, make
from torch import Tensor, nn

BACKENDS = ("hooks", "func", "backpack")
KEPT = Record.INPUTS | Record.GRADIENTS | Record.SAMPLED | Record.SAMPLED_PARAMETERS
FIELDS = ("inputs", "output_gradient", "sampled_gradient", "mean_preactivation", "mean_gradient")


def measured(backend: str, record: Record = KEPT, kind: str = "gradient") -> tuple[nn.Module, Backend]:
    model = make("mlp")
    layers = discover_layers(model)
    capture = make_backend(backend, model, layers, Gaussian(), "mean", 0)
    capture.arm({layer.name: record for layer in layers}, kind)  # type: ignore[arg-type]
    model.requires_grad_(kind != "look back")
    return model, capture


def same(found: dict[str, LayerStatistics], expected: dict[str, LayerStatistics]) -> None:
    assert found.keys() == expected.keys() and len(found) == 3
    for name, entry in expected.items():
        other = found[name]
        assert (entry.samples, entry.gradient_scale) == (other.samples, other.gradient_scale)
        for field in FIELDS:
            one, two = getattr(other, field), getattr(entry, field)
            assert (one is None) == (two is None), field
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
        one, two = other.sampled_parameter_gradients, entry.sampled_parameter_gradients
        for left, right in zip(one or (), two or (), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


def second_loss(output: Tensor) -> Tensor:
    return output.sin().sum() / output.shape[0]


@pytest.mark.parametrize(
    ("backend", "record"), [*((name, KEPT) for name in BACKENDS), ("hooks", Record.MEANS), ("func", Record.MEANS)]
)
def test_backwards_through_one_forward_add_up(backend: str, record: Record) -> None:
    (x, _), found = data(), []
    for joint in (False, True):
        model, capture = measured(backend, record)
        output = model(x)
        first, second = half_squares(output), second_loss(output)
        if joint:
            (first + second).backward()
        else:
            first.backward(retain_graph=True)
            second.backward()
        found.append(capture.collect())
    same(found[0], found[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cleared_gradient_is_forgotten_and_a_later_one_of_the_same_forward_counts(backend: str) -> None:
    (x, _), found = data(), []
    for cleared in (False, True):
        model, capture = measured(backend)
        output = model(x)
        if cleared:
            second_loss(output).backward(retain_graph=True)
            capture.discard_complete()
        half_squares(output).backward()
        found.append(capture.collect())
    same(found[1], found[0])


def attack(model: nn.Module, x: Tensor) -> None:
    inputs = x.clone().requires_grad_(True)
    torch.autograd.grad(half_squares(model(inputs)), inputs)


def attack_by_backward(model: nn.Module, x: Tensor) -> None:
    inputs = x.clone().requires_grad_(True)
    half_squares(model(inputs)).backward(inputs=[inputs])


def some_parameters(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(half_squares(model(x)), [model[0].weight, model[4].bias])  # type: ignore[index]


def inner_gradient_that_stays_alive(model: nn.Module, x: Tensor) -> None:
    inputs = x.clone().requires_grad_(True)
    model.kept = torch.autograd.grad(half_squares(model(inputs)), inputs, create_graph=True)  # type: ignore[assignment]


def functional_hessian(model: nn.Module, x: Tensor) -> None:
    names = dict(model.named_parameters())

    def loss(bias: Tensor) -> Tensor:
        return half_squares(torch.func.functional_call(model, names | {"4.bias": bias}, x))

    torch.func.jacrev(torch.func.jacrev(loss))(names["4.bias"])


FOREIGN = [functional_hessian, attack, attack_by_backward, some_parameters, inner_gradient_that_stays_alive]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("record", [Record.INPUTS | Record.GRADIENTS, KEPT])
def test_a_pass_that_fills_no_gradient_is_not_counted(
    backend: str, foreign: Callable[[nn.Module, Tensor], None], record: Record
) -> None:
    (x, _), found = data(), []
    keeps_its_graph = foreign is inner_gradient_that_stays_alive and Record.SAMPLED in record
    for disturbed in (False, True):
        model, capture = measured(backend, record)
        if disturbed and not keeps_its_graph:  # a graph that may still go backward has a claim on the next labels
            foreign(model, x + 1)
        half_squares(model(x)).backward()
        if disturbed:
            foreign(model, x - 1)
        found.append(capture.collect())
    same(found[1], found[0])


@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_looking_back_counts_only_what_would_fill_a_gradient(backend: str) -> None:
    (x, _), found = data(), []
    for disturbed in (False, True):
        model, capture = measured(backend, Record.MEANS, "look back")
        if disturbed:
            attack(model, x + 1)
        inputs = x.clone().requires_grad_(disturbed)
        half_squares(model(inputs)).backward()
        if disturbed:
            attack(model, x - 1)
        found.append(capture.collect())
    same(found[1], found[0])


def test_only_the_layers_that_a_backward_reaches_count() -> None:
    model, capture = measured("hooks", Record.GRADIENTS)
    half_squares(model(data()[0])).backward(inputs=[model[4].weight])  # type: ignore[index]
    assert capture.collect().keys() == {"4"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gradient", "forward"])
def test_a_pause_leaves_no_trace(backend: str, kind: str) -> None:
    (x, _), found = data(), []
    for disturbed in (False, True):
        model, capture = measured(backend, KEPT if kind == "gradient" else Record.INPUTS, kind)
        if disturbed:
            with capture.pauses.paused():
                with capture.pauses.paused():
                    half_squares(model(x + 1)).backward()
                kept = half_squares(model(x + 2))
            kept.backward()  # recorded is what was run outside
            with pytest.raises(KeyError), capture.pauses.paused():
                model(x)
                raise KeyError
        output = half_squares(model(x))
        if disturbed:
            with capture.pauses.paused():
                output.backward(retain_graph=True)
        output.backward()
        found.append(capture.collect())
    same(found[1], found[0])


def penalised(optimizer: osc.SecondOrder, model: nn.Module, x: Tensor, y: Tensor, pause: bool) -> Callable[[], Tensor]:
    """A closure with an attack, and a penalty on the gradient of some parameters."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        attack(model, x)
        if pause:
            with optimizer.paused():
                attack(model, x)
                model(x).square().mean().mul(0.0).backward()
        loss = cross_entropy(model(x), y)
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", ["kbfgs", "kfac", "kbfgs-l", "adam", "lw-sgdm", "mbf", "shampoo"])
@pytest.mark.parametrize("pause", [False, True])
def test_every_method_walks_as_without_the_other_passes(name: str, pause: bool) -> None:
    ends = []
    for disturbed in (False, True):
        model = make("mlp")
        optimizer = build(name, model)
        for index in range(3):
            x, y = data(seed=index)
            maker = penalised(optimizer, model, x, y, pause) if disturbed else closure_of(optimizer, model, x, y)
            optimizer.step(maker)
        ends.append(flat(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["kbfgs", "kbfgs-l", "joint-kbfgs"])
@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_a_paused_backward_inside_a_closure_that_is_evaluated_again(name: str, backend: str) -> None:
    """Looking back freezes the parameters: the paused pass must be able to go backward all the same."""
    ends = []
    for disturbed in (False, True):
        model = make("mlp")
        optimizer = build(name, model, backend=backend)
        for index in range(3):
            x, y = data(seed=index)
            plain = closure_of(optimizer, model, x, y)

            def closure(plain=plain, model=model, optimizer=optimizer, x=x, disturbed=disturbed):  # type: ignore[no-untyped-def]
                loss = plain()
                if disturbed:
                    with optimizer.paused():
                        model(x + 1).square().mean().mul(0.0).backward()
                return loss

            optimizer.step(closure)
        ends.append(flat(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_that_keeps_its_graph_for_products_counts(backend: str) -> None:
    """It is ``torch.autograd.grad`` behind the scenes, but fills ``.grad``; the user's own calls of it do not."""
    (x, _), found = data(), []
    for products in (False, True):
        model, capture = measured(backend)
        with GraphKeepingBackward(discover_layers(model)) if products else nullcontext():
            if products:
                attack(model, x)
                attack_by_backward(model, x)
            loss = half_squares(model(x))
            (loss / 4).backward(retain_graph=True)
            torch.autograd.backward(3 * loss / 4)
        found.append(capture.collect())
    same(found[1], found[0])


@pytest.mark.parametrize("name", ["kbfgs", "kbfgs-l", "kfac"])
def test_gradients_written_by_hand_are_refused_with_the_way_out(name: str) -> None:
    model = make("mlp")
    optimizer = build(name, model)
    before, state = everything(model), optimizer.state_dict()["state"]
    x, y = data()

    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        for parameter, value in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.grad = value
        return loss

    with pytest.raises(osc.ArgumentError, match=r"call loss.backward\(\)"):
        optimizer.step(closure)
    assert differences(everything(model), before) == [] and differences(optimizer.state_dict()["state"], state) == []


def test_gradients_written_by_hand_are_enough_for_what_measures_nothing() -> None:
    model, other = make("mlp"), make("mlp")
    x, y = data()
    for net, by_hand in ((model, True), (other, False)):
        optimizer = build("adam", net)
        loss = cross_entropy(net(x), y)
        if by_hand:
            for p, value in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                p.grad = value
        else:
            loss.backward()
        optimizer.step()
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("name", ["adam", "kfac", "kbfgs"])
@pytest.mark.parametrize("ended", ["closed", "paused"])
def test_a_step_of_a_closed_or_paused_optimizer_says_so(name: str, ended: str) -> None:
    model = make("mlp")
    optimizer = build(name, model)
    x, y = data()
    before = flat(model)
    if ended == "closed":
        optimizer.close()
        with pytest.raises(osc.ArgumentError, match="closed"):
            optimizer.step(closure_of(optimizer, model, x, y))
    else:
        with pytest.raises(osc.ArgumentError, match="paused"), optimizer.paused():
            optimizer.step(closure_of(optimizer, model, x, y))
        optimizer.step(closure_of(optimizer, model, x, y))
        assert not torch.equal(flat(model), before)
        return
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_an_empty_batch_is_refused(backend: str, net: str) -> None:
    model = make(net).eval()
    optimizer = build("kfac", model, backend=backend, loss_reduction="sum")
    (x, y), before, state = data(net), everything(model), optimizer.state_dict()["state"]
    with pytest.raises(osc.ArgumentError, match="0 samples"):
        optimizer.step(closure_of(optimizer, model, x[:0], y[:0], "sum"))
    assert differences(everything(model), before) == [] and differences(optimizer.state_dict()["state"], state) == []
    model.zero_grad()
    optimizer.step(closure_of(optimizer, model, x, y, "sum"))
    assert differences(everything(model), before) != []


def test_everything_is_recorded_of_two_backwards_by_every_record() -> None:
    """The roots and sampled labels belong to the forward: two backwards do not double them."""
    found = []
    for times in (1, 2):
        model, capture = measured("hooks", EVERYTHING)
        loss = half_squares(model(data()[0])) / times
        for _ in range(times):
            loss.backward(retain_graph=True)
        found.append(capture.collect())
    same(found[1], found[0])
    torch.testing.assert_close(found[1]["0"].curvature_roots, found[0]["0"].curvature_roots)
