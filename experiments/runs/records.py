"""The folder a run writes: configuration, environment, metrics, checkpoint, status.

| file | holds |
|---|---|
| ``config.json`` | the exact configuration, defaults resolved, with a checksum of the data |
| ``environment.json`` | versions, platform, device, threads, commit |
| ``metrics.jsonl`` | one object per evaluation: before training (epoch 0), after every epoch, and at the end |
| ``checkpoint.pt`` | everything needed to continue bit for bit |
| ``status.json`` | ``running``, ``finished``, ``interrupted``, ``broken down`` or ``no step taken``, with the reason |
| ``monitors.jsonl`` | with ``--watch``: one object per reading of a monitor |
| ``certificate.json`` | with ``--watch``: how every monitor fared |
| ``tensorboard/`` | with ``--tensorboard``: event files |
| ``checkpoints/`` | with ``--keep-checkpoints``: one for every evaluation, named by iterations |

Every file but those ending in ``jsonl`` is written beside its place and then renamed, so a reader never meets half a
file.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .targets import DamagedError, require_folder, writing

__all__ = ["RunFolder", "as_written", "write_json"]


def write_json(path: Path, content: object) -> None:
    """Write plain values as JSON by an atomic rename; not-a-number and infinities become null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    _replace(path, text.encode())


def as_written(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values as they are read again from the file that ``write_json`` writes."""
    read: dict[str, Any] = json.loads(json.dumps(_finite(content), allow_nan=False))
    return read


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; created by ``start``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.checkpoint_file = path / "checkpoint.pt"
        self.metrics_file = path / "metrics.jsonl"
        self.monitors_file = path / "monitors.jsonl"
        self.certificate_file = path / "certificate.json"
        self.event_folder = path / "tensorboard"

    def kept_checkpoints(self) -> list[Path]:
        """Checkpoints of every evaluation, oldest first; empty unless the run was told to keep them."""
        return sorted((self.path / "checkpoints").glob("*.pt"))

    def check(self) -> None:
        """See that the folder can be written; nothing is written yet.

        Raises:
            ArgumentError: it cannot; the message names what is in the way.
        """
        require_folder(self.path, "config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "status.json")

    def start(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Create the folder, write both descriptions, and remove what an earlier run left there."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            files = (self.checkpoint_file, self.metrics_file, self.monitors_file, self.certificate_file)
            events = self.event_folder.glob("events.out.tfevents.*")
            for stale in (*files, *self.kept_checkpoints(), *events):
                stale.unlink(missing_ok=True)
        write_json(self.config_file, config)
        write_json(self.path / "environment.json", environment)

    def read_config(self) -> dict[str, Any]:
        """Return the saved configuration.

        Raises:
            DamagedError: there is none, or it is not a JSON object.
        """
        try:
            content = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedError(
                f"{self.config_file} cannot be read ({error}); name another folder with --out"
            ) from error
        if not isinstance(content, dict):
            raise DamagedError(f"{self.config_file} must hold one JSON object; name another folder with --out")
        return content

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to the metrics and see it onto the disk."""
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics written so far; a last line cut short by a crash is left out.

        Raises:
            DamagedError: a line is no JSON object that counts iterations.
        """
        if not self.metrics_file.exists():
            return []
        found: list[dict[str, Any]] = []
        try:
            for line in self.metrics_file.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    entry = json.loads(line.decode())
                    int(entry["iterations"])
                    found.append(entry)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise DamagedError(
                f"{self.metrics_file} cannot be read after line {len(found)}, in line {len(found) + 1} "
                f"({type(error).__name__}: {error}); remove the damaged line, or start over with --resume never"
            ) from error
        return found

    def rewind_metrics(self, iterations: int) -> None:
        """Drop the lines written after the checkpoint at ``iterations``; the continued run writes them again."""
        kept = [line for line in self.read_metrics() if line["iterations"] <= iterations]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        _replace(self.metrics_file, text.encode())
        if self.monitors_file.exists():
            readings = self.monitors_file.read_text(encoding="utf-8").splitlines(keepends=True)
            early = [line for line in readings if line.endswith("\n") and json.loads(line)["step"] < iterations]
            _replace(self.monitors_file, "".join(early).encode())
        for file in self.kept_checkpoints():
            if int(file.stem) > iterations:
                file.unlink()

    def save_checkpoint(self, state: Mapping[str, Any], keep_as: int | None = None) -> None:
        """Write the state of a run: tensors, numbers, text and nested dicts of them.

        Args:
            state: of the run.
            keep_as: iterations under which a copy stays; ``None``: the next checkpoint replaces this one.
        """
        kept = [] if keep_as is None else [self.path / "checkpoints" / f"{keep_as:08d}.pt"]
        for place in (self.checkpoint_file, *kept):
            _replace(place, dict(state))

    def load_checkpoint(self, device: torch.device, source: Path | None = None) -> dict[str, Any]:
        """Return the saved state, its tensors on ``device``.

        Args:
            device: where its tensors go.
            source: one of :meth:`kept_checkpoints`; ``None``: the last checkpoint.

        Raises:
            DamagedError: the file is damaged or holds more than plain state.
        """
        file = source or self.checkpoint_file
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch reads over flipped bits
            state = torch.load(file, map_location=device, weights_only=True) if damaged is None else None
        except Exception as error:  # torch names no common class for a damaged file
            raise DamagedError(
                f"{file} cannot be read ({type(error).__name__}); start over with --resume never"
            ) from error
        if damaged is not None:
            raise DamagedError(
                f"{file} is damaged: {damaged!r} in it does not have its checksum; start over with --resume never"
            )
        if not isinstance(state, dict):
            raise DamagedError(f"{file} holds no state of a run; start over with --resume never")
        return state

    def write_status(self, status: str, **details: object) -> None:
        """Record how the run stands.

        Args:
            status: ``running``, ``finished``, ``interrupted``, ``broken down`` or ``no step taken``.
            **details: further plain values, such as the reason.
        """
        write_json(self.path / "status.json", {"status": status, **details})


def _replace(path: Path, content: bytes | dict[str, Any]) -> None:
    """Write text, or the state of a run, beside a file and put it in its place."""
    beside = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
