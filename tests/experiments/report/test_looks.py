"""How figures and pages look: widths of a paper, names that never meet, one look per arm, light and dark."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from made_studies import MadeStudy, whole_study
from matplotlib.figure import Figure
from matplotlib.text import Text
from osculate.errors import ArgumentError, UnknownNameError
from osculate.experiments.commands.cli import GROUPS, execute
from osculate.experiments.commands.flags import StyleFlag
from osculate.experiments.commands.report import report_tables, write_report
from osculate.experiments.report.figures import (
    Styles,
    column_width,
    grid_figure,
    lines_of,
    name_lines,
    one_panel,
    text_points,
    text_width,
    title,
)
from osculate.experiments.report.report_figures import budget_figure, report_figures
from osculate.experiments.report.study_records import read_study
from osculate.experiments.report.style import HOUSE, drawing, read_style
from osculate.experiments.report.svg import DARK, contrast, dark_colours, figure_svg

COLUMN, TEXT = 3.3, 6.75


def made(folder: Path, arms: int, letters: int = 8) -> dict[str, Figure]:
    study = MadeStudy(folder, seeds=(0, 1))
    study.problem("p_1")
    names = [f"{number}-{'arm' * letters}"[:letters] for number in range(10, 10 + arms)]
    study.base = names[0]
    for number, name in enumerate(names):
        study.arm(name, varied=("part", name) if number else None)
        for seed in study.seeds:
            study.run("p_1", name, seed, 0.3 + 0.001 * number)
    record = read_study(study.write())
    tables, values = report_tables(record)
    return report_figures(record, values, tables)


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    """Everything written, with its place; leaders of names left out."""
    figure.draw_without_rendering()
    texts: list[Text] = [*figure.texts, *(text for legend in figure.legends for text in legend.findobj(Text))]
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [*axes.texts, *(legend.findobj(Text) if legend else [])]
        if axes.axison:
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            texts += [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
    return [(text.get_text(), Text.get_window_extent(text)) for text in texts if text.get_text().strip()]


@pytest.mark.parametrize(("arms", "letters"), [(3, 8), (6, 8), (6, 30), (12, 12), (16, 24)])
def test_figures_have_the_widths_of_a_paper_and_nothing_written_meets(tmp_path: Path, arms: int, letters: int) -> None:
    figures = made(tmp_path / "s", arms, letters)
    assert {"loss-p_1", "held-out-p_1", "profiles", "ablation-steps-to-target"} <= figures.keys()
    for name, figure in figures.items():
        panels = sum(axes.axison for axes in figure.axes)
        assert figure.get_figwidth() == pytest.approx(COLUMN if panels == 1 else TEXT), name
        written = boxes(figure)
        for text, box in written:
            assert box.x0 >= -2 and box.x1 <= figure.bbox.x1 + 2 and box.y0 >= -2 and box.y1 <= figure.bbox.y1 + 2, text
        for (one, first), (other, second) in combinations(written, 2):
            across = min(first.x1, second.x1) - max(first.x0, second.x0)
            along = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert across < 2 or along < 2.5, (name, one, other)


@pytest.mark.parametrize(("arms", "letters", "labelled"), [(3, 8, True), (8, 6, True), (9, 6, False), (3, 60, False)])
def test_few_short_names_stand_at_their_lines_and_else_there_is_a_legend(
    tmp_path: Path, arms: int, letters: int, labelled: bool
) -> None:
    with drawing():
        figure, axes = one_panel()
        styles = Styles([f"{number}{'x' * letters}" for number in range(arms)])
        ends = []
        for number, arm in enumerate(styles.arms):
            axes.plot([0, 1], [1, number], **styles.line(arm))
            ends.append((arm, 1.0, float(number), styles.colour(arm)))
        name_lines(axes, ends, [styles.handle(arm) for arm in styles.arms])
        figure.draw_without_rendering()
        assert [text.get_text() for text in axes.texts] == (list(styles.arms) if labelled else [])
        if not labelled:
            (legend,) = figure.legends
            assert [text.get_text().replace("\n", "") for text in legend.get_texts()] == list(styles.arms)
        assert axes.get_window_extent().width / figure.dpi > 1.8
        assert figure.get_figwidth() == pytest.approx(COLUMN)


def test_a_gap_in_the_last_row_is_room_for_names() -> None:
    with drawing():
        figure, grid = grid_figure(3)
        assert len(grid) == 4 and [axes.axison for axes in grid] == [True] * 3 + [False]
        assert len(grid_figure(2)[1]) == 2 and len(grid_figure(1)[1]) == 1
        name_lines(grid[2], [("an arm", 0.5, 0.5, "k")], [Styles(["an arm"]).handle("an arm")], grid[3])
        figure.draw_without_rendering()
        before, after = grid[0].get_window_extent(), grid[2].get_window_extent()
        assert before.width == pytest.approx(after.width, rel=0.02)  # the names took nothing from the panel
        (label,) = grid[2].texts
        assert Text.get_window_extent(label).x0 > after.x1


def test_every_arm_has_a_look_of_its_own_with_colours_and_without() -> None:
    styles = Styles([f"arm {number}" for number in range(24)])
    with drawing():
        looks = [styles.line(arm) for arm in styles.arms]
    plain = {(str(look["linestyle"]), look.get("marker")) for look in looks}
    assert len(plain) == 24 and len({look["color"] for look in looks[:8]}) == 8
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 24
    assert len({str(look["linestyle"]) for look in looks[:8]}) == 8


def test_an_arm_looks_the_same_in_every_figure(tmp_path: Path) -> None:
    record = read_study(whole_study(tmp_path / "study").folder)
    tables, values = report_tables(record)
    looks: dict[str, set[tuple[str, str]]] = {}
    for name, figure in report_figures(record, values, tables).items():
        if name.startswith(("layer-steps", "ablation")):
            continue
        for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
            for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True) if legend else ():
                looks.setdefault(text.get_text(), set()).add((str(line.get_color()), str(line._dash_pattern)))
        for text in (text for axes in figure.axes for text in axes.texts if text.get_text() in record.arms):
            looks.setdefault(text.get_text(), set()).add((str(text.get_color()), ""))
    for arm, found in looks.items():
        assert len({colour for colour, _ in found}) == 1, arm
        assert len({dash for _, dash in found if dash}) <= 1, arm
    assert set(looks) == set(record.arms)


def test_a_title_is_one_line_that_fits() -> None:
    with drawing():
        for width in (COLUMN, TEXT):
            figure = Figure(figsize=(width, 2))
            title(figure, "a long title " * 12, "a middling title " * 3, "short")
            assert "\n" not in figure.get_suptitle()
            assert text_points(figure.get_suptitle(), 8) <= 72 * width
        figure = Figure(figsize=(COLUMN, 2))
        title(figure, "x" * 90)
        size = figure._suptitle.get_fontsize()  # type: ignore[attr-defined]
        assert size < 8 and text_points("x" * 90, size) <= 72 * COLUMN


def test_lines_are_no_wider_than_asked_for() -> None:
    with drawing():
        lines = lines_of("several words that go on and on " * 5, "x-small", 150)
        assert len(lines) > 2 and all(text_points(line, "x-small") < 170 for line in lines)
        assert lines_of("", 8, 10) == [""]


class TestStyle:
    def write(self, folder: Path, text: str) -> Path:
        file = folder / "own.mplstyle"
        file.write_text(text)
        return file

    def test_the_house_is_a_style_of_matplotlib_and_leaves_nothing_behind(self) -> None:
        before = dict(mpl.rcParams)
        with drawing():
            assert mpl.rcParams["font.size"] == 8 and column_width() == COLUMN and text_width() == pytest.approx(TEXT)
            assert mpl.rcParams["pdf.fonttype"] == 42
        assert dict(mpl.rcParams) == before
        assert read_style(HOUSE)["figure.figsize"] == [3.3, 2.4]

    def test_a_file_changes_what_it_names(self, tmp_path: Path) -> None:
        file = self.write(
            tmp_path,
            "# mine\nfigure.figsize: 3.5, 2.0  # wider\nfont.family: serif\n\n"
            'axes.prop_cycle: cycler(color=["ff0000", "00ff00"], linestyle=["-", ":"])\n',
        )
        with drawing(file):
            styles = Styles(["a", "b", "c"])
            assert column_width() == 3.5 and mpl.rcParams["font.family"] == ["serif"] and mpl.rcParams["font.size"] == 8
            assert [styles.colour(arm) for arm in "ab"] == ["#ff0000", "#00ff00"]
            assert [styles.line(arm)["linestyle"] for arm in "abc"] == ["-", ":", "-"]
            figure, _ = one_panel()
            with drawing():  # what is drawn inside keeps it
                assert column_width() == 3.5
        assert figure.get_figwidth() == 3.5

    def test_a_style_of_matplotlib_by_its_name(self) -> None:
        with drawing(Path("ggplot")):
            assert mpl.rcParams["axes.facecolor"] == "#E5E5E5"

    @pytest.mark.parametrize(
        ("text", "kind", "match"),
        [
            (
                "font.size: 9\naxes.titelsize: 9\n",
                UnknownNameError,
                "line 2 .*axes.titelsize.*did you mean 'axes.titles",
            ),
            ("font.size: large-ish\n", ArgumentError, "line 1 .*font.size cannot be 'large-ish'"),
            ("font.size 9\n", ArgumentError, "line 1 .*a line is 'name: value'"),
            (None, ArgumentError, "neither a file .* nor one of the styles"),
        ],
    )
    def test_what_is_no_style_is_refused_with_its_line(
        self, tmp_path: Path, text: str | None, kind: type[Exception], match: str
    ) -> None:
        file = tmp_path / "nowhere" if text is None else self.write(tmp_path, text)
        with pytest.raises(kind, match=match), drawing(file):
            pass

    def test_a_command_refuses_before_anything_runs(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        out = tmp_path / "out"
        assert execute(["verify", "T2", "--style", str(tmp_path / "no.mplstyle"), "--out", str(out)]) == 2
        assert "neither a file" in capsys.readouterr().err and not out.exists()

    def test_every_command_that_draws_takes_one(self) -> None:
        drawing_commands = {
            name for group in GROUPS.values() for name, (kind, _) in group.items() if issubclass(kind, StyleFlag)
        }
        assert drawing_commands == {
            *("compare", "report", "verify", "convergence-map", "diagnose", "microscope", "compare-structures"),
            "bounded-training",
        }

    def test_a_report_is_drawn_in_it(self, tmp_path: Path) -> None:
        study = whole_study(tmp_path / "study").folder
        file = self.write(tmp_path, "figure.figsize: 2.5, 2.0\nsavefig.dpi: 40\n")
        assert execute(["report", str(study), "--style", str(file), "--out", str(tmp_path / "out")]) == 0
        from matplotlib.image import imread

        assert imread(tmp_path / "out/figures/budget-cnn-2.png").shape[1] == 100


class TestPages:
    def test_colours_can_be_seen_on_a_dark_page_and_keep_their_order(self) -> None:
        with drawing():
            figure, axes = one_panel()
            styles = Styles([f"arm {number}" for number in range(8)])
            for arm in styles.arms:
                axes.plot([0, 1], [0, 1], **styles.line(arm))
            axes.plot([0, 1], [0, 1], color="#440154")
            picture = figure_svg(figure, "a & b")
            variables = [f"--c{styles.colour(arm)[1:]}" for arm in styles.arms]
        dark = dark_colours([picture])
        assert all(contrast(dark[variable], DARK) >= 4.4 for variable in variables)
        assert contrast(dark["--c440154"], DARK) >= 4.4 and contrast(dark["--c000000"], DARK) > 10
        assert dark["--cd55e00"] == "#d55e00"  # is seen as it is
        assert len({dark[variable] for variable in variables}) == 8

    def test_a_picture_has_no_background_no_names_of_others_and_only_variable_colours(self) -> None:
        pictures = []
        for name in ("one", 'two <&"> three'):
            figure, axes = one_panel()
            axes.plot([0, 1], [0, math.pi], color="#123456")
            axes.fill_between([0, 1], 0, 1, color="#abcdef")
            pictures.append(figure_svg(figure, name))
        for picture in pictures:
            assert not re.search(r"(?<!, )#[0-9a-f]{6}\b", re.sub(r"(url\(|href=\")#", "", picture))
            assert "var(--c123456, #123456)" in picture and "<style" not in picture and "<!--" not in picture
        names = [set(re.findall(r' id="([^"]+)"', picture)) for picture in pictures]
        assert names[0] and not names[0] & names[1]
        for own, picture in zip(names, pictures, strict=True):
            assert set(re.findall(r"url\(#([^)]+)\)", picture)) <= own
            assert set(re.findall(r'href="#([^"]+)"', picture)) <= own
        assert 'aria-label="two &lt;&amp;&quot;&gt; three"' in pictures[1]

    def test_letters_are_as_large_in_the_page_as_in_the_file(self) -> None:
        with drawing():
            figure, axes = one_panel()
            axes.set_title("words")
            scales = [float(found) for found in re.findall(r"scale\(([\d.]+) ", figure_svg(figure, "x"))]
        assert any(0.0156 * 8 / 10 < scale < 0.13 for scale in scales) and min(scales) > 0.01

    def test_light_and_dark_tables_whose_heads_stay_and_files_that_are_inside(self, tmp_path: Path) -> None:
        record = read_study(whole_study(tmp_path / "study").folder)
        write_report(record, tmp_path)
        text = (tmp_path / "report.html").read_text()
        assert "@media (prefers-color-scheme: dark)" in text and ":root[data-look=dark]" in text
        assert 'id="look"' in text and text.count(f"--paper: {DARK}") == 2
        assert re.search(r"thead th \{[^}]*position: sticky", text)
        links = re.findall(r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', text)
        tables, _ = report_tables(record)
        assert [name for name, _ in links] == [f"{name}.csv" for name, table in tables.items() if len(table)]
        for name, content in links:
            inside = base64.b64decode(content).decode()
            assert inside == (tmp_path / "tables" / name).read_text(), name
            assert len(list(csv.reader(io.StringIO(inside)))) > 1
        assert text.count('class="tabled"') == len(links) + text.count('<button type="button" class="csv"')

    def test_how_runs_ended_is_told_in_words(self, tmp_path: Path) -> None:
        record = read_study(whole_study(tmp_path / "study").folder)
        write_report(record, tmp_path)
        text = (tmp_path / "report.html").read_text()
        assert "<td>3 finished</td>" in text and "<td>1 finished, 2 broke down</td>" in text


def budget(top: float, problem: str = "digits") -> Figure:
    """Best values that fall from ``top`` to 0.02."""
    values = [0.02 * (top / 0.02) ** (1 - k / 5) for k in range(6)]
    rows = [
        {"problem": problem, "arm": "a", "metric": "train_loss", "trials": k + 1, "median": x, "q25": x, "q75": x}
        for k, x in enumerate(values)
    ]
    figure = budget_figure(pd.DataFrame(rows), problem, Styles(["a"]))
    assert figure is not None
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize(
    ("top", "labelled"), [(0.05, True), (0.08, True), (0.1, True), (0.2, True), (2.0, False), (40.0, False)]
)
def test_only_a_short_axis_has_numbers_between_powers_of_ten(top: float, labelled: bool) -> None:
    figure = budget(top)
    axis = figure.axes[0].yaxis
    assert any(label.get_text() for label in axis.get_ticklabels(minor=True)) == labelled
    shown = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
    low, high = figure.axes[0].get_ylim()
    inside = [label.get_window_extent() for label in shown if low <= label.get_position()[1] <= high]
    assert len(inside) >= 2
    assert not any(one.overlaps(other) for one, other in combinations(inside, 2))


def test_the_titles_of_budget_figures_say_the_same_however_long_the_name() -> None:
    for name in ("p", "digits-autoencoder", "a-problem-of-a-rather-long-name"):
        assert "median and quartiles" not in budget(1.0, name).get_suptitle()
        assert "median and quartiles" in budget(1.0, name).axes[0].get_xlabel()
