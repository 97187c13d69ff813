"""Models and loops at the edge: parts called one by one, two optimizers, attention, gradients that come late."""

from __future__ import annotations

import gc
import weakref

import osculate as osc
import pytest
import torch
from small_nets import (
    METHODS,
    batches,
    build,
    closure_of,
    cross_entropy,
    data,
    differences,
    everything,
    flat,
    make,
    train,
)
from torch import Tensor, nn


class Parts(nn.Module):
    """A model whose parts are also called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


@pytest.mark.parametrize(("name", "options"), [("kfac", {"statistics": "empirical"}), ("kbfgs", {}), ("mbf", {})])
def test_parts_called_one_by_one_are_one_pass_per_backward(name: str, options: dict[str, str]) -> None:
    """Without a forward of the model itself, with gradient accumulation: the same statistics."""
    results = []
    for whole, pieces in ((True, 1), (False, 1), (False, 4)):
        torch.manual_seed(0)
        model = Parts().double()
        optimizer = build(name, model, **options)
        for x, y in batches(count=4, samples=32):

            def closure(x=x, y=y, model=model, optimizer=optimizer, whole=whole, pieces=pieces):  # type: ignore[no-untyped-def]
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                for rows in torch.arange(32).chunk(pieces):
                    output = model(x[rows]) if whole else model.head(model.encode(x[rows]))
                    loss = cross_entropy(output, y[rows]) / pieces
                    loss.backward()
                    total += loss.detach()
                return total

            optimizer.step(closure)
        results.append(flat(model))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::osculate.LossWarning")  # the refusal comes after it
@pytest.mark.parametrize("name", ["kfac", "joint-kfac", "joint-kfac-momentum", "joint-kfac-noise-aware", "lw-sgdm"])
def test_sampled_statistics_say_so_when_the_model_itself_is_not_called(name: str) -> None:
    model = Parts().double()
    optimizer = build(name, model)
    x, y = data()
    before = flat(model)
    cross_entropy(model.head(model.encode(x)), y).backward()
    with pytest.raises(osc.OsculateError, match="whole model"):
        optimizer.step()
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_optimizer_on_the_same_model_is_not_in_the_way(name: str) -> None:
    """As in a notebook whose cell runs twice: the first optimizer still lives, and its hooks too."""
    results = []
    for company in ("alone", "with kfac", "with itself"):
        model = make("cnn")
        other = None if company == "alone" else build("kfac" if company == "with kfac" else name, model)
        optimizer = build(name, model)
        torch.manual_seed(2)
        train(optimizer, model, batches("cnn", 3))
        results.append((everything(model), optimizer.state_dict()))
        del other
    assert differences(results[0], results[1]) == []
    assert differences(results[0], results[2]) == []


def test_an_optimizer_that_is_gone_leaves_no_working_hooks() -> None:
    model = make()
    optimizer = build("kbfgs", model)
    train(optimizer, model, [data()])
    capture = weakref.ref(optimizer.capture)
    del optimizer
    gc.collect()
    assert capture() is None
    model(data()[0]).sum().backward()


class Attention(nn.Module):
    """``nn.MultiheadAttention`` uses its projections' weights without calling them as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unflatten(1, (3, 2)))
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("name", METHODS)
def test_attention_is_served_as_any_other_matrix(name: str) -> None:
    torch.manual_seed(0)
    model = Attention().double()
    optimizer = build(name, model)
    start = everything(model)
    losses = train(optimizer, model, [data(samples=64)] * 10)
    assert losses[-1] < losses[0]
    rows = [row for row in optimizer.layer_table() if row.layer.startswith("attention") and "weight" in row.parameters]
    assert [(row.layer, row.kind) for row in rows] == [
        ("attention.in_proj", "Attention"), ("attention.out_proj", "Attention"),
    ]  # fmt: skip
    assert not any(row.fallback for row in rows)
    assert len(differences(start, everything(model))) == len(start)


@pytest.mark.parametrize("name", ["kbfgs", "kfac", "mbf"])
def test_a_method_on_a_model_without_supported_layers_is_its_fallback(name: str) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)[:, :3]

    model = Scale().double()
    optimizer = build(name, model, lr=0.1)
    assert all(row.fallback or "Diagonal" in row.part for row in optimizer.layer_table())
    losses = train(optimizer, model, [data(samples=64)] * 4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["kbfgs", "kfac", "mbf", "sgdm"])
def test_parameters_frozen_during_training_stay_frozen(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2))
    for parameter in model.get_submodule("2").parameters():
        parameter.requires_grad_(False)
    kept = model.get_parameter("2.weight").detach().clone()
    other = model.get_parameter("4.weight").detach().clone()
    train(optimizer, model, batches(count=2))
    assert torch.equal(model.get_parameter("2.weight"), kept)
    assert not torch.equal(model.get_parameter("4.weight"), other)
    assert not model.get_parameter("2.weight").requires_grad and model.get_parameter("0.weight").requires_grad


@pytest.mark.parametrize("name", ["kbfgs", "kfac"])
def test_an_interrupted_step_leaves_a_usable_optimizer(name: str) -> None:
    """The closure fails in its first or second evaluation; the next step works as ever."""
    for failing_call in (1, 2):
        model = make()
        optimizer = build(name, model)
        train(optimizer, model, batches(count=1))
        x, y = data()
        calls = 0
        inner = closure_of(optimizer, model, x, y)

        def closure(inner=inner, failing_call=failing_call) -> Tensor:  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise KeyboardInterrupt
            return inner()

        try:
            optimizer.step(closure)
        except KeyboardInterrupt:
            assert calls == failing_call
        else:
            assert name == "kfac" and failing_call == 2
        assert all(parameter.requires_grad for parameter in model.parameters())
        losses = train(optimizer, model, [(x, y)] * 4)
        assert losses[-1] < losses[0]


def test_checkpointed_layers_are_recorded_once() -> None:
    from torch.utils.checkpoint import checkpoint

    class Saving(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.encode, x, use_reentrant=False))

    results = []
    for kind in (Parts, Saving):
        torch.manual_seed(0)
        model = kind().double()
        optimizer = build("kfac", model, statistics="empirical")
        train(optimizer, model, batches(count=3))
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


def test_half_precision_trains() -> None:
    for name in ("kfac", "mbf", "kbfgs", "joint-kfac", "adam"):
        model = make(dtype=torch.bfloat16)
        optimizer = build(name, model)
        x, y = data(samples=64, dtype=torch.bfloat16)
        losses = train(optimizer, model, [(x, y)] * 6)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters()), name
        assert losses[-1] <= losses[0] * 1.01, name
