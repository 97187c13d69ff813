"""Measurements for the contracts of estimators and quadratic forms, and the exact matrices they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...curvature.backends.capture import Capture
from ...curvature.declarations import EstimatorDeclarations, Measure, declared
from ...curvature.layers.discovery import discover_layers
from ...curvature.layers.layer import Layer
from ...curvature.products import GraphKeepingBackward, hessian_block
from ...curvature.quadratic_forms import DirectionalEvidence
from ...curvature.records.needs import Needs, Record
from ...curvature.records.statistics import LayerStatistics, Tensors
from ..optimizer.recording import fill
from .cases import Batch, Case

__all__ = ["MeasuredCase", "captured", "curvature_of", "exact_fisher", "exact_hessian"]


class MeasuredCase:
    """A case's network with hooks, to measure what an estimator or a quadratic form asks for.

    Args:
        case: network and data.
    """

    def __init__(self, case: Case):
        self.case, self.model = case, case.model()
        self.layers = discover_layers(self.model)

    def records(
        self, estimator: Any, batches: Sequence[Batch], *, reduction: str = "mean", seed: int = 0
    ) -> Mapping[str, LayerStatistics]:
        """What the backend records for an estimator of one gradient over micro-batches, not filled yet."""
        wanted = estimator.records(estimator.provides)
        products = (
            GraphKeepingBackward(self.layers)
            if Needs.PRODUCTS in declared(estimator, EstimatorDeclarations).asks
            else None
        )
        found = self._capture({layer.name: wanted for layer in self.layers}, batches, reduction, seed, products)
        if products is None:
            return found
        scales = {name: entry.gradient_scale / entry.samples for name, entry in found.items()}
        return {
            layer.name: replace(found[layer.name], hessian=partial(hessian_block, products, layer, scales[layer.name]))
            for layer in self.layers
            if layer.name in found
        }

    def statistics(
        self, estimator: Any, batches: Sequence[Batch], *, reduction: str = "mean", seed: int = 0
    ) -> dict[str, LayerStatistics]:
        """The same, filled by the estimator; of the layers that have statistics at all."""
        records = self.records(estimator, batches, reduction=reduction, seed=seed)
        known = [layer for layer in self.layers if layer.adapter is not None]
        filled = {layer.name: fill(estimator, layer, records.get(layer.name)) for layer in known}
        return {name: entry for name, entry in filled.items() if entry is not None}

    def form(self, form: Any, directions: Mapping[str, Tensors], *, seed: int = 0, copy: bool = True) -> Tensor:
        """(L, L) matrix that a quadratic form measures along the directions, or along copies of them."""
        wanted = Record.NOTHING
        if Needs.SCORES in form.needs:
            wanted |= Record.SAMPLED | Record.INPUTS
        if Needs.BATCH_SCORES in form.needs:
            wanted |= Record.SAMPLED_PARAMETERS
        generator = torch.Generator(device=self.case.device).manual_seed(seed)
        given = {name: tuple(value.clone() if copy else value for value in row) for name, row in directions.items()}
        names = [layer.name for layer in self.layers]
        if Needs.PRODUCTS in form.needs:
            self.model.zero_grad()
            with GraphKeepingBackward(self.layers) as products:
                inputs, targets = self.case.batch()
                with torch.enable_grad():
                    self.case.loss(self.model(inputs), targets).backward()
            measured: Tensor = form.measure(DirectionalEvidence(names, given, {}, products.product, generator))
            return measured
        found = self._capture(dict.fromkeys(names, wanted), [self.case.batch()], "mean", seed)
        return torch.as_tensor(form.measure(DirectionalEvidence(names, given, found, None, generator)))

    def directions(self) -> dict[str, Tensors]:
        """Normal directions of every layer."""
        return {
            layer.name: tuple(
                self.case.randn(*p.shape, key=70 + 10 * number + index)
                for index, p in enumerate(layer.parameters.values())
            )
            for number, layer in enumerate(self.layers)
        }

    def _capture(
        self,
        wanted: Mapping[str, Record],
        batches: Sequence[Batch],
        reduction: str,
        seed: int,
        products: GraphKeepingBackward | None = None,
    ) -> dict[str, LayerStatistics]:
        with products or nullcontext():
            return captured(self.case, self.model, self.layers, wanted, batches, reduction, seed)


def captured(
    case: Case,
    model: nn.Module,
    layers: Sequence[Layer],
    wanted: Mapping[str, Record],
    batches: Sequence[Batch],
    reduction: str = "mean",
    seed: int = 0,
    *,
    measures: Mapping[str, Mapping[str, Measure]] = MappingProxyType({}),
) -> dict[str, LayerStatistics]:
    """What the hooks record of one gradient over micro-batches, by layer; the gradient is left on the parameters."""
    capture = Capture(model, layers, case.distribution(), reduction, seed)
    capture.measures = measures
    capture.arm(wanted)
    model.zero_grad()
    try:
        with torch.enable_grad():
            for inputs, targets in batches:
                share = 1.0 / len(batches) if reduction == "mean" else 1.0
                (share * case.loss(model(inputs), targets, reduction)).backward()
        return capture.collect()
    finally:
        capture.close()


def curvature_of(entry: LayerStatistics) -> tuple[Tensor, Tensor]:
    """The matrix that an estimator's vectors stand for, else the matrix it gives, (P, P); and its standard error."""
    if entry.vectors is None:
        assert entry.matrix is not None
        matrix = entry.matrix()
        return matrix, torch.zeros_like(matrix)
    rows = torch.cat([value.flatten(1) for value in entry.vectors()], 1)
    outer = torch.einsum("vi,vj->vij", rows, rows)
    error = outer.std(0) / len(rows) ** 0.5 if len(rows) > 1 else torch.zeros_like(outer[0])
    return outer.mean(0), error


def _parameters(layer: Layer) -> list[str]:
    return [f"{layer.name}.{name}" for name in layer.parameters]


def exact_fisher(case: Case, batch: Batch, layer: Layer) -> Tensor:
    """Mean over samples of J' C J for one layer, J the Jacobian of the output, C the likelihood's curvature (P, P)."""
    model, names = case.model(), _parameters(layer)
    fixed = {name: value.detach() for name, value in model.named_parameters()}
    inputs, _ = batch
    total = None
    for sample in inputs:
        own = tuple(fixed[name] for name in names)

        def output(*values: Tensor, sample: Tensor = sample) -> Tensor:
            found: Tensor = functional_call(model, fixed | dict(zip(names, values, strict=True)), (sample[None],))
            return found

        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(output, own)
        rows = torch.cat([value.reshape(-1, p.numel()) for value, p in zip(jacobian, own, strict=True)], 1)
        roots = case.distribution().curvature_root(output(*own)).flatten(1)
        part = (roots @ rows).T @ (roots @ rows)
        total = part if total is None else total + part
    assert total is not None
    return total / len(inputs)


def exact_hessian(case: Case, batch: Batch, directions: Mapping[str, Tensors], layers: Sequence[Layer]) -> Tensor:
    """(L, L) of d_k' H d_l with the Hessian of the mini-batch loss, by differentiating along the directions."""
    model = case.model()
    fixed = {name: value.detach() for name, value in model.named_parameters()}
    inputs, targets = batch

    def loss(amounts: Tensor) -> Tensor:
        moved = dict(fixed)
        for amount, layer in zip(amounts, layers, strict=True):
            for name, value in zip(_parameters(layer), directions[layer.name], strict=True):
                moved[name] = fixed[name] + amount * value
        output: Tensor = functional_call(model, moved, (inputs,))
        return case.loss(output, targets)

    with torch.enable_grad():
        hessian: Any = torch.autograd.functional.hessian(loss, torch.zeros(len(layers)).to(inputs))
    result: Tensor = hessian
    return result
