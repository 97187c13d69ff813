"""Nothing grows: 500 steps, and evaluation passes that nobody follows with a backward."""

from __future__ import annotations

import gc
import itertools

import pytest
from small_nets import batches, build, closure_of, cross_entropy, data, make, train
from torch import Tensor, nn


def belongs(value: object) -> bool:
    """Whether torch or osculate made it; what the test runner's own threads make does not count."""
    module = getattr(value if type(value).__name__ == "function" else type(value), "__module__", "")
    return isinstance(module, str) and module.startswith(("torch", "osculate"))


def live() -> tuple[int, int]:
    """Number of objects of torch and osculate, closures included, and bytes of all live tensors."""
    gc.collect()
    objects = [value for value in gc.get_objects() if belongs(value)]
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in objects
        if type(value) in (Tensor, nn.Parameter)
    }
    return len(objects), sum(storages.values())


REPRESENTATIVES = ["adam", "kfac", "kbfgs", "joint-sgdm"]
"""First order, sampled statistics with inverses, looking back, sampled step sizes."""


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_five_hundred_steps_leave_nothing_behind(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    x, y = data()
    closure = closure_of(optimizer, model, x, y)
    seen = []
    for step in range(1, 501):
        optimizer.step(closure)
        if step in (200, 350, 500):
            seen.append(live())
    counts, sizes = zip(*seen, strict=True)
    grown = [later - earlier for earlier, later in itertools.pairwise(counts)]
    assert min(grown) < 50, seen  # one object per step would be 150 each time; a cache of torch is filled once
    assert sizes[2] <= sizes[1], seen


@pytest.mark.parametrize("policy", ["step skipped", "plain loop"])
def test_plain_loops_and_skipped_steps_leave_nothing_behind(policy: str) -> None:
    model = make()
    optimizer = build("kfac", model, statistics="empirical", on_nonfinite="skip")
    x, y = data()
    seen = []
    for step in range(1, 201):
        loss = cross_entropy(model(x), y) * (float("nan") if policy == "step skipped" else 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
        if step in (100, 200):
            seen.append(live())
    assert abs(seen[1][0] - seen[0][0]) <= 60 and seen[1][1] <= seen[0][1], seen


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "lw-sgdm", "joint-sgdm", "mbf"])
def test_evaluation_passes_with_gradients_enabled_keep_nothing(name: str) -> None:
    """Nobody wrote torch.no_grad(): the layers' inputs go with the graph, not with the next step."""
    model = make()
    optimizer = build(name, model)
    x, _ = data(samples=256)
    seen = []
    for step in range(1, 201):
        model(x)
        if step in (100, 200):
            seen.append(live())
    assert seen[1][1] <= seen[0][1] and abs(seen[1][0] - seen[0][0]) <= 60, seen
    model(x).sum().backward()
    optimizer.zero_grad()
    assert live()[1] <= seen[1][1]


def test_optimizers_that_are_gone_leave_no_tensors() -> None:
    model = make()
    seen = []
    for _ in range(3):
        for name in REPRESENTATIVES:
            train(build(name, model), model, batches(count=2))
            model.zero_grad()
        seen.append(live()[1])
    assert seen[2] <= seen[1], seen
