"""The optimizer: one loop for every method. Parts never see the loop; the loop knows no method.

A step is: evaluate - observe - propose - apply - look back. Up to *apply* nothing is written to any parameter, so an
error before it leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.capture import Capture, Record
from ..curvature.layers import Layer, discover_layers
from ..curvature.likelihoods import Likelihood, resolve_likelihood
from ..curvature.products import GraphKeepingBackward
from ..curvature.statistics import LayerStatistics, Needs, Tensors
from ..errors import ArgumentError, ClosureRequiredError, NumericalError
from ..preconditioners.by_layer import ByLayer, require_matching_keys
from ..preconditioners.damping import SideDamping
from .blocks import Block, make_blocks
from .evaluation import Closure, Snapshot, run_closure
from .groups import GroupValues, chosen_parameters, split_into_groups
from .growing import late_layers, require_nobody_left_out, unowned_parameters
from .lookback import LookBack
from .method import Method
from .observing import observe, refine, refresh, warm_up
from .recording import records_for_step, require_sampled
from .report import LayerRow, StepReport
from .saving import restore_state, saved_state
from .stepping import Proposal, StepRule

__all__ = ["SecondOrder"]


class SecondOrder(torch.optim.Optimizer):
    """A method applied to a model, as an ordinary ``torch.optim.Optimizer``.

    Args:
        model: the module whose trainable parameters are optimised; hooks are placed on it (see :meth:`close`).
        method: the composition of parts.
        lr: learning rate, or multiplier of a step-size rule that needs none; ``None``: the method's default.
        damping: lambda; ``None``: the method's default.
        weight_decay: tau or gamma >= 0; ``None``: the method's default.
        likelihood: the model's predictive distribution, ``"categorical"``, ``"bernoulli"``, ``"gaussian"`` or an
            object; needed by methods that sample labels.
        loss_reduction: ``"mean"`` or ``"sum"``, how the user's loss combines samples (summed over output coordinates).
        seed: of the sampled labels; the global random state is never used.
        strict: refuse parameters that would get the fallback.
        on_nonfinite: ``"raise"`` (default) or ``"skip"`` when a gradient is not finite. One number is fetched from the
            device per step for this check.
        groups: parameter groups with their own ``lr``, ``damping``, ``weight_decay``, see
            :func:`osculate.framework.groups.split_into_groups`; what they leave over forms one more group.

    Raises:
        ArgumentError: for values out of range.
        CompatibilityError: if parts do not fit, or ``strict`` and a parameter is left over.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        lr: float | None = None,
        damping: float | None = None,
        weight_decay: float | None = None,
        likelihood: str | Likelihood | None = None,
        loss_reduction: str = "mean",
        seed: int = 0,
        strict: bool = False,
        on_nonfinite: str = "raise",
        groups: Sequence[Mapping[str, Any]] | None = None,
    ):
        if loss_reduction not in ("mean", "sum"):
            raise ArgumentError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        if on_nonfinite not in ("raise", "skip"):
            raise ArgumentError(f"on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
        values = method.hyperparameters({"lr": lr, "damping": damping, "weight_decay": weight_decay})
        method.check_values(**values)
        resolved = resolve_likelihood(likelihood)
        if method.needs_likelihood and resolved is None:
            raise ArgumentError(
                "this method draws labels from the model's own distribution: pass likelihood='categorical', "
                "'bernoulli' or 'gaussian'"
            )
        layers = discover_layers(model)
        if not layers:
            raise ArgumentError(f"{type(model).__name__} has no trainable parameters")
        if isinstance(method.preconditioner, ByLayer):
            require_matching_keys(method.preconditioner, layers)
        self.model, self.method, self.layers, self.on_nonfinite = model, method, layers, on_nonfinite
        self._strict, self._values, self._ready = strict, GroupValues(), False
        self.blocks = make_blocks(layers, method.preconditioner, method.fallback, strict=strict)
        super().__init__(split_into_groups(model, layers, groups), values)
        self._values.assign(layers, self.param_groups)
        self._check_values()
        self.capture = Capture(model, layers, resolved, loss_reduction, seed)
        self.last_report = StepReport(-1)
        self.gradient_evaluations = 0
        self._step, self._warm, self._ready = 0, False, True
        self._rule = StepRule(method.step_size, layers, seed)
        self._look_back = LookBack(self)
        self._unowned = unowned_parameters(model, layers)
        self._arm()

    # -- what a user asks --------------------------------------------------------------------------------------------

    @property
    def needs_closure(self) -> bool:
        """Whether ``step`` must be given a closure."""
        return self.method.needs_closure

    @property
    def has_warm_start(self) -> bool:
        """Whether the method has an initial pass over the data that this optimizer can make."""
        start = self.method.warm_start
        return start is not None and not (start.needs_likelihood and self.capture.likelihood is None)

    def layer_table(self) -> list[LayerRow]:
        """Every parameter with the part that serves it, its shape as a matrix and the bytes of its state."""
        return [block.row() for block in self.blocks]

    def penalty(self) -> Tensor:
        """(tau / 2) |theta|^2 for coupled weight decay, 0 for decoupled: what the method adds to the loss."""
        total: Tensor = self.param_groups[0]["params"][0].detach().new_zeros(())
        for group in self.param_groups:
            factor = self.method.weight_decay.gradient_factor(float(group["weight_decay"]))
            if factor:
                parameters = [parameter.detach() for parameter in group["params"]]
                total = total + 0.5 * factor * torch.stack(torch._foreach_norm(parameters)).square().sum()
        return total

    def close(self) -> None:
        """Remove the hooks from the model; the optimizer cannot step afterwards."""
        self.capture.close()

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
        if not self._ready:
            super().add_param_group(param_group)
            return
        chosen = chosen_parameters(self.model, param_group)
        added = late_layers(self.model, self.layers, chosen)
        numbers = {name: float(param_group.get(name, self.defaults[name])) for name in self.defaults}
        self.method.check_values(**numbers)
        blocks = make_blocks(added, self.method.preconditioner, self.method.fallback, strict=self._strict)
        super().add_param_group({**param_group, "params": chosen})
        for block in blocks:
            block.born = self._step
        self._adopt([*self.layers, *added], [*self.blocks, *blocks])

    def _adopt(self, layers: list[Layer], blocks: list[Block]) -> None:
        """Serve more layers than before."""
        self.layers, self.blocks = layers, blocks
        self._values.assign(layers, self.param_groups)
        self.capture = self.capture.extended(layers)
        self._rule.grow(layers)
        self._unowned = unowned_parameters(self.model, layers)
        self._arm()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the statistics that belong to them."""
        self.capture.discard_complete()
        super().zero_grad(set_to_none)

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step.

        Args:
            closure: clears the gradients, runs the model and ``loss.backward()``, and returns the loss. May be left out
                (after an ordinary ``loss.backward()``) for methods with ``needs_closure == False``.

        Returns:
            The mini-batch loss before the step (``None`` without a closure).

        Raises:
            ClosureRequiredError: if the method evaluates the loss itself.
            ArgumentError: if no parameter has a gradient.
            NumericalError: if loss or gradient is not finite (``on_nonfinite="raise"``); nothing has been written.
        """
        if closure is None and self.needs_closure:
            raise ClosureRequiredError(_CLOSURE_MESSAGE)
        self._check_values()
        self._look_back.prepare()
        loss, products = self._evaluate(closure)
        require_nobody_left_out(self._unowned)
        statistics = self.capture.collect()
        gradients = {block.key: block.gradients() for block in self.blocks}
        trouble = self._trouble(loss, gradients)
        if trouble is not None:
            return self._refuse(trouble, loss)
        require_sampled(self.method.step_size, self._step, statistics)
        decays = {block.key: self._decays(block) for block in self.blocks}
        coupled = {
            key: tuple(self.method.weight_decay.gradient_factor(value) for value in values)
            for key, values in decays.items()
        }
        updated = observe(self.blocks, self.method, statistics, gradients, coupled, self._step, self._warm)
        refreshes, rescues = refresh(self.blocks, self.sides, self._step)
        refine(updated)
        proposal = self._propose(statistics, gradients, products, decays)
        self._look_back.remember(proposal)
        self._take(proposal, 1.0)
        outcome = self._look_back.run(closure, loss, statistics, proposal) if closure is not None else None
        self.last_report = StepReport(
            self._step,
            loss,
            None if outcome is None else outcome.loss,
            proposal.step_sizes if outcome is None else outcome.scaled(proposal.step_sizes),
            self.damping,
            {} if outcome is None else outcome.events,
            refreshes,
            rescues,
            0 if outcome is None else outcome.shortened,
        )
        self._step += 1
        self._arm()
        return loss

    def _evaluate(self, closure: Closure | None) -> tuple[Tensor | None, GraphKeepingBackward | None]:
        self.gradient_evaluations += 1 + self._samples_labels
        if closure is None:
            return None, None
        self._arm()  # an interrupted look back or warm start may have left the hooks in another mode
        wanted = Needs.PRODUCTS in self.method.step_size.needs and self.method.step_size.due(self._step)
        products = GraphKeepingBackward(self.layers) if wanted else None
        with products or nullcontext():
            loss = run_closure(closure)
        return loss, products

    def _trouble(self, loss: Tensor | None, gradients: Mapping[str, Tensors | None]) -> str | None:
        """What is not finite, or ``None``. One synchronisation."""
        present = [value for values in gradients.values() if values is not None for value in values]
        if not present:
            raise ArgumentError("no parameter has a gradient; call loss.backward() before step()")
        total = torch.stack(torch._foreach_norm(present)).sum()
        if bool(torch.isfinite(total if loss is None else total + loss)):
            return None
        if loss is not None and not bool(torch.isfinite(loss)):
            return f"the loss is {float(loss)}"
        bad = [key for key, values in gradients.items() if values and not all(bool(v.isfinite().all()) for v in values)]
        return f"the gradient is not finite in layers {', '.join(bad)}" if bad else None

    def _refuse(self, trouble: str, loss: Tensor | None) -> Tensor | None:
        self._arm()
        if self.on_nonfinite == "raise":
            raise NumericalError(
                f"step {self._step}: {trouble}; no parameter and no state was changed. Lower lr, raise damping, or "
                "build with on_nonfinite='skip'"
            )
        self.last_report = StepReport(self._step, loss, damping=self.damping, skipped=trouble)
        return loss

    def _propose(
        self,
        statistics: Mapping[str, LayerStatistics],
        gradients: Mapping[str, Tensors | None],
        products: GraphKeepingBackward | None,
        decays: Mapping[str, tuple[float, ...]],
    ) -> Proposal:
        active = [block for block in self.blocks if gradients[block.key] is not None]
        directions = {block.key: block.direction(self.method.momentum) for block in active}
        like = next(iter(directions.values()))[0]
        lr = self._values.per_layer(self.param_groups, self.layers, "lr", like)
        proposal = self._rule.propose(
            self._step, lr, active, directions, self.method.momentum, statistics, products, decays
        )
        if products is not None:
            products.release()
        return proposal

    def _take(self, proposal: Proposal, fraction: float) -> None:
        """Take a fraction of a proposed step: the only place that writes to parameters."""
        proposal.take(fraction, self.method.weight_decay)

    # -- warm start --------------------------------------------------------------------------------------------------

    def warm_start(self, closures: Iterable[Closure]) -> None:
        """The method's initial pass over the data: plain averages of its statistics, nothing is trained.

        No parameter, buffer, gradient or global random state is changed.

        Args:
            closures: each runs the model on one mini-batch, e.g. ``lambda: model(x)``.

        Raises:
            ArgumentError: if the method has no warm start, or training has begun.
        """
        estimator = self.method.warm_start
        if estimator is None or not self.has_warm_start:
            raise ArgumentError("this method has no warm start (or it samples labels and no likelihood was given)")
        if self._step:
            raise ArgumentError(f"warm_start must come before the first step, {self._step} steps have been taken")
        try:
            self._warm = warm_up(self.model, self.capture, self.blocks, estimator, closures)
        finally:
            self._arm()

    # -- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: tensors, numbers and nested dictionaries keyed by layer name."""
        return saved_state(self, super().state_dict()["param_groups"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the argument is not modified.

        Groups that the saved optimizer was given by :meth:`add_param_group` are added, if their parameters are
        trainable by now.

        Raises:
            ArgumentError: if layers or parts are missing or unknown, or a shape differs; nothing has been written.
        """
        restore_state(self, state_dict)
        self._arm()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def sides(self, block: Block) -> SideDamping:
        """Damping of a block's matrices."""
        value = self._values.of_layer(self.param_groups, block.layer.name, "damping")
        return self.method.damping.sides(value, block.positions)

    @property
    def damping(self) -> float | dict[str, float]:
        """lambda; per layer where parameter groups differ."""
        return self._values.common(self.param_groups, "damping")

    def snapshot(self) -> Snapshot:
        """Random state and buffers now."""
        return Snapshot.take(self.model)

    def _decays(self, block: Block) -> tuple[float, ...]:
        return self._values.of_block(self.param_groups, block, "weight_decay")

    def _check_values(self) -> None:
        """The numbers of all groups are in range, and agree within each layer."""
        for group in self.param_groups:
            self.method.check_values(**{name: float(group[name]) for name in ("lr", "damping", "weight_decay")})
        for key in ("lr", "damping") if len(self.param_groups) > 1 else ():
            self._values.common(self.param_groups, key)

    def _arm(self) -> None:
        """Tell the capture what the coming forward passes must record."""
        self.capture.step = self._step
        self.capture.clear()
        records = records_for_step(self.blocks, self.layers, self.method, self._step, self._warm)
        self.capture.arm(records)
        sampled = Record.SAMPLED | Record.SAMPLED_PARAMETERS
        self._samples_labels = any(record & sampled for record in records.values())


_CLOSURE_MESSAGE = """this method evaluates the mini-batch itself; give step() a closure:
    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)"""
