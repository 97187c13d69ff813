"""The weight of every sample and position in the user's loss, read off the gradient that the loss sends to the output.

With p the model's probabilities, a (weighted) cross entropy has the gradient ``w (p - q)`` at the logits of one sample
and position, q its label; its Gauss-Newton matrix is w times that of the plain likelihood. Which w can be told depends
on q, of which nothing is known but that it is a distribution:

- ``hard``: q is one class (Bernoulli: 0 or 1). Every other class c has ``g_c = w p_c``: exact for every row on its own,
  whatever the weights are (class weights, ``pos_weight``, masks, ``ignore_index``, means over tokens or outputs).
- ``sparse``: at least two classes of every row have q_c = 0 (mixup, cutmix): ``w = max_c g_c / p_c``, exact as well.
- ``smooth``: hard labels smoothed evenly, one weight for all rows that have one: the slope of a line.
- ``uniform``: soft targets of which some are exactly 0 or 1 (pixels), one weight: the largest ratio.
- ``plain`` and ``averaged``: soft targets, of which the gradient says no more than that the weight is at least
  ``max |g| / distance``. If more than half of the weight of a plain loss is needed, the loss cannot be a mean over
  K >= 2 outputs or positions: it is taken for a plain one. Likewise for that mean.
- ``assumed``: none of these. Nothing is read, every sample has weight 1.

Which it is, is found out on the host in the first backward passes and looked at again now and then; in between the
weights cost a few operations on the output and no synchronisation.

For a Gaussian output the gradient is ``w (f - y)`` with y unknown, which says nothing of w; where the loss itself is at
hand its second derivative does (:mod:`.loss_curvature`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError
from .final_activation import final_activation, sent_by_likelihood
from .likelihoods import NO_LOSS, Bernoulli, Categorical, FromLoss, Gaussian, Likelihood, score_of
from .loss_curvature import LossCurvature, LossShape, Quadratic, joined

__all__ = ["LossReader", "Reading", "Weighted", "is_weighted"]

Mode = Literal["hard", "sparse", "smooth", "uniform", "plain", "averaged", "assumed"]

_READ = (Categorical, Bernoulli, Gaussian, FromLoss)
"""Likelihoods whose weights are read."""

_CHECKED = 512
"""Rows (Bernoulli: entries) that are looked at on the host."""

_ENTRIES = 2**20
"""And so many entries of these, where there are many classes."""

_FEW = 4
"""Rows that are too few to tell weights of two classes from soft targets: taken for hard labels until more are seen."""

_EARLY, _LATER = 3, 100
"""So many backward passes are all looked at, and every so many afterwards."""

_LOOSER: dict[Mode, int] = {
    "hard": 0, "sparse": 1, "smooth": 2, "uniform": 3, "plain": 4, "averaged": 5, "assumed": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What was found out about the user's loss.

    Attributes:
        mode: see the module.
        axis: of the classes, for categorical outputs: 1 or -1.
        summed: every sample that counts has weight 1 in the loss itself: it is a sum and no mean.
        meant: everything that counts has weight 1 / N of its number of samples or of positions: it is a mean, no sum.
        looks_like: name of another likelihood whose gradient this is, or empty.
        least: the least weight that soft targets allow.
        ends_in: what the output has passed instead of being logits, such as ``LogSoftmax``, where nothing is read; or
            ``Softmax`` where the loss takes it for logits, and the weights are read.
        by_range: whether a ``Sigmoid`` before a categorical likelihood is told by nothing but numbers in [0, 1], which
            logits may be as well: only its module can say it.
    """

    mode: Mode
    axis: int = -1
    summed: bool = False
    meant: bool = False
    looks_like: str = ""
    least: float = 0.0
    ends_in: str = ""
    by_range: bool = False


class LossReader:
    """Reads weights for one likelihood; keeps what was found out about the loss.

    Args:
        likelihood: those of other classes than the three that ship have no weights.
        loss_reduction: ``"mean"`` or ``"sum"``.

    Attributes:
        found: what is known by now; ``None`` before the first gradient that is not zero.
        shape: what is known of the loss's second derivative.
        reads_curvature: whether that is what is read.
        assumed: whether a pass had a loss whose second derivative was wanted and not at hand.
        unread: why no gradient is read in any pass; empty if it is.
        told: whether the user has been told that nothing can be read.
    """

    def __init__(self, likelihood: Likelihood | None, loss_reduction: str):
        self.kind = next(
            (kind.name for kind in (Categorical, Bernoulli, Gaussian, FromLoss) if type(likelihood) is kind), ""
        )
        self.loss_reduction = loss_reduction
        self.found: Reading | None = None
        self.shape = LossShape()
        self.reads_curvature = self.kind == "from-loss" or (
            isinstance(likelihood, Gaussian) and self.kind == "gaussian" and likelihood.weight is None
        )
        self.assumed = False
        self.unread = ""
        self.told = False
        self._seen = 0

    @property
    def axis(self) -> int:
        """Of the classes, as far as it is known."""
        return -1 if self.found is None else self.found.axis

    def fitted(
        self, likelihood: Likelihood, output: Tensor, gradient: Tensor | None, curvature: LossCurvature | None = None
    ) -> Likelihood:
        """The likelihood with the weights that samples and positions have in the loss of one pass.

        Args:
            likelihood: the one that is read.
            output: (N, ...) of the model, without a graph, float32 or more.
            gradient: of the user's loss there; ``None`` in a pass that has no loss.
            curvature: of the user's loss there, where it was differentiated twice.

        Raises:
            ArgumentError: if the loss itself is needed.
        """
        if self.kind == "from-loss":
            if curvature is None:
                raise ArgumentError(NO_LOSS)
            return Quadratic(curvature, len(output) if self.loss_reduction == "mean" else 1)
        weights = None if gradient is None else self.weights(output, gradient)
        if curvature is not None and curvature.layout == "diagonal":
            raw = joined(curvature.blocks.to(output.dtype).clamp_min(0.0), output.shape, "diagonal")
            weights = self._relative(raw, len(output))
        elif gradient is not None and self.reads_curvature:
            self.assumed = True
        if weights is None and self.axis == -1:
            return likelihood
        return Weighted(likelihood, weights, self.axis)

    def weights(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """The weights of one pass, relative to the mean (or sum) over its samples; ``None``: weight 1 for all.

        Args:
            output: (N, ...) of the model, float32 or more.
            gradient: of the user's loss there, as autograd gave it.

        Returns:
            Categorical: (N, positions...), the classes' axis left out; Bernoulli: as the output.
        """
        if not self.kind or self.kind == "from-loss":
            return None
        tolerance = _tolerance(gradient.dtype)
        gradient = gradient.to(output.dtype)
        self._look(output, gradient, tolerance)
        if self.kind == "gaussian" or self.found is None or self.found.mode in ("plain", "assumed"):
            return None
        if self.found.mode == "averaged":
            return output.new_full((len(output), *(1,) * (output.ndim - 1 - (self.kind == "categorical"))),
                                   1 / self._outputs(output))  # fmt: skip
        if self.kind == "categorical":
            raw = _of_classes(self.found.mode, rows_of_classes(output, self.axis).softmax(-1),
                              rows_of_classes(gradient, self.axis), tolerance)  # fmt: skip
        else:
            raw = _of_bits(self.found.mode, output, gradient)
        return self._relative(raw, len(output))

    def _relative(self, raw: Tensor, samples: int) -> Tensor:
        """Weights of the loss as those of the mean (or sum) over its samples."""
        return raw * samples if self.loss_reduction == "mean" else raw

    def _look(self, output: Tensor, gradient: Tensor, tolerance: float) -> None:
        """Find out, on the host, what kind of loss this is; what was found before is only ever loosened."""
        self._seen += 1
        if self._seen > _EARLY and self._seen % _LATER and self.found is not None:
            return
        if output.ndim < (2 if self.kind == "categorical" else 1):
            return
        size, largest = torch.stack([gradient.abs().sum(), output.abs().max()]).tolist()
        if not 0 < size < math.inf or not largest < math.inf:  # nothing to see, or not finite, which is refused later
            return
        tolerance = max(tolerance, 40 * tolerance**2 * largest)  # of probabilities from large logits
        if tolerance > 0.1:
            return
        now = _reading(self.kind, output, gradient, tolerance, self.found)
        looser = 1e-4 if tolerance < 1e-4 else 2e-2
        if now.mode in ("assumed", "plain") and not now.looks_like and looser > tolerance:
            # Perhaps the loss was computed in lower precision than the output. Many close ratios of two classes prove
            # nothing at a loose tolerance.
            again = _reading(self.kind, output, gradient, looser, self.found)
            many = self.kind == "categorical" and output.shape[again.axis] > 2
            if again.mode == "hard" and (many or looser < 1e-3):
                now = again
        before = self.found
        if now.mode == "plain":  # until here: soft targets with a weight of at least now.least
            now = self._of_soft(now, output, tolerance)
        if before is None or _LOOSER[now.mode] > _LOOSER[before.mode] or now.looks_like:
            passed = final_activation(output, tolerance) if before is None or self._lost(now) else before.ends_in
            by_range = passed == "Sigmoid" and self.kind == "categorical"
            by_range = by_range and not sent_by_likelihood(passed, output, gradient, tolerance)
            ends_in = passed if self._lost(now) or passed == "Softmax" else ""
            self.found = replace(now, ends_in=ends_in, by_range=by_range)
        if before is not None and self.found is not None:
            self.found = replace(self.found, summed=before.summed and now.summed, meant=before.meant and now.meant)

    def _lost(self, now: Reading) -> bool:
        """Whether logits were expected and the gradient is that of no such loss."""
        return now.mode == "assumed" and not now.looks_like and self.kind in ("categorical", "bernoulli")

    def _of_soft(self, now: Reading, output: Tensor, tolerance: float) -> Reading:
        """Whether the least weight of soft targets fits a plain loss, or a mean over outputs."""
        least = now.least * len(output) if self.loss_reduction == "mean" else now.least
        known = "" if self.found is None else self.found.mode
        modes: tuple[tuple[Mode, float], ...] = (("plain", 1.0), ("averaged", 1.0 / self._outputs(output)))
        for mode, weight in modes:
            if least <= weight * (1 + tolerance) and (least > 0.5 * weight or mode == known):
                return replace(now, mode=mode)
        return replace(now, mode="assumed")

    def _outputs(self, output: Tensor) -> int:
        """Coordinates, or positions with a label, per sample."""
        classes = output.shape[self.axis] if self.kind == "categorical" else 1
        return max(1, output[0].numel() // classes)


class Weighted:
    """A likelihood whose samples and positions count with weights w, and whose classes may be on another axis.

    It is ``p(y | f0 + sqrt(w) (f - f0))`` around the output f0 at hand: its scores there are sqrt(w) times those of the
    likelihood, and its curvature is w times as large.

    Args:
        base: the likelihood.
        weights: of every sample and position, as :meth:`LossReader.weights` gives them; ``None`` for 1.
        axis: of the classes, -1 or 1.
    """

    def __init__(self, base: Likelihood, weights: Tensor | None, axis: int = -1):
        self.base, self.axis, self.name = base, axis, base.name
        self.roots = None if weights is None else weights.sqrt()  # readings are never negative

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from the likelihood, in the form that its own output has."""
        return self.base.sample(rows_of_classes(output, self.axis), generator)

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        rows = rows_of_classes(output, self.axis)
        if self.roots is not None:
            centre = rows.detach()
            rows = centre + (rows - centre) * _broadcast(self.roots, rows)
        return self.base.negative_log_likelihood(rows, target)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """That of the likelihood times sqrt(w)."""
        rows = rows_of_classes(output, self.axis)
        found = score_of(self.base, rows, target)
        if found is None:
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_(True)
                (found,) = torch.autograd.grad(self.base.negative_log_likelihood(leaf, target), leaf)
        if self.roots is not None:
            found = found * _broadcast(self.roots, rows)
        return found if self.axis == -1 else shaped_like_output(found.unsqueeze(0), output, self.axis).squeeze(0)

    def curvature_root(self, output: Tensor) -> Tensor:
        """(V, N, ...): those of the likelihood times sqrt(w)."""
        rows = rows_of_classes(output, self.axis)
        found = self.base.curvature_root(rows)
        if self.roots is not None:
            found = found * _broadcast(self.roots, rows)
        if self.axis == -1 and rows.shape == output.shape:
            return found
        return shaped_like_output(found, output, self.axis)


def is_weighted(likelihood: Likelihood) -> bool:
    """Whether it carries weights that were read."""
    return isinstance(likelihood, Quadratic) or (isinstance(likelihood, Weighted) and likelihood.roots is not None)


def _broadcast(roots: Tensor, rows: Tensor) -> Tensor:
    """Weights (N, ...), which may lack the last axis."""
    return roots if roots.ndim == rows.ndim else roots.unsqueeze(-1)


def rows_of_classes(value: Tensor, axis: int) -> Tensor:
    """(N, ..., C) with the classes last and at most one axis of positions: (N, C) or (N, T, C)."""
    moved = value if axis == -1 else value.movedim(axis, -1)
    return moved if axis == -1 or moved.ndim <= 3 else moved.flatten(1, -2)


def shaped_like_output(rows: Tensor, output: Tensor, axis: int) -> Tensor:
    """The inverse of :func:`rows_of_classes` for vectors (V, N, [T,] C)."""
    if axis == -1:
        return rows
    full = rows.reshape(len(rows), *output.movedim(axis, -1).shape)
    return full.movedim(-1, axis + 1)


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 2e-2)


# -- the weights -----------------------------------------------------------------------------------------------------


def _of_classes(mode: Mode, p: Tensor, g: Tensor, tolerance: float) -> Tensor:
    """Raw weights (N, [T]) from probabilities and gradients (N, [T,] C)."""
    tiny = torch.finfo(p.dtype).tiny
    if mode == "smooth":
        active = g.abs().amax(-1) > 0
        slope, _ = _smooth_classes(p.flatten(0, -2), g.flatten(0, -2), active.flatten())
        return slope * active
    if mode == "hard":
        top, place = g.max(-1, keepdim=True)  # never the label's: that is the only negative one
        return (top / p.gather(-1, place).clamp_min_(tiny)).squeeze(-1)
    ratio = torch.where(p > tiny, g / p, 0.0)
    top = ratio.amax(-1, keepdim=True)
    positive = (ratio >= top * (1 - tolerance)) & (top > 0)
    mass = torch.where(positive, p, 0.0).sum(-1)
    return torch.where(positive, g, 0.0).sum(-1) / mass.clamp_min(tiny)


def _of_bits(mode: Mode, output: Tensor, g: Tensor) -> Tensor:
    """Raw weights of every coordinate."""
    z = _distance(output, g)
    ratio = g.abs() / z.clamp_min(torch.finfo(z.dtype).tiny)
    if mode == "hard":
        return ratio
    if mode == "smooth":
        return _line(z.flatten(), g.abs().flatten(), (g != 0).flatten())[0] * (g != 0)
    return ratio.amax() * (g != 0)


def _distance(output: Tensor, g: Tensor) -> Tensor:
    """How far the probability is from the label 0 or 1 that the sign of the gradient tells."""
    return torch.where(g < 0, -output, output).sigmoid()


def _line(x: Tensor, y: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Slope of the least-squares line through the active points, and the largest residual relative to |y|."""
    count = active.sum().clamp_min(1)
    mean_x, mean_y = (x * active).sum() / count, (y * active).sum() / count
    dx, dy = (x - mean_x) * active, (y - mean_y) * active
    slope = (dx * dy).sum() / dx.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    return slope, (dy - slope * dx).abs().max() / (y * active).abs().max().clamp_min(torch.finfo(x.dtype).tiny)


def _smooth_classes(p: Tensor, g: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The line through (p_c, g_c) of all classes but the label, over rows (R, C)."""
    tiny = torch.finfo(p.dtype).tiny
    guess = torch.where(p > tiny, g / p, 0.0).amax()  # never more than the weight
    label = (g - guess * p).argmin(-1, keepdim=True)
    others = torch.ones_like(p).scatter(-1, label, 0.0) * active.unsqueeze(-1)
    return _line(p, g, others)


# -- what kind of loss it is -----------------------------------------------------------------------------------------


def _reading(kind: str, output: Tensor, gradient: Tensor, tolerance: float, known: Reading | None) -> Reading:
    """Look at a part of one pass on the host."""
    output, gradient = output.detach(), gradient.detach()
    if kind == "gaussian":
        return Reading("assumed", looks_like=_foreign(kind, output, gradient, tolerance))
    if kind == "bernoulli":
        mode, weights = _kind_of_bits(*_picked(output.flatten(), gradient.flatten()), tolerance)
        axis = -1
    else:
        axis = _class_axis(output, gradient, tolerance) if known is None else known.axis
        mode, weights = _kind_of_classes(*_class_rows(output, gradient, axis), tolerance)
    if mode in ("plain", "assumed"):
        other = _foreign(kind, output, gradient, tolerance)
        return Reading(mode, axis, looks_like=other, least=float(weights.max()) if len(weights) else 0.0)
    counted = weights[weights > 0]
    if len(output) < 2 or not len(counted):
        return Reading(mode, axis)
    summed = bool(((counted - 1).abs() < tolerance).all())
    rows = output.numel() // (output.shape[axis] if kind == "categorical" else 1)
    meant = any(bool(((number * counted - 1).abs() < tolerance).all()) for number in {len(output), rows})
    return Reading(mode, axis, summed, meant)


def _picked(output: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """At most so many entries, evenly spread, with a gradient, in double precision on the host."""
    active = torch.nonzero(gradient if gradient.ndim == 1 else gradient.abs().amax(-1)).flatten()
    limit = max(_FEW, min(_CHECKED, _ENTRIES // output[0].numel()))
    chosen = active[:: max(1, len(active) // limit)][:limit]
    return output[chosen].double().cpu(), gradient[chosen].double().cpu()


def _class_rows(output: Tensor, gradient: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    return _picked(rows_of_classes(output, axis).flatten(0, -2), rows_of_classes(gradient, axis).flatten(0, -2))


def _class_axis(output: Tensor, gradient: Tensor, tolerance: float) -> int:
    """The axis over which the gradient of a softmax sums to zero: the last, or 1 (``F.cross_entropy``'s layout)."""
    if output.ndim == 2 or output.shape[1] < 2:
        return -1
    last, second = (float(gradient.sum(axis).abs().amax()) for axis in (-1, 1))
    if output.shape[-1] < 2:
        return 1
    return 1 if second < last * 0.1 and second <= tolerance * float(gradient.abs().amax()) * output.shape[1] else -1


def _kind_of_classes(output: Tensor, g: Tensor, tolerance: float) -> tuple[Mode, Tensor]:
    """Mode and weights of rows (R, C), none of them zero."""
    classes, nothing = output.shape[-1], g.new_zeros(0)
    p = output.softmax(-1)
    usable = p > (1e-2 if tolerance > 1e-3 else 1e-30)  # below, gradients underflow
    # A row that is sure of its class tells nothing, and one that is nearly sure of its label little: p - 1 is rounded.
    doubt = 1 - p.gather(-1, g.argmin(-1, keepdim=True)).squeeze(-1)
    telling = (usable.sum(-1) > 1) & (doubt > _unsure(tolerance))
    p, g, usable = p[telling], g[telling], usable[telling]
    if not len(g):
        return "hard", nothing
    ratio = torch.where(usable, g / p, -torch.inf)
    top = ratio.amax(-1, keepdim=True)
    rounding = 10 * tolerance * g.abs().amax(-1) + 100 * tolerance**2 * top.squeeze(-1).abs()
    if bool((g.sum(-1).abs() > rounding).any()):
        return "assumed", nothing
    members = ((ratio >= top * (1 - tolerance)) & usable).sum(-1)
    positive = bool((top > 0).all())
    if positive and bool((members >= usable.sum(-1) - 1).all()):
        if classes > 2 or len(top) < _FEW or _clustered(top.flatten(), tolerance):
            return "hard", top.flatten()
    elif positive and bool((members >= torch.minimum(usable.sum(-1) - 1, torch.tensor(2))).all()):
        return "sparse", top.flatten()
    slope, residual = _smooth_classes(p, g, torch.ones(len(p), dtype=torch.bool))
    if float(slope) > 0 and float(residual) < tolerance and g.numel() > 2 * classes:
        return "smooth", slope.expand(len(g))
    return ("plain", top.flatten()) if positive else ("assumed", nothing)


def _kind_of_bits(output: Tensor, g: Tensor, tolerance: float) -> tuple[Mode, Tensor]:
    """Mode and weights of entries (R,), none of them zero."""
    z = _distance(output, g)
    telling = z > _unsure(tolerance)
    z, g = z[telling], g[telling]
    ratio = g.abs() / z
    if len(g) < _FEW or _clustered(ratio, tolerance):
        return "hard", ratio
    slope, residual = _line(z, g.abs(), torch.ones_like(g, dtype=torch.bool))
    if len(g) > 3 and float(slope) > 0 and float(residual) < tolerance:
        return "smooth", slope.expand(len(g))
    top = ratio.max()
    if int((ratio >= top * (1 - tolerance)).sum()) > 1:
        return "uniform", top.expand(len(g))
    return "plain", ratio


def _unsure(tolerance: float) -> float:
    """How far a probability must be from its label so that rounding does not hide the gradient."""
    return min(0.1, 100 * tolerance)


def _clustered(values: Tensor, tolerance: float) -> bool:
    """Whether nearly every value occurs more than once: all but one, and one in a hundred."""
    if len(values) == 1:
        return True
    ordered = values.sort().values
    near = ordered[1:] - ordered[:-1] <= tolerance * ordered[1:].abs()
    partnered = torch.zeros(len(values), dtype=torch.bool)
    partnered[1:] |= near
    partnered[:-1] |= near
    return int((~partnered).sum()) <= 1 + len(values) // 100


def _foreign(kind: str, output: Tensor, gradient: Tensor, tolerance: float) -> str:
    """The other likelihood whose plain gradient this is, beyond doubt; else empty."""
    if kind != "categorical" and output.ndim > 1:
        axis = _class_axis(output, gradient, tolerance)
        classes = output.shape[axis]
        if classes > 2:
            rows, slopes = _class_rows(output, gradient, axis)
            mode, _ = _kind_of_classes(rows, slopes, tolerance)
            if mode == "hard" and len(rows) * (classes - 2) >= 8:
                return "categorical"
    if kind != "bernoulli":
        bits, slopes = _picked(output.flatten(), gradient.flatten())
        ratio = slopes.abs() / _distance(bits, slopes)
        if len(ratio) >= 8 and float(ratio.max() - ratio.min()) <= tolerance * float(ratio.max()):
            return "bernoulli"
    return ""
