"""The three guides: a reader who does what they say gets what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from osculate.experiments.commands.cli import execute
from pages import DOCS, run_page

COMMAND = "import sys; from osculate.experiments.commands.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def installed(name: str, group: str, entry: str) -> None:
    """What ``pip install -e .`` does for the current folder: an entry point on the path."""
    folder = Path(f"{name}-0.1.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


def test_a_variant_of_your_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setitem(sys.modules, "tilted", None)  # forgotten when the test ends
    printed: list[str] = []

    def command(words: list[str]) -> int:
        """In this process as long as nothing is registered; from then on the entry point must not outlive the test."""
        if not Path("pyproject.toml").exists():
            sys.modules.pop("tilted", None)
            status = execute(words)
            printed.append(capsys.readouterr().out)
            return status
        if not list(Path().glob("*.dist-info")):
            installed("tilted", "osculate.parts", "tilted = tilted:register")
        path = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        program = [sys.executable, "-c", COMMAND, *words]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600, check=False)
        printed.append(done.stdout + done.stderr)
        return done.returncode

    run_page(DOCS / "guides" / "new_variant.md", command)
    text = "\n".join(printed)
    assert "damping-positive" in printed[2] and "violated" in printed[2]
    assert "tilted-kbfgs" in text and "my thesis" in text
    assert Path("runs/first/comparison.png").exists() and Path("runs/tilt/report/report.html").exists()


def test_a_figure_and_a_table() -> None:
    run_page(DOCS / "guides" / "figure_and_table.md", execute)
    tables = Path("runs/digits/report/tables.tex").read_text()
    assert "\\begin{longtable}" in tables and "joint-kfac" in tables


def test_the_optimizer_in_a_loop_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    run_page(DOCS / "guides" / "own_loop.md", execute)
    assert "Traceback" not in capsys.readouterr().out
