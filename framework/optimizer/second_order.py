"""The optimizer: one loop for every method. Parts never see the loop; the loop knows no method.

A step is: evaluate - observe - propose - apply - look back. Up to *apply* nothing is written to any parameter, so an
error before it leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.backends.table import make_backend, require_supported
from ...curvature.layers.discovery import discover_layers
from ...curvature.likelihoods import Likelihood, resolve_likelihood
from ...curvature.products import GraphKeepingBackward
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError, NumericalError
from ...preconditioners.structures.by_layer import ByLayer, require_matching_keys
from ..methods.method import Method
from .arguments import require_arguments, require_closure, require_values
from .blocks import directions_of, make_blocks
from .closure import Closure, Snapshot, run_closure
from .distributed import Ranks, unwrapped
from .groups import require_nobody_left_out, split_into_groups, unowned_parameters
from .lookback import LookBack
from .nonfinite import Undo, find_trouble, is_risky, require_finite_loss, spoiled_parameters
from .observers import Observer, StepTrace
from .observing import observe, refine, refresh, warm_up
from .plan import Plan
from .precision import Scaling, require_plain_loss
from .recording import all_records, require_sampled, with_hessians
from .report import LayerRow, StepReport
from .saving import restore_state, saved_state
from .session import Session
from .stepping import Proposal, StepRule

__all__ = ["SecondOrder"]


class SecondOrder(Session):
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
        on_nonfinite: ``"raise"`` (default) or ``"skip"`` when a loss, gradient, statistic or step size is not finite:
            no state changes, ``skipped_steps`` counts it. One number is fetched from the device per step for this
            check, and one more where an unguarded method looks back.
        groups: parameter groups with their own ``lr``, ``damping``, ``weight_decay``, see
            :func:`osculate.framework.optimizer.groups.split_into_groups`; what they leave over forms one more group.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss; needed by methods that read gradients inside the
            model if the gradients are unscaled for clipping, and by closures.
        backend: who measures, a name of :data:`osculate.curvature.backends.table.BACKENDS`; all record the same.
        process_group: the processes that share a mini-batch: ``"auto"`` (the world group, if ``torch.distributed`` is
            initialised), ``None`` or a group.

    Raises:
        ArgumentError: for values out of range.
        CompatibilityError: if parts do not fit, or ``strict`` and a parameter is left over.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler calls step in any case and says what it found
    _inverse_scale: Tensor | None = None
    _closed = False

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
        grad_scaler: torch.amp.GradScaler | None = None,
        backend: str = "hooks",
        process_group: Any = "auto",
    ):
        require_arguments(locals())
        values = method.hyperparameters({"lr": lr, "damping": damping, "weight_decay": weight_decay})
        method.check_values(**values)
        resolved = resolve_likelihood(likelihood)
        if method.needs_likelihood and resolved is None:
            raise ArgumentError(
                "this method draws labels from the model's own distribution: pass likelihood='categorical', "
                "'bernoulli' or 'gaussian'"
            )
        model, wrapper = unwrapped(model)
        require_values(model)
        layers = discover_layers(model)
        if not layers:
            raise ArgumentError(f"{type(model).__name__} has no trainable parameters")
        if isinstance(method.preconditioner, ByLayer):
            require_matching_keys(method.preconditioner, layers)
        self.model, self.method, self.layers, self.on_nonfinite = model, method, layers, on_nonfinite
        self.blocks = make_blocks(layers, method.preconditioner, method.fallback, strict=strict)
        self._strict, self.grad_scaler, self.ranks = strict, grad_scaler, Ranks(process_group, wrapper)
        self.plan = Plan(method, self.blocks, layers)
        super().__init__(split_into_groups(model, layers, groups), values)
        self._check_values()
        self.capture = make_backend(backend, model, layers, resolved, loss_reduction, seed)
        require_supported(self.capture, all_records(self.blocks, layers, method))
        self.last_report = StepReport(-1)
        self.gradient_evaluations = self.skipped_steps = 0
        self._step, self._warm = 0, False
        self.observers: list[Observer] = []
        self._rule = StepRule(method.step_size, layers, seed, method.adaptive_damping)
        self.guard_state = method.guard.init()
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

    def close(self) -> None:
        """Remove the hooks from the model; the optimizer cannot step afterwards."""
        self.capture.close()
        self._closed = True

    def paused(self) -> AbstractContextManager[None]:
        """Passes inside this context belong to no mini-batch: nothing of them is recorded, forward or backward.

        For evaluations with gradients, adversarial perturbations, penalties, teachers. What such a pass adds to
        ``.grad`` counts as gradient. A pass that fills no ``.grad`` is never counted; to pause for it saves recording.
        Contexts nest, and end however they are left.
        """
        return self.capture.pauses.paused()

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
            ArgumentError: if no parameter has a gradient, the optimizer is closed or paused, or nothing was recorded of
                a layer that measures (``torch.autograd.grad`` in the place of ``loss.backward()``).
            NumericalError: if a loss, gradient, statistic or step size is not finite (``on_nonfinite="raise"``); no
                parameter and no state has changed.
        """
        self._require_open()
        require_closure(closure, self.needs_closure)
        self._check_values()
        scaling = Scaling(self, self.grad_scaler)
        self._look_back.prepare()
        if closure is not None:
            scaling.before_closure()
        loss, products = self._evaluate(closure)
        require_nobody_left_out(self._unowned)
        scaling.unscale_gradients()
        if scaling.found_inf is not None and bool(scaling.found_inf):
            return self._skip("the GradScaler found a gradient that is not finite", loss)
        self._inverse_scale = scaling.inverse(self._due.records_gradients)
        statistics = self.collect()
        if Needs.PRODUCTS in self.method.asks:
            statistics = with_hessians(
                statistics, self.layers, products, self.capture.loss_reduction, self._inverse_scale
            )
        gradients = {block.key: block.gradients() for block in self.blocks}
        trouble = find_trouble(loss, gradients, statistics)
        if trouble is not None:
            return self._refuse(spoiled_parameters(self.blocks) or trouble, loss)
        active = dict.fromkeys(block.layer.name for block in self.blocks if gradients[block.key] is not None)
        require_sampled(self.method, self._step, statistics, active)
        undo = self._undo(gradients) if is_risky(self.method, self._step) else None
        try:
            self.last_report = self._advance(closure, loss, statistics, gradients, products)
        except NumericalError as error:
            if undo is None:
                raise
            undo.roll_back()
            return self._refuse(str(error), loss)
        self._step += 1
        self._arm()
        return loss

    def _advance(
        self,
        closure: Closure | None,
        loss: Tensor | None,
        statistics: Mapping[str, LayerStatistics],
        gradients: Mapping[str, Tensors | None],
        products: GraphKeepingBackward | None,
    ) -> StepReport:
        """Observe, propose, apply, look back.

        Raises:
            NumericalError: if a step size, or the loss after an unguarded step, is not finite.
        """
        for observer in self.observers:
            observer.before_step(self)
        decays = {block.key: self._decays(block) for block in self.blocks}
        updated = observe(self, statistics, gradients, decays)
        refreshes, rescues = refresh(self.blocks, self.sides, self._step)
        refine(updated)
        proposal, damping = self._propose(statistics, gradients, products, decays), self.damping
        self._look_back.remember(proposal)
        self.take(proposal, 1.0)
        sides = {block.key: self.sides(block) for block in self.blocks} if self.observers else {}
        outcome = self._look_back.run(closure, loss, statistics, proposal) if closure is not None else None
        if outcome is not None and self.method.guard.attempts == 0:
            require_finite_loss(outcome.loss)
        report = StepReport(
            self._step,
            loss,
            None if outcome is None else outcome.loss,
            proposal.step_sizes if outcome is None else outcome.scaled(proposal.step_sizes),
            damping,
            proposal.events if outcome is None else {**proposal.events, **outcome.events},
            refreshes,
            rescues,
            0 if outcome is None else outcome.shortened,
        )
        for observer in self.observers:
            observer.after_step(self, StepTrace(report, statistics, proposal, sides))
        self._rule.remember(proposal, 1.0 if outcome is None else outcome.fraction)
        return report

    def _undo(self, gradients: Mapping[str, Tensors | None]) -> Undo:
        active = [block for block in self.blocks if gradients[block.key] is not None]
        unguarded = self.method.looks_back_at(self._step) and self.method.guard.attempts == 0
        moved = [parameter for block in active for parameter in block.parameters] if unguarded else []
        return Undo(self.blocks, self._rule, moved, self._step, self._warm)

    def _evaluate(self, closure: Closure | None) -> tuple[Tensor | None, GraphKeepingBackward | None]:
        self.gradient_evaluations += 1 + self._due.samples_labels
        if closure is None:
            return None, None
        self._arm()  # an interrupted look back or warm start may have left the hooks in another mode
        wanted = self._due.products
        if wanted:
            require_plain_loss(self.ranks.count, self.grad_scaler)
        products = GraphKeepingBackward(self.layers) if wanted else None
        with products or nullcontext():
            loss = run_closure(closure, self.device)
        return self.ranks.mean(loss), products

    def _skip(self, trouble: str, loss: Tensor | None) -> Tensor | None:
        """Count and report a step that is not taken."""
        self._arm()
        self.skipped_steps += 1
        self.last_report = StepReport(self._step, loss, damping=self.damping, skipped=trouble)
        return loss

    def _refuse(self, trouble: str, loss: Tensor | None) -> Tensor | None:
        """Skip a step, and raise if that is wanted."""
        self._skip(trouble, loss)
        if self.on_nonfinite == "raise":
            raise NumericalError(
                f"step {self._step}: {trouble}; no parameter and no state was changed. Lower lr, raise damping, or "
                "build with on_nonfinite='skip'"
            )
        return loss

    def _propose(
        self,
        statistics: Mapping[str, LayerStatistics],
        gradients: Mapping[str, Tensors | None],
        products: GraphKeepingBackward | None,
        decays: Mapping[str, tuple[float, ...]],
    ) -> Proposal:
        active = [block for block in self.blocks if gradients[block.key] is not None]
        directions = directions_of(active, self.method.momentum)
        like = next(iter(directions.values()))[0]
        lr = self._values.per_layer(self.param_groups, self.layers, "lr", like)
        proposal = self._rule.propose(
            self._step, lr, active, directions, self.method.momentum, statistics, products, decays
        )
        if products is not None:
            products.release()
        return proposal

    def warm_start(self, closures: Iterable[Closure]) -> None:
        """The method's initial pass over the data: plain averages of its statistics, nothing is trained.

        No parameter, buffer, gradient or global random state is changed.

        Args:
            closures: each runs the model on one mini-batch, e.g. ``lambda: model(x)``.

        Raises:
            ArgumentError: if the method has no warm start, training has begun, or the closures are none or record
                nothing; no statistic has changed.
        """
        estimator = self.method.warm_start
        if estimator is None or not self.has_warm_start:
            raise ArgumentError("this method has no warm start (or it samples labels and no likelihood was given)")
        if self._step:
            raise ArgumentError(f"warm_start must come before the first step, {self._step} steps have been taken")
        undo = Undo(self.blocks, self._rule, [], self._step, False)
        try:
            self._warm = warm_up(self.model, self.capture, self.collect, self.blocks, estimator, closures)
        except Exception:
            undo.roll_back()
            raise
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

    def _require_open(self) -> None:
        if self._closed:
            raise ArgumentError(
                "this optimizer was closed: its hooks are gone from the model; build a new one and load state_dict()"
            )
        for block in self.blocks:
            if block.parameters[0].device != block.storage[0].device:
                raise ArgumentError(
                    f"the model moved from {block.storage[0].device} to {block.parameters[0].device} after "
                    "osculate.build, which made states where the parameters were; build after model.to(...)"
                )
        if self.capture.pauses.depth:
            raise ArgumentError("step() inside optimizer.paused() would see no statistics; leave the context before it")

    def snapshot(self) -> Snapshot:
        """Random state and buffers now."""
        return Snapshot.take(self.model)

    def _arm(self) -> None:
        """Tell the capture what the coming forward passes must record."""
        self.capture.step, self.capture.stream = self._step, self.ranks.rank
        self.capture.clear()
        self._due = self.plan.at(self._step, self._warm)
        self.capture.arm(self._due.records)
