"""One rank of runs whose records explain the gradients, or not; run by ``framework/optimizer/test_distributed.py``.

``python distributed_certificates.py RANK WORLD INIT_FILE OUT_FILE``: saves, by case, what the step said.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import osculate as osc
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)


class Net(nn.Module):
    """Two layers, the weight of the first also used by hand where that is asked for."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.first, self.last, self.by_hand = nn.Linear(3, 4), nn.Linear(4, 2), by_hand

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.first(value)
        if self.by_hand:
            hidden = hidden + functional.linear(value.flip(1), self.first.weight)
        found: Tensor = self.last(torch.tanh(hidden))
        return found


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "accumulated": {"pieces": 3},
    "accumulated and exchanged each time": {"pieces": 3, "exchange": True},
    "accumulated in views": {"pieces": 3, "gradient_as_bucket_view": True, "exchange": True},
    "zeroed": {"zeroed": True},
    "zeroed in views": {"zeroed": True, "gradient_as_bucket_view": True},
    "dropped": {"dropped": True},
    "by hand": {"by_hand": (True, True)},
    "by hand on the last rank": {"by_hand": (False, True)},
    "by hand, not asked": {"by_hand": (True, True), "certify_records": "never"},
}


def run(name: str, rank: int, method: str, case: dict[str, Any]) -> str:
    """What four steps said: an error's text, or how far the ranks are apart."""
    torch.manual_seed(0)
    by_hand = case.get("by_hand", (False, False))[min(rank, 1)]
    views = {"gradient_as_bucket_view": case.get("gradient_as_bucket_view", False)}
    model = DistributedDataParallel(Net(by_hand), **views)
    options = {"certify_records": case.get("certify_records", "always")}
    optimizer = osc.build(method, model, likelihood="categorical", **options)
    torch.manual_seed(7 + rank)

    def backward(count: int, last: bool) -> None:
        inputs, labels = torch.randn(6, 3), torch.tensor([0, 1] * 3)
        with nullcontext() if last or case.get("exchange") else model.no_sync():
            (functional.cross_entropy(model(inputs), labels) / count).backward()

    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        for _ in range(4):
            optimizer.zero_grad()
            if case.get("zeroed") or case.get("dropped"):
                backward(1, True)
                model.zero_grad(set_to_none=bool(case.get("dropped")))
            count = case.get("pieces", 1)
            for index in range(count):
                backward(count, index == count - 1)
            optimizer.step()
    except osc.ArgumentError as error:
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        return str(error)
    finally:
        optimizer.close()
    return "stepped"


def main(rank: int, world: int, init: str, out: str) -> None:
    """Every case, by two methods."""
    distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    methods = ("kfac", "joint-kfac")
    found = {f"{method}: {name}": run(name, rank, method, case) for method in methods for name, case in CASES.items()}
    torch.save(found, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
