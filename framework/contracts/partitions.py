"""Contracts of partitions: which entries share a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...curvature.layers.discovery import discover_layers
from ...curvature.layers.layer import Layer
from .cases import Case
from .contract import NotApplicable, contract, contracts_of, require, require_equal, require_unchanged

__all__ = ["CONTRACTS"]


def _storages(part: Any, case: Case, *, labels: bool = False) -> list[tuple[Layer, tuple[Tensor, ...]]]:
    """Per served layer, normal numbers (or every entry's own number) in the layout that the partition wants."""
    found = []
    for layer in discover_layers(case.model()):
        names = part.serves(layer)
        if not names:
            continue
        values, start = [], 0
        for index, name in enumerate(names):
            parameter = layer.parameters[name].detach()
            value = torch.arange(start, start + parameter.numel(), dtype=case.dtype, device=case.device)
            start += parameter.numel()
            values.append(value.reshape(parameter.shape) if labels else case.randn(*parameter.shape, key=index))
        batched = tuple(value.unsqueeze(0) for value in values)
        found.append((layer, (layer.joint_matrix(batched)[0],) if part.joint else tuple(values)))
    if not found:
        raise NotApplicable(f"it serves no layer of the network {case.name!r}")
    return found


@contract("partition-bijection", "partition", "join undoes split")
def partition_bijection(part: Any, case: Case) -> None:
    """Bitwise."""
    for layer, storage in _storages(part, case):
        again = part.join(part.split(storage).clone(), storage)
        for value, expected in zip(again, storage, strict=True):
            require_equal(f"layer {layer.name!r} after split and join", value, expected)


@contract("partition-cover", "partition", "every entry is in exactly one block")
def partition_cover(part: Any, case: Case) -> None:
    """Entries are numbered; the blocks must hold each number once."""
    for layer, storage in _storages(part, case, labels=True):
        found = part.split(storage).flatten().sort().values
        total = sum(value.numel() for value in storage)
        require_equal(f"the numbered entries of layer {layer.name!r}", found, torch.arange(total).to(found))


@contract("partition-shape", "partition", "split gives the stated number of vectors of the stated length")
def partition_shape(part: Any, case: Case) -> None:
    """``shape(layer)``."""
    for layer, storage in _storages(part, case):
        found, stated = tuple(part.split(storage).shape), tuple(part.shape(layer))
        require(found == stated, f"layer {layer.name!r} is split into {found}, stated is {stated}")


@contract("partition-purity", "partition", "split and join leave what they are given as it was")
def partition_purity(part: Any, case: Case) -> None:
    """Bitwise."""
    for layer, storage in _storages(part, case):
        with require_unchanged(f"the storage of layer {layer.name!r}", *storage):
            vectors = part.split(storage)
            with require_unchanged(f"the blocks of layer {layer.name!r}", vectors):
                part.join(vectors, storage)


CONTRACTS = contracts_of(globals())
