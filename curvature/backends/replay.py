"""What the recomputing backends share: they hook the model's root only, and measure when they are asked.

A pass keeps the arguments of the model's forward, its output, the labels drawn for it, and the gradient that the user's
loss sent back to the output. From these everything else can be computed again with the parameters as they are, because
a step writes to the parameters only after the record has been collected.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from ...errors import ArgumentError, CompatibilityError
from ..likelihoods import Likelihood
from ..loss_curvature import LossCurvature, LossPoint, differentiate
from ..loss_weights import Weighted, is_weighted
from ..records.calls import EMPTY, Call, ParameterSum
from ..records.needs import Record
from ..records.owned import combine
from ..records.statistics import LayerStatistics, SampleGradients, Tensors
from .backend import Backend
from .capture import Hook
from .hook_tables import after
from .outputs import Heads, JointLikelihood, Read, read_output
from .passes import OWN, Pauses, accumulates, extra_backward
from .probing import Probes
from .sampling import Labels, require_predictive

__all__ = ["Measured", "Pass", "ReplayBackend", "RootHook", "require_replayable"]


_LIKELY = Record.SAMPLED | Record.SAMPLED_PARAMETERS | Record.CURVATURE_ROOTS
"""Records that come from the model's own distribution."""


def _whole(result: Any) -> Tensor:
    """A model that returns one tensor."""
    output: Tensor = result
    return output


@dataclass
class Pass:
    """One forward pass of the whole model: ``output`` is (N, ...), ``gradient`` that of the user's loss there.

    ``discarded``: the user has cleared the gradient, and may go backward again while the graph lives. ``output`` is
    what ``read`` makes of the result of the model, and ``likelihood`` its distribution; before a pass is measured it is
    given the weights that the samples have in the user's loss. ``labels``: where those of this pass are drawn from, if
    some layer wants any; ``targets``: these labels. ``told``: of a pass without a backward the gradient at its output.
    ``points``: by head, where the loss's second derivative is taken.
    """

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    labels: Labels | None = None
    targets: Any = None
    gradient: Tensor | None = None
    discarded: bool = False
    likelihood: Likelihood | None = None
    told: Tensor | None = None
    points: dict[int, LossPoint] = field(default_factory=dict, repr=False)
    read: Callable[[Any], Tensor] = field(default=_whole, repr=False)

    @property
    def samples(self) -> int:
        """N."""
        return self.output.shape[0]


@dataclass
class Measured:
    """What one pass gave for one layer."""

    calls: list[Call] = field(default_factory=list)
    sums: list[ParameterSum] = field(default_factory=list)
    whole: SampleGradients = field(default_factory=SampleGradients)
    extensions: dict[str, tuple[Any, ...]] = field(default_factory=dict)


class ReplayBackend(Backend):
    """Records passes at the model's root; a subclass measures them. See :class:`~.backend.Backend`.

    The model must return one tensor whose first axis counts the samples.
    """

    _original: ClassVar[tuple[str, ...]] = (*Backend._original, "_references", "_kept", "_probes", "_pending")
    reads_heads: ClassVar[bool] = True

    def _forget(self) -> None:
        self._references: list[weakref.ref[Pass]] = []
        self._kept: list[Pass] = []
        self._pending: list[tuple[GradientEdge, Pass, int]] = []
        self._count = 0
        if "_probes" not in self.__dict__:
            self._probes = Probes(self.model)

    @abstractmethod
    def measure(self, entry: Pass, wanted: Mapping[str, Record]) -> dict[str, Measured]:
        """Measure one pass; runs with every osculate hook on the model switched off."""

    def check(self) -> None:
        """Refuse a model in a mode in which it cannot be measured; called at every forward pass."""
        require_replayable(self.model, self.name)

    def discard_complete(self) -> None:
        """Forget passes that already have a gradient: the user threw that gradient away (``zero_grad``)."""
        self.forget_passes(self.complete_passes())

    def complete_passes(self) -> list[Any]:
        """Passes that have a gradient."""
        return [entry for entry in self._passes if entry.gradient is not None]

    def forget_passes(self, entries: list[Any]) -> None:
        """Forget the gradients of these passes."""
        for entry in entries:
            entry.gradient, entry.discarded = None, True
        self._kept[:] = [entry for entry in self._kept if not entry.discarded]  # hooks hold this very list

    @property
    def _passes(self) -> list[Pass]:
        """Passes that are still alive: their graph is, or their gradient has arrived."""
        return [entry for entry in (reference() for reference in self._references) if entry is not None]

    def _attach(self) -> list[Any]:
        return [after(self.model, RootHook(self), with_kwargs=True)]

    def collect(self) -> dict[str, LayerStatistics]:
        """Measure all complete passes since the last time; forgets every pass."""
        passes = [entry for entry in self._passes if entry.gradient is not None or self._kind == "forward"]
        wanted = self._wanted
        self.clear()
        with extra_backward(), torch.enable_grad():
            samples = sum(entry.samples for entry in passes)
            weighted = [self._fit(entry, wanted, samples) for entry in passes]
            measured = [self.measure(entry, wanted) for entry in passes]
        if self.loss_reduction == "mean" and len(passes) > 1:
            for entry, found_in, has_weights in zip(passes, measured, weighted, strict=True):
                if has_weights:
                    self._rescale(entry, found_in, passes, measured)
        result: dict[str, LayerStatistics] = {}
        for layer in self.layers:
            found = [entry[layer.name] for entry in measured if layer.name in entry]
            calls = [call for entry in found for call in entry.calls]
            record = combine(layer, calls, [item for entry in found for item in entry.sums], self.loss_reduction)
            if record is not None:
                extensions = found[0].extensions if len(found) == 1 else {}
                whole = _join([entry.whole for entry in found])
                result[layer.name] = replace(record, sample_gradients=whole, extensions=extensions)
        return result

    def finish_forward(self, loss: Tensor | None) -> None:
        """Remember the gradients at the outputs; see the base class."""
        pending, self._pending = [entry for entry in self._pending if entry[1].gradient is None], []
        if loss is None or not pending:
            return
        with extra_backward():
            differentiate(self.points, [loss], [None])
            edges = [edge for edge, _, _ in pending]
            gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        for (_, entry, start), gradient in zip(pending, gradients, strict=True):
            if gradient is not None:
                own = _in_columns(gradient, entry.output, start)
                entry.told = own if entry.told is None else entry.told + own

    def _on_model(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record a pass; may replace the output by one that carries an artificial leaf."""
        if not self._wanted or not torch.is_grad_enabled():
            return None
        structured = not isinstance(output, Tensor)
        if self.pauses.depth:
            return None if structured else self._with_leaf(output)[0]
        self.keep_data(args, kwargs)
        read = self._read(output)
        output = read.output
        if output.shape[0] == 0:
            raise ArgumentError(f"the model was called on a batch of 0 samples; {EMPTY}")
        if torch.is_autocast_enabled(output.device.type):
            raise CompatibilityError(
                f"backend={self.name!r} measures in full precision; leave torch.autocast, or use backend='hooks'"
            )
        if structured and self._kind == "look back":
            raise CompatibilityError(
                f"backend={self.name!r} looks back at models that return one Tensor only; use backend='hooks'"
            )
        replaced, leaves = self._with_leaf(output)
        output = output if replaced is None else replaced
        if self._kind != "forward":
            if not output.requires_grad:
                return None
            if replaced is None and not structured and output._is_view():
                output = replaced = torch.ops.aten._unsafe_view(output, output.shape)
        self.check()
        entry = Pass(self._count, args, kwargs, output.detach().clone(), self._labels(read.likelihood, output))
        entry.likelihood = read.likelihood
        if structured:
            entry.read = lambda result: read_output(self.likelihood, result, self.output).output
        self._count += 1
        self._references = [*(weakref.ref(other) for other in self._passes), weakref.ref(entry)]
        sources = ((output, 0),) if not structured else read.sources
        if self.seen is not None and self._kind == "gradient":
            self.seen.watch([(source, None) for source, _ in sources], self.pauses)
        likely = any(record & _LIKELY for record in self._wanted.values())
        for head, (source, _) in enumerate(sources if likely else ()):
            point = self.waits_at(source, head, None) if source.requires_grad else None
            if point is not None:
                entry.points[head] = point
        if self._kind == "forward":
            self._kept.append(entry)
            moving = [pair for pair in sources if likely and pair[0].requires_grad]
            self._pending += [(get_gradient_edge(source), entry, start) for source, start in moving]
        for source, start in sources:
            if source.requires_grad:
                place = start if structured else None
                source.register_hook(_gradient_hook(entry, self._kept, self.pauses, leaves, place))
        return replaced

    def _read(self, output: Any) -> Read:
        """The tensor that is read, which must be one of those that the user's loss is made of.

        Raises:
            ArgumentError: if it is not found, or a function has computed it.
            CompatibilityError: if there are several heads and the backend reads one.
        """
        if isinstance(self.likelihood, Heads) and not self.reads_heads:
            raise CompatibilityError(
                f"backend={self.name!r} reads one tensor of what the model returns, and there is one likelihood for "
                "each of several heads; use backend='hooks' or backend='func'"
            )
        if (
            isinstance(output, Tensor)
            and output.ndim
            and self.output is None
            and not isinstance(self.likelihood, Heads)
        ):
            return Read(self.likelihood, output, ((output, 0),))
        read = read_output(self.likelihood, output, self.output)
        if callable(self.output) and not any(read.output is value for value in tree_leaves(output)):
            raise ArgumentError(
                f"backend={self.name!r} needs a tensor that the model returns, and output={self.output!r} computes "
                "another one from it; name the tensor itself, or use backend='hooks'"
            )
        return read

    def _with_leaf(self, output: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """When looking back, the output with an artificial leaf; and what a backward must fill to count."""
        if self._kind == "look back":
            leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            return output + leaf, [leaf]
        wanted = [layer for layer in self.layers if layer.name in self._wanted]
        return None, [parameter for layer in wanted for parameter in layer.parameters.values()]

    def _earlier(self) -> int:
        """Passes before this one that count, or still may."""
        return sum(not entry.discarded for entry in self._passes)

    def _fit(self, entry: Pass, wanted: Mapping[str, Record], samples: int) -> bool:
        """Give a pass the weights of its loss, if something will carry them, and draw its labels.

        Returns whether what is measured carries weights relative to the N of the pass.

        Args:
            entry: the pass.
            wanted: by layer what is asked.
            samples: of all passes.
        """
        if entry.likelihood is None or not any(record & _LIKELY for record in wanted.values()):
            return False
        likelihood, gradient = entry.likelihood, entry.told if entry.gradient is None else entry.gradient
        curvatures = {head: point.curvature for head, point in entry.points.items()}
        if self.inverse_scale is not None:
            gradient = None if gradient is None else gradient * self.inverse_scale
            curvatures = {
                head: None if found is None else replace(found, blocks=found.blocks * self.inverse_scale)
                for head, found in curvatures.items()
            }
        if isinstance(likelihood, JointLikelihood):
            entry.likelihood, weighted = self._fit_heads(likelihood, entry.output, gradient, samples, curvatures)
        else:
            entry.likelihood = self.readers[0].fitted(likelihood, entry.output, gradient, curvatures.get(0))
            weighted = is_weighted(entry.likelihood)
        if entry.labels is not None:
            entry.targets = entry.labels.drawn(entry.likelihood, entry.output)
        return weighted

    def _fit_heads(
        self,
        likelihood: JointLikelihood,
        output: Tensor,
        gradient: Tensor | None,
        samples: int,
        curvatures: Mapping[int, LossCurvature | None],
    ) -> tuple[JointLikelihood, bool]:
        """Every head has weights of its own; where one has none that can be read, its weight 1 is that of the whole."""
        gradients = (
            [None] * len(self.readers) if gradient is None else [value for _, value in likelihood.heads(gradient)]
        )
        parts = [
            reader.fitted(part, values, own, curvatures.get(head))
            for head, (reader, (part, values), own) in enumerate(
                zip(self.readers, likelihood.heads(output), gradients, strict=True)
            )
        ]
        weighted = any(is_weighted(part) for part in parts)
        if weighted and self.loss_reduction == "mean" and samples > len(output):
            share = output.new_full((len(output),), len(output) / samples)
            parts = [
                part if is_weighted(part) else Weighted(part, share.reshape(-1, *[1] * (values.ndim - 1)))
                for part, (_, values) in zip(parts, likelihood.heads(output), strict=True)
            ]
        return JointLikelihood(parts, likelihood.shapes), weighted

    def _rescale(
        self,
        entry: Pass,
        found: Mapping[str, Measured],
        passes: Sequence[Pass],
        measured: Sequence[Mapping[str, Measured]],
    ) -> None:
        """What carries the weights of a mean over its own pass, as part of a mean over the samples of all passes."""
        for name, own in found.items():
            seen = [
                other.samples
                for other, values in zip(passes, measured, strict=True)
                if name in values and (values[name].calls or values[name].sums)
            ]
            factor = math.sqrt(sum(seen) / entry.samples)
            for call in own.calls:
                call.sampled = None if call.sampled is None else call.sampled * factor
                call.roots = None if call.roots is None else call.roots * factor
            own.sums = [replace(item, gradients=_times(item.gradients, factor)) for item in own.sums]
            whole = own.whole
            own.whole = replace(whole, sampled=_times(whole.sampled, factor), roots=_times(whole.roots, factor))

    def _labels(self, likelihood: Likelihood | None, output: Tensor) -> Labels | None:
        """Where labels are drawn from, the same that the ``hooks`` backend draws."""
        every = list(self._wanted.values())
        if not any(record & _LIKELY for record in every):
            return None
        require_predictive(likelihood, output)
        if not any(record & (Record.SAMPLED | Record.SAMPLED_PARAMETERS) for record in every):
            return None
        return Labels(self.seed, self.step, self._earlier(), self.stream)


class RootHook(Hook):
    """Forward hook of the model, which it tells from a copy."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record the pass."""
        backend: Any = self.capture()
        return backend._on_model(args, kwargs, output) if backend is not None and module is backend.model else None


def require_replayable(model: nn.Module, backend: str) -> None:
    """Check that no module of the model couples samples or draws random numbers in the pass at hand.

    Raises:
        CompatibilityError: naming the first module that does, and the way out.
    """
    for name, module in model.named_modules():
        reason = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            reason = "normalises with the statistics of the batch, which couples its samples"
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            reason = "draws a random mask in every pass"
        elif module.training and _dropout(module) > 0:
            reason = "has active dropout"
        elif isinstance(module, nn.RReLU) and module.training:
            reason = "draws random slopes in every pass"
        if reason is not None:
            raise CompatibilityError(
                f"backend={backend!r} cannot measure module {name or '(root)'!r} ({type(module).__name__}): it "
                f"{reason}; call .eval() on that module, or use backend='hooks'"
            )


def _dropout(module: nn.Module) -> float:
    """The dropout probability that recurrent layers and attention keep as a number."""
    value = getattr(module, "dropout", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def _gradient_hook(
    entry: Pass, kept: list[Pass], pauses: Pauses, leaves: Sequence[Tensor], start: int | None = None
) -> Any:
    """The hook owns its pass until the gradient comes: with a graph that is thrown away, the pass vanishes.

    Gradients of several backwards through one forward add up, as they do in ``.grad``. So do those of several heads,
    each of which fills its own columns, from ``start``.
    """

    def hook(gradient: Tensor) -> None:
        if OWN.running or pauses.depth or not accumulates(leaves):
            return
        gradient = _in_columns(gradient, entry.output, start)
        entry.gradient = gradient.detach().clone() if entry.gradient is None else entry.gradient + gradient.detach()
        entry.discarded = False
        if not any(entry is other for other in kept):
            kept.append(entry)

    return hook


def _in_columns(gradient: Tensor, output: Tensor, start: int | None) -> Tensor:
    """The gradient at one head, as a gradient at the output of all heads."""
    if start is None or gradient.shape == output.shape:
        return gradient
    columns = gradient.detach().reshape(len(gradient), -1)
    result = torch.zeros_like(output)
    result[:, start : start + columns.shape[1]] = columns
    return result


def _times(values: Tensors | None, factor: float) -> Any:
    return None if values is None else tuple(value * factor for value in values)


def _join(pieces: Sequence[SampleGradients]) -> SampleGradients:
    def column(values: Sequence[Tensors | None]) -> Tensors | None:
        present = [value for value in values if value is not None]
        if not present or len(present) < len(values):
            return None
        return tuple(torch.cat(parts) for parts in zip(*present, strict=True))

    return SampleGradients(
        column([entry.loss for entry in pieces]),
        column([entry.sampled for entry in pieces]),
        column([entry.roots for entry in pieces]),
    )
