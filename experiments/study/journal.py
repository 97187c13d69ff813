"""The file that keeps a study's book: Optuna's journal, which neither a full disk nor a killed writer damages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from ...errors import ArgumentError
from ..runs.targets import writing

__all__ = ["open_journal"]

_BLOCK = 4096


def open_journal(file: Path) -> JournalStorage:
    """Open the book of a study, or begin one.

    A last line that was cut, by a crash or a full disk, counts as never written.

    Args:
        file: where it is; its folder is there.

    Raises:
        ArgumentError: it is damaged.
        OutputError: it cannot be written.
    """
    with writing(file):
        backend = _Journal(file)
    try:
        return JournalStorage(backend)
    except Exception as error:  # Optuna names no common class for a damaged file
        place = _damaged_line(file)
        raise ArgumentError(
            f"{file} cannot be read{'' if place is None else f': line {place} is damaged'} ({type(error).__name__}); "
            "restore it, or move it away: the same command then takes over the runs that their folders hold"
        ) from error


class _Journal(JournalFileBackend):
    """Lines are there as a whole or not at all.

    Args:
        file: the journal.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self._file = file
        self._writers = JournalFileSymlinkLock(str(file))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines; where they do not fit on the disk, the file stays as it was."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with writing(self._file), self._alone(), self._file.open("r+b", buffering=0) as book:
            end = _end_of_lines(book.fileno())
            book.truncate(end)
            book.seek(end)
            try:
                while text:
                    text = text[book.write(text) or 0 :]
                os.fsync(book.fileno())
            except OSError:
                book.truncate(end)
                raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._writers.acquire()
        try:
            yield
        finally:
            self._writers.release()


def _end_of_lines(book: int) -> int:
    """Where the last whole line of an open file ends."""
    end = os.fstat(book).st_size
    while end:
        start = max(0, end - _BLOCK)
        os.lseek(book, start, os.SEEK_SET)
        place = os.read(book, end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def _damaged_line(file: Path) -> int | None:
    """The first line that is no JSON, from 1; ``None`` where all are."""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            json.loads(line)
        except ValueError:
            return number
    return None
