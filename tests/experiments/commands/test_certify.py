"""The command that certifies: tables, JSON, exit statuses, bad input."""

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import osculate as osc
import pytest
import torch
from osculate.experiments.commands.cli import execute


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@dataclass(frozen=True)
class Climbing(osc.NoDamping):
    """Promises positive curvature and does not deliver."""

    keeps_positive = True


@pytest.fixture
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("their_parts")
    module.Climbing = Climbing  # type: ignore[attr-defined]
    Climbing.__module__ = "their_parts"
    module.mine = lambda: osc.Method(momentum=osc.HeavyBall(0.5))  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    module.needy = lambda size: size  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_parts", module)


def test_a_part_that_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    assert execute(["certify", "osculate:DoubleDamping", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "pair-positive" in shown and "1 subject, 10 contracts: 10 held, 0 violated" in shown
    written = json.loads(file.read_text())
    assert written["ok"] and written["target"] == "osculate:DoubleDamping" and len(written["rows"]) == 10
    assert {row["status"] for row in written["rows"]} == {"held"}


@pytest.mark.usefixtures("_module")
def test_a_part_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["certify", "their_parts:Climbing"]) == 1
    shown = capsys.readouterr().out
    assert "violated pair damping Climbing, pair-positive:" in shown
    assert "s'y of a damped pair is -0.0434361, but must be more than 0" in shown
    assert execute(["certify", "their_parts"]) == 1
    assert execute(["certify", "their_parts:Climbing", "--contracts", "pair-purity", "pair-scale"]) == 0


def test_a_part_that_was_not_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["certify", "osculate:ConstantDamping", "--contracts", "damping-product"]) == 1
    shown = capsys.readouterr().out
    assert "nothing checked damping ConstantDamping, damping-product: does not declare splits" in shown
    assert execute(["certify", "osculate:ConstantDamping", "--contracts", "dense-solve"]) == 2
    assert "is about a structure or a factor" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.usefixtures("_module")
def test_factories_and_registered_methods_are_certified(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["certify", "their_parts:mine", "--contracts", "method-zero-lr"]) == 0
    assert execute(["certify", "osculate:kbfgs-l", "--contracts", "method-descends"]) == 0
    assert "method kbfgs-l" in capsys.readouterr().out


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:part", "cannot import 'no_such_module'"),
        ("osculate:DoubleDampin", "did you mean 'DoubleDamping'"),
        ("osculate:kfacc", "did you mean 'kfac'"),
        ("osculate:KBFGS-l", "did you mean 'kbfgs-l'"),
        ("their_parts:number", "number is not a part"),
        ("their_parts:needy", "needy needs the arguments size"),
        ("osculate:", "a target is written module or module:part"),
        ("json", "module json defines no part"),
    ],
)
def test_bad_targets(target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["certify", target]) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown


def test_an_unknown_contract_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["certify", "osculate:EMA", "--contracts", "purrity"]) == 2
    assert "unknown contracts ['purrity']" in capsys.readouterr().err


def test_everything_registered_is_the_package_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from osculate.framework.contracts import registered_subjects, subjects_of

    assert [(s.kind, s.name) for s in subjects_of(osc)] == [(s.kind, s.name) for s in registered_subjects()]
    assert torch.is_grad_enabled()
