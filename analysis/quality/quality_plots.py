"""What the meter and the microscope measured, as plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..theorem import Curve, Plot
from .approximation import ExactBlock
from .compared_structures import StructureQuality
from .microscope import MULTIPLES, StepQuality
from .spectra import spectral_density

__all__ = ["approximation_plots", "spectrum_plots", "step_plots", "structure_plots"]

_SHOWN = (
    ("error_scaled", "relative Frobenius error at the best scale", False),
    ("cosine", "cosine to the exact damped direction", False),
    ("condition_before", "condition number", True),
    ("condition_after", "condition number, preconditioned", True),
)


def approximation_plots(rows: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Error at the best scale, cosine to the exact direction, conditions: over iterations, one curve per layer.

    Over the layers instead, in their order, where there is one checkpoint only.

    Args:
        rows: of :class:`BlockQuality`, each with its ``iterations``.
    """
    single = len({row["iterations"] for row in rows}) == 1
    label = "layer, in the order of the network" if single else "iterations"
    plots = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        for name, title, log in _SHOWN:
            curves = _over_layers(own, name) if single else _over_iterations(own, name)
            plots.append(Plot(f"{target}: {title}", label, name, tuple(curves), y_log=log and bool(curves)))
    return tuple(plots)


def _over_layers(rows: Sequence[Mapping[str, Any]], name: str) -> list[Curve]:
    return [Curve("measured", range(1, len(rows) + 1), [row[name] for row in rows])]


def _over_iterations(rows: Sequence[Mapping[str, Any]], name: str) -> list[Curve]:
    curves = []
    for block in dict.fromkeys(row["block"] for row in rows):
        points = [(float(row["iterations"]), row[name]) for row in rows if row["block"] == block]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(f"layer {block}", steps, values))
    return curves


def spectrum_plots(
    known: Mapping[tuple[str, tuple[str, ...], str], ExactBlock], probes: int = 4, steps: int = 40
) -> tuple[Plot, ...]:
    """Share of the eigenvalues whose modulus exceeds a value, by stochastic Lanczos quadrature; one plot per target.

    Args:
        known: exact matrices, as :func:`measure_approximation` leaves them.
        probes: random start vectors, >= 1.
        steps: of Lanczos' iteration from each, >= 1.
    """
    plots = []
    for target in dict.fromkeys(key[2] for key in known):
        curves = []
        for (layer, names, _), exact in ((key, value) for key, value in known.items() if key[2] == target):
            density = spectral_density(exact.matrix, probes=probes, steps=steps)
            nodes, order = density.nodes.abs().sort(descending=True)
            share = torch.cumsum(density.weights[order], 0)
            title = f"layer {layer}" if len(names) > 1 else f"layer {layer} {names[0]}"
            curves.append(Curve(title, nodes.tolist(), share.tolist()))
        plots.append(Plot(f"{target}: spectrum", "|eigenvalue|", "share above", tuple(curves), x_log=True, y_log=True))
    return tuple(plots)


def step_plots(found: Sequence[StepQuality]) -> tuple[Plot, ...]:
    """Loss along every step, with its quadratic model as a broken line.

    Args:
        found: of :func:`compare_steps`.
    """
    curves = []
    for quality in found:
        if quality.along is not None:
            model = [quality.loss + c * quality.slope + 0.5 * c * c * quality.curvature for c in MULTIPLES]
            curves += [
                Curve(quality.method, MULTIPLES, quality.along),
                Curve(f"{quality.method}, model", MULTIPLES, model, "bound"),
            ]
    title = "loss along each step; broken: quadratic model"
    return (Plot(title, "multiple of the step", "loss of the mini-batch", tuple(curves)),)


def structure_plots(found: Sequence[StructureQuality], target: str) -> tuple[Plot, ...]:
    """Over the layers, the structure of each kind whose direction is closest to the exact one on average.

    Args:
        found: of :func:`compare_structures`.
        target: ``"ggn"`` or ``"hessian"``.
    """
    best: dict[str, StructureQuality] = {}
    for entry in sorted(found, key=lambda entry: entry.mean("cosine", target)):
        if math.isfinite(entry.mean("cosine", target)):
            best[entry.structure.split("(")[0]] = entry
    plots = []
    for name, title, log in _SHOWN[:2] + _SHOWN[3:]:
        curves = []
        for entry in sorted(best.values(), key=lambda entry: -entry.mean("cosine", target)):
            values = [getattr(block, name) for block in entry.blocks if block.target == target]
            curves.append(Curve(entry.structure, range(1, len(values) + 1), values))
        plots.append(Plot(f"{target}: {title}", "layer, in the order of the network", name, tuple(curves), y_log=log))
    return tuple(plots)
