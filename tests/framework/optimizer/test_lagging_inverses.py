"""Inverses that are computed beside the following steps: late by the schedule's lag, whatever the timing."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
from osculate.framework.methods import registry
from osculate.framework.methods.expressions import with_parts
from osculate.framework.optimizer import lagging
from osculate.preconditioners.operations import compute_many
from osculate.preconditioners.structures.reference import DenseReference
from small_nets import batches, build, data, differences, everything, flat, make, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

EVERY, LAG, STEPS = 5, 3, 19
"""Due at 5, 10 and 15 behind eager steps; used first at 8, 13 and 18."""
SETTINGS: dict[str, dict[str, Any]] = {
    "kfac": {"inverses_every": EVERY, "eager": 2},
    "kfac-conv": {"inverses_every": EVERY, "eager": 2, "statistics_every": 2},
    "ekfac": {"basis_every": EVERY, "eager": 2},
    "ngd-exact": {"inverses_every": EVERY},
    "shampoo": {"inverses_every": EVERY, "eager": 2},
    "tnt": {"inverses_every": EVERY, "eager": 2},
    "soap": {"basis_every": EVERY},
    "mbf": {"inverses_every": EVERY},
    "mbf-released": {"inverses_every": EVERY},
    "joint-kfac": {"inverses_every": EVERY, "eager": 2},
    "joint-kfac-momentum": {"inverses_every": EVERY, "eager": 2},
    "joint-kfac-noise-aware": {"inverses_every": EVERY, "eager": 2},
}


def late(name: str = "kfac", model: nn.Module | None = None, lag: int = LAG, **options: Any) -> osc.SecondOrder:
    return build(name, make() if model is None else model, **SETTINGS[name], lag=lag, **options)


def whole(optimizer: osc.SecondOrder) -> Any:
    return everything(optimizer.model), copy.deepcopy(optimizer.state_dict())


def go(optimizer: osc.SecondOrder, first: int, last: int, net: str = "mlp") -> list[int]:
    """Steps ``first`` to ``last - 1`` of one sequence of mini-batches; how many matrices each has installed."""
    found = []
    for pair in batches(net, last)[first:]:
        train(optimizer, optimizer.model, [pair])
        found.append(optimizer.last_report.refreshes)
    return found


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (osc.Schedule(1, 4, lag=3), {4, 8, 12}),
        (osc.Schedule(1, 4, eager=4, lag=1), {8, 12}),
        (osc.Schedule(2, 5, eager=7, lag=2), {10}),
        (osc.Schedule(1, 4), set()),
        (osc.Schedule(1, None, lag=2), set()),
    ],
)
def test_what_is_eager_or_the_start_never_lags(schedule: osc.Schedule, steps: set[int]) -> None:
    assert {step for step in range(14) if schedule.lags(step)} == steps
    assert all(schedule.inverses_due(step) for step in steps)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inverses": 4, "lag": 4}, "lag must be >= 0 and less than the inverses interval, got 4 of 4"),
        ({"inverses": 4, "lag": -1}, "lag must be >= 0"),
        ({"lag": 1}, "got 1 of 1"),
        ({"inverses": 4, "lag": 1.5}, "lag of Schedule must be"),
    ],
)
def test_a_lag_must_end_before_the_next_inverses(values: Mapping[str, Any], words: str) -> None:
    with pytest.raises(osc.ArgumentError, match=words):
        osc.Schedule(**values)


def test_methods_refuse_a_lag_of_their_whole_interval() -> None:
    with pytest.raises(osc.ArgumentError, match="less than the inverses interval"):
        build("kfac", make(), inverses_every=3, lag=3)


def test_every_method_with_an_interval_has_the_option() -> None:
    for name, entry in registry.methods().items():
        has = {"inverses_every", "basis_every"} & set(entry.options)
        assert bool(has) == ("lag" in entry.options) == (name in SETTINGS), name


# -- the numbers ------------------------------------------------------------------------------------------------------


def slow_kfac(
    weights: list[np.ndarray], steps: Sequence[tuple[np.ndarray, np.ndarray]], damping: Sequence[float], lag: int
) -> list[np.ndarray]:
    """K-FAC with true labels on a tanh network of two layers, [W | b], whose inverses are late; softmax at the end."""
    moments = [[np.zeros((w.shape[i], w.shape[i])) for i in (1, 0)] for w in weights]
    inverses: list[list[np.ndarray]] = [[], []]
    momenta, waiting = [np.zeros_like(w) for w in weights], {}
    for k, (x, y) in enumerate(steps):
        weight = 1 - 0.8 ** (k + 1)  # averages without the bias of their start
        inner = np.hstack([x, np.ones((len(x), 1))])
        hidden = np.hstack([np.tanh(inner @ weights[0].T), np.ones((len(x), 1))])
        scores = hidden @ weights[1].T
        probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        upper = probabilities - np.eye(weights[1].shape[0])[y]
        lower = (upper @ weights[1][:, :-1]) * (1 - hidden[:, :-1] ** 2)
        for l, (a, g) in enumerate(((inner, lower), (hidden, upper))):
            momenta[l] = 0.9 * momenta[l] + 0.1 * g.T @ a / len(x)
            for matrix, rows in zip(moments[l], (a, g), strict=True):
                matrix *= 1 - 0.2 / weight
                matrix += 0.2 / weight * rows.T @ rows / len(x)
        if k <= 2 or k % EVERY == 0:
            shift = np.sqrt(damping[k])
            made = [[np.linalg.inv(m + shift * np.eye(len(m))) for m in pair] for pair in moments]
            waiting[k if k <= 2 else k + lag] = made
        inverses = waiting.get(k, inverses)
        for l, pair in enumerate(inverses):
            weights[l] = weights[l] - 0.3 * pair[1] @ momenta[l] @ pair[0]
    return weights


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
@pytest.mark.parametrize("varying", [False, True])
def test_kfac_is_its_slow_transcription(lag: int, varying: bool) -> None:
    """Damping too is that of the step at which inverses were due."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    layers = [model[0], model[2]]
    start = [torch.cat([m.weight, m.bias.unsqueeze(1)], 1).detach().numpy().copy() for m in layers]
    generator = torch.Generator().manual_seed(4)
    steps = [
        (torch.randn(9, 4, generator=generator).double(), torch.randint(0, 3, (9,), generator=generator))
        for _ in range(STEPS)
    ]
    damping = [0.1 * (1 + varying * 0.3 * (k % 7)) for k in range(STEPS)]
    optimizer = osc.build(
        "kfac", model, lr=0.3, damping=0.1, statistics="empirical", statistics_decay=0.8, limit=float("inf"),
        inverses_every=EVERY, eager=2, lag=lag,
    )  # fmt: skip
    for value, (x, y) in zip(damping, steps, strict=True):
        optimizer.param_groups[0]["damping"] = value
        train(optimizer, model, [(x, y)])
    expected = slow_kfac(start, [(x.numpy(), y.numpy()) for x, y in steps], damping, lag)
    for module, value in zip(layers, expected, strict=True):
        found = torch.cat([module.weight, module.bias.unsqueeze(1)], 1).detach().numpy()
        assert np.abs(found - value).max() < 1e-12


def by_hand(name: str, net: str) -> osc.SecondOrder:
    """The same with inverses computed between the steps, and installed between later ones."""
    method = registry.method(name, **SETTINGS[name])
    eager = 1 if name == "soap" else EVERY if name.startswith("mbf") else SETTINGS[name].get("eager", 0)
    optimizer = osc.build(with_parts(method, {"*.schedule.inverses": "None"}), make(net), likelihood="categorical")
    before = name == "soap"  # its matrices take in the gradient after the refresh
    waiting: dict[int, list[tuple[Any, Any]]] = {}

    def compute(step: int) -> None:
        optimizer._step, now = step, optimizer._step
        if step > eager and step % EVERY == 0:
            for block in optimizer.blocks:
                if asked := block.part.matrices(block.state, optimizer.sides(block)):
                    waiting.setdefault(step + LAG, []).append((block, compute_many(asked)))
        optimizer._step = now

    for step, pair in enumerate(batches(net, STEPS)):
        for block, results in waiting.pop(step, ()):
            block.part.install(block.state, results)
        if before:
            compute(step)
        train(optimizer, optimizer.model, [pair])
        if not before:
            compute(step)
    return optimizer


@pytest.mark.parametrize("net", ["mlp", "called-twice"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_installs_what_was_due_so_many_steps_ago(name: str, net: str) -> None:
    optimizer = late(name, make(net))
    go(optimizer, 0, STEPS, net)
    other = by_hand(name, net)
    assert (flat(optimizer.model) - flat(other.model)).abs().max() < 1e-12
    once = build(name, make(net), **SETTINGS[name])
    go(once, 0, STEPS, net)
    assert (flat(optimizer.model) - flat(once.model)).abs().max() > 1e-9  # a lag is not nothing


@pytest.mark.parametrize("name", ["kfac", "ekfac", "soap", "mbf"])
@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_timing_decides_nothing(name: str, delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is slow, and one that is done before the step goes on, end bitwise alike."""
    results = []
    for changed in (False, True):
        optimizer = late(name)
        if changed:
            real, submit = lagging.compute_many, lagging._Worker.begin

            def slow(requests: Any, real: Callable[..., Any] = real) -> Any:
                time.sleep(delay)
                return real(requests)

            def begin(self: Any, requests: Any, submit: Callable[..., Any] = submit) -> Any:
                future = submit(self, requests)
                if not delay:
                    future.result()
                return future

            monkeypatch.setattr(lagging, "compute_many", slow)
            monkeypatch.setattr(lagging._Worker, "begin", begin)
        go(optimizer, 0, STEPS)
        results.append(whole(optimizer))
    assert differences(*results) == []


def test_reports_count_what_is_installed() -> None:
    found = go(late(), 0, STEPS)
    once = go(late(lag=0), 0, STEPS)
    assert [step for step, count in enumerate(found) if count] == [0, 1, 2, 8, 13, 18]
    assert [step for step, count in enumerate(once) if count] == [0, 1, 2, 5, 10, 15]
    assert sum(found) == sum(once)


def test_rescues_are_those_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lagging.compute_many
    monkeypatch.setattr(lagging, "compute_many", lambda asked: [vary(entry, rescues=2) for entry in real(asked)])
    optimizer = late()
    go(optimizer, 0, 8)
    assert optimizer.last_report.rescues == 0
    assert go(optimizer, 8, 9) == [6] and optimizer.last_report.rescues == 12


def vary(entry: Any, **values: Any) -> Any:
    return type(entry)(**{**vars(entry), **values})


def test_without_a_lag_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that were there already may end meanwhile, so those that start are counted, not those that are alive."""
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread.name), start(thread))[1])
    optimizer = late(lag=0)
    go(optimizer, 0, STEPS)
    assert not optimizer.lagging.pending and started == []
    late_one = late()
    go(late_one, 0, STEPS)
    late_one.close()
    assert len(started) == 1


def test_a_lag_computes_in_one_thread_that_ends_with_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    real = lagging.compute_many

    def noting(requests: Any) -> Any:
        seen.add(threading.current_thread())
        return real(requests)

    monkeypatch.setattr(lagging, "compute_many", noting)
    optimizer = late()
    go(optimizer, 0, STEPS)
    assert len(seen) == 1 and threading.main_thread() not in seen
    optimizer.close()
    assert not any(thread.is_alive() for thread in seen)


def test_structures_by_layer_lag_each_by_its_own_number() -> None:
    """Two schedules whose inverses overlap in one thread."""
    factor = osc.Covariance()
    table = {
        "0": osc.Kronecker(factor, factor, osc.Schedule(1, 4, lag=3)),
        "2": osc.Kronecker(factor, factor, osc.Schedule(1, 5, lag=1)),
        "4": osc.Kronecker(factor, factor, osc.Schedule(1, 6)),
    }
    method = osc.Method(
        osc.ByLayer(table), osc.SampledFisher(), damping=osc.Split(), defaults={"lr": 0.1, "damping": 0.1}
    )
    optimizer = osc.build(method, make(), likelihood="categorical")
    found = go(optimizer, 0, 13)
    assert found == [6, 0, 0, 0, 0, 0, 4, 2, 0, 0, 0, 4, 2]
    assert {key: entry.lands for key, entry in optimizer.lagging.pending.items()} == {"0": 15}


# -- steps that are not taken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kfac", "ekfac", "shampoo", "joint-kfac"])
@pytest.mark.parametrize("at", [5, 6, 8, 9])
def test_a_skipped_step_keeps_what_is_pending(name: str, at: int) -> None:
    straight, skipping = late(name), late(name, on_nonfinite="skip")
    go(straight, 0, STEPS)
    go(skipping, 0, at)
    x, y = data()
    train(skipping, skipping.model, [(x * float("nan"), y)])
    assert skipping.skipped_steps == 1
    go(skipping, at, STEPS)
    skipping.skipped_steps, skipping.gradient_evaluations = 0, straight.gradient_evaluations
    assert differences(whole(straight), whole(skipping)) == []


@pytest.mark.parametrize("name", ["kfac", "mbf", "joint-kfac-momentum"])
@pytest.mark.parametrize("at", [5, 6, 8, 10, 13])
def test_a_step_that_is_taken_back_gives_back_what_it_installed(name: str, at: int) -> None:
    """At the step that begins, between, at the one that installs: nothing is left of the attempt."""
    straight, undone = late(name), late(name)
    go(straight, 0, STEPS)
    go(undone, 0, at)
    before, real = whole(undone), undone._propose

    def broken(batch: Any) -> Any:
        real(batch)
        raise osc.NumericalError("a step size is not finite")

    undone._propose = broken  # type: ignore[method-assign]
    with pytest.raises(osc.NumericalError):
        go(undone, at, at + 1)
    undone._propose = real  # type: ignore[method-assign]
    undone.skipped_steps, undone.gradient_evaluations = 0, before[1]["progress"]["gradient_evaluations"]
    assert differences(before, whole(undone)) == []
    go(undone, at, STEPS)
    assert differences(whole(straight), whole(undone)) == []


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
def test_what_the_thread_raises_is_raised_where_it_is_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written; whoever goes on nevertheless has the inverses computed anew."""
    straight, hit = late(name), late(name)
    go(straight, 0, STEPS)
    real, calls = lagging.compute_many, []

    def failing(requests: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no room for this matrix")
        return real(requests)

    monkeypatch.setattr(lagging, "compute_many", failing)
    go(hit, 0, 8)
    assert len(calls) == 1
    state = copy.deepcopy([block.to_dict() for block in hit.blocks])
    before = everything(hit.model)
    evaluations = hit.gradient_evaluations
    with pytest.raises(MemoryError, match="no room for this matrix"):
        go(hit, 8, 9)
    assert differences(before, everything(hit.model)) == []
    assert differences(state, [block.to_dict() for block in hit.blocks]) == []
    hit.gradient_evaluations = evaluations
    go(hit, 8, STEPS)
    assert len(calls) == 4 and differences(whole(straight), whole(hit)) == []


# -- states and copies ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pickle", "deepcopy", "state"])
def continued(request: pytest.FixtureRequest) -> Iterator[Callable[[osc.SecondOrder, str], osc.SecondOrder]]:
    def continue_(optimizer: osc.SecondOrder, name: str) -> osc.SecondOrder:
        if request.param == "pickle":
            copied: osc.SecondOrder = pickle.loads(pickle.dumps(optimizer))
            return copied
        if request.param == "deepcopy":
            return copy.deepcopy(optimizer)
        buffer = io.BytesIO()
        torch.save((optimizer.state_dict(), optimizer.model.state_dict()), buffer)
        buffer.seek(0)
        state, values = torch.load(buffer, weights_only=True)
        other = late(name, make(seed=7))
        other.model.load_state_dict(values)
        other.load_state_dict(state)
        return other

    yield continue_


@pytest.mark.parametrize("name", ["kfac", "ekfac", "soap", "mbf", "joint-kfac-momentum"])
@pytest.mark.parametrize("at", [5, 6, 8, 9])
def test_a_run_is_continued_bit_for_bit(name: str, at: int, continued: Callable[..., osc.SecondOrder]) -> None:
    at += EVERY * (name == "mbf")  # eager until step 5
    optimizer = late(name)
    go(optimizer, 0, at)
    other = continued(optimizer, name)
    assert bool(other.lagging.pending) == (at % EVERY in (1, 2, 3))
    assert differences(whole(optimizer), whole(other)) == []
    assert go(optimizer, at, STEPS) == go(other, at, STEPS)
    assert differences(whole(optimizer), whole(other)) == []


def test_a_state_says_what_is_pending_only_while_something_is() -> None:
    optimizer, once = late(), late(lag=0)
    for at in range(STEPS):
        go(optimizer, at, at + 1), go(once, at, at + 1)
        waits = at in (5, 6, 7, 10, 11, 12, 15, 16, 17)
        states = optimizer.state_dict()["state"]
        assert {key: "pending" in value for key, value in states.items()} == dict.fromkeys(states, waits)
        if not waits:
            assert set(differences(states, once.state_dict()["state"])) <= set(leaves_of(states))
            once.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # either way
            optimizer.load_state_dict(copy.deepcopy(once.state_dict()))


def leaves_of(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, Mapping | list | tuple):
        return [prefix]
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [path for key, entry in items for path in leaves_of(entry, f"{prefix}/{key}")]


def test_loading_drops_what_was_pending() -> None:
    optimizer = late()
    go(optimizer, 0, 4)
    early = copy.deepcopy((optimizer.state_dict(), optimizer.model.state_dict()))
    go(optimizer, 4, 7)
    late_state = copy.deepcopy((optimizer.state_dict(), optimizer.model.state_dict()))
    straight = go(optimizer, 7, STEPS), whole(optimizer)
    for first, (state, values) in ((4, early), (7, late_state), (4, early)):
        go(optimizer, STEPS, STEPS + 3)  # 20 was due
        assert optimizer.lagging.pending
        optimizer.model.load_state_dict(values)
        optimizer.load_state_dict(state)
        assert bool(optimizer.lagging.pending) == (first == 7)
        go(optimizer, first, STEPS)
        assert differences(straight[1], whole(optimizer)) == []


def test_a_saved_state_is_not_written_by_going_on() -> None:
    optimizer = late()
    go(optimizer, 0, 7)
    state = optimizer.state_dict()
    pending = {key: value["pending"] for key, value in state["state"].items()}
    before = copy.deepcopy(pending)
    other = late()
    other.load_state_dict(copy.deepcopy(state))
    other.load_state_dict(state)
    go(other, 7, STEPS), go(optimizer, 7, STEPS)
    assert differences(before, pending) == []


def test_a_state_goes_on_with_another_lag() -> None:
    """What was begun lands where it was to; a newer inverse is never overwritten by an older one."""
    optimizer = late(lag=4)
    go(optimizer, 0, 6)
    state = copy.deepcopy(optimizer.state_dict())
    once = late(lag=0)
    once.load_state_dict(copy.deepcopy(state))
    found = go(once, 6, 12)
    assert [6 + index for index, count in enumerate(found) if count] == [9, 10]
    often = build("kfac", make(), inverses_every=1, eager=2)
    often.load_state_dict(copy.deepcopy(state))
    assert go(often, 6, 12) == [6] * 6 and not often.lagging.pending


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda saved: saved.pop("lands"), "damaged: the pending inverses of '0'"),
        (lambda saved: saved["results"].pop(), "pending inverses of '0' .* have shapes"),
        (lambda saved: saved["results"][0].update(value=torch.zeros(2, 2)), "have shapes"),
        (lambda saved: saved["results"][0].update(colour=1), "damaged"),
    ],
)
def test_pending_inverses_that_do_not_fit_are_refused_before_anything_is_written(
    damage: Callable[[Any], Any], words: str
) -> None:
    optimizer, other = late(), late(model=make(seed=3))
    go(optimizer, 0, 6), go(other, 0, 7)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["state"]["0"]["pending"])
    before = whole(other)
    with pytest.raises(osc.ArgumentError, match=words):
        other.load_state_dict(state)
    assert differences(before, whole(other)) == []


def test_a_checkpoint_by_parameter_is_refused_while_something_is_pending() -> None:
    optimizer = late()
    go(optimizer, 0, 6)
    with pytest.raises(osc.ArgumentError, match=r"first used at step 8 \(lag\).*save after step 8"):
        get_optimizer_state_dict(optimizer.model, optimizer)
    go(optimizer, 6, 9)
    saved = copy.deepcopy(get_optimizer_state_dict(optimizer.model, optimizer))
    other = late(model=copy.deepcopy(optimizer.model))
    go(other, 0, 6)
    other.model.load_state_dict(optimizer.model.state_dict())
    set_optimizer_state_dict(other.model, other, saved)  # drops what is pending there
    assert differences(whole(optimizer), whole(other)) == []


@pytest.mark.parametrize("at", [6, 8])
def test_a_group_that_joins_leaves_what_is_pending(at: int) -> None:
    """The new layer's schedule starts at zero, and lags by itself."""
    model = make()
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    optimizer = late(model=model)
    go(optimizer, 0, at)
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})  # type: ignore[index]
    found = go(optimizer, at, at + 10)
    own, joined = (8, 13), (at, at + 1, at + 2, at + 8)
    expected = [4 * ((step in own) and step >= at) + 2 * (step in joined) for step in range(at, at + 10)]
    assert found == expected


def test_a_closed_optimizer_still_tells_its_state() -> None:
    optimizer, straight = late(), late()
    go(optimizer, 0, 7), go(straight, 0, 7)
    optimizer.close()
    other = late()
    other.model.load_state_dict(optimizer.model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    go(other, 7, STEPS), go(straight, 7, STEPS)
    assert differences(whole(straight), whole(other)) == []


# -- what cannot lag --------------------------------------------------------------------------------------------------


def test_structures_that_learn_from_every_step_are_refused() -> None:
    structure = osc.Kronecker(osc.HessianActionBFGS(), osc.BFGS(), osc.Schedule(1, 4, first=1, lag=2))
    method = osc.Method(
        structure, osc.SecantPairs(), damping=osc.ConstantDamping(), defaults={"lr": 0.1, "damping": 0.3}
    )
    with pytest.raises(osc.CompatibilityError, match=r"Kronecker on '0' learns from every step.*lag=2.*take lag=0"):
        osc.build(method, make())


def test_the_dense_reference_of_a_lag_is_refused() -> None:
    with pytest.raises(osc.CompatibilityError, match="reference of the structure with lag=0"):
        DenseReference(osc.Dense(schedule=osc.Schedule(1, 4, lag=1)))


def test_bases_of_nothing_are_not_installed_late() -> None:
    """A layer that is called for the first time between the step at which its basis is due and the one that has it."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rarely, self.open = nn.Linear(6, 3), nn.Linear(6, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.always(x) + (self.rarely(x) if self.open else 0.0)

    torch.manual_seed(0)
    model = Sometimes().double()
    optimizer = late("ekfac", model)
    fresh = {block.key: block.state for block in optimizer.blocks}["rarely"]
    for step, pair in enumerate(batches(count=14)):
        model.open = step >= 6
        train(optimizer, model, [pair])
        assert fresh.renewals == int(step >= 13)  # due at 10
