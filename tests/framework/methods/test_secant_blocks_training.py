"""mini-block-lbfgs against its slow transcription, what the look back hands it, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
from reference import mini_block_lbfgs
from reference.network import BERNOULLI, GAUSSIAN
from small_nets import batches, build, closure_of, cross_entropy, data, flat, make
from torch import Tensor, nn
from transcribed_nets import ACTIVATIONS, inputs, mean_loss, network

TOLERANCE = 1e-8
RULES = {"per_output": "per-output", "per_input_avg": "per-input-averaged", "flat_chunk_avg": "flat-chunk"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocks", RULES)
@pytest.mark.parametrize("pairs", ["double", "powell-then-lm"])
@pytest.mark.parametrize("loss", [BERNOULLI, GAUSSIAN])
def test_it_is_its_transcription(seed: int, blocks: str, pairs: str, loss: str) -> None:
    """Memory 2 and eight iterations: stores overflow, and pairs are rejected."""
    arrays = inputs(seed)
    hyper = {"lr": 0.05, "lambda": 0.1, "memory": 2, "pair_decay": 0.9, "pairs": pairs, "blocks": blocks}
    meta = {"loss": loss, "activations": ACTIVATIONS, "hyper": hyper}
    with np.errstate(all="ignore"):  # dead blocks divide zero by zero
        expected = mini_block_lbfgs.run(meta, arrays)
    model = network(arrays)
    optimizer = osc.build(
        "mini-block-lbfgs",
        model,
        lr=0.05,
        damping=0.1,
        memory=2,
        pairs=pairs,
        blocks=RULES[blocks],
        growth=float("inf"),
    )
    rejected = 0
    for k, rows in enumerate(arrays["batches"]):
        x = torch.from_numpy(arrays["data"][rows])

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            value = mean_loss(loss, model(x), x)
            value.backward()
            return value

        optimizer.step(closure)
        rejected += int(optimizer.last_report.as_dict()["rejected_pairs"])
        for l, layer in enumerate(module for module in model if isinstance(module, nn.Linear)):
            for name, value in (("W", layer.weight), ("b", layer.bias)):
                error = np.abs(value.detach().numpy() - expected[f"{name}_{l}"][k]).max()
                assert error < TOLERANCE, (k, name, l, error)
    assert rejected == expected["rejected"] and expected["stored"] == 2


@dataclass(frozen=True)
class Listening(osc.Identity):
    """Plain momentum that keeps what it is shown of the step."""

    seen: Any = None
    needs = osc.Needs.CHANGES

    def observe_step(self, state: Any, before: Any, after: Any, damping: Any) -> dict[str, Tensor]:
        values = [tuple(v.clone() for v in values) for values in (before.parameters, after.parameters)]
        gradients = [tuple(v.clone() for v in entry.gradients) for entry in (before, after)]
        self.seen[before.layer.name] = (*values, *gradients, before.mean_scale, after.mean_scale)
        return {}


def listening(seen: dict[str, Any], **parts: Any) -> osc.Method:
    return osc.Method(Listening(seen), osc.SecantPairs(), momentum=osc.NoMomentum(), defaults={"lr": 0.1}, **parts)


def gradients_at(model: nn.Module, values: dict[str, Tensor], loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Autograd at given parameters; afterwards the model is as it was."""
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(values[name])
    found = torch.autograd.grad(loss(model), list(model.parameters()))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(kept[name])
    return dict(zip(kept, found, strict=True))


@pytest.mark.parametrize("net", ["mlp", "cnn", "attention"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("lr", [0.1, 1e3], ids=["whole", "shortened"])
def test_it_sees_the_step_that_stays_and_both_gradients(net: str, reduction: str, pieces: int, lr: float) -> None:
    """Against autograd by hand; dropout draws the same masks, micro-batches and reductions are the closure's."""
    seen: dict[str, Any] = {}
    model, (x, y) = make(net), data(net)
    guard = osc.Backtrack(1.0001, shrink=0.1, attempts=12)
    optimizer = osc.build(listening(seen, guard=guard), model, lr=lr / 16, loss_reduction=reduction)
    share = 1.0 / pieces if reduction == "mean" else 1.0

    def losses(network: nn.Module) -> list[Tensor]:
        torch.manual_seed(5)
        rows = list(torch.arange(16).chunk(pieces))
        return [share * cross_entropy(network(x[r]), y[r], reduction) for r in rows]

    def closure() -> Tensor:
        optimizer.zero_grad()
        torch.manual_seed(5)
        total = torch.zeros((), dtype=torch.float64)
        for r in torch.arange(16).chunk(pieces):
            loss = share * cross_entropy(model(x[r]), y[r], reduction)
            loss.backward()
            total = total + loss.detach()
        return total

    old = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step(closure)
    new = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert (optimizer.last_report.as_dict().get("shortened", 0) > 0) == (lr > 1)
    assert any(not torch.equal(old[name], new[name]) for name in old)
    found = [gradients_at(model, at, lambda network: torch.stack(losses(network)).sum()) for at in (old, new)]
    for layer in optimizer.layers:
        names = {id(value): name for name, value in model.named_parameters()}
        for index, parameter in enumerate(layer.parameters.values()):
            name, shown = names[id(parameter)], seen[layer.name]
            for actual, expected in zip(shown[:4], (old, new, *found), strict=True):
                torch.testing.assert_close(actual[index], expected[name], rtol=1e-9, atol=1e-12)
            assert torch.equal(parameter.grad, shown[2][index])  # type: ignore[arg-type]
        assert shown[4] == shown[5] == (1.0 if reduction == "mean" else 1 / 16)


def test_nothing_is_learnt_of_a_refused_step() -> None:
    seen: dict[str, Any] = {}
    model, (x, y) = make(), data()
    optimizer = osc.build(listening(seen, guard=osc.Backtrack(1.0001, shrink=0.9, attempts=2)), model, lr=1e6)
    before = flat(model)
    optimizer.step(closure_of(optimizer, model, x, y))
    assert not seen and torch.equal(flat(model), before)


def seen_of_one_step(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """In float32, with a scaled loss."""
    seen: dict[str, Any] = {}
    model, (x, y) = make(dtype=torch.float32), data(dtype=torch.float32)
    optimizer = osc.build(listening(seen), model, grad_scaler=scaler)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure)
    return seen


def test_gradients_have_no_loss_scale() -> None:
    """Both evaluations; the scaled run shows bit for bit what the plain one does."""
    shown = [seen_of_one_step(torch.amp.GradScaler("cpu", 2.0**10, enabled=scaled)) for scaled in (False, True)]
    for name, values in shown[0].items():
        for one, other in zip(values[:4], shown[1][name][:4], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_frozen_parameters_stand_still_and_have_no_gradient() -> None:
    seen: dict[str, Any] = {}
    model, (x, y) = make("partly-frozen"), data()
    optimizer = osc.build(listening(seen), model)
    optimizer.step(closure_of(optimizer, model, x, y))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and set(seen) == {"2", "4"}
    for layer in optimizer.layers[1:] if len(optimizer.layers) == 3 else optimizer.layers:
        old, new, before, after = seen[layer.name][:4]
        for index, parameter in enumerate(layer.parameters.values()):
            if not parameter.requires_grad:
                assert torch.equal(old[index], new[index])
                assert not before[index].any() and not after[index].any()
            else:
                assert not torch.equal(before[index], after[index])


def counted(model: nn.Sequential, layer: int) -> list[int]:
    """Grows by one whenever the gradient of a layer's weight is computed."""
    found: list[int] = []
    model[layer].weight.register_hook(lambda gradient: found.append(layer))  # type: ignore[union-attr, arg-type]
    return found


@pytest.mark.parametrize(("name", "evaluations"), [("kbfgs", 1), ("mini-block-lbfgs", 2)])
def test_a_look_back_computes_weight_gradients_only_where_they_are_paired(name: str, evaluations: int) -> None:
    model, (x, y) = make(), data()
    optimizer, counts = build(name, model), [counted(model, layer) for layer in (0, 2, 4)]
    optimizer.step(closure_of(optimizer, model, x, y))
    assert [len(count) for count in counts] == [evaluations] * 3


def test_each_layer_gets_what_its_own_structure_needs() -> None:
    """K-BFGS on one layer beside secant blocks on another: the first stays lean."""
    model, (x, y) = make(), data()
    kbfgs = osc.Kronecker(osc.HessianActionBFGS(), osc.BFGS(), osc.Schedule(inverses=None))
    parts = osc.ByLayer({"0": kbfgs, "2": osc.SecantBlocks()}, otherwise=osc.Identity())
    method = osc.Method(parts, osc.SecantPairs(), damping=osc.Split(), defaults={"lr": 0.1, "damping": 0.3})
    optimizer, counts = osc.build(method, model), [counted(model, layer) for layer in (0, 2)]
    losses = [float(optimizer.step(closure_of(optimizer, model, x, y))) for _ in range(20)]  # type: ignore[arg-type]
    assert [len(count) for count in counts] == [20, 40] and losses[-1] < losses[0]


def test_double_damping_on_blocks_is_refused_where_it_is_not_defined() -> None:
    with pytest.raises(osc.ArgumentError, match="double damping needs"):
        osc.build("mini-block-lbfgs", make(), damping=1.0)
    osc.build("mini-block-lbfgs", make(), damping=1.0, pairs="powell-then-lm")
    with pytest.raises(osc.CompatibilityError, match=r"secant pairs of the parameters.*SecantPairs\(\)"):
        osc.Method(osc.SecantBlocks(), osc.EmpiricalFisher(), defaults={"damping": 0.1})


def half_squares_after(steps: int, method: osc.Method, x: Tensor, y: Tensor) -> float:
    """Least squares from zero with lr = 1."""
    model = nn.Linear(x.shape[1], y.shape[1], bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = osc.build(method, model, lr=1.0, damping=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return float(closure().detach())


def test_on_a_strongly_convex_quadratic_it_leaves_gradient_descent_behind() -> None:
    """One layer, least squares with condition number 1e2: blocks are independent, each has its own quadratic."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 12, dtype=torch.float64))[0]
    x = basis * torch.logspace(0, -1, 12, dtype=torch.float64) * 200**0.5
    y = x @ torch.randn(12, 3, dtype=torch.float64)
    blocks = osc.SecantBlocks(memory=12, pairs=osc.PowellH(), average=osc.ZeroStartAverage(0.0))
    found = [
        half_squares_after(
            60, osc.Method(part, curvature, momentum=osc.NoMomentum(), guard=osc.Backtrack(1.0001)), x, y
        )
        for part, curvature in ((blocks, osc.SecantPairs()), (osc.Identity(), osc.InputsOnly()))
    ]
    assert found[0] < 1e-12 and found[1] > 1e-5, found


def test_it_trains_in_float32_with_batch_normalisation() -> None:
    model = make("cnn", torch.float32)
    optimizer = build("mini-block-lbfgs", model)
    losses = [
        float(optimizer.step(closure_of(optimizer, model, x, y)))  # type: ignore[arg-type]
        for x, y in batches("cnn", 1, dtype=torch.float32) * 30
    ]
    assert losses[-1] < 0.9 * losses[0]
