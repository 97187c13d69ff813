"""Inequalities, evidence and verdicts: known margins, numbers that are none, controls that pass."""

import math

import pytest
import torch
from osculate.analysis import (
    THEOREMS,
    Control,
    Draws,
    Evidence,
    Inequality,
    Setting,
    Theorem,
    agreement,
    each,
    eigenvalues,
    find_theorems,
    verify,
    worst,
)
from osculate.errors import ArgumentError, UnknownNameError


@pytest.mark.parametrize(
    ("measured", "bound", "direction", "margin", "holds"),
    [
        (1.0, 2.0, "<=", 0.5, True),
        (3.0, 2.0, "<=", -0.5, False),
        (3.0, 2.0, ">=", 0.5, True),
        (-1.0, 0.0, "<=", 1.0, True),
        (1e-12, 0.0, "<=", -1e-12, True),  # within the tolerance
        (5.0, math.inf, "<=", math.inf, True),
        (5.0, -math.inf, "<=", -math.inf, False),
        (math.nan, 1.0, "<=", -math.inf, False),
        (1.0, math.nan, "<=", -math.inf, False),
        (math.inf, math.inf, "<=", -math.inf, False),
        (-math.inf, 1.0, "<=", math.inf, False),
    ],
)
def test_margin_and_verdict_of_an_inequality(
    measured: float, bound: float, direction: str, margin: float, holds: bool
) -> None:
    entry = Inequality("x", measured, bound, direction)  # type: ignore[arg-type]
    assert entry.margin == margin and entry.holds is holds


def test_worst_takes_the_smallest_relative_margin() -> None:
    entry = worst("x", torch.tensor([1.0, 90.0, 5.0]), torch.tensor([2.0, 100.0, 50.0]))
    assert (entry.measured, entry.bound, entry.instances) == (90.0, 100.0, 3)
    assert worst("x", [1.0, 4.0], 2.0, ">=").measured == 1.0
    assert worst("x", [0.0, -1.0], [0.0, 3.0]).measured == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_worst_lets_no_number_hide(bad: float) -> None:
    assert not worst("x", [0.0, bad, 0.5], 1.0).holds
    assert not worst("x", [0.0, 0.5], [1.0, math.nan]).holds


def test_a_claim_about_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no instance"):
        worst("x", torch.zeros(0), 1.0)


def test_agreement_is_relative_and_sees_shapes() -> None:
    expected = torch.tensor([[1.0, 100.0], [1.0, 1.0]])
    found = expected + torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert agreement("x", found, expected, 0.02).measured == pytest.approx(0.01)
    assert not agreement("x", found, expected, 0.001).holds
    assert not agreement("x", found[:, :1], expected, 1.0).holds


def theorem(claim: Evidence, *controls: Evidence) -> Theorem:
    first, *rest = controls
    further = tuple(Control(f"wrong {index}", lambda setting, e=e: e) for index, e in enumerate(rest))  # type: ignore[misc]
    return Theorem("T0", "x", "x", "ours", lambda setting: claim, lambda setting: first, "wrong", further)


GOOD = Evidence((Inequality("a", 0.5, 1.0), Inequality("b", 0.9, 1.0)))
BAD = Evidence((Inequality("a", 0.5, 1.0), Inequality("b", 2.0, 1.0)))
NOWHERE = Evidence((Inequality("a", 2.0, 1.0),), (Inequality("h", 2.0, 1.0),))


def test_verdicts() -> None:
    held = verify(theorem(GOOD, BAD, NOWHERE), Setting())
    assert held.ok and held.status == "held" and held.control_fails and held.evidence.closest.name == "b"
    assert verify(theorem(BAD, BAD), Setting()).status == "violated"
    assert verify(theorem(NOWHERE, BAD), Setting()).status == "assumption not met"
    for controls in ((GOOD,), (BAD, GOOD)):
        passing = verify(theorem(GOOD, *controls), Setting())
        assert not passing.control_fails and not passing.ok


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"widths": (0,)}, {"widths": (3, -1)}])
def test_settings_are_checked(arguments: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        Setting(**arguments)  # type: ignore[arg-type]


def test_theorems_are_found_by_name() -> None:
    assert [entry.name for entry in find_theorems(("t5", "T2", "T2"))] == ["T2", "T5"]
    assert find_theorems() == tuple(THEOREMS.values())
    with pytest.raises(UnknownNameError, match="did you mean 'T1"):
        find_theorems(("T10O",))


def test_draws_depend_on_seed_and_stream_only() -> None:
    first, second = (Draws(Setting(), 3).normal(4) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float64
    assert not torch.equal(first, Draws(Setting(), 4).normal(4))
    assert not torch.equal(first, Draws(Setting(1), 3).normal(4))
    matrices = Draws(Setting(), 5).positive_definite(50, 3, 2.0)
    values = eigenvalues(matrices)
    assert bool((values[:, 0] > 0).all()) and bool((values[:, -1] / values[:, 0] <= 101).all())


def test_eigenvalues_of_what_is_not_finite_are_infinite() -> None:
    matrices = torch.stack([torch.eye(2, dtype=torch.float64), torch.full((2, 2), math.nan, dtype=torch.float64)])
    assert eigenvalues(matrices).tolist() == [[1.0, 1.0], [math.inf, math.inf]]


def test_each_is_a_loop() -> None:
    values = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(each(lambda row: torch.dot(row, row), values), (values * values).sum(1))
