"""What a backend is to the optimizer, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from ..declarations import Measure
from ..layers.layer import Layer
from ..likelihoods import Likelihood
from ..loss_curvature import LossDifferentiation, LossPoint
from ..loss_weights import LossReader
from ..records.needs import PassKind, Record
from ..records.statistics import LayerStatistics
from .loss_seen import SeenLoss
from .outputs import Choice, Heads
from .passes import Pauses, extra_backward

__all__ = ["Backend"]


class Backend(ABC):
    """Hooks on a model, and what they recorded since the last :meth:`collect`.

    Args:
        model: the model; only forward passes through the model itself count as passes.
        layers: its layers.
        likelihood: the model's predictive distribution, for sampled labels; ``None`` if no part needs it.
        loss_reduction: ``"mean"`` or ``"sum"``: how the user's loss combines the samples.
        seed: of the sampled labels. The labels of a pass depend on (seed, step, pass) only: no random state is kept.

    Attributes:
        cannot: records that it refuses, with the reason.
        step: number of the step, from which labels are drawn.
        stream: of the sampled labels: one per process that shares a mini-batch.
        pauses: while they last nothing is recorded.
        certifies: whether the records of the next mini-batch are compared with the gradients they must explain.
        exchanged: whether ``.grad`` holds what other processes added too, as soon as a backward is over.
        processes: how many share the mini-batch.
        doubts: by layer how far the last :meth:`collect` was from that, 0-dimensional; above 1: its records are wrong.
        samples: the axis of the model's output that counts the samples, or a function that brings the output into the
            form (N, ...).
        readers: of the weights that samples have in the user's loss, one per head.
        differentiates: whether losses are being differentiated twice, at the outputs in ``points``.
        measures: by layer what its structures measure themselves; backends other than ``hooks`` take none.
        data: tensors that the model was given, pass by pass; ``None``: they are not kept.
        inverse_scale: 1 / scale of the user's loss (0-dimensional) where a ``GradScaler`` multiplies it, for weights.
        output: which tensor of what the model returns the likelihood reads, as the user says; ``None``: the obvious.
    """

    output: Choice = None
    inverse_scale: Tensor | None = None
    data: list[tuple[Tensor, ...]] | None = None
    measures: Mapping[str, Mapping[str, Measure]] = MappingProxyType({})
    name: ClassVar[str]
    takes_residuals: ClassVar[bool] = False
    """Whether ``step`` is given residuals, whose curvature needs no likelihood."""
    seen: SeenLoss | None = None
    """What reads the loss of plain loops off the output's gradient, where a step-size rule wants it."""
    cannot: ClassVar[Mapping[Record, str]] = {}
    samples: int | Callable[[Any], Tensor] = 0
    exchanged = False
    processes = 1

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], likelihood: Likelihood | None, loss_reduction: str, seed: int
    ):
        self.model, self.layers, self.likelihood = model, list(layers), likelihood
        self.loss_reduction, self.seed = loss_reduction, seed
        self.step = self.stream = 0
        self.pauses = Pauses()
        parts: list[Any] = list(likelihood.parts.values()) if isinstance(likelihood, Heads) else [likelihood]
        self.readers = [LossReader(part, loss_reduction) for part in parts]
        self.differentiates = False
        self.points: list[LossPoint] = []
        self.certifies = False
        self.doubts: dict[str, Tensor] = {}
        self._wanted: Mapping[str, Record] = {}
        self._kind: PassKind = "gradient"
        self._forget()
        self._handles = self._attach()

    @abstractmethod
    def collect(self) -> dict[str, LayerStatistics]:
        """The record of each layer from all complete passes since the last time; forgets every pass."""

    @abstractmethod
    def finish_forward(self, loss: Tensor | None) -> None:
        """Read the weights of passes of kind ``"forward"``, whose loss is at hand and was not differentiated.

        Args:
            loss: 0-dimensional, with its graph; ``None`` if there is none.
        """

    @abstractmethod
    def discard_complete(self) -> None:
        """Forget passes whose gradient has arrived: the user threw that gradient away (``zero_grad``)."""

    @abstractmethod
    def complete_passes(self) -> list[Any]:
        """What was recorded of passes whose gradient has arrived, for :meth:`forget_passes`."""

    @abstractmethod
    def forget_passes(self, entries: list[Any]) -> None:
        """Forget some of what :meth:`complete_passes` gave earlier: its gradient is gone."""

    @abstractmethod
    def _forget(self) -> None:
        """Fresh containers of records: of a new backend, or of a copy."""

    @abstractmethod
    def _attach(self) -> list[Any]:
        """Place the hooks; returns their handles."""

    def closure(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The user's closure as one that fills ``.grad`` and returns the loss."""
        return function

    def clear(self) -> None:
        """Forget every pass."""
        self._forget()

    def arm(self, wanted: Mapping[str, Record], kind: PassKind = "gradient") -> None:
        """Choose what the following forward passes record, per layer name.

        Args:
            wanted: layers that are missing record nothing. Not to be changed afterwards.
            kind: ``"gradient"``: a pass counts when a backward that fills ``.grad`` has arrived; ``"look back"``:
                parameters are frozen, an output that needs no gradient gets an artificial leaf so that the gradients at
                the pre-activations exist all the same; ``"forward"``: a pass counts without any gradient.
        """
        self._wanted, self._kind = wanted, kind

    def is_armed(self, wanted: Mapping[str, Record]) -> bool:
        """Whether gradients of these records are what the next passes are for."""
        return self._wanted is wanted and self._kind == "gradient"

    def keep_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a pass of the model was given, if somebody wants to know."""
        if self.data is not None:
            self.data.append(tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

    @property
    def reads_curvature(self) -> bool:
        """Whether it takes the second derivative of losses where it can."""
        return any(reader.reads_curvature for reader in self.readers)

    @property
    def needs_loss(self) -> bool:
        """Whether nothing can be measured without the loss itself."""
        return any(reader.kind == "from-loss" for reader in self.readers)

    @property
    def has_read_loss(self) -> bool:
        """Whether anything was read off the gradient that the loss sends to the output, and carries its scale."""
        weighed = any(
            reader.kind in ("categorical", "bernoulli") and reader.found is not None for reader in self.readers
        )
        return weighed or (self.seen is not None and self.seen.has_read)

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Losses that are differentiated inside are differentiated twice in the model's output, where that is read."""
        self.differentiates = True
        try:
            with LossDifferentiation(self.points, extra_backward):
                yield
        finally:
            self.differentiates = False

    def waits_at(self, output: Tensor, head: int, arrange: Callable[[Tensor], Tensor] | None) -> LossPoint | None:
        """A point at an output, if the loss's second derivative there is wanted."""
        reader = self.readers[head]
        if not (self.differentiates and reader.reads_curvature):
            return None
        point = LossPoint(get_gradient_edge(output), reader.shape, arrange, reader.kind == "gaussian")
        self.points.append(point)
        return point

    def samples_first(self, output: Any) -> Any:
        """The model's output with the axis first that counts the samples."""
        if self.samples == 0:
            return output
        if not isinstance(self.samples, int):
            return self.samples(output)
        return output.movedim(self.samples, 0) if isinstance(output, Tensor) else output

    def extended(self, layers: Sequence[Layer]) -> Self:
        """A backend for more layers in place of this one, whose hooks are removed and whose records are dropped."""
        self.close()
        result = type(self)(self.model, layers, self.likelihood, self.loss_reduction, self.seed)
        result.step, result.pauses, result.samples = self.step, self.pauses, self.samples
        result.output, result.readers = self.output, self.readers
        result.processes, result.seen = self.processes, self.seen
        if result.seen is not None:
            result.seen.leaves = [parameter for layer in layers for parameter in layer.parameters.values()]
        return result

    def close(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: hooks belong to the original."""
        return {name: value for name, value in self.__dict__.items() if name not in self._original}

    _original: ClassVar[tuple[str, ...]] = ("_handles", "pauses", "points", "data")
    """Attributes that a copy does not take along."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has recorded nothing, and places hooks on its own model."""
        self.__dict__.update(state)
        self.pauses, self.points = Pauses(), []
        self._forget()
        self._handles = self._attach()
