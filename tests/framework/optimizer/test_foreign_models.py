"""Models and loops of transformers, timm and PyG, each in an interpreter of its own; skipped where they are missing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
EXAMPLES = TESTS.parent / "docs" / "examples"


def require(*packages: str) -> None:
    """Skip where a package is missing or cannot be imported, and say why."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra 'foreign')")
    code = "; ".join(f"import {package}" for package in packages)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{', '.join(packages)} cannot be imported here: {found.stderr.strip().splitlines()[-1]}")


def run(*words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.parametrize(
    ("case", "package"),
    [("gpt2", "transformers"), ("bert", "transformers"), ("timm", "timm"), ("gcn", "torch_geometric")],
)
def test_records_of_foreign_models_are_those_of_torch_func(case: str, package: str) -> None:
    """Per-sample gradients, Gauss-Newton blocks, and more than 95 % of the parameters served by K-FAC."""
    require(package)
    assert "right" in run(str(TESTS / "foreign_models.py"), case)


@pytest.mark.parametrize(
    ("example", "packages", "models"),
    [
        ("huggingface", ("transformers", "accelerate"), ("gpt2", "bert")),
        ("timm_network", ("timm",), ("efficientnet",)),
        ("graph_network", ("torch_geometric",), ("gcn",)),
    ],
)
def test_examples_train_foreign_models_by_every_method(
    example: str, packages: tuple[str, ...], models: tuple[str, ...]
) -> None:
    require(*packages)
    lines = re.findall(r"(\S+) +(\w+): loss (\S+) to (\S+), (\S+) % served", run(str(EXAMPLES / f"{example}.py")))
    assert {(method, model) for method, model, *_ in lines} == {
        (method, model) for method in ("kfac", "lw-adamw", "joint-kfac", "soap", "muon") for model in models
    }
    for method, model, first, last, share in lines:
        assert float(last) < float(first), (method, model, first, last)
        assert float(share) > 95.0, (method, model, share)


def test_the_example_of_lightning_accumulates_or_says_why_not() -> None:
    require("lightning")
    said = run(str(EXAMPLES / "lightning_accumulation.py"))
    lines = re.findall(r"(\S+) +(\w+): loss (\S+) to (\S+)", said)
    assert [line[:2] for line in lines] == [
        ("kfac", "automatic"),
        ("joint-kfac", "automatic"),
        ("soap", "automatic"),
        ("muon", "automatic"),
        ("kbfgs", "manual"),
    ]
    assert all(float(last) < 0.8 * float(first) for *_, first, last in lines)
    assert re.search(r"kbfgs +automatic: refused, .*Let one closure run every micro-batch", said)


def test_the_loop_of_timms_training_script_takes_our_optimizers_and_timms_own() -> None:
    require("timm")
    said = run(str(EXAMPLES / "timm_training_script.py"))
    lines = re.findall(r"(\S+) +train.py: loss (\S+) to (\S+), (\d+) entries", said)
    assert [line[0] for line in lines] == ["kfac", "lw-adamw", "joint-kfac", "soap", "adamw"]
    assert all(float(last) < 0.5 * float(first) and int(entries) > 5 for _, first, last, entries in lines)


def test_deepxde_solves_its_equation_with_our_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Better than the 1e-3 or so at which first-order methods end."""
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    require("deepxde")
    said = run(str(EXAMPLES / "deepxde_equation.py"))
    lines = re.findall(r"(\S+) +poisson: loss (\S+) at first, relative error (\S+) at last", said)
    assert [line[0] for line in lines] == ["lm", "spring", "ssbroyden"]
    assert all(float(first) > 1 and float(error) < 1e-4 for _, first, error in lines)
