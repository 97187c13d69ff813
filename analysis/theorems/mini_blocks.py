"""T9: MBF's blocks are diagonal sub-blocks of the layer's Fisher matrix, and its step is the block-diagonal solve."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...curvature.estimators import EmpiricalFisher
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Record
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.damping.split import SideDamping
from ...preconditioners.protocol import Observation
from ...preconditioners.structures.mini_block import MiniBlock, MiniBlockState
from ...preconditioners.structures.partitions import (
    FlatChunk,
    Kernel,
    Partition,
    PerInputAveraged,
    PerOutput,
    PerOutputAveraged,
)
from ..theorem import Control, Evidence, Inequality, Setting, Theorem, agreement
from .instances import Draws, network
from .measured import sample_gradients, statistics

__all__ = ["THEOREMS"]

_SAMPLES, _CLASSES, _LAMBDA = 6, 3, 0.05
_BOUND = 1e-10
_RECORD = Record.INPUTS | Record.GRADIENTS | Record.PER_SAMPLE


def _places(partition: Partition, layer: Layer) -> Tensor:
    """(blocks, d) places of each block's entries in (weight row by row, then bias), written down by hand."""
    weight = layer.parameters["weight"]
    if isinstance(partition, Kernel):
        return torch.arange(weight.numel()).reshape(weight.shape[0] * weight.shape[1], -1)
    rows, columns = weight.shape
    both = torch.cat(
        [torch.arange(rows * columns).reshape(rows, columns), rows * columns + torch.arange(rows)[:, None]], 1
    )
    return both.T if isinstance(partition, PerInputAveraged | FlatChunk) else both


def _problem(draws: Draws) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A convolution and a dense layer with five inputs and three outputs; inputs and labels."""
    layers = (nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, _CLASSES))
    return network(draws, *layers), draws.normal(_SAMPLES, 2, 3, 3), draws.choice(_CLASSES, _SAMPLES)


def _installed(part: MiniBlock, entry: LayerStatistics, layer: Layer) -> MiniBlockState:
    """The structure's state after one update and one refresh of its inverses."""
    gradients = entry.gradients or ()
    state = part.init(layer, tuple(parameter.detach() for parameter in layer.parameters.values()))
    part.update(state, Observation(entry, gradients, gradients))
    (request,) = part.matrices(state, SideDamping(_LAMBDA, 0.0, 0.0))
    part.install(state, request.operation.compute([request]))
    return state


def _one_layer(
    draws: Draws, partition: Partition, layer: Layer, entry: LayerStatistics, fisher: Tensor, whole: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """(library, formula) for the blocks and for the step."""
    part = MiniBlock(partition)
    state = _installed(part, entry, layer)
    places = _places(partition, layer).to(fisher.device)
    blocks = torch.stack([fisher[index][:, index] for index in places])
    blocks = blocks.mean(0, keepdim=True).expand_as(blocks) if partition.shared(layer) else blocks
    served = [layer.parameters[name] for name in part.serves(layer)]
    values = tuple(draws.normal(*parameter.shape) for parameter in served)
    storage = (layer.joint_matrix(values),) if part.joint else values
    found = part.precondition(state, storage)
    views = layer.parameter_views(found[0]) if part.joint else found
    step, vector = (torch.cat([value.flatten() for value in entries]) for entries in (views, values))
    dense = torch.zeros_like(fisher)
    for index, block in zip(places, blocks, strict=True):
        dense[index.unsqueeze(1), index] = block
    size = len(vector)
    curvature = (fisher if whole else dense)[:size, :size]
    damped = curvature + _LAMBDA * torch.eye(size, dtype=vector.dtype, device=vector.device)
    expected = torch.cholesky_solve(vector.unsqueeze(1), torch.linalg.cholesky(damped)).squeeze(1)
    stored = state.blocks if state.blocks.ndim == 3 else state.blocks.expand(len(places), -1, -1)
    name = type(partition).__name__
    return {f"{name}: blocks of the Fisher matrix": (stored, blocks), f"{name}: block-diagonal solve": (step, expected)}


def _check(setting: Setting, whole: bool = False, chunks: bool = False) -> Evidence:
    """Kernels of the convolution; outputs and inputs of the dense layers.

    Args:
        setting: seed and device.
        whole: the solve is compared with that of the whole layer's Fisher matrix: a control.
        chunks: the released driver's flat chunks stand in for rows: a control.
    """
    draws = Draws(setting, 900)
    model, inputs, labels = _problem(draws)
    layers, found = statistics(model, inputs, lambda output: functional.cross_entropy(output, labels), _RECORD)
    everything: list[Inequality] = []
    for layer in layers:
        own = list(layer.parameters.values())
        rows = sample_gradients(
            model, own, inputs, lambda out, index: functional.cross_entropy(out, labels[index : index + 1])
        )
        fisher = rows.T @ rows / _SAMPLES
        dense: tuple[Partition, ...] = (PerOutput(), PerOutputAveraged(), PerInputAveraged())
        partitions = (Kernel(),) if layer.kind.startswith("Conv") else ((FlatChunk(),) if chunks else dense)
        entry = EmpiricalFisher().fill(found[layer.name])
        for partition in partitions:
            pairs = _one_layer(draws, partition, layer, entry, fisher, whole)
            for name, (value, expected) in pairs.items():
                everything.append(agreement(f"{layer.kind} {layer.name}, {name}", value[None], expected[None], _BOUND))
    return Evidence(tuple(everything), (), {"lambda": _LAMBDA})


THEOREMS = (
    Theorem(
        "T9",
        "Mini-blocks are diagonal sub-blocks of the layer's empirical Fisher matrix, and the batched solve is "
        "the solve with the block-diagonal matrix.",
        r"F_b = \frac{1}{m} \sum_i g_{i,b} g_{i,b}^T, \quad p = (blockdiag(F_b) + \lambda I)^{-1} g",
        "arXiv:2202.04124 (blocks); docs/PAPERS.md 2.2",
        _check,
        partial(_check, whole=True),
        "compared with the solve of the whole layer's matrix, which is not block diagonal",
        (Control("flat chunks of the released driver are neither rows nor columns", partial(_check, chunks=True)),),
    ),
)
