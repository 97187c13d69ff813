"""The command ``bounded-training``: eigenvalues of every quasi-Newton matrix beside their bounds, in real training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ... import registry
from ...analysis.monitors.monitor_plots import BoundedRun, bounded_plots, bounded_run
from ...errors import ArgumentError, require_positive_integer
from ..problems import Data, get_problem
from ..report.tables import print_table
from ..rivals.catalogue import runnable
from ..runs.config import parse_options
from ..runs.environment import prepare_process
from ..runs.records import write_json
from ..runs.targets import require_folder
from ..runs.training import prepare
from .flags import Options, ProblemFlags, StyleFlag
from .screen import say

__all__ = ["BoundedTraining"]

_FILES = ("bounded.json", "bounded.png", "bounded.pdf")


@dataclass(frozen=True, kw_only=True)
class BoundedTraining(ProblemFlags, StyleFlag):
    """Train an autoencoder with every damping of secant pairs and check every bound on every H on the way.

    BFGS updates are checked against U1 to U4, L-BFGS(p) against its uniform bounds, the input factors for interlacing;
    a constant that a damping does not promise is measured pair by pair. The folder gets bounded.json and bounded.png.
    Exit status: 0 if every bound held, else 1.
    """

    methods: tuple[str, ...] = ("kbfgs", "kbfgs-l")
    """Methods with quasi-Newton factors, separated by blanks."""
    pairs: tuple[str, ...] = ("double", "powell-then-lm", "powell-h", "merged", "powell-b0", "none")
    """Dampings of pairs, as the methods name them."""
    option: Options = ()
    """Further keyword of every method: --option growth=inf."""
    train_steps: int = 100
    """Steps of each run."""
    every: int = 5
    """Steps between two examinations."""
    out: Path = Path("runs/bounded-training")
    """Folder to write."""

    def run(self, console: Console) -> int:
        """Train, print, draw, and return the exit status."""
        from ..report.figures import save_figure
        from ..report.theorem_figures import plots_figure

        prepare_process()
        require_positive_integer("train_steps", self.train_steps)
        require_folder(self.out, *_FILES)
        taking = [name for name, entry in registry.methods().items() if "pairs" in entry.options]
        for method in self.methods:
            if method in runnable() and method not in taking:
                raise ArgumentError(f"{method} has no damping of pairs to vary; methods that have: {', '.join(taking)}")
        options = parse_options(self.problem_option)
        data = get_problem(self.problem, **options).load(self.data_dir)
        found: dict[str, dict[str, BoundedRun]] = {}
        for method in self.methods:
            for pairs in self.pairs:
                with console.status(f"{method}, pairs {pairs}"):
                    found.setdefault(method, {})[pairs] = self._train(method, pairs, data)
        ok = self._print(found, console)
        runs = {method: {name: run.as_dict() for name, run in own.items()} for method, own in found.items()}
        write_json(self.out / "bounded.json", {"ok": ok, "problem": self.problem, "runs": runs})
        plots = [plot for method, own in found.items() for plot in bounded_plots(own, method)]
        save_figure(plots_figure(plots), self.out / "bounded")
        say(console, f"numbers and figure lie in {self.out}")
        return int(not ok)

    def _train(self, method: str, pairs: str, data: Data) -> BoundedRun:
        config = self.config(method, method_options=parse_options(self.option) | {"pairs": pairs})
        run = prepare(config, get_problem(self.problem, **config.problem_options), data)

        def step() -> float:
            run.step()
            assert run.last_loss is not None
            return float(run.last_loss)

        result = bounded_run(run.composed, step, steps=self.train_steps, every=self.every)
        if not result.readings:
            raise ArgumentError(f"{method} has no quasi-Newton matrix to examine; take kbfgs or kbfgs-l")
        return result

    def _print(self, found: dict[str, dict[str, BoundedRun]], console: Console) -> bool:
        rows = [
            {
                "method": method,
                "pairs": pairs,
                "loss": run.losses[-1] if run.losses else None,
                "high": _extreme(run, "lambda_max(H)", max),
                "low": _extreme(run, "lambda_min(H)", min),
                "readings": len(run.readings),
                "bounds": "held" if run.certificate.ok else "VIOLATED",
            }
            for method, own in found.items()
            for pairs, run in own.items()
        ]
        print_table(console, f"{self.problem}, {self.train_steps} steps", rows, _SHOWN)
        for method, own in found.items():
            for pairs, run in own.items():
                lines = [f"{entry.claim}: {entry.describe()}" for entry in run.certificate.violated]
                if run.trouble:
                    lines.append(f"ended early: {run.trouble}")
                for line in lines:
                    say(console, f"{method}, pairs {pairs}: {line}")
        return all(run.certificate.ok for own in found.values() for run in own.values())


_SHOWN = {
    "method": "method",
    "pairs": "damping of pairs",
    "loss": "last loss",
    "high": "largest eigenvalue of H_g",
    "low": "smallest",
    "readings": "inequalities",
    "bounds": "bounds",
}


def _extreme(run: BoundedRun, claim: str, pick: Callable[..., float]) -> float:
    values = [entry.inequality.measured for entry in run.readings if entry.inequality.name == claim]
    return float(pick(values, default=float("nan")))
