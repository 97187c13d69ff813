"""Rules that recall in whole runs: what becomes of the last steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import osculate as osc
import pytest
import recalling
import torch
from osculate.framework.optimizer.last_steps import name_of_last
from recalling import Verdicts, built, steps_kept
from small_nets import batches, closure_of, data, differences, everything, flat, make, train
from torch import Tensor, nn

sampled = partial(recalling.sampled, step_size=osc.RelativeBound(osc.JointWithLastStep()))


def test_the_last_step_is_what_the_parameters_moved_by() -> None:
    optimizer, model = built(sampled())
    assert all(not value.any() for value in steps_kept(optimizer).values())
    for batch in batches(count=4):
        before = everything(model)
        train(optimizer, model, [batch])
        report = optimizer.last_report
        assert set(report.step_sizes) == {"0", "2", "4"}
        for name, value in everything(model).items():
            assert torch.allclose(before[name] - value, steps_kept(optimizer)[name], rtol=1e-9, atol=1e-12)


def test_decoupled_weight_decay_is_no_part_of_it() -> None:
    parts: dict[str, Any] = {"weight_decay": osc.Decoupled()}
    optimizer, model = built(sampled(**parts), weight_decay=0.1)
    train(optimizer, model, batches(count=1))
    before = everything(model)
    train(optimizer, model, batches(count=2)[1:])
    alpha = optimizer.last_report.step_sizes
    for name, value in everything(model).items():
        shrunk = before[name] * (1.0 - 0.1 * float(alpha[name.split(".")[0]]))
        assert torch.allclose(shrunk - value, steps_kept(optimizer)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", ["mlp", "tokens", "called-twice", "attention", "tied", "signals"])
@pytest.mark.parametrize("form", [osc.SampledScores(), osc.SampledBatchScores(), osc.ExactHessian()])
def test_every_form_and_every_kind_of_layer(net: str, form: Any) -> None:
    rule = osc.RelativeBound(osc.JointWithLastStep(form, ridge=0.01), 0.1)
    optimizer, model = built(sampled(step_size=rule), net)
    before = flat(model)
    losses = train(optimizer, model, [data(net, 64)] * 8)
    assert losses[-1] < losses[0] and flat(model).isfinite().all()
    assert not torch.equal(before, flat(model))


def test_a_layer_without_scores_knows_how_its_two_directions_meet() -> None:
    """Half the direction and half the same last step are one direction: M must be singular along their difference."""
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Watching(osc.SampledScores):
        def measure(self, evidence: Any) -> Tensor:
            names = [name for name in evidence.names if not name.endswith("(last step)")]
            same = {name_of_last(name): evidence.directions[name] for name in names}
            seen.append(super().measure(replace(evidence, directions={**evidence.directions, **same})))
            return super().measure(evidence)

    optimizer, model = built(sampled(step_size=osc.JointWithLastStep(Watching())), "attention")
    train(optimizer, model, [data("attention", 32)])
    (forms,) = seen
    count = len(forms) // 2
    for quarter in (forms[count:, :count], forms[:count, count:], forms[count:, count:]):
        assert torch.allclose(quarter, forms[:count, :count], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("every", [1, 3])
def test_saved_and_loaded_it_continues_bit_for_bit(every: int) -> None:
    method = sampled(step_size=osc.RelativeBound(osc.JointWithLastStep(every=every)))
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
    plain = osc.build(sampled(step_size=osc.RelativeBound(osc.JointLayerwise())), make(), likelihood="categorical")
    with pytest.raises(osc.ArgumentError, match="step_size RelativeBound"):
        plain.load_state_dict(optimizer.state_dict())


def test_what_cannot_move_does_not_move_and_keeps_its_last_step() -> None:
    optimizer, model = built(sampled())
    train(optimizer, model, batches(count=3))
    kept, before = {name: value.clone() for name, value in steps_kept(optimizer).items()}, everything(model)
    model[2].bias.requires_grad_(False)  # type: ignore[index]
    model[4].requires_grad_(False)  # type: ignore[index]
    train(optimizer, model, batches(count=4)[3:])
    for name, value in everything(model).items():
        rests = name in ("2.bias", "4.weight", "4.bias")
        assert torch.equal(value, before[name]) == rests
        assert torch.equal(steps_kept(optimizer)[name], kept[name]) == rests


class Branches(nn.Module):
    """A layer that not every mini-batch needs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.extra, self.on = nn.Linear(6, 3), nn.Linear(6, 3), True

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + self.extra(x) if self.on else self.trunk(x)


def test_a_layer_without_a_gradient_sits_out_and_goes_on_later() -> None:
    model = Branches().double()
    optimizer = osc.build(sampled(), model, likelihood="categorical")
    train(optimizer, model, batches(count=2))
    kept, before = {name: value.clone() for name, value in steps_kept(optimizer).items()}, everything(model)
    model.on = False
    train(optimizer, model, batches(count=4)[2:])
    for name, value in everything(model).items():
        rests = name.startswith("extra")
        assert torch.equal(value, before[name]) == torch.equal(steps_kept(optimizer)[name], kept[name]) == rests
    model.on = True
    train(optimizer, model, batches(count=6)[4:])
    assert not torch.equal(everything(model)["extra.weight"], before["extra.weight"]) and flat(model).isfinite().all()


def test_layers_that_join_find_room_between_directions_and_last_steps() -> None:
    model = make()
    model[0].requires_grad_(False)  # type: ignore[index]
    optimizer = osc.build(sampled(), model, likelihood="categorical")
    train(optimizer, model, batches(count=3))
    saved = {name: value.clone() for name, value in optimizer.state_dict()["step_size"].items() if name != "last_steps"}
    kept = {name: value.clone() for name, value in steps_kept(optimizer).items()}
    model[0].requires_grad_(True)  # type: ignore[index]
    optimizer.add_param_group({"params": ["0.*"]})
    grown, places = optimizer.state_dict()["step_size"], torch.tensor([0, 1, 3, 4])
    assert torch.equal(grown["forms"][places][:, places], saved["forms"])
    assert not grown["forms"][[2, 5]].any() and grown["forms"].shape == (6, 6)
    assert all(torch.equal(steps_kept(optimizer)[name], value) for name, value in kept.items())
    assert not steps_kept(optimizer)["0.weight"].any()
    train(optimizer, model, batches(count=5)[3:])
    assert steps_kept(optimizer)["0.weight"].any() and flat(model).isfinite().all()


def test_guards_shorten_both_steps_and_a_refused_step_is_no_last_step() -> None:
    optimizer, model = built(sampled(guard=Verdicts(refusals=(0, 1, 3, 0))))
    train(optimizer, model, batches(count=1))
    before = everything(model)
    train(optimizer, model, batches(count=2)[1:])
    assert optimizer.last_report.shortened == 1
    for name, value in everything(model).items():
        assert torch.allclose(before[name] - value, 0.5 * steps_kept(optimizer)[name], rtol=1e-9, atol=1e-12)
    kept, before = {name: value.clone() for name, value in steps_kept(optimizer).items()}, everything(model)
    train(optimizer, model, batches(count=3)[2:])
    assert optimizer.last_report.shortened == 3
    assert differences((everything(model), steps_kept(optimizer)), (before, kept)) == []


def test_a_sufficient_decrease_counts_the_slope_along_the_last_step() -> None:
    optimizer, model = built(sampled(guard=osc.Armijo()))
    train(optimizer, model, batches(count=2))
    before, (x, y) = everything(model), batches(count=3)[2]
    slopes: list[Tensor] = []

    class Watch:
        def before_step(self, optimizer: Any) -> None:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        def after_step(self, optimizer: Any, trace: Any) -> None:
            slopes.append(optimizer._look_back._slope)

    watch = Watch()
    optimizer.observers.append(watch)
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.last_report.shortened == 0
    moved = {name: value - before[name] for name, value in everything(model).items()}
    expected = torch.stack([(watch.gradients[name] * value).sum() for name, value in moved.items()]).sum()
    assert torch.allclose(slopes[0], expected, rtol=1e-9)


def test_a_step_that_breaks_down_leaves_the_last_steps_alone() -> None:
    class Breaks(osc.JointWithLastStep):
        def propose(self, state: Any, evidence: Any) -> Tensor:
            sizes = super().propose(state, evidence)
            return sizes * float("nan") if len(calls) == 3 else sizes

    calls: list[int] = []
    optimizer, model = built(sampled(step_size=Breaks()), on_nonfinite="skip")
    for batch in batches(count=5):
        calls.append(1)
        before = everything(model), {name: value.clone() for name, value in steps_kept(optimizer).items()}
        train(optimizer, model, [batch])
        if len(calls) == 3:
            assert "not finite for layers" in optimizer.last_report.skipped  # type: ignore[operator]
            assert differences((everything(model), steps_kept(optimizer)), before) == []
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("sizes", [0.1, torch.zeros(3).double()])
def test_a_rule_that_recalls_must_say_how_far_to_go_along_both(sizes: Any) -> None:
    class Half(osc.JointWithLastStep):
        def propose(self, state: Any, evidence: Any) -> Any:
            return sizes

    optimizer, model = built(sampled(step_size=Half()))
    before = flat(model)
    with pytest.raises(osc.ArgumentError, match="6 step sizes"):
        train(optimizer, model, batches(count=1))
    assert torch.equal(flat(model), before)


def test_groups_with_their_own_learning_rates() -> None:
    """lr = 0 in one group: its layer stays, the others go on."""
    optimizer, model = built(sampled(), groups=[{"params": ["2.*"], "lr": 0.0}])
    before = everything(model)
    train(optimizer, model, batches(count=3))
    for name, value in everything(model).items():
        assert torch.equal(value, before[name]) == name.startswith("2.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_keeps_last_steps_in_single(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    optimizer = osc.build(sampled(), model, likelihood="categorical")
    losses = train(optimizer, model, [data(samples=64, dtype=dtype)] * 6)
    assert losses[-1] < losses[0]
    assert {value.dtype for value in steps_kept(optimizer).values()} == {torch.float32}
