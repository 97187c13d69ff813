"""Everything about a study is checked before its first run: names, numbers, compositions, networks, data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import registry
from ...errors import ArgumentError, OsculateError, UnknownNameError
from ...framework.methods.expressions import is_part_text, places, with_parts
from ...framework.methods.method import Method
from ...framework.whole_model.method import WholeEntry, whole_method
from ..problems import Data, Problem, get_problem
from ..rivals.catalogue import runnable
from ..rivals.rival import Rival
from ..runs.environment import choose_device
from ..runs.training import optimizer_for
from .definition import METRICS, Arm, Study, StudyProblem

__all__ = ["checked"]

_OTHER = ("lr", "damping", "weight_decay", "batch_size", "warm_start", "lr_schedule", "lr_warm_up")


def checked(study: Study, data_dir: Path | None, load: bool = True) -> Study:
    """Build every arm once on every problem, try every tuning point's numbers, and load the data.

    Args:
        study: as read.
        data_dir: where the data sets lie; ``None`` downloads or generates them.
        load: whether the data are loaded too; without them ``auto`` tuning metrics stay open.

    Returns:
        The study with the tuning metric of every problem filled in.

    Raises:
        ArgumentError: something does not fit; the message names arm and problem.
    """
    choose_device(study.device)
    for arm in study.arms:
        with _named(arm.source, f"arm {arm.label!r}"):
            for form in (arm, *arm.on.values()):
                _check_names(form)
    tuned_by = {}
    for entry in study.problems:
        with _named(entry.source, f"problem {entry.label!r}"):
            problem = get_problem(entry.name, **entry.options)
        for arm in (arm.at(entry.label) for arm in study.arms):
            with _named(arm.source, f"arm {arm.label!r} on {entry.label!r}"):
                _check_points(study, arm, entry)
                _build(study, arm, entry, problem)
        if load:
            with _named(entry.source, f"problem {entry.label!r}"):
                data = problem.load(data_dir)
                tuned_by[entry.label] = _metric(study, entry, problem, data)
    return dataclasses.replace(study, tuned_by=tuned_by)


def _check_names(arm: Arm) -> None:
    """Every setting is a number of the optimizer, an option of the method, or a place in it."""
    entries = runnable()
    if arm.method not in entries:
        raise UnknownNameError("method", arm.method, entries)
    entry = entries[arm.method]
    options = entry.options
    if isinstance(entry, Rival | WholeEntry):
        for name in {**arm.settings, **dict.fromkeys(arm.space)}:
            if name not in _OTHER and name not in options:
                raise UnknownNameError(f"setting of {arm.method!r}:", name, [*_OTHER, *options])
        return
    for name, value in {**arm.settings, **dict.fromkeys(arm.space)}.items():
        if name in _OTHER and not is_part_text(value):
            continue
        if is_part_text(value) or name not in options:
            _check_place(arm, name, value, [*_OTHER, *options])


def _check_place(arm: Arm, name: str, value: Any, options: list[str]) -> None:
    known = places(_composed(arm, {k: v for k, v in arm.settings.items() if k != name}))
    try:
        with_parts(registry.method(arm.method), {name: None}) if name not in known else None
    except UnknownNameError:
        tails = {path.rpartition(".")[2] for path in known}
        raise UnknownNameError(f"setting of method {arm.method!r}:", name, {*options, *tails}) from None
    except (ArgumentError, TypeError, AttributeError):
        return  # the place exists; what comes there is judged when the method is composed


def _composed(arm: Arm, settings: dict[str, Any]) -> Method:
    options = registry.methods()[arm.method].options
    return registry.method(arm.method, **{k: v for k, v in settings.items() if k in options and not is_part_text(v)})


def _check_points(study: Study, arm: Arm, problem: StudyProblem) -> None:
    """The numbers of every point are in the range of every part."""
    for point in study.points(arm) or [{}]:
        method, arguments = arm.config(problem, point, study.seeds[0], study.device).composed()
        entry = runnable()[method] if isinstance(method, str) else None
        if isinstance(entry, Rival):
            entry.check_values(arguments)
            continue
        if isinstance(entry, WholeEntry):  # its damping is judged when it is built
            whole_method(entry.name, **{name: value for name, value in arguments.items() if name in entry.options})
            continue
        if isinstance(method, str):
            numbers = {name: arguments.pop(name) for name in _OTHER[:3] if name in arguments}
            method, arguments = registry.method(method, **arguments), numbers
        try:
            method.check_values(**method.hyperparameters(arguments))
        except OsculateError as error:
            raise ArgumentError(f"with {point}: {error}" if point else str(error)) from error


def _build(study: Study, arm: Arm, entry: StudyProblem, problem: Problem) -> None:
    point = (study.points(arm) or [{}])[0]
    config = arm.config(entry, point, study.seeds[0], study.device).suited_to(problem.settings)
    optimizer_for(config, problem, problem.build_model(config.seed))


def _metric(study: Study, entry: StudyProblem, problem: Problem, data: Data) -> str:
    """The metric of the tuning; all metrics that are named exist."""
    held_out = data.valid_inputs is not None
    known = ["train_loss", "test_loss", *(["valid_loss"] if held_out else [])]
    if problem.classes is not None:
        known += ["test_accuracy", *(["valid_accuracy"] if held_out else [])]
    known += ["relative_l2"] if problem.relative_error else []
    metric = study.tuning.metric
    if metric == "auto":
        metric = "valid_loss" if held_out else "train_loss"
    for name in (metric, *([entry.target.metric] if entry.target is not None else [])):
        if name not in known:
            raise ArgumentError(f"it has no {name}; it has {', '.join(name for name in METRICS if name in known)}")
    return metric


@contextmanager
def _named(source: str, what: str) -> Iterator[None]:
    """Name in every error of the block what is checked, and where it is written."""
    what = f"{source}: {what}" if source else what
    try:
        yield
    except OsculateError as error:
        raise ArgumentError(f"{what}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{what}: a value is of the wrong kind or out of range: {error}") from error
