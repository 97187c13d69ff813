"""What docs/migration.md promises to code that was written for 0.1."""

from __future__ import annotations

import re
from pathlib import Path

import osculate as osc
import pytest
from torch import nn

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
METHODS = {"adagrad", "adam", "adamw", "joint-kbfgs", "joint-kfac", "joint-sgdm", "kbfgs", "kbfgs-l"}
METHODS |= {"kfac", "lw-adamw", "lw-sgdm", "mbf", "mbf-released", "rmsprop", "sgdm"}


def test_every_public_name_of_the_version_before_is_there() -> None:
    names = (ROOT / "tests" / "data" / "names-0.1.txt").read_text(encoding="utf-8").split()
    assert len(names) > 50 and not [name for name in names if name not in osc.__all__]


def test_every_method_of_the_version_before_is_there() -> None:
    assert osc.registry.methods().keys() >= METHODS


def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "migration.md", "exec"), {})


def test_a_state_of_the_version_before_is_refused_by_name() -> None:
    optimizer = osc.build("sgdm", nn.Linear(3, 2), lr=0.1)
    old = {key: optimizer.state_dict()[key] for key in ("state", "progress", "param_groups")}
    with pytest.raises(osc.ArgumentError, match=r"osculate 0\.1.*start from the model's parameters"):
        optimizer.load_state_dict(old)
