"""From directions to moves: gathers what the step-size rule wants to know of every layer, and asks it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...curvature.backends.sampling import seeded_generator
from ...curvature.declarations import StepSizeDeclarations, declared
from ...curvature.layers.layer import Layer
from ...curvature.products import GraphKeepingBackward
from ...curvature.quadratic_forms import DirectionalEvidence, QuadraticForm
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError, NumericalError
from ...preconditioners.damping.levenberg_marquardt import AdaptiveDamping
from ...preconditioners.linalg import inner_products, squared_norms
from ...preconditioners.protocol import Events
from ...stepsize.protocol import StepEvidence, StepSize
from ..methods.momentum import Momentum, WeightDecay
from .arguments import as_number
from .blocks import Block, full_precision
from .last_steps import LastSteps, name_of_last, placed, with_last_steps
from .team import MiniBatch

__all__ = ["Move", "Proposal", "StepRule"]


@dataclass(slots=True)
class Move:
    """One block's part of a step: theta <- theta - step_size direction - recall last, where theta is not frozen.

    Attributes:
        parameters: what is moved.
        directions: one per parameter.
        step_size: of the layer.
        decays: weight decay of each parameter.
        last: the last step of each parameter, not a copy; none for rules that do not recall.
        recall: size of the step along it, of the layer.
    """

    parameters: Tensors
    directions: Tensors
    step_size: float | Tensor
    decays: tuple[float, ...]
    last: Tensors = ()
    recall: float | Tensor = 0.0

    def remember(self) -> None:
        """Make this step the last one: last <- step_size direction + recall last."""
        for parameter, direction, last, _ in self._rows():
            if last is not None and parameter.requires_grad:
                last.mul_(self.recall)
                _add(last, direction, self.step_size, 1.0)

    def _rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
        """Parameter, direction, last step and weight decay."""
        recalled = self.last or (None,) * len(self.parameters)
        return zip(self.parameters, self.directions, recalled, self.decays, strict=True)

    def slope(self, weight_decay: WeightDecay) -> Tensor:
        """Change to first order of loss and coupled penalty along the whole move, 0-dimensional."""
        total = full_precision(self.parameters[0]).new_zeros(())
        for parameter, direction, last, decay in self._rows():
            if not parameter.requires_grad or parameter.grad is None:
                continue
            value, gradient = full_precision(parameter), full_precision(parameter.grad)
            gradient = torch.add(gradient, value, alpha=weight_decay.gradient_factor(decay))
            total = total - self.step_size * torch.sum(gradient * direction)
            total = total - weight_decay.shrinkage(decay, self.step_size) * torch.sum(gradient * value)
            if last is not None:
                total = total - self.recall * torch.sum(gradient * last)
        return total


def _add(target: Tensor, direction: Tensor, size: float | Tensor, factor: float) -> None:
    """target <- target + factor size direction, in place."""
    if isinstance(size, Tensor):
        target.addcmul_(direction, size, value=factor)
    else:
        target.add_(direction, alpha=factor * size)


@dataclass(slots=True)
class Proposal:
    """A step that has not been taken yet.

    Attributes:
        moves: of all blocks.
        step_sizes: of every layer.
        events: counts for the report.
        predicted: by how much the quadratic model falls along the whole step, 0-dimensional; ``None`` unless an
            adaptive damping rule is due.
    """

    moves: list[Move]
    step_sizes: dict[str, float | Tensor]
    events: Events = field(default_factory=dict)
    predicted: Tensor | None = None

    def slope(self, weight_decay: WeightDecay) -> Tensor:
        """Change to first order of loss and coupled penalty along the whole step, before it is taken."""
        return torch.stack([move.slope(weight_decay) for move in self.moves]).sum()

    def take(self, fraction: float, weight_decay: WeightDecay) -> None:
        """Take a fraction in (0, 1] of the step, decoupled weight decay first.

        theta <- (1 - fraction shrinkage) theta - fraction (step_size direction + recall last)
        """
        # Tensors that one operation may take together: those that go with the same number. Numbers on a device are
        # told apart by identity, comparing them would wait for it.
        shrinkages: dict[Any, tuple[float | Tensor, list[Tensor]]] = {}
        sizes: dict[Any, tuple[float | Tensor, list[Tensor], list[Tensor]]] = {}
        recalls: dict[Any, tuple[float | Tensor, list[Tensor], list[Tensor]]] = {}
        for move in self.moves:
            size = move.step_size
            key = id(size) if isinstance(size, Tensor) else size
            _, moved, along = sizes.setdefault(key, (size, [], []))
            for parameter, direction, decay in zip(move.parameters, move.directions, move.decays, strict=True):
                if parameter.requires_grad:
                    moved.append(parameter)
                    along.append(direction)
                    if (key, decay) not in shrinkages:
                        shrinkages[key, decay] = (weight_decay.shrinkage(decay, size), [])
                    shrinkages[key, decay][1].append(parameter)
            if move.last:
                key = id(move.recall) if isinstance(move.recall, Tensor) else move.recall
                _, moved, along = recalls.setdefault(key, (move.recall, [], []))
                for parameter, last in zip(move.parameters, move.last, strict=True):
                    if parameter.requires_grad:
                        moved.append(parameter)
                        along.append(last)
        for shrinkage, parameters in shrinkages.values():
            if isinstance(shrinkage, Tensor) or shrinkage:
                torch._foreach_mul_(parameters, 1.0 - fraction * shrinkage)
        for batches in (sizes, recalls):
            own: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
            for size, moved, along in batches.values():
                if isinstance(size, Tensor):  # each layer's own number, on the device
                    for entries, more in zip(own, (moved, along, [size] * len(moved)), strict=True):
                        entries.extend(more)
                elif moved:
                    torch._foreach_add_(moved, along, alpha=-fraction * size)
            if own[0]:
                torch._foreach_addcmul_(*own, value=-fraction)


_LAST = "last_steps"
"""Key of the saved last steps, beside those of the rule's own state."""


def _example(layers: Sequence[Layer]) -> Tensor:
    """A zero in the precision and on the device of the evidence: what ``StepSize.init`` is given as ``like``."""
    return full_precision(next(iter(layers[0].parameters.values())).detach()).new_zeros(())


class StepRule:
    """A step-size rule with its state and the layers it speaks about; and the judge of its steps, if there is one.

    A rule that recalls costs one copy of the parameters more, its layers' last steps.
    """

    def __init__(self, rule: StepSize, layers: Sequence[Layer], seed: int, judge: AdaptiveDamping | None = None):
        self.rule, self.layers, self.seed, self.judge = rule, layers, seed, judge
        self.names = [layer.name for layer in layers]
        self.state = rule.init(len(layers), _example(layers))
        self.last = LastSteps(layers) if declared(rule, StepSizeDeclarations).recalls else None

    def grow(self, layers: Sequence[Layer]) -> None:
        """Make room for layers that were added behind the present ones; what was gathered stays."""
        old, before, self.layers = self.own_state(), len(self.layers), layers
        self.names = [layer.name for layer in layers]
        self.state = self.rule.init(len(layers), _example(layers))
        fresh = self.own_state()
        for name, value in old.items():
            if isinstance(value, Tensor) and value.shape != fresh[name].shape:
                placed(value, fresh[name], before, len(layers))
            else:
                fresh[name] = value
        self.load_own_state(fresh)
        if self.last is not None:
            self.last.grow(layers)

    def own_state(self) -> dict[str, Any]:
        """State of the rule itself, which proposing changes; empty for rules without one."""
        return {} if self.state is None else dict(self.state.to_dict())

    def load_own_state(self, values: Mapping[str, Any]) -> None:
        """Load it."""
        if self.state is not None:
            self.state.load_dict(dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Saved state, with the last steps of a rule that recalls."""
        return self.own_state() | ({} if self.last is None else {_LAST: self.last.to_dict()})

    def load_dict(self, values: Mapping[str, Any]) -> None:
        """Load it."""
        self.load_own_state({name: value for name, value in values.items() if name != _LAST})
        if self.last is not None:
            self.last.load_dict(values[_LAST])

    def remember(self, proposal: Proposal, fraction: float) -> None:
        """For rules that recall: the step that was taken is the last one now, unless a guard left nothing of it."""
        if self.last is not None and fraction:
            for move in proposal.moves:
                move.remember()

    def propose(self, step: int, lr: float | Tensor, batch: MiniBatch, momentum: Momentum) -> Proposal:
        """Moves of all blocks; on the CPU step sizes become plain numbers, elsewhere they stay on the device.

        Args:
            step: number of the step.
            lr: one number, or (L,) where layers differ.
            batch: with the directions of all its blocks.
            momentum: whose bias correction the slopes contain.
        """
        judged = self.judge is not None and self.judge.due(step)
        pieces: _Pieces = {}
        if self.rule.needs or judged:
            directions = {entry.block.key: entry.directions for entry in batch.steps}
            pieces = _pieces(self.layers, batch.team.blocks, directions, momentum, self.last)
        evidence = self._evidence(step, lr, pieces, batch.statistics, batch.products)
        sizes, by_name, events = self._checked(self.rule.propose(self.state, evidence), self.names)
        moves = []
        for entry in batch.steps:
            block, name = entry.block, entry.block.layer.name
            move = Move(block.parameters, entry.directions, by_name[name], entry.decays)
            if self.last is not None:
                move.last, move.recall = self.last.of(name, block.names), by_name[name_of_last(name)]
            moves.append(move)
        predicted = None
        if judged:
            predicted = self._predicted(step, sizes, evidence, pieces, batch.statistics, batch.products)
        step_sizes = by_name if self.last is None else {name: by_name[name] for name in self.names}
        return Proposal(moves, step_sizes, events, predicted)

    def _checked(self, sizes: Any, layers: Sequence[str]) -> tuple[Tensor | float, dict[str, float | Tensor], Events]:
        """What the rule returned, the same by name of layer (and of its last step), and counts for the report.

        Raises:
            ArgumentError: if it is no number and no vector of the right length.
            NumericalError: if a step size is not finite.
        """
        rule, events = type(self.rule).__name__, Events()
        names = [*layers, *map(name_of_last, layers)] if self.last is not None else layers
        by_name: dict[str, float | Tensor]
        if isinstance(sizes, Tensor):
            if sizes.shape != (len(names),):
                each = "one per layer" if self.last is None else "one per layer, then one per last step"
                raise ArgumentError(
                    f"{rule}.propose must return one number, or {len(names)} step sizes ({each}), got shape "
                    f"{tuple(sizes.shape)}"
                )
            if sizes.device.type != "cpu":  # deciding here would synchronise: such a layer stands still instead
                finite = sizes - sizes == 0
                if self.last is not None:
                    finite = finite.reshape(2, -1).all(0).repeat(2)
                sizes, events = torch.where(finite, sizes, 0.0), {"nonfinite_step_sizes": (~finite).sum()}
            values = sizes.tolist() if sizes.device.type == "cpu" else list(sizes.unbind())
            by_name = dict(zip(names, values, strict=True))
        else:
            if self.last is not None:
                raise ArgumentError(
                    f"{rule} recalls, so its propose must return {len(names)} step sizes, got {sizes!r}"
                )
            if type(sizes) is not float:
                sizes = as_number(f"what {rule}.propose returns", sizes)
            by_name = dict.fromkeys(names, sizes)
        bad = []
        for name, size in by_name.items():
            if isinstance(size, float) and not math.isfinite(size):
                bad.append(name)
        if bad:
            raise NumericalError(
                f"{rule} proposed a step size that is not finite for layers {', '.join(bad)} "
                "(raise its damping, or put it into RelativeBound)"
            )
        return sizes, by_name, events

    def _predicted(
        self,
        step: int,
        sizes: Tensor | float,
        evidence: StepEvidence,
        pieces: _Pieces,
        statistics: Mapping[str, LayerStatistics],
        products: GraphKeepingBackward | None,
    ) -> Tensor:
        """sum_l alpha_l <g_l, d_l> - alpha' M alpha / 2 with the judge's forms M."""
        assert self.judge is not None
        forms = evidence.forms if self.judge.curvature == self.rule.curvature else None
        if forms is None:
            forms = self._forms(self.judge.curvature, step, pieces, statistics, products)
        slopes = _gradient_slopes(pieces)
        alpha = _on_device(sizes, slopes)
        return torch.dot(alpha, slopes) - 0.5 * torch.dot(alpha, forms @ alpha)

    def _evidence(
        self,
        step: int,
        lr: float | Tensor,
        pieces: _Pieces,
        statistics: Mapping[str, LayerStatistics],
        products: GraphKeepingBackward | None,
    ) -> StepEvidence:
        names = self.names
        if not self.rule.needs:
            return StepEvidence(names, lr)
        form = self.rule.curvature if self.rule.due(step) else None
        gradient_slopes = None
        if self.rule.needs & Needs.SLOPES:
            gradient_slopes = _gradient_slopes(pieces)
        squares = squared_norms([piece.direction for entry in pieces.values() for piece in entry.values()])
        return StepEvidence(
            names,
            lr,
            slopes=_slopes(pieces, squares),
            gradient_slopes=gradient_slopes,
            squared_norms=_by_layer(squares, [len(entry) for entry in pieces.values()]),
            parameter_norms=self._norms() if self.rule.needs & Needs.NORMS else None,
            forms=None if form is None else self._forms(form, step, pieces, statistics, products),
        )

    def _forms(
        self,
        form: QuadraticForm,
        step: int,
        pieces: _Pieces,
        statistics: Mapping[str, LayerStatistics],
        products: GraphKeepingBackward | None,
    ) -> Tensor:
        """(K, K) quadratic forms along the directions, and the last steps of a rule that recalls."""
        names = [layer.name for layer in self.layers]
        directions = {name: tuple(piece.direction for piece in entry.values()) for name, entry in pieces.items()}
        generator = seeded_generator(self.seed * 1_000_003 + step, directions[names[0]][0].device)
        product = products.product if products is not None else None
        evidence = DirectionalEvidence(names, directions, statistics, product, generator)
        return form.measure(evidence if self.last is None else with_last_steps(evidence))

    def _norms(self) -> Tensor:
        """(L,) norms of the layers' parameters."""
        parameters = [full_precision(p.detach()) for layer in self.layers for p in layer.parameters.values()]
        squares = torch.stack(list(torch._foreach_norm(parameters))).square()
        return _by_layer(squares, [len(layer.parameters) for layer in self.layers]).sqrt()


def _on_device(sizes: Tensor | float, like: Tensor) -> Tensor:
    """Step sizes as (K,); a number is written there by a kernel, a copy from the host would wait."""
    return sizes.to(like).expand_as(like) if isinstance(sizes, Tensor) else torch.full_like(like, sizes)


def _slopes(pieces: _Pieces, squares: Tensor) -> Tensor:
    """(K,) inner products of what was preconditioned, its bias correction included, and the direction.

    Args:
        pieces: of every layer.
        squares: squared norms of all directions, which these are where nothing preconditions.
    """
    flat = [piece for entry in pieces.values() for piece in entry.values()]
    same = all(piece.momentum is piece.direction for piece in flat)
    values = squares if same else inner_products([p.momentum for p in flat], [p.direction for p in flat])
    corrections = [piece.correction for piece in flat]
    if any(factor != 1.0 for factor in corrections):
        common = corrections[0] if len(set(corrections)) == 1 else None
        values = values * (common if common is not None else values.new_tensor(corrections))
    return _by_layer(values, [len(entry) for entry in pieces.values()])


def _gradient_slopes(pieces: _Pieces) -> Tensor:
    """(K,) inner products of the mini-batch gradient and the direction."""
    flat = [piece for entry in pieces.values() for piece in entry.values()]
    values = inner_products([piece.gradient for piece in flat], [piece.direction for piece in flat])
    return _by_layer(values, [len(entry) for entry in pieces.values()])


def _by_layer(values: Tensor, counts: Sequence[int]) -> Tensor:
    """(K,) sums of runs of ``values``, as long as ``counts`` says: three operations at most, whatever K."""
    if len(set(counts)) == 1:
        return values.view(len(counts), counts[0]).sum(1)
    pieces = torch.nn.utils.rnn.pad_sequence(list(values.split(list(counts))), batch_first=True)
    return pieces.sum(1)


@dataclass(frozen=True)
class _Piece:
    """One parameter's direction, the vector it was made from with its bias correction, and gradient."""

    direction: Tensor
    momentum: Tensor
    correction: float
    gradient: Tensor


_Pieces = dict[str, dict[str, _Piece]]


def _pieces(
    layers: Sequence[Layer],
    blocks: Sequence[Block],
    directions: Mapping[str, Tensors],
    momentum: Momentum,
    last: LastSteps | None,
) -> _Pieces:
    """Pieces per layer and parameter, in the layer's order; zeros where a parameter has no gradient or is frozen.

    Behind them stand those of the layers' last steps, if there are any, with the same zeros.
    """
    found: dict[str, dict[str, _Piece]] = {layer.name: {} for layer in layers}
    for block in blocks:
        factor = momentum.correction(block.updates)
        gradients = block.gradients()
        assert gradients is not None
        for name, direction, view, gradient in zip(
            block.names, directions[block.key], block.parameter_views(block.vector), gradients, strict=True
        ):
            # A parameter that is frozen beside one that is not stays where it is, whatever the structure says.
            moved = direction if block.layer.parameters[name].requires_grad else torch.zeros_like(direction)
            found[block.layer.name][name] = _Piece(moved, view, factor, gradient)
    result: _Pieces = {}
    for layer in layers:
        zeros = {
            name: torch.zeros_like(full_precision(p))
            for name, p in layer.parameters.items()
            if name not in found[layer.name]
        }
        missing = {name: _Piece(zero, zero, 1.0, zero) for name, zero in zeros.items()}
        result[layer.name] = {name: (found[layer.name] | missing)[name] for name in layer.parameters}
    if last is None:
        return result
    for layer in layers:
        result[name_of_last(layer.name)] = {
            name: replace(piece, direction=last.along(layer, name, name in found[layer.name]))
            for name, piece in result[layer.name].items()
        }
    return result
