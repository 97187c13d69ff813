"""Backends: who measures. All fill the same :class:`LayerStatistics`; the table of them is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import CompatibilityError, UnknownNameError
from ..layers.layer import Layer
from ..likelihoods import Likelihood
from ..records.needs import Record
from .backend import Backend
from .backpack_backend import BackpackBackend
from .capture import Capture
from .func_backend import FuncBackend
from .residual_backend import ResidualBackend

__all__ = ["BACKENDS", "make_backend", "require_supported"]


BACKENDS: dict[str, Callable[..., Backend]] = {
    "hooks": Capture,
    "func": FuncBackend,
    "backpack": BackpackBackend,
    "residuals": ResidualBackend,
}


def make_backend(
    name: str,
    model: nn.Module,
    layers: Sequence[Layer],
    likelihood: Likelihood | None,
    loss_reduction: str,
    seed: int,
    samples: int | Callable[[Any], Tensor] = 0,
) -> Backend:
    """A backend by name, its hooks placed on the model.

    Raises:
        UnknownNameError: for an unknown name; near misses are listed.
        CompatibilityError: if the samples are not on the output's first axis, and the backend runs them one by one.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    if samples != 0 and name != Capture.name:
        raise CompatibilityError(
            f"backend={name!r} takes the samples of a mini-batch from the first axis of the model's output, and "
            "samples= says that they are elsewhere; use backend='hooks', or a model that returns the samples first"
        )
    backend = BACKENDS[name](model, layers, likelihood, loss_reduction, seed)
    backend.samples = samples
    return backend


def require_supported(backend: Backend, wanted: Mapping[str, Record]) -> None:
    """Check at construction that a backend can record what a method will ask of it.

    Raises:
        CompatibilityError: with the backend's own reason.
    """
    if backend.measures and not isinstance(backend, Capture):
        raise CompatibilityError(
            f"backend={backend.name!r} takes no statistics that a structure measures itself (layer "
            f"{min(backend.measures)!r}); use backend='hooks'"
        )
    for layer, record in wanted.items():
        for refused, reason in backend.cannot.items():
            if refused in record:
                raise CompatibilityError(
                    f"backend={backend.name!r} cannot record {refused.name} (layer {layer!r}): {reason}; use "
                    "backend='hooks' or backend='func'"
                )
