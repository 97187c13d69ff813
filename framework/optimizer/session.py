"""What lasts between the steps of one optimizer: model, layers, blocks, parameter groups, backend, ranks, rule.

The phases of a step take a session; torch's face on it is in ``second_order``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.backends.backend import Backend
from ...curvature.layers.layer import Layer
from ...curvature.layers.sharding import local
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.damping.split import MeanEigenvalues, SideDamping, TwoSided
from ...preconditioners.linalg import fetch
from ...preconditioners.protocol import Preconditioner
from ...preconditioners.structures.by_layer import ByLayer
from ..methods.method import Method
from ..processes.ranks import Ranks
from .arguments import as_number
from .blocks import Block, full_precision, make_blocks
from .groups import GroupValues, chosen_parameters, late_layers, numbers_of, unowned_parameters
from .kinds_of_numbers import require_real_and_dense
from .lagging import Lagging, require_may_lag
from .loss_reading import require_right_loss
from .plan import Plan, StepPlan
from .precision import widened
from .recording import all_records, own_measures
from .skeleton import Skeleton
from .stepping import StepRule
from .team import BlockStep, Team
from .together import Together
from .torch_protocols import shown_state
from .workload import owners_of_layers

__all__ = ["Session"]


class Session(torch.optim.Optimizer):
    """An ``Optimizer`` whose parameter groups are read layer by layer, and which layers can join: what phases work on.

    A subclass sets the attributes below before it calls this constructor (``capture`` and what follows: after it).

    Args:
        groups: torch's parameter groups.
        numbers: defaults of ``lr``, ``damping`` and ``weight_decay``.
    """

    model: nn.Module
    method: Method
    layers: list[Layer]
    blocks: list[Block]
    own_blocks: list[Block]
    together: Together | None
    structures: Preconditioner | ByLayer
    capture: Backend
    lagging: Lagging
    ranks: Ranks
    plan: Plan
    grad_scaler: torch.amp.GradScaler | None
    certify_records: str
    gradient_evaluations: int
    skipped_steps: int
    guard_state: Any
    _inverse_scale: Tensor | None = None
    _strict: bool
    _step: int = 0
    _warm: bool = False
    due: StepPlan
    _given: list[Any]
    _numbers: list[dict[str, float]]
    _rule: StepRule
    _unowned: dict[str, Tensor]
    _skeleton: Skeleton | None = None

    def __init__(self, groups: list[dict[str, Any]], numbers: dict[str, float]):
        self._values, self._building = GroupValues(), True
        self._given = []
        super().__init__(groups, numbers)
        self._building = False
        self._values.assign(self.layers, self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Everything, the model included, so that a copy or a pickle is whole; step hooks stay behind, as in torch."""
        own = self.__dict__.items()
        kept = {name: value for name, value in own if name != "step" and not name.startswith("_optimizer_")}
        return kept | {"observers": [], "_skeleton": None, "state": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; here every default is a number of the method
        if self.together is not None:
            self.together.rekey(self.model, self.layers)
        self._show_state()

    @property
    def looks_closely(self) -> bool:
        """Whether this step checks what is too dear to be checked in each: the first ten, and every hundredth."""
        if self.certify_records == "never":
            return False
        return self.certify_records == "always" or self._step < 10 or self._step % 100 == 0

    @property
    def device(self) -> torch.device:
        """Of the first parameter: where a loss belongs."""
        return self.blocks[0].parameters[0].device

    @property
    def modules(self) -> list[nn.Module]:
        """All of the model, as they were when it was last checked that it is the same model."""
        return self._skeleton.modules if self._skeleton is not None else list(self.model.modules())

    @property
    def damping(self) -> float | dict[str, float]:
        """lambda of the coming step; per layer where parameter groups differ."""
        value = self._values.common(self.param_groups, "damping")
        if isinstance(value, dict):
            return {layer: self.method.damping_at(entry, self._step) for layer, entry in value.items()}
        return self.method.damping_at(value, self._step)

    def collect(self) -> dict[str, LayerStatistics]:
        """What this process has recorded, without loss scale and in full precision."""
        self.capture.inverse_scale = self._inverse_scale
        found = self.capture.collect()
        for reader in self.capture.readers:
            if reader.found is not None:
                require_right_loss(reader, self._inverse_scale)
        return widened(found, self._inverse_scale) if found else found

    def penalty(self) -> Tensor:
        """(tau / 2) |theta|^2 for coupled weight decay, 0 for decoupled: what the method adds to the loss."""
        total: Tensor = local(self.param_groups[0]["params"][0].detach()).new_zeros(())
        for group in self.param_groups:
            factor = self.method.weight_decay.gradient_factor(float(group["weight_decay"]))
            if not factor:
                continue
            parameters = [parameter.detach() for parameter in group["params"]]
            if self.together is not None and self.together.pieces:
                squares = self.together.squares([(p, p.detach()) for p in group["params"]])
            else:
                squares = torch.stack(torch._foreach_norm(parameters)).square()
            total = total + 0.5 * factor * squares.sum()
        return total

    def sides_of(self, blocks: Sequence[Block]) -> Callable[[Block], SideDamping]:
        """``sides``, with what the damping rule wants to know of the single matrices of some blocks fetched at once."""
        if not self.method.measures_matrices:
            return self.sides
        told = [(block, block.structure.mean_eigenvalue) for block in blocks]
        asked = [(block, tell(block.state)) for block, tell in told if tell is not None]
        values = fetch([value for _, value in asked])
        known = {block.key: value for (block, _), value in zip(asked, values, strict=True)}
        return lambda block: self.sides(block, known.get(block.key))

    def sides(self, block: Block, known: float | None = None) -> SideDamping:
        """Damping of a block's matrices.

        Args:
            block: the block.
            known: the mean eigenvalue of its single matrix, if somebody has asked it already.
        """
        if len(self.param_groups) == 1:
            value = float(self.param_groups[0]["damping"])
        else:
            value = self._values.of_layer(self.param_groups, block.layer.name, "damping")
        rule, part, scheduled = self.method.damping, block.part, self.method.scheduled_damping
        if scheduled is not None:
            value = scheduled.at(value, self._step)
        if self.method.balances_eigenvalues and isinstance(part, TwoSided) and part.without_eigenvalues() == ():
            return rule.sides(value, block.positions, part.mean_eigenvalues(block.state))
        tell = block.structure.mean_eigenvalue if self.method.measures_matrices else None
        if tell is not None:
            mean = float(tell(block.state)) if known is None else known
            return rule.sides(value, block.positions, MeanEigenvalues(mean, 1.0))
        key = (value, block.positions)
        if block.damped is None or block.damped[0] != key:
            block.damped = (key, rule.sides(value, block.positions))
        return block.damped[1]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take over parameters of the model that were frozen when the optimizer was built (gradual unfreezing).

        Their layers get fresh blocks, served by the same method; their schedules start at the next step. Call it
        between two steps: statistics that a forward pass has recorded since the last step are dropped.

        Args:
            param_group: ``"params"`` (parameters of the model or patterns of their names, trainable and owned by no
                group yet) and any of ``lr``, ``damping``, ``weight_decay``, ``name``; the rest as built.

        Raises:
            ArgumentError: if a parameter is frozen, owned already or not of this model, or a number out of range;
                nothing has been changed.
        """
        if self._building:
            super().add_param_group(param_group)
            return
        self._require_same_model()
        chosen = chosen_parameters(self.model, param_group)
        require_real_and_dense(self.model, chosen)
        added = late_layers(self.model, self.layers, chosen)
        numbers = {name: as_number(name, param_group.get(name, self.defaults[name])) for name in self.defaults}
        self.method.check_values(**numbers)
        if self.together is not None:
            self.together.require_averaged(self.model, added)
        if self.together is not None and self.together.owners is not None:
            self.together.owners |= owners_of_layers(added, self.structures, self.method, self.ranks.count)
        blocks = make_blocks(
            added,
            self.structures,
            self.method.fallback,
            strict=self._strict,
            estimator=self.method.curvature,
            owner=self.owner_of,
        )
        require_may_lag(blocks)
        super().add_param_group({**param_group, "params": chosen})
        for block in blocks:
            block.born = self._step
        self._adopt([*self.layers, *added], [*self.blocks, *blocks])

    def owner_of(self, layer: Layer) -> tuple[int | None, bool]:
        """The process that has a layer's state, and whether it is this one; ``None``: all have it."""
        if self.together is None or self.together.owners is None:
            return None, True
        return self.together.owners[layer.name], self.together.owns(layer)

    @property
    def all_reached(self) -> list[bool]:
        """For meetings at which gradients play no part."""
        return [True for block in self.blocks for _ in block.names]

    def _make_plan(self) -> None:
        """Which blocks are whose, and what they ask for when."""
        if self.together is None:
            self.own_blocks, self.plan = self.blocks, Plan(self.method, self.blocks, self.layers)
            return
        self.own_blocks = [block for block in self.blocks if self.together.owns(block.layer)]
        self.plan = Plan(self.method, self.blocks, self.layers, self.own_blocks)

    def _adopt(self, layers: list[Layer], blocks: list[Block]) -> None:
        """Serve more layers than before."""
        self.layers, self.blocks = layers, blocks
        if self.together is not None:
            self.together.adopt(self.model, layers)
        self._make_plan()
        self._given = []
        self._values.assign(layers, self.param_groups)
        self.capture = self.capture.extended(layers)
        self.capture.measures = own_measures(blocks)
        self.capture.arm(all_records(blocks, layers, self.method))  # places the hooks that any step will need
        self._rule.grow(layers)
        self._unowned = unowned_parameters(self.model, layers)
        self._skeleton = Skeleton(self.model, layers)
        self._show_state()
        self._arm()

    def _show_state(self) -> None:
        """``state``, which torch's own tools look at."""
        self.state = defaultdict(dict, shown_state(self.blocks))

    def _require_same_model(self) -> None:
        """Check that the model still has the modules and parameters that are served.

        Raises:
            ArgumentError: naming those that it has not.
        """
        if self._skeleton is None:  # just built, or a copy
            self._skeleton = Skeleton(self.model, self.layers)
        elif not self._skeleton.unchanged():
            self._skeleton = self._skeleton.updated(self.model, self.layers, self._unowned)

    def decays(self, team: Team) -> list[tuple[float, ...]]:
        """Weight decay of every parameter of a team; 0 for one that is frozen."""
        for group in self.param_groups:
            if group["weight_decay"]:
                return [self._values.of_block(self.param_groups, block, "weight_decay") for block in team.blocks]
        return team.none

    def block_steps(self, team: Team, gradients: list[Tensor], decays: list[tuple[float, ...]]) -> list[BlockStep]:
        """The steps of a team, with the gradients of its parameters one after another."""
        steps: list[BlockStep] = []
        position = 0
        for block, place, own in zip(team.blocks, team.places, decays, strict=True):
            end = position + len(block.names)
            due = self.due
            steps.append(BlockStep(block, tuple(gradients[position:end]), due.due[place], own, due.waits[place]))
            position = end
        return steps

    def seen_loss(self, loss: Tensor | None) -> Tensor | None:
        """The loss that the output's gradient tells of, where no closure does; only for rules that use it.

        Infinite where one of many processes has not recognised it: another may have.

        Args:
            loss: of the closure, if there was one.
        """
        seen = self.capture.seen
        found = None if seen is None else seen.take(self._inverse_scale is not None)
        if loss is not None or seen is None:
            return None
        if found is None:
            seen.note_unread()
            if self.together is None or seen.unreadable:
                return None
            found = torch.full((), torch.inf, device=self.device)
        return found if self._inverse_scale is None else found * self._inverse_scale

    def decays_of(self, block: Block) -> tuple[float, ...]:
        """Of one block, whoever owns it."""
        return self._values.of_block(self.param_groups, block, "weight_decay")

    def learning_rate(self) -> float | Tensor:
        """One number where all layers agree, else (L,)."""
        if len(self.param_groups) == 1:
            return self._numbers[0]["lr"]
        like = full_precision(local(self.blocks[0].parameters[0]))
        return self._values.per_layer(self.param_groups, self.layers, "lr", like)

    def _check_values(self) -> None:
        """The numbers of all groups are in range, and agree within each layer; asked again only when one changed."""
        given: list[Any] = []
        for group in self.param_groups:
            given += (group.get("lr"), group.get("damping"), group.get("weight_decay"))
        if len(given) == len(self._given) and self.method.scheduled_damping is None:
            for value, last in zip(given, self._given, strict=True):
                if value is not last or type(value) not in (float, int):  # a tensor may have changed in place
                    break
            else:
                return
        found = [numbers_of(group, index) for index, group in enumerate(self.param_groups)]
        for numbers in found:
            numbers["damping"] = self.method.damping_at(numbers["damping"], self._step)
            self.method.check_values(**numbers)
        for key in ("lr", "damping") if len(self.param_groups) > 1 else ():
            self._values.common(self.param_groups, key)
        self._given, self._numbers = given, found

    def _arm(self) -> None:
        """Tell the capture what the coming forward passes must record."""
        raise NotImplementedError
