"""The optimizer over all parameters at once. A step is: evaluate - model - search - learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checking import require_kind
from ...curvature.residuals.jacobian import Jacobian, JacobianReader, evaluate_residuals, explained
from ...curvature.residuals.residual import read_residuals
from ...errors import ArgumentError, ClosureRequiredError, NumericalError, require_interval
from ...preconditioners.whole.models import Sighted, flattened
from ...preconditioners.whole.systems import Products, chosen_system, products_of
from ...stepsize.search.protocol import SearchOutcome
from ..optimizer.closure import Snapshot, require_real
from ..optimizer.layer_table import LayerTable
from ..optimizer.report import LayerRow, StepReport
from .method import WholeMethod

__all__ = ["WholeModel"]

_FORMAT = 1
_LOOKS = 3
"""First steps in which the user's function is examined."""


class WholeModel(torch.optim.Optimizer):
    """A :class:`WholeMethod` applied to a model.

    ``step`` takes a function that returns residuals by name, ``{"interior": r1, "boundary": r2}``, tensors (rows, ...)
    or :class:`~osculate.Residual`. They may contain derivatives of the network. The loss is the sum over blocks of
    weight / rows * sum of r^2 / 2, and nobody calls ``backward``. Methods of the quasi-Newton kind also take a function
    that clears the gradients, runs ``loss.backward()`` and returns the loss.

    Within one step the function is called several times and must evaluate the same points each time. Random numbers
    from torch's global generator, dropout and buffers are put back before each call, so points may be drawn inside.

    Args:
        model: whose trainable parameters are optimised; all have one dtype and device. Double precision is worth its
            price here: in single precision these methods end where its rounding does.
        method: the composition.
        damping: relative to the largest eigenvalue of the curvature, > 0; ``None``: the method's.
        on_nonfinite: ``"raise"`` (default) or ``"skip"`` when the residuals, the loss or the gradient at the beginning
            of a step are not finite. No parameter and no state changes; ``skipped_steps`` counts it. Farther along they
            only make the step shorter.

    Memory: as the method's curvature says, and two copies of the parameters.

    Raises:
        ArgumentError: for values out of range, a model without trainable parameters or with several dtypes or devices,
            or more parameters than the curvature takes.
    """

    def __init__(
        self, model: nn.Module, method: WholeMethod, *, damping: float | None = None, on_nonfinite: str = "raise"
    ):
        require_kind("method", method, WholeMethod, "put one together with osculate.WholeMethod(...)")
        if on_nonfinite not in ("raise", "skip"):
            raise ArgumentError(f"on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
        chosen = method.damping if damping is None else damping
        require_kind("damping", chosen, float, "leave it out for the method's own")
        require_interval("damping", chosen, 0.0, math.inf, closed="()")
        named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not named:
            raise ArgumentError(f"{type(model).__name__} has no trainable parameters")
        kinds = {(value.dtype, value.device) for value in named.values()}
        if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
            raise ArgumentError(
                "methods over the whole model need parameters of one real dtype on one device, got "
                f"{sorted(map(str, kinds))}; convert them with model.to(device, torch.float64)"
            )
        dtype = next(iter(kinds))[0]
        if method.needs_residuals and dtype not in (torch.float32, torch.float64):
            raise ArgumentError(
                f"{type(method.curvature).__name__} solves linear systems in the precision of the parameters, and "
                f"{dtype} has no solver; convert the model with model.to(torch.float64) before osculate.build"
            )
        self.model, self.method, self.on_nonfinite = model, method, on_nonfinite
        self._parameters, self._names = list(named.values()), list(named)
        self._sizes = [value.numel() for value in self._parameters]
        reason = method.curvature.declines(sum(self._sizes))
        if reason:
            raise ArgumentError(f"{type(method.curvature).__name__}: {reason}")
        super().__init__(self._parameters, {"damping": chosen, "lr": 1.0})
        like = self._parameters[0].detach()
        self.curvature_state = method.curvature.init(sum(self._sizes), like)
        self.search_state = method.search.init()
        self._kind = like.dtype, like.device
        self.reader = JacobianReader(self._parameters, self._names)
        self.last_report = StepReport(-1)
        self.gradient_evaluations = self.skipped_steps = 0
        self._step, self._entries = 0, 0

    # -- what a user asks --------------------------------------------------------------------------------------------

    @property
    def needs_closure(self) -> bool:
        """Always: a search evaluates."""
        return True

    @property
    def has_warm_start(self) -> bool:
        """Never."""
        return False

    def layer_table(self) -> LayerTable:
        """All parameters: one part serves them together."""
        state = self.curvature_state
        values = () if state is None else state.to_dict().values()
        size = sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
        part = type(self.method.curvature).__name__
        row = LayerRow("(model)", "WholeModel", tuple(self._names), (sum(self._sizes),), part, False, size)
        return LayerTable([row])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: returns the residuals by name, or (quasi-Newton methods) evaluates a loss, see the class.

        Returns:
            The loss before the step.

        Raises:
            ClosureRequiredError: without a function.
            ArgumentError: if it returns something else, residuals that do not depend on the parameters, or other
                residuals when it is called again. No parameter and no state has changed.
            NumericalError: if residuals, loss or gradient are not finite (``on_nonfinite="raise"``); nothing has
                changed.
        """
        if closure is None or not callable(closure):
            raise ClosureRequiredError(
                "methods over the whole model evaluate the residuals themselves: step(residuals), with a function that "
                "returns {'name': residuals}"
            )
        self._require_as_built()
        objective = _Evaluations(self, closure)
        try:
            seen = self._see(objective)
        except NumericalError as error:
            objective.go_back()
            return self._skip(str(error))
        except BaseException:
            objective.go_back()
            raise
        group = self.param_groups[0]
        try:
            model = self.method.curvature.model(self.curvature_state, seen)
            before = None if self.search_state is None else self.search_state.to_dict()
            found = self.method.search.run(self.search_state, objective, model, float(group["damping"]))
        except BaseException:
            objective.go_back()
            raise
        finite = found.step is not None and bool(torch.isfinite(found.step).all())
        if not finite:
            objective.go_back()
            if found.step is not None and before is not None:
                self.search_state.load_dict(before)
        else:
            assert found.step is not None
            objective.move(found.step)
            objective.leave()
            self.method.curvature.learn(self.curvature_state, seen, found.step, found.gradient)
        self._show_gradient(seen.gradient)
        self.last_report = self._report(seen, found, finite)
        self._step += 1
        return seen.gradient.new_tensor(seen.loss)

    # -- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit."""
        saved = {"curvature": self.curvature_state, "search": self.search_state}
        parts = {name: {} if state is None else state.to_dict() for name, state in saved.items()}
        return {
            "format": _FORMAT,
            "method": repr(self.method),
            "step": self._step,
            "names": list(self._names),
            "damping": float(self.param_groups[0]["damping"]),
            "entries": self._entries,
            "counts": {"gradient_evaluations": self.gradient_evaluations, "skipped_steps": self.skipped_steps},
            **parts,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the argument is not modified.

        Raises:
            ArgumentError: if it was saved by another method or for other parameters; nothing has been written.
        """
        missing = {"format", "method", "step", "names", "damping", "curvature", "search"} - set(state_dict)
        if missing or state_dict["format"] != _FORMAT:
            raise ArgumentError(f"this is no state of a WholeModel optimizer (missing: {sorted(missing)})")
        if state_dict["method"] != repr(self.method):
            raise ArgumentError(f"the state was saved by {state_dict['method']}, this optimizer is {self.method!r}")
        if list(state_dict["names"]) != self._names:
            raise ArgumentError(f"the state is of parameters {state_dict['names']}, the model has {self._names}")
        for state, name in ((self.curvature_state, "curvature"), (self.search_state, "search")):
            if state is not None:
                state.load_dict(dict(state_dict[name]))
        self._step, self._entries = int(state_dict["step"]), int(state_dict.get("entries", 0))
        self.param_groups[0]["damping"] = float(state_dict["damping"])
        counts = state_dict.get("counts", {})
        self.gradient_evaluations = int(counts.get("gradient_evaluations", 0))
        self.skipped_steps = int(counts.get("skipped_steps", 0))

    def __getstate__(self) -> dict[str, Any]:
        """Everything, the model included, so that a copy is whole; step hooks stay behind, as in torch."""
        own = self.__dict__.items()
        return {name: value for name, value in own if name != "step" and not name.startswith("_optimizer_")}

    # -- helpers -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing: no hook is placed on the model."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor's own: one curvature serves all parameters.

        Raises:
            ArgumentError: for another group.
        """
        if self.param_groups:
            raise ArgumentError(
                "a method over the whole model has one group of parameters; thaw what is to be trained, and build the "
                "optimizer anew"
            )
        super().add_param_group(param_group)

    def _require_as_built(self) -> None:
        """Check that nobody has changed what the optimizer was built for.

        Raises:
            ArgumentError: if a scheduler has moved lr, a parameter was frozen or exchanged, or the model was converted.
        """
        lr = self.param_groups[0]["lr"]
        if lr != 1.0:
            raise ArgumentError(f"a method over the whole model has no lr and takes no scheduler, got lr={lr!r}")
        present = {id(parameter) for parameter in self.model.parameters()}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if id(parameter) not in present:
                raise ArgumentError(
                    f"parameter {name!r} is no longer one of the model's: its module was exchanged after "
                    "osculate.build; build the optimizer anew"
                )
            if not parameter.requires_grad:
                raise ArgumentError(f"parameter {name!r} was frozen after osculate.build; build the optimizer anew")
            if (parameter.dtype, parameter.device) != self._kind:
                raise ArgumentError(
                    f"parameter {name!r} is {parameter.dtype} on {parameter.device}, and the optimizer was built for "
                    f"{self._kind[0]} on {self._kind[1]}; build it after model.to(...)"
                )

    def _see(self, objective: _Evaluations) -> Sighted:
        """The first evaluation of a step."""
        if not self.method.needs_residuals:
            loss, gradient, residuals = objective.first_loss()
            if self._step < _LOOKS:
                objective.require_same_again(loss, residuals)
            return Sighted(loss, gradient, residuals)
        if not self._entries:
            blocks = objective.first_residuals()
            self._entries = sum(block.values.numel() for block in blocks)
        system = self.method.curvature.system
        implicit = system is not None and chosen_system(system, self._entries, sum(self._sizes)).matrix_free
        look = self._step < _LOOKS or self._step % 100 == 0
        found = objective.products() if implicit else objective.jacobian(look)
        if isinstance(found, Jacobian):
            rows, known = found.matrix(), found
            products, gradient = products_of(rows), rows.T @ found.slopes
        else:
            rows, known = None, found.known
            shape = (known.values.numel(), sum(self._sizes))
            products = Products(shape, found.times, found.transposed, known.values)
            gradient = found.transposed(known.slopes)
        self._entries = known.values.numel()
        if system is not None:
            chosen_system(system, self._entries, sum(self._sizes))
        self._require_finite(known.loss, gradient)
        if self._step < _LOOKS:
            objective.require_same_again(float(known.loss), known.values)
        return Sighted(float(known.loss), gradient, known.values, known.slopes, known.curvatures, rows, products)

    def _require_finite(self, loss: Tensor, gradient: Tensor) -> None:
        for name, value in (("the loss", loss), ("the gradient", gradient)):
            if not bool(value.isfinite().all()):
                raise NumericalError(f"{name} is not finite; no parameter and no state was changed")

    def _skip(self, trouble: str) -> Tensor:
        self.skipped_steps += 1
        self.last_report = StepReport(self._step, damping=float(self.param_groups[0]["damping"]), skipped=trouble)
        if self.on_nonfinite == "raise":
            raise NumericalError(f"step {self._step}: {trouble}")
        return self._parameters[0].new_tensor(math.nan)

    def _show_gradient(self, gradient: Tensor) -> None:
        """Leave the gradient where users look for it."""
        for parameter, piece in zip(self._parameters, gradient.split(self._sizes), strict=True):
            parameter.grad = piece.reshape(parameter.shape).clone()

    def _report(self, seen: Sighted, found: SearchOutcome, moved: bool) -> StepReport:
        length = float(found.step.norm()) if moved and found.step is not None else 0.0
        damping = found.numbers.get("damping", float(self.param_groups[0]["damping"]))
        sizes = {name: value for name, value in found.numbers.items() if name != "damping"} | {"norm": length}
        return StepReport(
            self._step, seen.loss, found.loss, sizes, damping, shortened=0 if moved else found.evaluations
        )


class _Evaluations:
    """The user's function along steps from where the parameters are; see :class:`.Objective`."""

    def __init__(self, optimizer: WholeModel, closure: Callable[[], Any]):
        self.optimizer, self.closure = optimizer, closure
        self._start = flattened([parameter.detach() for parameter in optimizer._parameters])
        self._modules = list(optimizer.model.modules())
        self._before = Snapshot.take(self._modules)
        self._after: Snapshot | None = None
        self._at_start = True
        self._layout: dict[str, torch.Size] | None = None  # shapes of the blocks, as they were seen first

    # -- at the start ------------------------------------------------------------------------------------------------

    def jacobian(self, look: bool) -> Jacobian:
        """Residuals with their Jacobian."""
        found: Jacobian = self._first(lambda: self.optimizer.reader.evaluate(self._evaluate, look=look))
        return found

    def products(self) -> Any:
        """Residuals with products of their Jacobian."""
        return self._first(lambda: self.optimizer.reader.products(self._evaluate, self.optimizer.model))

    def first_residuals(self) -> Any:
        """Residuals alone."""
        return self._first(lambda: evaluate_residuals(self._evaluate)[1])

    def first_loss(self) -> tuple[float, Tensor, Tensor | None]:
        """Loss and gradient of what need not be residuals."""
        loss, gradient, residuals = self._first(self._loss_and_gradient)
        self.optimizer._require_finite(loss, gradient)
        return float(loss), gradient, residuals

    def require_same_again(self, loss: float, residuals: Tensor | None) -> None:
        """Evaluate once more where the parameters are, and a third time where that differs by more than rounding.

        Args:
            loss: that was seen.
            residuals: (V,) that were seen; ``None`` for a loss that is not made of residuals.

        Raises:
            ArgumentError: if the function draws other points each time it is called, or moves the parameters.
        """
        known = self._start.new_tensor([loss]) if residuals is None else residuals.to(self._start.dtype)
        again = self._seen_again()
        if _alike(known, again) or _alike(again, self._seen_again()):
            return
        raise ArgumentError(
            "the function gives other values when it is called again at once, with the same parameters and torch's "
            "global random state put back; it must evaluate the same points each time it is called in one step: draw "
            "them outside of it, or by torch's global generator"
        )

    def _seen_again(self) -> Tensor:
        """(V,) residuals, or the loss, where the parameters are."""
        if not torch.equal(flattened([value.detach() for value in self.optimizer._parameters]), self._start):
            self._at_start = False  # they are put back
            raise ArgumentError(
                "the function moves the parameters of the model; it must only evaluate: take steps, also those of "
                "another optimizer, outside of it"
            )
        self._before.restore()
        found = self._run()
        if not isinstance(found, Mapping):
            return self._start.new_tensor([float(torch.as_tensor(found).detach())])
        return torch.cat([block.values.detach().flatten() for block in read_residuals(found)]).to(self._start.dtype)

    def _first(self, evaluate: Callable[[], Any]) -> Any:
        """Run what evaluates the function at the start, from the random state and the buffers of the start."""
        self._before.restore()
        result = evaluate()
        self._after = Snapshot.take(self._modules)
        return result

    # -- along a step ------------------------------------------------------------------------------------------------

    def move(self, step: Tensor) -> None:
        """Put the parameters there."""
        pieces = (self._start + step).split(self.optimizer._sizes)
        for parameter, piece in zip(self.optimizer._parameters, pieces, strict=True):
            parameter.copy_(piece.reshape(parameter.shape))
        self._at_start = False

    def loss(self, step: Tensor) -> float:
        """The loss after a step; infinity where it is not finite."""
        self.move(step)
        self._before.restore()
        found = self._run()
        loss = evaluate_residuals(lambda: found)[0] if isinstance(found, Mapping) else torch.as_tensor(found).detach()
        value = float(loss)
        return value if math.isfinite(value) else math.inf

    def residuals(self, step: Tensor) -> Tensor:
        """(V,) residuals after a step."""
        self.move(step)
        self._before.restore()
        blocks = read_residuals(self._run())
        return torch.cat([block.values.detach().flatten() for block in blocks]).to(self._start.dtype)

    def loss_and_gradient(self, step: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient after a step."""
        self.move(step)
        self._before.restore()
        loss, gradient, _ = self._loss_and_gradient()
        value = float(loss)
        if not (math.isfinite(value) and bool(gradient.isfinite().all())):
            return math.inf, torch.zeros_like(gradient)
        return value, gradient

    # -- the end of a step -------------------------------------------------------------------------------------------

    def go_back(self) -> None:
        """Parameters, random state and buffers as if the function had been evaluated once, or never if it failed."""
        if not self._at_start:
            pieces = self._start.split(self.optimizer._sizes)
            for parameter, piece in zip(self.optimizer._parameters, pieces, strict=True):
                parameter.copy_(piece.reshape(parameter.shape))
        self.leave()

    def leave(self) -> None:
        """Random state and buffers as the first evaluation has left them."""
        (self._before if self._after is None else self._after).restore()

    # -- the function ------------------------------------------------------------------------------------------------

    def _evaluate(self) -> Any:
        """For those who read residuals, perhaps twice."""
        self._before.restore()
        return self._run()

    def _run(self) -> Any:
        self.optimizer.gradient_evaluations += 1
        with torch.enable_grad():
            found = self.closure()
        return self._in_order(found) if isinstance(found, Mapping) else found

    def _in_order(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """The blocks in the order in which they were seen first in this step.

        Raises:
            ArgumentError: if they have other names or shapes.
        """
        shapes = {block.name: block.values.shape for block in read_residuals(found)}
        if self._layout is None:
            self._layout = shapes
        if shapes == self._layout:
            return {name: found[name] for name in self._layout}
        before, now = ({name: tuple(shape) for name, shape in each.items()} for each in (self._layout, shapes))
        raise ArgumentError(
            f"the function of residuals returned the blocks {before} and then {now} in one step; it must evaluate the "
            "same points each time it is called: draw them outside of it, or by torch's global generator"
        )

    def _loss_and_gradient(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of residuals by differentiation here, of a loss by the function's own backward."""
        parameters: Sequence[nn.Parameter] = self.optimizer._parameters
        for parameter in parameters:
            parameter.grad = None
        found = self._run()
        if isinstance(found, Mapping):
            with torch.enable_grad():
                loss, blocks = evaluate_residuals(lambda: found, graph=True)
                values = torch.cat([block.values.detach().flatten() for block in blocks])
                given: Sequence[Tensor | None] = ()
                if loss.requires_grad:
                    with explained():
                        given = torch.autograd.grad(loss, parameters, allow_unused=True)
                if all(value is None for value in given):
                    raise ArgumentError(
                        "the residuals do not depend on the model's parameters; compute them with the model that the "
                        "optimizer was built for, without torch.no_grad() and detach()"
                    )
            residuals: Tensor | None = values
            pieces = [v if v is not None else torch.zeros_like(p) for v, p in zip(given, parameters, strict=True)]
        else:
            if not (isinstance(found, Tensor) and found.numel() == 1) and not isinstance(found, float):
                raise ArgumentError(
                    "the function must return residuals by name, or the loss after loss.backward(); got "
                    f"{type(found).__name__}"
                )
            loss, residuals = torch.as_tensor(found).detach().reshape(()), None
            require_real(loss)
            if all(parameter.grad is None for parameter in parameters):
                raise ArgumentError(
                    "no parameter has a gradient; the function must call loss.backward(), or return residuals by name"
                )
            pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return loss.detach(), flattened([value.detach() for value in pieces]), residuals


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether the difference of two evaluations is one of rounding."""
    size = float(torch.maximum(first.abs().max(), second.abs().max()))
    return bool(torch.allclose(first, second, atol=1e-5 * size))
