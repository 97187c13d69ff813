"""How many operations a step asks of its device: the bounds of ten methods, and that the counting is right."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from osculate.errors import ArgumentError
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs import launches
from osculate.experiments.runs.launches import Launches, MethodLaunches, count_launches, counting
from osculate.framework.methods import registry
from torch import nn

# Upper bounds per method, (update, in passes, synchronisations, host tensors) of a quiet step and of a renewing one.
# Whoever makes a step leaner lowers its line; nobody raises one without a reason in the commit.
BOUNDS: dict[str, tuple[tuple[int, int, int, int] | None, tuple[int, int, int, int] | None]] = {
    "sgdm": ((19, 52, 1, 0), None),
    "adam": ((25, 52, 1, 0), None),
    # mbf, kfac, kbfgs and kbfgs-l bound their step by default: norms and slopes of all layers, and on the CPU reading
    # the step sizes. Their published forms below, which do not, keep the bounds that they had.
    "mbf": ((94, 52, 2, 0), (141, 52, 4, 0)),
    "kfac": ((95, 74, 2, 0), (169, 74, 3, 0)),
    "lw-sgdm": ((120, 74, 2, 0), None),
    "muon": ((117, 52, 1, 0), None),  # 109 and the casts to bfloat16 where there are units for it
    "joint-kfac": ((159, 74, 2, 0), (233, 74, 3, 0)),
    "kbfgs": ((279, 123, 3, 0), None),
    "kbfgs-l": ((338, 123, 3, 0), None),
    "soap": ((165, 52, 1, 0), (470, 52, 2, 0)),
}


@pytest.mark.parametrize("method", BOUNDS)
def test_steps_stay_within_their_bounds(method: str) -> None:
    (found,) = count_launches([method])
    for kind, bound in zip(("quiet", "renewing"), BOUNDS[method], strict=True):
        counts = getattr(found, kind)
        assert (counts is None) == (bound is None), f"{method}: {kind} steps: {counts}"
        if counts is not None and bound is not None:
            limit = Launches(*bound)
            assert counts | limit == limit, f"{method}, {kind}: {counts} beyond {limit}; found {found}"


@pytest.mark.parametrize(
    ("name", "options", "quiet", "renewing"),
    [
        ("mbf", {"units": "absolute", "limit": math.inf}, (51, 52, 1, 0), (89, 52, 2, 0)),
        ("mbf", {"limit": math.inf}, (51, 52, 1, 0), (98, 52, 3, 0)),  # units: one read of all layers' means
        ("kfac", {"limit": math.inf}, (59, 74, 1, 0), (133, 74, 2, 0)),
        ("kbfgs", {"limit": math.inf}, (249, 123, 2, 0), None),
        ("kbfgs-l", {"limit": math.inf}, (306, 123, 2, 0), None),
    ],
)
def test_steps_without_a_bound(
    name: str,
    options: dict[str, Any],
    quiet: tuple[int, int, int, int],
    renewing: tuple[int, int, int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = replace(registry.methods()[name], factory=lambda: registry.method(name, **options))
    monkeypatch.setitem(registry._METHODS, "published", entry)
    (found,) = count_launches(["published"])
    for counts, bound in ((found.quiet, quiet), (found.renewing, renewing)):
        assert (counts is None) == (bound is None)
        if counts is not None and bound is not None:
            limit = Launches(*bound)
            assert counts | limit == limit, f"{counts} beyond {limit}"


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda a: a + 1, Launches(1, 0, 0, 0)),
        (lambda a: a.T.reshape(2, 8)[0].detach(), Launches(1, 0, 0, 0)),  # the transpose has to be copied
        (lambda a: a.view(16)[3:], Launches(0, 0, 0, 0)),
        (lambda a: a.new_empty(3), Launches(0, 0, 0, 0)),
        (lambda a: float(a[0, 0]), Launches(0, 0, 1, 0)),
        (lambda a: bool((a > 0).all()), Launches(2, 0, 1, 0)),
        (lambda a: a.tolist(), Launches(0, 0, 1, 0)),
        (lambda a: a[a > 0], Launches(2, 0, 1, 0)),
        (lambda a: torch.equal(a, a), Launches(1, 0, 1, 0)),
        (lambda a: torch.linalg.eigh(a), Launches(1, 0, 1, 0)),
        (lambda a: torch.linalg.cholesky_ex(a), Launches(1, 0, 0, 0)),
        (lambda a: torch.as_tensor(0.5), Launches(0, 0, 0, 1)),
        (lambda a: torch.full((), 0.5), Launches(1, 0, 0, 0)),
        (lambda a: torch.repeat_interleave(torch.ones(3, dtype=torch.int64)), Launches(2, 0, 1, 0)),
        (lambda a: torch.repeat_interleave(torch.ones(3, dtype=torch.int64), output_size=3), Launches(2, 0, 0, 0)),
    ],
)
def test_what_is_counted(work: Callable[[torch.Tensor], object], expected: Launches) -> None:
    matrix = torch.ones(4, 4)
    with counting() as counter:
        counter.clear()
        work(matrix)
        assert counter.read() == expected


def test_the_optimizer_is_told_from_the_passes() -> None:
    layer, inputs = nn.Linear(3, 2), torch.ones(4, 3)
    with counting() as counter:
        with counter.inside_a_pass():
            layer(inputs).sum().backward()
        inside = counter.read()
        layer.weight.grad.mul_(2.0)  # type: ignore[union-attr]
        assert (inside.update, counter.read().update) == (0, 1)
        assert counter.read().passes == inside.passes > 3


def test_torchs_own_optimizers_for_comparison() -> None:
    plain, adam = count_launches(["torch-sgd", "torch-adam"])
    assert plain.renewing is None and plain.quiet is not None and adam.quiet is not None
    assert plain.quiet.synchronisations == 0 and plain.quiet.update < adam.quiet.update


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert execute(["bench", "--launches", "sgdm", "torch-sgd", "--out", str(tmp_path / "counts.json")]) == 0
    assert "host tensors" in capsys.readouterr().out
    rows = json.loads((tmp_path / "counts.json").read_text())["launches"]
    assert [row["method"] for row in rows] == ["sgdm", "torch-sgd"] and rows[0]["quiet"]["update"] > 0


def test_a_method_that_nobody_knows() -> None:
    with pytest.raises(ArgumentError, match="no method 'sgdn'"):
        count_launches(["sgdn"])


def test_without_names_all_methods_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def count(method: str, device: torch.device) -> MethodLaunches:
        counted.append(method)
        return MethodLaunches(method, Launches(), None)

    monkeypatch.setattr(launches, "_count", count)
    assert execute(["bench", "--launches"]) == 0
    assert counted == sorted(registry.methods())
