"""Working inside an ordinary PyTorch loop: plain and closure form, idle passes, schedulers, accumulation, hooks."""

from __future__ import annotations

from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import (
    LOOKING_BACK,
    METHODS,
    NETS,
    WITHOUT_CLOSURE,
    batches,
    build,
    closure_of,
    cross_entropy,
    data,
    differences,
    everything,
    flat,
    make,
    plain_step,
    train,
)
from torch import nn


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_every_net(name: str, net: str) -> None:
    model = make(net)
    start, frozen = flat(model), {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = build(name, model)
    losses = train(optimizer, model, [data(net, samples=64)] * 6)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(flat(model), start)
    assert losses[-1] < losses[0] or net in ("cnn", "attention")  # dropout makes single losses noisy
    assert all(torch.equal(value, dict(model.named_parameters())[n]) for n, value in frozen.items())
    served = {f"{row.layer}.{parameter}" for row in optimizer.layer_table() for parameter in row.parameters}
    names = {n.replace("in_proj_", "in_proj.") for n, p in model.named_parameters() if p.requires_grad}
    assert served == names


@pytest.mark.parametrize("net", ["mlp", "cnn", "tokens"])
@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_plain_loop_and_closure_loop_are_the_same(name: str, net: str) -> None:
    results = []
    for plain in (True, False):
        torch.manual_seed(3)
        model = make(net)
        # Short enough that the loss does not bound it: a plain loop's is read off a gradient, and equal up to rounding.
        optimizer = build(name, model, **({"lr": 1e-4} if name == "mbf" else {}))
        for x, y in batches(net, 6):
            if plain:
                plain_step(optimizer, model, x, y)
            else:
                optimizer.step(closure_of(optimizer, model, x, y))
        results.append((everything(model), optimizer.state_dict()))
    assert differences(results[0], results[1]) == []


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(WITHOUT_CLOSURE)))
def test_a_method_that_looks_back_names_the_closure_form(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    x, y = data()
    before = flat(model)
    cross_entropy(model(x), y).backward()
    with pytest.raises(osc.OsculateError, match=r"def closure\(\):(.|\n)*optimizer.step\(closure\)"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    train(optimizer, model, [data()])


def test_there_are_methods_of_both_kinds() -> None:
    assert {"kbfgs", "kbfgs-l", "kbfgs-conv", "joint-kbfgs", "mini-block-lbfgs"} == set(METHODS) - set(WITHOUT_CLOSURE)
    assert {"mbf", "kfac", "adam", "joint-kfac", "lw-sgdm"} <= set(WITHOUT_CLOSURE)


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1.0 / (1 + epoch)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=20, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", ["sgdm", "kfac", "kbfgs", "joint-sgdm"])
def test_schedulers_set_the_length_of_the_step(name: str, kind: str) -> None:
    model = make()
    optimizer = build(name, model, lr=0.01)
    scheduler = SCHEDULERS[kind](optimizer)
    seen = []
    for x, y in batches(count=4):
        before, lr = flat(model), optimizer.param_groups[0]["lr"]
        twin = make()
        twin.load_state_dict(model.state_dict())
        other = build(name, twin, lr=0.01)
        other.load_state_dict(optimizer.state_dict())
        other.param_groups[0]["lr"] = 2 * lr
        optimizer.step(closure_of(optimizer, model, x, y))
        other.step(closure_of(other, twin, x, y))
        torch.testing.assert_close(flat(twin) - before, 2 * (flat(model) - before), rtol=1e-9, atol=1e-12)
        seen.append(lr)
        scheduler.step()
    assert len(set(seen)) > 1


@pytest.mark.parametrize("net", ["cnn", "tokens"])
@pytest.mark.parametrize("name", METHODS)
def test_idle_passes_between_steps_leave_no_trace(name: str, net: str) -> None:
    results = []
    for idle in (False, True):
        torch.manual_seed(5)
        model = make(net)
        optimizer = build(name, model)
        for x, y in batches(net, 4):
            if idle:
                _idle_passes(model, net)
            optimizer.step(closure_of(optimizer, model, x, y))
        results.append((everything(model), optimizer.state_dict()))
    assert differences(results[0], results[1]) == []


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_idle_passes_inside_the_plain_loop_leave_no_trace(name: str) -> None:
    """Also between the backward and the step, where statistics of the step wait already."""
    results = []
    for idle in (False, True):
        torch.manual_seed(5)
        model = make("cnn")
        optimizer = build(name, model)
        for x, y in batches("cnn", 4):
            if idle:
                _idle_passes(model, "cnn")
            loss = cross_entropy(model(x), y)
            if idle:
                _idle_passes(model, "cnn")
            loss.backward()
            if idle:
                _idle_passes(model, "cnn")
            optimizer.step()
            optimizer.zero_grad()
        results.append((everything(model), optimizer.state_dict()))
    assert differences(results[0], results[1]) == []


def _idle_passes(model: nn.Module, net: str) -> None:
    """Evaluation without gradients, in evaluation mode with gradients, and of one sample."""
    x, _ = data(net, samples=7, seed=77)
    with torch.no_grad():
        model.eval()
        model(x)
    model(x[:1])
    model(x).sum()
    model.train()


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_zero_grad_may_stand_in_three_places_and_discards(name: str) -> None:
    results = []
    for place in ("after step", "before forward", "before backward", "discarding"):
        model = make()
        optimizer = build(name, model)
        for x, y in batches(count=4):
            if place == "discarding":  # a gradient that the user throws away takes its statistics with it
                cross_entropy(model(3 * x), y).backward()
            if place in ("before forward", "discarding"):
                optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            if place == "before backward":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if place == "after step":
                optimizer.zero_grad()
        results.append((everything(model), optimizer.state_dict()))
    for result in results[1:]:
        assert differences(results[0], result) == []


ACCUMULATING: dict[str, dict[str, Any]] = {
    "kfac": {"statistics": "empirical"},
    "mbf": {},
    "sgdm": {},
    "adam": {},
    "kbfgs": {},
}


@pytest.mark.parametrize("net", ["mlp", "tokens"])
@pytest.mark.parametrize("name", ACCUMULATING)
def test_four_micro_batches_are_one_batch(name: str, net: str) -> None:
    """Methods whose statistics are not sampled: 1 x 64 = 4 x 16 up to rounding."""
    results = []
    for pieces in (1, 4):
        model = make(net)
        optimizer = build(name, model, **ACCUMULATING[name])
        for x, y in batches(net, 5, samples=64):

            def closure(x=x, y=y, optimizer=optimizer, model=model, pieces=pieces):  # type: ignore[no-untyped-def]
                optimizer.zero_grad()
                total = torch.zeros(())
                for rows in torch.arange(64).chunk(pieces):
                    loss = cross_entropy(model(x[rows]), y[rows]) / pieces
                    loss.backward()
                    total = total + loss.detach()
                return total

            optimizer.step(closure)
        results.append(flat(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


class _Flip:
    """A likelihood whose labels do not depend on the random numbers: as fixed targets."""

    name = "fixed"

    def sample(self, output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (output.argmin(-1) + 1) % output.shape[-1]

    def negative_log_likelihood(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def curvature_root(self, output: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore::osculate.LossWarning")  # labels that are fixed are no likelihood of ours
@pytest.mark.parametrize(
    "name", ["kfac", "joint-kfac", "joint-kfac-momentum", "joint-kfac-noise-aware", "lw-sgdm", "joint-sgdm", "lw-adamw"]
)
def test_four_micro_batches_are_one_batch_with_sampled_statistics(name: str) -> None:
    """The sampler is replaced by one that ignores its generator, so that both loops see the same labels."""
    results = []
    for pieces in (1, 4):
        model = make()
        optimizer = build(name, model, likelihood=_Flip())
        for x, y in batches(count=5, samples=64):
            optimizer.zero_grad()
            for rows in torch.arange(64).chunk(pieces):
                (cross_entropy(model(x[rows]), y[rows]) / pieces).backward()
            optimizer.step()
        results.append(flat(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_the_second_evaluation_sees_the_same_function(name: str) -> None:
    """With lr = 0 nothing moves: the loss after the step, dropout included, is bitwise the loss before."""
    model = make("cnn")
    optimizer = build(name, model, lr=0.0)
    for x, y in batches("cnn", 3):
        loss = optimizer.step(closure_of(optimizer, model, x, y))
        report = optimizer.last_report
        assert report.loss_after is not None and torch.equal(report.loss_after, loss)
        assert report.shortened == 0


@pytest.mark.parametrize("name", METHODS)
def test_buffers_and_random_state_advance_once_per_step(name: str) -> None:
    model, twin = make("cnn"), make("cnn")
    optimizer = build(name, model)
    for x, y in batches("cnn", 3):
        twin.load_state_dict(model.state_dict())
        state = torch.get_rng_state()
        twin.zero_grad()
        expected = cross_entropy(twin(x), y)
        expected.backward()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        loss = optimizer.step(closure_of(optimizer, model, x, y))
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(loss, expected.detach())
        for (key, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(buffer, other), key
        for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, other.grad), key


def test_step_hooks_and_the_call_counter_of_schedulers_work() -> None:
    model = make()
    optimizer = build("kbfgs", model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, model, batches(count=2))
    assert calls == ["before", "after"] * 2


def test_gradient_clipping_between_backward_and_step_acts() -> None:
    model = make()
    optimizer = build("mbf", model)
    x, y = data()
    cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    optimizer.step()
    moments = [value for block in optimizer.state_dict()["state"].values() for value in block["momentum"]]
    assert sum(float(m.square().sum()) for m in moments) == pytest.approx(
        sum(float(g.square().sum()) for g in clipped), rel=1e-12
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_a_pass_does_not_use_sits_the_step_out(name: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)
            self.use_right = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.right(x) if self.use_right else self.left(x)))

    model = Branches().double()
    optimizer = build(name, model)
    start = model.right.weight.detach().clone()
    train(optimizer, model, batches(count=3))
    assert torch.equal(model.right.weight, start)
    model.use_right = True
    train(optimizer, model, batches(count=3))
    assert not torch.equal(model.right.weight, start)
    assert torch.isfinite(flat(model)).all()


def test_gradient_evaluations_are_counted() -> None:
    expected = {"sgdm": 3, "mbf": 3, "kfac": 6, "kbfgs": 6, "lw-sgdm": 6}
    for name, count in expected.items():
        model = make()
        optimizer = build(name, model)
        train(optimizer, model, batches(count=3))
        assert optimizer.gradient_evaluations == count, name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kfac", {"statistics_every": 3}),
        ("joint-kfac", {"statistics_every": 3, "curvature_every": 2}),
        ("lw-sgdm", {"curvature_every": 4}),
        ("mbf", {}),
    ],
)
def test_labels_are_sampled_only_where_statistics_are_due(name: str, options: dict[str, int]) -> None:
    """Each sampled backward is counted as one evaluation, and none happens for nothing."""

    class Counting(_Flip):
        calls = 0

        def sample(self, output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            Counting.calls += 1
            return super().sample(output, generator)

    model = make()
    optimizer = build(name, model, likelihood=Counting(), **options)
    train(optimizer, model, batches(count=9))
    expected = {"kfac": {0, 3, 6}, "joint-kfac": {0, 2, 3, 4, 6, 8}, "lw-sgdm": {0, 4, 8}, "mbf": set()}[name]
    assert Counting.calls == len(expected)
    assert optimizer.gradient_evaluations == 9 + len(expected)
