"""Backends: who measures. All fill the same :class:`LayerStatistics`; the table of them is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

from torch import nn

from ...errors import CompatibilityError, UnknownNameError
from ..layers.layer import Layer
from ..likelihoods import Likelihood
from ..records.needs import PassKind, Record
from ..records.statistics import LayerStatistics
from .backpack_backend import BackpackBackend
from .capture import Capture
from .func_backend import FuncBackend
from .passes import Pauses

__all__ = ["BACKENDS", "Backend", "make_backend", "require_supported"]


class Backend(Protocol):
    """What the optimizer uses of a backend. Constructed as ``(model, layers, likelihood, loss_reduction, seed)``.

    ``cannot`` maps records that it refuses to the reason; ``step``, ``seed`` and ``stream`` (one per
    process that shares a mini-batch) determine the sampled labels; while ``pauses`` is true nothing is recorded.
    """

    name: ClassVar[str]
    cannot: ClassVar[Mapping[Record, str]]
    likelihood: Likelihood | None
    loss_reduction: str
    step: int
    seed: int
    stream: int
    pauses: Pauses

    def arm(self, wanted: Mapping[str, Record], kind: PassKind = "gradient") -> None:
        """Choose what the following forward passes record."""

    def collect(self) -> dict[str, LayerStatistics]:
        """The record of each layer from all complete passes since the last time."""

    def discard_complete(self) -> None:
        """Forget passes whose gradient has arrived."""

    def clear(self) -> None:
        """Forget every pass."""

    def extended(self, layers: Sequence[Layer]) -> Backend:
        """The same backend for more layers; this one is closed."""

    def close(self) -> None:
        """Remove all hooks."""


BACKENDS: dict[str, Callable[..., Backend]] = {"hooks": Capture, "func": FuncBackend, "backpack": BackpackBackend}


def make_backend(
    name: str,
    model: nn.Module,
    layers: Sequence[Layer],
    likelihood: Likelihood | None,
    loss_reduction: str,
    seed: int,
) -> Backend:
    """A backend by name, its hooks placed on the model.

    Raises:
        UnknownNameError: for an unknown name; near misses are listed.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    return BACKENDS[name](model, layers, likelihood, loss_reduction, seed)


def require_supported(backend: Backend, wanted: Mapping[str, Record]) -> None:
    """Check at construction that a backend can record what a method will ask of it.

    Raises:
        CompatibilityError: with the backend's own reason.
    """
    for layer, record in wanted.items():
        for refused, reason in backend.cannot.items():
            if refused in record:
                raise CompatibilityError(
                    f"backend={backend.name!r} cannot record {refused.name} (layer {layer!r}): {reason}; use "
                    "backend='hooks' or backend='func'"
                )
