"""From directions to moves: gathers what the step-size rule wants to know of every layer, and asks it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ...curvature.backends.sampling import seeded_generator
from ...curvature.declarations import FormDeclarations, StepSizeDeclarations, declared
from ...curvature.layers.layer import Layer
from ...curvature.layers.sharding import local
from ...curvature.quadratic_forms import DirectionalEvidence, QuadraticForm
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import Tensors
from ...errors import ArgumentError, NumericalError
from ...preconditioners.damping.levenberg_marquardt import AdaptiveDamping
from ...preconditioners.linalg import inner_products
from ...preconditioners.protocol import Events
from ...stepsize.protocol import StepEvidence, StepSize
from ..methods.momentum import Momentum, WeightDecay
from .arguments import as_number
from .blocks import full_precision, zeros_of
from .last_steps import LastSteps, name_of_last, placed, with_last_steps
from .team import BlockStep, MiniBatch
from .together import Spread, Together

__all__ = ["LAST", "Move", "Proposal", "StepRule"]


@dataclass(slots=True)
class Move:
    """One block's part of a step: theta <- theta - step_size direction - recall last, where theta is not frozen.

    Attributes:
        parameters: what is moved. Of sharded ones the piece of this process, and the same of everything below.
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

    def _rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
        """Parameter, direction, last step and weight decay."""
        recalled = self.last or (None,) * len(self.parameters)
        return zip(self.parameters, self.directions, recalled, self.decays, strict=True)

    def trainable(self) -> tuple[Tensors, Tensors, Tensors]:
        """Parameters that are not frozen, with their directions and last steps."""
        chosen = [index for index, parameter in enumerate(self.parameters) if parameter.requires_grad]
        pieces = (self.parameters, self.directions, self.last)
        parameters, directions, last = [tuple(values[index] for index in chosen) if values else () for values in pieces]
        return parameters, directions, last

    def slope(self, weight_decay: WeightDecay, weigh: Callable[[Tensor], float]) -> Tensor:
        """Change to first order of loss and coupled penalty along the whole move, 0-dimensional.

        Args:
            weight_decay: of the method.
            weigh: what a parameter's entries count in the sum of all processes.
        """
        total = full_precision(local(self.parameters[0])).new_zeros(())
        for parameter, direction, last, decay in self._rows():
            share = weigh(parameter)
            if not parameter.requires_grad or parameter.grad is None or not share:  # where it is not counted it is NaN
                continue
            value, gradient = full_precision(local(parameter)), full_precision(local(parameter.grad))
            gradient = torch.add(gradient, value, alpha=weight_decay.gradient_factor(decay))
            total = total - share * self.step_size * torch.sum(gradient * direction)
            total = total - share * weight_decay.shrinkage(decay, self.step_size) * torch.sum(gradient * value)
            if last is not None:
                total = total - share * self.recall * torch.sum(gradient * last)
        return total


@dataclass(slots=True)
class Proposal:
    """A step that has not been taken yet.

    Attributes:
        moves: of all blocks.
        step_sizes: of every layer.
        events: counts for the report.
        predicted: by how much the quadratic model falls along the whole step, 0-dimensional; ``None`` unless an
            adaptive damping rule is due.
        sharded: whether parameters are in pieces.
        kept: the moves of blocks whose last steps this process remembers, whole.
    """

    moves: list[Move]
    step_sizes: dict[str, float | Tensor]
    events: Events = field(default_factory=dict)
    predicted: Tensor | None = None
    sharded: bool = False
    kept: list[Move] = field(default_factory=list)

    def slope(self, weight_decay: WeightDecay, together: Together | None = None) -> Tensor:
        """Change to first order of loss and coupled penalty along the whole step, before it is taken."""
        if together is None or not together.divides_gradients:
            return torch.stack([move.slope(weight_decay, lambda _: 1.0) for move in self.moves]).sum()
        return together.ranks.total(
            torch.stack([move.slope(weight_decay, together.counts) for move in self.moves]).sum()
        )

    def take(self, fraction: float, weight_decay: WeightDecay) -> None:
        """Take a fraction in (0, 1] of the step, decoupled weight decay first. Nothing else moves parameters.

        theta <- (1 - fraction shrinkage) theta - fraction (step_size direction + recall last)
        """
        shrunk, moved, recalled = _Batches(), _Batches(), _Batches()
        for move in self.moves:
            parameters, directions, last = move.parameters, move.directions, move.last
            for decay in set(move.decays):
                shrinkage = weight_decay.shrinkage(decay, move.step_size) if decay else 0.0
                if isinstance(shrinkage, Tensor) or shrinkage:
                    pairs = zip(parameters, move.decays, strict=True)
                    chosen = [local(p) for p, own in pairs if own == decay and p.requires_grad]
                    shrunk.add(1.0 - fraction * shrinkage, chosen)
            for parameter in parameters:
                if not parameter.requires_grad:
                    parameters, directions, last = move.trainable()
                    break
            if self.sharded:
                parameters = tuple(map(local, parameters))
            moved.add(move.step_size, parameters, directions)
            if last:
                recalled.add(move.recall, parameters, last)
        if shrunk.found:
            shrunk.multiply()
        moved.add_to_first(-fraction)
        if recalled.found:
            recalled.add_to_first(-fraction)

    def remember(self) -> None:
        """Make this step the last one: last <- step_size direction + recall last."""
        faded, moved = _Batches(), _Batches()
        for move in self.kept:
            _, directions, last = move.trainable()
            faded.add(move.recall, last)
            moved.add(move.step_size, last, directions)
        faded.multiply()
        moved.add_to_first(1.0)

    def gather(self, fraction: float, keeps: float) -> None:
        """Add what was taken of this step to what is remembered: last <- keeps (last + fraction step_size direction).

        Args:
            fraction: of the step, in [0, 1].
            keeps: in [0, 1).
        """
        moved = _Batches()
        remembered: list[Tensor] = []
        for move in self.kept:
            _, directions, last = move.trainable()
            moved.add(move.step_size, last, directions)
            remembered += last
        moved.add_to_first(fraction)
        if remembered:
            torch._foreach_mul_(remembered, keeps)


class _Batches:
    """Tensors that one operation may take together: those that go with the same number."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[float | Tensor, list[Tensor], list[Tensor]]] = {}

    def add(self, number: float | Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor] = ()) -> None:
        """Some rows; numbers on a device are told apart by identity, comparing them would wait for it."""
        key = id(number) if isinstance(number, Tensor) else number
        entry = self.found.get(key)
        if entry is None:
            entry = self.found[key] = (number, [], [])
        entry[1].extend(firsts)
        entry[2].extend(seconds)

    def multiply(self) -> None:
        """The only tensor of each row <- number times it, in place."""
        sized: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, tensors, _ in self.found.values():
            if isinstance(number, Tensor):  # each layer's own number, on the device
                sized[0].extend(tensors)
                sized[1].extend([number] * len(tensors))
            elif tensors:
                torch._foreach_mul_(tensors, number)
        if sized[0]:
            torch._foreach_mul_(*sized)

    def add_to_first(self, factor: float) -> None:
        """The first tensor of each row <- it + factor number times the second, in place."""
        sized: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for number, firsts, seconds in self.found.values():
            if isinstance(number, Tensor):  # each layer's own number, on the device
                for entries, more in zip(sized, (firsts, seconds, [number] * len(firsts)), strict=True):
                    entries.extend(more)
            elif firsts:
                torch._foreach_add_(firsts, seconds, alpha=factor * number)
        if sized[0]:
            torch._foreach_addcmul_(*sized, value=factor)


LAST = "last_steps"
"""Key of the saved last steps, beside those of the rule's own state."""


def _example(layers: Sequence[Layer]) -> Tensor:
    """A zero in the precision and on the device of the evidence: what ``StepSize.init`` is given as ``like``.

    Layers of several dtypes have evidence in the widest of them.
    """
    first = full_precision(local(next(iter(layers[0].parameters.values())).detach()))
    wide = any(value.dtype == torch.float64 for layer in layers for value in layer.parameters.values())
    return first.new_zeros((), dtype=torch.float64 if wide else first.dtype)


class StepRule:
    """A step-size rule with its state and the layers it speaks about; and the judge of its steps, if there is one.

    A rule that recalls costs one copy of the parameters more, its layers' last steps.
    """

    def __init__(
        self,
        rule: StepSize,
        layers: Sequence[Layer],
        seed: int,
        judge: AdaptiveDamping | None = None,
        together: Together | None = None,
        loss_reduction: str = "mean",
    ):
        self.rule, self.layers, self.seed, self.judge, self.together = rule, layers, seed, judge, together
        self.loss_reduction = loss_reduction
        self.names = [layer.name for layer in layers]
        self.needs = rule.needs
        self.usual_norms = _usual_norms(layers) if Needs.NORMS in rule.needs else None
        self.state = rule.init(len(layers), _example(layers))
        stated = declared(rule, StepSizeDeclarations)
        self.last, self.keeps = LastSteps(self._own_layers) if stated.recalls else None, stated.keeps

    def grow(self, layers: Sequence[Layer]) -> None:
        """Make room for layers that were added behind the present ones; what was gathered stays."""
        old, before, self.layers = self.own_state(), len(self.layers), layers
        self.names = [layer.name for layer in layers]
        self.usual_norms = None if self.usual_norms is None else _usual_norms(layers)
        self.state = self.rule.init(len(layers), _example(layers))
        fresh = self.own_state()
        for name, value in old.items():
            if isinstance(value, Tensor) and value.shape != fresh[name].shape:
                placed(value, fresh[name], before, len(layers))
            else:
                fresh[name] = value
        self.load_own_state(fresh)
        if self.last is not None:
            self.last.grow(self._own_layers)

    @property
    def _own_layers(self) -> list[Layer]:
        """Layers whose states this process has."""
        if self.together is None:
            return list(self.layers)
        return [layer for layer in self.layers if self.together.owns(layer)]

    def own_state(self) -> dict[str, Any]:
        """State of the rule itself, which proposing changes; empty for rules without one."""
        return {} if self.state is None else dict(self.state.to_dict())

    def load_own_state(self, values: Mapping[str, Any]) -> None:
        """Load it."""
        if self.state is not None:
            self.state.load_dict(dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Saved state, with the last steps of a rule that recalls."""
        return self.own_state() | ({} if self.last is None else {LAST: self.last.to_dict()})

    def load_dict(self, values: Mapping[str, Any]) -> None:
        """Load it."""
        self.load_own_state({name: value for name, value in values.items() if name != LAST})
        if self.last is not None:
            self.last.load_dict(values[LAST])

    def remember(self, proposal: Proposal, fraction: float, step: int) -> None:
        """For rules that recall: the step that was taken is the last one now, unless a guard left nothing of it.

        Or it joins those before it, of which a share is kept.

        Args:
            proposal: the step.
            fraction: of it that was taken.
            step: its number.
        """
        if self.last is None:
            return
        if self.keeps is not None:
            proposal.gather(fraction, self.keeps(step))
        elif fraction:
            proposal.remember()

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
        if self.needs or judged:
            pieces = _pieces(self._own_layers, batch.steps, momentum, self.last)
        spreads = self._spread(batch, self._measures(step, judged))
        evidence = self._evidence(step, lr, pieces, batch, spreads)
        sizes, by_name, events = self._checked(self.rule.propose(self.state, evidence), self.names)
        predicted = self._predicted(step, sizes, evidence, pieces, batch, spreads) if judged else None
        step_sizes = by_name if self.last is None else {name: by_name[name] for name in self.names}
        proposal = Proposal([], step_sizes, events, predicted, batch.sharded)
        for entry, spread in spreads:
            block, name = spread.block, spread.block.layer.name
            move = Move(block.parameters, spread.directions, by_name[name], entry)
            if self.last is not None:
                move.last, move.recall = spread.lasts, by_name[name_of_last(name)]
            proposal.moves.append(move)
        return self._with_pieces(proposal, spreads)

    def _measures(self, step: int, judged: bool) -> bool:
        """Whether something is measured along whole directions in this step."""
        return (self.rule.curvature is not None and self.rule.due(step)) or judged

    def _spread(self, batch: MiniBatch, measures: bool) -> list[tuple[tuple[float, ...], Spread]]:
        """Directions, and last steps, of all blocks that move, with their weight decays."""
        own: list[tuple[tuple[float, ...], Spread]] = []
        for step in batch.steps:
            block = step.block
            lasts = self.last.of(block.layer.name, block.names) if self.last is not None else ()
            own.append((step.decays, Spread(block, step.directions, lasts)))
        if self.together is None:
            return own
        by_key = {spread.block.key: spread for _, spread in own}
        found = self.together.spread(by_key, [block for block, _ in batch.moving], self.last is not None, measures)
        return [(decays, spread) for (_, decays), spread in zip(batch.moving, found, strict=True)]

    def _with_pieces(self, proposal: Proposal, spreads: Sequence[tuple[tuple[float, ...], Spread]]) -> Proposal:
        """The proposal with what is to be moved here in the place of whole sharded directions."""
        together = self.together
        if together is None:
            proposal.kept = proposal.moves
            return proposal
        moves: list[Move] = []
        for move, (_, spread) in zip(proposal.moves, spreads, strict=True):
            if together.owns(spread.block.layer):
                proposal.kept.append(move)
            here = [tuple(map(together.here, move.parameters, values)) for values in (move.directions, move.last)]
            moves.append(replace(move, directions=here[0], last=here[1]))
        proposal.moves = moves
        return proposal

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
                sizes, events = _finite_sizes(sizes, self.last is not None)
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
        batch: MiniBatch,
        spreads: _Spreads,
    ) -> Tensor:
        """sum_l alpha_l <g_l, d_l> - alpha' M alpha / 2 with the judge's forms M."""
        assert self.judge is not None
        forms = evidence.forms if self.judge.curvature == self.rule.curvature else None
        if forms is None:
            forms = self._forms(self.judge.curvature, step, pieces, batch, spreads)
        slopes = evidence.gradient_slopes if evidence.gradient_slopes is not None else self._along(pieces, True)[2]
        assert slopes is not None
        alpha = _on_device(sizes, slopes)
        return torch.dot(alpha, slopes) - 0.5 * torch.dot(alpha, forms @ alpha)

    def _evidence(
        self, step: int, lr: float | Tensor, pieces: _Pieces, batch: MiniBatch, spreads: _Spreads
    ) -> StepEvidence:
        names = self.names
        if not self.needs:
            return StepEvidence(names, lr)
        form = self.rule.curvature if self.rule.due(step) else None
        slopes, squares, gradient_slopes = self._along(pieces, Needs.SLOPES in self.needs)
        return StepEvidence(
            names,
            lr,
            slopes=slopes,
            gradient_slopes=gradient_slopes,
            squared_norms=squares,
            parameter_norms=self._norms() if Needs.NORMS in self.needs else None,
            usual_norms=self.usual_norms,
            forms=None if form is None else self._forms(form, step, pieces, batch, spreads),
            loss=batch.seen if batch.loss is None else batch.loss,
        )

    def _along(self, pieces: _Pieces, gradients: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :func:`_along`; of all layers, whoever owns them."""
        if self.together is None or self.together.owners is None:
            return _along(pieces, gradients)
        names = self.names if self.last is None else [*self.names, *map(name_of_last, self.names)]
        joint = _example(self.layers).new_zeros(2 + gradients, len(names))
        if pieces:
            places = torch.tensor([names.index(name) for name in pieces], device=joint.device)
            joint[:, places] = torch.stack([v for v in _along(pieces, gradients) if v is not None]).to(joint.dtype)
        slopes, squares, *rest = self.together.ranks.total(joint).unbind()
        return slopes, squares, rest[0] if rest else None

    def _forms(self, form: QuadraticForm, step: int, pieces: _Pieces, batch: MiniBatch, spreads: _Spreads) -> Tensor:
        """(K, K) quadratic forms along the directions, and the last steps of a rule that recalls."""
        names = [layer.name for layer in self.layers]
        directions = {name: piece.directions for name, piece in pieces.items()}
        if self.together is not None:
            directions = _everybodys(self.layers, spreads, self.last is not None)
        generator = seeded_generator(self.seed * 1_000_003 + step, directions[names[0]][0].device)
        product = batch.products.product if batch.products is not None else None
        evidence = DirectionalEvidence(names, directions, batch.recorded(form), product, generator)
        if self.together is not None and declared(form, FormDeclarations).adds_up:
            known = next((name for name in names if name in batch.samples), names[0])
            counts = batch.samples.get(known, [1])
            share, total = self.together.share_of(batch.samples, known), self.together.ranks.total
            evidence = replace(evidence, share=share, samples=sum(counts), total=total)
        found = form.measure(evidence if self.last is None else with_last_steps(evidence))
        if self.loss_reduction == "sum" and declared(form, FormDeclarations).estimates == "fisher":
            # Samples' scores are counted as a mean, whatever the loss is; slopes are those of the loss itself.
            samples = [entry.samples for entry in evidence.statistics.values()]
            found = found * (evidence.samples or max(samples, default=1))
        return found

    def _norms(self) -> Tensor:
        """(L,) norms of the layers' parameters."""
        if self.together is not None and self.together.pieces:
            held = [p for layer in self.layers for p in layer.parameters.values()]
            squares = self.together.squares([(p, p.detach()) for p in held])
            own = squares.split([len(layer.parameters) for layer in self.layers])
            return torch.stack([value.sum() for value in own]).sqrt()
        parameters = [full_precision(p) for layer in self.layers for p in layer.parameters.values()]
        norms = _by_layer(torch._foreach_norm(parameters), [len(layer.parameters) for layer in self.layers])
        of_layers: Tensor = torch.linalg.vector_norm(norms, dim=1)
        return of_layers


def _usual_norms(layers: Sequence[Layer]) -> Tensor:
    """(L,) norms that ``nn.Linear`` would give: entries of variance 1 / (3 fan_in), those of a vector alone 1 / 3."""
    squares = []
    for layer in layers:
        shapes = [parameter.shape for parameter in layer.parameters.values()]
        fan_in = max((shape.numel() // max(1, shape[0]) for shape in shapes if len(shape) > 1), default=1)
        squares.append(sum(shape.numel() for shape in shapes) / (3.0 * max(1, fan_in)))
    like = _example(layers)
    return torch.tensor(squares, dtype=like.dtype, device=like.device).sqrt()


def _on_device(sizes: Tensor | float, like: Tensor) -> Tensor:
    """Step sizes as (K,); a number is written there by a kernel, a copy from the host would wait."""
    return sizes.to(like).expand_as(like) if isinstance(sizes, Tensor) else torch.full_like(like, sizes)


def _along(pieces: _Pieces, gradients: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(K,) sums along the directions, all of them in a few operations.

    Args:
        pieces: of every layer.
        gradients: whether the third is wanted.

    Returns:
        Inner products of what was preconditioned, its bias correction included, and the direction; squared norms of
        the directions, which these are where nothing preconditions; inner products of gradient and direction.
    """
    counts: list[int] = []
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    merged: list[tuple[Tensors, Tensors]] = []
    corrections: list[float] = []
    same = True
    for piece in pieces.values():
        momenta, directions = piece.whole or (piece.momenta, piece.directions)
        same = same and all(map(is_, momenta, directions))
        merged.append((momenta, directions))
        counts.append(len(directions))
        rights += directions
        corrections += piece.corrections[: len(directions)]
    lefts += rights
    first = 0 if same else len(rights)
    for momenta, directions in () if same else merged:
        counts.append(len(directions))
        lefts += momenta
        rights += directions
    for piece in pieces.values() if gradients else ():
        counts.append(len(piece.gradients))
        lefts += piece.gradients
        rights += piece.directions
    products = inner_products(lefts, rights)
    table = _by_layer(products, counts)
    sums = table.sum(1) if table.shape[1] > 1 else table
    columns = sums.view(-1, len(merged)).unbind(0)
    slopes = columns[0 if same else 1]
    if len(set(corrections)) > 1:  # blocks that joined later
        corrected = [factor * value for factor, value in zip(corrections, products[first:], strict=False)]
        slopes = _by_layer(corrected, counts[: len(merged)]).sum(1)
    elif corrections[0] != 1.0:
        slopes = slopes * corrections[0]
    return slopes, columns[0], columns[-1] if gradients else None


def _finite_sizes(sizes: Tensor, recalls: bool) -> tuple[Tensor, Events]:
    """Step sizes with zeros in the place of those that are not finite, and how many these are.

    Args:
        sizes: (L,), or (2L,) of a rule that recalls, where a layer stands still if one of its two is not finite.
        recalls: whether they are.
    """
    finite = sizes.nan_to_num(0.0, 0.0, 0.0)
    if not recalls:
        return finite, {"nonfinite_step_sizes": (finite != sizes).sum()}
    kept = (finite == sizes).reshape(2, -1).all(0).repeat(2)
    return finite * kept, {"nonfinite_step_sizes": (~kept).sum()}


def _by_layer(values: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """(K, n) 0-dimensional values of K runs, as long as ``counts`` says, zeros behind shorter ones: two operations."""
    most = max(counts)
    if min(counts) == most:
        return torch.stack(list(values)).view(len(counts), most)
    zero, rest = values[0].new_zeros(()), iter(values)
    return torch.stack([next(rest) if n < count else zero for count in counts for n in range(most)]).view(-1, most)


@dataclass(frozen=True)
class _Piece:
    """One layer's directions, the vectors they were made from with their bias corrections, and gradients.

    Every field but the last has one entry per parameter, in the layer's order.

    Attributes:
        whole: momenta and directions as they lie in memory, ``[W | b]`` in one piece; ``None``: as above.
    """

    directions: Tensors
    momenta: Tensors
    gradients: Tensors
    corrections: tuple[float, ...]
    whole: tuple[Tensors, Tensors] | None = None


_Pieces = dict[str, _Piece]
_Spreads = Sequence[tuple[tuple[float, ...], Spread]]


def _everybodys(layers: Sequence[Layer], spreads: _Spreads, recalls: bool) -> dict[str, Tensors]:
    """Directions, and last steps, by name; zeros where a parameter has no gradient or is frozen."""
    found: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
    lasts: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
    for _, spread in spreads:
        block = spread.block
        for index, (name, parameter) in enumerate(zip(block.names, block.parameters, strict=True)):
            if parameter.requires_grad:
                found[block.layer.name][name] = spread.directions[index]
                if recalls:
                    lasts[block.layer.name][name] = spread.lasts[index]
    result: dict[str, Tensors] = {}
    for values, name_of in ((found, lambda name: name), (lasts, name_of_last)):
        for layer in layers if values is found or recalls else ():
            own = values[layer.name]
            result[name_of(layer.name)] = tuple(
                own[name] if name in own else zeros_of(parameter) for name, parameter in layer.parameters.items()
            )
    return result


def _pieces(layers: Sequence[Layer], steps: Sequence[BlockStep], momentum: Momentum, last: LastSteps | None) -> _Pieces:
    """Pieces per layer; zeros where a parameter has no gradient or is frozen.

    Behind them stand those of the layers' last steps, if there are any, with the same zeros.
    """
    found: dict[str, dict[str, tuple[Tensor, Tensor, Tensor, float]]] = {layer.name: {} for layer in layers}
    wholes: dict[str, tuple[Tensors, Tensors]] = {}
    for step in steps:
        block = step.block
        own, factor, frozen = found[block.layer.name], momentum.correction(block.updates), False
        views = block.views if block.vector is block.storage else block.parameter_views(block.vector)
        entries = zip(block.names, block.parameters, step.directions, views, step.gradients, strict=True)
        for name, parameter, direction, view, gradient in entries:
            # A parameter that is frozen beside one that is not stays where it is, whatever the structure says.
            frozen = frozen or not parameter.requires_grad
            own[name] = (direction if parameter.requires_grad else torch.zeros_like(direction), view, gradient, factor)
        alone = len(block.names) == len(block.layer.parameters)
        if block.part.joint and alone and not frozen and step.preconditioned[0].is_contiguous():
            wholes[block.layer.name] = (block.vector, step.preconditioned)
    result: _Pieces = {}
    lasts: _Pieces = {}
    for layer in layers:
        own = found[layer.name]
        rows: list[tuple[Tensor, Tensor, Tensor, float]] = []
        for name, parameter in layer.parameters.items():
            if name not in own:
                zero = zeros_of(parameter)
                rows.append((zero, zero, zero, 1.0))
            else:
                rows.append(own[name])
        moved_, momenta, gradients_, corrections = zip(*rows, strict=True)
        piece = _Piece(moved_, momenta, gradients_, corrections, wholes.get(layer.name))
        result[layer.name] = piece
        if last is not None:
            along = tuple(last.along(layer, name, name in own) for name in layer.parameters)
            lasts[name_of_last(layer.name)] = replace(piece, directions=along, whole=None)
    return result | lasts
