"""What the gradient that reaches the output tells of a cross entropy that no closure returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LossWarning
from ..final_activation import ends_in_sigmoid, final_activation, sent_by_likelihood, way_out_of_activation
from ..likelihoods import Bernoulli, Categorical, Gaussian
from ..loss_weights import LossReader
from .outputs import Heads
from .passes import OWN, Pauses, accumulates

__all__ = ["GuessedLoss", "SeenLoss", "Told", "loss_seen_by"]

Told = tuple[Tensor, Callable[[Tensor], Tensor] | None]
"""A tensor that the model returned and that the loss is made of, and what brings its samples to the front."""

_BOUNDED = "the steps of this method are bounded by the loss, which a plain loop does not tell: "
_WITHOUT = (
    ". Without it steps may stay long while gradients become small; call optimizer.step(closure), whose loss is known "
    "whatever it is, or lower lr"
)
_UNKNOWN = (
    f"{_BOUNDED}the gradient at the model's output is not that of a cross entropy with hard labels, off which it could "
    f"be read{_WITHOUT}"
)
_SQUARED = "the value of a squared error cannot be read off its gradient, which does not tell its targets' weight"
_FOREIGN = "likelihood={!r} is none whose value could be read off the gradient at the model's output"
_NOWHERE = (
    "no gradient of it was seen at the model's output (the loss is made of another tensor than the one that was read, "
    "or of one that osculate.build(output=...) or samples= computes; or the output was changed in place), off which it "
    "could be read"
)
_MISREAD = (
    "the steps of this method are bounded by the loss, which is read off the gradient at the model's output as if that "
    "were logits, and is wrong otherwise; "
)
_TWICE = (
    "the loss takes the model's output for logits and applies a softmax, which it has passed already. That is trained "
    "as it stands, but is seldom what is meant: "
)
_SUMMED = (
    "the loss is a sum over samples (each has weight 1), and this method's matrices are made of the mini-batch's "
    "gradients: its steps become the shorter, the longer these are, and its lr is meant for the mean over samples. "
    "Divide the loss by their number, or multiply lr by it"
)
_CLOSE = 0.01
"""Share of a gradient that may be otherwise than the loss would have it, by rounding in low precision."""


class SeenLoss:
    """The cross entropy of the passes since the last :meth:`take`, in plain loops.

    For logits z with probabilities p the loss w (-log p_y) sends w (p - e_y) into the output. The only negative entry
    is that of the label, -w (1 - p_y), so label, weight and loss follow, whatever the user averages, masks or weights.
    With soft labels it is an estimate that vanishes where the gradient does. Of a binary cross entropy every entry
    tells the same; there soft labels, of which some are all that is seen, are not read.

    The first gradient tells whether the output is logits at all, and which axis the classes are on.

    Args:
        leaves: parameters; a backward that fills the ``.grad`` of none is not counted.
        model: see below.
        likelihoods: of the model's heads.
        loss_reduction: ``"mean"`` or ``"sum"``, which a squared error of known weight cannot be read without.

    Attributes:
        idle: whether nothing is read: a closure returns the loss.
        model: whose last module is named where its output is no logits; ``None``: somebody else tells of that.
        leaves: as given.
        unreadable: why the loss cannot be read whatever its gradient is; empty if it may be.
        unsaid: what the next step without a closure has to tell of a loss that is not known.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        model: nn.Module | None = None,
        likelihoods: Sequence[Any] = (Categorical(),),
        loss_reduction: str = "mean",
    ) -> None:
        self.idle = False
        self.model, self.leaves = model, leaves
        self.unreadable = next((why for why in map(_why_unread, likelihoods) if why), "")
        self._found = list[Tensor]()
        self._heads = [_Head(likelihood) for likelihood in likelihoods]
        self._told = self._heard = False
        self.unsaid = ""
        self._meant = loss_reduction == "mean"
        self._looked, self._said = model is None, ""

    @property
    def has_read(self) -> bool:
        """Whether a loss was read since the last time."""
        return bool(self._found) or any(head.has_squares for head in self._heads)

    def watch(self, heads: Sequence[Told], pauses: Pauses, standing: Mapping[int, Tensor] | None = None) -> None:
        """Read the gradient of one pass's output when it comes.

        Args:
            heads: what the loss is made of.
            pauses: of the backend.
            standing: what stands for the parameters in this pass's graph, where they are sharded.
        """
        if self.idle or self.unreadable or len(heads) != len(self._heads):
            return
        filled = self.leaves if standing is None else list(standing.values())
        for number, (output, order) in enumerate(heads):
            if output.ndim and output.requires_grad and output.is_floating_point():
                output.register_hook(self._reading(number, output, order, pauses, filled))

    def _reading(
        self,
        number: int,
        output: Tensor,
        order: Callable[[Tensor], Tensor] | None,
        pauses: Pauses,
        filled: Sequence[Tensor],
    ) -> Callable[[Tensor], None]:
        logits = output.detach()
        version = logits._version

        def read(gradient: Tensor) -> None:
            if not (OWN.running or pauses.depth) and accumulates(filled) and logits._version == version:
                sent = gradient.detach()
                if order is None:
                    self._take_in(logits, sent, number)
                else:
                    self._take_in(order(logits), order(sent), number)

        return read

    def _take_in(self, logits: Tensor, gradient: Tensor, number: int = 0) -> None:
        self._heard = True
        head = self._heads[number]
        if head.undecided(logits):
            if not bool(gradient.any()):
                return
            head.look(logits, gradient)
        if head.unread:
            if not self._told:
                self._told, self.unsaid = True, _UNKNOWN
                passed = "" if self.model is None else final_activation(logits, _rounding(logits))
                if passed and sent_by_likelihood(passed, logits, gradient, _CLOSE):
                    self.unsaid += f". That is because {way_out_of_activation(passed, self.model)}"
            return
        if head.name == "gaussian":
            head.add(logits, gradient)
            return
        logits, gradient = head.rows(logits), head.rows(gradient)
        if not self._looked and head.name == "categorical" and bool(gradient.any()):
            self._looked = True
            passed, fits = final_activation(logits, _rounding(logits)), _is_cross_entropy(logits, gradient)
            if passed == "Sigmoid" and not ends_in_sigmoid(self.model):
                passed = ""
            if passed and not (fits and passed != "Softmax"):
                self._said = (_TWICE if fits else _MISREAD) + way_out_of_activation(passed, self.model)
            elif fits and _every_weight_is_1(logits, gradient, cross_entropy_seen):
                self._said = _SUMMED
        self._found.append(head.read(logits, gradient))

    def take(self, scaled: bool = False) -> Tensor | None:
        """The loss of all backwards since the last time; ``None``: nothing was read.

        What is to be said of the output is said here, once. Not where its gradient is seen: the model may be run by
        somebody else, while this optimizer rests.

        Args:
            scaled: whether a ``GradScaler`` multiplies the loss, so that no weight of 1 is one.
        """
        if self._said:
            if not (scaled and self._said == _SUMMED):
                warnings.warn(self._said, LossWarning, stacklevel=2)
            self._said = ""
        found = self._found + [value for head in self._heads for value in head.squares(self._meant)]
        self._found = []
        return torch.stack(found).sum() if found else None

    def note_unread(self) -> None:
        """Note once, in a step without a closure for which nothing was read, that the loss is not known, and why."""
        if not (self._told or self._heard):
            self._told, self.unsaid = True, f"{_BOUNDED}{self.unreadable or _NOWHERE}{_WITHOUT}"

    def tell(self) -> None:
        """Say what is unsaid."""
        if self.unsaid:
            said, self.unsaid = self.unsaid, ""
            warnings.warn(said, LossWarning, stacklevel=3)


class _Head:
    """How the gradient at one output is read.

    Args:
        likelihood: of that output.
    """

    def __init__(self, likelihood: Any) -> None:
        self.name: str = getattr(likelihood, "name", "")
        self.unread = False
        self._likelihood, self._axis = likelihood, -1
        self._known = False
        self._squares, self._samples = list[Tensor](), 0

    @property
    def has_squares(self) -> bool:
        """Whether gradients of a squared error have come."""
        return bool(self._squares)

    def add(self, output: Tensor, gradient: Tensor) -> None:
        """Take in the gradients w (f - y), divided by the number of samples where the loss is their mean."""
        self._squares.append(gradient.float().square().sum())
        self._samples += len(output)

    def squares(self, meant: bool) -> list[Tensor]:
        """The sum of w |f - y|^2 / 2 since the last time, its mean over samples if that is what is ``meant``."""
        factor = 0.5 * (self._samples if meant else 1)
        found = [value * (factor / self._likelihood.weight) for value in self._squares]
        self._squares, self._samples = [], 0
        return found

    def undecided(self, logits: Tensor) -> bool:
        """Whether a gradient must be looked at before any is read: where rows are on the last axis it need not."""
        return not self._known and (self.name == "bernoulli" or logits.ndim > 2)

    def look(self, logits: Tensor, gradient: Tensor) -> None:
        """Find the axis of the classes, and whether labels are hard where these alone can be read; on the host."""
        reader = LossReader(self._likelihood, "mean")
        wide = logits.float() if logits.element_size() < 4 else logits
        reader.weights(wide, gradient)
        if reader.found is not None:
            self._known, self._axis = True, reader.found.axis
            self.unread = self.name == "bernoulli" and reader.found.mode != "hard"

    def rows(self, value: Tensor) -> Tensor:
        """Classes last."""
        return value if self._axis == -1 else value.movedim(self._axis, -1)

    def read(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The loss."""
        if self.name == "bernoulli":
            return hard_binary_cross_entropy_seen(logits, gradient)
        return cross_entropy_seen(logits, gradient)


def _why_unread(likelihood: Any) -> str:
    """Why the value of a loss of this likelihood cannot be read; empty if it can."""
    if isinstance(likelihood, Categorical | Bernoulli) or (isinstance(likelihood, Gaussian) and likelihood.weight):
        return ""
    return _SQUARED if isinstance(likelihood, Gaussian) else _FOREIGN.format(getattr(likelihood, "name", likelihood))


def loss_seen_by(
    likelihood: Any, leaves: Sequence[Tensor], model: nn.Module, told: bool, loss_reduction: str
) -> SeenLoss:
    """What reads the loss in plain loops.

    Args:
        likelihood: of the model, or of its heads; ``None``: it is guessed.
        leaves: parameters.
        model: the model.
        told: whether somebody else tells the user of outputs that are no logits.
        loss_reduction: ``"mean"`` or ``"sum"``.
    """
    if likelihood is None:
        return GuessedLoss(leaves, model)
    parts = list(likelihood.parts.values()) if isinstance(likelihood, Heads) else [likelihood]
    return SeenLoss(leaves, None if told else model, parts, loss_reduction)


class GuessedLoss(SeenLoss):
    """The same where no likelihood was named: read only if the first gradient is that of such a loss, to every entry.

    Cross entropies with one label per row are recognised, and binary ones whose entries all have the same weight. Any
    other loss stays unknown, which is said once, and from then on nothing is computed.
    """

    def __init__(self, leaves: Sequence[Tensor], model: nn.Module | None = None) -> None:
        super().__init__(leaves, model)
        self.idle_for_ever = False
        self._read: Callable[[Tensor, Tensor], Tensor] | None = None
        self._axis = -1

    def _take_in(self, logits: Tensor, gradient: Tensor, number: int = 0) -> None:
        self._heard = True
        if self._read is None:
            if not bool(gradient.any()):
                return  # a mini-batch that says nothing, about its loss neither
            self._recognise(logits, gradient)
        if self._read is not None:
            self._found.append(self._read(*self._rows(logits, gradient)))

    def _rows(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Classes last."""
        return values if self._axis == -1 else tuple(value.movedim(self._axis, -1) for value in values)

    def _recognise(self, logits: Tensor, gradient: Tensor) -> None:
        for axis in (-1, 1) if logits.ndim > 2 else (-1,):
            self._axis = axis
            self._read = next((read for read, fits in _KNOWN if fits(*self._rows(logits, gradient))), None)
            if self._read is not None:
                break
        rows, slopes = self._rows(logits, gradient)
        if self._read is cross_entropy_seen and final_activation(logits, _rounding(logits)) == "Softmax":
            self._said = _TWICE + way_out_of_activation("Softmax", self.model)
        elif self._read is not None and _every_weight_is_1(rows, slopes, self._read):
            self._said = _SUMMED
        if self._read is None:
            self.idle_for_ever = self._told = True
            self._said = _UNKNOWN
            passed = final_activation(logits, _rounding(logits))
            if passed and sent_by_likelihood(passed, logits, gradient, _CLOSE):
                self._said += f". That is because {way_out_of_activation(passed, self.model)}"

    def watch(self, heads: Sequence[Told], pauses: Pauses, standing: Mapping[int, Tensor] | None = None) -> None:
        """Read the gradient of one pass's output when it comes, unless the loss is none that can be read."""
        if not self.idle_for_ever:
            super().watch(heads, pauses, standing)


def _rounding(output: Tensor) -> float:
    return _CLOSE if output.element_size() < 4 else 0.0


def _is_cross_entropy(logits: Tensor, gradient: Tensor) -> bool:
    """Whether every row is w (p - e_y): w p everywhere but at the label, where it is less all others together."""
    if logits.shape[-1] < 2:
        return False
    wide, labels = gradient.double(), gradient.argmin(-1, keepdim=True)
    others = torch.softmax(logits.double(), -1).scatter(-1, labels, 0.0)
    weights = -wide.gather(-1, labels) / others.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = weights * others
    expected.scatter_(-1, labels, -expected.sum(-1, keepdim=True))
    return bool((wide - expected).abs().sum() <= _CLOSE * wide.abs().sum())


def _is_binary_cross_entropy(logits: Tensor, gradient: Tensor) -> bool:
    """Whether every entry is w (p - y) with y of 0 or 1 and one w."""
    wide, off = gradient.double().abs(), _off(logits.double(), gradient)
    return bool((wide - wide.sum() / off.sum() * off).abs().sum() <= _CLOSE * wide.sum())


def _every_weight_is_1(logits: Tensor, gradient: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether a cross entropy that was recognised is a sum over samples, where there are two and more."""
    wide = gradient.double()
    if read is binary_cross_entropy_seen:
        weights = wide.abs().sum() / _off(logits.double(), gradient).sum()
    else:
        least, labels = wide.min(-1)
        others = 1 - torch.softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        weights = (-least / others)[(least < 0) & (others > 0)]
    return len(logits) > 1 and weights.numel() > 0 and bool(((weights - 1).abs() < _CLOSE).all())


def _off(logits: Tensor, gradient: Tensor) -> Tensor:
    """|p - y|, the probability of the other label; 0 where that has rounded to nothing, so that no label is seen."""
    return torch.sigmoid(torch.where(gradient < 0, -logits, logits)).masked_fill(gradient == 0, 0.0)


def binary_cross_entropy_seen(logits: Tensor, gradient: Tensor) -> Tensor:
    """Sum of w (-log p_y) over entries, from logits and the gradients w (p - y) there, all with one w."""
    wide = logits.float()
    weight = gradient.float().abs().sum() / _off(wide, gradient).sum().clamp(min=torch.finfo(torch.float32).tiny)
    losses = torch.nn.functional.softplus(torch.where(gradient < 0, -wide, wide))
    return weight * losses.masked_fill(gradient == 0, 0.0).sum()


def hard_binary_cross_entropy_seen(logits: Tensor, gradient: Tensor) -> Tensor:
    """Sum of w (-log p_y) over entries, each with its own w, from logits and the gradients w (p - y) with y 0 or 1."""
    wide, slopes = logits.float(), gradient.float()
    entropies = torch.nn.functional.softplus(torch.where(slopes < 0, -wide, wide))
    quotients = (entropies / -torch.expm1(-entropies)).nan_to_num_(1.0).clamp_(min=1.0)
    return torch.sum(quotients * slopes.abs())


def cross_entropy_seen(logits: Tensor, gradient: Tensor) -> Tensor:
    """Sum of w (-log p_y) over rows, from logits (..., K) and the gradients w (p - e_y) there."""
    least, labels = gradient.float().min(-1, keepdim=True)
    wide = logits.float()
    entropies = wide.logsumexp(-1, keepdim=True) - wide.gather(-1, labels)
    # w (1 - p_y) = -least, so w nll = -least nll / (1 - exp(-nll)), where the quotient is at least 1.
    quotients = (entropies / -torch.expm1(-entropies)).nan_to_num_(1.0).clamp_(min=1.0)
    return torch.sum(quotients * -least.clamp(max=0.0))


_KNOWN = (
    (cross_entropy_seen, _is_cross_entropy),
    (binary_cross_entropy_seen, _is_binary_cross_entropy),
)
