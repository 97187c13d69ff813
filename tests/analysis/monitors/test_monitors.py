"""Monitors hold on what ships, catch corrupted matrices and lying rules, and leave the run as it was."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import osculate as osc
import pytest
import torch
from osculate.analysis import (
    Descent,
    EigenvalueBounds,
    JsonLines,
    Memory,
    PairCurvature,
    RelativeStep,
    SecantEquation,
    StepSizeCurvature,
    TensorBoard,
    watch,
)
from osculate.analysis.monitors.eigenvalue_monitor import store_bounds
from osculate.analysis.monitors.readings import Finding, Reading, gather
from osculate.analysis.theorem import Inequality
from osculate.preconditioners.factors.lbfgs import append_pairs_
from torch import Tensor, nn

PAIRS = {
    "double": osc.DoubleDamping(),
    "lm": osc.PowellThenLM(),
    "powell-h": osc.PowellH(),
    "merged": osc.MergedDoubleDamping(),
    "b0": osc.PowellB0(),
    "none": osc.NoDamping(),
}


@dataclass(frozen=True)
class Inflated(osc.BFGS):
    """H is blown up at one step, behind everybody's back."""

    factor: float = 1e4

    def observe_step(self, state: Any, *args: Any) -> Any:
        events = super().observe_step(state, *args)
        if not hasattr(state, "seen"):
            state.seen = 0
        state.seen += 1
        if state.seen == 4:
            state.inverse.mul_(self.factor)
        return events


@dataclass(frozen=True)
class Promising(osc.NoDamping):
    """Promises a curvature that it does nothing for."""

    def curvature_floor(self, damping: float) -> float:
        return 1e3


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def runner(
    method: osc.Method | str, dtype: torch.dtype = torch.float64, **numbers: Any
) -> tuple[osc.SecondOrder, Callable[[], Tensor], nn.Module]:
    """Optimizer, closure of a fixed mini-batch, and the model."""
    model = net(dtype)
    torch.manual_seed(1)
    x, y = torch.randn(32, 7, dtype=dtype), torch.randn(32, 4, dtype=dtype)
    optimizer = osc.build(method, model, likelihood="gaussian", **numbers)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() / 32
        loss.backward()
        return loss

    return optimizer, closure, model


def with_outputs(outputs: Any) -> osc.Method:
    """K-BFGS with another factor at the outputs, unguarded."""
    base = osc.registry.method("kbfgs")
    structure = replace(base.preconditioner, outputs=outputs)
    return replace(base, preconditioner=structure, guard=osc.NoGuard(), defaults={"lr": 0.3, "damping": 0.2})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("outputs", [osc.BFGS, osc.LBFGS])
@pytest.mark.parametrize("rule", PAIRS)
def test_theorems_hold_in_training_for_every_pair_damping(rule: str, outputs: Any, dtype: torch.dtype) -> None:
    pairs = PAIRS[rule]
    factor = outputs(pairs=pairs) if outputs is osc.BFGS else outputs(memory=3, pairs=pairs)
    optimizer, closure, _ = runner(with_outputs(factor), dtype)
    with watch(optimizer, [SecantEquation(), PairCurvature(), EigenvalueBounds()]) as observed:
        for _ in range(25):
            optimizer.step(closure)
    certificate = observed.certificate()
    assert certificate.ok, certificate.summary()
    assert certificate.steps == 25
    claims = {finding.claim for finding in certificate.findings}
    assert {"|H+ y - s| relative", "s'y / s's >= c", "lambda_min(E)", "lambda_min(H)", "lambda_max(H)"} <= claims


def test_the_uniform_bounds_of_l_bfgs_hold_with_the_two_sided_test() -> None:
    factor = osc.LBFGS(memory=2, skip=osc.TwoSidedCurvatureTest(mu3=0.05))
    optimizer, closure, _ = runner(with_outputs(factor))
    memory = Memory()
    with watch(optimizer, [EigenvalueBounds()], sinks=[memory]) as observed:
        for _ in range(20):
            optimizer.step(closure)
    assert observed.certificate().ok
    full = [entry for entry in memory.readings if entry.step == 19 and "outputs" in entry.layer]
    bounds = {entry.inequality.name: entry.inequality.bound for entry in full}
    c, mu2 = 1 / (0.2**0.5 * 0.05), 0.2**0.5
    assert bounds["lambda_max(H)"] == pytest.approx(c**2 + (c**2 - 1) / (mu2 * (c - 1)))
    assert bounds["lambda_min(H)"] == pytest.approx(1 / (1 + 2 / 0.05))


def test_measured_bounds_of_l_bfgs_are_attained_by_one_pair() -> None:
    """For p = 1 and y parallel to s the store is known: H = 1/c along s, gamma across."""
    factor = osc.LBFGS(memory=1, initial=0.5)
    state = factor.init(3, torch.zeros(1, dtype=torch.float64))
    step = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    append_pairs_([state], step[None], 4.0 * step[None], torch.tensor([True]))
    low, high = store_bounds(state, 0.5, None, None).tolist()
    eigenvalues = torch.linalg.eigvalsh(factor.to_dense(state, 0.0))
    assert eigenvalues.tolist() == pytest.approx([0.25, 0.5, 0.5])
    assert low == pytest.approx(1 / (1 / 0.5 + 4.0)) and low <= float(eigenvalues[0])
    assert high == pytest.approx(0.5 + 0.25) and high >= float(eigenvalues[-1])


def test_a_corrupted_matrix_is_caught_where_it_happened() -> None:
    optimizer, closure, _ = runner(with_outputs(Inflated()))
    with watch(optimizer, [SecantEquation(), EigenvalueBounds(), PairCurvature()]) as observed:
        for _ in range(6):
            optimizer.step(closure)
    certificate = observed.certificate()
    broken = {(entry.monitor, entry.claim): entry for entry in certificate.violated}
    secant = broken["SecantEquation", "|H+ y - s| relative"]
    assert secant.first is not None and secant.first.step == 3 and "outputs" in secant.first.layer
    assert broken["EigenvalueBounds", "lambda_max(H)"].first.step == 3
    assert ("PairCurvature", "s'y / s's >= c") not in broken
    with pytest.raises(osc.NumericalError, match=r"SecantEquation.*at step 3 on layer"):
        certificate.require()


def test_what_nobody_examined_is_not_certified() -> None:
    optimizer, _, _ = runner(with_outputs(Inflated()))
    with watch(optimizer, [SecantEquation()]) as observed:
        pass
    with pytest.raises(osc.ArgumentError, match=r"nothing was examined in 0 steps by SecantEquation; attach"):
        observed.certificate().require()


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_a_matrix_that_is_not_definite_or_not_finite_is_a_violation(factor: float) -> None:
    optimizer, closure, _ = runner(replace(with_outputs(Inflated(factor=factor)), guard=osc.Backtrack()))
    with watch(optimizer, [EigenvalueBounds()]) as observed:
        for _ in range(4):
            optimizer.step(closure)
    (finding,) = [entry for entry in observed.certificate().violated if entry.claim == "lambda_min(H)"]
    assert finding.first is not None and finding.first.step == 3


def test_a_rule_that_does_not_keep_its_promise_is_caught() -> None:
    optimizer, closure, _ = runner(with_outputs(osc.BFGS(pairs=Promising())))
    with watch(optimizer, [PairCurvature()]) as observed:
        optimizer.step(closure)
    certificate = observed.certificate()
    assert not certificate.ok and "must be >= 1000" in certificate.summary()


def test_a_floor_shows_what_another_rule_would_have_corrected() -> None:
    undamped, closure, _ = runner(with_outputs(osc.BFGS(pairs=osc.NoDamping())))
    with watch(undamped, [PairCurvature(floor=50.0)]) as observed:
        for _ in range(3):
            undamped.step(closure)
    assert observed.certificate().violated


def test_descent_and_step_size_curvature_on_a_quadratic() -> None:
    """f = c/2 |theta|^2 with gradient steps: the ratio p'Hp / -g'p is lr c, and the loss shrinks by (1 - lr c)^2."""
    for lr, held in ((0.5, True), (0.9, True), (1.1, False)):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        method = osc.Method(momentum=osc.NoMomentum(), guard=osc.Backtrack(growth=1e9), defaults={"lr": lr})
        optimizer = osc.build(method, model)

        def closure(model: nn.Module = model, optimizer: osc.SecondOrder = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(1, 1, dtype=torch.float64)).square().sum()  # c = 2
            loss.backward()
            return loss

        memory = Memory()
        with watch(optimizer, [Descent(), StepSizeCurvature()], sinks=[memory]) as observed:
            optimizer.step(closure)
        found = {entry.inequality.name: entry.inequality.measured for entry in memory.readings}
        assert found["p'Hp / -g'p"] == pytest.approx(2 * lr)
        assert found["slope along the step <= 0"] == pytest.approx(-4 * lr)
        assert found["loss after the step"] == pytest.approx((1 - 2 * lr) ** 2)
        assert observed.certificate().ok == held


def test_a_relative_step_is_measured_and_violated() -> None:
    optimizer, closure, model = runner("sgdm", lr=5.0)
    before = [value.detach().clone() for value in model[0].parameters()]
    memory = Memory()
    with watch(optimizer, [RelativeStep(limit=0.01)], sinks=[memory]) as observed:
        optimizer.step(closure)
    moved = torch.cat([(new - old).flatten() for new, old in zip(model[0].parameters(), before, strict=True)])
    expected = moved.norm() / torch.cat([value.flatten() for value in before]).norm()
    assert memory.readings[0].inequality.measured == pytest.approx(expected.item())
    assert not observed.certificate().ok


@pytest.mark.parametrize("method", osc.registry.methods())
def test_watching_changes_no_run(method: str) -> None:
    plain, closure, model = runner(method)
    watched, other, twin = runner(method)
    with watch(watched, sinks=[Memory()]) as observed:
        for _ in range(4):
            assert torch.equal(plain.step(closure), watched.step(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert observed.certificate().steps == 4


def test_nothing_is_left_behind_after_close_and_copies_are_not_watched() -> None:
    optimizer, closure, _ = runner("kbfgs", lr=0.1, damping=0.3)
    observed = watch(optimizer)
    optimizer.step(closure)
    assert copy.deepcopy(optimizer).observers == [] and pickle.loads(pickle.dumps(optimizer)).observers == []
    observed.close()
    observed.close()
    optimizer.step(closure)
    assert optimizer.observers == [] and observed.certificate().steps == 1
    with pytest.raises(osc.ArgumentError, match="attached"):
        again = watch(optimizer)
        again.attach(optimizer)


def test_every_examines_only_multiples() -> None:
    optimizer, closure, _ = runner("kbfgs", lr=0.1, damping=0.3)
    memory = Memory()
    with watch(optimizer, sinks=[memory], every=3):
        for _ in range(7):
            optimizer.step(closure)
    assert {entry.step for entry in memory.readings} == {0, 3, 6}


def test_readings_are_streamed_as_json_lines(tmp_path: Path) -> None:
    optimizer, closure, _ = runner("kbfgs", lr=0.1, damping=0.3)
    file = tmp_path / "monitors.jsonl"
    memory = Memory()
    with watch(optimizer, sinks=[JsonLines(file), memory]) as observed:
        optimizer.step(closure)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [entry.as_dict() for entry in memory.readings] and len(lines) > 10
    assert json.loads(json.dumps(observed.certificate().as_dict(), allow_nan=False))["steps"] == 1


@pytest.mark.parametrize("sink", ["monitors.jsonl", JsonLines, object()])
def test_what_is_no_sink_is_refused_before_anything_is_attached(sink: Any) -> None:
    optimizer, _, _ = runner("kbfgs", lr=0.1, damping=0.3)
    with pytest.raises(osc.ArgumentError, match="a sink has methods"):
        watch(optimizer, sinks=[sink])
    assert not optimizer.observers


def test_json_lines_need_their_folder(tmp_path: Path) -> None:
    with pytest.raises(osc.ArgumentError, match="there is no folder"):
        JsonLines(tmp_path / "nowhere" / "monitors.jsonl")


@pytest.mark.parametrize(("measured", "said"), [(1.0, False), (0.5 - 1e-9, True), (0.4, False)])
def test_a_margin_that_holds_up_to_rounding_says_so(measured: float, said: bool) -> None:
    reading = Reading(0, "PairCurvature", "0", Inequality("c", measured, 0.5, ">=", tolerance=1e-6))
    found: dict[tuple[str, str], Finding] = {}
    gather(found, reading)
    (finding,) = found.values()
    assert ("(up to rounding)" in finding.describe()) == said and finding.held == (measured != 0.4)


def test_skipped_steps_are_counted_and_not_examined() -> None:
    optimizer, _, model = runner("sgdm", on_nonfinite="skip")

    def broken() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.full((2, 7), float("nan"), dtype=torch.float64)).sum()
        loss.backward()
        return loss

    with watch(optimizer) as observed:
        optimizer.step(broken)
    certificate = observed.certificate()
    assert certificate.skipped == 1 and certificate.steps == 0 and "1 steps were skipped" in certificate.summary()


def test_tensorboard_is_asked_for_only_when_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError("not here")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(osc.ArgumentError, match="needs the package tensorboard"):
        TensorBoard(tmp_path)


def test_readings_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the two verbs of torch's SummaryWriter that are used."""
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            assert purge_step is None
            calls.append(("open", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, step))

        def close(self) -> None:
            calls.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    optimizer, closure, _ = runner("kbfgs", lr=0.1, damping=0.3)
    with watch(optimizer, [PairCurvature()], sinks=[TensorBoard(tmp_path)]):
        optimizer.step(closure)
    name = "PairCurvature/s'y / s's >= c/0 inputs"
    assert calls[0] == ("open", str(tmp_path)) and calls[1:3] == [(name, 0), (f"{name}/bound", 0)]
    assert calls[-1] == ("close",)


def test_what_is_no_monitor_or_optimizer_is_refused() -> None:
    optimizer, _, model = runner("sgdm")
    with pytest.raises(osc.ArgumentError, match="parentheses"):
        watch(optimizer, [SecantEquation])  # type: ignore[list-item]
    with pytest.raises(osc.ArgumentError, match=r"osculate\.build"):
        watch(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(osc.ArgumentError, match="every"):
        watch(optimizer, every=0)
    assert optimizer.observers == []
