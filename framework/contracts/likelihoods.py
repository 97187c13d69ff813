"""Contracts of likelihoods."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .contract import contract, contracts_of, require, require_bound, require_close, require_equal

__all__ = ["CONTRACTS"]

_DRAWS = 20_000
_SIGMAS = 6.0


def _output(case: Case, samples: int = 3) -> Tensor:
    return case.randn(samples, 4, key=21)


def _draw(part: Any, output: Tensor, seed: int) -> Tensor:
    sampled: Tensor = part.sample(output, torch.Generator(device=output.device).manual_seed(seed))
    return sampled


def _curvature(part: Any, output: Tensor) -> Tensor:
    """(N, D, D) from the stated roots."""
    roots = part.curvature_root(output).flatten(2)
    return torch.einsum("vni,vnj->nij", roots, roots)


def _scores(part: Any, output: Tensor) -> Tensor:
    """(draws, D) gradients of -log p at labels drawn for one output (1, D)."""
    many = output.expand(_DRAWS, *output.shape[1:]).clone().requires_grad_()
    with torch.enable_grad():
        loss = part.negative_log_likelihood(many, _draw(part, many.detach(), 5))
        (scores,) = torch.autograd.grad(loss, many)
    return scores.flatten(1)


@contract("likelihood-curvature", "likelihood", "outer products of the roots sum to the Hessian of the loss")
def likelihood_curvature(part: Any, case: Case) -> None:
    """By automatic differentiation, at labels drawn from the model."""
    output = _output(case)
    targets, stated = _draw(part, output, 1), _curvature(part, output)
    for index in range(len(output)):

        def loss(row: Tensor, index: int = index) -> Tensor:
            value: Tensor = part.negative_log_likelihood(row.reshape(output[:1].shape), targets[index : index + 1])
            return value

        with torch.enable_grad():
            hessian = torch.autograd.functional.hessian(loss, output[index].flatten())
        require_close(f"sum of outer products of the roots of sample {index}", stated[index], hessian)


@contract("likelihood-score", "likelihood", "the gradient at a label drawn from the model has mean zero")
def likelihood_score(part: Any, case: Case) -> None:
    """Within six standard errors over many draws."""
    scores = _scores(part, _output(case, 1))
    error = (scores.mean(0).abs() / (scores.std(0) / math.sqrt(_DRAWS) + 1e-12)).max()
    require_bound("mean score, in standard errors", error, "at most", _SIGMAS)


@contract("likelihood-additive", "likelihood", "the loss of a mini-batch is the sum over its samples")
def likelihood_additive(part: Any, case: Case) -> None:
    """Sample by sample."""
    output = _output(case)
    targets = _draw(part, output, 2)
    whole = part.negative_log_likelihood(output.clone(), targets.clone())
    pieces = [part.negative_log_likelihood(output[n : n + 1], targets[n : n + 1]) for n in range(len(output))]
    require_close("loss of a mini-batch", whole, torch.stack(pieces).sum())


@contract("likelihood-generator", "likelihood", "labels depend on the generator only")
def likelihood_generator(part: Any, case: Case) -> None:
    """The same seed gives the same labels; the global random state is neither used nor moved."""
    output = _output(case)
    before = torch.get_rng_state()
    try:
        first = _draw(part, output, 3)
        require(torch.equal(torch.get_rng_state(), before), "sampling moved the global random state")
        torch.rand(7)
        require_equal("labels of the same seed", _draw(part, output, 3), first)
    finally:
        torch.set_rng_state(before)


@contract("likelihood-purity", "likelihood", "outputs and labels stay bitwise as they were")
def likelihood_purity(part: Any, case: Case) -> None:
    """Sampling, the loss and the roots."""
    output = _output(case)
    kept = output.clone()
    targets = _draw(part, output, 4)
    labels = targets.clone()
    part.negative_log_likelihood(output, targets)
    part.curvature_root(output)
    require_equal("the output", output, kept)
    require_equal("the labels", targets, labels)


CONTRACTS = contracts_of(globals())
