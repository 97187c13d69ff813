"""Every Python block of the README runs, each by itself.

A block right after the comment ``<!-- not run -->`` is not run. Each block gets a namespace with three names, so that
it may show the loop alone: ``model`` (a classifier of 20 numbers into 3 classes), ``loader`` (four mini-batches) and
``loss_fn``. A block that defines its own overrides them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n+```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[int, str]]:
    """(line of the first code line, code) of every block that is to be run."""
    return [
        (text.count("\n", 0, max(match.start("code") - 1, 0)) + 1, match["code"])
        for match in BLOCK.finditer("\n" + text)
        if "<!-- not run -->" not in match["before"]
    ]


BLOCKS = blocks(README.read_text()) if README.exists() else []


def prelude() -> dict[str, Any]:
    """Names that a block may use without defining them."""
    torch.manual_seed(0)
    data = [(torch.randn(16, 20), torch.randint(0, 3, (16,))) for _ in range(4)]
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))
    return {"__name__": "readme", "model": model, "loader": data, "loss_fn": nn.functional.cross_entropy}


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=[f"line-{line}" for line, _ in BLOCKS])
def test_block_runs(
    line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(README), "exec"), prelude())
    assert "Traceback" not in capsys.readouterr().out


def test_a_readme_with_content_has_a_block() -> None:
    written = README.exists() and len(README.read_text().splitlines()) > 20
    assert BLOCKS or not written


def test_blocks_are_found_and_marked_ones_left_out() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n<!-- not run -->\n```python\nx = 2\n```\n\n"
    text += "```sh\nls\n```\n\n```python\nx = 3\n```\n"
    assert [code for _, code in blocks(text)] == ["x = 1\n", "x = 3\n"]
    assert [line for line, _ in blocks(text)] == [4, 17]
    assert blocks("") == []


@pytest.mark.parametrize("name", re.findall(r"\]\(((?!http)[^)#]+)\)", README.read_text() if README.exists() else ""))
def test_links_into_the_repository_lead_somewhere(name: str) -> None:
    assert (ROOT / name).exists()


def test_the_commands_name_what_exists() -> None:
    """Methods and problems in the README's command lines are registered."""
    if not README.exists():
        return
    import osculate as osc
    from osculate.experiments.problems import PROBLEMS
    from osculate.framework.whole_model.method import whole_methods

    text = README.read_text()
    names = re.findall(r"--methods? ((?:[a-z0-9]+(?:-[a-z0-9]+)* ?)+)", text)
    assert {name for group in names for name in group.split()} <= set(osc.registry.methods()) | set(whole_methods())
    assert set(re.findall(r"--problem ([\w-]+)", text)) <= set(PROBLEMS)


def test_the_table_of_parts_names_what_is_registered() -> None:
    import osculate as osc

    text = README.read_text() if README.exists() else ""
    if "## Parts" not in text:
        return
    table = text.split("## Parts")[1].split("\n\n`osculate methods`")[0]
    named = set(re.findall(r"`([A-Z]\w+)`", table))
    assert named <= set(dir(osc)), named - set(dir(osc))
    registered = [cls for kind in osc.registry.parts().values() for cls in kind.values()]
    exported = {name for name in dir(osc) if any(getattr(osc, name) is cls for cls in registered)}
    assert exported <= named, f"parts missing from the table: {sorted(exported - named)}"
