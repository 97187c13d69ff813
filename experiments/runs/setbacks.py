"""What went wrong: the training, which is the method's breakdown, or the disk, the machine, the files, the program."""

from __future__ import annotations

import torch

from ...errors import OsculateError
from .targets import FolderError, HeldError, OutputError

__all__ = ["in_words", "is_setback"]

_NO_FAULT_OF_METHODS = (
    *(OSError, MemoryError, torch.cuda.OutOfMemoryError),
    *(TypeError, AttributeError, NameError, LookupError, AssertionError, ImportError, SyntaxError),
)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory on device")
"""What torch says in a plain ``RuntimeError`` where the processor has no memory left."""


def is_setback(error: BaseException) -> bool:
    """Whether an error says nothing of the method that was trained, so that its run is to be done again.

    Results could not be written or files read, there was no memory, or the program is wrong. All other errors are
    breakdowns: values that are not finite, matrices that cannot be inverted, settings that a method refuses.

    Args:
        error: that ended a run.
    """
    if isinstance(error, OsculateError):
        return isinstance(error, OutputError | FolderError | HeldError)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY):
        return True
    return isinstance(error, _NO_FAULT_OF_METHODS)


def in_words(error: BaseException) -> str:
    """The error as it is recorded: the message of our own, with its kind before it that of others."""
    return str(error) if isinstance(error, OsculateError) else f"{type(error).__name__}: {error}"
