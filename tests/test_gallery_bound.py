"""The gallery page "check a bound" runs, block after block in one namespace."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gallery" / "check_a_bound.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(BLOCK.finditer(PAGE.read_text()))
    assert len(found) == 3
    namespace: dict[str, object] = {"__name__": "gallery"}
    for match in found:
        line = PAGE.read_text().count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(PAGE), "exec"), namespace)
    status, measured, *_ = capsys.readouterr().out.split()
    assert status == "held" and float(measured) == pytest.approx(1.0)
