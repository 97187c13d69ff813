"""The extra backward passes of the ``hooks`` backend, from the model's output with a loss that is not the user's.

They run while the user's graph is still alive, and stop at the pre-activations wherever no parameter gradient is
wanted. Passes that are followed by a loss have theirs in :mod:`.output_pass`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..layers.layer import Layer
from ..layers.sharding import wholes
from ..likelihoods import Likelihood, score_of
from ..records.calls import Call, ParameterSum
from .outputs import Choice, JointLikelihood, read_output
from .passes import extra_backward

__all__ = [
    "Labels",
    "label_generator",
    "parameter_sums",
    "pulled_back",
    "require_predictive",
    "roots_backward",
    "sampled_backward",
    "seeded_generator",
    "slope_at",
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


@dataclass(frozen=True)
class Labels:
    """Where the labels of one pass are drawn from, see :func:`label_generator`."""

    seed: int
    step: int
    passes: int
    stream: int = 0

    def of_head(self, likelihood: Likelihood, output: Tensor, head: int) -> Any:
        """Labels of one of several heads, each of which draws its own; of the only one: number 0."""
        stream = self.stream + (head << 20)
        generator = label_generator(self.seed, self.step, self.passes, output.device, stream)
        return likelihood.sample(output, generator)

    def drawn(self, likelihood: Likelihood, output: Tensor) -> Any:
        """Labels of one pass: whoever draws them draws the same ones."""
        if isinstance(likelihood, JointLikelihood):
            return tuple(
                self.of_head(part, values, head) for head, (part, values) in enumerate(likelihood.heads(output))
            )
        return self.of_head(likelihood, output, 0)


def slope_at(likelihood: Likelihood, output: Tensor, labels: Any) -> Tensor:
    """Gradient of -log p(labels) at an output (N, ...) without a graph, by its formula where there is one."""
    found = score_of(likelihood, output, labels)
    if found is not None:
        return found
    with torch.enable_grad():
        leaf = output.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(likelihood.negative_log_likelihood(leaf, labels), leaf)
    return slope


def pulled_back(root: Any, inputs: Sequence[Any], vectors: Tensor, batched: bool) -> Sequence[Tensor | None]:
    """Gradients at edges and parameters for one vector at the output, or for several at once (V, N, ...).

    Call it inside :func:`.extra_backward`.

    Args:
        root: the output, or its edge.
        inputs: edges and parameters.
        vectors: at the output.
        batched: whether there are several.
    """
    if not inputs:
        return ()
    if batched:
        return _batched_backward(root, inputs, vectors)
    return wholes(torch.autograd.grad(root, inputs, vectors, retain_graph=True, allow_unused=True))


def sampled_backward(
    output: Tensor,
    likelihood: Likelihood,
    labels: Labels,
    pass_index: int,
    calls: Sequence[Call],
    layers: Sequence[Layer],
) -> dict[str, ParameterSum]:
    """One extra backward with labels drawn from the model, in a pass without a loss that could be read.

    Args:
        output: (N, ...) of the model, with its graph.
        likelihood: the distribution.
        labels: where they are drawn from.
        pass_index: number of the forward pass.
        calls: calls of this pass with an edge; their ``sampled`` is set and their edge dropped.
        layers: layers whose parameter gradients are wanted too.

    Returns:
        Per layer of ``layers`` its parameter gradients, summed over samples; layers that the output does not depend on
        are left out.
    """
    trainable = [p for layer in layers for p in layer.parameters.values() if p.requires_grad]
    wide = output.detach().float() if output.dtype in (torch.float16, torch.bfloat16) else output.detach()  # autocast
    slope = slope_at(likelihood, wide, labels.drawn(likelihood, wide)).to(output.dtype)
    inputs: list[Any] = [*(call.edge for call in calls), *trainable]
    with extra_backward():
        gradients = pulled_back(output, inputs, slope, batched=False)
    for call, gradient in zip(calls, gradients, strict=False):
        call.sampled, call.edge = None if gradient is None else call.arranged(gradient), None
    found = dict(zip(map(id, trainable), gradients[len(calls) :], strict=True))
    return parameter_sums(layers, found, pass_index, output.shape[0])


def parameter_sums(
    layers: Sequence[Layer], gradients: Mapping[int, Tensor | None], pass_index: int, samples: int
) -> dict[str, ParameterSum]:
    """By layer its parameter gradients, from gradients by the parameter's id."""
    sums: dict[str, ParameterSum] = {}
    for layer in layers:
        found = [(p, gradients.get(id(p))) for p in layer.parameters.values()]
        if all(gradient is None for _, gradient in found):
            continue  # the layer is not in this graph (e.g. inside a reentrant checkpoint): zeros would be a guess
        values = tuple(torch.zeros_like(p) if gradient is None else gradient for p, gradient in found)
        sums[layer.name] = ParameterSum(pass_index, samples, values)
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


def _batched_backward(output: Any, edges: Sequence[Any], roots: Tensor) -> Sequence[Tensor | None]:
    """Gradients (V, ...) at each edge, one per root."""
    try:
        return wholes(
            torch.autograd.grad(output, edges, roots, retain_graph=True, allow_unused=True, is_grads_batched=True)
        )
    except RuntimeError:  # an operation of the model has no batching rule: one root at a time
        found = [
            wholes(torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True)) for root in roots
        ]
    columns = zip(*found, strict=True)
    return [None if values[0] is None else torch.stack(list(values)) for values in columns]
