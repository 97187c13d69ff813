"""The ``hooks`` backend: statistics from a forward hook on the layer and a tensor hook on its output.

Measured facts behind this choice: the pair survives in-place activations, modules called twice, gradient
accumulation and checkpointing, where ``register_full_backward_hook`` does not. Records are kept per call; a call whose
output never received a gradient (an evaluation pass, the first of two passes under checkpointing) is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..layers.attention import ProjectionWatch
from ..layers.layer import Layer
from ..likelihoods import Likelihood
from ..records.calls import Call, Calls, ParameterSum, column_sum
from ..records.joining import combine
from ..records.needs import PassKind, Record
from ..records.statistics import LayerStatistics
from .hooks import attach
from .passes import Pauses, accumulates
from .sampling import is_extra_backward, label_generator, require_predictive, roots_backward, sampled_backward
from .uses import Use, watch_attention

__all__ = ["Capture", "GradientHook"]


class Capture:
    """Hooks on a model, and the records they made since the last :meth:`collect`.

    Args:
        model: the model; only forward passes through the model itself count as passes.
        layers: its layers.
        likelihood: the model's predictive distribution, for sampled labels; ``None`` if no part needs it.
        loss_reduction: ``"mean"`` or ``"sum"``: how the user's loss combines the samples.
        seed: of the sampled labels. The labels of a pass depend on (seed, step, pass) only: no random state is kept.
    """

    name: ClassVar[str] = "hooks"
    cannot: ClassVar[Mapping[Record, str]] = {}

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], likelihood: Likelihood | None, loss_reduction: str, seed: int
    ):
        self.model = model
        self.layers = list(layers)
        self.likelihood = likelihood
        self.loss_reduction = loss_reduction
        self.seed = seed
        self.step = 0
        self.stream = 0  # of the sampled labels: one per process
        self._wanted: dict[str, Record] = {}
        self._calls = {layer.name: Calls() for layer in layers}
        self._parameter_sums: dict[str, list[ParameterSum]] = {}
        self._pass = 0
        self._kind: PassKind = "gradient"
        self._inside = False
        self._leaves: dict[int, list[Tensor]] = {}  # artificial ones of each pass
        self.pauses = Pauses()
        self._handles = attach(self)

    def arm(self, wanted: Mapping[str, Record], kind: PassKind = "gradient") -> None:
        """Choose what the following forward passes record, per layer name.

        Args:
            wanted: layers that are missing record nothing.
            kind: ``"gradient"``: a pass counts when a backward that fills ``.grad`` has arrived; ``"look back"``:
                parameters are frozen, an output that needs no gradient gets an artificial leaf so that the gradients at
                the pre-activations exist all the same; ``"forward"``: a pass counts without any gradient.
        """
        self._wanted = {name: record for name, record in wanted.items() if record}
        self._kind = kind

    def extended(self, layers: Sequence[Layer]) -> Capture:
        """A capture of more layers in place of this one, whose hooks are removed and whose records are dropped."""
        self.close()
        result = Capture(self.model, layers, self.likelihood, self.loss_reduction, self.seed)
        result.step, result.pauses = self.step, self.pauses
        return result

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was recorded, and the hooks, belong to the original."""
        fresh = {name: Calls() for name in self._calls}
        own = {"_handles": [], "_calls": fresh, "_parameter_sums": {}, "_leaves": {}, "pauses": Pauses()}
        return {**self.__dict__, **own, "_pass": 0, "_inside": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy places hooks on its own model."""
        self.__dict__.update(state)
        self._handles = attach(self)

    def close(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def discard_complete(self) -> None:
        """Forget calls that already have a gradient: the user threw that gradient away (``zero_grad``)."""
        if self._completed_passes() and not self._inside:
            self._pass += 1  # parts called one by one from here on are another pass
        for calls in self._busy().values():
            calls.discard_complete()
        self._forget_abandoned_sums()

    def collect(self) -> dict[str, LayerStatistics]:
        """Statistics per layer name from all complete calls since the last time; forgets every call."""
        result: dict[str, LayerStatistics] = {}
        done = self._completed_passes()
        every = self._kind == "forward"
        calls = {name: [call for call in entries if call.complete or every] for name, entries in self._busy().items()}
        sums = {
            name: [entry for entry in entries if every or entry.pass_index in done]
            for name, entries in self._parameter_sums.items()
        }
        self.clear()
        for layer in self.layers:
            if layer.name not in calls and layer.name not in sums:
                continue
            record = combine(layer, calls.get(layer.name, []), sums.get(layer.name, []), self.loss_reduction)
            if record is not None:
                result[layer.name] = record
        return result

    def clear(self) -> None:
        """Forget every call."""
        for calls in self._busy().values():
            calls.clear()
        self._parameter_sums.clear()
        self._pass, self._inside, self._leaves = 0, False, {}

    def _completed_passes(self) -> set[int]:
        return {call.pass_index for calls in self._busy().values() for call in calls if call.complete}

    def _busy(self) -> dict[str, Calls]:
        """The calls of every layer that has any."""
        return {name: calls for name, calls in self._calls.items() if calls.references}

    def wants(self, layer: Layer) -> bool:
        """Whether anything of a layer is to be recorded now."""
        return layer.name in self._wanted

    def begin_pass(self) -> None:
        """The model is called: a new pass."""
        self._pass, self._inside = self._pass + 1, True

    def end_pass(self, output: Any) -> None:
        """The model has returned ``output``."""
        self._inside = False
        self._on_model(output)

    def watch(self, layers: Sequence[Layer]) -> ProjectionWatch | None:
        """What records the projections of one call of an attention module; ``None`` if there is nothing to record."""
        wanted = [layer for layer in layers if layer.name in self._wanted]
        idle = self.pauses and self._kind != "look back"
        if idle or not wanted or not (torch.is_grad_enabled() or self._kind == "forward"):
            return None
        return watch_attention(wanted, self.on_use)

    def on_use(self, uses: Sequence[Use], output: Any) -> Tensor | None:
        """Record one output for every layer whose weight made it; returns what stands in its place, if anything."""
        uses = [use for use in uses if use.layer.name in self._wanted]
        if not uses or not isinstance(output, Tensor):
            return None
        if self.pauses:
            return self._with_leaf(output)
        if not self._inside and self._pass in self._completed_passes():
            self._pass += 1  # parts of the model are called one by one, and a backward has ended the last pass
        if self._kind == "forward":
            for use in uses:
                self._calls[use.layer.name].keep(self._new_call(use, output))
            return None
        replaced = self._with_leaf(output)
        output = output if replaced is None else replaced
        if not output.requires_grad:
            return None
        if replaced is None and output._is_view():
            # Linear on (N, ..., d) returns a view; an in-place activation would cut it off from the hook below.
            output = replaced = torch.ops.aten._unsafe_view(output, output.shape)
        for use in uses:
            call, name = self._new_call(use, output), use.layer.name
            hook = GradientHook(use.layer, call, self._wanted[name], self._calls[name], self.pauses)
            hook.leaves = self._leaves.get(self._pass, []) if self._kind == "look back" else hook.leaves
            output.register_hook(hook)
        return replaced

    def _with_leaf(self, output: Tensor) -> Tensor | None:
        """When looking back, the output with an artificial leaf if none is behind it, else ``None``.

        Parameters are frozen then: such a leaf lets a backward run at all, and tells which one fills leaves.
        """
        if self._kind != "look back" or not torch.is_grad_enabled():
            return None
        leaves = [] if self.pauses else self._leaves.setdefault(self._pass, [])
        if output.requires_grad and (leaves or self.pauses):
            return None
        leaves.append(torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
        return output + leaves[-1]

    def _new_call(self, use: Use, output: Tensor) -> Call:
        layer, wanted, call = use.layer, self._wanted[use.layer.name], use.call(self._pass, output)
        self._calls[layer.name].append(call)
        adapter = layer.adapter
        if adapter is None:
            return call
        if Record.INPUTS in wanted:
            call.input = adapter.recorded_input(layer.module, use.value.detach())
        if Record.MEANS in wanted:
            call.output_sum = column_sum(adapter.expand_output(layer.module, call.arranged(output.detach())))
        if wanted & (Record.SAMPLED | Record.CURVATURE_ROOTS) and output.requires_grad:
            call.edge = get_gradient_edge(output)
        return call

    def _on_model(self, output: Any) -> None:
        whole = {name for name, record in self._wanted.items() if Record.SAMPLED_PARAMETERS in record}
        extra = Record.SAMPLED | Record.SAMPLED_PARAMETERS | Record.CURVATURE_ROOTS
        if not any(record & extra for record in self._wanted.values()) or not torch.is_grad_enabled():
            return
        likelihood, output = require_predictive(self.likelihood, output)
        if not output.requires_grad:
            return
        roots_backward(output, likelihood, self._with_edge(Record.CURVATURE_ROOTS))
        calls = self._with_edge(Record.SAMPLED)
        if calls or whole:
            layers = [layer for layer in self.layers if layer.name in whole]
            generator = self._generator(output.device)
            sums = sampled_backward(output, likelihood, generator, self._pass, calls, layers)
            self._forget_abandoned_sums()
            for name, entry in sums.items():
                self._parameter_sums.setdefault(name, []).append(entry)
        for call in self._with_edge(Record.CURVATURE_ROOTS):
            call.edge = None

    def _with_edge(self, record: Record) -> list[Call]:
        """Calls of this pass that want ``record`` and can be reached from the output."""
        names = [name for name, wanted in self._wanted.items() if record in wanted]
        calls = [call for name in names for call in self._calls[name] if call.pass_index == self._pass]
        return [call for call in calls if call.edge is not None]

    def _forget_abandoned_sums(self) -> None:
        """Sums of passes whose graph was thrown away without a backward."""
        alive = {call.pass_index for calls in self._calls.values() for call in calls}
        for name, sums in self._parameter_sums.items():
            self._parameter_sums[name] = [entry for entry in sums if entry.pass_index in alive]

    def _generator(self, device: torch.device) -> torch.Generator:
        """A generator that depends on (seed, step, number of earlier passes that count or still may).

        A pass whose graph was thrown away leaves no trace; two passes before one joint backward differ.
        """
        everything = [call for calls in self._calls.values() for call in calls]
        earlier = {call.pass_index for call in everything if call.labelled or call.complete} - {self._pass}
        for call in everything:
            call.labelled |= call.pass_index == self._pass
        return label_generator(self.seed, self.step, len(earlier), device, self.stream)


class GradientHook:
    """Takes the gradients at one output.

    It owns its call until the first comes: with a graph that is thrown away, its records vanish.
    """

    def __init__(self, layer: Layer, call: Call, wanted: Record, calls: Calls, pauses: Pauses):
        self.leaves: Sequence[Tensor] = list(layer.parameters.values())
        self._layer, self._call, self._wanted, self._calls, self._pauses = layer, call, wanted, calls, pauses

    def __call__(self, gradient: Tensor) -> None:
        """Take it in, if it belongs to a backward that fills the leaves' ``.grad``."""
        if is_extra_backward() or self._pauses or not accumulates(self.leaves):
            return
        call, adapter = self._call, self._layer.adapter
        call.complete = True
        self._calls.keep(call)
        if Record.GRADIENTS in self._wanted:
            call.take_gradient(gradient)
        if Record.MEANS in self._wanted and adapter is not None:
            expanded = adapter.expand_output(self._layer.module, call.arranged(gradient.detach()))
            call.take_gradient_sum(column_sum(expanded))
