"""The commands that look into a run: ``diagnose`` and ``microscope``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...analysis.monitors.monitor_plots import read_readings, reading_plots
from ...analysis.quality.approximation import BlockQuality, Effort, ExactBlock, measure_approximation
from ...analysis.quality.exact_blocks import Target
from ...analysis.quality.microscope import compare_steps
from ...analysis.quality.quality_plots import approximation_plots, spectrum_plots, step_plots
from ...analysis.theorem import Plot
from ...errors import ArgumentError, require_positive_integer
from ...framework.optimizer.build import build
from ..report.tables import print_table, write_rows
from ..runs.environment import prepare_process
from ..runs.records import RunFolder, write_json
from ..runs.reopen import copy_of, probes, reopen, saved_config
from ..runs.targets import require_folder
from .flags import Count, Place, SavedRunFlags, StyleFlag
from .screen import say

__all__ = ["Diagnose", "Microscope"]

_SHOWN = {
    "block": "layer",
    "target": "against",
    "parameters": "parameters",
    "error_frobenius": "error",
    "error_scaled": "best scale",
    "error_operator": "operator norm",
    "cosine": "cosine",
    "cosine_gradient": "of the gradient",
    "condition_before": "condition",
    "condition_after": "after",
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
class Diagnose(SavedRunFlags, StyleFlag):
    """Measure how well a run's preconditioner fits the exact curvature, layer by layer, and draw it.

    Goes over the checkpoints that 'osculate train --keep-checkpoints' kept, else takes the last one. The folder gets
    approximation.csv, approximation.png, spectra.png (of the exact matrices at the last checkpoint) and, where
    'train --watch' let monitors examine the run, monitors.png.
    """

    samples: int = 100
    """Samples of the mini-batch that defines the exact curvature."""
    targets: tuple[Target, ...] = ("ggn",)
    """Exact matrices: ggn (the Fisher matrix of these likelihoods), hessian; equal in networks of rectified units."""
    dense: int = 600
    """Layers up to this many parameters are treated as dense matrices, larger ones through products."""
    largest: Count = None
    """Layers with more parameters are left out. Default: none is."""
    out: Place = None
    """Folder to write. Default: RUN/diagnosis."""

    def run(self, console: Console) -> int:
        """Measure, print, draw, and return the exit status."""
        prepare_process()
        folder, out = RunFolder(self.folder), self.out or self.folder / "diagnosis"
        saved_config(folder)
        readings = read_readings(folder.monitors_file) if folder.monitors_file.exists() else []
        require_folder(out, "approximation.csv", "approximation.png", "spectra.png", "monitors.png")
        rows: list[dict[str, Any]] = []
        last: list[BlockQuality] = []
        effort = Effort(self.dense, largest=self.largest)
        known: dict[tuple[str, tuple[str, ...], str], ExactBlock] = {}
        sources = self._sources(folder)
        for place, source in enumerate(sources, 1):
            run = reopen(folder, self.data_dir, source, self.device)
            (probe,) = probes(run.problem, run.data, self.samples, 1)
            known.clear()
            say(console, f"measuring after {run.iterations} iterations, checkpoint {place} of {len(sources)}")
            last = measure_approximation(run.composed, probe, targets=self.targets, effort=effort, known=known)
            rows += [{"iterations": run.iterations} | quality.as_dict() for quality in last]
        if not rows:
            raise ArgumentError(f"no layer was measured: none has at most {self.largest} parameters; raise --largest")
        write_rows(out / "approximation.csv", rows)
        title = f"{rows[-1]['part']} after {rows[-1]['iterations']} iterations"
        print_table(console, title, [quality.as_dict() for quality in last], _SHOWN)
        _draw(approximation_plots(rows), out / "approximation")
        _draw(spectrum_plots(known), out / "spectra")
        _draw(reading_plots(readings), out / "monitors")
        say(console, f"table and figures lie in {out}")
        return 0

    def _sources(self, folder: RunFolder) -> list[Path | None]:
        """Every kept checkpoint; the last one where none was kept."""
        return [*folder.kept_checkpoints()] or [None]


def _draw(plots: Sequence[Plot], stem: Path) -> None:
    """Save a figure; without plots remove that of an earlier measurement, which would pass for this one's."""
    from ..report.figures import save_figure
    from ..report.theorem_figures import plots_figure

    if plots:
        save_figure(plots_figure(plots), stem)
    else:
        for suffix in (".png", ".pdf"):
            stem.with_suffix(suffix).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Microscope(SavedRunFlags, StyleFlag):
    """Take one step of several methods from a run's last checkpoint, on the same mini-batch, and compare them.

    Each method first gathers statistics at the checkpoint, with the parameters put back after every step; the run's own
    method has those of the run. Predicted is the reduction of the loss in the quadratic model with the exact Hessian;
    the best multiple of a step minimises that model along it.

    The folder gets microscope.csv, microscope.json and microscope.png, the loss along every step. Exit status: 0, or 1
    if a method broke down.
    """

    methods: tuple[str, ...] = ("kbfgs", "kfac", "mbf", "adam")
    """Methods with their own defaults, separated by blanks; the run's own keeps the run's numbers."""
    history: int = 20
    """Mini-batches on which statistics are gathered first."""
    out: Place = None
    """Folder to write. Default: RUN/microscope."""

    def run(self, console: Console) -> int:
        """Compare, print, write, and return the exit status."""
        prepare_process()
        if not self.methods:
            raise ArgumentError("--methods needs at least one method, such as --methods kbfgs adam")
        require_positive_integer("history", self.history)
        saved_config(RunFolder(self.folder))
        out = self.out or self.folder / "microscope"
        require_folder(out, "microscope.csv", "microscope.json", "microscope.png")
        run = reopen(RunFolder(self.folder), self.data_dir, device=self.device)
        probe, *history = probes(run.problem, run.data, run.order.batch_size, 1 + self.history)
        optimizers = {
            name: run.composed
            if name == run.config.method
            else build(name, copy_of(run), likelihood=run.problem.likelihood, seed=run.config.seed)
            for name in self.methods
        }
        found = compare_steps(optimizers, probe, history, [run.config.method])
        rows = [quality.as_dict() for quality in found]
        title = f"one step after {run.iterations} iterations of {run.config.method}, loss {found[0].loss:.5g}"
        angles = {f"cosine {name}": f"cos {name}" for name in self.methods}
        print_table(console, title, rows, _STEPS | angles)
        for quality in found:
            if quality.trouble:
                say(console, f"{quality.method} took no step: {quality.trouble}")
        write_rows(out / "microscope.csv", rows)
        write_json(out / "microscope.json", {"iterations": run.iterations, "steps": rows})
        _draw(step_plots(found), out / "microscope")
        say(console, f"table and figure lie in {out}")
        return int(any(quality.trouble for quality in found))
