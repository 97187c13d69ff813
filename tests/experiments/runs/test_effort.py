"""A busy machine is told from a slow method by two clocks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs import effort
from osculate.experiments.runs.effort import Effort


def measured(wall: float, own: float, times: int = 1) -> Effort:
    """Two clocks that run on by so much inside every context."""
    walls: Iterator[float] = iter([k + d for k in range(times) for d in (0.0, wall)])
    owns: Iterator[float] = iter([k + d for k in range(times) for d in (0.0, own)])
    made = Effort(lambda: next(walls), lambda: next(owns))
    for _ in range(times):
        with made:
            pass
    return made


@pytest.mark.parametrize(("wall", "own"), [(60.0, 4.0), (10.0, 4.9), (2.5, 1.0)])
def test_little_of_the_processor_is_said_with_a_way_out(wall: float, own: float) -> None:
    said = measured(wall, own).remark()
    assert "busy" in said and "--threads 1" in said and "--epochs" in said
    assert f"{own:.1f} of {wall:.1f} s" in said


@pytest.mark.parametrize(("wall", "own"), [(60.0, 59.0), (60.0, 110.0), (10.0, 5.1), (0.4, 0.0)])
def test_a_quiet_machine_and_a_short_run_say_nothing(wall: float, own: float) -> None:
    assert measured(wall, own).remark() == ""


def test_several_contexts_add_up() -> None:
    together = measured(1.5, 0.25, times=4)
    assert together.seconds == pytest.approx(6.0) and together.own_seconds == pytest.approx(1.0)
    assert together.remark()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_compare_says_it_after_its_table(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Effort, *error: object) -> None:
        self.seconds, self.own_seconds = 10.0, 10.0 * share

    monkeypatch.setattr(effort.Effort, "__exit__", stop)
    words = ["--methods", "sgdm", "adam", "--epochs", "1", "--problem", "tiny", "--out", str(tmp_path / "out")]
    assert execute(["compare", *words]) == 0
    table, busy, _ = capsys.readouterr().out.partition("the machine is busy")
    assert bool(busy) == (share < 0.5) and "best first" in table
