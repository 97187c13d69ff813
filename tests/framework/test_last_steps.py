"""Rules that recall in whole runs: conjugate gradients, the transcription, and what becomes of the last steps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osculate.framework.last_steps import name_of_last
from osculate.stepsize.guard import Trial
from reference.last_step import LastStepRule
from reference.layerwise import MomentumDirection
from reference.network import GAUSSIAN, Batch, Layer, Parameters
from small_nets import batches, closure_of, data, differences, everything, flat, make, train
from torch import Tensor, nn

seeds = st.integers(0, 2**31)


def exact(**options: Any) -> osc.Method:
    """Gradient directions, exact curvature, no average and no ridge."""
    rule = osc.JointWithLastStep(osc.ExactHessian(), decay=0.0, relative_ridge=0.0, **options)
    return osc.Method(momentum=osc.NoMomentum(), step_size=rule, defaults={"lr": 1.0})


def sampled(**parts: Any) -> osc.Method:
    """Momentum directions, sampled scores."""
    standard = {"momentum": osc.EMA(0.5), "step_size": osc.RelativeBound(osc.JointWithLastStep())}
    return osc.Method(**(standard | parts), defaults={"lr": 1.0})


def built(method: osc.Method, net: str = "mlp", **options: Any) -> tuple[osc.SecondOrder, nn.Module]:
    model = make(net)
    return osc.build(method, model, likelihood="categorical", **options), model


def last_of(optimizer: osc.SecondOrder) -> dict[str, Tensor]:
    """Last steps by the parameter's name in the model."""
    saved = optimizer.state_dict()["step_size"]["last_steps"]
    return {f"{layer}.{name}": value for layer, values in saved.items() for name, value in values.items()}


def least_squares(seed: int, samples: int = 20, inputs: int = 8) -> tuple[Tensor, Tensor]:
    """Singular values between 1 and 1/3, and targets."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((samples, inputs)))
    right, _ = np.linalg.qr(generator.standard_normal((inputs, inputs)))
    x = left * np.sqrt(samples) * np.geomspace(1.0, 1 / 3, inputs) @ right.T
    return torch.from_numpy(x), torch.from_numpy(generator.standard_normal((samples, 1)))


def squares(optimizer: osc.SecondOrder, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        loss.backward()
        return loss

    return closure


@settings(max_examples=10)
@given(seeds)
def test_one_layer_with_exact_curvature_is_conjugate_gradients(seed: int) -> None:
    x, y = least_squares(seed)
    model = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = osc.build(exact(), model)
    H, theta = x.T @ x / len(x), torch.zeros(8, 1).double()
    residual = x.T @ y / len(x)
    direction = residual.clone()
    for _ in range(6):
        optimizer.step(squares(optimizer, model, x, y))
        size = residual.square().sum() / (direction * (H @ direction)).sum()
        theta, left = theta + size * direction, residual - size * H @ direction
        direction = left + left.square().sum() / residual.square().sum() * direction
        residual = left
        assert torch.allclose(model.weight.detach().T, theta, rtol=1e-8, atol=1e-8)
    assert float(residual.norm()) < 1e-2 * float((x.T @ y / len(x)).norm())


class Sum(nn.Module):
    """Two layers whose outputs add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, :5]) + self.second(x[:, 4:])


@settings(max_examples=10)
@given(seeds)
def test_on_a_linear_model_no_joint_step_from_the_same_point_is_better(seed: int) -> None:
    x, y = least_squares(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, other = Sum().double(), Sum().double()
    optimizer = osc.build(exact(sign=osc.Unrestricted()), model)
    rule = osc.JointLayerwise(osc.ExactHessian(), decay=0.0, relative_ridge=0.0, sign=osc.Unrestricted())
    for _ in range(6):
        other.load_state_dict(model.state_dict())
        shorter = osc.build(replace(exact(), step_size=rule), other)
        shorter.step(squares(shorter, other, x, y))
        optimizer.step(squares(optimizer, model, x, y))
        with torch.no_grad():
            found, bound = ((net(x) - y).square().sum() for net in (model, other))
        assert found <= bound * (1 + 1e-8)


class Recorded(osc.Gaussian):
    """Labels that were drawn before."""

    def __init__(self, noise: Tensor):
        self.noise, self.used = noise, 0

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self.used += 1
        return output + self.noise[self.used - 1]


@settings(max_examples=10)
@given(seeds, st.sampled_from([0.0, 0.6]))
def test_a_run_is_the_transcription(seed: int, decay: float) -> None:
    generator, sizes, steps = np.random.default_rng(seed), (4, 3, 2), 5
    layers = [Layer("dense", True, ("tanh",)), Layer("dense", True, ())]
    parameters: Parameters = [
        {"W": generator.standard_normal((o, i)), "b": 0.3 * generator.standard_normal(o)}
        for i, o in itertools.pairwise(sizes)
    ]
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for module, entry in zip((model[0], model[2]), parameters, strict=True):
            module.weight.copy_(torch.from_numpy(entry["W"]))
            module.bias.copy_(torch.from_numpy(entry["b"]))
    x, y = generator.standard_normal((steps, 12, 4)), generator.standard_normal((steps, 12, 2))
    noise = generator.standard_normal((steps, 12, 2))
    method = osc.Method(
        momentum=osc.CorrectedEMA(0.5), step_size=osc.JointWithLastStep(decay=decay), defaults={"lr": 1.0}
    )
    optimizer = osc.build(method, model, likelihood=Recorded(torch.from_numpy(noise)))
    momentum, rule = MomentumDirection(0.5), LastStepRule(decay)
    for k in range(steps):
        batch = Batch(layers, GAUSSIAN, x[k], y[k])
        evaluation = batch.evaluate(parameters)
        corrected, directions = momentum.propose(evaluation.gradients)
        labels = batch.resampled(evaluation.outputs + noise[k])
        parameters = rule.step(labels, parameters, evaluation.gradients, corrected, directions)
        optimizer.step(squares(optimizer, model, torch.from_numpy(x[k]), torch.from_numpy(y[k])))
        expected = np.concatenate([entry[name].ravel() for entry in parameters for name in ("W", "b")])
        assert np.abs(flat(model).numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


def test_the_last_step_is_what_the_parameters_moved_by() -> None:
    optimizer, model = built(sampled())
    assert all(not value.any() for value in last_of(optimizer).values())
    for batch in batches(count=4):
        before = everything(model)
        train(optimizer, model, [batch])
        report = optimizer.last_report
        assert set(report.step_sizes) == {"0", "2", "4"}
        for name, value in everything(model).items():
            assert torch.allclose(before[name] - value, last_of(optimizer)[name], rtol=1e-9, atol=1e-12)


def test_decoupled_weight_decay_is_no_part_of_it() -> None:
    parts: dict[str, Any] = {"weight_decay": osc.Decoupled()}
    optimizer, model = built(sampled(**parts), weight_decay=0.1)
    train(optimizer, model, batches(count=1))
    before = everything(model)
    train(optimizer, model, batches(count=2)[1:])
    alpha = optimizer.last_report.step_sizes
    for name, value in everything(model).items():
        shrunk = before[name] * (1.0 - 0.1 * float(alpha[name.split(".")[0]]))
        assert torch.allclose(shrunk - value, last_of(optimizer)[name], rtol=1e-9, atol=1e-12)


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
    kept, before = {name: value.clone() for name, value in last_of(optimizer).items()}, everything(model)
    model[2].bias.requires_grad_(False)  # type: ignore[index]
    model[4].requires_grad_(False)  # type: ignore[index]
    train(optimizer, model, batches(count=4)[3:])
    for name, value in everything(model).items():
        rests = name in ("2.bias", "4.weight", "4.bias")
        assert torch.equal(value, before[name]) == rests
        assert torch.equal(last_of(optimizer)[name], kept[name]) == rests


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
    kept, before = {name: value.clone() for name, value in last_of(optimizer).items()}, everything(model)
    model.on = False
    train(optimizer, model, batches(count=4)[2:])
    for name, value in everything(model).items():
        rests = name.startswith("extra")
        assert torch.equal(value, before[name]) == torch.equal(last_of(optimizer)[name], kept[name]) == rests
    model.on = True
    train(optimizer, model, batches(count=6)[4:])
    assert not torch.equal(everything(model)["extra.weight"], before["extra.weight"]) and flat(model).isfinite().all()


def test_layers_that_join_find_room_between_directions_and_last_steps() -> None:
    model = make()
    model[0].requires_grad_(False)  # type: ignore[index]
    optimizer = osc.build(sampled(), model, likelihood="categorical")
    train(optimizer, model, batches(count=3))
    saved = {name: value.clone() for name, value in optimizer.state_dict()["step_size"].items() if name != "last_steps"}
    kept = {name: value.clone() for name, value in last_of(optimizer).items()}
    model[0].requires_grad_(True)  # type: ignore[index]
    optimizer.add_param_group({"params": ["0.*"]})
    grown, places = optimizer.state_dict()["step_size"], torch.tensor([0, 1, 3, 4])
    assert torch.equal(grown["forms"][places][:, places], saved["forms"])
    assert not grown["forms"][[2, 5]].any() and grown["forms"].shape == (6, 6)
    assert all(torch.equal(last_of(optimizer)[name], value) for name, value in kept.items())
    assert not last_of(optimizer)["0.weight"].any()
    train(optimizer, model, batches(count=5)[3:])
    assert last_of(optimizer)["0.weight"].any() and flat(model).isfinite().all()


@dataclass(frozen=True)
class Verdicts(osc.Backtrack):
    """Refuses as often as it is told, step by step."""

    refusals: Any = (0,)
    attempts: int = 3
    seen: list[int] = field(default_factory=lambda: [0, 0])

    def accepts(self, state: None, trial: Trial) -> bool:
        step, count = self.seen
        self.seen[1] += 1
        accepted = count >= self.refusals[step]
        if accepted or self.seen[1] == self.attempts:
            self.seen[:] = [step + 1, 0]
        return bool(accepted)


def test_guards_shorten_both_steps_and_a_refused_step_is_no_last_step() -> None:
    optimizer, model = built(sampled(guard=Verdicts(refusals=(0, 1, 3, 0))))
    train(optimizer, model, batches(count=1))
    before = everything(model)
    train(optimizer, model, batches(count=2)[1:])
    assert optimizer.last_report.shortened == 1
    for name, value in everything(model).items():
        assert torch.allclose(before[name] - value, 0.5 * last_of(optimizer)[name], rtol=1e-9, atol=1e-12)
    kept, before = {name: value.clone() for name, value in last_of(optimizer).items()}, everything(model)
    train(optimizer, model, batches(count=3)[2:])
    assert optimizer.last_report.shortened == 3
    assert differences((everything(model), last_of(optimizer)), (before, kept)) == []


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
        before = everything(model), {name: value.clone() for name, value in last_of(optimizer).items()}
        train(optimizer, model, [batch])
        if len(calls) == 3:
            assert "not finite for layers" in optimizer.last_report.skipped  # type: ignore[operator]
            assert differences((everything(model), last_of(optimizer)), before) == []
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
    assert {value.dtype for value in last_of(optimizer).values()} == {torch.float32}


def test_an_adaptive_damping_judges_the_whole_step() -> None:
    """Exact forms of a quadratic: what the model predicts is what happens, along last steps too."""
    x, y = least_squares(5)
    model = nn.Linear(8, 1, bias=False).double()
    damping = osc.LevenbergMarquardt(curvature=osc.ExactHessian(), every=1)
    structure = osc.Kronecker(osc.Covariance(), osc.IdentityFactor())
    method = replace(exact(), preconditioner=structure, damping=damping, defaults={"lr": 1.0, "damping": 0.5})
    optimizer = osc.build(method, model)
    predictions: list[float] = []

    class Watch:
        def before_step(self, optimizer: Any) -> None: ...

        def after_step(self, optimizer: Any, trace: Any) -> None:
            predictions.append(float(trace.proposal.predicted))

    optimizer.observers.append(Watch())
    losses = [float(optimizer.step(squares(optimizer, model, x, y))) for _ in range(5)]  # type: ignore[arg-type]
    for (one, two), predicted in zip(itertools.pairwise(losses), predictions, strict=False):
        assert one - two == pytest.approx(predicted, rel=1e-7, abs=1e-12)
