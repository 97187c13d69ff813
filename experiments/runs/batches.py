"""The data of a run: where it lies, how it is recognised, and the order in which it is seen.

The order of the mini-batches depends on the seed alone, neither on the method nor on torch's global random state, so
that methods compared with one seed see the same batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..problems import Data

__all__ = ["BatchOrder", "augmentation_generator", "data_checksum", "move_data"]

_ORDER_STREAM = 0x0D5C_0BA7  # keeps the order of the data apart from the other uses of the same seed
_AUGMENTATION_STREAM = 0x5EED_0A06


class BatchOrder:
    """Indices of the mini-batches: reshuffled every epoch, the last partial batch dropped.

    Args:
        samples: samples in the training set.
        batch_size: samples in a batch, in [1, samples].
        seed: decides the whole sequence.
        device: where the indices are wanted; they are drawn on the CPU, the same for all devices, and moved there once
            per epoch.

    Raises:
        ArgumentError: ``batch_size`` is out of range.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, device: torch.device | None = None) -> None:
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be >= 1, got {batch_size}")
        if batch_size > samples:
            raise ArgumentError(f"batch_size must be at most the {samples} training samples, got {batch_size}")
        self.samples = samples
        self.batch_size = batch_size
        self.batches_per_epoch = samples // batch_size
        self._device = device
        self._generator = torch.Generator().manual_seed(seed ^ _ORDER_STREAM)
        self._shuffle()

    def next(self) -> Tensor:
        """Return the sample indices of the next mini-batch, shape (batch_size,)."""
        if self._position == self.batches_per_epoch:
            self._shuffle()
        start = self._position * self.batch_size
        self._position += 1
        return self._permutation[start : start + self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """Return what decides all batches still to come."""
        return {"generator": self._epoch_start, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._generator.set_state(state["generator"].cpu())
        self._shuffle()
        self._position = int(state["position"])

    def _shuffle(self) -> None:
        self._epoch_start = self._generator.get_state()
        self._permutation = torch.randperm(self.samples, generator=self._generator).to(self._device)
        self._position = 0


def augmentation_generator(seed: int, iteration: int) -> torch.Generator:
    """Return the generator, on the CPU, of the changes of one mini-batch; there is no state to keep between steps.

    Args:
        seed: of the run.
        iteration: number >= 0 of the step.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + iteration) ^ _AUGMENTATION_STREAM)


def data_checksum(data: Data) -> str:
    """Return a checksum of the training samples and their context, by which a continued run knows its data again."""
    parts = (data.train_inputs, data.train_targets, *data.context)
    value = 0
    for part in parts:
        value = zlib.crc32(part.detach().cpu().contiguous().numpy().data, value)
    return f"{value:08x}"


def move_data(data: Data, device: torch.device) -> Data:
    """Return the samples on ``device``; targets that are the inputs themselves stay so, and are moved once."""
    move = cache(lambda value: value.to(device))  # by identity
    values = {entry.name: getattr(data, entry.name) for entry in fields(data)}
    tensors: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(data, **tensors, context=tuple(move(value) for value in data.context))
