"""The command ``compare-structures``: every registered structure against the exact curvature of one checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ... import registry
from ...analysis.quality.approximation import Effort
from ...analysis.quality.compared_structures import StructureQuality, compare_structures
from ...analysis.quality.exact_blocks import Target
from ...analysis.quality.quality_plots import structure_plots
from ...errors import ArgumentError
from ...framework.optimizer.second_order import SecondOrder
from ..problems import get_problem
from ..report.tables import print_table, write_rows
from ..runs.environment import prepare_process
from ..runs.records import RunFolder
from ..runs.reopen import copy_of, probes, reopen, saved_config
from ..runs.targets import require_folder
from ..runs.training import prepare
from ..runs.training_run import TrainingRun
from .flags import Place, ProblemFlags, StyleFlag
from .screen import say

__all__ = ["CompareStructures"]

_ROOM = 4 * 2**30
"""Bytes that the exact matrix of one layer may take."""

_MEANS = ("error_frobenius", "error_scaled", "cosine", "condition_before", "condition_after")
_SHOWN = {
    "structure": "structure",
    "error_frobenius": "error",
    "error_scaled": "error, best scale",
    "cosine": "cosine to exact",
    "condition_before": "condition",
    "condition_after": "preconditioned",
}


@dataclass(frozen=True, kw_only=True)
class CompareStructures(ProblemFlags, StyleFlag):
    """Compare all registered structures with the exact curvature at one checkpoint; print a table, best angle first.

    All get the same mini-batches at the same parameters: those of RUN's last checkpoint, or of a problem after a few
    steps. The folder gets structures.csv, one line per structure and layer, and structures.png, the best of each kind.
    """

    folder: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")] = None
    """Folder of a run. Default: a fresh network of --problem."""
    train_steps: int = 30
    """Steps of Adam before the comparison where no run is given."""
    structures: tuple[str, ...] = ()
    """Pieces of names, such as Kronecker: only structures that contain one. Default: all."""
    damping: float = 0.1
    """Of every structure and of the exact matrices, > 0."""
    samples: int = 100
    """Samples of a mini-batch."""
    history: int = 20
    """Mini-batches on which statistics are gathered."""
    targets: tuple[Target, ...] = ("ggn",)
    """Exact matrices to compare with; the table shows the first."""
    largest: int = 600
    """Layers with more parameters are left out."""
    out: Place = None
    """Folder to write. Default: RUN/structures, or runs/structures-PROBLEM where no run is given."""

    def run(self, console: Console) -> int:
        """Compare, print, write, and return the exit status."""
        from ..report.figures import save_figure
        from ..report.theorem_figures import plots_figure

        prepare_process()
        if not 0.0 < self.damping < math.inf:
            raise ArgumentError(f"damping must be a finite number > 0, got {self.damping!r}; the default is 0.1")
        if self.folder is not None:
            saved_config(RunFolder(self.folder))
        beside = Path("runs") / f"structures-{self.problem}" if self.folder is None else self.folder / "structures"
        out = self.out or beside
        require_folder(out, "structures.csv", "structures.png")
        chosen = self._structures()
        run = self._checkpoint()
        self._require_room(run)
        probe, *history = probes(run.problem, run.data, self.samples, 1 + self.history)
        effort = Effort(dense=self.largest, largest=self.largest)
        with console.status("measuring") as status:
            measured = compare_structures(
                copy_of(run),
                probe,
                history,
                damping=self.damping,
                targets=self.targets,
                structures=chosen,
                effort=effort,
                announce=status.update,
            )
            found = list(measured)
        self._print(found, console)
        rows = [{"structure": entry.structure} | block.as_dict() for entry in found for block in entry.blocks]
        write_rows(out / "structures.csv", rows)
        save_figure(plots_figure(structure_plots(found, self.targets[0])), out / "structures")
        say(console, f"table and figure lie in {out}")
        return 0

    def _require_room(self, run: TrainingRun) -> None:
        """Refuse exact matrices that would not fit, before any is made."""
        for layer in run.optimizer.layers if isinstance(run.optimizer, SecondOrder) else ():
            count = sum(parameter.numel() for parameter in layer.parameters.values())
            size = 8 * count**2
            if count <= self.largest and size > _ROOM:
                raise ArgumentError(
                    f"the exact matrix of layer {layer.name!r} ({count} parameters) takes {size / 1e9:,.0f} GB in "
                    f"double precision; leave it out with --largest {math.isqrt(_ROOM // 8)} or less"
                )

    def _structures(self) -> dict[str, Any]:
        table = registry.examples()["structure"]
        words = [word.lower() for word in self.structures]
        found = {name: part for name, part in table.items() if not words or any(w in name.lower() for w in words)}
        if not found:
            raise ArgumentError(f"no structure contains {' or '.join(self.structures)}; known: {', '.join(table)}")
        return found

    def _checkpoint(self) -> TrainingRun:
        if self.folder is not None:
            return reopen(RunFolder(self.folder), self.data_dir, device=self.device)
        config = self.config("adam")
        problem = get_problem(config.problem, **config.problem_options)
        run = prepare(config, problem, problem.load(self.data_dir))
        for _ in range(self.train_steps):
            run.step()
        return run

    def _print(self, found: list[StructureQuality], console: Console) -> None:
        target = self.targets[0]
        cosines = {entry.structure: entry.mean("cosine", target) for entry in found}
        ranked = sorted((entry for entry in found if entry.blocks), key=lambda entry: -cosines[entry.structure])
        measured = [
            {"structure": entry.structure} | {name: entry.mean(name, target) for name in _MEANS} for entry in ranked
        ]
        print_table(console, f"against the damped {target}, mean over layers", measured, _SHOWN)
        for entry in found:
            if entry.trouble:
                say(console, f"{entry.structure}: {entry.trouble}")
