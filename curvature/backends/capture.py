"""The ``hooks`` backend: statistics from a forward hook on the layer and a tensor hook on its output.

Measured facts behind this choice: the pair survives in-place activations, modules called twice, gradient
accumulation and checkpointing, where ``register_full_backward_hook`` does not. Records are kept per call; a call whose
output never received a gradient (an evaluation pass, the first of two passes under checkpointing) is dropped.

The hooks hold their capture weakly, and belong to the modules they were placed on. When the capture's optimizer is gone
they do nothing. A copy of the model (a teacher, an exponential moving average) and a pickled model carry hooks without
a capture, which do nothing either.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..layers.attention import ProjectionWatch
from ..layers.layer import Layer
from ..records.calls import Call, Calls, ParameterSum, column_sum
from ..records.joining import combine
from ..records.needs import PassKind, Record
from ..records.statistics import LayerStatistics
from .backend import Backend
from .passes import OWN, Pauses, accumulates
from .sampling import label_generator, require_predictive, roots_backward, sampled_backward
from .uses import Use, attention_modules, use_of, watch_attention

__all__ = ["Capture", "Hook"]


class _Asked(NamedTuple):
    """A layer's ``Record``, read once: a hook must not take flags apart at every call."""

    inputs: bool
    gradients: bool
    means: bool
    sampled: bool
    roots: bool
    whole: bool

    @classmethod
    def of(cls, record: Record) -> _Asked:
        """What hooks ask of it."""
        return cls(
            Record.INPUTS in record,
            Record.GRADIENTS in record,
            Record.MEANS in record,
            Record.SAMPLED in record,
            Record.CURVATURE_ROOTS in record,
            Record.SAMPLED_PARAMETERS in record,
        )


class Capture(Backend):
    """See :class:`~.backend.Backend`."""

    name: ClassVar[str] = "hooks"
    _original: ClassVar[tuple[str, ...]] = (*Backend._original, "_calls", "_arms", "_parameter_sums", "_leaves")

    _asked: Mapping[str, _Asked] = MappingProxyType({})
    _hooked: frozenset[str] = frozenset()  # names of layers with hooks
    _extra = False  # whether some layer asks for a backward of our own

    def arm(self, wanted: Mapping[str, Record], kind: PassKind = "gradient") -> None:
        """Choose what the following forward passes record; see the base class."""
        self._wanted, self._kind = wanted, kind
        known = self._arms.get(id(wanted))
        if known is None or known[0] is not wanted:  # steps on which the same is due share one mapping
            asked = {name: _Asked.of(record) for name, record in wanted.items() if record}
            extra = any(entry.sampled or entry.roots or entry.whole for entry in asked.values())
            if len(self._arms) > 64:
                self._arms.clear()
            if not self._hooked.issuperset(asked):
                before, self._hooked = self._hooked, self._hooked | frozenset(asked)
                self._handles += self._hooks_beyond(before)
            known = self._arms[id(wanted)] = (wanted, asked, extra)
        _, self._asked, self._extra = known

    def discard_complete(self) -> None:
        """Forget calls that already have a gradient: the user threw that gradient away (``zero_grad``)."""
        if not (self._calls.made or self._parameter_sums):
            return
        if not self._inside and any(call.complete for call in self._calls.alive()):
            self._pass += 1  # parts called one by one from here on are another pass
        self._calls.discard_complete()
        self._forget_abandoned_sums()

    def collect(self) -> dict[str, LayerStatistics]:
        """Statistics per layer name from all complete calls since the last time; forgets every call."""
        every, done = self._kind == "forward", set()
        calls: dict[str, list[Call]] = {}
        for call in self._calls.alive():
            if call.complete:
                done.add(call.pass_index)
            if call.complete or every:
                calls.setdefault(call.layer, []).append(call)
        sums = {
            name: [entry for entry in entries if every or entry.pass_index in done]
            for name, entries in self._parameter_sums.items()
        }
        self.clear()
        result: dict[str, LayerStatistics] = {}
        for layer in self.layers if calls or sums else ():
            if layer.name in calls or layer.name in sums:
                record = combine(layer, calls.get(layer.name, []), sums.get(layer.name, []), self.loss_reduction)
                if record is not None:
                    result[layer.name] = record
        return result

    def _forget(self) -> None:
        self._calls = Calls()
        self._arms: dict[int, tuple[Mapping[str, Record], dict[str, _Asked], bool]] = {}
        self._parameter_sums: dict[str, list[ParameterSum]] = {}
        self._pass, self._inside = 0, False
        self._leaves: dict[int, list[Tensor]] = {}  # artificial ones of each pass

    def clear(self) -> None:
        """Forget every call."""
        if self._calls.made:
            self._calls.clear()
        self._parameter_sums.clear()
        self._pass, self._inside, self._leaves = 0, False, {}

    def _attach(self) -> list[Any]:
        return self._hooks_beyond(frozenset())

    def _hooks_beyond(self, before: frozenset[str]) -> list[Any]:
        """Hooks on layers of which something is recorded at some time; a method that measures nothing places none.

        Args:
            before: names of layers that have theirs already.
        """
        handles: list[Any] = []
        fresh = self._hooked - before
        for layer in self.layers:
            if layer.kind != "Attention" and layer.name in fresh:
                hook = LayerHook(self, layer)
                handles += [own.register_forward_hook(hook, with_kwargs=True, prepend=True) for own in layer.modules]
        for module, layers in attention_modules(self.layers).items():
            names = {layer.name for layer in layers}
            if names & fresh and not names & before:
                watch = AttentionHooks(self, module, layers)
                handles.append(module.register_forward_pre_hook(watch.enter))
                handles.append(module.register_forward_hook(watch.leave, always_call=True))
        if fresh and not before:
            handles.append(self.model.register_forward_pre_hook(BeginHook(self)))
            handles.append(self.model.register_forward_hook(EndHook(self)))
        return handles

    # -- what the hooks tell -----------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """The model is called: a new pass."""
        self._pass, self._inside = self._pass + 1, True

    def end_pass(self, output: Any) -> None:
        """The model has returned ``output``: run the backwards of our own, while its graph is alive."""
        self._inside = False
        if not self._extra or not torch.is_grad_enabled():
            return
        likelihood, output = require_predictive(self.likelihood, output, self.output)
        if not output.requires_grad:
            return
        calls = [call for call in self._calls.alive() if call.pass_index == self._pass and call.edge is not None]
        rooted = [call for call in calls if self._asked[call.layer].roots]
        if rooted:
            roots_backward(output, likelihood, rooted)
        sampled = [call for call in calls if self._asked[call.layer].sampled]
        whole = [layer for layer in self.layers if layer.name in self._asked and self._asked[layer.name].whole]
        if sampled or whole:
            sums = sampled_backward(output, likelihood, self._generator(output.device), self._pass, sampled, whole)
            self._forget_abandoned_sums()
            for name, entry in sums.items():
                self._parameter_sums.setdefault(name, []).append(entry)
        for call in rooted:
            call.edge = None

    def watch(self, layers: Sequence[Layer]) -> ProjectionWatch | None:
        """What records the projections of one call of an attention module; ``None`` if there is nothing to record."""
        wanted = [layer for layer in layers if layer.name in self._asked]
        idle = self.pauses.depth and self._kind != "look back"
        if idle or not wanted or not (torch.is_grad_enabled() or self._kind == "forward"):
            return None
        return watch_attention(wanted, self.on_use)

    def on_use(self, uses: Sequence[Use], output: Any) -> Tensor | None:
        """Record one output for every layer whose weight made it; returns what stands in its place, if anything."""
        if not isinstance(output, Tensor):
            return None
        if self.pauses.depth:
            return self._with_leaf(output)
        if not self._inside and any(call.complete and call.pass_index == self._pass for call in self._calls.alive()):
            self._pass += 1  # parts of the model are called one by one, and a backward has ended the last pass
        if self._kind == "forward":
            for use in uses:
                self._calls.keep(self._new_call(use, output))
            return None
        replaced = self._with_leaf(output) if self._kind == "look back" else None
        output = output if replaced is None else replaced
        if not output.requires_grad:
            return None
        if replaced is None and output._is_view():
            # Linear on (N, ..., d) returns a view; an in-place activation would cut it off from the hook below.
            output = replaced = torch.ops.aten._unsafe_view(output, output.shape)
        for use in uses:
            call, layer = self._new_call(use, output), use.layer
            looks_back = self._kind == "look back"
            leaves = self._leaves.get(self._pass, []) if looks_back else list(layer.parameters.values())
            output.register_hook(GradientHook(layer, call, self._asked[layer.name], self._calls, self.pauses, leaves))
        return replaced

    def _with_leaf(self, output: Tensor) -> Tensor | None:
        """When looking back, the output with an artificial leaf if none is behind it, else ``None``.

        Parameters are frozen then: such a leaf lets a backward run at all, and tells which one fills leaves.
        """
        if self._kind != "look back" or not torch.is_grad_enabled():
            return None
        leaves = [] if self.pauses.depth else self._leaves.setdefault(self._pass, [])
        if output.requires_grad and (leaves or self.pauses.depth):
            return None
        leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        leaves.append(leaf)
        return output + leaf

    def _new_call(self, use: Use, output: Tensor) -> Call:
        layer, asked, call = use.layer, self._asked[use.layer.name], use.call(self._pass, output)
        self._calls.append(call)
        adapter = layer.adapter
        if adapter is None:
            return call
        if asked.inputs:
            call.input = adapter.recorded_input(layer.module, use.value.detach())
        if asked.means:
            call.output_sum = column_sum(adapter.expand_output(layer.module, call.arranged(output.detach())))
        if (asked.sampled or asked.roots) and output.requires_grad:
            call.edge = get_gradient_edge(output)
        return call

    def _forget_abandoned_sums(self) -> None:
        """Sums of passes whose graph was thrown away without a backward."""
        if not self._parameter_sums:
            return
        alive = {call.pass_index for call in self._calls.alive()}
        for name, sums in self._parameter_sums.items():
            self._parameter_sums[name] = [entry for entry in sums if entry.pass_index in alive]

    def _generator(self, device: torch.device) -> torch.Generator:
        """A generator that depends on (seed, step, number of earlier passes that count or still may).

        A pass whose graph was thrown away leaves no trace; two passes before one joint backward differ.
        """
        earlier: set[int] = set()
        for call in self._calls.alive():
            if call.pass_index == self._pass:
                call.labelled = True
            elif call.labelled or call.complete:
                earlier.add(call.pass_index)
        return label_generator(self.seed, self.step, len(earlier), device, self.stream)


class Hook:
    """Holds a capture weakly."""

    def __init__(self, capture: Backend | None = None, layer: Layer | None = None):
        self._capture = None if capture is None else weakref.ref(capture)
        self._layer = layer

    def capture(self) -> Any:
        """The capture, if it is still there and what runs now is the user's."""
        return None if self._capture is None or OWN.running else self._capture()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """A copy of the model, or the model in a file, is nobody's model."""
        return type(self), ()


class LayerHook(Hook):
    """Forward hook of one layer's module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record the call."""
        capture: Capture | None = self.capture()
        layer = self._layer
        if capture is None or layer is None or layer.name not in capture._asked:
            return None
        if module is not layer.module and not any(module is own for own in layer.others):
            return None  # a replica shares its hooks
        use = use_of(layer, args, kwargs)
        return None if use is None else capture.on_use([use], output)


class AttentionHooks(Hook):
    """Forward pre-hook and forward hook of an attention module: between them its projections are watched."""

    def __init__(
        self, capture: Capture | None = None, module: nn.Module | None = None, layers: Sequence[Layer] = ()
    ) -> None:
        super().__init__(capture)
        self._module, self._layers = module, layers
        self._watches: list[ProjectionWatch] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Watch, if anything is to be recorded."""
        while self._watches:  # an interrupt from the keyboard skipped the other hook
            self._watches.pop().stop()
        capture: Capture | None = self.capture()
        if capture is None or module is not self._module:
            return
        watch = capture.watch(self._layers)
        if watch is not None:
            watch.start()
            self._watches.append(watch)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Stop watching, also when the module has raised."""
        if self._watches and module is self._module:
            self._watches.pop().stop()


class BeginHook(Hook):
    """Forward pre-hook of the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A new pass begins."""
        capture: Capture | None = self.capture()
        if capture is not None and module is capture.model and not capture.pauses.depth:
            capture.begin_pass()


class EndHook(Hook):
    """Forward hook of the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The pass is complete: its output is the model's."""
        capture: Capture | None = self.capture()
        if capture is not None and module is capture.model and not capture.pauses.depth:
            capture.end_pass(output)


class GradientHook:
    """Takes the gradients at one output.

    It owns its call until the first comes: with a graph that is thrown away, its records vanish.
    """

    def __init__(self, layer: Layer, call: Call, asked: _Asked, calls: Calls, pauses: Pauses, leaves: Sequence[Tensor]):
        self._layer, self._call, self._asked, self._calls = layer, call, asked, calls
        self._pauses, self._leaves = pauses, leaves

    def __call__(self, gradient: Tensor) -> None:
        """Take it in, if it belongs to a backward that fills the leaves' ``.grad``."""
        if OWN.running or self._pauses.depth or not accumulates(self._leaves):
            return
        call, adapter = self._call, self._layer.adapter
        call.complete = True
        self._calls.keep(call)
        if self._asked.gradients:
            call.take_gradient(gradient)
        if self._asked.means and adapter is not None:
            expanded = adapter.expand_output(self._layer.module, call.arranged(gradient.detach()))
            call.take_gradient_sum(column_sum(expanded))
