"""Every field of every registered part refuses what it cannot be, when it is given, naming field, value and way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import osculate as osc
import pytest
from osculate.framework.methods.momentum import Momentum, WeightDecay
from osculate.framework.methods.parts import KINDS
from osculate.framework.methods.registry import instances
from torch import nn

CLASSES = sorted({cls for table in KINDS.values() for cls in table.values()} | {osc.Schedule}, key=lambda c: c.__name__)


def example(cls: type) -> Any:
    return instances(cls)[0] if instances(cls) else osc.Kronecker(osc.Covariance(), osc.Covariance())


def fields() -> Iterator[Any]:
    """(part, name of a field): all of them."""
    for cls in CLASSES:
        for entry in dataclasses.fields(cls):
            yield pytest.param(example(cls), entry.name, id=f"{cls.__name__}.{entry.name}")


def test_every_part_with_fields_is_among_them() -> None:
    assert len(CLASSES) > 60 and len(list(fields())) > 80


@pytest.mark.parametrize(("part", "name"), list(fields()))
@pytest.mark.parametrize(
    "wrong", [object(), "nonsense", True, nn.Linear, -3.5], ids=["object", "str", "bool", "class", "number"]
)
def test_a_wrong_value_is_refused_with_its_name(part: Any, name: str, wrong: Any) -> None:
    with pytest.raises(osc.ArgumentError) as caught:
        dataclasses.replace(part, **{name: wrong})
    assert name in str(caught.value)


def parts_in_parts() -> Iterator[Any]:
    for cls in CLASSES:
        for entry in dataclasses.fields(cls):
            value = getattr(example(cls), entry.name)
            if dataclasses.is_dataclass(value):
                yield pytest.param(example(cls), entry.name, type(value), id=f"{cls.__name__}.{entry.name}")


@pytest.mark.parametrize(("part", "name", "cls"), list(parts_in_parts()))
def test_the_class_of_a_right_part_is_not_taken_for_it(part: Any, name: str, cls: type) -> None:
    with pytest.raises(osc.ArgumentError, match=rf"{name} of .*needs its parentheses: {cls.__name__}\(\)"):
        dataclasses.replace(part, **{name: cls})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: osc.Covariance(osc.EMA(0.9)), r"whose 'coefficients' can be called as coefficients\(weight\)"),
        (lambda: osc.Kronecker(osc.Covariance(), osc.Dense()), "with 'sides', 'operation', 'left', 'right'"),
        (lambda: osc.ByLayer({nn.Linear: osc.MiniBlock()}), "keys are each a name, e.g. 'Linear'"),
        (lambda: osc.ByLayer({"Linear": osc.MiniBlock}), "entry 'Linear' .* not the class MiniBlock"),
        (lambda: osc.ByLayer({"Linear": osc.Covariance()}), "entry 'Linear' .*Preconditioner"),
        (lambda: osc.ByLayer({}), "at least one entry"),
        (lambda: osc.Method(defaults={"lr": "fast"}), "entry 'lr' is a number"),
        (lambda: osc.Spectral(coefficients=(1.0, 2.0)), "tuple of 3"),
        (lambda: osc.Spectral(coefficients=(1.0, 2.0, float("nan"))), "each of the coefficients"),
    ],
)
def test_a_part_of_the_wrong_kind_is_told_what_it_lacks(make: Any, message: str) -> None:
    with pytest.raises(osc.ArgumentError, match=message):
        make()


class NoVerbs:
    """Of no kind."""


class OneVerb:
    """A structure, to whom one need was all."""

    needs = osc.Needs.NOTHING


def named(protocol: type) -> set[str]:
    names = {*vars(protocol), *vars(protocol).get("__annotations__", ())}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    ("field", "protocol"),
    [
        ("preconditioner", osc.Preconditioner),
        ("curvature", osc.Estimator),
        ("damping", osc.Damping),
        ("momentum", Momentum),
        ("weight_decay", WeightDecay),
        ("step_size", osc.StepSize),
        ("guard", osc.Guard),
        ("fallback", osc.Preconditioner),
        ("warm_start", osc.Estimator),
    ],
)
def test_every_verb_that_is_missing_is_named(field: str, protocol: type) -> None:
    with pytest.raises(osc.ArgumentError, match=rf"{field} of Method must be a part of the kind") as caught:
        osc.Method(**{field: NoVerbs()})
    assert all(repr(verb) in str(caught.value) for verb in named(protocol))
    with pytest.raises(osc.ArgumentError) as caught:
        osc.Method(**{field: 0.1})
    assert "with '" not in str(caught.value)


def test_verbs_of_factors_and_averages_are_named_too() -> None:
    with pytest.raises(osc.ArgumentError, match=r"kind Factor with .*'observe_step'"):
        osc.Kronecker(NoVerbs(), osc.Covariance())  # type: ignore[arg-type]
    with pytest.raises(osc.ArgumentError, match="kind Average with 'coefficients'"):
        osc.Covariance(NoVerbs())  # type: ignore[arg-type]
    with pytest.raises(osc.ArgumentError, match="kind Preconditioner with 'schedule'"):
        osc.Method(OneVerb())  # type: ignore[arg-type]


class AsATuple:
    def sides(self, value: float, positions: int, eigenvalues: Any = None) -> Any:
        return value, value, value


class AnsweringNothing:
    attempts, shrink, needs = 3, 0.5, osc.Needs.NOTHING

    def init(self) -> None:
        return

    def accepts(self, state: None, trial: osc.Trial) -> bool:
        return True

    def record(self, state: None, trial: osc.Trial) -> None:
        return


def answering(**changes: Any) -> Any:
    part = AnsweringNothing()
    vars(part).update(changes)
    return part


KRONECKER = osc.Kronecker(osc.Covariance(), osc.Covariance())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda: {"preconditioner": KRONECKER, "curvature": osc.SampledFisher(), "damping": AsATuple()},
            r"sides\(0.1, 1\) of the damping AsATuple must return a SideDamping, got \(0.1, 0.1, 0.1\); return",
        ),
        (
            lambda: {"preconditioner": osc.SecantBlocks(), "curvature": osc.SecantPairs(), "damping": AsATuple()},
            r"sides\(0.1, 1\) of the damping AsATuple must return a SideDamping",
        ),
        (lambda: {"guard": answering(attempts="five")}, "attempts of the guard AnsweringNothing must be an integer"),
        (lambda: {"guard": answering(needs=None)}, "needs of the guard AnsweringNothing must be a Needs, got None"),
    ],
)
def test_an_answer_of_the_wrong_kind_is_refused_with_what_it_must_be(given: Any, message: str) -> None:
    with pytest.raises(osc.ArgumentError, match=message):
        osc.Method(**given(), defaults={"damping": 0.1})


@dataclass(frozen=True)
class Outside:
    """A damping rule of somebody else, without checks of its own."""

    inner: osc.Damping = field(default_factory=osc.Split)
    factor: float = 2.0

    def sides(self, value: float, positions: int, eigenvalues: Any = None) -> osc.SideDamping:
        """More."""
        return self.inner.sides(self.factor * value, positions)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: Outside(osc.Split), r"inner of Outside \(damping of Method\) .*Split\(\)"),
        (lambda: Outside(factor="a"), "factor of Outside .* a number, got 'a'"),
        (lambda: Outside(Outside(osc.Coupled())), r"inner of Outside \(inner of Outside \(damping of Method\)\)"),
    ],
)
def test_parts_without_checks_are_checked_when_they_enter_a_method(part: Any, message: str) -> None:
    with pytest.raises(osc.ArgumentError, match=message):
        osc.Method(damping=part())


def test_what_fits_is_left_alone() -> None:
    class Mine:
        def sides(self, value: float, positions: int) -> osc.SideDamping:
            return osc.SideDamping(value, value, value)

    assert isinstance(osc.Method(damping=Mine()).damping, Mine)
    nested = osc.ByLayer({"Linear": osc.ByLayer({"0": osc.Diagonal()})})
    assert osc.Method(nested).preconditioner is nested
