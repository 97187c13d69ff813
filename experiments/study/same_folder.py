"""Whether what lies in a folder is of the study that is to go on there: looked at before anything is written.

A folder holds one study: its report reads every run in it. So what is there already must be part of what is asked for,
whatever the file is called that asks; more arms, problems, seeds and trials may come, none may have changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from ...errors import ArgumentError
from ..problems import Data, Problem, get_problem
from ..runs.batches import data_checksum
from ..runs.config import Budget, RunConfig, differences
from ..runs.records import RunFolder, as_written
from ..runs.runs import describe_run, other_values
from ..runs.training import prepare
from .definition import Study, StudyProblem
from .ledger import FINAL, TUNE, Ledger, Slot, open_storage

__all__ = ["misfit", "require_same"]

_WAY_OUT = "take another folder with --out"


def require_same(out: Path, ledger: Ledger, data_dir: Path | None, source: Path | None = None) -> None:
    """See that a folder and a study's book hold nothing else than the study, and write nothing.

    Args:
        out: the folder.
        ledger: of the study, not published yet.
        data_dir: where the data sets lie, or ``None``.
        source: the file that the study was read from, or ``None``.

    Raises:
        ArgumentError: there is another study, another definition of an arm or problem, or a run of another
            configuration or length; the message names it.
    """
    study = ledger.study
    held = {(name, *key): text for name, key, text in _definitions(ledger.storage) if name == study.name}
    if (out / "journal.log").exists():  # also of a study whose book is in a database now
        held |= {(name, *key): text for name, key, text in _definitions(open_storage(out, None))}
    _require_definitions(out, study, held)
    _require_whole(out, study, {*((name, problem, arm) for name, problem, arm in held), *_described(out)}, source)
    _require_runs(out, ledger, data_dir)


def misfit(config: RunConfig, budget: Budget, folder: RunFolder, material: tuple[Problem, Data], early: bool) -> str:
    """Return in what a run in a folder is not the one that is asked for; empty where it is, or where there is none.

    Args:
        config: as asked for.
        budget: likewise.
        folder: of the run.
        material: the problem and its data.
        early: whether a run may have ended before its budget was spent.
    """
    if not folder.config_file.exists():
        return ""
    described = describe_run(config, prepare(config, *material, budget), data_checksum(material[1]))
    lines = other_values(folder.read_config(), as_written(described))
    return "\n  ".join(lines) or _other_length(folder, budget, early)


def _other_length(folder: RunFolder, budget: Budget, early: bool) -> str:
    """The length is no part of a configuration; the status tells it."""
    try:
        status = json.loads((folder.path / "status.json").read_text(encoding="utf-8"))
        epoch, seconds, ended = float(status["epoch"]), float(status["seconds"]), status["status"] == "finished"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    longer = budget.epochs is not None and epoch > budget.epochs
    shorter = ended and not early and budget.spent(epoch, seconds) < 1
    if not longer and not shorter:
        return ""
    return f"length: saved {epoch:g} epochs in {seconds:.3g} s, asked for {_bounds(budget)}"


def _bounds(budget: Budget) -> str:
    epochs = [f"{budget.epochs} epochs"] if budget.epochs is not None else []
    return " or ".join(epochs + ([f"{budget.seconds:g} s"] if budget.seconds is not None else []))


def _definitions(storage: BaseStorage) -> Iterator[tuple[str, tuple[str, str], str]]:
    """Study, problem and arm, and the definition, of everything in a book."""
    for entry in storage.get_all_studies():
        name, *labels = entry.study_name.split("/")
        definition = storage.get_study_user_attrs(entry._study_id).get("definition")
        if len(labels) == 3 and isinstance(definition, str):
            yield name, (labels[0], labels[1]), definition


def _require_definitions(out: Path, study: Study, held: Mapping[tuple[str, str, str], str]) -> None:
    """What the study and the folder both have is the same."""
    asked = {
        (problem.label, arm.label): json.dumps(study.definition(problem, arm.at(problem.label)), sort_keys=True)
        for problem in study.problems
        for arm in study.arms
    }
    for (name, problem, arm), saved in held.items():
        definition = asked.get((problem, arm), saved)
        if definition != saved:
            listed = "\n  ".join(differences(_in_words(saved), _in_words(definition)))
            raise ArgumentError(
                f"study {name!r}, which {str(out)!r} holds, has arm {arm!r} on {problem!r} with another definition:"
                f"\n  {listed}\n{_WAY_OUT}{_or_database(out)}; what is there stays as it is"
            )


def _in_words(definition: str) -> dict[str, Any]:
    """A definition with every number under its name."""
    content: dict[str, Any] = json.loads(definition)
    for key, names in (
        ("problem", ("name", "options", "batch_size")),
        ("budget", ("epochs", "seconds", "evaluations")),
    ):
        values = content.pop(key, [])
        content |= {f"{name} of the {key}": value for name, value in zip(names, values, strict=False)}
    return content


def _or_database(out: Path) -> str:
    return "" if (out / "journal.log").exists() else ", and another database with --storage"


def _described(out: Path) -> Iterator[tuple[str, str, str]]:
    """Study, problem and arm of everything that ``study.json`` names."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        content = json.loads((out / "study.json").read_text(encoding="utf-8"))
        yield from (
            (str(content["name"]), str(problem["name"]), str(arm))
            for problem in content["problems"]
            for arm in content["arms"]
        )


def _require_whole(out: Path, study: Study, held: set[tuple[str, str, str]], source: Path | None) -> None:
    """No run of another study stands in the folder's report: what is there is part of this one.

    A study of the same name may be some arms and problems of one file, done one after another.
    """
    arms, problems = {arm.label for arm in study.arms}, {problem.label for problem in study.problems}
    strange = sorted(
        (name, problem, arm)
        for name, problem, arm in held
        if name != study.name and not (problem in problems and arm in arms)
    )
    apart = held and all(problem not in problems and arm not in arms for _, problem, arm in held)
    if strange or (apart and not _is_copy(out / "study.toml", source)):
        name, problem, arm = (strange or sorted(held))[0]
        this = f"study {study.name!r}" if name != study.name else "the one asked for"
        raise ArgumentError(
            f"{str(out)!r} holds another study, {name!r}: {this} has no arm {arm!r} on {problem!r}, and one report "
            f"would show both; {_WAY_OUT}"
        )


def _is_copy(file: Path, source: Path | None) -> bool:
    try:
        return source is not None and file.read_bytes() == source.read_bytes()
    except OSError:
        return False


def _require_runs(out: Path, ledger: Ledger, data_dir: Path | None) -> None:
    """Folders of runs that the book does not know as done hold what is asked for.

    Final runs whose settings the tuning has yet to find are looked at when they are done.
    """
    study, done = ledger.study, ledger.done()
    for problem in study.problems:
        material = _Material(problem, data_dir)
        for arm in (arm.at(problem.label) for arm in study.arms):
            runs = [
                (Slot(problem.label, arm.label, TUNE, number), point, study.tuning.seed, study.tuning_budget(problem))
                for number, point in enumerate(study.points(arm))
            ]
            seeds = () if arm.space else study.final_seeds(problem)
            runs += [
                (Slot(problem.label, arm.label, FINAL, seed), {}, seed, study.problem_budget(problem)) for seed in seeds
            ]
            for slot, point, seed, budget in runs:
                folder = RunFolder(out / "runs" / slot.folder)
                if slot in done or not folder.config_file.exists():
                    continue
                config = arm.config(problem, point, seed, study.device)
                early = slot.phase == TUNE and study.tuning.pruner != "none"
                found = misfit(config, budget, folder, material.loaded(), early)
                if found:
                    raise ArgumentError(
                        f"{str(folder.path)!r} holds another run than {slot} of study {study.name!r}:\n  {found}\n"
                        f"{_WAY_OUT}, or move that run away"
                    )


@dataclasses.dataclass
class _Material:
    """A problem and its data, loaded when they are first needed."""

    problem: StudyProblem
    data_dir: Path | None
    _found: list[Any] = dataclasses.field(default_factory=list, init=False)

    def loaded(self) -> tuple[Problem, Data]:
        """Return both."""
        if not self._found:
            problem = get_problem(self.problem.name, **self.problem.options)
            self._found += [problem, problem.load(self.data_dir)]
        return self._found[0], self._found[1]
