"""The gallery page "write your own part": its package is registered by its entry point, certified, and trained with."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "docs" / "examples" / "own_parts"
PAGE = ROOT / "docs" / "gallery" / "write_your_own_part.md"
SOURCE = (PACKAGE / "own_parts.py").read_text()
KINDS = ["damping", "structure", "factor", "step size", "guard"]
PARTS = {"RelativeDamping", "RowCurvature", "DiagonalCovariance", "TrustRatio", "Tolerant"}
COMMAND = "import sys; from osculate.experiments.commands.cli import main; sys.exit(main())"


def piece(name: str) -> str:
    """The code between the markers of one part."""
    return SOURCE.split(f"# {name}: begin\n")[1].split(f"# {name}: end\n")[0].strip("\n")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What installing the package does: its module and its entry point on the path."""
    (tmp_path / "own_parts.py").write_text(SOURCE)
    information = tmp_path / "own_parts-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: own-parts\nVersion: 0.1.0\n")
    (information / "entry_points.txt").write_text("[osculate.parts]\nown-parts = own_parts:register\n")
    return os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def osculate(environment: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def statements(code: str) -> int:
    """Lines of code: no blank lines, comments or docstrings."""
    lines = {line for line in range(1, len(code.splitlines()) + 1) if code.splitlines()[line - 1].strip()}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


@pytest.mark.parametrize("name", KINDS)
def test_a_part_has_less_than_thirty_lines(name: str) -> None:
    # The structure's state is a dataclass of its own; the limit is for each class.
    for definition in ast.parse(piece(name)).body:
        code = ast.get_source_segment(piece(name), definition)
        assert code is not None and statements(code) < 30, statements(code or "")


def test_the_page_shows_the_package() -> None:
    blocks = re.findall(r"```python\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert blocks[:5] == [piece(name) for name in KINDS]
    assert blocks[5] in SOURCE and "def register" in blocks[5]
    declared = re.findall(r"```toml\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert declared[0] in (PACKAGE / "pyproject.toml").read_text()


def test_its_entry_point_registers_it(environment: dict[str, str], tmp_path: Path) -> None:
    result = osculate(environment, tmp_path, "methods")
    assert result.returncode == 0, result.stderr
    assert "rows-lars" in result.stdout and "diagonal-kfac" in result.stdout
    result = osculate(environment, tmp_path, "methods", "--parts")
    assert set(re.findall(r"\w+", result.stdout)) >= PARTS


def test_it_is_certified(environment: dict[str, str], tmp_path: Path) -> None:
    result = osculate(environment, tmp_path, "certify", "own_parts", "--json", "certificate.json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "certificate.json").read_text())["rows"]
    held = {row["subject"] for row in rows if row["status"] == "held"}
    assert held == {*PARTS, "rows_lars", "diagonal_kfac"}


def test_a_broken_part_is_not_certified(environment: dict[str, str], tmp_path: Path) -> None:
    broken = SOURCE.replace("state.curvature.flatten() + damping.whole", "state.curvature.flatten()")
    assert broken != SOURCE
    (tmp_path / "own_parts.py").write_text(broken)
    result = osculate(environment, tmp_path, "certify", "own_parts:RowCurvature")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "violated" in result.stdout


@pytest.mark.parametrize("method", ["rows-lars", "diagonal-kfac"])
def test_it_trains_from_the_command_line(environment: dict[str, str], tmp_path: Path, method: str) -> None:
    arguments = ("--problem", "curves-autoencoder", "--problem-option", "size=small", "--epochs", "2", "--out", "run")
    result = osculate(environment, tmp_path, "train", "--method", method, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows]
    assert losses[-1] < losses[0]
