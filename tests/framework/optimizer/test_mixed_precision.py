"""Autocast, GradScaler and half-precision parameters: parts see float32 statistics without the loss scale."""

from __future__ import annotations

import math
import warnings
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import (
    METHODS,
    WITHOUT_CLOSURE,
    batches,
    build,
    cross_entropy,
    data,
    differences,
    everything,
    flat,
    leaves,
    make,
    train,
)
from torch import Tensor, nn

FLOAT = torch.float32


def scaler_of(scale: float = 2.0**12) -> torch.amp.GradScaler:
    """A scaler on the CPU whose scale is a power of two: dividing by it is exact."""
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


def state_of(optimizer: osc.SecondOrder) -> dict[str, Any]:
    return leaves(optimizer.state_dict()["state"])


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_a_scaled_loop_is_the_plain_loop(name: str, unscaled: bool) -> None:
    """Parameters, buffers and every state, bit for bit: gradients and statistics lose the scale."""
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = make("cnn")
        scaler = scaler_of()
        optimizer = build(name, model, grad_scaler=scaler if scaled and unscaled else None)
        for x, y in batches("cnn", 4):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            if not scaled:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append((everything(model), leaves(optimizer.state_dict()["state"])))
    assert differences(*results) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_scaled_closure_is_the_plain_closure(name: str) -> None:
    results = []
    for scaled in (False, True):
        model = make()
        scaler = scaler_of()
        optimizer = build(name, model, grad_scaler=scaler if scaled else None)
        for x, y in batches(count=4):

            def closure(x=x, y=y, model=model, optimizer=optimizer, scaler=scaler, scaled=scaled):  # type: ignore[no-untyped-def]
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                (scaler.scale(loss) if scaled else loss).backward()
                return loss

            optimizer.step(closure)
            if scaled:
                scaler.update()
        results.append((everything(model), leaves(optimizer.state_dict()["state"])))
    assert differences(*results) == []


def test_clipping_between_unscale_and_step() -> None:
    results = []
    for scaled in (False, True):
        model = make()
        scaler = scaler_of()
        optimizer = build("kfac", model, statistics="empirical", grad_scaler=scaler if scaled else None)
        for x, y in batches(count=4):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            (scaler.scale(loss) if scaled else loss).backward()
            if scaled:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            if scaled:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        results.append((everything(model), state_of(optimizer)))
    assert differences(*results) == []


def float_states(optimizer: osc.SecondOrder) -> set[torch.dtype]:
    values = state_of(optimizer).values()
    return {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}


@pytest.mark.parametrize("name", ["kfac-empirical", *WITHOUT_CLOSURE])
def test_an_unknown_scale_is_refused_where_it_matters(name: str) -> None:
    """After scaler.unscale_ torch does not say what the scale was.

    Methods that read nothing off a gradient inside the model or at its output do not care. All others are right or
    refused: what those that step end with is what a loop without a scaler ends with.
    """
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = build("kfac", model, statistics="empirical") if name == "kfac-empirical" else build(name, model)
        scaler = scaler_of()
        before = everything(model)
        for x, y in batches(count=2):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            (scaler.scale(loss) if scaled else loss).backward()
            if not scaled:
                optimizer.step()
                continue
            scaler.unscale_(optimizer)
            if reads(optimizer, name):
                with pytest.raises(osc.ArgumentError, match="grad_scaler=scaler"):
                    scaler.step(optimizer)
                assert differences((before, {}), (everything(model), {})) == []
                return
            scaler.step(optimizer)
            scaler.update()
        results.append((everything(model), state_of(optimizer)))
    assert differences(*results) == []


def reads(optimizer: osc.SecondOrder, name: str) -> bool:
    """Whether a method measures with the user's loss, or bounds its steps by it."""
    return (
        name == "kfac-empirical"
        or optimizer.method.needs_likelihood
        or optimizer.capture.seen is not None
        or optimizer.due.records_gradients
    )


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", None])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "ngd-exact", "tnt", "joint-kfac", "lw-sgdm", "mbf"])
def test_the_clipping_recipe_is_right_with_the_scaler_and_refused_without(name: str, likelihood: str | None) -> None:
    if likelihood is None and name != "mbf":
        return
    results = []
    for scaled, told in ((False, False), (True, True), (True, False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        scaler = scaler_of()
        optimizer = osc.build(name, model, likelihood=likelihood, grad_scaler=scaler if told else None)
        for step in range(3):
            optimizer.zero_grad()
            output = model(x)
            if likelihood == "bernoulli":
                loss = nn.functional.binary_cross_entropy_with_logits(output, nn.functional.one_hot(y, 3).to(output))
            else:
                loss = nn.functional.cross_entropy(output, y)
            (scaler.scale(loss) if scaled else loss).backward()
            if scaled:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            if scaled and not told:
                with pytest.raises(osc.ArgumentError, match="grad_scaler=scaler"):
                    scaler.step(optimizer)
                assert step == 0 and optimizer.last_report.step == -1
                return
            if scaled:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        results.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        torch.testing.assert_close(results[-1], results[0], rtol=1e-5, atol=1e-6)


def test_a_scale_that_is_the_number_of_samples_is_no_sum() -> None:
    """A mean over N samples times a scale of N has weight 1 for each."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    scaler = scaler_of(32.0)
    optimizer = osc.build("mbf", model, grad_scaler=scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.scale(nn.functional.cross_entropy(model(torch.randn(32, 6)), torch.randint(0, 3, (32,)))).backward()
        scaler.step(optimizer)


def test_a_closure_inside_the_scalers_step_is_refused() -> None:
    model = make()
    optimizer = build("kbfgs", model)
    scaler = scaler_of()
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(osc.ArgumentError, match=r"optimizer.step\(closure\)(.|\n)*scaler.update"):
        scaler.step(optimizer, closure)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_an_overflow_skips_the_whole_step_and_lowers_the_scale(name: str, given: bool) -> None:
    model = make()
    scaler = scaler_of()
    optimizer = build(name, model, grad_scaler=scaler if given else None)
    for index, (x, y) in enumerate(batches(count=4)):
        before, scale = (everything(model), state_of(optimizer)), None
        loss = cross_entropy(model(x), y) * (math.inf if index == 1 else 1.0)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()  # not the optimizer's: the records of the skipped pass must be gone all the same
        same = differences(before, (everything(model), state_of(optimizer))) == []
        assert same == (index == 1) and (scaler.get_scale() < scale) == (index == 1)
        assert (optimizer.last_report.skipped is not None) == (index == 1)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("name", METHODS)
def test_training_under_autocast(name: str) -> None:
    """bf16 inside, float32 parameters and statistics; close to the float32 run after one step, and it trains."""
    moves, steps = [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = make("mlp", FLOAT)
        optimizer = build(name, model)
        start = flat(model)
        x, y = data(samples=64, dtype=FLOAT)

        def closure(model=model, optimizer=optimizer, x=x, y=y, enabled=enabled):  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure))]
        moves.append(flat(model) - start)
        losses += [float(optimizer.step(closure)) for _ in range(6)]
        steps.append(losses)
        assert all(
            v.dtype == FLOAT for v in state_of(optimizer).values() if isinstance(v, Tensor) and v.is_floating_point()
        )
    cosine = torch.nn.functional.cosine_similarity(moves[0], moves[1], dim=0)
    assert cosine > (0.98 if name not in SAMPLED else 0.5), cosine
    assert steps[1][-1] < steps[1][0]


SAMPLED = {name for name in METHODS if osc.registry.method(name).needs_likelihood}
"""Their labels are drawn from probabilities that bf16 rounds: a few labels differ."""


def test_statistics_of_half_precision_passes_are_summed_in_float32() -> None:
    """A mean over 4096 samples of values near 1: summed in bf16 the second decimal would be lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = build("kbfgs", model, damping=0.3)
    x = 1 + 1e-2 * torch.randn(4096, 4)
    seen: list[Tensor] = []
    original = optimizer.capture.collect

    def spy() -> Any:
        record = original()
        seen.append(record["0"].mean_preactivation)
        return record

    optimizer.capture.collect = spy  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        cross_entropy(output, torch.zeros(4096, dtype=torch.long)).backward()
    optimizer.collect()
    torch.testing.assert_close(seen[0], output.detach().float().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", ["mlp", "cnn", "tokens"])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_parameters_have_float32_states(name: str, net: str) -> None:
    torch.manual_seed(0)
    model = make(net, torch.bfloat16)
    optimizer = build(name, model)
    x, y = data(net, samples=64, dtype=torch.bfloat16)
    losses = train(optimizer, model, [(x, y)] * 6)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0] * 1.05
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(
        v.dtype == FLOAT for v in state_of(optimizer).values() if isinstance(v, Tensor) and v.is_floating_point()
    )


LOOKING_BACK = [name for name in METHODS if osc.registry.method(name).looks_back_at(0)]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_closure_that_unscales_and_is_evaluated_again_is_refused(name: str, told: bool) -> None:
    """With nothing changed; clipping the scaled gradients, as the message says, is clipping without a scaler."""
    x, y = data()
    model, scaler = make(), scaler_of(8.0)
    optimizer = build(name, model, grad_scaler=scaler if told else None)
    before = (everything(model), state_of(optimizer))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        return loss

    with pytest.raises(osc.ArgumentError, match=r"allows once(.|\n)*max_norm \* scaler.get_scale"):
        optimizer.step(closure)
    assert differences(before, (everything(model), state_of(optimizer))) == []


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_clipping_scaled_gradients_in_a_closure_is_clipping_without_a_scaler(name: str) -> None:
    """But for torch's 1e-6 in the denominator, beside another norm."""
    results = []
    for scaled in (False, True):
        model, scaler = make(), scaler_of(8.0)
        optimizer = build(name, model, grad_scaler=scaler if scaled else None)
        for x, y in batches(count=3):

            def closure(x=x, y=y, model=model, optimizer=optimizer, scaler=scaler, scaled=scaled):  # type: ignore[no-untyped-def]
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                (scaler.scale(loss) if scaled else loss).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2 * (scaler.get_scale() if scaled else 1.0))
                return loss

            optimizer.step(closure)
            if scaled:
                scaler.update()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgdm", "kfac", "kbfgs"])
@pytest.mark.parametrize("where", ["nowhere", "inside"])
def test_an_update_that_is_not_between_the_steps_is_refused(name: str, where: str) -> None:
    """Forgotten, it would leave the next gradients scaled; inside the closure, they would be unscaled twice."""
    x, y = data()
    model, scaler = make(), scaler_of(8.0)
    optimizer = build(name, model, grad_scaler=scaler)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if where == "inside":
            scaler.unscale_(optimizer)
            scaler.update()
        return loss

    if where == "nowhere":
        optimizer.step(closure)
    before = (everything(model), state_of(optimizer))
    with pytest.raises(osc.ArgumentError, match=r"scaler.update\(\)(.|\n)*step\(closure\)"):
        optimizer.step(closure)
    assert differences(before, (everything(model), state_of(optimizer))) == []
