"""A structure at work on the layers of a small network: measured, updated, refreshed and looked back with it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.estimators import EmpiricalFisher, Estimator
from ...curvature.layers.discovery import discover_layers
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import LOOKING_BACK, Needs, Record
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.damping.split import SideDamping, Split
from ...preconditioners.protocol import Observation, Preconditioner, refining
from ...preconditioners.structures.by_layer import ByLayer
from ...preconditioners.structures.identity import Identity
from ..optimizer.blocks import Block, make_blocks
from ..optimizer.observing import refresh
from ..optimizer.recording import fill, own_measures
from .cases import Batch, Case
from .contract import NotApplicable
from .measuring import captured

__all__ = ["LAMBDA", "Workbench", "estimator_for", "saved_copy"]

LAMBDA = 0.3
"""Damping of the method in every case."""

_RECORDED: dict[Any, tuple[dict[int, LayerStatistics], list[Tensor | None]]] = {}
_REMEMBERED = 512
"""How many passes are remembered; each is a few kilobytes."""

_ALWAYS = Needs.INPUTS | LOOKING_BACK | Needs.NORMS | Needs.SLOPES


def estimator_for(needs: Needs) -> Estimator:
    """An estimator that provides what a structure asks for, per sample and without sampling where possible.

    Raises:
        NotApplicable: if no registered estimator does.
    """
    from ..methods import registry

    wanted = needs & ~_ALWAYS
    candidates: list[Estimator] = [EmpiricalFisher(), *(cls() for cls in registry.parts()["curvature"].values())]
    for candidate in candidates:
        if wanted & candidate.provides == wanted:
            return candidate
    raise NotApplicable(f"no registered estimator provides {wanted}")


def saved_copy(state: Any) -> Any:
    """A state dictionary after a round trip through a file, loaded with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Workbench:
    """One structure on every layer of a case's network that it serves.

    Every tensor that a structure is given belongs to one call only: a structure that writes where it must not is seen
    by the purity contract and spoils nothing else.

    Args:
        part: the structure.
        case: network and data.
        names: put in front of every layer's name.
        shown: from a structure's ``needs`` to the needs whose statistics it is shown; default: it is shown everything.
        estimator: default: one that provides what the structure needs.

    Raises:
        NotApplicable: if the structure serves no layer of the network.
    """

    def __init__(
        self,
        part: Preconditioner | ByLayer,
        case: Case,
        *,
        names: str = "",
        shown: Callable[[Needs], Needs] | None = None,
        estimator: Estimator | None = None,
    ):
        self.case, self.shown = case, shown
        self.model = case.model()
        self.estimator = estimator_for(part.needs) if estimator is None else estimator
        self.layers = [replace(layer, name=names + layer.name) for layer in discover_layers(self.model)]
        made = make_blocks(self.layers, part, Identity(), strict=False)
        self.blocks = [block for block in made if not block.fallback]
        if not self.blocks:
            raise NotApplicable(f"it serves no layer of the network {case.name!r}")
        for index, block in enumerate(self.blocks):
            for view, value in zip(block.parameter_views(block.vector), self.values(block, index), strict=True):
                view.copy_(value)

    def values(self, block: Block, key: int) -> list[Tensor]:
        """Normal numbers in the shapes of a block's parameters."""
        return [self.case.randn(*p.shape, key=10 * key + index) for index, p in enumerate(block.parameters)]

    def momentum(self, block: Block) -> tuple[Tensor, ...]:
        """A copy of a block's momentum in the structure's layout."""
        return tuple(value.clone() for value in block.vector)

    def sides(self, block: Block, scale: Sequence[float] = (1.0, 1.0, 1.0)) -> SideDamping:
        """Damping of a block, each entry multiplied by a factor (whole, inputs, outputs)."""
        base = Split().sides(LAMBDA, block.positions)
        return SideDamping(base.whole * scale[0], base.inputs * scale[1], base.outputs * scale[2])

    # -- measuring ---------------------------------------------------------------------------------------------------

    def measure(
        self, batch: Batch | None = None, *, reduction: str = "mean", raw: bool = False, scale: float = 1.0
    ) -> dict[str, LayerStatistics]:
        """Statistics of one gradient, per layer, with everything any structure may ask for.

        Args:
            batch: default: the case's first.
            reduction: of the loss.
            raw: leave the rows of ``roots`` as autograd gave them, with their factor; else the factor is one.
            scale: multiplies every gradient, as if the loss were so many times as large.
        """
        inputs, targets = self.case.batch() if batch is None else batch
        found = self._recorded(inputs, targets, reduction)
        result: dict[str, LayerStatistics] = {}
        for index, layer in enumerate(self.layers):
            entry = fill(self.estimator, layer, found.get(index))
            if entry is not None:
                point = tuple(value.detach().clone() for value in layer.parameters.values())
                result[layer.name] = replace(_own(entry, raw, scale), parameters=point)
        return result

    def _recorded(self, inputs: Tensor, targets: Tensor, reduction: str) -> dict[int, LayerStatistics]:
        """Records by number of the layer; and the parameters' gradients. Copies, so that nobody else holds them.

        What is recorded depends on the mini-batch and the parameters, not on the structure or the names: structures on
        the same network share the passes through it.
        """
        record = Record.INPUTS | Record.GRADIENTS | Record.MEANS
        if self.estimator.needs_likelihood:
            record |= self.estimator.records(~Needs.NOTHING)
        parameters = list(self.model.parameters())
        measures = own_measures(self.blocks)
        own = tuple(
            (index, name, measure)
            for index, layer in enumerate(self.layers)
            for name, measure in measures.get(layer.name, {}).items()
        )
        key = (self.case, reduction, record, own, *(_content(value) for value in (inputs, targets, *parameters)))
        if key not in _RECORDED:
            if len(_RECORDED) == _REMEMBERED:
                _RECORDED.clear()
            wanted = {layer.name: record for layer in self.layers}
            batches = [(inputs.clone(), targets)]
            named = captured(self.case, self.model, self.layers, wanted, batches, reduction, measures=measures)
            found = {index: named[layer.name] for index, layer in enumerate(self.layers) if layer.name in named}
            _RECORDED[key] = found, [None if p.grad is None else p.grad.clone() for p in parameters]
        found, gradients = _RECORDED[key]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return {index: _copied(entry, self.layers[index]) for index, entry in found.items()}

    def observation(self, block: Block, entry: LayerStatistics, scale: float = 1.0) -> Observation:
        """What ``update`` is given: copies throughout."""
        gradients = dict(zip(block.layer.parameters, entry.gradients or (), strict=True))
        momentum = tuple(scale * value for value in block.vector)
        parameters = tuple(value.detach().clone() for value in block.parameters)
        if self.shown is not None:
            entry = _stripped(entry, self.shown(block.part.needs))
        own = tuple(gradients[name].clone() for name in block.names)
        return Observation(entry, own, momentum, 0.0, parameters)

    # -- the verbs ---------------------------------------------------------------------------------------------------

    def step(
        self,
        batch: Batch | None = None,
        *,
        reduction: str = "mean",
        raw: bool = False,
        scale: float = 1.0,
        damped: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Statistics of one mini-batch into every block's state, and a renewal of every inverse, as the optimizer does.

        Args:
            batch: default: the case's first.
            reduction: of the loss.
            raw: as for :meth:`measure`.
            scale: multiplies every gradient.
            damped: factors on the three dampings.
        """
        statistics = self.measure(batch, reduction=reduction, raw=raw, scale=scale)
        given = []
        for block in self.blocks:
            entry = statistics[block.layer.name]
            block.positions = entry.positions
            given.append(self.observation(block, entry, scale))
            block.part.update(block.state, given[-1])
        refresh(self.blocks, lambda block: self.sides(block, damped))
        for block, observation in zip(self.blocks, given, strict=True):
            if (part := refining(block.part)) is not None:
                part.refine(block.state, observation)

    def look_back(
        self, key: int = 0, batch: Batch | None = None, *, reduction: str = "mean", raw: bool = False
    ) -> None:
        """Let the structures that look back observe a step that moved every parameter a little."""
        looking = [block for block in self.blocks if block.part.needs & LOOKING_BACK]
        if not looking:
            return
        before = self.measure(batch, reduction=reduction, raw=raw)
        with self.moved(key):
            after = self.measure(batch, reduction=reduction, raw=raw)
        for block in looking:
            one, other = before[block.layer.name], after[block.layer.name]
            if self.shown is not None:
                needs = self.shown(block.part.needs)
                one, other = (_without_point(_stripped(entry, needs), needs) for entry in (one, other))
            block.part.observe_step(block.state, one, other, self.sides(block))

    def moved(self, key: int) -> _Moved:
        """Context in which every parameter has moved by a tenth."""
        steps = [self.case.randn(*p.shape, key=500 + 10 * key + i) for i, p in enumerate(self.model.parameters())]
        return _Moved(self.model, steps)

    def run(self, batches: Sequence[Batch] | None = None, *, reduction: str = "mean", raw: bool = False) -> Workbench:
        """The usual life of a state: two steps, two looks back. Returns the workbench."""
        first, second = batches or (self.case.batch(0), self.case.batch(1))
        self.step(first, reduction=reduction, raw=raw)
        self.step(second, reduction=reduction, raw=raw)
        for key, batch in enumerate((first, second)):
            self.look_back(key, batch, reduction=reduction, raw=raw)
        return self

    # -- what comes out ----------------------------------------------------------------------------------------------

    def direction(self, block: Block, momentum: tuple[Tensor, ...] | None = None) -> Tensor:
        """The preconditioned momentum as one vector over the served parameters (weight row by row, then bias)."""
        result = block.part.precondition(block.state, self.momentum(block) if momentum is None else momentum)
        return self.vector(block, result)

    def vector(self, block: Block, storage: tuple[Tensor, ...]) -> Tensor:
        """A storage as one vector over the served parameters."""
        return torch.cat([value.flatten() for value in block.parameter_views(storage)])

    def directions(self) -> list[Tensor]:
        """Of every block."""
        return [self.direction(block) for block in self.blocks]

    def dense(self, block: Block, scale: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
        """The damped curvature matrix of a block over its served parameters."""
        return block.part.to_dense(block.state, served_layer(block), self.sides(block, scale))

    def tensors(self) -> list[Tensor]:
        """Copies of all tensors of all states."""
        return [tensor.clone() for block in self.blocks for tensor in block.state.tensors()]


def _content(value: Tensor) -> tuple[Any, ...]:
    """What a small tensor holds, to tell it from others."""
    whole = value.detach().cpu()
    return tuple(whole.shape), whole.dtype, whole.contiguous().view(torch.uint8).numpy().tobytes()


def _copied(entry: LayerStatistics, layer: Layer) -> LayerStatistics:
    """A record of another copy of its layer, with tensors of its own."""
    changes: dict[str, Any] = {"layer": layer}
    for name, value in vars(entry).items():
        if isinstance(value, Tensor):
            changes[name] = value.clone()
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            changes[name] = tuple(item.clone() if isinstance(item, Tensor) else item for item in value)
    changes["measured"] = {name: value.clone() for name, value in entry.measured.items()}
    return replace(entry, **changes)


class _Moved:
    def __init__(self, model: nn.Module, steps: Sequence[Tensor]):
        self.parameters, self.steps = list(model.parameters()), steps
        self.saved = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def __enter__(self) -> None:
        for parameter, step in zip(self.parameters, self.steps, strict=True):
            parameter.add_(step, alpha=0.1)

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        for parameter, saved in zip(self.parameters, self.saved, strict=True):
            parameter.copy_(saved)


def served_layer(block: Block) -> Layer:
    """The layer with only the parameters that the block's structure serves."""
    if tuple(block.layer.parameters) == block.names:
        return block.layer
    return replace(block.layer, parameters={name: block.layer.parameters[name] for name in block.names})


def _own(entry: LayerStatistics, raw: bool, scale: float) -> LayerStatistics:
    """A record whose tensors nobody else holds, with gradients ``scale`` times as long."""
    changes: dict[str, Any] = {}
    if entry.gradients is not None:
        changes["gradients"] = tuple(scale * value for value in entry.gradients)
    if entry.roots is not None:
        rows, factor = entry.roots
        changes["roots"] = (scale * rows, factor) if raw else (scale * factor * rows, 1.0)
    if entry.vectors is not None:
        made = entry.vectors
        changes["vectors"] = lambda: tuple(scale * value for value in made())
    if entry.matrix is not None:
        whole = entry.matrix
        changes["matrix"] = lambda: scale**2 * whole()
    return replace(entry, **changes)


def _stripped(entry: LayerStatistics, needs: Needs) -> LayerStatistics:
    """A record that holds only what ``needs`` name."""
    kept: dict[str, Any] = {"output_gradient": None, "sampled_gradient": None, "sampled_parameter_gradients": None}
    kept["inputs"] = entry.inputs if Needs.INPUTS in needs else None
    kept["roots"] = entry.roots if Needs.ROOTS in needs else None
    kept["vectors"] = entry.vectors if Needs.VECTORS in needs else None
    kept["matrix"] = entry.matrix if Needs.MATRIX in needs else None
    if Needs.PAIRS not in needs:
        kept["mean_preactivation"] = kept["mean_gradient"] = None
    return replace(entry, **kept)


def _without_point(entry: LayerStatistics, needs: Needs) -> LayerStatistics:
    """What an evaluation around the step shows of parameters and their gradients: nothing, unless they are needed."""
    return entry if Needs.CHANGES in needs else replace(entry, parameters=None, gradients=None)
