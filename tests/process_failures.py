"""One of three processes of which the second dies or hangs; started by :mod:`process_runs`.

``python process_failures.py RANK WORLD INIT_FILE OUT_FILE HOW WAY WHERE``: saves what the others were told.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import osculate as osc
import torch
from process_end import end
from process_refusals import everything
from process_worker import Fixed, Laid, batches, two_layers
from torch import distributed, nn

torch.set_num_threads(1)

TIMEOUT = 6.0
STEP = 2


def lose(how: str) -> None:
    """End this process, or let it stand still."""
    if how == "dies":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGSTOP)


def main(rank: int, world: int, init: str, out: str, how: str, way: str, where: str) -> None:
    """Train until somebody is missing."""
    limit = timedelta(seconds=TIMEOUT)
    distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=limit)
    laid = Laid(two_layers(), way)
    optimizer = osc.build("kbfgs", laid.outer, likelihood=Fixed(), **laid.options)
    meet = optimizer.together.meet
    found: dict[str, Any] = {}
    for index, (inputs, labels) in enumerate(batches(laid.model, 5)):
        x, y = laid.own(inputs), laid.own(labels)
        lost = rank == 1 and index == STEP

        def closure(x: Any = x, y: Any = y, lost: bool = lost) -> Any:
            if lost and where == "evaluation":
                lose(how)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(laid.outer(x), y)
            loss.backward()
            return loss.detach()

        def met(*arguments: Any, lost: bool = lost, **more: Any) -> Any:
            result = meet(*arguments, **more)
            if lost and where == "exchange":
                lose(how)
            return result

        optimizer.together.meet = met  # type: ignore[method-assign]
        parameters = [value.clone() for value in everything(laid, optimizer)[: len(list(laid.model.parameters()))]]
        began = time.monotonic()
        try:
            optimizer.step(closure)
        except osc.ProcessError as error:
            now = everything(laid, optimizer)[: len(parameters)]
            found = {
                "step": index,
                "said": str(error),
                "seconds": time.monotonic() - began,
                "same": all(torch.equal(one, two) for one, two in zip(parameters, now, strict=True)),
            }
            try:
                optimizer.step(closure)
            except osc.ProcessError as again:
                found["again"] = str(again)
            break
    end(found, out, together=False)  # nobody is left to say good-bye to


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:8])
