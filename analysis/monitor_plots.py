"""What monitors saw, as plots; and the bounded-approximation experiment: eigenvalues during real training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..framework.build import build
from ..framework.optimizer import SecondOrder
from ..framework.published import kbfgs
from ..preconditioners.bfgs import BFGS
from ..preconditioners.kronecker import Kronecker
from ..preconditioners.pairs import (
    DoubleDamping,
    MergedDoubleDamping,
    NoDamping,
    PairDamping,
    PowellH,
    PowellThenLM,
)
from ..stepsize.guard import NoGuard
from .eigenvalue_monitor import EigenvalueBounds
from .readings import Memory, Reading, WatchCertificate
from .theorem import Curve, Inequality, Plot
from .watching import watch

__all__ = ["PAIR_DAMPINGS", "BoundedRun", "bounded_plots", "bounded_run", "read_readings", "reading_plots"]

PAIR_DAMPINGS: Mapping[str, PairDamping] = {
    "double damping": DoubleDamping(),
    "Powell, then LM": PowellThenLM(),
    "Powell on H": PowellH(),
    "merged": MergedDoubleDamping(),
    "none": NoDamping(),
}
"""The dampings of pairs that are compared."""


def read_readings(path: Path) -> list[Reading]:
    """Readings of a file that ``JsonLines`` wrote; a number that was not finite comes back as not-a-number.

    Raises:
        ArgumentError: if the file is missing or damaged.
    """
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            measured, bound = (float("nan") if entry[key] is None else entry[key] for key in ("measured", "bound"))
            inequality = Inequality(entry["claim"], measured, bound, entry["direction"])
            found.append(Reading(entry["step"], entry["monitor"], entry["layer"], inequality))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArgumentError(
            f"{path} cannot be read after line {len(found)} ({type(error).__name__}: {error}); watch the run again "
            "with osculate train --watch"
        ) from None
    return found


def reading_plots(readings: Iterable[Reading], monitor: str = "EigenvalueBounds") -> tuple[Plot, ...]:
    """One plot per claim and layer of a monitor: what was measured beside its bound, over steps."""
    grouped: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        if reading.monitor == monitor:
            grouped.setdefault((reading.layer, reading.inequality.name), []).append(reading)
    return tuple(_plot(f"{layer}: {claim}" if layer else claim, own) for (layer, claim), own in grouped.items())


def _plot(title: str, readings: Sequence[Reading]) -> Plot:
    steps = [float(entry.step) for entry in readings]
    measured = [entry.inequality.measured for entry in readings]
    bound = [entry.inequality.bound for entry in readings]
    curves = (Curve("measured", steps, measured), Curve("bound", steps, bound, "bound"))
    positive = all(value > 0.0 for value in (*measured, *bound))
    return Plot(title, "step", "", curves, y_log=positive)


@dataclass(frozen=True)
class BoundedRun:
    """One training run of the experiment: every reading, the certificate, and the training loss by step."""

    readings: list[Reading]
    certificate: WatchCertificate
    losses: list[float]


def bounded_run(pairs: PairDamping, *, steps: int = 150, damping: float = 0.3, seed: int = 0) -> BoundedRun:
    """Train a small autoencoder with K-BFGS and one damping of pairs, unguarded, and watch every H.

    The data are 400 points near a curved surface of dimension 3 in 16 dimensions, noise included; mini-batches of 50,
    tanh layers 16-10-3-10-16, float64.

    Args:
        pairs: how pairs are damped.
        steps: >= 1.
        damping: lambda; in (0, 1) for double damping.
        seed: of data, parameters and mini-batches.
    """
    generator = torch.Generator().manual_seed(seed)
    data, model = _surface(generator), _autoencoder(generator)
    optimizer = _optimizer(model, pairs, damping)
    memory, losses = Memory(), []
    with watch(optimizer, [EigenvalueBounds()], sinks=[memory]) as observed:
        for _ in range(steps):
            batch = data[torch.randperm(len(data), generator=generator)[:50]]
            losses.append(_train(optimizer, model, batch))
    return BoundedRun(memory.readings, observed.certificate(), losses)


def bounded_plots(runs: Mapping[str, BoundedRun]) -> tuple[Plot, ...]:
    """Largest and smallest eigenvalue over all layers' H_g, each beside its bound, and E of the input sides.

    Args:
        runs: by name of the damping of pairs.
    """
    shown = (
        ("lambda_max(H)", "largest eigenvalue of any H_g", max),
        ("lambda_min(H)", "smallest eigenvalue of any H_g", min),
        ("lambda_max(E)", "largest eigenvalue of any A^1/2 H_a A^1/2", max),
        ("lambda_min(E)", "smallest eigenvalue of any A^1/2 H_a A^1/2", min),
    )
    plots = []
    for claim, title, extreme in shown:
        curves = []
        for name, run in runs.items():
            by_step: dict[int, list[Inequality]] = {}
            for reading in run.readings:
                if reading.inequality.name == claim:
                    by_step.setdefault(reading.step, []).append(reading.inequality)
            steps = [float(step) for step in by_step]
            picked = [extreme(entries, key=lambda entry: entry.measured) for entries in by_step.values()]
            curves.append(Curve(name, steps, [entry.measured for entry in picked]))
            curves.append(Curve(f"{name}, bound", steps, [entry.bound for entry in picked], "bound"))
        plots.append(Plot(title, "step", claim, tuple(curves), y_log=True))
    return tuple(plots)


def _optimizer(model: nn.Module, pairs: PairDamping, damping: float) -> SecondOrder:
    base = kbfgs()
    assert isinstance(base.preconditioner, Kronecker)
    structure = replace(base.preconditioner, outputs=BFGS(pairs=pairs))
    return build(replace(base, preconditioner=structure, guard=NoGuard()), model, lr=0.1, damping=damping)


def _surface(generator: torch.Generator) -> Tensor:
    code = torch.randn(400, 3, dtype=torch.float64, generator=generator)
    mixing = torch.randn(6, 16, dtype=torch.float64, generator=generator)
    noise = 0.05 * torch.randn(400, 16, dtype=torch.float64, generator=generator)
    points: Tensor = torch.tanh(torch.cat([code, code.square() - 1.0], 1) @ mixing / 6**0.5) + noise
    return points


def _autoencoder(generator: torch.Generator) -> nn.Module:
    widths = (16, 10, 3, 10, 16)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out).double()
        with torch.no_grad():
            linear.weight.copy_(torch.randn(fan_out, fan_in, dtype=torch.float64, generator=generator) / fan_in**0.5)
            linear.bias.zero_()
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _train(optimizer: SecondOrder, model: nn.Module, batch: Tensor) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = 0.5 * (model(batch) - batch).square().sum() / len(batch)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss is not None
    return float(loss)
