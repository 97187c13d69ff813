"""One rank of a data-parallel run: trains every method on its half of each batch and saves what came out.

``python distributed_worker.py RANK WORLD INIT_FILE OUT_FILE``; run by ``framework/optimizer/test_distributed.py``.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import osculate as osc
import torch
from small_nets import batches, cross_entropy, make
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)


class Fixed:
    """A likelihood whose labels do not depend on random numbers: joint and split batches see the same ones."""

    name = "fixed"

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return (output.argmin(-1) + 1) % output.shape[-1]

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def curvature_root(self, output: Tensor) -> Tensor:
        raise NotImplementedError


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(method, net, options) of every run."""
    names = [name for name, entry in osc.registry.methods().items() if runs(entry.factory())]
    result: list[tuple[str, str, dict[str, Any]]] = [(name, "mlp", {}) for name in names]
    extra: list[tuple[str, str, dict[str, Any]]] = [
        ("kfac", "mlp", {"statistics": "empirical"}),
        ("kfac", "tokens", {"statistics": "empirical"}),
        ("kbfgs", "tokens", {"growth": float("inf")}),
        ("mbf", "tokens", {}),
    ]
    return result + extra


def runs(method: osc.Method) -> bool:
    """Hessian products do not pass through DDP, and exact roots need a real likelihood."""
    return osc.Needs.PRODUCTS not in method.step_size.needs


def run(name: str, net: str, options: dict[str, Any], share: slice, wrapped: bool, pieces: int = 1) -> dict[str, Any]:
    """Four steps on a share of every batch of 16."""
    torch.manual_seed(0)
    model = make(net)
    outer = DistributedDataParallel(model) if wrapped else model
    optimizer = osc.build(name, outer, likelihood=Fixed(), **options)
    if optimizer.has_warm_start:
        optimizer.warm_start([lambda x=x: outer(x[share]) for x, _ in batches(net, 2)])
    losses = []
    for x, y in batches(net, 4):

        def closure(x: Tensor = x[share], y: Tensor = y[share]) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for index, rows in enumerate(torch.arange(len(x)).chunk(pieces)):
                last = index == pieces - 1
                with nullcontext() if last or not wrapped else outer.no_sync():  # type: ignore[union-attr]
                    loss = cross_entropy(outer(x[rows]), y[rows]) / pieces
                    loss.backward()
                total = total + loss.detach()
            return total

        losses.append(optimizer.step(closure))
    parameters = {key: value.detach().clone() for key, value in model.named_parameters()}
    labels = repr(optimizer.capture._labels())
    return {"parameters": parameters, "state": optimizer.state_dict()["state"], "losses": losses, "labels": labels}


def main(rank: int, world: int, init: str, out: str) -> None:
    """Everything, one run after the other."""
    distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    share = slice(rank * 16 // world, (rank + 1) * 16 // world)
    results = [run(*case, share, True) for case in cases()]
    accumulated = run("kfac", "mlp", {"statistics": "empirical"}, share, True, pieces=2)
    alone = run("kfac", "mlp", {"statistics": "empirical", "process_group": None}, share, False)
    torch.save({"results": results, "accumulated": accumulated, "alone": alone}, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
