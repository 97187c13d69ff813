"""The backward passes of the ``hooks`` backend's own, run when the user's gradient arrives at the model's output.

At that moment the graph below the output is still whole, and the gradient tells the weight of every sample and position
in the user's loss: what is sent back carries these weights. A pass that nobody runs backward costs nothing.

A model with several heads has several outputs. Given the model's output the heads are independent, so each head sends
back its own vectors when its own gradient arrives, and what they give at the layers below adds up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...errors import ArgumentError
from ..layers.layer import Layer
from ..layers.sharding import reopened
from ..likelihoods import Likelihood
from ..loss_curvature import LossPoint
from ..loss_weights import LossReader, is_weighted
from ..records.calls import Call, ParameterSum
from .passes import OWN, Pauses, accumulates, extra_backward
from .sampling import Labels, parameter_sums, pulled_back, seeded_generator, slope_at

__all__ = ["ArrivalHook", "OutputHook", "OutputPass", "WaitingPass", "is_rearrangement"]


class WaitingPass:
    """What one forward pass of the model asks of the gradients at its outputs.

    Args:
        index: number of the forward pass.
        labels: where they are drawn from.
        sampled: calls that want rows of sampled labels.
        rooted: calls that want all roots.
        whole: layers whose parameter gradients for sampled labels are wanted.
        held: parameters; a backward that fills the ``.grad`` of none is not counted.
        standing: by id of a sharded parameter, what stands for it in the graph.
    """

    def __init__(
        self,
        index: int,
        labels: Labels,
        sampled: Sequence[Call],
        rooted: Sequence[Call],
        whole: Sequence[Layer],
        held: Sequence[Tensor],
        standing: Mapping[int, Tensor],
    ):
        self.index, self.labels, self.held, self.standing = index, labels, held, standing
        self.leaves = list(standing.values()) or held
        self.sampled, self.rooted, self.whole = list(sampled), list(rooted), list(whole)
        self.edges: dict[int, Any] = {id(call): call.edge for call in (*sampled, *rooted)}
        self.at: dict[int, int] = {}  # calls whose output is one of the model's, and the number of that head
        for call in (*sampled, *rooted):
            call.edge = None
        self.names = {call.layer for call in (*sampled, *rooted)} | {layer.name for layer in whole}
        self.samples = 0
        self._found: dict[int, _Found] = {}

    def head(
        self, output: Tensor, likelihood: Likelihood, number: int, arrange: Callable[[Tensor], Tensor] | None
    ) -> OutputPass:
        """What waits at one output.

        Holds edges of the graph below the output, and is held by a hook on it: no circle, so that both vanish with the
        graph. A layer whose output is the model's keeps no edge, for the same reason.
        """
        own = get_gradient_edge(output).node
        for call, edge in list(self.edges.items()):
            if edge is not None and edge.node is own:
                self.at[call], self.edges[call] = number, None
        return OutputPass(self, output, likelihood, number, arrange)

    def take(self, head: int, found: _Found, samples: int) -> None:
        """What one head gave, in the place of what an earlier backward through it gave."""
        self._found[head], self.samples = found, samples

    def finish(self, totals: Mapping[str, float | Tensor]) -> dict[str, ParameterSum]:
        """Put the rows of all heads into the calls; returns parameter gradients by layer.

        Args:
            totals: by layer what the square roots of the weights have to be multiplied with: they were read as those of
                a loss over this pass alone.
        """
        heads = [found for _, found in sorted(self._found.items())]
        for place, call in enumerate(self.sampled):
            rows = _scaled([(found.rows[place], found.factor(totals[call.layer])) for found in heads])
            call.sampled = call.arranged(sum(rows[1:], rows[0])) if rows else None
        for place, call in enumerate(self.rooted):
            rows = _scaled([(found.roots[place], found.factor(totals[call.layer])) for found in heads])
            vectors = rows[0] if len(rows) == 1 else torch.cat(rows) if rows else None
            call.roots = None if vectors is None else call.arranged_all(vectors).transpose(0, 1)
        total: dict[int, Tensor | None] = {}
        for layer in self.whole:
            for parameter in layer.parameters.values():
                key = id(parameter)
                rows = _scaled([(found.gradients.get(key), found.factor(totals[layer.name])) for found in heads])
                total[key] = sum(rows[1:], rows[0]) if rows else None
        return parameter_sums(self.whole, total, self.index, self.samples)


@dataclass(frozen=True)
class _Found:
    """What one head of one pass gave: by place of the call, and by parameter."""

    rows: Sequence[Tensor | None]
    roots: Sequence[Tensor | None]
    gradients: Mapping[int, Tensor | None]
    weighted: bool

    def factor(self, total: float | Tensor) -> float | Tensor:
        """Only what carries weights is scaled."""
        return total if self.weighted else 1.0


def _scaled(values: Sequence[tuple[Tensor | None, float | Tensor]]) -> list[Tensor]:
    return [
        value if isinstance(factor, float) and factor == 1.0 else value * factor
        for value, factor in values
        if value is not None
    ]


class OutputPass:
    """One output of one forward pass, which waits for its gradient.

    Args:
        waiting: the pass.
        output: of the model, with its graph.
        likelihood: its distribution.
        head: number of the output among those that are read.
        arrange: brings it into the form (N, ...), a rearrangement of its entries; ``None``: it has that form.
    """

    def __init__(
        self,
        waiting: WaitingPass,
        output: Tensor,
        likelihood: Likelihood,
        head: int,
        arrange: Callable[[Tensor], Tensor] | None,
    ):
        self.waiting, self.likelihood, self.head, self.arrange = waiting, likelihood, head, arrange
        self.output = output.detach()
        self.version = self.output._version
        self.value = self.output if arrange is None else arrange(self.output)
        self.place = output.output_nr
        self.point: LossPoint | None = None
        self.ran = False
        self._gradient: Tensor | None = None
        self._discards = 0

    def receive(self, gradient: Tensor, reader: LossReader, discards: int) -> None:
        """Run the extra backward passes with the weights that the gradient in this output's hook tells.

        Args:
            gradient: of the user's loss at the output; several backwards through one forward add up.
            reader: of the weights.
            discards: how often the user has cleared gradients; what came before the last time is gone.

        Raises:
            ArgumentError: if the output is not what it was, or as :meth:`.LossReader.fitted`.
        """
        if self.output._version != self.version:
            raise ArgumentError(
                "the model's output was changed in place after the model had returned it (logits.div_(temperature), "
                "logits[mask] = ...), so its distribution is not known any more; write logits = logits / temperature, "
                "logits.masked_fill(mask, value), or let the model return what it is changed to"
            )
        gone = discards != self._discards or all(parameter.grad is None for parameter in self.waiting.held)
        if self._gradient is not None and not gone:
            gradient = self._gradient + gradient
        self._gradient, self._discards = gradient, discards
        self.run(GradientEdge(torch._C._current_autograd_node(), self.place), gradient, reader)

    def run(self, root: GradientEdge, gradient: Tensor | None, reader: LossReader) -> None:
        """The extra backward passes from the output, ``root``, whose gradient is ``None`` if there is no loss."""
        self.ran, waiting, value = True, self.waiting, self.value
        wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value  # autocast
        if gradient is not None and self.arrange is not None:
            gradient = self.arrange(gradient)
        curvature = None if self.point is None else self.point.curvature
        likelihood = reader.fitted(self.likelihood, wide, gradient, curvature)
        roots: list[Tensor | None] = []
        if waiting.rooted:
            roots, _ = self._pulled_back(root, likelihood.curvature_root(wide), waiting.rooted, [])
        rows: list[Tensor | None] = []
        trainable = [p for layer in waiting.whole for p in layer.parameters.values() if p.requires_grad]
        gradients: Sequence[Tensor | None] = ()
        if waiting.sampled or trainable:
            slope = slope_at(likelihood, wide, waiting.labels.of_head(likelihood, wide, self.head))
            leaves = [waiting.standing.get(id(p), p) for p in trainable]
            rows, gradients = self._pulled_back(root, slope, waiting.sampled, leaves)
        sums = dict(zip(map(id, trainable), gradients, strict=True))
        waiting.take(self.head, _Found(rows, roots, sums, is_weighted(likelihood)), len(value))

    def _pulled_back(
        self, root: GradientEdge, vectors: Tensor, calls: Sequence[Call], parameters: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], Sequence[Tensor | None]]:
        """``vectors``, one (N, ...) or several (V, N, ...), at each call and parameter."""
        batched = vectors.ndim > self.value.ndim
        vectors = vectors.to(self.value.dtype)
        if self.arrange is not None:
            back = restoring(self.arrange, self.output)
            vectors = torch.vmap(back)(vectors) if batched else back(vectors)
        edges, at = self.waiting.edges, self.waiting.at
        inner = [edge for call in calls if (edge := edges[id(call)]) is not None]
        rest = iter(pulled_back(root, [*inner, *parameters], vectors, batched))
        rows: list[Tensor | None] = []
        for call in calls:
            here = at.get(id(call))  # a call that is another head's output has nothing to do with this one
            rows.append(next(rest) if here is None else vectors if here == self.head else None)
        return rows, list(rest)


def restoring(arrange: Callable[[Tensor], Tensor], output: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of a rearrangement of an output's entries."""
    pull = torch.func.vjp(arrange, output)[1]
    return lambda value: pull(value)[0]


def is_rearrangement(function: Callable[[Tensor], Any], output: Tensor) -> bool:
    """Whether a function does no more than move an output's entries to other places."""
    generator = seeded_generator(0, output.device)
    value = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    found = function(value)
    if not isinstance(found, Tensor) or found.numel() != value.numel() or found.ndim == 0:
        return False
    return torch.equal(restoring(function, value)(found), value)


class OutputHook:
    """Tensor hook on an output of the model; holds its backend weakly.

    Args:
        backend: whose readers read the weights, and which puts the rows together when it collects.
        waiting: the output.
        pauses: of the backend.
    """

    def __init__(self, backend: Any, waiting: OutputPass, pauses: Pauses):
        self._backend, self._waiting, self._pauses = weakref.ref(backend), waiting, pauses

    def __call__(self, gradient: Tensor) -> None:
        """Take the gradient in, if it belongs to a backward that fills the leaves' ``.grad``."""
        backend, waiting = self._backend(), self._waiting
        if backend is None or OWN.running or self._pauses.depth or not accumulates(waiting.waiting.leaves):
            return
        opened = reopened(backend.model) if backend.sharded else nullcontext()
        with extra_backward(), torch.no_grad(), opened:
            waiting.receive(gradient.detach(), backend.readers[waiting.head], backend.discards)
        backend.received[waiting.waiting.index] = waiting.waiting


class ArrivalHook:
    """Tensor hook on the model's output, behind all others there: everything is known but what the backward will bring.

    Args:
        backend: that is told.
        leaves: of the pass.
        pauses: of the backend.
    """

    def __init__(self, backend: Any, leaves: Sequence[Tensor], pauses: Pauses):
        self._backend, self._leaves, self._pauses = weakref.ref(backend), leaves, pauses

    def __call__(self, gradient: Tensor) -> None:
        """Say it, if the gradient belongs to a backward that fills the leaves' ``.grad``."""
        backend = self._backend()
        if backend is None or OWN.running or self._pauses.depth or not accumulates(self._leaves):
            return
        if backend.arrived is not None:
            with torch.no_grad():
                backend.arrived()
