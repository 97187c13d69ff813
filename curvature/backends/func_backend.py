"""The ``func`` backend: everything measured again with ``torch.func``, exactly, for any module.

Rows at the pre-activations are derivatives with respect to zeros added to the layers' outputs; whole gradients are
derivatives with respect to the parameters, vectorised over samples. Nothing is read off the structure of a layer, which
makes this backend the oracle of the others, and lets it serve modules that no adapter reads (LSTM, custom ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...errors import ArgumentError
from ..layers.layer import Layer
from ..records.calls import Call, ParameterSum, column_sum
from ..records.needs import Record
from ..records.ownership import Ownership
from ..records.statistics import SampleGradients
from .replay import Measured, Pass, ReplayBackend
from .sampling import require_predictive, slope_at
from .uses import Use, observed

__all__ = ["FuncBackend", "Model"]

Named = dict[str, Tensor]
Shifts = dict[str, tuple[Tensor, ...]]


class FuncBackend(ReplayBackend):
    """Exact measurements with ``torch.func``.

    Costs a few evaluations of the model per step; memory N times the layers whose whole gradients are wanted.

    Attributes:
        chunk: samples (and roots) differentiated at a time, >= 1; bounds the memory of intermediate results.
    """

    name: ClassVar[str] = "func"
    chunk: int = 64

    def measure(self, entry: Pass, wanted: Mapping[str, Record]) -> dict[str, Measured]:
        """Everything the layers want of one pass.

        Raises:
            ArgumentError: if the model cannot be repeated, or not sample by sample.
        """
        layers = [layer for layer in self.layers if layer.name in wanted]
        model = Model(self.model, layers, entry)
        result = {layer.name: Measured() for layer in layers}
        model.require_same_output(entry.output, self.name)
        for layer in layers:
            result[layer.name].calls = model.calls(layer, wanted[layer.name])
        self._settle(entry, layers, result)
        cotangents = self._cotangents(entry, wanted.values())
        try:
            self._fill_rows(model, entry, wanted, result, cotangents)
            for record, cotangent in cotangents.items():
                self._fill_whole(model, entry, wanted, result, record, cotangent)
            self._fill_sums(model, entry, wanted, result, cotangents)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.func's own refusals: shapes that depend on data, packed sequences
            raise _not_by_sample(f"torch.func refuses it: {str(error).partition('. ')[0]}") from error
        return result

    def _settle(self, entry: Pass, layers: Sequence[Layer], result: Mapping[str, Measured]) -> None:
        """Whose the rows of every call are, as the ``hooks`` backend finds it out where shapes do not say it."""
        named = {layer.name: layer for layer in layers if layer.adapter is not None}
        calls = [call for name in named for call in result[name].calls]
        if all(call.samples == entry.samples and call.positions % call.samples for call in calls):
            return

        def replay(buffers: Named) -> Any:
            return functional_call(self.model, buffers, entry.args, entry.kwargs)

        self._probes.settle(named, entry.output, calls, {}, replay)
        for call in calls:
            if call.ownership is not None and call.ownership.owners is None and call.arrange is None:
                _give_each_sample_its_own(call)

    def _cotangents(self, entry: Pass, wanted: Iterable[Record]) -> dict[Record, Tensor]:
        """Per quantity the (N, K, ...) vectors that are pulled back from the model's output."""
        asked = Record.NOTHING
        for record in wanted:
            asked |= record
        found: dict[Record, Tensor] = {}
        if entry.gradient is not None and asked & (Record.GRADIENTS | Record.MEANS):
            found[Record.GRADIENTS] = entry.gradient.unsqueeze(1)
        if entry.targets is not None:
            likelihood, output = require_predictive(entry.likelihood, entry.output)
            found[Record.SAMPLED] = slope_at(likelihood, output, entry.targets).unsqueeze(1)
        if Record.CURVATURE_ROOTS in asked:
            likelihood, output = require_predictive(entry.likelihood, entry.output)
            found[Record.CURVATURE_ROOTS] = likelihood.curvature_root(output).transpose(0, 1)
        return found

    def _fill_rows(
        self,
        model: Model,
        entry: Pass,
        wanted: Mapping[str, Record],
        result: Mapping[str, Measured],
        cotangents: Mapping[Record, Tensor],
    ) -> None:
        """Gradients and roots at the pre-activations, from one linearisation with respect to the layers' outputs."""
        rows = Record.GRADIENTS | Record.MEANS | Record.SAMPLED | Record.CURVATURE_ROOTS
        names = [layer.name for layer in model.layers if model.was_seen(layer) and wanted[layer.name] & rows]
        apart = [name for name in names if result[name].calls and all(call.copies > 1 for call in result[name].calls)]
        names = [name for name in names if name not in apart]
        for record, cotangent in cotangents.items() if apart else ():
            shared = model.rows_of_each(apart, cotangent, self.chunk)
            for name in apart:
                for call, value in zip(result[name].calls, shared[name], strict=True):
                    _store(model.layer(name), call, wanted[name], record, value.transpose(0, 1).flatten(1, 2))
        if not names or not cotangents:
            return
        pull = _pull_back(lambda shifts: model.run({}, shifts), model.zeros(names), self.chunk)
        for record, cotangent in cotangents.items():
            found = pull(cotangent.transpose(0, 1).contiguous())
            for name in names:
                layer = model.layer(name)
                for call, value in zip(result[name].calls, found[name], strict=True):
                    _store(layer, call, wanted[name], record, value.detach())

    def _fill_whole(
        self,
        model: Model,
        entry: Pass,
        wanted: Mapping[str, Record],
        result: Mapping[str, Measured],
        record: Record,
        cotangent: Tensor,
    ) -> None:
        """Whole gradients per sample, for the layers that want them of this quantity."""
        asked = record | Record.PER_SAMPLE
        layers = [layer for layer in model.layers if asked in wanted[layer.name]]
        if not layers:
            return
        found = model.per_sample(layers, cotangent, self.chunk)
        for layer in layers:
            values = tuple(found[name] for name in model.names(layer))
            if record is not Record.CURVATURE_ROOTS:
                values = tuple(value.squeeze(1) for value in values)
            old = result[layer.name].whole
            result[layer.name].whole = SampleGradients(
                values if record is Record.GRADIENTS else old.loss,
                values if record is Record.SAMPLED else old.sampled,
                values if record is Record.CURVATURE_ROOTS else old.roots,
            )

    def _fill_sums(
        self,
        model: Model,
        entry: Pass,
        wanted: Mapping[str, Record],
        result: Mapping[str, Measured],
        cotangents: Mapping[Record, Tensor],
    ) -> None:
        """Parameter gradients of the sampled loss, summed over samples."""
        layers = [layer for layer in model.layers if Record.SAMPLED_PARAMETERS in wanted[layer.name]]
        if not layers:
            return
        pull = _pull_back(lambda chosen: model.run(chosen, {}), model.parameters(layers), self.chunk)
        found = pull(cotangents[Record.SAMPLED].transpose(0, 1))
        for layer in layers:
            values = tuple(found[name][0].detach() for name in model.names(layer))
            result[layer.name].sums = [ParameterSum(entry.index, entry.samples, values)]


def _linearised(function: Callable[[Any], Tensor], at: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Value of a function and its pull-back."""
    output, pull = vjp(function, at)[:2]
    return output, pull


def _pull_back(function: Callable[[Any], Tensor], at: Any, chunk: int) -> Callable[[Tensor], Any]:
    """Pull-back of many vectors (K, *output) at once."""
    try:
        _, pull = _linearised(function, at)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch.func refuses packed sequences
        return _plain_pull_back(function, at)[1]

    def along(vectors: Tensor) -> Any:
        return vmap(pull, chunk_size=chunk)(vectors)[0]

    return along


def _plain_pull_back(function: Callable[[Any], Tensor], at: Any) -> tuple[Tensor, Callable[[Iterable[Tensor]], Any]]:
    """Value of a function, and the pull-back of vectors one by one: plain autograd refuses nothing that a loop does."""
    leaves, spec = tree_flatten(at)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = function(tree_unflatten(leaves, spec))
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}

    def along(vectors: Iterable[Tensor]) -> Any:
        pulled = [torch.autograd.grad(output, leaves, vector, **options) for vector in vectors]
        return tree_unflatten([torch.stack(values) for values in zip(*pulled, strict=True)], spec)

    return output, along


def _give_each_sample_its_own(call: Call) -> None:
    """Make rows that belong to all samples into as many copies: gradients are measured for each."""
    samples, entries = call.ownership.samples if call.ownership is not None else 1, call.samples
    owners = torch.arange(samples).repeat_interleave(entries)
    call.samples, call.copies = samples * entries, samples
    call.ownership = Ownership(samples, owners[:, None].repeat(1, call.positions))
    if call.input is not None:
        call.input = call.input.repeat(samples, *[1] * (call.input.ndim - 1))
    if call.output_sum is not None:
        call.output_sum = call.output_sum * samples


def _store(layer: Layer, call: Call, wanted: Record, record: Record, value: Tensor) -> None:
    """Put the (K, ...) derivatives at one call where they belong."""
    if record is Record.CURVATURE_ROOTS and record in wanted:
        call.roots = call.arranged_all(value).transpose(0, 1)
    if record is Record.SAMPLED and record in wanted:
        call.sampled = call.arranged(value[0])
    if record is Record.GRADIENTS:
        if record in wanted:
            call.gradient = call.arranged(value[0])
        if Record.MEANS in wanted and layer.adapter is not None:
            call.gradient_sum = column_sum(layer.adapter.expand_output(layer.module, call.arranged(value[0])))


class Model:
    """A model on the arguments of one pass, as a function of parameters and of shifts of its layers' outputs.

    Args:
        model: the module; its buffers are copied, so that a forward pass cannot change them.
        layers: the layers that are looked at.
        entry: the pass.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], entry: Pass):
        self.model = model
        self.layers = list(layers)
        self._constants: Named = {name: value.detach() for name, value in model.named_parameters()}
        self._constants |= {name: value.clone() for name, value in model.named_buffers()}
        self._full = {id(value): name for name, value in model.named_parameters()}
        self._leaves, self._spec = tree_flatten((entry.args, entry.kwargs))
        self._batched = [
            isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == entry.samples for leaf in self._leaves
        ]
        self._leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        self._pass = entry
        self._uses: dict[str, list[tuple[Use, Tensor]]] = {layer.name: [] for layer in layers}
        with torch.no_grad(), self._watched():
            self._output = self._call(self._constants, self._leaves)

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def was_seen(self, layer: Layer) -> bool:
        """Whether a call of the layer was seen, of its own module or inside the attention that uses its weights."""
        return bool(self._uses[layer.name])

    def names(self, layer: Layer) -> list[str]:
        """Full names of a layer's parameters, in the layer's order."""
        return [self._full[id(value)] for value in layer.parameters.values()]

    def parameters(self, layers: Sequence[Layer]) -> Named:
        """The layers' parameters by full name."""
        return {name: self._constants[name] for layer in layers for name in self.names(layer)}

    def zeros(self, names: Sequence[str]) -> Shifts:
        """A zero for every call of every layer."""
        return {name: tuple(torch.zeros_like(output) for _, output in self._uses[name]) for name in names}

    def run(self, chosen: Named, shifts: Shifts) -> Tensor:
        """The model's output with ``chosen`` in the place of its parameters and ``shifts`` added to layers' outputs."""
        with self._shifted(shifts):
            return self._call(self._constants | chosen, self._leaves)

    def rows_of_each(self, names: Sequence[str], cotangent: Tensor, chunk: int) -> dict[str, tuple[Tensor, ...]]:
        """(N, K, ...) per call of layers that see no samples: K vectors pulled back through each sample's output."""
        at = self.zeros(names)

        def one(constants: Named, leaves: list[Any], vectors: Tensor) -> tuple[Shifts, Tensor]:
            batch = [leaf.unsqueeze(0) if single else leaf for leaf, single in zip(leaves, self._batched, strict=True)]

            def run(shifts: Shifts) -> Tensor:
                with self._shifted(shifts):
                    return self._call(constants, batch)

            output, pull = _linearised(run, at)
            found: Shifts = vmap(lambda vector: pull(vector.unsqueeze(0))[0])(vectors)
            return found, output.squeeze(0)

        def together(shifts: Shifts) -> Tensor:
            return self.run({}, shifts)

        found = self._one_by_one(one, together, at, cotangent, chunk)
        return {name: tuple(value.detach() for value in values) for name, values in found.items()}

    def per_sample(self, layers: Sequence[Layer], cotangent: Tensor, chunk: int) -> Named:
        """(N, K, *shape) per parameter: K vectors (N, K, ...) pulled back through each sample's own output."""

        def one(constants: Named, leaves: list[Any], vectors: Tensor) -> tuple[Named, Tensor]:
            batch = [leaf.unsqueeze(0) if single else leaf for leaf, single in zip(leaves, self._batched, strict=True)]
            chosen = {name: constants[name] for layer in layers for name in self.names(layer)}
            output, pull = _linearised(lambda values: self._call(constants | values, batch), chosen)
            found: Named = vmap(lambda vector: pull(vector.unsqueeze(0))[0])(vectors)
            return found, output.squeeze(0)

        def together(values: Named) -> Tensor:
            return self._call(self._constants | values, self._leaves)

        found = self._one_by_one(one, together, self.parameters(layers), cotangent, chunk)
        return {name: value.detach() for name, value in found.items()}

    def _one_by_one(
        self, one: Callable[..., Any], together: Callable[[Any], Tensor], at: Any, cotangent: Tensor, chunk: int
    ) -> Any:
        """``one`` for all samples, vectorised; samples that cannot be run alone are told apart at the joint output.

        Those of a graph, of experts, of packed sequences: N K backward passes through the whole batch.

        Raises:
            ArgumentError: if neither is possible.
        """
        axes = [0 if single else None for single in self._batched]
        # One view of the parameters per sample: recurrent layers add in place to what they made of parameters alone.
        each = {name: value.expand(len(cotangent), *value.shape) for name, value in self._constants.items()}
        try:
            found, output = vmap(one, in_dims=(0, axes, 0), chunk_size=chunk)(each, self._leaves, cotangent)
            _require_equal(output, self._output, "its output for one sample depends on the other samples")
            return found
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError):  # ours, and what a model says that needs its whole batch
            return self._apart_at_output(together, at, cotangent)

    def _apart_at_output(self, together: Callable[[Any], Tensor], at: Any, cotangent: Tensor) -> Any:
        """K vectors of every sample pulled back through the whole batch, by plain autograd: it refuses nothing."""
        output, pull = _plain_pull_back(together, at)
        _require_equal(output, self._output, "a second evaluation gives another output")

        def placed() -> Iterator[Tensor]:
            for place, vectors in enumerate(cotangent):
                for vector in vectors:
                    along = torch.zeros_like(output)
                    along[place] = vector
                    yield along

        leaves, spec = tree_flatten(pull(placed()))
        return tree_unflatten([leaf.unflatten(0, cotangent.shape[:2]) for leaf in leaves], spec)

    def require_same_output(self, output: Tensor, backend: str) -> None:
        """Check that the pass can be repeated. One synchronisation with the device."""
        _require_equal(self._output, output, f"a second evaluation by backend={backend!r} gives another output")

    def calls(self, layer: Layer, wanted: Record) -> list[Call]:
        """The calls of a layer with their inputs and sums of outputs; one without data if none was seen as a module."""
        if layer.adapter is None or not self._uses[layer.name]:
            return [Call(layer.name, self._pass.index, self._pass.samples, 1)]
        result: list[Call] = []
        for use, output in self._uses[layer.name]:
            call = use.call(self._pass.index, output)
            if Record.INPUTS in wanted:
                call.input = layer.adapter.recorded_input(layer.module, use.value)
            if Record.MEANS in wanted:
                call.output_sum = column_sum(layer.adapter.expand_output(layer.module, call.arranged(output)))
            result.append(call)
        return result

    def _call(self, values: Named, leaves: Sequence[Any]) -> Tensor:
        args, kwargs = tree_unflatten(list(leaves), self._spec)
        return self._pass.read(functional_call(self.model, values, args, kwargs))

    def _watched(self) -> AbstractContextManager[None]:
        """Keep copies of inputs and outputs of every call: a later operation may work in place."""

        def keep(uses: Sequence[Use], output: Tensor) -> None:
            for use in uses:
                self._uses[use.layer.name].append((use._replace(value=use.value.clone()), output.clone()))

        return observed([layer for layer in self.layers if layer.adapter is not None], keep)

    def _shifted(self, shifts: Shifts) -> AbstractContextManager[None]:
        """Add one shift per call to the layers' outputs."""
        left = {name: list(values) for name, values in shifts.items()}

        def add(uses: Sequence[Use], output: Tensor) -> Tensor:
            for use in uses:
                output = output + left[use.layer.name].pop(0)
            return output

        return observed([self.layer(name) for name in shifts], add)


def _require_equal(found: Tensor, expected: Tensor, reason: str) -> None:
    tolerance = 1e3 * torch.finfo(expected.dtype).eps
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise _not_by_sample(reason)


def _not_by_sample(reason: str) -> ArgumentError:
    return ArgumentError(
        f"the model cannot be measured sample by sample: {reason} (random numbers, statistics of the batch, or an "
        "input without a batch axis first); put it into eval mode, or use backend='hooks'"
    )
