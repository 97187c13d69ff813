"""The notebook for hosted machines runs from its second code cell on; the first installs from the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "docs/examples/osculate_in_five_minutes.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs_whose_first_cell_installs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names)
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell["metadata"].get("tags") == ["install"] for cell in code] == [True] + [False] * (len(code) - 1)
    assert "REPOSITORY = " in CELLS[0] and "git+{REPOSITORY}" in CELLS[0]
    assert not any(line.startswith(("!", "%")) for cell in CELLS for line in cell.splitlines()), "plain Python only"


def test_its_cells_run_one_after_another(tmp_path: Path) -> None:
    program = tmp_path / "notebook.py"
    program.write_text("if __name__ == '__main__':\n    cells = " + repr(CELLS[1:]) + "\n    shared = {}\n", "utf-8")
    with program.open("a", encoding="utf-8") as file:
        file.write("    for number, cell in enumerate(cells):\n")
        file.write("        exec(compile(cell, f'cell {number + 2}', 'exec'), shared)\n")
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"}
    found = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    said = found.stdout
    assert "kfac" in said and "refused: " in said and r"\toprule" in said and "1 held" in said
    assert (tmp_path / "runs" / "small" / "report" / "report.html").exists()
