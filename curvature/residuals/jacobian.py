"""Jacobians of residuals, row by row, of whatever the user computes them from.

A residual of a physics-informed network contains derivatives of the network with respect to its input, so a weight acts
in the forward pass and again in every derivative of it; inputs and output gradients of a layer do not know of that.
Here each row of the mini-batch gets a copy of the weights of its own (a view, no memory) for as long as the closure
runs. Autograd then differentiates sum_n r_n with respect to all the copies at once, and what arrives at copy n is row n
of the Jacobian, whatever was differentiated on the way: one backward pass per component, not one per row.

That is right where row n of a block is computed from row n of what the model was given, and parameters are used by
linear layers. Both are checked: a parameter that is used in another way is seen in the graph, and the rows are compared
with an exact product of the Jacobian with a random vector. A block that fails is differentiated row by row (batches of
backward passes), right for everything and slower, with one :class:`~osculate.FallbackWarning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from ...errors import ArgumentError, CompatibilityError, FallbackWarning, NumericalError
from .residual import ResidualBlock, ResidualClosure, read_residuals, total_loss

__all__ = ["Implicit", "Jacobian", "JacobianReader", "Uses", "evaluate_residuals", "explained"]

_CHUNK = 64
"""Backward passes that run as one batch where rows are not independent."""


@dataclass(frozen=True)
class Jacobian:
    """Residuals of one mini-batch with their derivatives. V entries in all: blocks in their order, rows, components.

    Attributes:
        names: of the blocks.
        counts: entries of each block, V in all.
        values: (V,) residuals r.
        slopes: (V,) derivative of the loss by each residual, weight / rows * rho'(r).
        curvatures: (V,) second derivative of the loss by each residual, >= 0.
        rows: per parameter (V, *shape), derivatives of the residuals.
        loss: 0-dimensional.
        points: rows of all blocks together.
        uses: by the place of a weight among the parameters, those that were asked for.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    values: Tensor
    slopes: Tensor
    curvatures: Tensor
    rows: tuple[Tensor, ...]
    loss: Tensor
    points: int = 0
    uses: Mapping[int, Uses] = field(default_factory=lambda: MappingProxyType({}))

    def gradients(self) -> tuple[Tensor, ...]:
        """Gradient of the loss per parameter, J' slopes."""
        return tuple((self.slopes @ _flat(value)).reshape(value.shape[1:]) for value in self.rows)

    def roots(self) -> tuple[Tensor, ...]:
        """Per parameter (V, *shape): rows whose outer products add up to the Gauss-Newton matrix of the loss."""
        scale = self.curvatures.sqrt()
        return tuple(value * scale.reshape(-1, *[1] * (value.ndim - 1)) for value in self.rows)

    def matrix(self) -> Tensor:
        """(V, P) all derivatives side by side, parameters in their order."""
        return torch.cat([_flat(value) for value in self.rows], 1)


@dataclass(frozen=True)
class Uses:
    """What linear layers multiply one weight with, in all blocks.

    Attributes:
        rows: R, products in all blocks.
        preactivation: (d_out,) mean of the products (with the bias where it was added) over all rows.
        gradient: (d_out,) derivative of the loss by the products, summed over all rows.
        inputs: (R, d_in + 1) rows a, the last column 1 where the bias was added and 0 where it was not (a derivative of
            the network does not see it).
        outputs: (R', d_out) rows: derivatives of single residuals by the products, each times the square root of
            the second derivative of the loss by its residual.
        complete: whether the derivatives of all residuals by the weight are the sums over these rows. They are not
            where the closure differentiates the network by autograd, whose backward passes use the weight once more.
    """

    rows: int
    preactivation: Tensor
    gradient: Tensor
    inputs: Tensor
    outputs: Tensor
    complete: bool


@dataclass(frozen=True)
class Implicit:
    """Residuals of one mini-batch with a graph that gives products with their Jacobian J (V, P).

    Attributes:
        known: everything but the rows, which have no entries.
        flat: (V,) residuals with their graph.
        cotangent: (V,), what ``back`` is linear in.
        parameters: in their order.
        back: J' cotangent per parameter, with its graph; ``None`` for a parameter that nothing depends on.
        within: puts the copies, which are what ``parameters`` holds, into the model: what is computed again on the way
            back (checkpoints) is computed where the graph was.
    """

    known: Jacobian
    flat: Tensor
    cotangent: Tensor
    parameters: tuple[Tensor, ...]
    back: tuple[Tensor | None, ...]
    within: Callable[[], AbstractContextManager[Any]]

    def transposed(self, vector: Tensor) -> Tensor:
        """(V,) -> (P,), J'u: one backward pass."""
        with self.within():
            found = torch.autograd.grad(self.flat, self.parameters, vector, retain_graph=True, allow_unused=True)
        pairs = zip(found, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if value is None else value).flatten() for value, p in pairs])

    def times(self, vector: Tensor) -> Tensor:
        """(P,) -> (V,), J x: the derivative of J'u, which is linear in u, along x."""
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        used = [
            (value, piece.reshape(value.shape))
            for value, piece in zip(self.back, pieces, strict=True)
            if value is not None
        ]
        with torch.enable_grad(), self.within():
            (found,) = torch.autograd.grad(
                [value for value, _ in used], self.cotangent, [piece for _, piece in used], retain_graph=True
            )
        return found


def evaluate_residuals(closure: ResidualClosure, *, graph: bool = False) -> tuple[Tensor, list[ResidualBlock]]:
    """The loss and the blocks, without a graph of the parameters unless it is asked for.

    The closure may differentiate with respect to its own inputs in either case.

    Raises:
        ArgumentError: see :func:`.read_residuals`.
    """
    with torch.enable_grad():
        blocks = read_residuals(closure())
        loss = total_loss(blocks)
    return (loss if graph else loss.detach()), blocks


@contextmanager
def explained() -> Iterator[None]:
    """Says of a backward pass that torch refuses what the function of residuals has done.

    Raises:
        ArgumentError: in the place of torch's RuntimeError, unless memory ran out.
    """
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise ArgumentError(
            "the residuals cannot be differentiated: compute them from the model inside of the function each time it "
            "is called, nothing of it before, and change no tensor in place that a derivative needs. torch says: "
            f"{str(error).splitlines()[0]}"
        ) from error


class JacobianReader:
    """Evaluates closures of residuals with the derivatives by the parameters of a model.

    Args:
        parameters: what is differentiated by, in the order of the result.
        names: of the parameters, for messages.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str]):
        self.parameters, self.names = list(parameters), list(names)
        self.coupled: dict[str, str] = {}  # blocks that are differentiated row by row, and why
        self._known: set[str] = set()  # blocks whose rows have been compared
        self.keeps_data = False
        self.given: tuple[Tensor, ...] = ()  # what linear layers were given in the latest evaluation, if data are kept

    @torch.enable_grad()
    def evaluate(self, closure: ResidualClosure, *, look: bool = True, uses: Sequence[int] = ()) -> Jacobian:
        """Residuals and Jacobian of one mini-batch.

        Args:
            closure: see :data:`.ResidualClosure`.
            look: compare the rows with an exact product; blocks that were never seen are compared in any case.
            uses: places of weights among the parameters whose :class:`Uses` are wanted.

        Raises:
            ArgumentError: for what is no dictionary of residuals, or if they do not depend on the parameters.
            NumericalError: for a residual that is not finite, naming the block and the row.
            CompatibilityError: if ``uses`` are asked for and the closure checkpoints.
        """
        try:
            loss, blocks, found, collected = self._with_copies(closure, look, uses)
        except CheckpointError as error:
            if uses:
                raise CompatibilityError(
                    "Kronecker factors of residuals need every product with a weight once, and torch.utils.checkpoint "
                    "computes them again; leave it out of the function of residuals, or take a structure that needs "
                    "whole gradients: Dense(), MiniBlock(), Diagonal(), or build('lm')"
                ) from error
            loss, blocks = self._evaluated(closure)
            for block in blocks:
                self._give_up(block, "torch.utils.checkpoint computes parts of the model again")
            found, collected = [None] * len(blocks), {}
        if any(rows is None for rows in found):
            _, again = self._evaluated(closure)
            if _different(blocks, again) is not None:  # copies round differently, which matters in half precision
                _require_same(again, self._evaluated(closure)[1])
            found = [
                self._row_by_row(block) if rows is None else rows for block, rows in zip(again, found, strict=True)
            ]
        return self._joined(loss, blocks, [rows for rows in found if rows is not None], collected)

    def _evaluated(self, closure: ResidualClosure) -> tuple[Tensor, list[ResidualBlock]]:
        """The loss and the blocks with their graph, finite and in the precision of the parameters."""
        loss, blocks = evaluate_residuals(closure, graph=True)
        blocks = [block.converted(self.parameters[0].dtype) for block in blocks]
        self._require_finite(blocks)
        return loss, blocks

    def _with_copies(
        self, closure: ResidualClosure, look: bool, uses: Sequence[int]
    ) -> tuple[Tensor, list[ResidualBlock], list[list[Tensor] | None], dict[int, Uses]]:
        """The loss, the blocks, the rows of those that have rows of their own, and the uses that were asked for."""
        mode = _OwnCopies(self.parameters, frozenset(uses))
        with mode:
            loss, blocks = self._evaluated(closure)
            mode.recording, self.given = False, tuple(mode.given) if self.keeps_data else ()
            found: list[list[Tensor] | None] = []
            for position, block in enumerate(blocks):
                keep = bool(uses) or position < len(blocks) - 1
                found.append(self._by_copies(block, mode, look or block.name not in self._known, keep))
            return loss, blocks, found, self._uses(uses, blocks, mode, found)

    def _uses(
        self,
        places: Sequence[int],
        blocks: Sequence[ResidualBlock],
        mode: _OwnCopies,
        rows: Sequence[Sequence[Tensor] | None],
    ) -> dict[int, Uses]:
        """The rows of these weights in all blocks, and whether they explain their derivatives.

        One backward pass per block and component for all weights together, and one of the loss.
        """
        every = [(place, use) for place in places for use in mode.uses.get(place, [])]
        asked = [use.output for _, use in every]
        reached = [False] * len(every)  # others are targets that were cut off
        outputs: dict[int, list[Tensor]] = {place: [] for place in places}
        complete = {place: bool(mode.uses.get(place)) for place in places}
        for block, known in zip(blocks, rows, strict=True):
            roots = block.curvatures().sqrt()
            for component in range(block.values.shape[1] if every else 0):
                total = block.values[:, component].sum()
                got = torch.autograd.grad(total, asked, retain_graph=True, allow_unused=True)
                reached = [before or value is not None for before, value in zip(reached, got, strict=True)]
                sums = {place: torch.zeros_like(self.parameters[place]).detach() for place in places}
                for (place, use), value in zip(every, got, strict=True):
                    if value is not None and len(value) == len(roots):
                        flat = value.detach()
                        outputs[place].append((flat * roots[:, component, None, None]).flatten(0, 1))
                        sums[place] += flat.flatten(0, 1).T @ use.input.flatten(0, 1)
                for place in places:
                    if known is None:
                        complete[place] = complete[place] and not self.parameters[place].requires_grad
                    elif self.parameters[place].requires_grad and complete[place]:
                        exact = known[place].unflatten(0, block.values.shape)[:, component].sum(0)
                        complete[place] = _agree([exact], [sums[place]])
        counted = [entry for entry, counts in zip(every, reached, strict=True) if counts]
        slopes = _slopes_at(total_loss(blocks), [use for _, use in counted])
        result: dict[int, Uses] = {}
        for place in places:
            weight = self.parameters[place].detach()
            pairs = [(use, slope) for (own, use), slope in zip(counted, slopes, strict=True) if own == place]
            ones = [use.input.new_full((*use.input.shape[:2], 1), float(use.bias)) for use, _ in pairs]
            inputs = [torch.cat([use.input, one], 2).flatten(0, 1) for (use, _), one in zip(pairs, ones, strict=True)]
            rows_in, rows_out = weight.new_zeros(0, weight.shape[1] + 1), weight.new_zeros(0, weight.shape[0])
            result[place] = Uses(
                *_means_of(pairs, weight.shape[0], weight),
                torch.cat([rows_in, *inputs]),
                torch.cat([rows_out, *outputs[place]]),
                complete[place],
            )
        return result

    @torch.enable_grad()
    def look_back(self, closure: ResidualClosure, places: Sequence[int]) -> tuple[Tensor, int, dict[int, Uses]]:
        """The loss with its graph, the number of residuals, and of some weights the means of :class:`Uses`.

        Args:
            closure: see :data:`.ResidualClosure`.
            places: of the weights among the parameters.
        """
        mode = _OwnCopies(self.parameters, frozenset(places), copies=False)
        with mode:
            loss, blocks = evaluate_residuals(closure, graph=True)
        self.given = tuple(mode.given) if self.keeps_data else ()
        found: dict[int, Uses] = {}
        for place in places:
            weight = self.parameters[place]
            empty = weight.detach().new_zeros(0)
            uses = mode.uses.get(place, [])
            means = _means_of(list(zip(uses, _slopes_at(loss, uses), strict=True)), weight.shape[0], weight)
            found[place] = Uses(*means, empty, empty, True)
        return loss, sum(block.values.numel() for block in blocks), found

    @torch.enable_grad()
    def products(self, closure: ResidualClosure, model: nn.Module) -> Implicit:
        """Residuals of one mini-batch with products of the Jacobian, which is not built.

        The graph is that of copies of the parameters, so that it stays what it is while a search moves them.

        Args:
            closure: see :data:`.ResidualClosure`.
            model: whose parameters they are.

        Raises:
            ArgumentError, NumericalError: as :meth:`evaluate`.
        """
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        within = partial(_stood_in, model, self.parameters, copies)
        with within():
            loss, blocks = self._evaluated(closure)
        flat = torch.cat([block.values.flatten() for block in blocks])
        for block in blocks:
            self._require_dependence(block, block.values.requires_grad)
        cotangent = torch.zeros_like(flat, requires_grad=True)
        asked = [*copies, *self.parameters]
        with explained(), within():
            back = torch.autograd.grad(flat, asked, cotangent, create_graph=True, allow_unused=True)
        for name, value in zip(self.names, back[len(copies) :], strict=True):
            if value is not None:
                raise ArgumentError(
                    f"the residuals use parameter {name!r} itself, from before the function was called, and not "
                    "through the model; read it from the model inside of the function (model.get_parameter(...))"
                )
        if all(value is None for value in back):
            self._require_dependence(blocks[0], False)
        empty: list[list[Tensor]] = [[p.new_zeros(0, *p.shape) for p in self.parameters]]
        return Implicit(self._joined(loss, blocks, empty), flat, cotangent, tuple(copies), back[: len(copies)], within)

    def _require_finite(self, blocks: Sequence[ResidualBlock]) -> None:
        sizes = torch.stack([block.values.detach().abs().sum() for block in blocks])
        if bool(sizes.isfinite().all()):
            return
        for block in blocks:
            bad = (~block.values.detach().isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                raise NumericalError(
                    f"block {block.name!r} of the residuals is not finite in {len(bad)} of {len(block.values)} rows "
                    f"(the first: row {bad[0]}, {block.values[bad[0]].tolist()}); no parameter and no state was changed"
                )

    def _by_copies(self, block: ResidualBlock, mode: _OwnCopies, look: bool, keep: bool) -> list[Tensor] | None:
        """Rows of one block by the copies of the parameters; ``None`` if it has to go row by row."""
        if block.name in self.coupled:
            return None
        values = block.values
        if not values.requires_grad:
            self._require_dependence(block, False)
        copies = mode.all_copies()
        rows, components = values.shape
        columns: list[list[Tensor]] = []
        depends = False
        for component in range(components):
            graph = keep or look or component < components - 1
            moving = [(name, p) for name, p in zip(self.names, self.parameters, strict=True) if p.requires_grad]
            asked = [*copies, *(parameter for _, parameter in moving)]
            with explained():
                got = torch.autograd.grad(values[:, component].sum(), asked, retain_graph=graph, allow_unused=True)
            whole = got[len(copies) :]
            reached = [name for (name, _), value in zip(moving, whole, strict=True) if value is not None]
            if reached:
                self._give_up(block, f"parameter {reached[0]!r} is used by something else than a linear layer")
                return None
            arrived = got[: len(copies)]
            if any(value is not None and len(value) != rows for value in arrived):
                self._give_up(block, "its rows are not those of the tensor that the model was given")
                return None
            depends = depends or any(value is not None for value in arrived)
            columns.append(mode.per_parameter(arrived, rows, values))
        self._require_dependence(block, depends)
        result = [torch.stack(parts, 1).flatten(0, 1) for parts in zip(*columns, strict=True)]
        if look:
            self._known.add(block.name)
            vector = torch.randn(
                values.shape, dtype=values.dtype, device=values.device, generator=_generator(values.device)
            )
            exact = torch.autograd.grad(values, copies, vector, retain_graph=keep, allow_unused=True)
            total = [part.sum(0) for part in mode.per_parameter(exact, rows, values)]
            ours = [torch.tensordot(vector.flatten(), part, 1) for part in result]
            if not _agree(total, ours):
                self._give_up(block, "a row of it depends on other rows of what the model was given")
                return None
        return result

    def _give_up(self, block: ResidualBlock, reason: str) -> None:
        if block.name in self.coupled:
            return
        self.coupled[block.name] = reason
        warnings.warn(
            f"block {block.name!r} of the residuals is differentiated row by row ({len(block.values)} backward passes, "
            f"in batches), because {reason}; the result is the same, the time is not",
            FallbackWarning,
            stacklevel=2,
        )

    def _require_dependence(self, block: ResidualBlock, depends: bool) -> None:
        if not depends:
            raise ArgumentError(
                f"block {block.name!r} of the residuals does not depend on the model's parameters; compute it with "
                "the model that the optimizer was built for, without torch.no_grad() and detach(), with "
                "create_graph=True where the closure differentiates and use_reentrant=False where it checkpoints"
            )

    def _row_by_row(self, block: ResidualBlock) -> list[Tensor]:
        """Rows of one block by batches of backward passes through everything."""
        values = block.values.flatten()
        if not values.requires_grad:
            self._require_dependence(block, False)
        pieces: list[tuple[Tensor, ...]] = []
        depends = False
        for start in range(0, len(values), _CHUNK):
            size = min(_CHUNK, len(values) - start)
            vectors = values.new_zeros(size, len(values))
            vectors[torch.arange(size), start + torch.arange(size)] = 1.0
            with explained():
                found = _pulled_back(values, [p for p in self.parameters if p.requires_grad], vectors)
            depends = depends or any(value is not None for value in found)
            entries = iter(found)
            arrived = [next(entries) if parameter.requires_grad else None for parameter in self.parameters]
            pieces.append(
                tuple(
                    parameter.new_zeros(size, *parameter.shape) if value is None else value
                    for parameter, value in zip(self.parameters, arrived, strict=True)
                )
            )
        self._require_dependence(block, depends)
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _joined(
        self,
        loss: Tensor,
        blocks: Sequence[ResidualBlock],
        rows: Sequence[Sequence[Tensor]],
        uses: Mapping[int, Uses] = MappingProxyType({}),
    ) -> Jacobian:
        blocks = [block.converted(_working(block.values.dtype)) for block in blocks]
        values = [block.values.detach() for block in blocks]
        with torch.no_grad():
            return Jacobian(
                tuple(block.name for block in blocks),
                tuple(value.numel() for value in values),
                torch.cat([value.flatten() for value in values]),
                torch.cat([(b.factor * b.penalty.slope(v)).flatten() for b, v in zip(blocks, values, strict=True)]),
                torch.cat([block.curvatures().flatten() for block in blocks]),
                tuple(torch.cat(parts).detach().to(_working(parts[0].dtype)) for parts in zip(*rows, strict=True)),
                loss.detach(),
                sum(len(value) for value in values),
                uses,
            )


@contextmanager
def _stood_in(model: nn.Module, parameters: Sequence[nn.Parameter], copies: Sequence[nn.Parameter]) -> Iterator[None]:
    """Copies of the parameters in their places in the model, for as long as the block lasts."""
    by_id = {id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in by_id
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = by_id[id(parameter)]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _require_same(blocks: Sequence[ResidualBlock], again: Sequence[ResidualBlock]) -> None:
    """Check that a second evaluation is of the same points.

    Raises:
        ArgumentError: naming a block that is not.
    """
    name = _different(blocks, again)
    if name is not None:
        raise ArgumentError(
            f"block {name!r} of the residuals is another when it is evaluated again at once; the function must "
            "evaluate the same points each time it is called in one step: draw them outside of it, or by torch's "
            "global generator"
        )


def _different(blocks: Sequence[ResidualBlock], again: Sequence[ResidualBlock]) -> str | None:
    """The name of a block whose values are others than rounding makes them."""
    named = {block.name: block.values.detach() for block in again}
    for block in blocks:
        now, before = named.get(block.name), block.values.detach()
        if now is None or now.shape != before.shape:
            return block.name
        size = float(torch.maximum(now.abs().max(), before.abs().max()))
        if not torch.allclose(now, before, atol=1e-5 * size):
            return block.name
    return None


def _slopes_at(loss: Tensor, uses: Sequence[_Use]) -> Sequence[Tensor | None]:
    """Derivative of the loss by each product."""
    if not uses:
        return ()
    return torch.autograd.grad(loss, [use.output for use in uses], retain_graph=True, allow_unused=True)


def _means_of(pairs: Sequence[tuple[_Use, Tensor | None]], width: int, like: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number of rows, mean product and summed derivative of the loss, of products that it depends on."""
    known = [(use.output.detach(), slope.detach()) for use, slope in pairs if slope is not None]
    if not known:
        zeros = like.detach().new_zeros(width)
        return 0, zeros, zeros
    rows = sum(output.shape[0] * output.shape[1] for output, _ in known)
    total = torch.stack([output.sum((0, 1)) for output, _ in known]).sum(0)
    return rows, total / rows, torch.stack([slope.sum((0, 1)) for _, slope in known]).sum(0)


def _working(dtype: torch.dtype) -> torch.dtype:
    """The precision in which sums over half-precision numbers are taken."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _flat(rows: Tensor) -> Tensor:
    """(V, entries) of (V, *shape); a parameter that is one number without an axis has one entry."""
    return rows.reshape(len(rows), -1)


def _generator(device: torch.device) -> torch.Generator:
    """The comparison needs a vector that no model was made for, and must not touch the global random state."""
    return torch.Generator(device=device).manual_seed(0)


def _agree(exact: Sequence[Tensor], ours: Sequence[Tensor]) -> bool:
    """Whether two products are equal to what rounding leaves. One synchronisation."""
    differences = torch.stack([(a - b).norm() for a, b in zip(exact, ours, strict=True)]).norm()
    sizes = torch.stack([value.norm() for value in exact]).norm()
    tolerance = 1e-8 if exact[0].dtype == torch.float64 else 1e-3
    return bool(differences <= tolerance * sizes)


def _pulled_back(values: Tensor, parameters: Sequence[Tensor], vectors: Tensor) -> Sequence[Tensor | None]:
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        return torch.autograd.grad(values, parameters, vectors, is_grads_batched=True, **options)
    except RuntimeError:  # an operation of the model has no batching rule
        found = [torch.autograd.grad(values, parameters, vector, **options) for vector in vectors]
    columns = zip(*found, strict=True)
    return [None if column[0] is None else torch.stack(list(column)) for column in columns]


@dataclass(frozen=True)
class _Use:
    """One product of a linear layer: input (N, S, d_in), output (N, S, d_out) with its graph, bias added to it."""

    input: Tensor
    output: Tensor
    bias: bool


class _OwnCopies(TorchFunctionMode):
    """While it is active, linear layers multiply every row of their input with a copy of the weights of its own.

    Args:
        parameters: that are replaced where a linear layer uses them.
        watched: places of weights whose inputs and products are kept.
        copies: whether there are copies; else products are only watched, and differentiable by themselves also where
            nothing else is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], watched: frozenset[int] = frozenset(), copies: bool = True):
        super().__init__()
        self._copying = copies
        self.recording = True
        self.uses: dict[int, list[_Use]] = {}
        self.given: list[Tensor] = []
        self._watched = watched
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._parameters = parameters
        self._copies: list[tuple[int, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The function itself, unless it is a linear layer with weights of ours."""
        kwargs = dict(kwargs or {})
        if func is nn.functional.linear and self.recording:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            value, weight, bias = given["input"], given["weight"], given.get("bias")
            plain = value.ndim > 1 and value.numel() and torch._C._functorch.peek_interpreter_stack() is None
            if plain and value.grad_fn is None:
                self.given.append(value.detach())
            if plain and self._concerns(weight, bias):
                return self._linear(value, weight, bias)
        return func(*args, **kwargs)

    def _concerns(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether a linear layer is done in another way."""
        if self._copying:
            return id(weight) in self._places or id(bias) in self._places
        return self._places.get(id(weight)) in self._watched

    def _linear(self, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = value.shape[0]
        inputs = value.reshape(rows, -1, value.shape[-1])
        if self._copying:
            product = self._product(inputs, weight)
            if bias is not None:
                own = self._copy(bias, rows) if id(bias) in self._places else bias.expand(rows, -1)
                product = product + own.unsqueeze(1)
        else:
            product = nn.functional.linear(inputs, weight, bias)
            if not product.requires_grad:  # parameters are held constant when a step looks back
                product = product + torch.zeros((), dtype=product.dtype, device=product.device, requires_grad=True)
        result = product
        if self._places.get(id(weight)) in self._watched and torch.is_grad_enabled():
            if not product.requires_grad:  # of a frozen layer that nothing trainable precedes
                product = product + torch.zeros((), dtype=product.dtype, device=product.device, requires_grad=True)
            self.uses.setdefault(self._places[id(weight)], []).append(_Use(inputs.detach(), product, bias is not None))
            result = product.clone()  # what the model changes in place is not the product
        return result.reshape(*value.shape[:-1], weight.shape[0])

    def _product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Inputs (N, S, d_in) times a weight, of which every row has a copy unless it is none of ours."""
        if id(weight) not in self._places:
            return nn.functional.linear(inputs, weight)
        return torch.bmm(inputs, self._copy(weight, len(inputs)).mT)

    def _copy(self, parameter: Tensor, rows: int) -> Tensor:
        copy = parameter.detach().expand(rows, *parameter.shape)
        if parameter.requires_grad:
            self._copies.append((self._places[id(parameter)], copy.requires_grad_()))
        return copy

    def all_copies(self) -> list[Tensor]:
        """Every copy that was made of what is not frozen."""
        return [copy for _, copy in self._copies]

    def per_parameter(self, arrived: Sequence[Tensor | None], rows: int, like: Tensor) -> list[Tensor]:
        """What arrived at the copies, added up by parameter: (rows, *shape) each, zeros where nothing did."""
        total: list[Tensor | None] = [None] * len(self._parameters)
        for (place, _), value in zip(self._copies, arrived, strict=True):
            if value is not None:
                before = total[place]
                total[place] = value if before is None else before + value
        return [
            like.new_zeros(rows, *parameter.shape, dtype=parameter.dtype) if value is None else value
            for value, parameter in zip(total, self._parameters, strict=True)
        ]
