"""On a terminal of 80 columns: no word of any command's output is broken, nothing is cut, no line is too long."""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import osculate as osc
import pytest
from made_studies import whole_study
from osculate.experiments.commands.cli import GROUPS, execute
from osculate.experiments.commands.docstrings import describe
from osculate.experiments.commands.listing import exported_name
from osculate.experiments.commands.one_liners import LINES
from osculate.experiments.commands.screen import bar
from osculate.experiments.problems import PROBLEMS, get_problem
from osculate.experiments.report.tables import print_table, screen_table
from osculate.experiments.rivals.catalogue import runnable
from osculate.experiments.runs.config import Budget
from osculate.experiments.runs.evaluation import Metrics
from osculate.experiments.runs.on_screen import FittedTable, print_text, say
from osculate.experiments.runs.progress import Display
from osculate.experiments.study.reading import shipped_studies
from rich.console import Console
from rich.text import Text

WIDTH = 80
COMMANDS = [name for group in GROUPS.values() for name in group]


@pytest.fixture(autouse=True)
def _narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def fits(text: str, words: Iterable[str] = ()) -> None:
    """Every line fits, nothing was cut, and every word stands somewhere as it is."""
    assert "…" not in text
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []
    found = set(re.split(r"[\s│┃]+", text))
    assert set(words) - found == set()


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert execute(words) == 0
    return capsys.readouterr().out


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        execute([*words, "--help"])
    return capsys.readouterr().out


def test_help_has_every_command_in_a_group_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys)
    fits(text, COMMANDS)
    lines = [line.rstrip() for line in text.splitlines()]
    places = [lines.index(title) for title in GROUPS]
    assert list(GROUPS) == ["train", "compare", "study", "look", "check"] and places == sorted(places)
    longest = max(map(len, COMMANDS))
    for place, group in zip(places, GROUPS.values(), strict=True):
        assert lines[place + 1 : place + 1 + len(group)] == [
            f"  {name:<{longest}}  {line}" for name, (_, line) in group.items()
        ]


def test_h_is_help_and_no_command_names_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute(["-h"])
    assert "compare-structures" in capsys.readouterr().out
    for wrong in ([], ["trian"]):
        with pytest.raises(SystemExit, match="2"):
            execute(wrong)
        shown = capsys.readouterr()
        assert "osculate --help" in shown.err + shown.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = helped(capsys, command)
    kind = next(group[command][0] for group in GROUPS.values() if command in group)
    fits(text, (kind.__doc__ or "").split())
    assert text.startswith(f"usage: osculate {command} ")


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    fits(printed(capsys, "methods"), [*runnable(), *(word for line in LINES.values() for word in line.split())])


def test_details_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    summaries = [entry.summary.replace("``", "") for entry in osc.registry.methods().values()]
    fits(printed(capsys, "methods", "--details"), [*runnable(), *(word for text in summaries for word in text.split())])


def test_parts(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part for kind in osc.registry.parts().values() for part in kind.values()]
    words = [word for part in parts for word in describe(part).summary.split()]
    fits(printed(capsys, "methods", "--parts"), [*map(exported_name, parts), *words])


def test_compositions(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "methods", "--compose", "mini")
    assert "…" not in text
    assert "MiniBlock" in text


@pytest.mark.parametrize("name", [*runnable()])
def test_the_page_of_every_method(capsys: pytest.CaptureFixture[str], name: str) -> None:
    fits(printed(capsys, "methods", name))


def test_problems(capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name in PROBLEMS for word in f"{name} {get_problem(name).summary};".split()]
    fits(printed(capsys, "problems"), words)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_page_of_every_problem(capsys: pytest.CaptureFixture[str], name: str) -> None:
    fits(printed(capsys, "problems", name), get_problem(name).summary.split())


def test_studies(capsys: pytest.CaptureFixture[str]) -> None:
    fits(printed(capsys, "study", "--list"), shipped_studies())
    text = printed(capsys, "study", "smoke", "--dry-run")
    fits("\n".join(line for line in text.splitlines() if line[:1] in "┏┃┡│└"), ["joint-kfac", "diverging", "trials"])


@pytest.mark.usefixtures("tiny")
def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "compare", "--problem", "tiny", "--methods", "adam", "sgdm", "--seconds", "0.1")
    fits(text, ["adam", "sgdm", "epochs", "loss"])


def test_certify(capsys: pytest.CaptureFixture[str]) -> None:
    fits(printed(capsys, "certify", "osculate:sgdm"), ["method-save-load-continue", "held", "contracts:"])


def test_bench_of_launches(capsys: pytest.CaptureFixture[str]) -> None:
    fits(printed(capsys, "bench", "--launches", "sgdm", "kbfgs"), ["kbfgs", "synchronisations", "tensors"])


def test_the_format_of_studies(capsys: pytest.CaptureFixture[str]) -> None:
    fits(printed(capsys, "study", "--format"), ["[[problems]]", '("quasi-random"'])


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = printed(capsys, "report", str(whole_study(tmp_path / "study").folder))
    fits("\n".join(line for line in text.splitlines() if line[:1] in "┏┃┡│└"), ["autoencoder_1", "T2", "accuracy"])


@pytest.mark.usefixtures("tiny")
def test_looking_into_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--problem", "tiny", "--method", "kbfgs", "--epochs", "1", "--out", "run"]
    assert execute(words) == 0
    capsys.readouterr()
    fits(printed(capsys, "diagnose", "run", "--samples", "10"), ["condition", "gradient", "cosine"])
    fits(printed(capsys, "microscope", "run", "--history", "2"), ["predicted", "multiple", "adam"])
    text = printed(capsys, "compare-structures", "run", "--history", "2", "--samples", "10", "--structures", "BFGS, C")
    fits(text, ["Kronecker(HessianActionBFGS,", "Covariance)", "cosine", "preconditioned"])


class TestProgress:
    """What is seen while methods train: on a terminal bars, which are redrawn."""

    @staticmethod
    def drawn(width: int, names: tuple[str, ...]) -> list[str]:
        file = StringIO()
        console = Console(file=file, width=width, force_terminal=True, color_system=None)
        metrics = Metrics(12.25, 123.4567, 1.234567e-5, 0.98765, 0.0, 1234.5, 0.0, 100, 100, 0)
        with Display(console, Budget(10, None)) as display:
            for name in names:
                display.begin(name)
                display.measured(metrics)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
        return [line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()]

    @pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
    def test_nothing_is_cut(self, width: int) -> None:
        lines = self.drawn(width, ("adam", "joint-kfac-noise-aware"))
        assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
        last = lines[-1]
        assert "joint-kfac-noise-aware" in last and "epoch 12.25  train 123.46" in last
        assert ("left" in last) is (width >= 120)
        assert ("1234.5 s" in last) is (width in (100, 160))

    def test_a_longer_name_shortens_the_lines_above_it(self) -> None:
        alone = self.drawn(80, ("adam",))[-1]
        assert "accuracy 98.77%  1234.5 s" in alone
        above = self.drawn(80, ("adam", "a-method-whose-name-is-very-long-indeed"))[-2]
        assert "epoch 12.25  train 123.46" in above and "1234.5 s" not in above

    def test_a_description_ends_between_two_words(self) -> None:
        file = StringIO()
        console = Console(file=file, width=WIDTH, force_terminal=True, color_system=None)
        with bar(console) as progress:
            task = progress.add_task("", total=12345)
            progress.update(task, completed=12000, description="T11 a claim of more words than stand beside the bar")
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
        assert "…" not in text and re.search(r"T11 a claim(?: of)?\s", text)
        assert max(map(len, re.split(r"[\r\n]+", text))) <= WIDTH


class TestTables:
    ROWS: ClassVar = [
        {"name": "joint-kfac-noise-aware", "what it is": "a sentence that is longer than its column", "n": 12}
        | {f"measure_{number}": 1.2345678 * 10.0 ** (3 * number) for number in range(9)}
    ]

    @staticmethod
    def drawn(table: Any, width: int) -> str:
        file = StringIO()
        Console(file=file, width=width).print(table)
        return file.getvalue()

    @pytest.mark.parametrize("width", [200, 120, 80, 60])
    def test_columns_that_do_not_fit_follow_below_with_the_first_one_again(self, width: int) -> None:
        table = screen_table("a title", self.ROWS, {name: name for name in self.ROWS[0]})
        text = self.drawn(table, width)
        assert max(map(len, text.splitlines())) <= width and "…" not in text
        for word in ("joint-kfac-noise-aware", "sentence", "longer", "column", "measure_0", "measure_8", "1.235e+24"):
            assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text), word
        assert text.count("a title") == 1
        assert text.count("joint-kfac-noise-aware") == text.count("┃ name") == (1 if width == 200 else text.count("┏"))

    def test_rows_that_only_two_columns_tell_apart_have_both_again(self) -> None:
        rows = [{"method": "kbfgs", "pairs": pairs} | {f"measure_{n}": 1.5 for n in range(9)} for pairs in ("a", "b")]
        text = self.drawn(screen_table("t", rows, {name: name for name in rows[0]}), 60)
        assert text.count("┏") > 1 and text.count("┃ method ┃ pairs ┃") == text.count("┏")

    def test_a_table_that_fits_is_as_it_was(self) -> None:
        from rich.table import Table

        made = []
        for kind in (Table, FittedTable):
            table = kind("one", "two", title="t", caption="c")
            table.add_row("1", "some words")
            made.append(self.drawn(table, 60))
        assert made[0] == made[1]

    def test_only_a_word_wider_than_the_screen_is_broken(self) -> None:
        table = FittedTable("name", "word")
        table.add_row("x", "y" * 100)
        text = self.drawn(table, 40)
        assert max(map(len, text.splitlines())) <= 40 and text.count("y") == 100

    def test_a_title_wider_than_its_table_keeps_its_words(self) -> None:
        table = FittedTable("a", title="runs/some-very-long-folder-name/below")
        table.add_row("1")
        assert "runs/some-very-long-folder-name/below" in self.drawn(table, 60)

    def test_measurements_of_many_columns_are_printed_so(self) -> None:
        file = StringIO()
        print_table(Console(file=file, width=WIDTH), "t", self.ROWS, {name: name for name in self.ROWS[0]})
        fits(file.getvalue(), ["joint-kfac-noise-aware", "1.23e+24"])


class TestLines:
    TEXT = "a line of many words that goes on and on, and names runs/a-folder-with-a-name-that-is-very-long-indeed"

    @staticmethod
    def said(text: str, terminal: bool, **how: Any) -> list[str]:
        file = StringIO()
        say(Console(file=file, width=40, force_terminal=terminal, color_system=None), text, **how)
        return file.getvalue().splitlines()

    def test_on_a_terminal_they_are_broken_between_words_only(self) -> None:
        lines = self.said(self.TEXT, terminal=True)
        assert " ".join(lines) == self.TEXT and len(lines) > 2
        assert all(len(line) <= 40 or " " not in line for line in lines)

    def test_in_a_file_they_stay_one(self) -> None:
        assert self.said(self.TEXT, terminal=False) == [self.TEXT]
        assert self.said("[red]not markup[/]\n  indented", terminal=True) == ["[red]not markup[/]", "  indented"]
        assert self.said("[red]markup[/]", terminal=True, markup=True) == ["markup"]

    def test_colours_stay_where_they_are(self) -> None:
        file = StringIO()
        text = Text.from_markup("[red]" + "red " * 12 + "[/]" + "plain " * 8)
        print_text(Console(file=file, force_terminal=True, color_system="standard"), text, width=40)
        assert file.getvalue().count("\x1b[31m") == 2
