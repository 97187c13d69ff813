"""The commands that run something: each a dataclass whose fields are its flags; ``run`` returns the exit status."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ...errors import ArgumentError
from ..data.datafiles import data_folder
from ..problems import get_problem
from ..report.tables import screen_table
from ..rivals.catalogue import runnable
from ..runs.config import Budget, RunConfig, WarmStart, parse_options
from ..runs.environment import prepare_process
from ..runs.records import RunFolder
from ..runs.runs import Resume, default_folder, run_in_folder
from ..runs.targets import require_folder, writing
from ..runs.watched import Extras
from .flags import Count, Number, Options, Place, ProblemFlags, Schedules, StyleFlag
from .screen import say

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Compare", "Replay", "Train"]

DEFAULT_METHODS = (
    *("kbfgs", "kbfgs-l", "mbf", "lw-sgdm", "lw-adamw", "joint-kfac", "joint-kfac-noise-aware"),
    *("kfac", "soap", "muon", "adam", "sgdm"),
)
SHOWN = ["method", "train loss", "test loss", "relative L2", "accuracy", "epochs", "ms/step", "note"]
FILES = tuple(f"comparison.{ending}" for ending in ("json", "csv", "png", "pdf"))
_STATUS = {"finished": 0, "broken down": 1, "no step taken": 1, "interrupted": 130}


@dataclass(frozen=True, kw_only=True)
class Common(ProblemFlags):
    """Flags that train and compare share."""

    lr: Number = None
    """Learning rate. Default: the method's own."""
    damping: Number = None
    """Damping. Default: the method's own."""
    weight_decay: Number = None
    """Weight decay. Default: the method's own."""
    lr_schedule: Schedules = None
    """How the learning rate declines over --epochs (without them, over --seconds): cosine or linear to zero, or
    constant. Default: it does not change."""
    lr_warm_up: float = 0.0
    """Share of the run over which the learning rate rises linearly first."""
    batch_size: Count = None
    """Samples in a mini-batch. Default: the problem's own."""
    threads: Count = None
    """Threads of one operation on the CPU. Default: torch's own choice."""
    out: Place = None
    """Folder to write. Default: a folder below runs/, named by what is run."""
    warm_start: WarmStart = WarmStart.AUTO
    """Whether a method with an initial pass over the data runs it."""
    option: Options = ()
    """Further keyword of the method: --option statistics_every=2; 'osculate methods NAME' lists them."""

    def prepare(self) -> None:
        """Check the data folder and set what holds for the whole process."""
        if self.data_dir is not None:
            data_folder(self.data_dir)
        prepare_process(self.threads)

    def configured(self, method: str, method_options: dict[str, Any]) -> RunConfig:
        """Return the configuration these flags describe."""
        numbers = {"lr": self.lr, "damping": self.damping, "weight_decay": self.weight_decay}
        given: dict[str, Any] = {"lr_schedule": self.lr_schedule, "lr_warm_up": self.lr_warm_up}
        given |= {"batch_size": self.batch_size, "warm_start": self.warm_start, "method_options": method_options}
        return self.config(method, **numbers, **given)


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train one problem with one method; the run is written to a folder and can be continued.

    Exit status: 0 finished, 1 the method broke down or the time was over before its first step, 2 bad input, 130
    interrupted by Ctrl-C.
    """

    method: str = "kbfgs"
    """Method; 'osculate methods' lists them."""
    epochs: Count = None
    """Passes over the training data, those before a continuation included. Default: no bound where --seconds is given,
    else the problem's own."""
    seconds: Number = None
    """Training time in seconds, warm start included, evaluation excluded. Default: no bound."""
    resume: Resume = Resume.AUTO
    """What to do with a run already in the folder: continue it, start over, or insist on continuing."""
    watch: bool = False
    """Let monitors examine the run: readings go to monitors.jsonl, and their certificate is printed."""
    watch_every: int = 10
    """Steps between two examinations with --watch."""
    keep_checkpoints: bool = False
    """Keep the checkpoint of every evaluation, for 'osculate diagnose'."""
    tensorboard: bool = False
    """Write the numbers of every evaluation, and the monitors' readings, for TensorBoard (needs tensorboard) too."""

    def run(self, console: Console) -> int:
        """Train, show where the run lies, and return the exit status."""
        extras = Extras(self.watch_every if self.watch else None, self.keep_checkpoints, tensorboard=self.tensorboard)
        self.prepare()
        options = parse_options(self.option)
        for name in options:
            owner, dot, own = name.partition(".")
            if dot and owner.replace("_", "-") in runnable():
                raise ArgumentError(
                    f"--option {name}=... names a method, as 'osculate compare' takes it; there is one here: write "
                    f"--option {own}=..., or 'osculate train --help' for flags such as --lr"
                )
        config = self.configured(self.method, options)
        epochs = self.epochs
        if epochs is None and self.seconds is None:
            epochs = get_problem(config.problem, **config.problem_options).epochs
        budget = Budget(epochs, self.seconds)
        folder = RunFolder(self.out or default_folder(config))
        result = run_in_folder(config, budget, folder, self.data_dir, self.resume, console, extras)
        if result.certificate is not None:
            say(console, result.certificate.summary())
        reason = f": {result.reason}" if result.status == "no step taken" else ""
        idle = ", no step was asked for" if result.status == "finished" and epochs == 0 else ""
        line = f"{result.status}{reason}{idle}; the run lies in {folder.path}"
        say(console, line)
        return _STATUS[result.status]


@dataclass(frozen=True, kw_only=True)
class Compare(Common, StyleFlag):
    """Race several methods, each for the same training time; print a table and draw the figure.

    All start from the same parameters and see the same mini-batches. The folder gets comparison.png,
    comparison.pdf, comparison.csv and comparison.json. One method's keyword: --option kbfgs.lr=0.1.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods, separated by blanks; 'osculate methods' lists them."""
    seconds: float = 5.0
    """Training time of each method in seconds, warm start included, evaluation excluded."""
    epochs: Count = None
    """Passes over the training data after which a method stops early. Default: no bound."""
    resume: Resume = Resume.NEVER
    """Whether curves already in the folder, of the same configuration, are kept instead of run again."""

    def run(self, console: Console) -> int:
        """Race, print, draw, and return the exit status."""
        from ..report.comparison_figure import comparison_figure
        from ..report.figures import save_figure
        from ..runs.comparison import compare, comparison_table, method_configs
        from ..runs.effort import Effort
        from ..runs.progress import Display

        if not self.methods:
            raise ArgumentError("--methods needs at least one name; 'osculate methods' lists them")
        self.prepare()
        budget = Budget(self.epochs, self.seconds)
        configs = method_configs(self.configured(self.methods[0], {}), self.methods, parse_options(self.option))
        out = self.out or Path("runs") / f"compare-{self.problem}-{self.seed}"
        require_folder(out, *FILES)
        file = out / "comparison.json"
        effort, display = Effort(), Display(console, budget, line_seconds=1.0)
        comparison = compare(configs, budget, file, self.data_dir, display, self.resume, effort)
        if not comparison.curves:
            return _STATUS["interrupted"]
        table = comparison_table(comparison)
        console.print(_shown(table, f"{comparison.problem}, best first"))
        if self.device == "cpu" and (busy := effort.remark()):  # on other devices the processor waits
            say(console, busy, "yellow")
        with writing(out):
            table.to_csv(out / "comparison.csv", index=False)
            save_figure(comparison_figure(comparison), out / "comparison")
        say(console, f"table, curves and figure lie in {out}")
        return 0 if len(comparison.curves) == len(configs) else _STATUS["interrupted"]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Replay recorded trajectories of the authors' code and show the largest relative error of each file.

    Exit status: 0 if every file agrees to 1e-8, else 1.
    """

    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="")]
    """Recorded trajectories (.npz)."""

    def run(self, console: Console) -> int:
        """Replay and return the exit status."""
        from ..replay.replay import replay

        prepare_process()
        return replay(list(self.files))


def _shown(frame: pd.DataFrame, title: str) -> Table:
    columns = {name: name for name in SHOWN if name in frame}
    return screen_table(title, frame.to_dict("records"), columns, digits=5)
