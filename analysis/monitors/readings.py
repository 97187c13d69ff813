"""What monitors produce: readings, where they are streamed to, and the certificate they add up to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from ...errors import ArgumentError, NumericalError
from ..theorem import Inequality

__all__ = ["Finding", "JsonLines", "Memory", "Reading", "Sink", "TensorBoard", "WatchCertificate", "gather"]


@dataclass(frozen=True)
class Reading:
    """One inequality, measured at one step.

    Attributes:
        step: of the optimizer, from 0.
        monitor: which made it.
        layer: and side, e.g. ``"0 outputs"``; empty for the whole model.
        inequality: what was measured, the bound, and the rounding that is allowed for.
    """

    step: int
    monitor: str
    layer: str
    inequality: Inequality

    def as_dict(self) -> dict[str, Any]:
        """Plain values for one JSON line; infinities and not-a-number become null."""
        entry = self.inequality
        return {
            "step": self.step,
            "monitor": self.monitor,
            "layer": self.layer,
            "claim": entry.name,
            "measured": _finite(entry.measured),
            "direction": entry.direction,
            "bound": _finite(entry.bound),
            "tolerance": _finite(entry.tolerance),
            "holds": entry.holds,
        }


class Sink(Protocol):
    """Where readings go while the optimizer runs."""

    def write(self, reading: Reading) -> None:
        """Take one reading."""

    def close(self) -> None:
        """Nothing more will come."""


@dataclass
class Memory:
    """Keeps every reading: for figures and tests. Grows with the run."""

    readings: list[Reading] = field(default_factory=list)

    def write(self, reading: Reading) -> None:
        """Keep it."""
        self.readings.append(reading)

    def close(self) -> None:
        """Nothing to do."""


class JsonLines:
    """One JSON object per reading, appended to a file line by line, see :meth:`Reading.as_dict`.

    Args:
        path: the file; its folder must exist.

    Raises:
        ArgumentError: if the folder does not.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise ArgumentError(
                f"JsonLines({str(path)!r}): there is no folder {str(self.path.parent)!r}; make it first"
            )
        self._file: TextIO | None = None

    def write(self, reading: Reading) -> None:
        """Append a line; the first one opens the file."""
        if self._file is None:
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._file.write(json.dumps(reading.as_dict(), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file; a later reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard:
    """Scalars ``monitor/claim/layer`` and, beside each, ``.../bound``; any others with :meth:`scalar`.

    Args:
        folder: of the event files.
        purge: step from which on TensorBoard forgets what earlier event files of the folder say, >= 0, for a run that
            goes back to a checkpoint; ``None``: nothing.

    Raises:
        ArgumentError: if the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path | str, purge: int | None = None):
        self._writer: Any = self.require()(str(folder), purge_step=purge)

    @staticmethod
    def require() -> type[Any]:
        """Return torch's ``SummaryWriter``, before anything is computed that it should write.

        Raises:
            ArgumentError: if the package ``tensorboard`` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                f"TensorBoard needs the package tensorboard, which cannot be imported ({error}); install it, or do "
                "without: JSON lines (JsonLines(path), and every run's metrics.jsonl) hold the same numbers"
            ) from None
        return SummaryWriter

    def scalar(self, name: str, value: float, step: int) -> None:
        """One scalar."""
        self._writer.add_scalar(name, value, step)

    def write(self, reading: Reading) -> None:
        """Two scalars."""
        name = "/".join(part for part in (reading.monitor, reading.inequality.name, reading.layer) if part)
        self.scalar(name, reading.inequality.measured, reading.step)
        self.scalar(f"{name}/bound", reading.inequality.bound, reading.step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


@dataclass
class Finding:
    """What became of one claim of one monitor over a run.

    Attributes:
        monitor: its name.
        claim: name of the inequality.
        readings: how many there were.
        violations: how many of them failed.
        worst: the reading with the smallest margin; one that is not finite before all others.
        first: the first violation, or ``None``.
    """

    monitor: str
    claim: str
    worst: Reading
    readings: int = 0
    violations: int = 0
    first: Reading | None = None

    def take(self, reading: Reading) -> None:
        """Count one reading."""
        self.readings += 1
        if not reading.inequality.holds:
            self.violations += 1
            self.first = self.first or reading
        if _margin(reading) < _margin(self.worst):
            self.worst = reading

    @property
    def held(self) -> bool:
        """Whether every reading held."""
        return self.violations == 0

    def describe(self) -> str:
        """One line: held with the smallest margin, or violated first where, and by how much."""
        if self.first is None:
            margin = _margin(self.worst)
            rounding = " (up to rounding)" if margin < 0.0 else ""
            return f"held in {self.readings} readings, smallest margin {margin:.3g}{rounding}{_place(self.worst)}"
        return (
            f"VIOLATED in {self.violations} of {self.readings} readings, first{_place(self.first)}: "
            f"{_values(self.first)}; worst{_place(self.worst)}: {_values(self.worst)}"
        )


def gather(found: dict[tuple[str, str], Finding], reading: Reading) -> None:
    """Add a reading to what its monitor and claim have found."""
    key = (reading.monitor, reading.inequality.name)
    found.setdefault(key, Finding(*key, worst=reading)).take(reading)


@dataclass(frozen=True)
class WatchCertificate:
    """How every monitor fared.

    Attributes:
        monitors: names of all that watched.
        findings: one per claim.
        steps: how many steps were examined.
        skipped: how many steps the optimizer refused meanwhile because something was not finite.
    """

    monitors: tuple[str, ...]
    findings: tuple[Finding, ...]
    steps: int
    skipped: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was violated."""
        return all(finding.held for finding in self.findings)

    @property
    def violated(self) -> tuple[Finding, ...]:
        """The claims that failed."""
        return tuple(finding for finding in self.findings if not finding.held)

    def lines(self) -> Iterator[str]:
        """One line per claim, and one per monitor that found nothing to examine."""
        skipped = f", {self.skipped} steps were skipped as not finite" if self.skipped else ""
        yield f"{self.steps} steps examined{skipped}"
        for name in self.monitors:
            own = [finding for finding in self.findings if finding.monitor == name]
            for finding in own:
                yield f"{name}: {finding.claim}: {finding.describe()}"
            if not own:
                yield f"{name}: not applicable, nothing to examine"

    def summary(self) -> str:
        """All lines."""
        return "\n".join(self.lines())

    def require(self) -> None:
        """Raise if something was violated, or if nothing was examined.

        Raises:
            NumericalError: naming every violated claim with step, layer and values.
            ArgumentError: if no monitor found anything to examine: what nobody looked at is not certified.
        """
        if not self.findings:
            raise ArgumentError(
                f"nothing was examined in {self.steps} steps by {', '.join(self.monitors)}; attach the watch before "
                "the steps, to an optimizer that has what its monitors examine"
            )
        if not self.ok:
            listed = "; ".join(f"{entry.monitor}: {entry.claim}: {entry.describe()}" for entry in self.violated)
            raise NumericalError(f"monitors found violations: {listed}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ok": self.ok,
            "steps": self.steps,
            "skipped": self.skipped,
            "monitors": list(self.monitors),
            "claims": [
                {
                    "monitor": entry.monitor,
                    "claim": entry.claim,
                    "held": entry.held,
                    "readings": entry.readings,
                    "violations": entry.violations,
                    "worst": entry.worst.as_dict(),
                    "first_violation": None if entry.first is None else entry.first.as_dict(),
                }
                for entry in self.findings
            ],
        }


def _margin(reading: Reading) -> float:
    if not math.isfinite(reading.inequality.measured):
        return -math.inf
    margin = reading.inequality.margin
    return margin if math.isfinite(margin) else math.inf


def _place(reading: Reading) -> str:
    layer = f" on layer {reading.layer}" if reading.layer else ""
    return f" at step {reading.step}{layer}"


def _values(reading: Reading) -> str:
    entry = reading.inequality
    return f"{entry.measured:.6g}, must be {entry.direction} {entry.bound:.6g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
