"""What ``train`` records of step sizes that a method chooses layer by layer."""

from __future__ import annotations

import pytest
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.training import EveryEpoch, measure, prepare


@pytest.mark.parametrize(
    ("method", "chooses"), [("lw-sgdm", True), ("joint-sgdm", True), ("sgdm", False), ("kfac", True), ("soap", False)]
)
def test_step_sizes_of_the_last_step_are_in_the_metrics(tiny: object, method: str, chooses: bool) -> None:
    run = prepare(RunConfig("tiny", method), tiny, tiny.load(None))  # type: ignore[attr-defined, arg-type]
    seen = []
    for metrics in measure(run, Budget(epochs=2), EveryEpoch()):
        report = run.optimizer.last_report.as_dict()["step_sizes"]
        seen.append((metrics.as_dict().get("layer_steps"), report))
    assert seen[0][0] is None  # nothing has been stepped yet
    for recorded, report in seen[1:]:
        assert recorded == (pytest.approx(report) if chooses else None)
        assert not chooses or set(recorded) == {"0", "3"}
