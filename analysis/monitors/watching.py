"""Attaching monitors to an optimizer, in any loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from ...errors import ArgumentError, require_positive_integer
from ...framework.optimizer.observers import StepTrace
from ...framework.optimizer.second_order import SecondOrder
from .eigenvalue_monitor import EigenvalueBounds
from .monitors import Descent, Moment, Monitor, PairCurvature, RelativeStep, SecantEquation, StepSizeCurvature
from .readings import Finding, Sink, WatchCertificate, gather
from .updates import remembered, updates_of

__all__ = ["Watch", "default_monitors", "watch"]


def default_monitors() -> tuple[Monitor, ...]:
    """All monitors with their own numbers."""
    return (
        SecantEquation(),
        PairCurvature(),
        EigenvalueBounds(),
        Descent(),
        StepSizeCurvature(),
        RelativeStep(),
    )


class Watch:
    """Monitors at work, an observer of one optimizer; made by :func:`watch`.

    Args:
        monitors: what is examined.
        sinks: where readings go.
        every: steps between two examinations, >= 1.
    """

    def __init__(self, monitors: Sequence[Monitor], sinks: Sequence[Sink], every: int):
        self.monitors, self.sinks, self.every = tuple(monitors), tuple(sinks), every
        self.steps = 0
        self._found: dict[tuple[str, str], Finding] = {}
        self._optimizer: SecondOrder | None = None
        self._skipped_before = self._skipped = 0
        self._states: dict[str, Any] | None = None
        self._origin: dict[str, tuple[Tensor, ...]] = {}

    def attach(self, optimizer: SecondOrder) -> None:
        """Start watching.

        Raises:
            ArgumentError: if it watches an optimizer already.
        """
        if self._optimizer is not None:
            raise ArgumentError("this watch is attached to an optimizer already; make another one with watch(...)")
        self._optimizer, self._skipped_before = optimizer, optimizer.skipped_steps
        optimizer.observers.append(self)

    def close(self) -> None:
        """Stop watching and close the sinks; the certificate stays. Twice does no harm."""
        if self._optimizer is not None:
            self._skipped += self._optimizer.skipped_steps - self._skipped_before
            self._optimizer.observers.remove(self)
            self._optimizer = None
            for sink in self.sinks:
                sink.close()
        self._states, self._origin = None, {}

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def before_step(self, optimizer: SecondOrder) -> None:
        """Copy what this step will change, if the step is examined."""
        self._states, self._origin = None, {}
        if optimizer._step % self.every:
            return
        self._states = remembered(optimizer.own_blocks) if self._wants("reads_updates") else {}
        if self._wants("reads_moves"):
            self._origin = {
                block.key: tuple(parameter.detach().clone() for parameter in block.parameters)
                for block in optimizer.own_blocks
            }

    def after_step(self, optimizer: SecondOrder, trace: StepTrace) -> None:
        """Ask every monitor."""
        states, blocks = self._states, optimizer.own_blocks
        if states is None:
            return
        self.steps += 1
        moment = Moment(trace.report, tuple(blocks), self._origin, lambda: updates_of(blocks, states, trace))
        for monitor in self.monitors:
            for reading in monitor.examine(moment):
                gather(self._found, reading)
                for sink in self.sinks:
                    sink.write(reading)
        self._states, self._origin = None, {}

    def certificate(self) -> WatchCertificate:
        """How every monitor has fared so far."""
        skipped = self._skipped
        if self._optimizer is not None:
            skipped += self._optimizer.skipped_steps - self._skipped_before
        names = tuple(dict.fromkeys(type(monitor).__name__ for monitor in self.monitors))
        return WatchCertificate(names, tuple(self._found.values()), self.steps, skipped)

    def _wants(self, what: str) -> bool:
        return any(getattr(monitor, what, False) for monitor in self.monitors)


def watch(
    optimizer: SecondOrder,
    monitors: Iterable[Monitor] | None = None,
    *,
    sinks: Iterable[Sink] = (),
    every: int = 1,
) -> Watch:
    """Attach monitors to an optimizer; the loop stays as it is.

    Nothing is computed for an optimizer that nobody watches, and nothing after :meth:`Watch.close`. While it is
    watched, an examined step fetches numbers from the device.

    Args:
        optimizer: any that :func:`osculate.build` made.
        monitors: ``None``: all of :func:`default_monitors`.
        sinks: ``JsonLines(path)``, ``TensorBoard(folder)``, ``Memory()``.
        every: examine the steps whose number is a multiple of it, >= 1.

    Returns:
        The watch, a context manager.

    Raises:
        ArgumentError: for anything that is no monitor, no sink or no optimizer of this package.

    Example:
        >>> import torch, osculate as osc
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = osc.build("kbfgs", model, lr=0.1, damping=0.3)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 3)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> with osc.analysis.watch(optimizer, [osc.analysis.SecantEquation()]) as watch:
        ...     loss = optimizer.step(closure)
        >>> watch.certificate().ok
        True
    """
    require_positive_integer("every", every)
    if not isinstance(optimizer, SecondOrder):
        raise ArgumentError(f"watch takes an optimizer that osculate.build made, got {type(optimizer).__name__}")
    chosen = default_monitors() if monitors is None else tuple(monitors)
    for monitor in chosen:
        if isinstance(monitor, type) or not callable(getattr(monitor, "examine", None)):
            raise ArgumentError(f"a monitor has a method 'examine', got {monitor!r}; a class needs its parentheses")
    places = tuple(sinks)
    for sink in places:
        if isinstance(sink, type) or not all(callable(getattr(sink, name, None)) for name in ("write", "close")):
            raise ArgumentError(f"a sink has methods 'write' and 'close', got {sink!r}; for a file JsonLines(path)")
    result = Watch(chosen, places, every)
    result.attach(optimizer)
    return result
