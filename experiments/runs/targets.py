"""Where results go: checked before anything is computed, and held by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import ArgumentError, OsculateError

__all__ = [
    "DamagedError",
    "FolderError",
    "HeldError",
    "OutputError",
    "exclusive",
    "hold",
    "require_file",
    "require_folder",
    "writing",
]


class HeldError(ArgumentError):
    """Another process writes to the same folder."""


class FolderError(ArgumentError):
    """What a folder holds does not let its run go on; nothing is said of the method."""


class DamagedError(FolderError):
    """Files of a run are damaged, or lack something, so that it can only start over."""


class OutputError(OsculateError):
    """A result could not be written: no such place, no permission, no space."""


def require_folder(path: Path, *files: str, flag: str = "--out") -> None:
    """Check, without writing anything, that a folder can be written or made.

    Args:
        path: the folder, there already or not.
        files: names of what will be written in it; none may be a folder.
        flag: names the place on the command line, for messages.

    Raises:
        ArgumentError: something on the way is a file, is not writable, or has the name of a result.
    """
    nearest = next((place for place in (path, *path.parents) if place.exists() or place.is_symlink()), Path())
    if not nearest.is_dir():
        what = "a link to nowhere" if nearest.is_symlink() and not nearest.exists() else "a file"
        raise ArgumentError(
            f"results need a folder, but {str(nearest)!r} is {what}; name another folder with {flag}, or move it away"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ArgumentError(f"folder {str(nearest)!r} is not writable; name another one with {flag}")
    for name in files:
        if (path / name).is_dir():
            raise ArgumentError(
                f"a file is to be written at {str(path / name)!r}, but a folder is there; move it away, or name "
                f"another folder with {flag}"
            )


def require_file(path: Path, flag: str = "--out") -> None:
    """Check, without writing anything, that a file can be written.

    Args:
        path: the file, there already or not.
        flag: names it on the command line, for messages.

    Raises:
        ArgumentError: a folder of that name is there, or ``path``'s folder cannot be written.
    """
    if path.is_dir():
        raise ArgumentError(f"{flag} names a file to write, but {str(path)!r} is a folder; name a file in it")
    require_folder(path.parent, flag=flag)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this context a refusal of the system becomes an ``OutputError`` that names ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own
        if not isinstance(cause, OSError):
            raise
        raise OutputError(
            f"{str(path)!r} cannot be written ({cause.strerror or cause}); make room or name another place"
        ) from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Make the folder and hold it, so that two processes never write one set of results.

    The hold ends with the process, however that ends; it leaves no file. Systems without such holds (Windows, some
    network drives) go on without.

    Args:
        path: the folder.

    Raises:
        HeldError: another process holds it.
        OutputError: it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        holder = os.open(path, os.O_RDONLY)
    try:
        if hold(holder) is False:
            raise HeldError(
                f"another process is writing to folder {str(path)!r}; wait for its end, or name another one with --out"
            )
        yield
    finally:
        with suppress(OSError):
            os.close(holder)


def hold(holder: int) -> bool | None:
    """Hold what is open as ``holder``; whether that succeeded, ``None`` where the system has no such holds."""
    try:
        import fcntl

        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True
