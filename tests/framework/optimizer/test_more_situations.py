"""Loops, outputs, modules, changes and numbers of other people: right, or served with a warning, or refused by name.

Each table has one kind; what must come out stands beside every line.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
import torch.nn.utils.prune
from small_nets import differences
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

METHODS = ("kfac", "ekfac", "lw-adamw", "joint-kfac", "kbfgs", "mbf", "soap", "muon", "tnt", "ngd-exact")
RECORDING = ("kfac", "ekfac", "lw-adamw", "joint-kfac")
LABELS = torch.tensor([0, 1, 2] * 2)
Loss = Callable[[nn.Module], Tensor]


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def built(method: str, net: nn.Module, **options: Any) -> osc.SecondOrder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", osc.FallbackWarning)
        return osc.build(method, net, **({"likelihood": "categorical"} | options))


def of_logits(net: nn.Module) -> Tensor:
    return functional.cross_entropy(net(inputs()), LABELS)


def steps(optimizer: osc.SecondOrder, net: nn.Module, count: int = 2, loss: Loss = of_logits) -> list[float]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    return [float(optimizer.step(closure).detach()) for _ in range(count)]


def flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


# -- do the records explain the gradient? ------------------------------------------------------------------------------


def with_penalty(net: nn.Module) -> Tensor:
    return of_logits(net) + 0.1 * sum(parameter.square().sum() for parameter in net.parameters())


def with_slopes(net: nn.Module) -> Tensor:
    value = inputs().requires_grad_()
    (slope,) = torch.autograd.grad(net(value).sum(), value, create_graph=True)
    return of_logits(net) + (slope.norm(dim=1) - 1).square().mean()


def one_inner_step(net: nn.Module) -> Tensor:
    slopes = torch.autograd.grad(of_logits(net), list(net.parameters()), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(net.named_parameters(), slopes, strict=True)}
    return functional.cross_entropy(torch.func.functional_call(net, fast, (inputs(1),)), LABELS)


def vectorised(net: nn.Module) -> Tensor:
    return functional.cross_entropy(torch.vmap(lambda row: net(row[None])[0])(inputs()), LABELS)


def clamp_gradients(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def patch(net: nn.Module) -> None:
    own = net[0]
    own.forward = lambda value: 2 * functional.linear(value, own.weight, own.bias)


UNEXPLAINED: dict[str, tuple[Loss, Callable[[nn.Module], None], str]] = {
    "penalty on weights": (with_penalty, lambda net: None, r"'0', '2' does not explain.*weight_decay="),
    "penalty on slopes": (with_slopes, lambda net: None, "does not explain.*derivatives of the model"),
    "inner steps": (one_inner_step, lambda net: None, "does not explain"),
    "hooks on parameters": (of_logits, clamp_gradients, "does not explain.*or the gradient"),
    "a forward patched later": (of_logits, patch, "'0' does not explain.*not that of its class"),
    "vmap": (vectorised, lambda net: None, "nothing was recorded|no labels were sampled"),
}


@pytest.mark.parametrize("method", RECORDING)
@pytest.mark.parametrize("case", UNEXPLAINED)
def test_what_records_do_not_explain_is_refused_before_anything_is_written(case: str, method: str) -> None:
    loss, prepare, said = UNEXPLAINED[case]
    net = plain()
    optimizer = built(method, net)
    prepare(net)
    before, state = flat(net), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(osc.ArgumentError, match=said):
        steps(optimizer, net, 1, loss)
    assert torch.equal(flat(net), before) and differences(optimizer.state_dict()["state"], state) == []


@pytest.mark.parametrize("method", ["soap", "muon", "mbf", "shampoo"])
@pytest.mark.parametrize("case", UNEXPLAINED)
def test_methods_that_read_gradients_only_take_them_as_they_are(case: str, method: str) -> None:
    loss, prepare, _ = UNEXPLAINED[case]
    net = plain()
    optimizer = built(method, net)
    prepare(net)
    before = flat(net)
    steps(optimizer, net, 2, loss)
    assert not torch.equal(flat(net), before)


class Buffers:
    """Where the micro-batches of a loop come from."""

    def __init__(self, kind: str) -> None:
        self.kind, self.array = kind, np.zeros((7, 3), np.float32)
        self.tensor, self.shared = torch.zeros(6, 3), torch.zeros(6, 3).share_memory_()

    def filled(self, values: Tensor) -> Tensor:
        if self.kind == "array":
            self.array[1:] = values.numpy()
            return torch.from_numpy(self.array)[1:]
        if self.kind == "scaled array":
            self.array[1:] = 2 * values.numpy()
            return torch.from_numpy(self.array)[1:] / 2
        if self.kind == "from a buffer":
            self.array[:6] = values.numpy()
            return torch.frombuffer(memoryview(self.array).cast("B"), dtype=torch.float32)[:18].view(6, 3)
        if self.kind == "behind its back":
            self.tensor.data.copy_(values)
            return self.tensor
        return values


@pytest.mark.parametrize("method", RECORDING)
@pytest.mark.parametrize("kind", ["array", "scaled array", "from a buffer", "behind its back"])
def test_memory_that_is_filled_again_is_copied_or_refused(kind: str, method: str) -> None:
    ends = []
    for given in ("fresh", kind):
        net, buffers = plain(), Buffers(given)
        optimizer = built(method, net)

        def run(net: nn.Module = net, buffers: Buffers = buffers, optimizer: osc.SecondOrder = optimizer) -> None:
            for _ in range(2):
                optimizer.zero_grad()
                for seed in range(3):
                    (functional.cross_entropy(net(buffers.filled(inputs(seed))), LABELS) / 3).backward()
                optimizer.step()

        if given == "behind its back":
            with pytest.raises(osc.ArgumentError, match=r"'0' does not explain.*changed in place"):
                run()
            return
        run()
        ends.append(flat(net))
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", RECORDING)
def test_an_input_changed_after_the_backward_is_refused(method: str) -> None:
    net, given = plain(), inputs()
    optimizer = built(method, net)
    functional.cross_entropy(net(given), LABELS).backward()
    given.mul_(3)
    with pytest.raises(osc.ArgumentError, match="input of layer '0' was changed in place"):
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_two_players_clear_what_the_other_left(method: str) -> None:
    """Each backward fills gradients of both networks; a player that clears its own first trains as if alone."""

    def played(detach: bool) -> Tensor:
        torch.manual_seed(0)
        maker, judge = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), plain()
        making, judging = built(method, maker, likelihood="gaussian"), built(method, judge)
        for seed in range(3):

            def judged(seed: int = seed) -> Tensor:
                made = maker(inputs(seed))
                return functional.cross_entropy(judge(made.detach() if detach else made), LABELS)

            steps(judging, judge, 1, lambda net: judged())
            making.zero_grad()
            steps(making, maker, 1, lambda net: functional.cross_entropy(judge(net(inputs(7))), LABELS.flip(0)))
        return torch.cat([flat(maker), flat(judge)])

    torch.testing.assert_close(played(False), played(True), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["kbfgs", "kbfgs-l", "joint-kbfgs"])
@pytest.mark.parametrize("how", ["noise", "ascent"])
def test_closures_that_change_gradients_are_told_that_there_are_none_afterwards(method: str, how: str) -> None:
    net = plain()
    optimizer = built(method, net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = of_logits(net)
        loss.backward()
        for parameter in net.parameters():
            if how == "noise":
                parameter.grad.add_(1e-3)
            else:
                parameter.data += 0.0 * parameter.grad
        return loss

    before = flat(net)
    with pytest.raises(osc.ArgumentError, match=r"evaluated again after the step.*grad is not None"):
        optimizer.step(closure)
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpointed_part_and_the_whole_take_the_same_steps(method: str) -> None:
    class Parts(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.again = nn.Linear(3, 4), nn.Linear(4, 3), again

        def forward(self, value: Tensor) -> Tensor:
            def part(given: Tensor) -> Tensor:
                return torch.tanh(self.first(given))

            return self.last(checkpoint(part, value, use_reentrant=False) if self.again else part(value))

    ends = []
    for again in (False, True):
        net = Parts(again)
        steps(built(method, net), net, 3)
        ends.append(flat(net))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


# -- what a closure returns, and what a model returns ------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given", [Tensor.item, lambda loss: loss.detach().reshape(1), Tensor.double, Tensor.clone, Tensor.detach]
)
def test_a_loss_may_be_a_number_or_have_one_entry(given: Callable[[Tensor], Any], method: str) -> None:
    ends = []
    for returned in (lambda loss: loss, given):
        net = plain()
        optimizer = built(method, net)

        def closure(
            net: nn.Module = net, optimizer: osc.SecondOrder = optimizer, returned: Callable[..., Any] = returned
        ) -> Any:
            optimizer.zero_grad()
            loss = of_logits(net)
            loss.backward()
            return returned(loss)

        for _ in range(2):
            optimizer.step(closure)
        ends.append(flat(net))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given", [lambda loss: {"loss": loss}, lambda loss: (loss, loss), lambda loss: loss.expand(2), lambda loss: "0.5"]
)
def test_other_returns_are_refused_before_anything_is_written(given: Callable[[Tensor], Any], method: str) -> None:
    net = plain()
    optimizer = built(method, net)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = of_logits(net)
        loss.backward()
        return given(loss)

    before = flat(net)
    with pytest.raises(osc.ArgumentError, match="must return the scalar loss"):
        optimizer.step(closure)
    assert torch.equal(flat(net), before)


Named = collections.namedtuple("Named", ["logits", "hidden"])


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None
    loss: Tensor | None = None


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Returns(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.pack = nn.Linear(3, 4), nn.Linear(4, 3), pack

    def forward(self, value: Tensor) -> Any:
        hidden = torch.tanh(self.first(value))
        return self.pack(self.last(hidden), hidden)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], Any]] = {
    "named tuple": (Named, lambda found: found.logits, None),
    "dataclass": (Answer, lambda found: found.logits, None),
    "dataclass with a loss": (
        lambda logits, hidden: Answer(logits, hidden, functional.cross_entropy(logits, LABELS)),
        lambda found: found.logits,
        None,
    ),
    "loss and logits": (
        lambda logits, hidden: (functional.cross_entropy(logits, LABELS), logits),
        lambda found: found[1],
        None,
    ),
    "the only tensor of a list": (lambda logits, hidden: [logits], lambda found: found[0], None),
    "beside None": (lambda logits, hidden: (None, logits), lambda found: found[1], None),
    "beside words and numbers": (
        lambda logits, hidden: {"logits": logits, "name": "a", "count": 3},
        lambda found: found["logits"],
        None,
    ),
    "by name": (lambda logits, hidden: {"y": logits, "h": hidden}, lambda found: found["y"], "y"),
    "by index": (lambda logits, hidden: (hidden, logits), lambda found: found[1], 1),
    "deep, by a function": (
        lambda logits, hidden: {"out": {"y": logits}, "h": hidden},
        lambda found: found["out"]["y"],
        lambda found: found["out"]["y"],
    ),
    "an object": (lambda logits, hidden: Holder(logits), lambda found: found.value, lambda found: found.value),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_the_step_is_that_of_the_logits_alone(form: str, method: str) -> None:
    pack, read, output = FORMS[form]
    bare, net = Returns(lambda logits, hidden: logits), Returns(pack)
    steps(built(method, bare), bare)
    steps(
        built(method, net, output=output), net, 2, lambda model: functional.cross_entropy(read(model(inputs())), LABELS)
    )
    torch.testing.assert_close(flat(net), flat(bare), rtol=0, atol=0)


@pytest.mark.parametrize("method", RECORDING)
@pytest.mark.parametrize(
    ("pack", "read", "output", "said"),
    [
        (lambda y, h: {"y": y, "h": h}, lambda found: found["y"], None, r"several tensors \('y', 'h'\).*output="),
        (lambda y, h: (y, h), lambda found: found[0], None, r"several tensors \(0, 1\)"),
        (lambda y, h: {"y": y, "h": h}, lambda found: found["y"], "logits", "has no 'logits'"),
        (lambda y, h: (y, h), lambda found: found[0], 5, "5"),
        (lambda y, h: {"a": {"y": y}, "h": h}, lambda found: found["a"]["y"], None, "several tensors"),
        (lambda y, h: functional.cross_entropy(y, LABELS), lambda found: found, None, "no batch axis"),
    ],
)
def test_what_is_not_found_in_an_output_is_refused_with_the_way_out(
    pack: Callable[..., Any], read: Callable[[Any], Tensor], output: Any, said: str, method: str
) -> None:
    net = Returns(pack)
    optimizer = built(method, net, output=output)
    before = flat(net)

    def loss(model: nn.Module) -> Tensor:
        found = read(model(inputs()))
        return functional.cross_entropy(found, LABELS) if found.ndim else found

    with pytest.raises(osc.ArgumentError, match=said):
        steps(optimizer, net, 1, loss)
    assert torch.equal(flat(net), before)


# -- matrices in foreign modules ---------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Modules and parameters by name; the forward is a function of them and the input."""

    def __init__(self, parts: dict[str, Any], run: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, value: Tensor) -> Tensor:
        return self.run(self, value)


def free(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(*shape))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def tokens(value: Tensor) -> Tensor:
    return (value * 3).long().abs().clamp(max=5)


def adapted_table(net: Any, value: Tensor) -> Tensor:
    rows = tokens(value[:, 0])
    return net.out(torch.tanh(net.table(rows) + functional.embedding(rows, net.down[0].T) @ net.up["default"].T))


def recurrent(net: Any, value: Tensor) -> Tensor:
    hidden = cell = value.new_zeros(len(value), 4)
    for time in range(3):
        hidden, cell = net.cell(value * time, (hidden, cell))
    return net.out(hidden)


def attending(net: Any, value: Tensor) -> Tensor:
    hidden = net.embed(value[..., None])
    return net.out(net.mix(hidden, hidden, hidden)[0].mean(1))


def splines(net: Any, value: Tensor) -> Tensor:
    powers = torch.stack([value**power for power in range(4)], -1)
    return net.out(torch.einsum("nik,iok->no", powers, net.weights))


def pruned() -> nn.Module:
    net = plain()
    nn.utils.prune.random_unstructured(net[0], "weight", 0.5)
    return net


def parametrised(how: Callable[[nn.Module], Any]) -> nn.Module:
    net = plain()
    how(net[0])
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "adapters of a table in lists": lambda: Parts(
        {
            "table": frozen(nn.Embedding(6, 4)),
            "down": nn.ParameterList([free(2, 6)]),
            "up": nn.ParameterDict({"default": free(4, 2)}),
            "out": nn.Linear(4, 3),
        },
        adapted_table,
    ),
    "scales in a dictionary": lambda: Parts(
        {"line": frozen(nn.Linear(3, 4)), "scale": nn.ParameterDict({"k": free(4)}), "out": nn.Linear(4, 3)},
        lambda net, value: net.out(torch.tanh(net.line(value) * net.scale["k"])),
    ),
    "heads by einsum": lambda: Parts(
        {"weights": free(2, 3, 4), "out": nn.Linear(8, 3)},
        lambda net, value: net.out(torch.tanh(torch.einsum("nd,hdk->nhk", value, net.weights)).flatten(1)),
    ),
    "bilinear": lambda: Parts(
        {"pair": nn.Bilinear(3, 3, 4), "out": nn.Linear(4, 3)},
        lambda net, value: net.out(torch.tanh(net.pair(value, value.flip(1)))),
    ),
    "a scalar and an empty one": lambda: Parts(
        {"line": nn.Linear(3, 3), "scale": nn.Parameter(torch.ones(())), "none": nn.Parameter(torch.empty(0))},
        lambda net, value: net.line(value) * net.scale,
    ),
    "float, then double": lambda: Parts(
        {"line": nn.Linear(3, 4), "out": nn.Linear(4, 3).double()},
        lambda net, value: net.out(torch.tanh(net.line(value)).double()),
    ),
    "double, then float": lambda: Parts(
        {"line": nn.Linear(3, 4).double(), "out": nn.Linear(4, 3)},
        lambda net, value: net.out(torch.tanh(net.line(value.double())).float()),
    ),
    "bfloat16, then float": lambda: Parts(
        {"line": nn.Linear(3, 4).bfloat16(), "out": nn.Linear(4, 3)},
        lambda net, value: net.out(torch.tanh(net.line(value.bfloat16())).float()),
    ),
    "slopes and groups": lambda: Parts(
        {"line": nn.Linear(3, 4), "slope": nn.PReLU(4), "norm": nn.GroupNorm(2, 4), "out": nn.Linear(4, 3)},
        lambda net, value: net.out(net.norm(net.slope(net.line(value)))),
    ),
    "a recurrent cell": lambda: Parts({"cell": nn.LSTMCell(3, 4), "out": nn.Linear(4, 3)}, recurrent),
    "splines": lambda: Parts({"weights": free(3, 4, 4), "out": nn.Linear(4, 3)}, splines),
    "bags of tokens": lambda: Parts(
        {"table": nn.EmbeddingBag(6, 4, mode="sum"), "out": nn.Linear(4, 3)},
        lambda net, value: net.out(torch.tanh(net.table(tokens(value)))),
    ),
    "attention": lambda: Parts(
        {"embed": nn.Linear(1, 4), "mix": nn.MultiheadAttention(4, 2, batch_first=True), "out": nn.Linear(4, 3)},
        attending,
    ),
    "normed weight": lambda: parametrised(nn.utils.parametrizations.weight_norm),
    "spectral weight": lambda: parametrised(nn.utils.parametrizations.spectral_norm),
    "orthogonal weight": lambda: parametrised(nn.utils.parametrizations.orthogonal),
    "pruned weight": pruned,
    "half of a layer": lambda: parametrised(lambda module: module.weight.requires_grad_(False)),
    "a traced graph": lambda: torch.fx.symbolic_trace(plain()),
    "compiled": lambda: torch.compile(plain(), backend="eager"),
    "several devices": lambda: nn.DataParallel(plain()),
    "a forward patched before": lambda: parametrised(
        lambda module: setattr(
            module, "forward", lambda value: 2 * functional.linear(value, module.weight, module.bias)
        )
    ),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at ours
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", MODULES)
def test_every_parameter_of_foreign_modules_is_trained(case: str, method: str) -> None:
    torch.manual_seed(0)
    net = MODULES[case]()
    optimizer = built(method, net, certify_records="always")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad and parameter.numel()]
    before = [parameter.detach().clone() for parameter in trained]
    losses = steps(optimizer, net, 4)
    assert all(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    assert losses[-1] < 1.2 * losses[0]


class Unused(nn.Module):
    """Tokens of its own, of which a fine-tuning uses one, and another in every second pass."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.masked, self.rare, self.line = free(3), free(3), free(3), nn.Linear(3, 3)
        self.passes = 0

    def forward(self, value: Tensor) -> Tensor:
        return self.line(value + self.start + (self.rare if self.passes % 2 else 0.0))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("method", tuple(osc.registry.methods()))
def test_a_parameter_without_a_gradient_stays_and_holds_nobody_up(method: str, decay: float) -> None:
    torch.manual_seed(0)
    net = Unused()
    optimizer = built(method, net, weight_decay=decay)
    start, masked, rare = (value.detach().clone() for value in (net.start, net.masked, net.rare))
    steps(optimizer, net, 1)
    assert not torch.equal(net.start, start)
    assert torch.equal(net.masked, masked) and torch.equal(net.rare, rare)
    net.passes = 1
    steps(optimizer, net, 1)
    assert torch.equal(net.masked, masked) and not torch.equal(net.rare, rare)
    assert all(bool(value.isfinite().all()) for value in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_script_inside_of_a_model_is_refused_at_construction(method: str) -> None:
    net = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        net[0] = torch.jit.script(net[0])
    with pytest.raises(osc.ArgumentError, match=r"module '0' is a script of torch.jit.*eager model"):
        built(method, net)
    assert [layer.kind for layer in osc.discover_layers(net)] == ["Other", "Linear"]


# -- the model changes -------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, line: nn.Module) -> None:
        super().__init__()
        self.line, self.down, self.up = line.requires_grad_(False), free(3, 2), free(2, 4)

    def forward(self, value: Tensor) -> Tensor:
        return self.line(value) + value @ (self.down @ self.up)


class Wrapped(nn.Module):
    def __init__(self, line: nn.Module) -> None:
        super().__init__()
        self.line = line

    def forward(self, value: Tensor) -> Tensor:
        return self.line(value)


def assigned(net: Any) -> None:
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)


def other_shape(net: Any) -> None:
    net[2].weight.data, net[2].bias.data = torch.randn(5, 4), torch.zeros(5)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "assigned": (assigned, "created again"),
    "wider": (lambda net: net.double(), "was torch.float32 when"),
    "one layer narrower": (lambda net: net[0].half(), "'0.weight' was torch.float32"),
    "data of another dtype": (
        lambda net: setattr(net[0].weight, "data", torch.randn(4, 3).double()),
        "'0.weight' was torch.float32",
    ),
    "data of another shape": (other_shape, r"'2.weight' had shape \(3, 4\)"),
    "a new parameter": (lambda net: setattr(net[0], "weight", nn.Parameter(torch.randn(4, 3))), "0.weight are not"),
    "no bias any more": (lambda net: setattr(net[2], "bias", None), "2.bias"),
    "another layer": (lambda net: net.__setitem__(2, nn.Linear(4, 3)), "2.weight, 2.bias are no longer in the model"),
    "a copy of the layer": (lambda net: net.__setitem__(0, copy.deepcopy(net[0])), "no longer in the model"),
    "one layer less": (lambda net: net.__delitem__(2), "no longer in the model"),
    "one layer more": (lambda net: net.append(nn.Linear(3, 3)), "3.weight, 3.bias have a gradient"),
    "an adapter around a layer": (lambda net: net.__setitem__(0, Adapted(net[0])), "0.down, 0.up have a gradient"),
    "normed": (lambda net: nn.utils.parametrizations.weight_norm(net[0]), "0.weight"),
    "pruned": (lambda net: nn.utils.prune.l1_unstructured(net[0], "weight", 0.5), "0.weight"),
    "moved to nowhere": (lambda net: net.to("meta"), "created again"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_change_of_what_is_served_is_refused(case: str, method: str) -> None:
    change, said = REFUSED[case]
    net = plain()
    optimizer = built(method, net)
    steps(optimizer, net)
    state = copy.deepcopy([block.to_dict() for block in optimizer.blocks])
    change(net)

    def loss(model: Any) -> Tensor:
        dtype = next(model.parameters()).dtype
        return model(inputs().to(dtype)).float().square().mean()

    with pytest.raises(osc.ArgumentError, match=said):
        steps(optimizer, net, 1, loss)
    assert differences([block.to_dict() for block in optimizer.blocks], state) == []


FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "a module around a layer": lambda net: net.__setitem__(0, Wrapped(net[0])),
    "another activation": lambda net: net.__setitem__(1, nn.ReLU()),
    "compiled in place": lambda net: net.compile(backend="eager"),
    "shared with other processes": lambda net: net.share_memory(),
    "data in another place": lambda net: setattr(net[0].weight, "data", net[0].weight.data.clone()),
    "a frozen layer": lambda net: net[0].requires_grad_(False),
    "an unused parameter": lambda net: net.register_parameter("extra", free(2)),
    "a buffer": lambda net: net.register_buffer("count", torch.zeros(())),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at ours
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", FOLLOWED)
def test_a_change_around_what_is_served_is_followed(case: str, method: str) -> None:
    net = plain()
    optimizer = built(method, net)
    steps(optimizer, net)
    FOLLOWED[case](net)
    before = net[2].weight.detach().clone()
    steps(optimizer, net)
    assert not torch.equal(net[2].weight, before)


# -- torch's own tools between the steps -------------------------------------------------------------------------------


def averaged(net: nn.Module) -> None:
    torch.optim.swa_utils.AveragedModel(net, use_buffers=True).update_parameters(net)


def updated_norms(net: nn.Module) -> None:
    torch.optim.swa_utils.update_bn([inputs(1), inputs(2)], torch.optim.swa_utils.AveragedModel(net))


def trained_copy(net: nn.Module) -> None:
    of_logits(copy.deepcopy(net)).backward()


def exchanged(net: nn.Module) -> None:
    kept = [parameter.data for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.data = torch.zeros_like(parameter)
    with torch.no_grad():
        net(inputs(3))
    for parameter, value in zip(net.parameters(), kept, strict=True):
        parameter.data = value


def functional_teacher(net: nn.Module) -> None:
    chosen = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    functional.cross_entropy(torch.func.functional_call(net, chosen, (inputs(3),)), LABELS).backward()
    assert all(value.grad is not None for value in chosen.values())


def in_a_file(net: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    torch.load(file, weights_only=False)(inputs(3))


def without_gradients(net: nn.Module) -> None:
    with torch.inference_mode():
        net(inputs(3))


def per_sample(net: nn.Module) -> None:
    values = {name: value.detach() for name, value in net.named_parameters()}

    def loss(chosen: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(net, chosen, (row[None],)).square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(values, inputs(3))


def explained(net: nn.Module) -> None:
    given = inputs(3).requires_grad_()
    torch.autograd.grad(net(given).sum(), given)
    torch.autograd.functional.jacobian(net, inputs(3))


def deprecated(run: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def quiet(net: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(net)

    return quiet


TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "average": averaged,
    "average with new norms": updated_norms,
    "a copy that trains": trained_copy,
    "other weights for a while": exchanged,
    "a teacher by functional_call": functional_teacher,
    "a file of the whole model": in_a_file,
    "inference mode": without_gradients,
    "per-sample gradients": per_sample,
    "explanations": explained,
    "trace": deprecated(lambda net: torch.jit.trace(net, inputs())(inputs(3))),
    "script of a copy": deprecated(lambda net: torch.jit.script(copy.deepcopy(net))(inputs(3))),
    "export": deprecated(lambda net: torch.export.export(net, (inputs(),)).module()(inputs(3))),
    "graph": lambda net: torch.fx.symbolic_trace(net)(inputs(3)),
    "quantised": deprecated(lambda net: torch.ao.quantization.quantize_dynamic(copy.deepcopy(net))(inputs(3))),
}


@pytest.mark.parametrize("method", ["kfac", "lw-adamw", "joint-kfac", "kbfgs", "mbf", "soap"])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_between_steps_change_no_step(tool: str, method: str) -> None:
    ends = []
    for use in (lambda net: None, TOOLS[tool]):
        net = plain()
        optimizer = built(method, net)
        for _ in range(3):
            steps(optimizer, net, 1)
            with torch.random.fork_rng():
                use(net)
        ends.append(flat(net))
    assert torch.equal(*ends)


# -- numbers -----------------------------------------------------------------------------------------------------------


def scaled(factor: float) -> nn.Module:
    net = plain()
    net[2].weight.data *= factor
    return net


NUMBERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "raw features": (plain, lambda: 1e4 * inputs()),
    "features far from zero": (plain, lambda: inputs() + 1e4),
    "tiny features": (plain, lambda: 1e-8 * inputs()),
    "no features": (plain, lambda: 0 * inputs()),
    "one large feature": (plain, lambda: inputs() * torch.tensor([1e4, 0.0, 0.0])),
    "one sample six times": (plain, lambda: inputs()[:1].expand(6, 3)),
    "saturated": (lambda: scaled(1e3), inputs),
    "very saturated": (lambda: scaled(1e6), inputs),
    "no logits": (lambda: scaled(0.0), inputs),
    "bfloat16": (lambda: plain().bfloat16(), lambda: inputs().bfloat16()),
    "half": (lambda: plain().half(), lambda: inputs().half()),
    "double": (lambda: plain().double(), lambda: inputs().double()),
    "one number": (
        lambda: Parts(
            {"line": nn.Linear(1, 1), "out": nn.Linear(1, 3)}, lambda net, value: net.out(net.line(value[:, :1]))
        ),
        inputs,
    ),
    "spectra": (
        lambda: Parts(
            {"line": nn.Linear(3, 4), "out": nn.Linear(3, 3)},
            lambda net, value: net.out(torch.fft.rfft(net.line(value)).abs()),
        ),
        inputs,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", NUMBERS)
def test_losses_stay_bounded(case: str, method: str) -> None:
    make, given = NUMBERS[case]
    torch.manual_seed(0)
    net = make()
    losses = steps(built(method, net), net, 8, lambda model: functional.cross_entropy(model(given()).float(), LABELS))
    assert all(np.isfinite(losses)) and max(losses) < 10 * max(losses[0], 1.2), losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: inputs() * float("nan"), "the loss is nan"),
        (lambda: inputs().index_fill(0, torch.tensor([0]), float("inf")), "the loss is nan"),
    ],
)
def test_numbers_that_are_none_are_refused(given: Callable[[], Tensor], said: str, method: str) -> None:
    net = plain()
    optimizer = built(method, net)
    before = flat(net)
    with pytest.raises(osc.NumericalError, match=said):
        steps(optimizer, net, 1, lambda model: functional.cross_entropy(model(given()), LABELS))
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "kbfgs", "soap", "tnt", "joint-kfac"])
@pytest.mark.parametrize(
    ("model", "given"),
    [
        (
            lambda: nn.Sequential(nn.Embedding(20_000, 4), nn.Linear(4, 3)),
            lambda: torch.randint(0, 20_000, (6,), generator=torch.Generator().manual_seed(0)),
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 12_000)), inputs),
    ],
)
def test_sides_of_the_size_of_a_vocabulary_are_named_or_harmless(
    model: Callable[[], nn.Module], given: Callable[[], Tensor], method: str
) -> None:
    net = model()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = osc.build(method, net, likelihood="categorical")
    assert all(entry.category is osc.FallbackWarning for entry in told) and len(told) <= 1
    assert not told or re.search("bytes|MB|GB|MiB|GiB|limit|serves", str(told[0].message))
    steps(optimizer, net, 2, lambda found: functional.cross_entropy(found(given()), LABELS))
    assert sum(row.bytes for row in optimizer.layer_table()) < 64 * 2**20


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "ekfac"])
def test_records_explain_gradients_of_any_size(name: str) -> None:
    """At the end of a training run single precision has no squares of them any more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = osc.build(name, model, likelihood="categorical", certify_records="always")
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    for size in (1.0, 1e-15, 1e-22, 1e-30):

        def closure(size: float = size) -> torch.Tensor:
            optimizer.zero_grad()
            loss = size * nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
