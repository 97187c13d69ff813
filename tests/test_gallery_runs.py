"""The gallery pages about runs: every command and every snippet of them works, in the order of the page."""

import json
import re
import shlex
from pathlib import Path

import pytest
from osculate.experiments.commands.cli import execute

GALLERY = Path(__file__).resolve().parent.parent / "docs" / "gallery"
BLOCK = re.compile(r"^(<!-- exit status (\d) -->\n)?```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_page(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Execute a page; what its snippets and commands printed."""
    text = (GALLERY / name).read_text()
    namespace: dict[str, object] = {"__name__": "gallery"}
    for match in BLOCK.finditer(text):
        if match[3] == "python":
            line = text.count("\n", 0, match.start(4))
            exec(compile("\n" * line + match[4], name, "exec"), namespace)
            continue
        for line in match[4].splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "osculate" and execute(words) == int(match[2] or 0), line
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_which_structure_fits_my_layer(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_page("which_structure_fits_my_layer.md", capsys)
    assert "cosine 0." in printed and "MiniBlock" in printed
    for name in ("structures/structures", "small/diagnosis/approximation", "small/diagnosis/spectra"):
        assert Path("runs", f"{name}.png").exists()


def test_why_did_this_run_diverge(capsys: pytest.CaptureFixture[str]) -> None:
    """What the page says about the certificate is so."""
    printed = run_page("why_did_this_run_diverge.md", capsys)
    broken, cured = printed.split("runs/diverged", 1)[0], printed.rsplit("epoch     0", 1)[1]
    assert re.search(r"StepSizeCurvature: .*VIOLATED .* first at step 2:", broken)
    assert "EigenvalueBounds" in broken and not re.search(r"EigenvalueBounds: .*VIOLATED", broken)
    assert not re.search(r"(EigenvalueBounds|SecantEquation): .*VIOLATED", cured)
    assert Path("runs/diverged/diagnosis/monitors.png").exists() and Path("runs/diverged/microscope").exists()


def test_train_a_pinn(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_page("train_a_pinn.md", capsys)
    losses = [float(value) for value in re.findall(r"step +\d+  loss (\S+)", printed)]
    assert len(losses) == 4 and losses[0] > 10 and losses[-1] < 1e-7
    assert all(name in printed for name in ("poisson-2d", "heat-1d", "poisson-5d", "burgers-1d", "relative L2"))
    assert Path("pinn.png").stat().st_size > 10_000 and (GALLERY / "train_a_pinn.png").exists()
    last = json.loads(Path("runs/pinn/metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 60 and last["relative_l2"] < 1e-2
    assert Path("runs/race/comparison.png").exists()


def test_run_an_ablation(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_page("run_an_ablation.md", capsys)
    assert "with 2 worker(s)" in printed and "all runs are done" in printed
    assert all(arm in printed for arm in ("base", "pairs=PowellThenLM", "pairs=PowellH", "pairs=NoDamping"))
    assert Path("runs/pairs/report/report.html").exists() and Path("runs/pairs/report/tables.tex").exists()
