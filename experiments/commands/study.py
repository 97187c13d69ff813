"""The command ``osculate study``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ...analysis.monitors.readings import TensorBoard
from ...errors import ArgumentError, UnknownNameError
from ..data.datafiles import data_folder
from ..report.tables import screen_table
from ..runs.config import Budget
from ..runs.targets import require_folder
from ..study import reading
from ..study.definition import Arm, Study
from ..study.reading import find_study, read_study, shipped_studies
from .docstrings import plain
from .flags import Count, DataFlag, Place
from .screen import say

__all__ = ["RunStudy", "scaled"]

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class RunStudy(DataFlag):
    """Run a study: tune every arm, then run the best setting of each on the final seeds.

    The same command again continues where it stopped, also after a crash: no run is lost and none is done twice. More
    machines may join with --storage, each with this command. 'osculate report FOLDER' draws the result.

    Exit status: 0 all runs are done (misses included), 1 the disk, the machine or the program failed, 2 bad input,
    130 interrupted by Ctrl-C.
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = ""
    """A TOML file, or the name of a shipped study; '--list' lists them."""
    format: bool = False
    """Only show how a study file is written."""
    list: bool = False
    """Only list the shipped studies."""
    workers: int = 1
    """Processes that do the runs; the processor's threads are divided among them."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL", help_behavior_hint="")] = None
    """Database that several machines share, sqlite:///file.db for one. Default: a file in the study's folder."""
    out: Place = None
    """Folder of the study. Default: runs/ and the study's name."""
    dry_run: bool = False
    """Only check the study and show arms, spaces, number of runs and the bound on their time."""
    estimate: bool = False
    """Only run the first steps of every arm on every problem, and show how long the whole study would take."""
    tensorboard: bool = False
    """Let every run write its numbers for TensorBoard (needs the package tensorboard) too."""
    trials: Count = None
    """Fewer (or more) tuning trials than the file says; noted in the results."""
    epochs: Count = None
    """Other epochs than the file says; noted in the results."""
    seeds: Seeds = ()
    """Other final seeds than the file says; noted in the results."""
    arms: Names = ()
    """Only these arms; noted in the results."""
    problems: Names = ()
    """Only these problems; noted in the results."""

    def run(self, console: Console) -> int:
        """Check, run, and return the exit status."""
        from ..study.checking import checked
        from ..study.conductor import SetbackError, conduct
        from ..study.estimate import show_estimate
        from ..study.worker import Place as StudyPlace

        if self.format or self.list:
            show_format(console) if self.format else list_studies(console)
            return 0
        if not self.file:
            raise ArgumentError("name a TOML file or a shipped study; 'osculate study --list' lists them")
        path = find_study(self.file)
        study = scaled(read_study(path), self.trials, self.epochs, self.seeds, self.arms, self.problems)
        if self.tensorboard:
            TensorBoard.require()
        if self.data_dir is not None:
            data_folder(self.data_dir)
        out = self.out or Path("runs") / study.name
        place = StudyPlace(out, self.storage, self.data_dir, self.workers, self.tensorboard)
        require_folder(out, "study.json", "study.toml", "journal.log")
        study = checked(study, self.data_dir, load=not (self.dry_run or self.estimate))
        if self.dry_run or self.estimate:
            _show(study, self.workers, console)
        if self.estimate:
            show_estimate(study, self.data_dir, place.workers, place.threads, console)
        if self.dry_run or self.estimate:
            return 0
        try:
            complete = conduct(study, place, path, console)
        except SetbackError as error:
            say(console, str(error), "red")
            say(console, f"not all runs are done; the study lies in {out}")
            return 1
        state = "all runs are done" if complete else "not all runs are done; the same command continues"
        say(console, f"{state}; the study lies in {out}")
        return 0 if complete else 130


def scaled(
    study: Study,
    trials: int | None = None,
    epochs: int | None = None,
    seeds: tuple[int, ...] = (),
    arms: tuple[str, ...] = (),
    problems: tuple[str, ...] = (),
) -> Study:
    """Return the study with other numbers, or fewer arms and problems; what differs goes to its notes.

    Raises:
        UnknownNameError: there is no such arm or problem.
        ArgumentError: a number is out of range.
    """
    notes: list[str] = []
    if trials is not None and trials != study.tuning.trials:
        notes.append(f"{trials} instead of {study.tuning.trials} tuning trials")
        study = dataclasses.replace(study, tuning=dataclasses.replace(study.tuning, trials=trials))
    if epochs is not None:
        if epochs < 1:
            raise ArgumentError(f"epochs must be >= 1, got {epochs}")
        before = sorted({str(study.problem_budget(problem).epochs) for problem in study.problems})
        notes.append(f"{epochs} instead of {' / '.join(before)} epochs")
        bare = tuple(dataclasses.replace(problem, epochs=None) for problem in study.problems)
        study = dataclasses.replace(study, problems=bare, budget=dataclasses.replace(study.budget, epochs=epochs))
    if seeds and seeds != study.seeds:
        notes.append(f"final seeds {' '.join(map(str, seeds))} instead of {' '.join(map(str, study.seeds))}")
        same = tuple(dataclasses.replace(problem, seeds=None) for problem in study.problems)
        study = dataclasses.replace(study, seeds=seeds, problems=same)
    study, left_out = _selected(study, arms, problems)
    notes += left_out
    written = tuple(f"scaled down or changed: {note}" for note in notes)
    return dataclasses.replace(study, notes=study.notes + written)


def _selected(study: Study, arms: tuple[str, ...], problems: tuple[str, ...]) -> tuple[Study, list[str]]:
    notes = []
    for kind, names, known in (
        ("arm", arms, [arm.label for arm in study.arms]),
        ("problem", problems, [problem.label for problem in study.problems]),
    ):
        for name in names:
            if name not in known:
                raise UnknownNameError(f"{kind} of study {study.name!r}:", name, known)
        left_out = [name for name in known if names and name not in names]
        if left_out:
            notes.append(f"without {kind}s {', '.join(left_out)}")
    if arms:
        base = study.base if study.base in arms else None
        kept = tuple(arm for arm in study.arms if arm.label in arms)
        study = dataclasses.replace(study, arms=kept, base=base)
    if problems:
        study = dataclasses.replace(study, problems=tuple(p for p in study.problems if p.label in problems))
    return study, notes


def _show(study: Study, workers: int, console: Console) -> None:
    finals = _on_each([len(study.final_seeds(problem)) for problem in study.problems])
    rows = []
    for arm in study.arms:
        trials = _on_each([study.trials(arm.at(problem.label)) for problem in study.problems])
        rows.append({"arm": arm.label, "method": arm.method} | _numbers(arm) | {"trials": trials, "final": finals})
        rows += [
            {"arm": f"  on {problem.label}"} | _numbers(arm.on[problem.label])
            for problem in study.problems
            if problem.label in arm.on
        ]
    console.print(screen_table(study.title or study.name, rows, {name: name for name in rows[0]}))
    for problem in study.problems:
        budget, tuning = study.problem_budget(problem), study.tuning_budget(problem)
        target = "" if problem.target is None else f", target {problem.target.metric} {problem.target.value:g}"
        shorter = "" if tuning == budget else f", while tuning {_bounds(tuning)}"
        say(console, f"{problem.label}: each run {_bounds(budget)}{shorter}{target}")
    if any(study.trials(arm.at(problem.label)) for arm in study.arms for problem in study.problems):
        how = study.tuning
        pruned = "no pruning" if how.pruner == "none" else f"pruner {how.pruner}, once 4 trials of an arm are done"
        auto = how.metric == "auto"
        metric = (
            "the validation loss where a problem holds samples back, else the training loss" if auto else how.metric
        )
        say(console, f"tuning by {metric}, {how.sampler}, seed {how.seed}, {pruned}")
    for note in study.notes:
        say(console, note)
    hours = None if study.seconds is None else study.seconds / workers / 3600
    cost = (
        ", no bound on their time: seconds in [budget] would be one, --estimate times them"
        if hours is None
        else f", at most {hours:.2g} h of training with {workers} worker(s), evaluation not counted"
    )
    say(console, f"{study.runs} runs{cost}")


def _on_each(counts: list[int]) -> int | str:
    """How many runs there are on every problem, in words where there are several."""
    if len(counts) == 1 or not any(counts):
        return counts[0]
    return f"{counts[0]} x {len(counts)} problems" if len(set(counts)) == 1 else " + ".join(map(str, counts))


def _bounds(budget: Budget) -> str:
    epochs = [f"{budget.epochs} epochs"] if budget.epochs is not None else []
    return " or ".join(epochs + ([f"{budget.seconds:g} s"] if budget.seconds is not None else []))


def _numbers(arm: Arm) -> dict[str, Any]:
    """What is set and what is searched, in words."""
    space = ", ".join(
        f"{name} {kind} {values}" for name, entry in arm.space.items() for kind, values in entry.as_dict().items()
    )
    return {"settings": ", ".join(f"{name}={value}" for name, value in arm.settings.items()), "space": space}


def show_format(console: Console) -> None:
    """Print the format of study files: the module docstring of ``reading``."""
    say(console, plain(reading.__doc__ or "").strip())


def list_studies(console: Console) -> None:
    """Print the shipped studies with their sizes and titles."""
    studies = {name: read_study(path) for name, path in shipped_studies().items()}
    rows = [
        {"study": name, "arms": len(study.arms), "runs": study.runs, "title": study.title}
        for name, study in studies.items()
    ]
    console.print(screen_table("shipped studies", rows, {name: name for name in rows[0]}))
