"""The recipes of docs/loops.md run; Lightning and Accelerate loops do what a plain loop does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "loops.md"
BLOCKS = re.findall(r"^## ([^\n]+)$(?:(?!^## ).)*?```python\n(.*?)```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
FOREIGN = Path(__file__).resolve().parents[2] / "foreign_loops.py"


def require(package: str) -> None:
    """Skip where it is not installed, or cannot be imported, and say why.

    It is not imported here, since that changes global state. Lightning imports torchvision wherever it is installed:
    one that does not fit torch (docs/install.md) breaks it, and that is shown, not worked around.
    """
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{package} cannot be imported here: {found.stderr.strip().splitlines()[-1]}")


def run(words: list[str]) -> str:
    """A fresh interpreter: the loops of others change global state."""
    result = interpreted(words)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def interpreted(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Whatever comes of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600, check=False)


def test_every_section_has_a_recipe() -> None:
    assert [title for title, _ in BLOCKS] == re.findall(r"^## (.+)$", GUIDE.read_text(), re.MULTILINE)


MANY = {title: code for title, code in BLOCKS if "init_process_group" in code}


def test_recipes_that_need_only_torch_run() -> None:
    foreign = ("import lightning", "accelerate", "init_process_group")
    plain = [code for _, code in BLOCKS if not any(word in code for word in foreign)]
    assert len(plain) >= 6
    run([sys.executable, "-W", "error::DeprecationWarning:osculate", "-c", "\n".join(plain)])


@pytest.mark.parametrize("title", MANY)
def test_recipes_for_many_processes_run_in_two(title: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"
    # Threads of gloo may abort a process that ends while others still speak: who has come to the end says so before.
    end = [
        "import os, pathlib",
        f"pathlib.Path({str(tmp_path)!r}, str(torch.distributed.get_rank())).touch()",
        "torch.distributed.barrier()",
        "os._exit(0)",
    ]
    file.write_text(MANY[title].replace("torch.distributed.destroy_process_group()", "\n".join(end)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    result = interpreted(start)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists(), result.stderr[-3000:]


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_recipes_for_other_peoples_loops_run(package: str, tmp_path: Path) -> None:
    require(package)
    (code,) = [code for _, code in BLOCKS if f"import {package}" in code or f"from {package}" in code]
    file = tmp_path / "recipe.py"
    file.write_text(code)
    run([sys.executable, str(file)])


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_a_foreign_loop_is_the_plain_loop(package: str, tmp_path: Path) -> None:
    """Every method, bit for bit, against the same batches in a plain loop."""
    require(package)
    assert "equal" in run([sys.executable, str(FOREIGN), package, str(tmp_path)])


@pytest.mark.parametrize("backend", ["hooks", "func", "backpack"])
def test_osculate_never_needs_torchvision(backend: str) -> None:
    """A process in which importing it fails."""
    code = f"""
import sys
sys.modules["torchvision"] = None
import torch, osculate as osc
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
optimizer = osc.build("kfac", model, likelihood="categorical", backend={backend!r})
torch.nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
optimizer.step()
print("stepped")
"""
    assert "stepped" in run([sys.executable, "-c", code])
