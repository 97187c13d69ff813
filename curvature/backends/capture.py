"""The ``hooks`` backend: statistics from a forward hook on the layer and a tensor hook on its output.

Measured facts behind this choice: the pair survives in-place activations, modules called twice, gradient
accumulation and checkpointing, where ``register_full_backward_hook`` does not. Records are kept per call; a call whose
output never received a gradient (an evaluation pass, the first of two passes under checkpointing) is dropped.

The hooks hold their capture weakly, and belong to the modules they were placed on. When the capture's optimizer is gone
they do nothing. A copy of the model (a teacher, an exponential moving average) and a pickled model carry none, or hooks
that do nothing where somebody else has hooks on the same module.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from ...errors import ArgumentError
from ..declarations import Measure
from ..layers.attention import ProjectionWatch
from ..layers.layer import Layer
from ..layers.sharding import GraphLeaves, is_sharded, require_readable, require_whole_output, whole
from ..likelihoods import Likelihood
from ..loss_curvature import differentiate
from ..records import joining
from ..records.calls import EMPTY, Call, Calls, ParameterSum, column_sum, total_measured
from ..records.certificate import Certificate
from ..records.needs import PassKind, Record
from ..records.owned import combine
from ..records.statistics import LayerStatistics
from .backend import Backend
from .hook_tables import NOTHING, after, before_call
from .loss_seen import Told
from .output_pass import ArrivalHook, OutputHook, OutputPass, WaitingPass, is_rearrangement
from .outputs import Heads, read_output, select_output
from .passes import OWN, Pauses, accumulates, extra_backward, inside_transform
from .probing import Probes, batch_of, is_square
from .sampling import Labels, require_predictive, roots_backward, sampled_backward, seeded_generator
from .uses import Use, attention_modules, is_borrowed, use_of, watch_attention

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
    _original: ClassVar[tuple[str, ...]] = (
        *Backend._original,
        "_calls",
        "_arms",
        "_certificates",
        "_certified",
        "_parameter_sums",
        "received",
        "_pending",
        "_waits",
        "_leaves",
        "_standing",
        "_graph_leaves",
        "arrived",
        "_edges",
        "_probes",
    )

    _asked: Mapping[str, _Asked] = MappingProxyType({})
    _hooked: frozenset[str] = frozenset()  # names of layers with hooks
    _extra = False  # whether some layer asks for a backward of our own
    _stacked: bool | None = None  # whether one head is computed from another; None: not looked at
    _orders: dict[torch.Size, bool]  # by shape of the output, whether ``samples`` only moves its entries
    discards = 0  # how often the user has cleared gradients
    arrived: Callable[[], None] | None = None  # called when a gradient has reached the output of a pass

    def _forget(self) -> None:
        self._calls = Calls()
        self._by_name = {layer.name: layer for layer in self.layers}
        self._certificates: dict[str, Certificate] = {}
        self._certified: list[Any] = []
        self._arms: dict[int, tuple[Mapping[str, Record], dict[str, _Asked], bool]] = {}
        self._parameter_sums: dict[str, list[ParameterSum]] = {}
        self._waits: set[int] = set()  # passes that wait for a gradient at their output
        self._pending: list[tuple[GradientEdge, OutputPass]] = []  # outputs of passes that have no backward
        self.received: dict[int, WaitingPass] = {}  # passes for which a gradient has arrived at an output
        self._pass, self._inside = 0, False
        self._leaves: dict[int, list[Tensor]] = {}  # artificial ones of each pass
        self.sharded = any(is_sharded(value) for layer in self.layers for value in layer.parameters.values())
        self._graph_leaves = GraphLeaves(self.model)
        self._standing: dict[int, dict[int, Tensor]] = {}  # by pass and parameter, what stands for it in the graph
        self._axes: set[int] = set()  # sizes of the first axes of the calls of this pass
        self._square = False  # whether a shape of this pass leaves open which axis counts samples
        self._orders = {}
        self._empty: set[str] = set()  # layers that were called on nothing: experts without a token
        self._ended = (-1, 0)  # the last pass of the whole model, and its N
        self._uneven: dict[int, int] = {}  # N of passes that have other first axes too
        self._watchful = True  # whether calls keep what a probe needs: until a pass did without
        self._shuffled: bool | None = None  # whether entry n of a layer is not always sample n; None: not looked at
        self._edges: dict[int, GradientEdge] = {}  # for a probe, by the id of the call
        self._probes = Probes(self.model)

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
        self._drop_certificates()
        if self.certifies and kind == "gradient":
            self._certify()

    def _certify(self) -> None:
        """Put a question to every layer whose inputs are recorded."""
        for layer in self.layers:
            asked = self._asked.get(layer.name)
            if asked is None or not asked.inputs or layer.adapter is None:
                continue
            device = next(iter(layer.parameters.values())).device
            generator = seeded_generator(self.seed * 1_000_003 + self.step, device)
            found = self._certificates[layer.name] = Certificate(layer, generator, self.exchanged, self.processes)
            self._certified += found.attach()

    def _drop_certificates(self) -> None:
        for handle in self._certified:
            handle.remove()
        self._certificates, self._certified = {}, []

    def discard_complete(self) -> None:
        """Forget calls that already have a gradient: the user threw that gradient away (``zero_grad``)."""
        self.discards += 1
        self.received.clear()
        for certificate in self._certificates.values():
            certificate.forget()
        if not (self._calls.made or self._parameter_sums):
            return
        if not self._inside and any(call.complete for call in self._calls.alive()):
            self._pass += 1  # parts called one by one from here on are another pass
        self._calls.discard_complete()
        self._forget_abandoned_sums()

    def complete_passes(self) -> list[Any]:
        """Calls that have a gradient."""
        return [call for call in self._calls.alive() if call.complete] if self._calls.made else []

    def forget_passes(self, entries: list[Any]) -> None:
        """Forget the gradients of these calls."""
        if entries:
            self._calls.discard(entries)
            self._forget_abandoned_sums()

    def records_at_output(self) -> dict[str, LayerStatistics]:
        """What is known of the only pass so far when its gradient has reached the output: inputs and sampled rows.

        Empty where more passes have left something, or the first axis of some layer does not count the samples.
        """
        calls: dict[str, list[Call]] = {}
        task = torch._C._current_graph_task_id()
        for call in self._calls.alive():
            if call.pass_index != self._pass or (call.complete and call.task != task):
                return {}
            calls.setdefault(call.layer, []).append(call)
        if self._uneven or self._pass in self._waits - self.received.keys():
            return {}
        for waiting in self.received.values():
            waiting.finish(dict.fromkeys(waiting.names, 1.0))
        found = {
            name: joining.combine(self._by_name[name], own, [], self.loss_reduction) for name, own in calls.items()
        }
        return {name: record for name, record in found.items() if record is not None}

    def collect(self) -> dict[str, LayerStatistics]:
        """Statistics per layer name from all complete calls since the last time; forgets every call."""
        if not self._hooked:  # nothing is ever recorded
            return {}
        if self._pending:
            self.finish_forward(None)
        every, done = self._kind == "forward", set()
        calls: dict[str, list[Call]] = {}
        for call in self._calls.alive():
            if call.complete:
                done.add(call.pass_index)
            if call.complete or every:
                calls.setdefault(call.layer, []).append(call)
        if self._waits:
            self._finish(set(self.received) if every else done)
        sums = {
            name: [entry for entry in entries if every or entry.pass_index in done]
            for name, entries in self._parameter_sums.items()
        }
        self.doubts = {}
        for name, certificate in self._certificates.items():
            doubt = certificate.doubt(calls[name]) if calls.get(name) else None
            if doubt is not None:
                self.doubts[name] = doubt
        self._drop_certificates()
        if self._waits:
            self._require_gradients_at_outputs(done)
        join = joining.combine  # of calls that have an entry of the first axis per sample
        if self._uneven:
            self._require_settled(calls.values())
            join = combine
        unseen = self._empty - calls.keys() - sums.keys() if self._empty else ()
        self.clear()
        self._require_unchanged(calls)
        result: dict[str, LayerStatistics] = {}
        for layer in self.layers if calls or sums else ():
            if layer.name in calls or layer.name in sums:
                record = join(layer, calls.get(layer.name, []), sums.get(layer.name, []), self.loss_reduction)
                if record is not None:
                    if layer.name in self.measures:
                        record = record.with_fields(measured=total_measured(calls.get(layer.name, [])))
                    result[layer.name] = record
            elif layer.name in unseen:
                result[layer.name] = LayerStatistics(layer, 1, 1, unseen=True)
        return result

    @staticmethod
    def _require_unchanged(calls: Mapping[str, Sequence[Call]]) -> None:
        """Check that what was recorded is still what was seen.

        Raises:
            ArgumentError: naming a layer whose input was changed in place.
        """
        for name, entries in calls.items():
            for call in entries:
                if call.input is not None and not call.input.is_inference() and call.input._version != call.version:
                    raise ArgumentError(
                        f"the input of layer {name!r} was changed in place after the model had seen it (one buffer for "
                        "several mini-batches?), and with it what was recorded; give the model a copy, e.g. "
                        "model(buffer.clone())"
                    )

    def clear(self) -> None:
        """Forget every call."""
        if self._calls.made:
            self._calls.clear()
        self._parameter_sums.clear()
        self.received.clear()
        self._pending.clear()
        self._waits.clear()
        self._pass, self._inside, self._leaves, self._ended = 0, False, {}, (-1, 0)
        if self._axes:
            self._axes, self._square = set(), False
        if self._edges or self._uneven or self._empty:
            self._edges, self._uneven, self._empty = {}, {}, set()
        if self._standing:
            self._standing = {}

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
                handles += [after(module, hook, with_kwargs=True, prepend=True) for module in layer.modules]
        for module, layers in attention_modules(self.layers).items():
            names = {layer.name for layer in layers}
            if names & fresh and not names & before:
                watch = AttentionHooks(self, module, layers)
                handles.append(before_call(module, watch.enter))
                handles.append(after(module, watch.leave, always_call=True))
        if fresh and not before:
            handles.append(before_call(self.model, BeginHook(self)))
            handles.append(after(self.model, EndHook(self), with_kwargs=True))
        return handles

    # -- what the hooks tell -----------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """The model is called: a new pass."""
        if self._calls.made and self._kind == "gradient":
            self._calls.discard_thrown_away(self._is_thrown_away)
        self._pass, self._inside = self._pass + 1, True
        if self._axes or self._edges:
            self._axes, self._square, self._edges = set(), False, {}

    def end_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """The model has returned ``output``: wait for the gradient there, or run our own backwards if none will come.

        Returns what stands in the output's place, if anything.
        """
        self._inside = False
        if inside_transform():
            return None
        if self.sharded:
            require_whole_output(output)
        if self.data is not None:
            self.keep_data(args, kwargs)
        ordered = self.samples_first(output)
        if self._empty:
            self._require_samples(ordered)
        if self._axes:
            self._settle(args, kwargs, ordered)
        if self.seen is not None and self._kind == "gradient" and not (self.seen.idle or self.seen.unreadable):
            self.seen.watch(self._told_of_loss(output), self.pauses, self._standing.get(self._pass))
        found = self._own_backwards(output, ordered)
        if (
            self.arrived is None
            or self._kind != "gradient"
            or not isinstance(output, Tensor)
            or not output.requires_grad
        ):
            return found
        own = output if found is None else found
        if own._is_view():
            own = found = torch.ops.aten._unsafe_view(own, own.shape)
        own.register_hook(ArrivalHook(self, self._leaves_of_pass(), self.pauses))
        return found

    def _leaves_of_pass(self) -> list[Tensor]:
        """What stands for the parameters in the graph of this pass."""
        standing = self._standing.get(self._pass, {})
        return list(standing.values()) or [p for layer in self.layers for p in layer.parameters.values()]

    def _own_backwards(self, output: Any, ordered: Any) -> Tensor | None:
        """Wait for the gradient at the output, or run our own backwards; returns what stands in its place, if any."""
        if not self._extra or not torch.is_grad_enabled():
            return None
        likelihood, read = require_predictive(self.likelihood, ordered, self.output)
        if not read.requires_grad:
            return None
        calls = [call for call in self._calls.alive() if call.pass_index == self._pass and call.edge is not None]
        rooted = [call for call in calls if self._asked[call.layer].roots]
        sampled = [call for call in calls if self._asked[call.layer].sampled]
        of_layers = [layer for layer in self.layers if layer.name in self._asked and self._asked[layer.name].whole]
        if not (rooted or sampled or of_layers):
            return None
        heads = self._heads(output)
        if heads:
            held = [p for layer in self.layers if layer.name in self._asked for p in layer.parameters.values()]
            standing = self._standing.get(self._pass, {})
            waiting = WaitingPass(self._pass, self._labels(), sampled, rooted, of_layers, held, standing)
            self._waits.add(self._pass)
            return self._wait(waiting, output, heads)
        if rooted:
            roots_backward(read, likelihood, rooted)
        if sampled or of_layers:
            sums = sampled_backward(read, likelihood, self._labels(), self._pass, sampled, of_layers)
            self._forget_abandoned_sums()
            for name, entry in sums.items():
                self._parameter_sums.setdefault(name, []).append(entry)
        for call in rooted:
            call.edge = None
        return None

    def _told_of_loss(self, output: Any) -> Sequence[Told]:
        """The tensors that the user's loss is made of; empty where that is not known, or something computes them."""
        if isinstance(output, Tensor) and self.samples == 0 and self.output is None:
            return [(output, None)]
        order = self._order(output)
        try:
            if callable(self.samples) and order is None:
                chosen = self.samples(output)
                if chosen is not self.samples(output):
                    return []
                output = chosen
            choices = self.likelihood.parts if isinstance(self.likelihood, Heads) else [self.output]
            found = [select_output(output, choice) for choice in choices]
            if callable(self.output) and found[0] is not select_output(output, self.output):
                return []
        except ArgumentError:  # none or several could be meant
            return []
        return [(value, order) for value in found]

    def _heads(self, output: Any) -> list[tuple[Tensor, Likelihood]]:
        """The tensors that the user's loss is made of, with their likelihoods.

        Empty if there are none: a function has computed what the likelihood reads, or a head is computed from another.
        """
        if callable(self.samples) and self._order(output) is None:
            chosen = self.samples(output)
            if chosen is not self.samples(output):
                self.readers[0].unread = _COMPUTED.format("samples")
                return []
            output = chosen
        if callable(self.output) and self.output(output) is not self.output(output):
            self.readers[0].unread = _COMPUTED.format("output")
            return []
        likelihood: Any = self.likelihood
        found = [source for source, _ in read_output(likelihood, output, self.output).sources]
        parts = list(likelihood.parts.values()) if isinstance(likelihood, Heads) else [likelihood]
        if self._stacked is None:
            self._stacked = len(found) > 1 and _are_stacked(found)
        if self._stacked:
            self.readers[0].unread = "one head of the model is computed from another"
            return []
        return list(zip(found, parts, strict=True))

    def _require_gradients_at_outputs(self, done: set[int]) -> None:
        """Check that what calls have seen has come through the output.

        Raises:
            ArgumentError: if it has not, unless there is a better word: records that do not explain a gradient.
        """
        if self.received.keys() >= done & self._waits or any(bool(doubt > 1) for doubt in self.doubts.values()):
            return
        self.clear()
        raise ArgumentError(
            "in some pass no gradient has come to the output of the model that the likelihood reads, so the loss is not"
            " made of it, or only of its derivatives (then give step() the residuals: backend='residuals'); say which "
            "tensor it is made of with osculate.build(output=...), "
            "return that tensor from the model, run passes whose output is not used inside optimizer.paused(), or take "
            "a method that needs no likelihood (step_size=ConstantStep(), EmpiricalFisher())"
        )

    def _order(self, output: Any) -> Callable[[Tensor], Tensor] | None:
        """What brings the samples of the model's only output to the front; ``None``: they are there, or it is another.

        A function of the user does so if all it does is to move entries.
        """
        if self.samples == 0 or not isinstance(output, Tensor):
            return None
        if isinstance(self.samples, int):
            return self.samples_first
        if output.shape not in self._orders:
            self._orders[output.shape] = is_rearrangement(self.samples, output)
        return self.samples if self._orders[output.shape] else None

    def _wait(self, waiting: WaitingPass, output: Any, heads: Sequence[tuple[Tensor, Likelihood]]) -> Tensor | None:
        """Hooks on the outputs."""
        replaced, alone, order = None, isinstance(output, Tensor), self._order(output)
        for number, (source, likelihood) in enumerate(heads):
            if not source.requires_grad:
                continue
            if alone and source._is_view():  # an operation in place would cut it off from the hook
                source = replaced = torch.ops.aten._unsafe_view(source, source.shape)
            own = waiting.head(source, likelihood, number, order)
            own.point = self.waits_at(source, number, order)
            source.register_hook(OutputHook(self, own, self.pauses))
            if self._kind == "forward":  # perhaps nobody goes backward
                self._pending.append((get_gradient_edge(source), own))
        return replaced

    def finish_forward(self, loss: Tensor | None) -> None:
        """Run the backwards of our own of the passes so far; see the base class."""
        pending, self._pending = [entry for entry in self._pending if not entry[1].ran], []
        gradients: Sequence[Tensor | None] = [None] * len(pending)
        with extra_backward():
            if loss is not None and pending:
                differentiate(self.points, [loss], [None])
                edges = [edge for edge, _ in pending]
                gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
            with torch.no_grad():
                for (edge, own), gradient in zip(pending, gradients, strict=True):
                    own.run(edge, gradient, self.readers[own.head])
                    self.received[own.waiting.index] = own.waiting

    def _finish(self, done: set[int]) -> None:
        """Give the calls of passes that count what the gradients at the outputs have told."""
        received = [waiting for index, waiting in self.received.items() if index in done]
        scale = 1.0 if self.inverse_scale is None else self.inverse_scale.sqrt()
        for waiting in received:
            totals: dict[str, float | Tensor] = dict.fromkeys(waiting.names, scale)
            if len(received) > 1 and self.loss_reduction == "mean":
                for name in waiting.names:
                    whole = sum(other.samples for other in received if name in other.names)
                    totals[name] = scale * math.sqrt(whole / waiting.samples)
            for name, entry in waiting.finish(totals).items():
                self._parameter_sums.setdefault(name, []).append(entry)

    def _settle(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Find out whose the rows of this pass are, if the shapes of its calls do not say it.

        Raises:
            ArgumentError: if it cannot be found out, naming a layer.
        """
        batch = batch_of(output)
        plain = len(self._axes) == 1 and not self._square and (batch is None or batch.shape[0] in self._axes)
        if plain and self._shuffled is None and batch is not None and self._asks_for_samples():
            self._shuffled = self._look_for_shuffles(batch) if batch.shape[0] > 1 else None
        if plain and not self._shuffled:
            self._watchful, self._edges = False, {}
            self._ended = self._pass, self._axes.pop()
            return
        calls = [call for call in self._calls.alive() if call.pass_index == self._pass and not call.complete]
        layers = {layer.name: layer for layer in self.layers}
        unread = [call for call in calls if layers[call.layer].adapter is None]
        calls = [call for call in calls if layers[call.layer].adapter is not None]
        edges, self._edges, self._watchful = self._edges, {}, True
        if batch is not None:
            for call in unread:  # nothing but whole gradients is recorded of them
                call.samples = batch.shape[0]
        if not calls:
            return
        if batch is None:
            raise ArgumentError(
                f"layer {calls[0].layer!r} was called on {calls[0].samples} entries of the first axis and others on "
                f"{sorted(self._axes - {calls[0].samples})}, and the model's output has no axis that counts the "
                "samples; return the outputs beside the loss, or build with samples=, a function of the output"
            )
        self._uneven[self._pass] = batch.shape[0]
        self._ended = self._pass, batch.shape[0]

        def replay(buffers: dict[str, Tensor]) -> Any:
            return self.samples_first(functional_call(self.model, buffers, args, kwargs))

        self._probes.settle(layers, batch, calls, edges, replay, self._kind == "look back")
        if plain and all(call.ownership is None for call in calls):
            self._shuffled = False  # samples see each other: told once, and no order would change that

    def _asks_for_samples(self) -> bool:
        return self._extra or any(entry.gradients for entry in self._asked.values())

    def _look_for_shuffles(self, batch: Tensor) -> bool:
        """Whether some layer's N entries are not the samples in their order; asked once, where it can be told."""
        if not torch.is_grad_enabled():
            return False
        named = {layer.name: layer for layer in self.layers if layer.adapter is not None}
        calls = [call for call in self._calls.alive() if call.pass_index == self._pass and call.layer in named]
        points = [self._edges[id(call)] for call in calls if id(call) in self._edges]
        return len(points) == len(calls) and self._probes.shuffles(named, batch, calls, points)

    def _require_samples(self, output: Any) -> None:
        """Check that layers which were called on nothing are parts of a pass that has samples.

        Raises:
            ArgumentError: naming a layer.
        """
        batch = batch_of(output)
        if batch is None or not batch.shape[0]:
            name = min(self._empty)
            self._empty.clear()
            raise ArgumentError(f"layer {name!r} was called on a batch of 0 samples; {EMPTY}")

    def _require_settled(self, calls: Iterable[Sequence[Call]]) -> None:
        """Check that calls which were made outside of the model's forward have a sample per entry.

        Raises:
            ArgumentError: naming a layer that has not.
        """
        for entry in calls:
            for call in entry:
                samples = self._uneven.get(call.pass_index, call.samples)
                if call.ownership is None and call.samples != samples:
                    raise ArgumentError(
                        f"layer {call.layer!r} was called on {call.samples} entries of the first axis, in a mini-batch "
                        f"of {samples} samples, outside of the model's own forward, so whose they are is unknown; use "
                        "checkpoint(..., use_reentrant=False), and run the whole model"
                    )

    def watch(self, layers: Sequence[Layer]) -> ProjectionWatch | None:
        """What records the projections of one call of an attention module; ``None`` if there is nothing to record."""
        wanted = [layer for layer in layers if layer.name in self._asked]
        idle = self.pauses.depth and self._kind != "look back"
        if idle or not wanted or not (torch.is_grad_enabled() or self._kind == "forward"):
            return None
        return watch_attention(wanted, self.on_use)

    def on_use(self, uses: Sequence[Use], output: Any) -> Tensor | None:
        """Record one output for every layer whose weight made it; returns what stands in its place, if anything."""
        if not isinstance(output, Tensor) or inside_transform():
            return None
        if self.pauses.depth:
            return self._with_leaf(output)
        if not self._inside and any(call.complete and call.pass_index == self._pass for call in self._calls.alive()):
            self._pass += 1  # parts of the model are called one by one, and a backward has ended the last pass
        if output.ndim and not output.shape[0] and self._inside:
            self._empty.update(use.layer.name for use in uses)  # whether the whole batch is empty is seen at the end
            return self._with_leaf(output) if self._kind == "look back" else None
        if self._kind == "forward":
            for use in uses:
                self._calls.keep(self._new_call(use, output))
                if self.sharded:
                    self._leaves_of(use.layer)
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
            if self.sharded:
                leaves = self._leaves_of(layer)
            else:
                leaves = self._leaves.get(self._pass, []) if looks_back else list(layer.parameters.values())
            hook = GradientHook(layer, call, self._asked[layer.name], self._calls, self.pauses, leaves)
            hook.accumulating, hook.sharded = not looks_back, self.sharded
            hook.certificate = self._certificates.get(layer.name)
            if layer.name in self.measures and not looks_back:
                hook.measures = self.measures[layer.name], whole(use.value.detach()), whole(output.detach())
            output.register_hook(hook)
        return replaced

    def _is_thrown_away(self, name: str) -> bool:
        """Whether no parameter of a layer has a gradient, though some backward has filled one."""
        own = self._by_name[name].parameters.values()
        standing = [known[id(p)] for known in self._standing.values() for p in own if id(p) in known]
        return all(parameter.grad is None for parameter in (*own, *standing))  # FSDP2 may keep it for a later exchange

    def _leaves_of(self, layer: Layer) -> list[Tensor]:
        """What stands for a layer's sharded parameters in the graph of the call that runs now."""
        own: list[Tensor] = list(layer.parameters.values())
        found = [self._graph_leaves.of(parameter) for parameter in own]
        self._standing.setdefault(self._pass, {}).update(zip(map(id, own), found, strict=True))
        return found

    def _with_leaf(self, output: Tensor) -> Tensor | None:
        """When looking back, the output with an artificial leaf if none is behind it, else ``None``.

        Parameters are frozen then: such a leaf lets a backward run at all, and tells which one fills leaves.
        """
        if self._kind != "look back" or self.sharded or not torch.is_grad_enabled():
            return None  # sharded parameters are not frozen
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
            value = use.value.detach()
            if self.sharded:
                value = whole(value)
            if use.value.grad_fn is None and is_borrowed(value):
                value = value.clone()
            call.input = adapter.recorded_input(layer.module, value)
            call.version = 0 if call.input.is_inference() else call.input._version
        if adapter.reads_calls:
            adapter = call.adapter = adapter.of_call(layer.module, use.value, output)
        if asked.means:
            seen = output.detach()
            if self.sharded:
                require_readable(layer.name, output)
                seen = whole(seen)
            call.output_sum = column_sum(adapter.expand_output(layer.module, call.arranged(seen)))
        if (asked.sampled or asked.roots) and output.requires_grad:
            call.edge = get_gradient_edge(output)
        if self._inside:
            self._axes.add(call.samples)
            if self._watchful and output.requires_grad:
                self._edges[id(call)] = get_gradient_edge(output)
            if call.samples > 1 and call.positions >= call.samples and call.arrange is None:
                self._square |= is_square(layer, output)
        elif self._ended[1] not in (0, call.samples) and (
            self._ended[0] == self._pass or torch._C._current_graph_task_id() != -1
        ):  # inside a reentrant checkpoint the call belongs to the pass whose backward runs now
            self._uneven[self._pass] = self._ended[1]
        return call

    def _forget_abandoned_sums(self) -> None:
        """Sums of passes whose graph was thrown away without a backward."""
        if not self._parameter_sums:
            return
        alive = {call.pass_index for call in self._calls.alive()}
        for name, sums in self._parameter_sums.items():
            self._parameter_sums[name] = [entry for entry in sums if entry.pass_index in alive]

    def _labels(self) -> Labels:
        """Labels that depend on (seed, step, number of earlier passes that count or still may).

        A pass whose graph was thrown away leaves no trace; two passes before one joint backward differ.
        """
        earlier: set[int] = set()
        for call in self._calls.alive():
            if call.pass_index == self._pass:
                call.labelled = True
            elif call.labelled or call.complete:
                earlier.add(call.pass_index)
        return Labels(self.seed, self.step, len(earlier), self.stream)


_COMPUTED = "{}= is a function that computes another tensor from the model's output"


def _are_stacked(heads: Sequence[Tensor]) -> bool:
    """Whether one output of a model depends on another."""
    moving = [head for head in heads if head.requires_grad]
    with extra_backward():
        for head in moving:
            others = [other for other in moving if other is not head]
            zeros = torch.zeros_like(head)
            if any(value is not None for value in torch.autograd.grad(head, others, zeros, True, allow_unused=True)):
                return True
    return False


class Hook:
    """Holds a capture weakly."""

    def __init__(self, capture: Backend | None = None, layer: Layer | None = None):
        self._capture = None if capture is None else weakref.ref(capture)
        self._layer = layer

    def capture(self) -> Any:
        """The capture, if it is still there, and what runs now is the user's and no recording of a program."""
        if self._capture is None or OWN.running or torch.compiler.is_exporting():
            return None
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return None
        return self._capture()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """A copy of the model, or the model in a file, is nobody's model: nothing of ours is in it."""
        return NOTHING


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

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Two methods of it are hooks: a copy of it must have them."""
        return type(self), ()

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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The pass is complete: its output is the model's."""
        capture: Capture | None = self.capture()
        if capture is None or module is not capture.model or capture.pauses.depth:
            return None
        return capture.end_pass(args, kwargs, output)


class GradientHook:
    """Takes the gradients at one output.

    It owns its call until the first comes: with a graph that is thrown away, its records vanish.
    """

    def __init__(self, layer: Layer, call: Call, asked: _Asked, calls: Calls, pauses: Pauses, leaves: Sequence[Tensor]):
        self._layer, self._call, self._asked, self._calls = layer, call, asked, calls
        self._pauses, self._leaves = pauses, leaves
        self.accumulating = self.sharded = False
        self.certificate: Certificate | None = None
        self.measures: tuple[Mapping[str, Measure], Tensor, Tensor] | None = None  # with the input and output

    def __call__(self, gradient: Tensor) -> None:
        """Take it in, if it belongs to a backward that fills the leaves' ``.grad``."""
        if OWN.running or self._pauses.depth or not accumulates(self._leaves):
            return
        call, adapter = self._call, self._layer.adapter
        if self.sharded:
            gradient = whole(gradient)
        task = torch._C._current_graph_task_id()
        if self._calls.begin_task(task) and self.accumulating:
            for leaf in (*self._layer.parameters.values(), *self._leaves):
                if leaf.requires_grad and leaf.grad is not None:
                    break
            else:  # what earlier backwards had added to .grad is gone, by whatever way
                self._calls.discard_before(call.layer, task)
        call.complete, call.task = True, task
        self._calls.keep(call)
        if self._asked.gradients:
            call.take_gradient(gradient)
        if self._asked.means and adapter is not None:
            expanded = adapter.expand_output(self._layer.module, call.arranged(gradient.detach()))
            call.take_gradient_sum(column_sum(expanded))
        if self.measures is not None and adapter is not None:
            self._measure(self.measures, gradient.detach())
        if self.certificate is not None:
            self.certificate.add(call, gradient)

    @torch.no_grad()
    def _measure(self, measures: tuple[Mapping[str, Measure], Tensor, Tensor], gradient: Tensor) -> None:
        """What structures measure themselves."""
        functions, value, output = measures
        layer, call = self._layer, self._call
        adapter = call.adapter or layer.adapter
        assert adapter is not None
        inputs = adapter.recorded_input(layer.module, value)
        rows = [adapter.expand_output(layer.module, call.arranged(entry)) for entry in (output, gradient)]
        before, call.measured = call.measured or {}, {}
        for name, measure in functions.items():
            found = measure(layer, inputs, *rows)
            call.measured[name] = before[name] + found if name in before else found
