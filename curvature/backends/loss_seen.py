"""What the gradient that reaches the output tells of a cross entropy that no closure returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import LossWarning
from ..final_activation import final_activation, sent_by_likelihood, way_out_of_activation
from .passes import OWN, Pauses, accumulates

__all__ = ["GuessedLoss", "SeenLoss"]

_UNKNOWN = (
    "the steps of this method are bounded by the loss, which a plain loop does not tell: the gradient at the model's "
    "output is not that of a cross entropy with hard labels, off which it could be read. Without it steps may stay "
    "long while gradients become small; call optimizer.step(closure), whose loss is known whatever it is, or lower lr"
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
    With soft labels it is an estimate that vanishes where the gradient does.

    The first gradient tells whether the output is logits at all.

    Attributes:
        idle: whether nothing is read: a closure returns the loss.
        model: whose last module is named where its output is no logits; ``None``: somebody else tells of that.
    """

    def __init__(self, leaves: Sequence[Tensor], model: nn.Module | None = None) -> None:
        self.idle = False
        self.model = model
        self._leaves, self._found = leaves, list[Tensor]()
        self._looked, self._said = model is None, ""

    def watch(self, output: Tensor, pauses: Pauses, standing: Mapping[int, Tensor] | None = None) -> None:
        """Read the gradient of one pass's output when it comes.

        Args:
            output: of the model.
            pauses: of the backend.
            standing: what stands for the parameters in this pass's graph, where they are sharded.
        """
        filled = self._leaves if standing is None else list(standing.values())
        if self.idle or output.ndim < 2 or not output.requires_grad:
            return
        logits = output.detach()

        def read(gradient: Tensor) -> None:
            if not (OWN.running or pauses.depth) and accumulates(filled):
                self._take_in(logits, gradient.detach())

        output.register_hook(read)

    def _take_in(self, logits: Tensor, gradient: Tensor) -> None:
        if not self._looked and bool(gradient.any()):
            self._looked = True
            passed, fits = final_activation(logits, _rounding(logits)), _is_cross_entropy(logits, gradient)
            if passed and not (fits and passed != "Softmax"):
                self._said = (_TWICE if fits else _MISREAD) + way_out_of_activation(passed, self.model)
            elif fits and _every_weight_is_1(logits, gradient, cross_entropy_seen):
                self._said = _SUMMED
        self._found.append(cross_entropy_seen(logits, gradient))

    def take(self) -> Tensor | None:
        """The loss of all backwards since the last time; ``None``: nothing was read.

        What is to be said of the output is said here, once. Not where its gradient is seen: the model may be run by
        somebody else, while this optimizer rests.
        """
        if self._said:
            warnings.warn(self._said, LossWarning, stacklevel=2)
            self._said = ""
        found = self._found
        self._found = []
        return torch.stack(found).sum() if found else None


class GuessedLoss(SeenLoss):
    """The same where no likelihood was named: read only if the first gradient is that of such a loss, to every entry.

    Cross entropies with one label per row are recognised, and binary ones whose entries all have the same weight. Any
    other loss stays unknown, which is said once, and from then on nothing is computed.
    """

    def __init__(self, leaves: Sequence[Tensor], model: nn.Module | None = None) -> None:
        super().__init__(leaves, model)
        self.idle_for_ever = False
        self._read: Callable[[Tensor, Tensor], Tensor] | None = None

    def _take_in(self, logits: Tensor, gradient: Tensor) -> None:
        if self._read is None:
            if not bool(gradient.any()):
                return  # a mini-batch that says nothing, about its loss neither
            self._read = next((read for read, fits in _KNOWN if fits(logits, gradient)), None)
            if self._read is cross_entropy_seen and final_activation(logits, _rounding(logits)) == "Softmax":
                self._said = _TWICE + way_out_of_activation("Softmax", self.model)
            elif self._read is not None and _every_weight_is_1(logits, gradient, self._read):
                self._said = _SUMMED
            if self._read is None:
                self.idle_for_ever, self._said = True, _UNKNOWN
                passed = final_activation(logits, _rounding(logits))
                if passed and sent_by_likelihood(passed, logits, gradient, _CLOSE):
                    self._said += f". That is because {way_out_of_activation(passed, self.model)}"
        if self._read is not None:
            self._found.append(self._read(logits, gradient))

    def watch(self, output: Tensor, pauses: Pauses, standing: Mapping[int, Tensor] | None = None) -> None:
        """Read the gradient of one pass's output when it comes, unless the loss is none that can be read."""
        if not self.idle_for_ever:
            super().watch(output, pauses, standing)


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
