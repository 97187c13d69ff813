"""The commands that look into a run: ``diagnose`` and ``microscope``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ..analysis.approximation import BlockQuality, Effort, measure_approximation
from ..analysis.exact_blocks import Target
from ..analysis.microscope import compare_steps
from ..analysis.monitor_plots import read_readings, reading_plots
from ..analysis.theorem import Curve, Plot
from ..framework.build import build
from .environment import prepare_process
from .records import RunFolder, write_json
from .reopen import copy_of, probes, reopen
from .tables import print_table, write_rows
from .targets import require_folder

__all__ = ["Diagnose", "Microscope"]

Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
Place = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_SHOWN = {
    "block": "layer",
    "target": "against",
    "parameters": "parameters",
    "error_frobenius": "error",
    "error_scaled": "error, best scale",
    "error_operator": "error, operator norm",
    "cosine": "cosine to exact",
    "cosine_gradient": "of the gradient",
    "condition_before": "condition",
    "condition_after": "preconditioned",
}
_STEPS = {
    "method": "method",
    "predicted": "predicted",
    "actual": "actual",
    "ratio": "ratio",
    "norm": "|p|",
    "best_multiple": "best multiple",
}


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Measure how well a run's preconditioner fits the exact curvature, layer by layer, and draw it.

    Goes over the checkpoints that 'osculate train --keep-checkpoints' kept and the last one; where 'train --watch' let
    monitors examine the run, what they saw is drawn too. The folder gets approximation.csv, approximation.png and,
    for a watched run, monitors.png.
    """

    folder: Run
    """Folder of a run."""
    samples: int = 100
    """Samples of the mini-batch that defines the exact curvature."""
    targets: tuple[Target, ...] = ("ggn", "hessian")
    """Exact matrices to compare with; the Gauss-Newton matrix is the Fisher matrix of these likelihoods."""
    dense: int = 600
    """Layers up to this many parameters are treated as dense matrices, larger ones through products."""
    largest: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Layers with more parameters are left out. Default: none is."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """cpu, cuda or cuda:N. Default: the run's own."""
    data_dir: Place = None
    """Folder with the data sets. Default: download, or generate."""
    out: Place = None
    """Folder to write. Default: RUN/diagnosis."""

    def run(self, console: Console) -> int:
        """Measure, print, draw, and return the exit status."""
        prepare_process()
        folder, out = RunFolder(self.folder), self.out or self.folder / "diagnosis"
        require_folder(out, "approximation.csv", "approximation.png", "monitors.png")
        rows: list[dict[str, Any]] = []
        last: list[BlockQuality] = []
        effort = Effort(self.dense, largest=self.largest)
        for source in self._sources(folder):
            run = reopen(folder, self.data_dir, source, self.device)
            (probe,) = probes(run.problem, run.data, self.samples, 1)
            last = measure_approximation(run.optimizer, probe, targets=self.targets, effort=effort)
            rows += [{"iterations": run.iterations} | quality.as_dict() for quality in last]
        write_rows(out / "approximation.csv", rows)
        title = f"{rows[-1]['part']} after {rows[-1]['iterations']} iterations" if rows else "nothing was measured"
        print_table(console, title, [quality.as_dict() for quality in last], _SHOWN)
        _draw(approximation_plots(rows), out / "approximation")
        if folder.monitors_file.exists():
            _draw(reading_plots(read_readings(folder.monitors_file)), out / "monitors")
        console.print(f"table and figures lie in {out}", highlight=False, markup=False, soft_wrap=True)
        return 0

    def _sources(self, folder: RunFolder) -> list[Path | None]:
        """Every kept checkpoint; the last one where none was kept."""
        return [*folder.kept_checkpoints()] or [None]


def approximation_plots(rows: Sequence[dict[str, Any]]) -> tuple[Plot, ...]:
    """Over iterations, one curve per layer: error at the best scale, cosine to the exact direction, conditions.

    Args:
        rows: of :class:`BlockQuality`, each with its ``iterations``.
    """
    shown = (
        ("error_scaled", "relative Frobenius error at the best scale", False),
        ("cosine", "cosine to the exact damped direction", False),
        ("condition_before", "condition number", True),
        ("condition_after", "condition number, preconditioned", True),
    )
    plots = []
    for target in dict.fromkeys(row["target"] for row in rows):
        for name, title, log in shown:
            curves = []
            for block in dict.fromkeys(row["block"] for row in rows):
                own = [row for row in rows if row["block"] == block and row["target"] == target]
                points = [(float(row["iterations"]), row[name]) for row in own if math.isfinite(row[name])]
                if points:
                    steps, values = zip(*points, strict=True)
                    curves.append(Curve(f"layer {block}", steps, values))
            plots.append(Plot(f"{target}: {title}", "iterations", name, tuple(curves), y_log=log and bool(curves)))
    return tuple(plots)


def _draw(plots: Sequence[Plot], stem: Path) -> None:
    from .figures import save_figure
    from .theorem_figures import plots_figure

    if plots:
        save_figure(plots_figure(plots), stem)


@dataclass(frozen=True, kw_only=True)
class Microscope:
    """Take one step of several methods from a run's last checkpoint, on the same mini-batch, and compare them.

    Each method first gathers statistics at the checkpoint, with the parameters put back after every step; the run's own
    method has those of the run. Predicted is the reduction of the loss in the quadratic model with the exact Hessian;
    the best multiple of a step minimises that model along it.

    The folder gets microscope.csv and microscope.json. Exit status: 0, or 1 if a method broke down.
    """

    folder: Run
    """Folder of a run."""
    methods: tuple[str, ...] = ("kbfgs", "kfac", "mbf", "adam")
    """Methods with their own defaults, separated by blanks; the run's own keeps the run's numbers."""
    history: int = 20
    """Mini-batches on which statistics are gathered first."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """cpu, cuda or cuda:N. Default: the run's own."""
    data_dir: Place = None
    """Folder with the data sets. Default: download, or generate."""
    out: Place = None
    """Folder to write. Default: RUN/microscope."""

    def run(self, console: Console) -> int:
        """Compare, print, write, and return the exit status."""
        prepare_process()
        out = self.out or self.folder / "microscope"
        require_folder(out, "microscope.csv", "microscope.json")
        run = reopen(RunFolder(self.folder), self.data_dir, device=self.device)
        optimizers = {
            name: run.optimizer
            if name == run.config.method
            else build(name, copy_of(run), likelihood=run.problem.likelihood, seed=run.config.seed)
            for name in self.methods
        }
        probe, *history = probes(run.problem, run.data, run.order.batch_size, 1 + self.history)
        found = compare_steps(optimizers, probe, history, [run.config.method])
        rows = [quality.as_dict() for quality in found]
        title = f"one step after {run.iterations} iterations of {run.config.method}, loss {found[0].loss:.5g}"
        angles = {f"cosine {name}": f"cos {name}" for name in self.methods}
        print_table(console, title, rows, _STEPS | angles)
        for quality in found:
            if quality.trouble:
                console.print(f"{quality.method} took no step: {quality.trouble}", markup=False, soft_wrap=True)
        write_rows(out / "microscope.csv", rows)
        write_json(out / "microscope.json", {"iterations": run.iterations, "steps": rows})
        console.print(f"table lies in {out}", highlight=False, markup=False, soft_wrap=True)
        return int(any(quality.trouble for quality in found))
