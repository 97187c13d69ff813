"""The optimizer: one loop for every method. Parts never see the loop; the loop knows no method.

A step is: evaluate - observe - propose - apply - look back. Up to *apply* nothing is written to any parameter, so an
error before it leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...checking import require_kind
from ...curvature.backends.loss_seen import loss_seen_by
from ...curvature.backends.outputs import Choice, resolve_heads
from ...curvature.backends.residual_backend import ResidualBackend
from ...curvature.backends.table import make_backend, require_supported
from ...curvature.declarations import StepSizeDeclarations, declared
from ...curvature.layers.discovery import discover_layers, last_matrix
from ...curvature.likelihoods import Likelihood
from ...curvature.products import GraphKeepingBackward
from ...curvature.records.needs import Needs
from ...errors import ArgumentError, NumericalError
from ...preconditioners.structures.by_layer import ByLayer, require_matching_keys, with_last
from ..methods.method import Method
from ..processes.ranks import Ranks, unwrapped
from .arguments import (
    require_arguments,
    require_closure,
    require_one_choice,
    require_one_process,
    require_residual_method,
    require_values,
)
from .blocks import full_precision, make_blocks
from .closure import Closure, loss_of
from .coverage import warn_of_fallback
from .declined import warn_of_declined
from .division import divided
from .earlier import EarlierGradients, require_whole_batch
from .gathering import gather
from .groups import require_nobody_left_out, split_into_groups, unowned_parameters
from .kinds_of_numbers import require_dense_gradients, require_real_and_dense
from .lagging import Lagging, require_may_lag
from .layer_table import LayerTable
from .lookback import LookBack
from .loss_reading import warn_of_loss
from .nonfinite import Undo, describe_trouble, find_trouble, require_finite_loss, spoiled_parameters
from .observers import Observer, StepTrace
from .observing import observe, refine, renew, warm_up
from .precision import Scaling, require_plain_loss
from .recording import all_records, own_measures, require_sampled, with_hessians
from .report import StepReport
from .saving import consolidated, restore_state, saved_state, with_pending
from .session import Session
from .stepping import Proposal, StepRule
from .team import MiniBatch, Team
from .together import Together
from .torch_protocols import asked_for_checkpoint, by_parameter, from_parameters, numbered_groups, require_eager

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
            object, or ``"from-loss"``; needed by methods that sample labels. A dictionary names one for each head.
        output: which tensor of what the model returns the likelihood reads: a name, an index or a function; ``None``:
            the obvious one (:mod:`osculate.curvature.backends.outputs`).
        loss_reduction: ``"mean"`` or ``"sum"``, how the user's loss combines samples (summed over output coordinates).
        seed: of the sampled labels; the global random state is never used.
        strict: refuse parameters that would get the fallback, and matrices that ``ByLayer`` serves by ``otherwise``.
        on_nonfinite: ``"raise"`` (default) or ``"skip"`` when a loss, gradient, statistic or step size is not finite:
            no state changes, ``skipped_steps`` counts it. One number is fetched from the device per step for this
            check, and one more where an unguarded method looks back.
        groups: parameter groups with their own ``lr``, ``damping``, ``weight_decay``, see
            :func:`osculate.framework.optimizer.groups.split_into_groups`; what they leave over forms one more group.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss; needed by methods that read gradients inside the
            model if the gradients are unscaled for clipping, and by closures.
        backend: who measures, a name of :data:`osculate.curvature.backends.table.BACKENDS`; all record the same.
        samples: which axis of the model's output counts the samples of a mini-batch (1 for a time-major output), or a
            function of the output that returns it as (N, ...), e.g. ``lambda out: out.unflatten(0, (-1, tokens))``.
            From there the sample of every row of every layer is found out. Likelihoods read the output in that form.
        process_group: the processes that share a mini-batch: ``"auto"`` (the world group, if ``torch.distributed`` is
            initialised), ``None`` or a group.
        certify_records: when what was recorded of the layers is compared with the gradients that it must explain:
            ``"always"``, ``"start"`` (the first ten steps, and every hundredth) or ``"never"``.
        division: who has the states where several processes share a mini-batch, see :mod:`.division`:
            ``"replicated"``, ``"owners"``, ``"owners-only"``, or ``"auto"``.

    Raises:
        ArgumentError: for values out of range.
            Also if a trainable parameter is complex or sparse, or a module is built to get sparse gradients.
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
        likelihood: str | Likelihood | Mapping[str | int, str | Likelihood] | None = None,
        output: Choice = None,
        loss_reduction: str = "mean",
        seed: int = 0,
        strict: bool = False,
        on_nonfinite: str = "raise",
        groups: Sequence[Mapping[str, Any]] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        backend: str = "hooks",
        samples: int | Callable[[Any], Tensor] = 0,
        process_group: Any = "auto",
        certify_records: str = "start",
        division: str = "auto",
    ):
        require_arguments(locals())
        values = method.hyperparameters({"lr": lr, "damping": damping, "weight_decay": weight_decay})
        method.check_values(**values)
        resolved = resolve_heads(likelihood)
        require_one_choice(likelihood, output)
        residuals = backend == ResidualBackend.name
        if residuals:
            asks = Needs.PRODUCTS in method.measures_at(None) | method.asks
            require_residual_method(asks, resolved, grad_scaler)
        if method.needs_likelihood and resolved is None and not residuals:
            raise ArgumentError(
                "this method draws labels from the model's own distribution: pass likelihood='categorical', "
                "'bernoulli' or 'gaussian', or 'from-loss' for any other loss that is differentiated in a closure"
            )
        model, wrapper = unwrapped(model)
        require_values(model)
        require_eager(model)
        require_real_and_dense(model)
        layers = discover_layers(model)
        if not layers:
            raise ArgumentError(f"{type(model).__name__} has no trainable parameters")
        self.structures = with_last(method.preconditioner, last_matrix(model, layers))
        if isinstance(self.structures, ByLayer):
            require_matching_keys(self.structures, layers)
        self.model, self.method, self.layers, self.on_nonfinite = model, method, layers, on_nonfinite
        self.ranks = Ranks(process_group, wrapper)
        self.together = divided(division, self.ranks, model, layers, self.structures, method, backend)
        self.blocks = make_blocks(
            layers,
            self.structures,
            method.fallback,
            strict=strict,
            estimator=method.curvature,
            owner=None if self.together is None else self.owner_of,
        )
        require_may_lag(self.blocks)
        self.certify_records = certify_records
        if not warn_of_declined(self.blocks):  # one warning tells of what the fallback serves
            warn_of_fallback(self.blocks, self.structures)
        self._strict, self.grad_scaler = strict, grad_scaler
        if self.together is not None and grad_scaler is not None:
            self.together.require_no_scaler()
        self._make_plan()
        super().__init__(split_into_groups(model, layers, groups), values)
        self._check_values()
        self.capture = make_backend(backend, model, layers, resolved, loss_reduction, seed, samples)
        self.capture.output, self.capture.exchanged = output, wrapper is not None
        self.capture.processes = self.ranks.count
        self.capture.measures = own_measures(self.blocks)
        wanted = all_records(self.blocks, layers, method)
        require_supported(self.capture, wanted)
        if isinstance(self.capture, ResidualBackend):
            require_one_process(self.ranks.count)
            self.capture.rows_of = frozenset(
                block.layer.name for block in self.blocks if block.asked.roots or block.asked.pairs
            )
        self.capture.arm(wanted)  # places the hooks that any step will need
        self.last_report = StepReport(-1)
        self._consolidated: tuple[int, dict[str, Any] | None] = (-1, None)
        self.gradient_evaluations = self.skipped_steps = 0
        self._step, self._warm = 0, False
        self.observers: list[Observer] = []
        if declared(method.step_size, StepSizeDeclarations).uses_loss:
            leaves = [parameter for layer in layers for parameter in layer.parameters.values()]
            self.capture.seen = loss_seen_by(resolved, leaves, model, method.needs_likelihood, loss_reduction)
        self._rule = StepRule(method.step_size, layers, seed, method.adaptive_damping, self.together, loss_reduction)
        self.guard_state, self.lagging = method.guard.init(), Lagging()
        self._look_back = LookBack(self)
        self._unowned = unowned_parameters(model, layers)
        if self.together is not None and any(travel.moments for travel in self.plan.at(0, False).travels.values()):
            self.together.allow_early()
        self._require_same_model()
        self._show_state()
        self._arm()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Load what torch loads when its first optimizer is made.

        That leaves a circle through all frames which wait for it, and what they hold would stay with its hooks on the
        model until the garbage collector comes.
        """
        import_module("torch._dynamo")
        return super().__new__(cls)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the phase that knows the optimizer itself."""
        return {name: value for name, value in super().__getstate__().items() if name != "_look_back"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        super().__setstate__(state)
        self._look_back = LookBack(self)

    # -- what a user asks --------------------------------------------------------------------------------------------

    @property
    def needs_closure(self) -> bool:
        """Whether ``step`` must be given a closure."""
        needs_loss = self.method.needs_likelihood and self.capture.needs_loss
        return self.plan.needs_closure or needs_loss or self.capture.takes_residuals

    @property
    def has_warm_start(self) -> bool:
        """Whether the method has an initial pass over the data that this optimizer can make."""
        start = self.method.warm_start
        if self.capture.takes_residuals:
            return False
        return start is not None and not (start.needs_likelihood and self.capture.likelihood is None)

    def layer_table(self) -> LayerTable:
        """Every parameter with the part that serves it, its shape as a matrix and the bytes of its state.

        A list of :class:`LayerRow`; ``print`` shows it as a table.
        """
        return LayerTable(block.row() for block in self.blocks)

    def close(self) -> None:
        """Remove the hooks from the model; the optimizer cannot step afterwards."""
        self.capture.close()
        self.lagging.close()
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
        if self.capture.seen is not None:
            self.capture.seen.take()
        super().zero_grad(set_to_none)

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step.

        Args:
            closure: clears the gradients, runs the model and ``loss.backward()``, and returns the loss; or returns
                ``None`` and makes no gradient, which skips the mini-batch, counted by ``skipped_steps``. May be left
                out (after an ordinary ``loss.backward()``) for methods with ``needs_closure == False``.

        Returns:
            The mini-batch loss before the step (``None`` without a closure).

        Raises:
            ClosureRequiredError: if the method evaluates the loss itself.
            ArgumentError: if no parameter has a gradient, the optimizer is closed or paused, or nothing was recorded of
                a layer that measures (``torch.autograd.grad`` in the place of ``loss.backward()``); if the model's
                layers are not those of ``build``; if a method that evaluates the mini-batch again finds gradients that
                the closure did not clear, or another mini-batch; if a gradient is sparse. No parameter and no state
                has changed.
            NumericalError: if a loss, gradient, statistic or step size is not finite (``on_nonfinite="raise"``); no
                parameter and no state has changed.
        """
        if self.together is not None:
            self.ranks.require_no_join()
        with nullcontext() if self.together is None or closure is not None else self._in_step(self.together):
            self._require_ready(closure)
        closure = None if closure is None else self.capture.closure(closure)
        due = self.due
        evaluations, scaling = self.gradient_evaluations, None
        if self.grad_scaler is not None or "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            if self.together is not None:
                self.together.require_no_scaler()
            scaling = Scaling(self, self.grad_scaler)
        if due.looks_back:
            self._look_back.prepare()
        if closure is not None and scaling is not None:
            scaling.before_closure()
        try:
            with nullcontext() if self.together is None else self._in_step(self.together):
                loss, products = self._evaluate(closure)
                if closure is not None and scaling is not None:
                    scaling.after_closure(due.looks_back)
        except NumericalError as error:  # residuals say which of them it is
            return self._refuse(str(error), None)
        if loss is None and closure is not None:
            if self.together is not None:
                self.together.skip(self.blocks, self.looks_closely)
            return self._skip("the closure returned None, and no gradient: this mini-batch is skipped", None)
        if self._unowned:
            require_nobody_left_out(self._unowned)
        if scaling is not None:
            scaling.unscale_gradients()
            if scaling.found_inf is not None and bool(scaling.found_inf):
                if self.together is not None:
                    self.together.skip(self.blocks, self.looks_closely, overflown=True)
                return self._skip("the GradScaler found a gradient that is not finite", loss)
        self._inverse_scale = (
            None if scaling is None else scaling.inverse(due.records_gradients, self.capture.has_read_loss)
        )
        if self.together is not None:
            with self._in_step(self.together):
                if self.lagging.pending:
                    self.lagging.landing(self._step, False)  # what a thread has raised is told the others
                batch = gather(self, self.together, loss)
            if isinstance(batch, str):
                return self._refuse(batch, loss)
            loss = batch.loss
        else:
            statistics = self.collect()
            if Needs.PRODUCTS in self.method.asks:
                statistics = with_hessians(
                    statistics, self.layers, products, self.capture.loss_reduction, self._inverse_scale
                )
            team, gradients = self._with_gradients()
            if not gradients:
                raise ArgumentError("no parameter has a gradient; call loss.backward() before step()")
            try:
                troubled = find_trouble(loss, gradients, statistics.values(), self.capture.doubts)
            except (RuntimeError, TypeError):
                require_dense_gradients(self.blocks, statistics)
                raise
            if troubled:
                trouble = spoiled_parameters(self.blocks) or describe_trouble(loss, team, gradients, statistics)
                return self._refuse(trouble, loss)
            if due.measures_scores:
                require_sampled(statistics, team.layers)
            decays = self.decays(team)
            steps = self.block_steps(team, gradients, decays)
            batch = MiniBatch(
                loss, statistics, products, team, gradients, steps, decays is not team.none, seen=self.seen_loss(loss)
            )
            batch.parameters = team.parameters
        unseen = self.capture.seen if loss is None else None
        for reader in self.capture.readers:
            if not reader.told:
                warn_of_loss(reader, self.model, unseen)
        if unseen is not None and unseen.unsaid:
            unseen.tell()
        undo = self._undo(batch) if due.risky or due.looks_back else None
        try:
            self.last_report = self._advance(closure, batch, [] if undo is None else undo.copies)
        except NumericalError as error:
            if undo is None:
                raise
            undo.roll_back()
            if due.looks_back:
                self._look_back.take_back()
            return self._refuse(str(error), loss)
        except BaseException:  # an interrupt from the keyboard as well
            if undo is not None:
                undo.roll_back()
            if due.looks_back:
                self._look_back.take_back()
                self._look_back.rewind()
                self.gradient_evaluations = evaluations
                self._arm()
            raise
        finally:
            if due.looks_back:
                self._look_back.forget()
        self._step += 1
        self._consolidated = -1, None
        self._arm()
        return loss

    @contextmanager
    def _in_step(self, together: Together) -> Iterator[None]:
        """The part of a step before anything is written: an error is told the other processes, and all begin anew."""
        try:
            with together.announcing(self.blocks, self.looks_closely):
                yield
        except Exception:
            self._arm()
            raise

    def _advance(self, closure: Closure | None, batch: MiniBatch, copies: list[Tensor]) -> StepReport:
        """Observe, propose, apply, look back.

        Args:
            closure: the user's.
            batch: what its first evaluation left.
            copies: of the parameters that the team moves, if the step looks back.

        Raises:
            NumericalError: if a step size, or the loss after an unguarded step, is not finite.
        """
        for observer in self.observers:
            observer.before_step(self)
        due = self.due
        looks_back = due.looks_back and closure is not None
        # Waits before anything is written; what an undone step installs must be there again.
        late = self.lagging.landing(self._step, due.risky or due.looks_back) if self.lagging.pending else ()
        observe(self, batch)
        refreshes, rescues = renew(self, late) if late or due.inverses or due.lagging else (0, 0)
        if batch.team.refines:
            refine(batch)
        proposal = self._propose(batch)
        damping = self._numbers[0]["damping"] if len(self.param_groups) == 1 else self.damping
        if looks_back:
            self._look_back.remember(proposal, batch.parameters, copies)
        proposal.take(1.0, self.method.weight_decay)
        sides = {block.key: self.sides(block) for block in self.own_blocks} if self.observers else {}
        report = StepReport(
            self._step, batch.loss, None, proposal.step_sizes, damping, proposal.events, refreshes, rescues
        )
        fraction = 1.0
        if looks_back and closure is not None:
            outcome = self._look_back.run(closure, batch, proposal)
            if self.method.guard.attempts == 0:
                require_finite_loss(outcome.loss)
            report, fraction = outcome.into(report), outcome.fraction
        for observer in self.observers:
            observer.after_step(self, StepTrace(report, batch.statistics, proposal, sides))
        if self._rule.last is not None:
            self._rule.remember(proposal, fraction, self._step)
        return report

    def _with_gradients(self) -> tuple[Team, list[Tensor]]:
        """The blocks that have a gradient, and the gradients of all their parameters, half precision as float32."""
        team = self.plan.everyone
        gradients: list[Tensor] = []
        for parameter in team.parameters:
            if parameter.grad is None or not parameter.requires_grad:
                break
            gradients.append(parameter.grad)
        else:
            return team, [full_precision(value) for value in gradients] if team.half else gradients
        found = [block.gradients() for block in self.blocks]
        team = self.plan.team(tuple(values is not None for values in found))
        return team, [value for values in found if values is not None for value in values]

    def _undo(self, batch: MiniBatch) -> Undo:
        unguarded = self.due.looks_back and self.method.guard.attempts == 0
        moved, waits = batch.parameters if self.due.looks_back else [], () if unguarded else self.due.waits
        return Undo(self.own_blocks, self._rule, moved, self._step, self._warm, waits, self.lagging)

    def _evaluate(self, closure: Closure | None) -> tuple[Tensor | None, GraphKeepingBackward | None]:
        """Loss and, where they are asked for, Hessian products; no loss without a closure, or if it skips the batch."""
        due, capture = self.due, self.capture
        if closure is None:
            self.gradient_evaluations += 1 + due.samples_labels
            return None, None
        if not capture.is_armed(due.records):
            self._arm()  # an interrupted look back or warm start has left the hooks in another mode
        again = due.looks_back or due.products
        passes = [] if again else capture.complete_passes()
        if not passes:
            capture.clear()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        earlier, products = EarlierGradients(parameters, again or bool(passes)), None
        if capture.seen is not None:
            capture.seen.idle = True  # the closure tells its loss
        try:
            with torch.enable_grad(), capture.differentiating() if capture.reads_curvature else nullcontext():
                if self.together is not None:
                    loss = self.together.evaluated(closure, (id(due), self.looks_closely))
                elif not due.products:
                    loss = closure()
                else:
                    require_plain_loss(self.grad_scaler)
                    with GraphKeepingBackward(self.layers) as products:
                        loss = closure()
        finally:
            earlier.finish()
            if capture.seen is not None:
                capture.seen.idle = False
        if loss is None and not earlier.joined():
            return None, None
        loss = loss_of(loss, self.device)
        if again:
            require_whole_batch(earlier.kept())
        elif passes and not earlier.kept():
            capture.forget_passes(passes)  # cleared by somebody else, else zero_grad has told the capture
        self.gradient_evaluations += 1 + due.samples_labels
        return loss, products

    def _skip(self, trouble: str, loss: Tensor | None) -> Tensor | None:
        """Count and report a step that is not taken."""
        self._arm()
        self._look_back.forget()
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

    def _propose(self, batch: MiniBatch) -> Proposal:
        momentum = self.method.momentum
        for step, values in zip(batch.steps, batch.team.preconditioned(momentum), strict=True):
            step.preconditioned = values
            step.directions = step.block.parameter_views(values) if step.block.part.joint else values
        proposal = self._rule.propose(self._step, self.learning_rate(), batch, momentum)
        if batch.products is not None:
            batch.products.release()
        return proposal

    def warm_start(self, closures: Iterable[Closure]) -> None:
        """The method's initial pass over the data: plain averages of its statistics, nothing is trained.

        No parameter, buffer, gradient or global random state is changed.

        Args:
            closures: each runs the model on one mini-batch, e.g. ``lambda: model(x)``.

        Raises:
            ArgumentError: if the method has no warm start, training has begun, or the closures are none or record
                nothing; no statistic has changed.
            NumericalError: if a mini-batch records something that is not finite; no statistic has changed.
        """
        estimator = self.method.warm_start
        if estimator is None or not self.has_warm_start:
            raise ArgumentError("this method has no warm start (or it samples labels and no likelihood was given)")
        self._require_same_model()
        if self._step:
            raise ArgumentError(f"warm_start must come before the first step, {self._step} steps have been taken")
        undo = Undo(self.own_blocks, self._rule, [], self._step, False)
        try:
            self._warm = warm_up(self, estimator, closures)
        except Exception:
            undo.roll_back()
            raise
        finally:
            self._arm()

    # -- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: tensors, numbers and nested dictionaries keyed by layer name.

        ``torch.distributed.checkpoint``'s ``get_optimizer_state_dict`` gets the same, keyed by parameter.

        Where many processes divide the work (``division="owners"``) no process has the whole state:
        ``torch.distributed.checkpoint`` saves what each has, and loads it onto another number of processes;
        :meth:`consolidate_state_dict` brings the whole to one of them, whose ``state_dict()`` it then is.

        Raises:
            ArgumentError: if other processes have a part of it, and it was not consolidated since the last step; or if
                a checkpoint would lose inverses that lag.
            ProcessError: if an exchange between processes failed in the middle of a step.
        """
        self._require_same_model()
        self.ranks.require_whole()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        by_checkpoint = asked_for_checkpoint()
        if by_checkpoint:
            self.lagging.require_nothing_pending()
        saved = with_pending(saved_state(self, numbered_groups(self.param_groups)), self.lagging)
        if by_checkpoint:
            saved = by_parameter(saved, self)
        elif self.together is not None and self.together.owners is not None:
            step, whole = self._consolidated
            if whole is None or step != self._step:
                raise ArgumentError(
                    f"this process owns {len(self.own_blocks)} of {len(self.blocks)} blocks and has no other's state; "
                    "call optimizer.consolidate_state_dict(to=0) on every process, and state_dict() on process 0 then, "
                    "or save with torch.distributed.checkpoint and get_optimizer_state_dict(model, optimizer)"
                )
            saved = whole
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, saved)
            saved = saved if replaced is None else replaced
        return saved

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the states of all processes to one, whose ``state_dict()`` is then whole; every process calls this.

        As ``torch.distributed.optim.ZeroRedundancyOptimizer`` does. In one process, and where every process has all
        states, there is nothing to bring.

        Args:
            to: the process that gets it, by its number in the group.

        Memory: the whole state, in the memory of that process's host, until the next step.

        Raises:
            ArgumentError: if there is no such process.
        """
        if self.together is None or self.together.owners is None:
            return
        require_kind("to", to, int, f"take the number of a process, 0 to {self.ranks.count - 1}")
        if not 0 <= to < self.ranks.count:
            raise ArgumentError(f"to must be the number of a process, 0 to {self.ranks.count - 1}, got {to}")
        own = with_pending(saved_state(self, numbered_groups(self.param_groups)), self.lagging)
        self._consolidated = self._step, consolidated(self, own, to)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the argument is not modified.

        Of a whole state each process takes what it owns, on whatever number of processes it was taken.

        Groups that the saved optimizer was given by :meth:`add_param_group` are added, if their parameters are
        trainable by now.

        Raises:
            ArgumentError: if layers or parts are missing or unknown, or a shape differs; nothing has been written.
        """
        self._require_same_model()
        saved = state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, saved)
            saved = saved if replaced is None else replaced
        restore_state(self, from_parameters(saved, lambda: saved_state(self, numbered_groups(self.param_groups))))
        self._make_plan()
        self._arm()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _require_ready(self, closure: Closure | None) -> None:
        """Check what a step is given, before it begins."""
        if self._closed:
            raise ArgumentError(
                "this optimizer was closed: its hooks are gone from the model; build a new one and load state_dict()"
            )
        self.ranks.require_whole()
        for block in self.own_blocks:
            if block.parameters[0].device != block.storage[0].device:
                raise ArgumentError(
                    f"the model moved from {block.storage[0].device} to {block.parameters[0].device} after "
                    "osculate.build, which made states where the parameters were; build after model.to(...)"
                )
        self._require_same_model()
        if self.capture.pauses.depth:
            raise ArgumentError("step() inside optimizer.paused() would see no statistics; leave the context before it")
        if torch.is_autocast_enabled(self.device.type) and any(block.asked.anything for block in self.blocks):
            raise ArgumentError(
                "step() inside torch.autocast would compute the curvature in low precision; call it outside of the "
                "context, and enter that in the closure, around the model and the loss"
            )
        if closure is None or not callable(closure):
            require_closure(closure, self.needs_closure, self.capture.takes_residuals)
        self._check_values()

    def _arm(self) -> None:
        """Tell the capture what the coming forward passes must record."""
        self.capture.clear()
        if self.capture.seen is not None:
            self.capture.seen.take()
        self.capture.step = self._step
        self.capture.stream = 0 if self.together is None else self.together.place
        self.due = self.plan.at(self._step, self._warm)
        self.capture.certifies = self.looks_closely
        self.capture.arm(self.due.records)
        if self.together is not None and self.together.early is not None:
            self.together.early.arm(self.capture, self.due.travels, self.grad_scaler is None)
