"""Rules that scale steps by a trail, in whole runs: it leads to the average of the weights, whatever happens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import osculate as osc
import pytest
import recalling
import torch
from recalling import Verdicts, built, steps_kept
from small_nets import batches, data, differences, everything, flat, make, train
from torch import Tensor, nn

RULE = osc.RelativeBound(osc.TrailScaled())


sampled = partial(recalling.sampled, step_size=RULE)


def averaged(average: dict[str, Tensor], model: nn.Module, step: int) -> dict[str, Tensor]:
    """The average after step 0, 1, ... by its own recurrence."""
    new = 3.0 / (step + 4.0)
    return {name: torch.lerp(average[name], value, new) for name, value in everything(model).items()}


@pytest.mark.parametrize("groups", [None, [{"params": ["0.*"], "lr": 0.3}, {"params": ["2.*"], "lr": 0.0}]])
def test_the_trail_leads_from_the_weights_to_their_average(groups: Any) -> None:
    optimizer, model = built(sampled(), groups=groups)
    average = everything(model)
    for step, batch in enumerate(batches(count=6)):
        train(optimizer, model, [batch])
        average = averaged(average, model, step)
        for name, value in everything(model).items():
            assert torch.allclose(average[name] - value, steps_kept(optimizer)[name], rtol=1e-9, atol=1e-12)


def test_decoupled_weight_decay_is_no_part_of_it() -> None:
    optimizer, model = built(sampled(weight_decay=osc.Decoupled()), weight_decay=0.1)
    before = everything(model)
    train(optimizer, model, batches(count=1))
    alpha = optimizer.last_report.step_sizes
    for name, value in everything(model).items():
        moved = before[name] * (1.0 - 0.1 * float(alpha[name.split(".")[0]])) - value
        assert torch.allclose(0.25 * moved, steps_kept(optimizer)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", ["mlp", "tokens", "called-twice", "attention", "tied", "signals"])
@pytest.mark.parametrize("form", [osc.SampledScores(), osc.SampledBatchScores(), osc.ExactHessian()])
def test_every_form_and_every_kind_of_layer(net: str, form: Any) -> None:
    rule = osc.RelativeBound(osc.TrailScaled(osc.JointLayerwise(form, ridge=0.01)), 0.1)
    optimizer, model = built(sampled(step_size=rule), net)
    before = flat(model)
    losses = train(optimizer, model, [data(net, 64)] * 8)
    assert losses[-1] < losses[0] and flat(model).isfinite().all()
    assert not torch.equal(before, flat(model))


@pytest.mark.parametrize("method", ["joint-kfac-noise-aware", sampled()])
def test_saved_and_loaded_it_continues_bit_for_bit(method: Any) -> None:
    optimizer, model = built(method)
    train(optimizer, model, batches(count=4))
    resumed, other = built(method)
    train(resumed, other, batches(count=1))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert differences(resumed.state_dict(), optimizer.state_dict()) == []
    for pair in ((optimizer, model), (resumed, other)):
        train(*pair, batches(count=7)[4:])
    assert differences((everything(model), optimizer.state_dict()), (everything(other), resumed.state_dict())) == []
    assert float(optimizer.state_dict()["step_size"]["trail_log_factor"]) != 0.0


def test_other_constants_are_another_rule_to_a_saved_state() -> None:
    optimizer, _ = built(sampled())
    other, _ = built(sampled(step_size=osc.RelativeBound(osc.TrailScaled(window=9.0))))
    with pytest.raises(osc.ArgumentError, match="step_size RelativeBound"):
        other.load_state_dict(optimizer.state_dict())


def test_guards_shorten_the_trail_too() -> None:
    """A step at half its length, and one that is dropped, after which the average comes nearer all the same."""
    optimizer, model = built(sampled(guard=Verdicts(refusals=(0, 1, 2, 0), attempts=2)))
    average, shortened = everything(model), []
    for step, batch in enumerate(batches(count=4)):
        train(optimizer, model, [batch])
        shortened.append(optimizer.last_report.shortened)
        average = averaged(average, model, step)
        for name, value in everything(model).items():
            assert torch.allclose(average[name] - value, steps_kept(optimizer)[name], rtol=1e-9, atol=1e-12)
    assert shortened == [0, 1, 2, 0]


def test_layers_that_join_and_rest() -> None:
    optimizer, model = built(sampled())
    train(optimizer, model, batches(count=2))
    kept = {name: value.clone() for name, value in steps_kept(optimizer).items()}
    model[4].requires_grad_(False)  # type: ignore[index]
    train(optimizer, model, batches(count=3)[2:])
    for name, value in steps_kept(optimizer).items():
        assert torch.equal(value, kept[name]) == name.startswith("4.")
    model = make()
    model[0].requires_grad_(False)  # type: ignore[index]
    optimizer = osc.build(sampled(), model, likelihood="categorical")
    train(optimizer, model, batches(count=3))
    factor = optimizer.state_dict()["step_size"]["trail_log_factor"].clone()
    model[0].requires_grad_(True)  # type: ignore[index]
    optimizer.add_param_group({"params": ["0.*"]})
    assert torch.equal(optimizer.state_dict()["step_size"]["trail_log_factor"], factor)
    train(optimizer, model, batches(count=5)[3:])
    assert steps_kept(optimizer)["0.weight"].any() and flat(model).isfinite().all()


def test_noise_shrinks_the_steps_and_its_absence_does_not() -> None:
    """One mini-batch again and again is noiseless; labels drawn anew at every step are nothing but noise."""
    found = []
    for noisy in (False, True):
        optimizer, model = built(replace(osc.registry.method("joint-kfac-noise-aware")))
        x, y = data("mlp", 64)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            labels = torch.randint(0, 3, y.shape, generator=generator) if noisy else y
            train(optimizer, model, [(x, labels)])
        found.append(float(optimizer.state_dict()["step_size"]["trail_log_factor"]))
    assert found[1] < -0.5 and found[0] > 0.0, found
