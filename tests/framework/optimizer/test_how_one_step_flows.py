"""The page that takes a reader through a step names files that a step really enters, in that order."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import osculate as osc
import torch
from torch import nn

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how_one_step_flows.md"


def entered(method: str) -> list[str]:
    """Files of the package in the order in which one step enters them first."""
    root = str(Path(osc.__file__).resolve().parent) + "/"
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = osc.build(method, model)
    inputs, targets = torch.randn(8, 5), torch.randint(0, 3, (8,))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    found: dict[str, None] = {}

    def tracer(frame: FrameType, event: str, argument: Any) -> None:
        name = str(Path(frame.f_code.co_filename).resolve())
        if event == "call" and name.startswith(root):
            found.setdefault(name.removeprefix(root))

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        optimizer.step(closure)
    finally:
        sys.settrace(before)
    return list(found)


def test_the_page_names_the_files_in_the_order_of_the_walk() -> None:
    named = re.findall(r"^\d+\. `([\w/]+\.py)`", PAGE.read_text(), re.MULTILINE)
    walk = entered("kbfgs")
    assert len(named) >= 12
    assert [name for name in walk if name in named] == named
