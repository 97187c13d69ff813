"""The ``hooks`` backend: statistics from a forward hook on the layer and a tensor hook on its output.

Measured facts behind this choice: the pair survives in-place activations, modules called twice, gradient
accumulation and checkpointing, where ``register_full_backward_hook`` does not. Records are kept per call; a call whose
output never received a gradient (an evaluation pass, the first of two passes under checkpointing) is dropped.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..errors import ArgumentError
from .calls import Call, Calls, ParameterSum, column_sum, join, mean_of_sums, total
from .hooks import attach
from .layers import Layer
from .likelihoods import Likelihood
from .sampling import is_extra_backward, require_predictive, sampled_backward
from .statistics import LayerStatistics

__all__ = ["Capture", "PassKind", "Record"]

PassKind = Literal["gradient", "look back", "forward"]


class Record(enum.Flag):
    """What to keep of one layer: its inputs, output gradients, sampled gradients, or only means (cheapest)."""

    NOTHING = 0
    INPUTS = enum.auto()
    GRADIENTS = enum.auto()
    MEANS = enum.auto()
    SAMPLED = enum.auto()
    SAMPLED_PARAMETERS = enum.auto()


class Capture:
    """Hooks on a model, and the records they made since the last :meth:`collect`.

    Args:
        model: the model; only forward passes through the model itself count as passes.
        layers: its layers.
        likelihood: the model's predictive distribution, for sampled labels; ``None`` if no part needs it.
        loss_reduction: ``"mean"`` or ``"sum"``: how the user's loss combines the samples.
        seed: of the sampled labels. The labels of a pass depend on (seed, step, pass) only: no random state is kept.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], likelihood: Likelihood | None, loss_reduction: str, seed: int
    ):
        self.model = model
        self.layers = list(layers)
        self.likelihood = likelihood
        self.loss_reduction = loss_reduction
        self.seed = seed
        self.step = 0
        self._wanted: dict[str, Record] = {}
        self._calls = {layer.name: Calls() for layer in layers}
        self._parameter_sums: dict[str, list[ParameterSum]] = {}
        self._pass = 0
        self._kind: PassKind = "gradient"
        self._inside = False
        self._handles = attach(self)

    def arm(self, wanted: Mapping[str, Record], kind: PassKind = "gradient") -> None:
        """Choose what the following forward passes record, per layer name.

        Args:
            wanted: layers that are missing record nothing.
            kind: ``"gradient"``: a pass counts when its gradient has arrived; ``"look back"``: parameters are frozen,
                an output that needs no gradient gets an artificial leaf so that the gradients at the pre-activations
                exist all the same; ``"forward"``: a pass counts without any gradient.
        """
        self._wanted = {name: record for name, record in wanted.items() if record}
        self._kind = kind

    def extended(self, layers: Sequence[Layer]) -> Capture:
        """A capture of more layers in place of this one, whose hooks are removed and whose records are dropped."""
        self.close()
        result = Capture(self.model, layers, self.likelihood, self.loss_reduction, self.seed)
        result.step = self.step
        return result

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was recorded, and the hooks, belong to the original."""
        fresh = {name: Calls() for name in self._calls}
        return {**self.__dict__, "_handles": [], "_calls": fresh, "_parameter_sums": {}, "_pass": 0, "_inside": False}

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
        done = self._completed_passes()
        for calls in self._calls.values():
            calls.discard_complete()
        for name, sums in self._parameter_sums.items():
            self._parameter_sums[name] = [entry for entry in sums if entry.pass_index not in done]

    def collect(self) -> dict[str, LayerStatistics]:
        """Statistics per layer name from all complete calls since the last time; forgets every call."""
        result: dict[str, LayerStatistics] = {}
        done = self._completed_passes()
        for layer in self.layers:
            calls = [call for call in self._calls[layer.name] if call.complete or self._kind == "forward"]
            sums = [
                entry
                for entry in self._parameter_sums.get(layer.name, [])
                if self._kind == "forward" or entry.pass_index in done
            ]
            if calls:
                result[layer.name] = self._combine(layer, calls, sums)
            elif sums:
                samples = sum(entry.samples for entry in sums)
                result[layer.name] = LayerStatistics(layer, samples, 1, sampled_parameter_gradients=mean_of_sums(sums))
        self.clear()
        return result

    def clear(self) -> None:
        """Forget every call."""
        for calls in self._calls.values():
            calls.clear()
        self._parameter_sums.clear()
        self._pass, self._inside = 0, False

    def _completed_passes(self) -> set[int]:
        return {call.pass_index for calls in self._calls.values() for call in calls if call.complete}

    def _combine(self, layer: Layer, calls: list[Call], sums: list[ParameterSum]) -> LayerStatistics:
        first_of_pass = {call.pass_index: call.samples for call in reversed(calls)}
        samples = sum(first_of_pass.values())
        scale = float(samples) if self.loss_reduction == "mean" else 1.0
        rows = sum(call.samples * call.positions for call in calls)
        output_sum = total([call.output_sum for call in calls])
        gradient_sum = total([call.gradient_sum for call in calls])
        return LayerStatistics(
            layer=layer,
            samples=samples,
            positions=rows // samples,
            gradient_scale=scale,
            inputs=join(calls, [call.input for call in calls]),
            output_gradient=join(calls, [call.gradient for call in calls]),
            sampled_gradient=join(calls, [call.sampled for call in calls]),
            mean_preactivation=None if output_sum is None else output_sum / rows,
            mean_gradient=None if gradient_sum is None else gradient_sum * (scale / rows),
            sampled_parameter_gradients=mean_of_sums(sums) if sums else None,
        )

    def _on_layer(self, layer: Layer, args: tuple[Any, ...], output: Any) -> Any:
        wanted = self._wanted.get(layer.name, Record.NOTHING)
        if not wanted or not isinstance(output, Tensor):
            return None
        if not self._inside and self._pass in self._completed_passes():
            self._pass += 1  # parts of the model are called one by one, and a backward has ended the last pass
        if self._kind == "forward":
            self._calls[layer.name].keep(self._new_call(layer, wanted, args[0], output))
            return None
        replaced = None
        if not output.requires_grad:
            if self._kind != "look back" or not torch.is_grad_enabled():
                return None
            leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            output = replaced = output + leaf
        elif output._is_view():
            # Linear on (N, ..., d) returns a view; an in-place activation would cut it off from the hook below.
            output = replaced = torch.ops.aten._unsafe_view(output, output.shape)
        call = self._new_call(layer, wanted, args[0], output)
        output.register_hook(_gradient_hook(layer, call, wanted, self._calls[layer.name]))
        return replaced

    def _new_call(self, layer: Layer, wanted: Record, value: Tensor, output: Tensor) -> Call:
        if layer.adapter is None:
            call = Call(self._pass, output.shape[0] if output.ndim else 1, 1)
            self._calls[layer.name].append(call)
            return call
        if output.ndim < layer.adapter.batched_ndim(layer.module):
            raise ArgumentError(f"layer {layer.name!r} was called on one unbatched sample; give it a batch of size 1")
        call = Call(self._pass, output.shape[0], layer.adapter.positions(layer.module, output))
        if Record.INPUTS in wanted:
            call.input = layer.adapter.recorded_input(layer.module, value.detach())
        if Record.MEANS in wanted:
            call.output_sum = column_sum(layer.adapter.expand_output(layer.module, output.detach()))
        if Record.SAMPLED in wanted and output.requires_grad:
            call.edge = get_gradient_edge(output)
        self._calls[layer.name].append(call)
        return call

    def _on_model(self, output: Any) -> None:
        rows = [name for name, record in self._wanted.items() if Record.SAMPLED in record]
        whole = {name for name, record in self._wanted.items() if Record.SAMPLED_PARAMETERS in record}
        if not (rows or whole) or not torch.is_grad_enabled():
            return
        likelihood, output = require_predictive(self.likelihood, output)
        if not output.requires_grad:
            return
        calls = [call for name in rows for call in self._calls[name] if call.pass_index == self._pass]
        calls = [call for call in calls if call.edge is not None]
        layers = [layer for layer in self.layers if layer.name in whole]
        generator = self._generator(output.device)
        sums = sampled_backward(output, likelihood, generator, self._pass, calls, layers)
        self._forget_abandoned_sums()
        for name, entry in sums.items():
            self._parameter_sums.setdefault(name, []).append(entry)

    def _forget_abandoned_sums(self) -> None:
        """Sums of passes whose graph was thrown away without a backward."""
        alive = {call.pass_index for calls in self._calls.values() for call in calls}
        for name, sums in self._parameter_sums.items():
            self._parameter_sums[name] = [entry for entry in sums if entry.pass_index in alive]

    def _generator(self, device: torch.device) -> torch.Generator:
        """A generator that depends on (seed, step, number of completed passes), so that idle passes leave no trace."""
        done = self._completed_passes()
        generator = torch.Generator(device=device)
        generator.manual_seed((self.seed * 1_000_003 + self.step) * 1_009 + len(done))
        return generator


def _gradient_hook(layer: Layer, call: Call, wanted: Record, calls: Calls) -> Callable[[Tensor], None]:
    """The hook owns its call until the gradient comes: with a graph that is thrown away, its records vanish."""

    def hook(gradient: Tensor) -> None:
        if is_extra_backward():  # it runs through the same tensors
            return
        call.complete = True
        calls.keep(call)
        if Record.GRADIENTS in wanted:
            call.gradient = gradient.detach()
        if Record.MEANS in wanted and layer.adapter is not None:
            call.gradient_sum = column_sum(layer.adapter.expand_output(layer.module, gradient.detach()))

    return hook
