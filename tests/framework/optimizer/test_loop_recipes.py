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


def fits(package: str) -> bool:
    """Whether a package can be imported, in a process of its own."""
    return subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, check=False).returncode == 0


def require(package: str) -> None:
    """Skip where it is not installed; it is not imported here, since that changes global state."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def run(words: list[str], hide_torchvision: bool = False) -> str:
    """A fresh interpreter: the loops of others change global state."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if hide_torchvision and not fits("torchvision"):
        folders = [str(FOREIGN.parent / "without_torchvision"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_every_section_has_a_recipe() -> None:
    assert [title for title, _ in BLOCKS] == re.findall(r"^## (.+)$", GUIDE.read_text(), re.MULTILINE)


def test_recipes_that_need_only_torch_run() -> None:
    plain = [code for title, code in BLOCKS if "import lightning" not in code and "accelerate" not in code]
    assert len(plain) >= 6
    run([sys.executable, "-W", "error::DeprecationWarning:osculate", "-c", "\n".join(plain)])


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_recipes_for_other_peoples_loops_run(package: str, tmp_path: Path) -> None:
    require(package)
    (code,) = [code for _, code in BLOCKS if f"import {package}" in code or f"from {package}" in code]
    file = tmp_path / "recipe.py"
    file.write_text(code)
    run([sys.executable, str(file)], hide_torchvision=True)


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_a_foreign_loop_is_the_plain_loop(package: str, tmp_path: Path) -> None:
    """Every method, bit for bit, against the same batches in a plain loop."""
    require(package)
    assert "equal" in run([sys.executable, str(FOREIGN), package, str(tmp_path)], hide_torchvision=True)
