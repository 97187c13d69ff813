"""What a run writes beside its metrics: readings of monitors and their certificate, event files, every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ...analysis.monitors.readings import JsonLines, Sink, TensorBoard
from ...analysis.monitors.watching import Watch, watch
from ...errors import require_positive_integer
from .evaluation import Metrics
from .records import RunFolder
from .training import EveryEpoch, Schedule
from .training_run import TrainingRun

__all__ = ["Extras", "watched"]


@dataclass(frozen=True)
class Extras:
    """What a run leaves behind beside the usual files, and who else may end it.

    Args:
        watch_every: steps between two examinations by all monitors, >= 1; ``None``: nobody watches. Their time counts
            as training time.
        keep_checkpoints: whether the checkpoint of every evaluation stays.
        schedule: when it is evaluated, and its checkpoint written.
        tensorboard: whether the numbers of every evaluation, and the readings of monitors, go to event files too.
        whole: whether a run that goes on must have all its evaluations; else it is said which are lost.
        enough: asked after every evaluation whether the run ends there, before its budget is spent.

    Raises:
        ArgumentError: a number is out of range, or TensorBoard is wanted and not installed.
    """

    watch_every: int | None = None
    keep_checkpoints: bool = False
    schedule: Schedule = field(default_factory=EveryEpoch)
    tensorboard: bool = False
    whole: bool = False
    enough: Callable[[Metrics], bool] = lambda metrics: False

    def __post_init__(self) -> None:
        if self.watch_every is not None:
            require_positive_integer("watch_every", self.watch_every)
        if self.tensorboard:
            TensorBoard.require()


@contextmanager
def watched(
    run: TrainingRun, folder: RunFolder, extras: Extras
) -> Iterator[tuple[Watch | None, Callable[[Metrics], None]]]:
    """Let others see a run while the block lasts; readings of monitors go to the folder's ``monitors.jsonl``.

    Yields:
        The watch, if there is one, and what every evaluation is to be told to: TensorBoard gets it under the names
        that ``metrics.jsonl`` has: ``train_loss``, ``layer_steps/NAME``.
    """
    with ExitStack() as stack:
        board, watching = None, None
        if extras.tensorboard:
            # What was written after the checkpoint that the run goes back to is written again.
            board = TensorBoard(folder.event_folder, purge=run.iterations + 1 if run.iterations else None)
            stack.callback(board.close)
        if extras.watch_every is not None:
            sinks: list[Sink] = [JsonLines(folder.monitors_file), *([board] if board is not None else [])]
            watching = stack.enter_context(watch(run.composed, sinks=sinks, every=extras.watch_every))

        def measured(metrics: Metrics) -> None:
            if board is None:
                return
            for name, value in metrics.as_dict().items():
                for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                    board.scalar(f"{name}/{key}" if key else name, number, metrics.iterations)

        yield watching, measured
