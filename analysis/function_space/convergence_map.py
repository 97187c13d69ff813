"""Where linear convergence is certified, and what is measured: maps over (damping, eta) and (damping, width)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import ArgumentError, NumericalError, UnknownNameError, require_interval, require_positive_integer
from ..theorem import Setting
from .certificates import certified_interval, run
from .function_models import UnitModel, convolutional_tanh, dense_tanh
from .function_space import FunctionSpace
from .function_structures import resolve_structure

__all__ = ["MAPPED", "Cell", "CellKey", "Surroundings", "cells_of", "interval_of", "measure_cell"]

MAPPED = {
    "per-output": ("dense", "per-output"),
    "per-input": ("dense", "per-input"),
    "whole": ("dense", "whole"),
    "kfac": ("dense", "kfac"),
    "kernel": ("convolution", "kernel"),
    "conv-whole": ("convolution", "whole"),
    "conv-kfac": ("convolution", "kfac"),
}
"""What can be mapped: name, and the problem and the structure behind it."""

_SAMPLES = 12


@dataclass(frozen=True)
class CellKey:
    """One run of a map.

    Args:
        blocks: one of ``MAPPED``.
        width: hidden neurons, or output channels.
        damping: lambda > 0.
        eta: in (0, 1].
        steps: at most this many.
        seed: of data and weights.
    """

    blocks: str
    width: int
    damping: float
    eta: float
    steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks not in MAPPED:
            raise UnknownNameError("blocks", self.blocks, MAPPED)
        require_positive_integer("width", self.width)
        require_positive_integer("steps", self.steps)
        require_interval("damping", self.damping, 0.0, math.inf, closed="()")
        require_interval("eta", self.eta, 0.0, 1.0, closed="(]")


@dataclass(frozen=True)
class Cell:
    """What a run measured. A number that is not finite means that the error ran away.

    Attributes:
        key: the run.
        certified: whether all steps were, inside the radius.
        share: of certified steps, in [0, 1].
        rate: geometric mean of |e+|^2 / |e|^2.
        worst_ratio: the largest of them.
        bound: largest rate the measured kappa and C' allow.
        kappa_min: smallest eigenvalue of K met.
        kappa_max: largest.
        stability: largest C'.
        seconds: of the run.
    """

    key: CellKey
    certified: bool
    share: float
    rate: float
    worst_ratio: float
    bound: float
    kappa_min: float
    kappa_max: float
    stability: float
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether every step had the rate 1 - eta, certified or not."""
        return self.worst_ratio <= 1.0 - self.key.eta + 1e-12

    def to_dict(self) -> dict[str, Any]:
        """Flat, plain values."""
        values = asdict(self)
        key: dict[str, Any] = values.pop("key")
        return key | values | {"kept": self.kept}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """From :meth:`to_dict`; ``None`` stands for a number that was not finite."""
        plain: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
        key = CellKey(**{entry.name: plain[entry.name] for entry in fields(CellKey)})
        return cls(key, **{entry.name: plain[entry.name] for entry in fields(cls) if entry.name != "key"})


@dataclass(frozen=True)
class Surroundings:
    """Where a map is computed.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        memory_bytes: room for the tensors of one chunk, > 0.
    """

    device: str = "cpu"
    memory_bytes: int = 2**24

    def space(self, key: CellKey) -> FunctionSpace:
        """The problem of a cell."""
        return FunctionSpace(self._model(key), self.memory_bytes)

    def _model(self, key: CellKey) -> UnitModel:
        generator = Setting(seed=key.seed).generator(11)
        if MAPPED[key.blocks][0] == "dense":
            return dense_tanh(_SAMPLES, 8, key.width, generator, self.device)
        return convolutional_tanh(_SAMPLES, (2, 6, 6), key.width, generator, self.device)


def cells_of(
    blocks: Sequence[str], widths: Sequence[int], dampings: Sequence[float], etas: Sequence[float], **rest: int
) -> list[CellKey]:
    """All cells of a map, the fast ones (small widths) first.

    Raises:
        ArgumentError: if a list is empty, or a value is out of range.
    """
    for name, values in (("blocks", blocks), ("widths", widths), ("dampings", dampings), ("etas", etas)):
        if not values:
            raise ArgumentError(f"{name} needs at least one value")
    return [
        CellKey(name, width, damping, eta, **rest)
        for width in sorted(set(widths))
        for name in dict.fromkeys(blocks)
        for damping in sorted(set(dampings))
        for eta in sorted(set(etas))
    ]


def measure_cell(key: CellKey, surroundings: Surroundings) -> Cell:
    """Run one cell. A damping too small to factorise counts as a run that broke down: nothing of it is finite."""
    start = time.perf_counter()
    try:
        structure = resolve_structure(MAPPED[key.blocks][1])
        done = run(surroundings.space(key), structure, key.damping, key.eta, key.steps)
    except NumericalError:
        nan = math.nan
        return Cell(key, False, 0.0, nan, nan, nan, nan, nan, nan, time.perf_counter() - start)
    records = done.records
    return Cell(
        key,
        done.certified,
        done.share,
        done.rate,
        done.worst_ratio,
        max(entry.bound for entry in records),
        min(entry.kappa_min for entry in records),
        max(entry.kappa_max for entry in records),
        max(entry.stability for entry in records),
        time.perf_counter() - start,
    )


def interval_of(cells: Iterable[Cell]) -> tuple[float, float]:
    """Ends of the certified damping interval of the cells of one structure, width and eta."""
    ordered = sorted(cells, key=lambda cell: cell.key.damping)
    return certified_interval([cell.key.damping for cell in ordered], [cell.certified for cell in ordered])
