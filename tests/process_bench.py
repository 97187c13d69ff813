"""One process of runs whose bytes are counted; started by :mod:`process_runs`.

``python process_bench.py RANK WORLD INIT_FILE OUT_FILE``: saves what each case of :func:`cases` has sent and kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from osculate.experiments.runs.sharing import Case, measure
from osculate.framework.optimizer.forecast import DIVISIONS
from process_end import end
from torch import distributed

torch.set_num_threads(1)

METHODS = ("kfac", "kbfgs", "kbfgs-l", "joint-kfac", "joint-kfac-momentum", "mbf", "shampoo", "muon")


def cases() -> list[Case]:
    """Eight methods in every division on dense layers; two of them on convolutions; and many samples, few samples."""
    found = [Case("small-autoencoder", name, way, 16, 2) for name in METHODS for way in DIVISIONS]
    found += [Case("small-resnet", name, way, 4, 2) for name in ("kfac", "kbfgs-conv") for way in DIVISIONS]
    return found + [Case("small-autoencoder", "kfac", way, 128, 2) for way in DIVISIONS]


def main(rank: int, world: int, init: str, out: str) -> None:
    """Every case, one after the other."""
    distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    end([measure(case) for case in cases()], out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
