"""One run with its folder: start or continue, record, survive an interruption or a breakdown."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...analysis.monitors.readings import WatchCertificate
from ...errors import ArgumentError, NumericalError
from ..problems import Data, Problem, get_problem
from ..rivals.catalogue import numbers_of, runnable
from ..rivals.rival import Rival
from .batches import data_checksum
from .config import Budget, RunConfig, differences
from .environment import describe_environment
from .interrupts import interruptible
from .on_screen import say
from .progress import Display
from .records import RunFolder, write_json
from .setbacks import is_setback
from .targets import DamagedError, FolderError, OutputError, exclusive
from .training import measure, prepare
from .training_run import TrainingRun
from .watched import Extras, watched
from .wholeness import evaluations_lost

__all__ = ["Resume", "RunResult", "default_folder", "describe_run", "other_values", "run_in_folder"]

_USUAL = Extras()


class Resume(enum.Enum):
    """What to do with a run already in the folder."""

    AUTO = "auto"
    """Continue it if there is a checkpoint, else start."""
    NEVER = "never"
    """Start over; what the folder held is replaced."""
    REQUIRE = "require"
    """Continue it, and fail where there is nothing to continue."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        status: ``finished``, ``interrupted``, ``broken down``, or ``no step taken`` where the seconds were over before
            the first step.
        metrics: the last line of its metrics; None if it ended before the first.
        reason: why it broke down, took no step or ended before its budget, else empty.
        certificate: of the monitors, if any watched.
    """

    status: str
    metrics: dict[str, Any] | None
    reason: str = ""
    certificate: WatchCertificate | None = None


def default_folder(config: RunConfig) -> Path:
    """Return where a run goes unless told otherwise."""
    return Path("runs") / f"{config.problem}-{config.method}-{config.seed}"


def describe_run(config: RunConfig, run: TrainingRun, checksum: str) -> dict[str, Any]:
    """Return the configuration with every default resolved, as plain values.

    Args:
        config: as asked for.
        run: as prepared from it, with the problem's own numbers where the configuration left them open.
        checksum: of its data, see ``data_checksum``.
    """
    entry, config = runnable()[config.method], run.config
    defaults: dict[str, Any] = numbers_of(entry) | entry.options
    given = config.method_arguments()
    numbers = {name: given.get(name, defaults.get(name)) for name in ("lr", "damping", "weight_decay")}
    warm = config.warm_start.value if run.optimizer.has_warm_start else "none"
    options = {name: _written(value) for name, value in (defaults | given).items() if name not in numbers}
    described = config.as_dict() | numbers
    described |= {"batch_size": run.order.batch_size, "method_options": options, "warm_start": warm}
    if isinstance(entry, Rival):
        described |= {"library": entry.library}
    if run.schedule is not None:
        described |= {"lr_over": dataclasses.asdict(run.schedule.budget)}
    described |= {"training_samples": run.order.samples, "data_checksum": checksum}
    if run.data.origin:
        described["data_origin"] = dict(run.data.origin)
    return described if run.data.test_set == "test set" else described | {"test_set": run.data.test_set}


def run_in_folder(
    config: RunConfig,
    budget: Budget,
    folder: RunFolder,
    data_dir: Path | None,
    resume: Resume,
    console: Console,
    extras: Extras = _USUAL,
) -> RunResult:
    """Train, and leave the whole run in ``folder``.

    Args:
        config: what is run.
        budget: when to stop, counted from the very beginning of a continued run.
        folder: where it is written.
        data_dir: where the data sets lie; None downloads or generates them.
        resume: what to do with a run already there.
        console: shows the progress.
        extras: what the run leaves behind beside the usual.

    Raises:
        ArgumentError: a value is out of range, the folder cannot be written or is being written by another process,
            or it holds a run of another configuration or damaged files.
        OutputError: a file cannot be written.
    """
    folder.check()
    if resume is Resume.REQUIRE and not folder.checkpoint_file.exists():
        raise ArgumentError(f"{folder.path} holds no checkpoint to continue; use --resume auto to start")
    problem = get_problem(config.problem, **config.problem_options)
    data = problem.load(data_dir)
    run = prepare(config, problem, data, budget)
    if extras.watch_every is not None:
        _ = run.composed  # nothing of a rival could be watched
    described = describe_run(config, run, data_checksum(data))
    if "test_set" in described:
        say(console, _tested_on(problem, data))
    with exclusive(folder.path):
        if resume is not Resume.NEVER and folder.checkpoint_file.exists():
            _restore(run, folder, described, console, extras)
            spent = budget.spent(run.epoch, run.clock.seconds) >= 1
            remark = "; its budget is spent, raise --epochs or --seconds to train on" if spent else ""
            say(console, f"continuing after {run.iterations} iterations{remark}")
        else:
            if resume is not Resume.NEVER and (steps := _steps_in(folder)):
                say(
                    console,
                    f"{folder.path} holds {steps} iterations of a run, but no checkpoint.pt: training starts over",
                )
            folder.start(described, describe_environment(run.device))
        return _train(run, budget, folder, console, extras)


def other_values(saved: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    """Return one line for each entry in which a saved configuration is not the one described.

    What the test set is called does not count: which it is, the checksum of the data tells.
    """
    kept, asked = ({name: value for name, value in c.items() if name != "test_set"} for c in (saved, described))
    return differences(kept, asked)


def _tested_on(problem: Problem, data: Data) -> str:
    """Which measures there are of the test samples, and which samples those are."""
    accuracy = ["accuracy"] if problem.classes is not None else []
    error = ["relative L2 error"] if problem.relative_error else []
    measures = ["test loss", *accuracy, *error]
    verb = "is that" if len(measures) == 1 else "are those"
    return f"{' and '.join(measures)} {verb} of the {data.test_set}"


def _steps_in(folder: RunFolder) -> int:
    """How far the metrics in a folder go; 0 where there are none that can be read."""
    with suppress(DamagedError):
        return max((int(line["iterations"]) for line in folder.read_metrics()), default=0)
    return 0


def _restore(run: TrainingRun, folder: RunFolder, described: dict[str, Any], console: Console, extras: Extras) -> None:
    """Let a run stand where the folder's stood; the evaluation of its checkpoint is made again where it is lost.

    Raises:
        FolderError: the folder holds another run, or damaged files.
    """
    lines = other_values(folder.read_config(), described)
    if lines:
        listed = "\n  ".join(lines)
        raise FolderError(
            f"{folder.path} holds a run of another configuration:\n  {listed}\n"
            "continue it with the saved values, start over with --resume never, or name another folder with --out"
        )
    state = folder.load_checkpoint(run.device)
    steps = state.get("iterations")
    lost = evaluations_lost(run, steps, extras.schedule, folder) if isinstance(steps, int) else []
    if lost:
        which = ", ".join(map(str, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        told = f"{folder.metrics_file} has lost the evaluations after iterations {which}"
        if extras.whole:
            raise DamagedError(f"{told}; start over with --resume never")
        say(console, f"{told}: the record goes on without them; --resume never starts over", "yellow")
    try:
        run.load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DamagedError(
            f"{folder.checkpoint_file} does not hold the state of this run ({type(error).__name__}: {error}); start "
            "over with --resume never, or name another folder with --out"
        ) from error
    folder.rewind_metrics(run.iterations)
    if run.iterations not in [line["iterations"] for line in folder.read_metrics()]:
        folder.append_metrics(run.evaluate().as_dict())
        say(
            console,
            f"{folder.metrics_file} had lost the evaluation after {run.iterations} iterations; it is made again",
        )


def _train(run: TrainingRun, budget: Budget, folder: RunFolder, console: Console, extras: Extras) -> RunResult:
    reason, hard, early = "", False, False
    folder.write_status("running")
    with (
        Display(console, budget) as display,
        interruptible() as interrupted,
        watched(run, folder, extras) as (watch, tell),
    ):
        display.begin(run.config.method)
        try:
            for metrics in measure(run, budget, extras.schedule, display.step, interrupted):
                folder.append_metrics(metrics.as_dict())
                if run.iterations:
                    folder.save_checkpoint(run.state_dict(), run.iterations if extras.keep_checkpoints else None)
                tell(metrics)
                display.measured(metrics)
                early = budget.spent(run.epoch, run.clock.seconds) < 1 and extras.enough(metrics)
                if early:
                    break
        except NumericalError as error:
            reason = str(error)
            display.failed(reason)
        except KeyboardInterrupt:  # the second Ctrl-C: the step in progress is lost
            hard = True
        except Exception as error:
            ended = "interrupted" if is_setback(error) else "broken down"
            with suppress(OutputError):  # where nothing can be written, the first error says why
                folder.write_status(ended, reason=f"{type(error).__name__}: {error}", iterations=run.iterations)
            raise
        stopped = hard or (interrupted() and budget.spent(run.epoch, run.clock.seconds) < 1)
    status = "broken down" if reason else "interrupted" if stopped and not early else "finished"
    reason = reason or ("ended before its budget was spent" if early else "")
    run.clock.pause()
    if status == "finished" and not run.iterations and budget.epochs != 0:
        status = "no step taken"
        reason = (
            f"the time was over after {run.warm_start_batches} of {run.order.batches_per_epoch} mini-batches of the "
            f"warm start, {run.warm_start_seconds:.3g} s; raise --seconds, or leave the warm start out with "
            "--warm-start none"
        )
    details = {"reason": reason} if reason else {}
    folder.write_status(status, epoch=run.epoch, iterations=run.iterations, seconds=run.clock.seconds, **details)
    certificate = None if watch is None else watch.certificate()
    if certificate is not None:
        write_json(folder.certificate_file, certificate.as_dict())
    written = folder.read_metrics()
    return RunResult(status, written[-1] if written else None, reason, certificate)


def _written(value: Any) -> Any:
    """An option as the configuration records it: JSON has no infinity, so it stands there as the word."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
