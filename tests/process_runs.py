"""Many processes, started once per test session however many test workers there are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

HERE = Path(__file__).resolve().parent


def started(
    script: str,
    world: int,
    factory: pytest.TempPathFactory,
    *words: str,
    lost: Sequence[int] = (),
    seconds: float = 900.0,
) -> list[Any]:
    """What each of ``world`` processes of a script saved; the first test that asks starts them, the others wait.

    Args:
        script: name of a file beside this one, called with RANK WORLD INIT_FILE OUT_FILE and the words.
        world: how many processes.
        factory: of the session; workers of pytest-xdist share the folder above theirs.
        *words: further arguments.
        lost: processes that are meant to die or to hang; theirs is ``None``.
        seconds: after which the processes are ended.
    """
    shared = factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    folder = shared / "-".join((Path(script).stem, str(world), *words))
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            _run(HERE / script, world, folder, words, lost, seconds)
            (folder / "done").touch()
    kept = [None if rank in lost else folder / str(rank) for rank in range(world)]
    return [None if path is None else torch.load(path, weights_only=False) for path in kept]


def _run(script: Path, world: int, folder: Path, words: Sequence[str], lost: Sequence[int], seconds: float) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(script),
                str(rank),
                str(world),
                str(folder / "init"),
                str(folder / str(rank)),
                *words,
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    alive = [(rank, process) for rank, process in enumerate(running) if rank not in lost]
    try:
        said = [process.communicate(timeout=seconds)[1] for _, process in alive]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    for (rank, process), errors in zip(alive, said, strict=True):
        assert (folder / str(rank)).exists(), f"process {rank} ended with {process.returncode}: {errors}"
