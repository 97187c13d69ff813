"""Likelihoods: the model's own predictive distribution, read off its raw output.

Each gives a negative log-likelihood (summed over samples), a sampler of labels, and an exact root of the curvature of
the loss with respect to the output. Summed over output coordinates, as in the papers' autoencoders: for a Bernoulli
output of 784 pixels one *sample* is one image.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ArgumentError, UnknownNameError, require_interval

__all__ = [
    "NO_LOSS",
    "Bernoulli",
    "Categorical",
    "FromLoss",
    "Gaussian",
    "Likelihood",
    "resolve_likelihood",
    "score_of",
]


class Likelihood(Protocol):
    """A predictive distribution with parameters ``output`` (N, ...)."""

    name: str

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from the model at ``output``, one per sample."""

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """0-dimensional: sum over samples of -log p(target | output), up to a constant."""

    def curvature_root(self, output: Tensor) -> Tensor:
        """(V, N, ...): roots r_v with sum_v r_v(n) r_v(n)' = Hessian of -log p with respect to output n."""


class Categorical:
    """Softmax over classes, the last axis: logits (N, classes) with labels (N,), or (N, T, classes) with labels (N, T).

    One *sample* is one row of the first axis: the loss of a sequence is the sum over its T tokens.
    """

    name = "categorical"

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Inverse transform of one uniform number per label.

        Raises:
            ArgumentError: if the output cannot be logits over classes.
        """
        _require_logits(output)
        cumulative = output.softmax(-1).cumsum(-1)
        uniform = torch.rand(output.shape[:-1], generator=generator, device=output.device, dtype=cumulative.dtype)
        label = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * cumulative[..., -1:], right=True).squeeze(-1)
        return label.clamp_(max=output.shape[-1] - 1)

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy, summed over samples and tokens.

        Raises:
            ArgumentError: if the output cannot be logits, or the labels do not fit it.
        """
        _require_logits(output)
        if target.shape != output.shape[:-1]:
            raise ArgumentError(
                f"labels of shape {tuple(target.shape)} do not fit logits of shape {tuple(output.shape)}; one class "
                f"index per row of logits is expected, shape {tuple(output.shape[:-1])}"
            )
        return functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Gradient of the negative log-likelihood: p - e_y."""
        probability, label = output.softmax(-1), target.unsqueeze(-1)
        return probability.scatter_add_(-1, label, probability.new_full((), -1.0).expand(label.shape))

    def curvature_root(self, output: Tensor) -> Tensor:
        """V = classes roots sqrt(p_v) (e_v - p); for sequences V = T classes, each zero at all tokens but one.

        Raises:
            ArgumentError: if the output cannot be logits over classes.
        """
        _require_logits(output)
        probability = output.softmax(-1)
        basis = torch.eye(output.shape[-1], dtype=output.dtype, device=output.device)
        roots = probability.sqrt().unsqueeze(-1) * (basis - probability.unsqueeze(-2))  # (N, [T,] V, classes)
        if output.ndim == 2:
            return roots.transpose(0, 1)
        tokens = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        return torch.einsum("nuvc,ut->uvntc", roots, tokens).flatten(0, 1)


class Bernoulli:
    """Independent Bernoulli coordinates: ``output`` (N, ...) logits, labels of the same shape in {0, 1}."""

    name = "bernoulli"

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Bernoulli(sigmoid(output))."""
        uniform = torch.rand(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return (uniform < output.sigmoid()).to(output.dtype)

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy with logits, summed over samples and coordinates."""
        return functional.binary_cross_entropy_with_logits(output, target, reduction="sum")

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Gradient of the negative log-likelihood: p - y."""
        return output.sigmoid() - target

    def curvature_root(self, output: Tensor) -> Tensor:
        """V = coordinates roots sqrt(p (1 - p)) e_v."""
        probability = output.sigmoid()
        return _diagonal_roots((probability * (1 - probability)).sqrt())


class Gaussian:
    """Normal coordinates of variance 1 / weight: ``output`` (N, ...) means; the loss is half the squared error.

    Args:
        weight: > 0, of half a squared error in a sample's loss, e.g. 2 / D for ``nn.MSELoss()`` over D outputs.
            ``None``: measured where ``step`` is given a closure; else 1 is assumed, for the gradient of a squared error
            does not tell.

    Raises:
        ArgumentError: if the weight is out of range.
    """

    name = "gaussian"
    weight: float | None = None

    def __init__(self, weight: float | None = None):
        if weight is not None:
            require_interval("weight", weight, 0.0, math.inf, closed="()")
        self.weight = weight

    @property
    def precision(self) -> float:
        """1 / variance."""
        return 1.0 if self.weight is None else self.weight

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Normal with mean ``output``."""
        noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return output + noise / math.sqrt(self.precision)

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Weighted half squared error, summed over samples and coordinates."""
        return 0.5 * self.precision * (output - target).square().sum()

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Gradient of the negative log-likelihood."""
        difference = output - target
        return difference if self.weight is None else self.weight * difference

    def curvature_root(self, output: Tensor) -> Tensor:
        """V = coordinates roots sqrt(weight) e_v."""
        return _diagonal_roots(torch.full_like(output, math.sqrt(self.precision)))


class FromLoss:
    """No distribution: the curvature of the user's own loss, twice differentiated in the model's output.

    Exact for any loss that is convex in the output and does not couple samples; what is concave in it is left out.
    The loss must be at hand, so ``step`` takes a closure, and warm starts take functions that return the loss.
    """

    name = "from-loss"

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Not before a loss is known.

        Raises:
            ArgumentError: in any case.
        """
        raise ArgumentError(NO_LOSS)

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """As ``sample``."""
        raise ArgumentError(NO_LOSS)

    def curvature_root(self, output: Tensor) -> Tensor:
        """As ``sample``."""
        raise ArgumentError(NO_LOSS)


NO_LOSS = (
    "likelihood='from-loss' differentiates the loss twice in the model's output, so it has to be there: call "
    "optimizer.step(closure), give warm_start functions that return the loss, or say likelihood='categorical', "
    "'bernoulli' or 'gaussian'"
)


def _require_logits(output: Tensor) -> None:
    if output.ndim not in (2, 3) or output.shape[-1] < 2:
        raise ArgumentError(
            "a categorical likelihood reads logits (N, classes) or (N, tokens, classes) with at least 2 classes on the "
            f"last axis, got an output of shape {tuple(output.shape)}; move the classes last and flatten the rest, or "
            "take likelihood='bernoulli' for one logit per coordinate"
        )


def _diagonal_roots(values: Tensor) -> Tensor:
    """(D, N, ...) roots of a diagonal matrix with square roots ``values`` (N, ...), D coordinates per sample."""
    flat = values.reshape(values.shape[0], -1)  # an output (N,) has one coordinate
    return torch.diag_embed(flat).transpose(0, 1).reshape(flat.shape[1], *values.shape)


def score_of(likelihood: Likelihood, output: Tensor, target: Tensor) -> Tensor | None:
    """Gradient of the negative log-likelihood at an output (N, ...) by its formula; ``None`` if its class has none.

    A formula that is inherited is not used: the class may have another negative log-likelihood.
    """
    formula = vars(type(likelihood)).get("score")
    return None if formula is None else formula(likelihood, output, target)


_LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "from-loss": FromLoss,
    "gaussian": Gaussian,
}


def resolve_likelihood(likelihood: str | Likelihood | None) -> Likelihood | None:
    """A likelihood from its name; an object is passed through.

    Raises:
        UnknownNameError: if the name is not ``bernoulli``, ``categorical``, ``from-loss`` or ``gaussian``.
    """
    if not isinstance(likelihood, str):
        return likelihood
    if likelihood not in _LIKELIHOODS:
        raise UnknownNameError("likelihood", likelihood, _LIKELIHOODS)
    return _LIKELIHOODS[likelihood]()
