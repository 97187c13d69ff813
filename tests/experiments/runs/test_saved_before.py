"""Runs that were saved before a method had an option are reopened in the form that they had."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.reopen import saved_config

FORMS: dict[str, dict[str, Any]] = {
    **{name: {"limit": math.inf} for name in ("kfac", "kbfgs", "kbfgs-l")},
    "mbf": {"units": "absolute", "limit": math.inf},
}


@pytest.mark.parametrize("method", FORMS)
def test_an_option_that_is_not_named_is_the_papers_form(method: str, tiny: Any, tmp_path: Path) -> None:
    words = ["train", "--problem", "tiny", "--method", method, "--epochs", "1", "--out", str(tmp_path)]
    assert execute(words) == 0
    now = saved_config(RunFolder(tmp_path)).method_options
    assert {name: now[name] for name in FORMS[method]} != FORMS[method]
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in FORMS[method]:
        del config["method_options"][name]
    file.write_text(json.dumps(config))
    found = saved_config(RunFolder(tmp_path)).method_options
    assert {name: found[name] for name in FORMS[method]} == FORMS[method]
    assert found | now == now
