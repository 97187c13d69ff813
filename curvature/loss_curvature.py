"""The second derivative of the user's own loss in the model's output, measured before the loss is differentiated.

Inside :class:`LossDifferentiation` a ``loss.backward()`` first differentiates the loss with respect to the outputs that
wait for it, twice: that part of the graph is small. Nothing is assumed about the loss but that it is twice
differentiable; how the outputs hang together in it is found out:

- ``diagonal``: every output coordinate by itself (squared errors, Huber, binary cross entropies): one product;
- ``last`` or ``second``: the entries of one axis, position by position (classes): one product per entry;
- ``sample``: all coordinates of a sample: one product per coordinate.

A product with random entries checks the structure in the first passes, and every so often later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from ..errors import ArgumentError

__all__ = ["Layout", "LossCurvature", "LossDifferentiation", "LossPoint", "LossShape", "Quadratic", "differentiate"]

Layout = Literal["diagonal", "last", "second", "sample"]

_LARGEST = 2**28
"""Entries of all blocks of one pass; more are refused."""

_EARLY, _LATER = 3, 100
"""So many passes are all checked, and every so many afterwards."""


@dataclass(frozen=True)
class LossCurvature:
    """Second derivative of a loss in an output (N, ...): symmetric blocks (N, P, B, B), P independent positions.

    ``layout`` says which coordinates form a block.
    """

    blocks: Tensor
    layout: Layout

    def plus(self, other: LossCurvature | None) -> LossCurvature:
        """Of the sum of two losses; with different layouts they are written in full."""
        if other is None:
            return self
        if other.layout != self.layout:
            raise ArgumentError(
                "two losses were differentiated through one output, and their second derivatives have different "
                "structures; add the losses, and call backward() once"
            )
        return LossCurvature(self.blocks + other.blocks, self.layout)


class Quadratic:
    """The quadratic model of a loss around an output: a normal distribution whose precision is the loss's curvature.

    Its Gauss-Newton matrix is J' H J, H the loss's own second derivative in the output (arXiv:1412.1193v11). Ours: the
    random signs, and that blocks of several entries are decomposed in every pass, which a GPU synchronises for.

    A label is a vector of random signs z; its score is R z with R R' the positive part of the curvature, whose outer
    product has the curvature as its expectation.

    Args:
        curvature: of the loss.
        scale: what it is multiplied with, e.g. N for a mean over N samples.
    """

    name = "from-loss"

    def __init__(self, curvature: LossCurvature, scale: float):
        self.layout, blocks = curvature.layout, curvature.blocks
        if blocks.shape[-1] == 1:
            self.roots = (scale * blocks).clamp_min(0.0).sqrt()
        else:
            values, vectors = torch.linalg.eigh(blocks)
            self.roots = vectors * (scale * values).clamp_min(0.0).sqrt().unsqueeze(-2)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """(N, P, B) random signs."""
        shape = self.roots.shape[:-1]
        uniform = torch.rand(shape, generator=generator, device=output.device, dtype=output.dtype)
        return (2 * (uniform < 0.5)).to(output.dtype) - 1

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Up to what does not depend on the output."""
        return torch.sum(self.score(output, target) * output)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """R z."""
        scores = (self.roots * target.unsqueeze(-2)).sum(-1)
        return joined(scores.to(output.dtype), output.shape, self.layout)

    def curvature_root(self, output: Tensor) -> Tensor:
        """V = coordinates roots, each zero at all positions but one."""
        samples, positions, size, _ = self.roots.shape
        apart = self.roots.new_zeros(positions, size, samples, positions, size)
        places = torch.arange(positions, device=output.device)
        apart[places, :, :, places] = self.roots.permute(1, 3, 0, 2)
        return torch.vmap(lambda value: joined(value, output.shape, self.layout))(apart.flatten(0, 1).to(output.dtype))


def parted(value: Tensor, layout: Layout) -> Tensor:
    """(N, ...) as (N, P, B)."""
    if layout == "diagonal":
        return value.reshape(len(value), -1, 1)
    if layout == "sample":
        return value.reshape(len(value), 1, -1)
    moved = value if layout == "last" else value.movedim(1, -1)
    return moved.reshape(len(value), -1, moved.shape[-1])


def joined(value: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """The inverse of :func:`parted`."""
    if layout != "second":
        return value.reshape(shape)
    return value.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


class LossShape:
    """What was found out about the second derivative of a loss, pass by pass.

    Attributes:
        layout: of the last pass; ``None`` before the first.
        concave: whether the loss has had negative curvature.
        flat: whether it has had none at all at an output that it sends a gradient to: a piecewise linear loss.
    """

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.concave = self.flat = False
        self._seen = 0

    def measure(self, product: Callable[[Tensor], Tensor], like: Tensor, only_diagonal: bool) -> LossCurvature | None:
        """The curvature at one output.

        Args:
            product: of the second derivative with a vector in the form of the output.
            like: (N, ...) the gradient.
            only_diagonal: whether another structure is of no use; then ``None`` is returned for it.

        Raises:
            ArgumentError: if the loss couples samples, or a sample has too many coordinates.
        """
        self._seen += 1
        checks = self._seen <= _EARLY or self._seen % _LATER == 0 or self.layout is None
        if not checks and self.layout is not None:
            return LossCurvature(_blocks(product, like, self.layout), self.layout)
        generator = torch.Generator(device=like.device)
        generator.manual_seed(self._seen)
        probe = torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)
        expected = product(probe)
        for layout in _layouts(like):
            if only_diagonal and layout != "diagonal":
                return None
            blocks = _blocks(product, like, layout)
            found = joined((blocks @ parted(probe, layout).unsqueeze(-1)).squeeze(-1), like.shape, layout)
            tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(like.dtype, 5e-2)
            if bool((found - expected).norm() <= tolerance * expected.norm()):
                if bool(expected.any()):  # zeros have every structure: the next pass is looked at again
                    self.layout = layout
                elif not self.flat:
                    self.flat = bool(like.any())
                self._look_for_concavity(blocks)
                return LossCurvature(blocks, layout)
        raise ArgumentError(
            "the loss couples samples: its second derivative in the output of one sample depends on others (a "
            "contrastive loss, a norm of the whole mini-batch), so no sample has a curvature of its own; say "
            "likelihood='gaussian', or take a method that needs no likelihood"
        )

    def _look_for_concavity(self, blocks: Tensor) -> None:
        least, largest = torch.linalg.eigvalsh(blocks.double()).aminmax()
        self.concave = self.concave or bool(least < -1e-3 * largest.abs().clamp_min(1e-30))


def _layouts(like: Tensor) -> list[Layout]:
    """Structures to be tried, the cheap ones first."""
    tried: list[Layout] = ["diagonal"]
    if like.ndim > 2:
        tried += sorted(("last", "second"), key=lambda layout: like.shape[-1 if layout == "last" else 1])
    return [*tried, "sample"] if like.ndim > 1 else tried


def _blocks(product: Callable[[Tensor], Tensor], like: Tensor, layout: Layout) -> Tensor:
    """(N, P, B, B) from B products with the unit vectors of all blocks at once."""
    samples, positions, size = parted(like, layout).shape
    if samples * positions * size**2 > _LARGEST:
        raise ArgumentError(
            f"likelihood='from-loss' would need {samples * positions * size**2:.3g} entries of second derivatives: in "
            f"this loss all {size} coordinates of a sample hang together; say likelihood='categorical', 'bernoulli' or "
            "'gaussian', or take smaller mini-batches"
        )
    columns = []
    for unit in torch.eye(size, dtype=like.dtype, device=like.device):
        vector = joined(unit.expand(samples, positions, size), like.shape, layout)
        columns.append(parted(product(vector), layout))
    blocks = torch.stack(columns, -1)
    return 0.5 * (blocks + blocks.mT) if size > 1 else blocks


class LossPoint:
    """One output of one pass, at which a loss will be differentiated.

    Args:
        edge: of the output; let go of when the context ends, for a hook on the output holds its point.
        shape: what is known of the loss there.
        arrange: brings the output into the form (N, ...); ``None``: it has it.
        only_diagonal: whether other structures are of no use.

    Attributes:
        curvature: of all losses so far.
    """

    def __init__(
        self,
        edge: GradientEdge,
        shape: LossShape,
        arrange: Callable[[Tensor], Tensor] | None = None,
        only_diagonal: bool = False,
    ):
        self.edge: GradientEdge | None = edge
        self.shape, self.arrange, self.only_diagonal = shape, arrange, only_diagonal
        self.curvature: LossCurvature | None = None

    def differentiate(self, gradient: Tensor) -> None:
        """Take in one loss, from its gradient at this output, which has a graph."""
        edge = self.edge
        slope = gradient if self.arrange is None else self.arrange(gradient)

        def product(vector: Tensor) -> Tensor:
            if not slope.requires_grad:  # the loss is linear in the output
                return torch.zeros_like(vector)
            assert edge is not None
            (found,) = torch.autograd.grad(slope, [edge], vector, retain_graph=True, allow_unused=True)
            if found is None:
                return torch.zeros_like(vector)
            return found.detach() if self.arrange is None else self.arrange(found.detach())

        found = self.shape.measure(product, slope.detach(), self.only_diagonal)
        self.curvature = None if found is None else found.plus(self.curvature)


class LossDifferentiation(TorchFunctionMode):
    """Context in which a ``backward()`` first takes the loss's second derivative at the outputs that wait for it.

    Args:
        points: the outputs; whoever makes one puts it there while the context lasts.
        quietly: context in which gradients are nobody's.
    """

    def __init__(self, points: list[LossPoint], quietly: Callable[[], Any]):
        super().__init__()
        self._points, self._quietly = points, quietly

    def __exit__(self, *error: Any) -> None:
        """Let go of the graphs."""
        for point in self._points:
            point.edge = None
        self._points.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Everything but ``Tensor.backward`` and ``torch.autograd.backward`` passes through."""
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            self._differentiate([args[0]], [args[1] if len(args) > 1 else kwargs.get("gradient")])
        elif func is torch.autograd.backward:
            tensors = args[0] if args else kwargs["tensors"]
            several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            vectors = args[1] if len(args) > 1 else kwargs.get("grad_tensors")
            given = [vectors] if isinstance(vectors, Tensor) or vectors is None else list(vectors)
            self._differentiate(several, given if len(given) == len(several) else [None] * len(several))
        return func(*args, **kwargs)

    def _differentiate(self, losses: Sequence[Tensor], vectors: Sequence[Tensor | None]) -> None:
        with self._quietly(), torch.enable_grad():
            differentiate(self._points, losses, vectors)


def differentiate(points: Sequence[LossPoint], losses: Sequence[Tensor], vectors: Sequence[Tensor | None]) -> None:
    """Take the second derivative of losses at the outputs that they depend on.

    Raises:
        ArgumentError: as :meth:`LossShape.measure`; also if the loss depends on several outputs jointly.
    """
    edges = [point.edge for point in points if point.edge is not None]
    if not edges:
        return
    try:
        slopes = torch.autograd.grad(losses, edges, vectors, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        if all(point.only_diagonal for point in points):
            return
        raise _not_twice(error) from error
    for number, (point, slope) in enumerate(zip(points, slopes, strict=True)):
        if slope is None:
            continue
        others = [edge for place, edge in enumerate(edges) if place != number]
        if others and slope.requires_grad and point.shape.layout is None and not _are_apart(slope, others):
            if point.only_diagonal:
                continue
            raise ArgumentError(
                "the loss couples several outputs (heads, or passes of the model), so its second derivative is not "
                "that of each by itself; return them as one tensor, or name likelihoods"
            )
        try:
            point.differentiate(slope)
        except RuntimeError as error:
            if not point.only_diagonal:
                raise _not_twice(error) from error


def _not_twice(error: RuntimeError) -> ArgumentError:
    return ArgumentError(
        f"the loss cannot be differentiated twice in the model's output ({str(error).partition('. ')[0]}); say "
        "likelihood='categorical', 'bernoulli' or 'gaussian'"
    )


def _are_apart(slope: Tensor, others: Sequence[GradientEdge]) -> bool:
    """Whether the second derivative has no entries between two outputs."""
    found = torch.autograd.grad(slope, others, torch.ones_like(slope), retain_graph=True, allow_unused=True)
    return not any(value is not None and bool(value.abs().sum() > 1e-6 * slope.abs().sum()) for value in found)
