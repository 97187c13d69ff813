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
