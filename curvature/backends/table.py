"""Backends: who measures. All fill the same :class:`LayerStatistics`; the table of them is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ...errors import CompatibilityError, UnknownNameError
from ..layers.layer import Layer
from ..likelihoods import Likelihood
from ..records.needs import Record
from .backend import Backend
from .backpack_backend import BackpackBackend
from .capture import Capture
from .func_backend import FuncBackend

__all__ = ["BACKENDS", "make_backend", "require_supported"]


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
