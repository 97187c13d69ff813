"""Many processes, started once per test session however many test workers there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

HERE = Path(__file__).resolve().parent


def started(script: str, world: int, factory: pytest.TempPathFactory, seconds: float = 900.0) -> list[Any]:
    """What each of ``world`` processes of a script saved; the first test that asks starts them, the others wait.

    Args:
        script: name of a file beside this one, called with RANK WORLD INIT_FILE OUT_FILE.
        world: how many processes.
        factory: of the session; workers of pytest-xdist share the folder above theirs.
        seconds: after which the processes are ended.
    """
    shared = factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    folder = shared / f"{Path(script).stem}-{world}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            _run(HERE / script, world, folder, seconds)
            (folder / "done").touch()
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(world)]


def _run(script: Path, world: int, folder: Path, seconds: float) -> None:
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
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=seconds)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, errors in zip(running, said, strict=True):
        assert process.returncode == 0, errors
