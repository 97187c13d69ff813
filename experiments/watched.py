"""What a run writes beside its metrics: readings of monitors with their certificate, and every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..analysis.readings import JsonLines, WatchCertificate
from ..analysis.watching import Watch, watch
from ..errors import require_positive_integer
from .records import RunFolder, write_json
from .training import EveryEpoch, Schedule
from .training_run import TrainingRun

__all__ = ["Extras", "certified", "watched"]


@dataclass(frozen=True)
class Extras:
    """What a run leaves behind beside the usual files.

    Args:
        watch_every: steps between two examinations by all monitors, >= 1; ``None``: nobody watches. Their time counts
            as training time.
        keep_checkpoints: whether the checkpoint of every evaluation stays.
        schedule: when it is evaluated, and its checkpoint written.
    """

    watch_every: int | None = None
    keep_checkpoints: bool = False
    schedule: Schedule = field(default_factory=EveryEpoch)

    def __post_init__(self) -> None:
        if self.watch_every is not None:
            require_positive_integer("watch_every", self.watch_every)


@contextmanager
def watched(run: TrainingRun, folder: RunFolder, extras: Extras) -> Iterator[Watch | None]:
    """Watch a run while the block lasts; readings go to the folder's ``monitors.jsonl``."""
    if extras.watch_every is None:
        yield None
        return
    with watch(run.optimizer, sinks=[JsonLines(folder.monitors_file)], every=extras.watch_every) as observed:
        yield observed


def certified(observed: Watch | None, folder: RunFolder) -> WatchCertificate | None:
    """Write and return the certificate, if somebody watched."""
    if observed is None:
        return None
    certificate = observed.certificate()
    write_json(folder.certificate_file, certificate.as_dict())
    return certificate
