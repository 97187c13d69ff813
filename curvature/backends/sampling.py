"""The extra backward passes of the ``hooks`` backend, from the model's output with a loss that is not the user's.

They run while the user's graph is still alive, right after the model's forward pass, and stop at the pre-activations
wherever no parameter gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..layers.layer import Layer
from ..likelihoods import Likelihood
from ..records.calls import Call, ParameterSum
from .outputs import Choice, read_output
from .passes import extra_backward

__all__ = [
    "label_generator",
    "require_predictive",
    "roots_backward",
    "sampled_backward",
    "seeded_generator",
]


def label_generator(seed: int, step: int, passes: int, device: torch.device, stream: int = 0) -> torch.Generator:
    """The generator of the labels of one pass; every backend draws from it, so all draw the same labels.

    Args:
        seed: of the optimizer.
        step: number of the step >= 0.
        passes: passes of this step before the one at hand that count, or still may.
        device: of the model's output.
        stream: number of the process among those that share a mini-batch, each of which draws its own labels.
    """
    return seeded_generator((seed * 1_000_003 + step) * 1_009 + passes + stream * 2**48, device)


def seeded_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator from any whole number: torch takes 64 bits, and counts a negative seed from the end."""
    generator = torch.Generator(device=device)
    generator.manual_seed(seed % 2**64)
    return generator


def require_predictive(
    likelihood: Likelihood | None, output: object, choice: Choice = None
) -> tuple[Likelihood, Tensor]:
    """The likelihood and the tensor of the model's output that it reads.

    Args:
        likelihood: the model's, or one per head.
        output: what the model returned.
        choice: the user's ``output`` of ``osculate.build``.

    Raises:
        ArgumentError: if no likelihood is known, or the tensor is not found.
    """
    if likelihood is None:
        raise ArgumentError(
            "sampled labels need a likelihood, and none was given; pass likelihood='categorical', 'bernoulli' or "
            "'gaussian' to osculate.build"
        )
    read = read_output(likelihood, output, choice)
    assert read.likelihood is not None
    return read.likelihood, read.output


def sampled_backward(
    output: Tensor,
    likelihood: Likelihood,
    generator: torch.Generator,
    pass_index: int,
    calls: Sequence[Call],
    layers: Sequence[Layer],
) -> dict[str, ParameterSum]:
    """One extra backward with labels drawn from the model.

    Args:
        output: (N, ...) of the model, with its graph.
        likelihood: the distribution.
        generator: of the labels.
        pass_index: number of the forward pass.
        calls: calls of this pass with an edge; their ``sampled`` is set and their edge dropped.
        layers: layers whose parameter gradients are wanted too.

    Returns:
        Per layer of ``layers`` its parameter gradients, summed over samples; layers that the output does not depend on
        are left out.
    """
    trainable = [p for layer in layers for p in layer.parameters.values() if p.requires_grad]
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output  # autocast
    targets = likelihood.sample(output.detach(), generator)
    loss = likelihood.negative_log_likelihood(output, targets)
    inputs: list[Any] = [*(call.edge for call in calls), *trainable]
    with extra_backward():
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    for call, gradient in zip(calls, gradients, strict=False):
        call.sampled, call.edge = None if gradient is None else call.arranged(gradient), None
    rest = iter(gradients[len(calls) :])
    sums: dict[str, ParameterSum] = {}
    for layer in layers:
        found = [(p, next(rest) if p.requires_grad else None) for p in layer.parameters.values()]
        if all(gradient is None for _, gradient in found):
            continue  # the layer is not in this graph (e.g. inside a reentrant checkpoint): zeros would be a guess
        values = tuple(torch.zeros_like(p) if gradient is None else gradient for p, gradient in found)
        sums[layer.name] = ParameterSum(pass_index, output.shape[0], values)
    return sums


def roots_backward(output: Tensor, likelihood: Likelihood, calls: Sequence[Call]) -> None:
    """Backpropagate all V roots of the likelihood's curvature at the output, as one batch where autograd can.

    Args:
        output: (N, ...) of the model, with its graph.
        likelihood: the distribution.
        calls: calls of this pass with an edge; their ``roots`` are set, (N, V, ...).
    """
    if not calls:
        return
    roots = likelihood.curvature_root(output.detach())
    edges: list[Any] = [call.edge for call in calls]
    with extra_backward():
        for call, gradient in zip(calls, _batched_backward(output, edges, roots), strict=True):
            call.roots = None if gradient is None else call.arranged_all(gradient).transpose(0, 1)


def _batched_backward(output: Tensor, edges: Sequence[Any], roots: Tensor) -> Sequence[Tensor | None]:
    """Gradients (V, ...) at each edge, one per root."""
    try:
        return torch.autograd.grad(output, edges, roots, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # an operation of the model has no batching rule: one root at a time
        found = [torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True) for root in roots]
    columns = zip(*found, strict=True)
    return [None if values[0] is None else torch.stack(list(values)) for values in columns]
