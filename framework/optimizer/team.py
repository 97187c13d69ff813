"""The blocks that take part in a step together, and the one object per block and step that the phases fill in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import FormDeclarations, declared
from ...curvature.products import GraphKeepingBackward
from ...curvature.quadratic_forms import QuadraticForm
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...preconditioners.protocol import Observation, Refining, refining
from ...preconditioners.structures.identity import Identity
from ..methods.momentum import Momentum
from .blocks import Block

__all__ = ["BlockStep", "MiniBatch", "Team"]


@dataclass(slots=True)
class BlockStep:
    """One block in one step.

    Attributes:
        block: the block.
        gradients: of the user's loss, one per parameter, half precision as float32; zeros for one that is frozen.
        due: whether its statistics are updated.
        decays: weight decay of each parameter; 0 for one that is frozen.
        waits: whether its statistics are updated after the second evaluation only.
        record: what was measured of its layer, with the estimator's choice of curvature; ``None``: nothing.
        observation: what its structure was given, if it was updated.
        preconditioned: the momentum, preconditioned, in its layout. May share its memory.
        directions: the same in the shapes of the parameters.
    """

    block: Block
    gradients: Tensors
    due: bool
    decays: tuple[float, ...]
    waits: bool = False
    record: LayerStatistics | None = None
    observation: Observation | None = None
    preconditioned: Tensors = ()
    directions: Tensors = ()


class Crew:
    """Blocks of a team that one part serves: they are given to it together.

    Attributes:
        structure: the part, with all that a structure may declare.
        blocks: its blocks.
        members: their places in the team.
        learns: whether statistics mean anything to the part.
        preconditions: whether its directions are anything but the momentum.
        refining: the part, if it refines.
    """

    def __init__(self, blocks: list[Block], members: list[int]):
        self.structure, self.blocks, self.members = blocks[0].structure, blocks, members
        kind: Any = type(blocks[0].part)
        together = self.structure.together
        self.learns = kind.update is not Identity.update or "update_many" in together
        self.preconditions = kind.precondition is not Identity.precondition or "precondition_many" in together
        self.refining: Refining | None = refining(blocks[0].part)


class Team:
    """What is the same at every step in which the same blocks take part: flat lists for operations on all of them.

    Args:
        blocks: the blocks, in order.
        places: their places among all blocks of the optimizer.
    """

    def __init__(self, blocks: Sequence[Block], places: Sequence[int] = ()):
        self.blocks, self.places = list(blocks), places
        self.layers = list(dict.fromkeys(block.layer.name for block in blocks))
        self.parameters = [parameter for block in blocks for parameter in block.parameters]
        self.views = [view for block in blocks for view in block.views]
        self.storages = [storage for block in blocks for storage in block.storage]
        self.half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.parameters)
        self.none = [(0.0,) * len(block.names) for block in blocks]
        found: dict[int, list[int]] = {}
        for index, block in enumerate(blocks):
            found.setdefault(id(block.part), []).append(index)
        self.crews = [Crew([blocks[index] for index in m], m) for m in found.values()]
        self.refines = any(crew.refining is not None for crew in self.crews)

    def accumulate(
        self,
        momentum: Momentum,
        gradients: list[Tensor],
        decays: Sequence[float] | None,
        values: Sequence[Tensor] | None = None,
    ) -> None:
        """One recurrence of the momentum on g + decay * theta, all blocks in a few operations.

        Args:
            momentum: the recurrence.
            gradients: of all parameters; they stay as they are.
            decays: coupled weight decay of all parameters; ``None``: of none.
            values: of all parameters, if they are not whole themselves.
        """
        if not self.blocks:  # another process owns all
            return
        shown = self.parameters if values is None else values
        keep, add = momentum.coefficients()
        torch._foreach_mul_(self.storages, keep)
        self._add_(self.views, add, gradients, decays, shown)
        on_momentum, on_gradient = momentum.blend()
        ahead = (on_momentum, on_gradient) != (1.0, 0.0)
        blended = iter(torch._foreach_mul(self.storages, on_momentum)) if ahead else iter(())
        for block in self.blocks:
            block.vector = tuple(next(blended) for _ in block.storage) if ahead else block.storage
            block.updates += 1
        if ahead:
            views = [view for block in self.blocks for view in block.parameter_views(block.vector)]
            self._add_(views, on_gradient, gradients, decays, shown)

    @staticmethod
    def _add_(
        views: list[Tensor],
        add: float,
        gradients: list[Tensor],
        decays: Sequence[float] | None,
        parameters: Sequence[Tensor],
    ) -> None:
        """View <- view + add * (g + decay * theta)."""
        torch._foreach_add_(views, gradients, alpha=add)
        for decay in dict.fromkeys(decays or ()):
            if decay:
                assert decays is not None
                chosen = [index for index, value in enumerate(decays) if value == decay]
                shown = [parameters[index].detach() for index in chosen]
                torch._foreach_add_([views[index] for index in chosen], shown, alpha=add * decay)

    def directions(self, momentum: Momentum) -> list[Tensors]:
        """Preconditioned momentum of every block, shaped as its parameters; may share memory with the momentum."""
        made = zip(self.blocks, self.preconditioned(momentum), strict=True)
        return [block.parameter_views(values) for block, values in made]

    def preconditioned(self, momentum: Momentum) -> list[Tensors]:
        """Preconditioned momentum of every block, laid out as the momentum, whose memory it may share."""
        found: list[Tensors] = list(self.none)  # type: ignore[arg-type]
        corrections: dict[int, float] = {}
        late: dict[float, list[int]] = {}
        for crew in self.crews:
            states, vectors = [], []
            for member, block in zip(crew.members, crew.blocks, strict=True):
                factor = corrections.get(block.updates)
                if factor is None:
                    factor = corrections[block.updates] = momentum.correction(block.updates)
                vector = block.vector
                if factor != 1.0 and crew.structure.linear:
                    late.setdefault(factor, []).append(member)
                elif factor != 1.0:
                    vector = tuple(factor * value for value in vector)
                states.append(block.state)
                vectors.append(vector)
            made = crew.structure.precondition_blocks(states, vectors) if crew.preconditions else vectors
            for member, block, vector, values in zip(crew.members, crew.blocks, vectors, made, strict=True):
                found[member] = values if values is vector else block.checked(values, vector)
        for factor, members in late.items():
            # Not in place: what a structure returns may be its argument, or memory of its own.
            scaled = iter(torch._foreach_mul([value for member in members for value in found[member]], factor))
            for member in members:
                found[member] = tuple(next(scaled) for _ in found[member])
        return found


@dataclass(slots=True)
class MiniBatch:
    """What the evaluation of one mini-batch left, and the steps of all blocks that it lets move.

    Attributes:
        loss: mean over all processes; ``None`` without a closure.
        statistics: by layer.
        products: Hessian products, if they were asked for.
        team: the blocks that have a gradient.
        gradients: of the team's parameters, one after another.
        steps: of the team's blocks.
        decays: whether some parameter has weight decay.
        waiting: blocks whose statistics are updated after the second evaluation, by crew.
        seen: what the output's gradient tells of the loss, where no closure returned it.
        parameters: all that the step moves, as far as this process holds it.
        moving: in many processes, all blocks that take part, whoever owns them, with their weight decays.
        samples: in many processes, by layer the samples that each adds.
        shares: in many processes, what this one has recorded of its own share; ``statistics`` are of the joint
            mini-batch then, of the layers that it owns.
        everybodys: makes the rows of all processes, for forms that take nothing less.
        sharded: whether parameters are in pieces.
        whole: in many processes, by id of the parameter the gradients of the layers that this process owns.
        values: in many processes, the team's parameters, whole where weight decay needs them.
    """

    loss: Tensor | None
    statistics: Mapping[str, LayerStatistics]
    products: GraphKeepingBackward | None
    team: Team
    gradients: list[Tensor]
    steps: list[BlockStep]
    decays: bool = False
    waiting: list[tuple[Crew, list[BlockStep]]] = field(default_factory=list)
    seen: Tensor | None = None
    parameters: list[Tensor] = field(default_factory=list)
    moving: Sequence[tuple[Block, tuple[float, ...]]] = ()
    samples: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shares: Mapping[str, LayerStatistics] | None = None
    everybodys: Callable[[], Mapping[str, LayerStatistics]] | None = None
    sharded: bool = False
    whole: Mapping[int, Tensor] | None = None
    values: list[Tensor] | None = None

    def recorded(self, form: QuadraticForm) -> Mapping[str, LayerStatistics]:
        """What a quadratic form measures with."""
        if self.shares is None:
            return self.statistics
        if self.everybodys is None or declared(form, FormDeclarations).adds_up:
            return self.shares
        return self.everybodys()
