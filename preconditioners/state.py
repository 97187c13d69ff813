"""State of a preconditioner for one layer: a dataclass of tensors, named after the mathematics.

States are owned by the optimizer and updated in place by the part that made them (large matrices are not copied every
step); the caller must not keep references to their tensors across a step. They turn into nested dictionaries of
tensors and numbers, which load with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError

__all__ = ["NoState", "State"]


@dataclass
class State:
    """Base of all states: serialisation over the dataclass fields (tensors, numbers, tuples of tensors, states)."""

    replaced: ClassVar[frozenset[str]] = frozenset()
    """Fields whose tensors a step replaces and never writes into: to be able to go back, nobody has to copy them."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of tensors (not copied) and numbers."""
        return {name: _pack(getattr(self, name)) for name in self._names()}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy ``values`` into this state; the argument is not modified.

        Raises:
            ArgumentError: if a name is missing or a shape differs.
        """
        for name in self._names():
            if name not in values:
                raise ArgumentError(f"saved state of {type(self).__name__} lacks {name!r}; has {sorted(values)}")
            setattr(self, name, _unpack(getattr(self, name), values[name], name))

    @classmethod
    @cache  # asked at every step that may be undone
    def _names(cls) -> tuple[str, ...]:
        """Of the fields, in order."""
        return tuple(entry.name for entry in fields(cls))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the state, nested ones included."""
        for name in self._names():
            yield from _tensors(getattr(self, name))

    def written(self) -> Iterator[Tensor]:
        """The tensors that a step may write into, nested ones included."""
        for name in self._names():
            if name not in self.replaced:
                value = getattr(self, name)
                yield from value.written() if isinstance(value, State) else _tensors(value)

    @property
    def has_gathered(self) -> bool:
        """Whether there is anything to compute inverses of; if not, the fresh ones stay."""
        return True

    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclass
class NoState(State):
    """State of a part that has none."""


def _pack(value: Any) -> Any:
    if isinstance(value, State):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _unpack(current: Any, saved: Any, name: str) -> Any:
    if isinstance(current, State):
        current.load_dict(saved)
        return current
    if isinstance(current, tuple):
        return tuple(_unpack(old, new, name) for old, new in zip(current, saved, strict=True))
    if isinstance(current, Tensor):
        if current.shape != torch.as_tensor(saved).shape:
            raise ArgumentError(
                f"saved {name!r} has shape {tuple(saved.shape)}, this model needs {tuple(current.shape)}; "
                "load into an optimizer built for the same model and method"
            )
        return current.copy_(saved)
    return saved


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, State):
        yield from value.tensors()
    elif isinstance(value, tuple):
        for entry in value:
            yield from _tensors(entry)
