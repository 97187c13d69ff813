"""The face of a rival that a run sees: the one of the methods' optimizer, as far as a run needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, NumericalError
from ...framework.optimizer.report import StepReport
from ...framework.optimizer.second_order import SecondOrder
from ...framework.whole_model.optimizer import WholeModel
from .rival import Rival

__all__ = ["ForeignOptimizer", "evaluated"]

_RECALIBRATION_BATCHES = 50
"""Mini-batches that renew the running statistics of batch normalisation before an evaluation, as schedulefree's
documentation has it."""


class ForeignOptimizer:
    """A rival's optimizer of a model.

    The closure is evaluated here, once, and the package's ``step`` finds the gradients: what packages do with closures
    differs, and Mechanic 0.0.1 runs them without gradients.

    Args:
        rival: which.
        model: whose trainable parameters it moves.
        undecayed: patterns of names of parameters that weight decay leaves alone.
        given: keywords that are not left to the defaults.

    Raises:
        ArgumentError: the package is not installed, a keyword is unknown or out of range, or the rival cannot leave
            some parameters without decay.
    """

    has_warm_start = False

    def __init__(self, rival: Rival, model: nn.Module, given: Mapping[str, Any], undecayed: Sequence[str] = ()) -> None:
        self.rival, self.model = rival, model
        self.arguments = rival.arguments(model, given)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        decay = float(self.arguments["weight_decay"])
        spared = {name for name in named if decay and any(fnmatchcase(name, pattern) for pattern in undecayed)}
        if spared and rival.one_group:
            raise ArgumentError(
                f"{rival.name} has one step for one group of parameters, but this problem decays some of them only; "
                "use weight decay 0"
            )
        groups: list[dict[str, Any]] = [{"params": [named[name] for name in named if name not in spared]}]
        if spared:
            groups.append({"params": [named[name] for name in named if name in spared], "weight_decay": 0.0})
        self._decayed = frozenset(named) - spared
        self._parameters: list[Tensor] = list(named.values())
        self.inner: Any = rival.make(groups, self.arguments)
        self._averager: Any = None
        if rival.averager is not None and self.arguments.get("average"):
            self._averager = rival.averager(rival.load(), model)
        if rival.modes:
            self.inner.train()
        self.gradient_evaluations = 0
        self.last_report = StepReport(-1)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The package's own, with ``lr``."""
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.inner.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step.

        Args:
            closure: clears the gradients, runs the model and ``loss.backward()``, and returns the loss.

        Returns:
            The loss before the step.

        Raises:
            NumericalError: the loss is not finite, or the package gave up on the gradients. Where it is the loss, no
                parameter has changed.
        """
        with torch.enable_grad():
            loss = closure()
        self.gradient_evaluations += 1
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"the loss is {float(loss.detach())} after {self.last_report.step + 1} steps of {self.rival.name}"
            )
        if self.rival.every_gradient:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        try:
            self.inner.step(loss=loss.detach()) if self.rival.takes_loss else self.inner.step()
        except (AssertionError, ArithmeticError) as error:
            raise NumericalError(f"{self.rival.name} of {self.rival.distribution} gave up: {error}") from error
        if self._averager is not None:
            self._averager.step()
        self.last_report = StepReport(self.last_report.step + 1, loss.detach())
        return loss

    def penalty(self, model: nn.Module | None = None) -> Tensor:
        """What weight decay adds to the loss: half of it times the squared norm where it is a penalty, else 0.

        Args:
            model: with the parameters that are evaluated; ``None``: those that are trained.
        """
        parameters = dict((self.model if model is None else model).named_parameters())
        decay = float(self.arguments["weight_decay"])
        if not decay or not self.rival.coupled or self.arguments.get("decouple"):
            return self._parameters[0].detach().new_zeros(())
        chosen = [parameters[name].detach() for name in sorted(self._decayed)]
        return 0.5 * decay * torch.stack(torch._foreach_norm(chosen)).square().sum()

    @contextmanager
    def evaluated(self, batches: Callable[[], Iterable[Tensor]]) -> Iterator[nn.Module]:
        """The model that its authors evaluate, while the block lasts; training goes on as if nothing had been.

        Args:
            batches: inputs of mini-batches of the training data, for running statistics of batch normalisation.
        """
        if self.last_report.step < 0:
            yield self.model  # as every method shows it
        elif self._averager is not None:
            yield self._averager.averaged_model
        elif self.rival.modes:
            before = [parameter.detach().clone() for parameter in self._parameters]
            self.inner.eval()
            try:
                with _recalibrated(self.model, batches):
                    yield self.model
            finally:
                self.inner.train()
                with torch.no_grad():  # its own way back and forth rounds
                    torch._foreach_copy_(self._parameters, before)
        else:
            yield self.model

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue bit for bit."""
        places = {parameter: f"parameter {number}" for number, parameter in enumerate(self._parameters)}
        return {
            "optimizer": _renamed(self.inner.state_dict(), places),
            "attributes": {
                name: getattr(self.inner, name) for name in self.rival.attributes if hasattr(self.inner, name)
            },
            "average": None if self._averager is None else self._averager.state_dict(),
            "gradient_evaluations": self.gradient_evaluations,
            "step": self.last_report.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        places = {f"parameter {number}": parameter for number, parameter in enumerate(self._parameters)}
        self.inner.load_state_dict(_renamed(state["optimizer"], places))
        for name, value in state["attributes"].items():
            setattr(self.inner, name, value)
        if self._averager is not None:
            self._averager.load_state_dict(state["average"])
        self.gradient_evaluations = int(state["gradient_evaluations"])
        self.last_report = StepReport(int(state["step"]))

    def close(self) -> None:
        """Nothing was placed on the model."""


@contextmanager
def evaluated(
    optimizer: SecondOrder | WholeModel | ForeignOptimizer, model: nn.Module, batches: Callable[[], Iterable[Tensor]]
) -> Iterator[tuple[nn.Module, float]]:
    """The model that is to be evaluated and its weight penalty, while the block lasts.

    Args:
        optimizer: of ``model``.
        model: in training.
        batches: see :meth:`ForeignOptimizer.evaluated`.
    """
    if isinstance(optimizer, SecondOrder):
        yield model, float(optimizer.penalty())
        return
    if isinstance(optimizer, WholeModel):  # decay would be a block of residuals
        yield model, 0.0
        return
    with optimizer.evaluated(batches) as shown:
        yield shown, float(optimizer.penalty(shown))


@contextmanager
def _recalibrated(model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Running statistics of batch normalisation at the present parameters; afterwards all is as it was."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not layers:
        yield
        return
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    devices = sorted({buffer.device.index for buffer in buffers if buffer.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        for number, inputs in enumerate(batches()):
            if number == _RECALIBRATION_BATCHES:
                break
            model(inputs)
    try:
        yield
    finally:
        for buffer, earlier in zip(buffers, before, strict=True):
            buffer.copy_(earlier)


def _renamed(value: Any, names: Mapping[Any, Any]) -> Any:
    """Nested dictionaries with other keys: Mechanic's state has parameters for keys, which no file holds."""
    if isinstance(value, dict):
        return {(names.get(key, key)): _renamed(entry, names) for key, entry in value.items()}
    return value
