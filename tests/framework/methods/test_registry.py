"""The table of methods and parts: complete, documented, open to others, closed to duplicates."""

from __future__ import annotations

import dataclasses
import json

import osculate as osc
import pytest
import torch
from osculate.framework.methods import parts, registry
from small_nets import METHODS, batches, build, data, make, train


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is gone afterwards."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(parts, "_PARTS", {kind: dict(table) for kind, table in parts._PARTS.items()})
    monkeypatch.setattr(parts, "_EXAMPLES", dict(parts._EXAMPLES))


def mine(*, momentum: float = 0.5) -> osc.Method:
    """My own method."""
    return osc.Method(osc.Diagonal(power=1.0, epsilon=1.0), momentum=osc.HeavyBall(momentum), defaults={"lr": 0.05})


def test_the_promised_methods_are_there() -> None:
    assert set(METHODS) >= {
        "kbfgs", "kbfgs-l", "mbf", "mbf-released", "lw-sgdm", "lw-adamw", "joint-kfac", "joint-kbfgs", "joint-sgdm",
        "joint-kfac-momentum", "joint-kfac-noise-aware", "sgdm", "adam", "adamw", "adagrad", "rmsprop", "kfac",
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_is_documented_and_usable(name: str) -> None:
    entry = osc.registry.methods()[name]
    assert (entry.name == name and entry.summary.endswith((".", ")"))) or ":" in entry.summary, entry.summary
    assert entry.paper
    assert set(entry.defaults) == {"lr", "damping", "weight_decay"} and entry.defaults["lr"] > 0
    assert isinstance(entry.factory(), osc.Method)
    doc = entry.factory.__doc__ or ""
    undocumented = [option for option in entry.options if f"{option}:" not in doc]
    assert not undocumented, undocumented


@pytest.mark.usefixtures("_restored")
def test_a_registered_method_is_built_by_name() -> None:
    osc.registry.register("mine", mine, paper="none")
    assert osc.registry.methods()["mine"].summary == "My own method."
    model = make()
    optimizer = osc.build("mine", model, momentum=0.1)
    assert optimizer.method.momentum == osc.HeavyBall(0.1)
    losses = train(optimizer, model, [data()] * 5)
    assert losses[-1] < losses[0]
    with pytest.raises(osc.ArgumentError, match="'mine' is registered already; choose another name"):
        osc.registry.register("mine", mine)
    with pytest.raises(osc.UnknownNameError, match="'mine'"):
        osc.build("mime", model)


def test_nothing_registered_by_a_test_stays() -> None:
    assert "mine" not in osc.registry.methods()


@pytest.mark.usefixtures("_restored")
def test_what_cannot_be_registered_says_why() -> None:
    with pytest.raises(osc.ArgumentError, match=r"'needy' must need no arguments, but needs decay"):
        osc.registry.register("needy", lambda decay: osc.Method())
    with pytest.raises(osc.ArgumentError, match="'kfac' is registered already"):
        osc.registry.register("kfac", mine)


@pytest.mark.usefixtures("_restored")
def test_parts_are_registered_by_kind() -> None:
    @dataclasses.dataclass(frozen=True)
    class Harmonic(osc.MovingAverage):
        """An average of one's own."""

    @dataclasses.dataclass(frozen=True)
    class Halved(osc.Identity):
        """A structure of one's own."""

        def precondition(self, state: object, momentum: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(0.5 * value for value in momentum)

    osc.registry.register_part("structure", Halved)
    assert osc.registry.parts()["structure"]["Halved"] is Halved
    with pytest.raises(osc.ArgumentError, match="structure 'Halved' is registered already"):
        osc.registry.register_part("structure", Halved)
    with pytest.raises(osc.UnknownNameError, match="'structure'"):
        osc.registry.register_part("structur", Harmonic)
    results = []
    for structure, lr in ((Halved(), 0.2), (osc.Identity(), 0.1)):
        model = make()
        train(osc.build(osc.Method(structure, defaults={"lr": lr}), model), model, batches(count=3))
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=0)


def test_tables_are_copies() -> None:
    osc.registry.methods().clear()
    osc.registry.parts()["structure"].clear()
    assert osc.registry.methods() and osc.registry.parts()["structure"]


@pytest.mark.parametrize("kind", osc.registry.parts())
def test_every_part_is_a_documented_frozen_rule(kind: str) -> None:
    for name, cls in osc.registry.parts()[kind].items():
        assert cls.__doc__, name
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen, name  # type: ignore[attr-defined]
        flags = [field.name for field in dataclasses.fields(cls) if field.type in ("bool", bool)]
        assert not flags, f"{name}: a rule is an object, never a boolean ({flags})"


@pytest.mark.parametrize("name", METHODS)
def test_reports_are_plain_numbers(name: str) -> None:
    model = make("cnn")
    optimizer = build(name, model)
    for step in range(2):
        train(optimizer, model, [data("cnn")])
        report = optimizer.last_report
        plain = report.as_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert plain["step"] == step and plain["loss"] > 0
        assert set(plain["step_sizes"]) == {row.layer for row in optimizer.layer_table()}
        assert plain["damping"] == optimizer.param_groups[0]["damping"]
    if optimizer.method.looks_back:
        assert {"rejected_pairs", "damped_first", "damped_second"} <= set(plain)
        assert plain["loss_after"] is not None
