"""Reports of studies written by hand: every arm and every miss is in every table, and every file opens."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_studies import MadeStudy, course_line, small_study, whole_study
from matplotlib.text import Text
from osculate.errors import ArgumentError
from osculate.experiments.commands.cli import execute
from osculate.experiments.commands.report import report_tables, write_report
from osculate.experiments.report.figures import Styles, label_lines, new_figure
from osculate.experiments.report.report_curves import course_band
from osculate.experiments.report.report_figures import report_figures
from osculate.experiments.report.report_latex import GAP, WIDTH, document, escape, latex_table, printed_width
from osculate.experiments.report.study_records import StudyRecord, read_study, side_by_side
from osculate.experiments.report.tables import Spread
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.study.folders import write_trial
from osculate.experiments.study.ledger import FINAL, Slot

BASE = "joint_kfac & co"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_study(tmp_path_factory.mktemp("study")).folder


@pytest.fixture(scope="module")
def record(study: Path) -> StudyRecord:
    return read_study(study)


@pytest.fixture(scope="module")
def tables(record: StudyRecord) -> dict[str, pd.DataFrame]:
    return report_tables(record)[0]


@pytest.fixture(scope="module")
def out(record: StudyRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(record, folder)
    return folder


def chosen(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_whole_study_has_no_gaps(record: StudyRecord) -> None:
    assert record.gaps == ()
    assert record.problems == ["autoencoder_1", "cnn-2"] and record.arms[0] == BASE == record.base
    assert record.varied("T2 100%") == ("schedule", "T2=100") and record.varied(BASE) is None
    assert record.runs.groupby("state").size().to_dict() == {"finished": 30, "missed": 6}


def test_what_is_missing_damaged_or_running_is_said_and_enters_no_number(tmp_path: Path) -> None:
    study = whole_study(tmp_path / "s")
    shutil.rmtree(study.folder / "runs/cnn-2/Split/final-2")
    shutil.rmtree(study.folder / f"runs/cnn-2/{BASE}/tune-0")
    (study.folder / "runs/cnn-2/Split/final-1/metrics.jsonl").write_text('{"iterations": 0}\nnonsense\n')
    (study.folder / "runs/cnn-2/T2 100%/final-0/status.json").write_text('{"status": "running"}')
    (study.folder / "runs/cnn-2/T2 100%/final-1/config.json").write_text("[")
    (study.folder / "runs/cnn-2/T2 100%/final-2/status.json").unlink()
    record = read_study(study.folder)
    text = "\n".join(record.gaps)
    for piece in (
        "cnn-2, Split: no final run with seed 2",
        f"cnn-2, {BASE}: 1 of 6 tuning trials",
        "Split/final-1 is damaged",
        "T2 100%/final-0 did not end: running",
        "T2 100%/final-1 is damaged",
        "T2 100%/final-2 did not end: no status",
    ):
        assert piece in text
    tables, values = report_tables(record)
    assert not len(chosen(values, problem="cnn-2", arm="T2 100%"))
    row = chosen(tables["overview"], problem="cnn-2", arm="T2 100%").iloc[0]
    assert (row["finished"], row["broke down"], row["unfinished"], row["not begun"]) == (0, 0, 3, 0)
    assert chosen(tables["overview"], problem="cnn-2", arm="Split").iloc[0]["not begun"] == 1


def test_an_incomplete_study_gets_a_report_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small_study(tmp_path / "s")
    (study.folder / "runs/p_1/fast/final-1/status.json").write_text('{"status": "interrupted"}')
    assert execute(["report", str(study.folder)]) == 1
    assert "fast/final-1 did not end: interrupted" in capsys.readouterr().out
    assert "did not end: interrupted" in (study.folder / "report/report.html").read_text()
    assert not json.loads((study.folder / "report/report.json").read_text())["complete"]


def test_what_the_study_gave_up_is_a_miss_and_what_may_go_on_is_not(tmp_path: Path) -> None:
    """A run over its limit was killed: its status still says running. One that was refused has trial.json alone."""
    study = small_study(tmp_path / "s")
    folder, entry = study.folder / "runs/p_1/fast", {"problem": "p_1", "arm": "fast", "phase": "final", "value": None}
    (folder / "final-0/status.json").write_text('{"status": "running"}')
    (folder / "final-0/trial.json").write_text(json.dumps(entry | {"seed": 0, "reason": "not finished"}))
    reason = "over the limit of 5 s"
    write_trial(RunFolder(folder / "final-0"), Slot("p_1", "fast", FINAL, 0), 0, {}, None, reason)
    shutil.rmtree(folder / "final-1")
    (folder / "final-1").mkdir()
    (folder / "final-1/trial.json").write_text(json.dumps(entry | {"seed": 1, "reason": "every tuning run missed"}))
    record = read_study(study.folder)
    assert not record.gaps
    overview = chosen(report_tables(record)[0]["overview"], arm="fast").iloc[0]
    assert overview["broke down"] == 2 and overview["steps to target"].median == math.inf
    (folder / "final-0/trial.json").write_text(json.dumps(entry | {"seed": 0, "reason": "not finished"}))
    assert read_study(study.folder).gaps == ("runs/p_1/fast/final-0 did not end: running",)


def test_a_last_line_cut_short_is_no_damage(tmp_path: Path) -> None:
    study = whole_study(tmp_path / "s")
    with (study.folder / "runs/cnn-2/Split/final-1/metrics.jsonl").open("a") as file:
        file.write('{"iterations": 1')
    assert read_study(study.folder).gaps == ()


def test_folders_of_bare_runs_are_a_study(tmp_path: Path) -> None:
    """What ``osculate train --out`` leaves, without trial.json and study.json."""
    study = MadeStudy(tmp_path)
    for seed in range(2):
        (study.run("p", "kfac", seed, 0.5) / "trial.json").unlink()
    loose = tmp_path / "p-adam-7"
    shutil.move(study.run("p", "adam", 7, 0.4), loose)
    (loose / "trial.json").unlink()
    record = read_study(tmp_path)
    assert sorted(record.runs.arm) == ["adam", "kfac", "kfac"] and set(record.runs.problem) == {"p"}
    assert record.base is None and record.target("p") is None and not record.gaps
    assert set(report_tables(record)[0]["pairs"].reference) == {"kfac"}  # the best arm stands in for a base


def test_studies_side_by_side(study: Path, tmp_path: Path) -> None:
    second = whole_study(tmp_path / "second")
    record = side_by_side([read_study(study), read_study(second.folder)])
    assert record.problems == ["autoencoder_1", "cnn-2"] and len(record.arms) == 8
    tables, _ = report_tables(record)
    profiles = chosen(tables["profiles"], clock="steps").set_index("arm").score
    assert profiles["made 1: Split"] == profiles["made 2: Split"] == 1.0
    assert "different budgets" not in str(record.description["notes"])
    second.problems[0]["budget"] = {"epochs": 20}
    second.write()
    notes = side_by_side([read_study(study), read_study(second.folder)]).description["notes"]
    assert [note for note in notes if "different budgets" in note and "autoencoder_1" in note]
    second.problems[0]["target"]["value"] = 3.0
    second.write()
    with pytest.raises(ArgumentError, match="define problem 'autoencoder_1' differently"):
        side_by_side([read_study(study), read_study(second.folder)])


@pytest.mark.parametrize(
    ("content", "match"), [(None, "no study at"), ("", "neither study.json nor runs"), ("{", "restore it")]
)
def test_what_is_no_study_is_refused(tmp_path: Path, content: str | None, match: str) -> None:
    folder = tmp_path / "s"
    if content is not None:
        folder.mkdir()
        if content:
            (folder / "study.json").write_text(content)
    with pytest.raises(ArgumentError, match=match):
        read_study(folder)


def test_a_study_without_runs_asks_for_some(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "s")
    study.problem("p")
    study.arm("a")
    assert execute(["report", str(study.write())]) == 2


# -- tables ------------------------------------------------------------------------------------------------------------


def test_times_to_target_by_hand(record: StudyRecord, tables: dict[str, pd.DataFrame]) -> None:
    """The course of the middle seed crosses 2 between two epochs; the time is linear in between."""
    rate = 0.6 * 1.1
    losses = [course_line(epoch, rate, 0.5, None)["train_loss"] for epoch in range(11)]
    after = next(place for place, loss in enumerate(losses) if loss <= 2)
    epochs = after - 1 + (losses[after - 1] - 2) / (losses[after - 1] - losses[after])
    row = chosen(tables["overview"], problem="autoencoder_1", arm=BASE).iloc[0]
    assert row["steps to target"].median == pytest.approx(10 * epochs)
    assert row["gradient evaluations to target"].median == pytest.approx(20 * epochs)
    assert row["seconds to target"].median == pytest.approx(1 + 0.5 * epochs)
    assert row["ms per step"].median == pytest.approx(50.0)
    assert row["test_accuracy"].median == pytest.approx(1 - losses[-1] / 20)
    assert row["test_accuracy"].low <= row["test_accuracy"].q25 <= row["test_accuracy"].q75 <= row["test_accuracy"].high


def test_an_arm_that_breaks_down_is_in_every_table(tables: dict[str, pd.DataFrame]) -> None:
    row = chosen(tables["overview"], problem="cnn-2", arm="no guard").iloc[0]
    assert (row["finished"], row["broke down"]) == (1, 2)
    assert row["steps to target"].median == row["train_loss"].median == math.inf
    assert row["test_accuracy"].median == -math.inf
    for name in ("profiles", "pairs", "ablation", "scores", "runs"):
        assert "no guard" in set(tables[name].arm), name
    assert chosen(tables["profiles"], arm="no guard").score.tolist() == [0.0] * 3
    assert chosen(tables["ablation"], arm="no guard", measure="steps to target").ratio.tolist() == [math.inf] * 3
    assert chosen(tables["pairs"], arm="no guard", measure="train_loss").losses.tolist() == [3, 3]


def test_ablation_effects_are_below_one_for_what_helps(tables: dict[str, pd.DataFrame]) -> None:
    steps = chosen(tables["ablation"], measure="steps to target", problem="all problems").set_index("arm")
    assert steps.loc["Split", "ratio"] < steps.loc["Split", "high"] < 1 < steps.loc["T2 100%", "low"]
    assert steps.loc["Split", "part"] == "damping" and steps.loc["Split", "pairs"] == 6


def test_what_has_not_been_run_is_no_miss_in_a_profile(tmp_path: Path) -> None:
    study = whole_study(tmp_path / "s")
    shutil.rmtree(study.folder / "runs/cnn-2/Split")
    scores = chosen(report_tables(read_study(study.folder))[0]["profiles"], clock="steps").set_index("arm")
    assert set(scores.problems) == {1} and scores.score["Split"] == 1.0 and scores.score["no guard"] == 0.0


def test_a_study_that_is_still_tuning_has_tables(tmp_path: Path) -> None:
    study = small_study(tmp_path / "s")
    for arm in ("fast", "slow & sure"):
        for seed in study.seeds:
            shutil.rmtree(study.folder / f"runs/p_1/{arm}/final-{seed}")
    record = read_study(study.folder)
    tables, values = report_tables(record)
    assert not len(values) and len(tables["overview"]) == 2 and len(tables["budget"]) == 4
    assert not any(len(tables[name]) for name in ("profiles", "pairs", "ablation", "scores"))
    write_report(record, tmp_path / "out")
    assert "no final run with seed 0, 1" in (tmp_path / "out/report.html").read_text()


def test_budget_counts_the_trial_that_broke_down(tables: dict[str, pd.DataFrame]) -> None:
    curve = chosen(tables["budget"], problem="cnn-2")
    assert curve.trials.tolist() == [1, 2, 3, 4, 5, 6] and curve.miss.iloc[0] == pytest.approx(1 / 6)
    values = [1.1 + 9 * math.exp(-10 * 0.1 * (trial + 1)) for trial in range(5)]
    assert curve.expected.iloc[-1] == pytest.approx(min(values)) and curve.expected.iloc[0] == math.inf


def test_equal_budgets_end_where_the_first_finished_run_ends(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "s", seeds=(0,))
    study.problem("p", target=None)
    for arm, seconds in (("slow", 2.0), ("fast", 0.5)):
        study.arm(arm)
        study.run("p", arm, 0, 0.3, seconds=seconds)
    _, values = report_tables(read_study(study.write()))
    at = values.set_index("arm")["train_loss at equal seconds"]
    assert at["fast"] == pytest.approx(1 + 9 * math.exp(-3)) and at["slow"] == pytest.approx(1 + 9 * math.exp(-0.6))
    assert "steps to target" not in values


def test_bands_are_quartiles_and_end_where_half_of_the_runs_broke_down(record: StudyRecord) -> None:
    clock, band = course_band(record, "autoencoder_1", BASE, "epoch", "train_loss")  # type: ignore[misc]
    lines = [[1 + 9 * math.exp(-0.6 * (1 + 0.1 * seed) * epoch) for epoch in range(11)] for seed in range(3)]
    assert clock.tolist() == list(range(11))
    np.testing.assert_allclose(band, np.quantile(lines, [0.25, 0.5, 0.75], axis=0))
    _, broken = course_band(record, "autoencoder_1", "no guard", "epoch", "train_loss")  # type: ignore[misc]
    assert np.isfinite(broken[1]).tolist() == [True] * 4 + [False] * 7
    _, accuracy = course_band(record, "autoencoder_1", BASE, "epoch", "test_accuracy")  # type: ignore[misc]
    assert (np.diff(accuracy[1]) > 0).all() and (accuracy[0] >= accuracy[2]).all()


# -- files -------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tables, pictures and addresses of a page, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.rows: dict[str, int] = {}
        self.table = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [str(values[name]) for name in ("src", "href") if name in values]
        if tag == "table":
            self.table = str(values.get("id", ""))
        self.rows[self.table] = self.rows.get(self.table, 0) + (tag == "tr")
        if tag not in ("meta", "img", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(out: Path, tables: dict[str, pd.DataFrame]) -> None:
    page, text = Page(), (out / "report.html").read_text()
    page.feed(text)
    assert not page.open
    assert all(address.startswith(("#", "data:image/", "data:text/csv;base64,")) for address in page.addresses)
    for name, table in tables.items():
        assert page.rows[f"table-{name}"] == len(table) + 1, name
    assert text.count("<figure><svg ") == len(list((out / "figures").glob("*.png")))
    assert "joint_kfac &amp; co" in text and "scaled down" in text


def test_every_figure_is_there_as_png_and_pdf(out: Path) -> None:
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert {"loss-autoencoder-1", "held-out-cnn-2", "budget-cnn-2", "profiles"} <= names
    assert {"ablation-steps-to-target", "layer-steps-cnn-2-joint-kfac-co"} <= names
    assert names == {path.stem for path in (out / "figures").glob("*.pdf")}


def test_csv_and_json_hold_the_tables(out: Path, tables: dict[str, pd.DataFrame]) -> None:
    for name, table in tables.items():
        assert len(pd.read_csv(out / "tables" / f"{name}.csv")) == len(table)
    overview = pd.read_csv(out / "tables/overview.csv")
    assert overview["steps to target median"].map(math.isinf).sum() == 2
    whole = json.loads((out / "report.json").read_text())
    assert whole["complete"] and whole["study"]["title"] == "A made study"
    assert {row["steps to target median"] for row in whole["tables"]["overview"] if row["arm"] == "no guard"} == {"inf"}


def balanced(text: str) -> bool:
    """Whether braces and environments match."""
    depth, bare = 0, re.sub(r"\\[\\{}]", "", text)
    for character in bare:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    begins, ends = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    return depth == 0 and sorted(begins) == sorted(ends)


def test_latex_is_escaped_and_balanced(out: Path) -> None:
    text = (out / "tables.tex").read_text()
    assert balanced(text)
    assert text.count(r"\bottomrule") == text.count(r"\begin{longtable}") == 7
    assert r"joint\_kfac \& co" in text and r"T2 100\%" in text and r"$\infty$" in text
    assert not re.search(r"[^\\][&_%#]\w", re.sub(r" & |\\label\{[^}]*\}|%\n", "  ", text.split("midrule", 1)[1]))


def widths(text: str) -> list[float]:
    """Of the tables in a text of LaTeX: their columns' longest cells, in letters of the given widths, with the gaps."""
    found = []
    for table in re.findall(r"\\begin\{longtable\}(.*?)\\end\{longtable\}", text, re.DOTALL):
        rows = [re.sub(r" \\\\\*?$", "", line) for line in table.splitlines() if " & " in line]
        cells = [row.split(" & ") for row in rows]
        assert len({len(row) for row in cells}) == 1
        columns = [max(printed_width(cell) for cell in column) for column in zip(*cells, strict=True)]
        found.append(sum(columns) + GAP * (len(columns) - 1))
    return found


def test_no_line_of_a_table_is_wider_than_a_column_of_text(out: Path) -> None:
    found = widths((out / "tables.tex").read_text())
    assert len(found) == 7 and max(found) <= WIDTH == 397.0
    overview = (out / "tables" / "overview.tex").read_text()
    assert r"\multicolumn{8}{l}{\textit{autoencoder\_1}} \\*" in overview  # once, instead of in every row
    assert overview.count("autoencoder") == 1 and overview.count(r"joint\_kfac") == 2
    assert "unfinished" not in overview and "not begun" not in overview  # nothing is


@pytest.mark.parametrize("letters", [8, 40])
@pytest.mark.parametrize("measures", [3, 8, 15])
def test_many_measures_and_long_names_go_on_below_or_in_another_table(measures: int, letters: int) -> None:
    arms = [f"{'joint-kfac-noise-aware-of-many-words-in-a-row'[:letters]}{number}" for number in range(20)]
    rows = [
        {"problem": problem, "arm": arm, "reference": "kfac", "finished": 10}
        | {
            f"measure_{place} to target": Spread(*(1.2344e-7 if measures > 3 else 1.2344,) * 5)
            for place in range(measures)
        }
        for problem in ("mnist-autoencoder", "curves_autoencoder")
        for arm in arms
    ]
    text = latex_table(pd.DataFrame(rows), "Many.", "tab:many")
    tables = text.count(r"\begin{longtable}")
    assert balanced(text) and max(widths(text)) <= WIDTH
    assert (tables == 1) is (measures == 3) and text.count(r"\label{tab:many") == tables
    assert text.count("mnist-autoencoder") == tables  # once in each, instead of in every row
    lines = [line.split(" & ") for line in text.splitlines() if " & " in line]
    if letters == 8:
        names = [line[0] for line in lines if line[0] in arms]
        assert names == arms * (2 * tables)
    numbers = sum(cell.startswith("$1.234") for line in lines for cell in line)
    assert numbers == 2 * len(arms) * measures  # the medians
    assert ("Everywhere: reference kfac." in text) is (measures > 3)


def test_words_go_on_behind_joints_and_none_is_lost() -> None:
    value = "Kronecker(inputs=HessianActionBFGS(), outputs=LBFGS(memory=20, pairs=DoubleDamping()))"
    numbers = {f"n{number}": [1.234, 5.678] for number in range(8)}
    text = latex_table(pd.DataFrame({"part": ["structure", "damping"], "value": [value, "Split"]} | numbers), "c", "l")
    assert max(widths(text)) <= WIDTH and text.count(r"\begin{longtable}") == 1
    cells = [line.split(" & ")[1] for line in text.splitlines() if " & " in line]
    assert value.replace(" ", "") in "".join(cells).replace(" ", "") and len(cells) > 5


def test_letters_of_cells_are_measured() -> None:
    assert printed_width("") == 0.0 and printed_width("12") == 8.0 and printed_width(r"a\_b") == 11.0
    assert printed_width(r"$1.5 \cdot 10^{-5}$") > printed_width("$1.5$") + printed_width("10-5")
    assert printed_width(r"$-\infty$") > printed_width(r"$\infty$") > printed_width("m")
    assert printed_width(r"\textbackslash{}") == printed_width("m")


def test_every_special_character_is_escaped() -> None:
    assert escape("a_b & 5% #1 $x$ {y} ~ ^ \\") == (
        r"a\_b \& 5\% \#1 \$x\$ \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert escape("Erdős naïve λ") == "Erd?s naïve ?"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_latex_compiles(out: Path, tmp_path: Path) -> None:
    hostile = pd.DataFrame({"na_me & co": ["\\alpha {x} $ ~ ^ # % < > | λ é", "b"], "x": [1.5e-9, math.nan]})
    text = document({"whole": latex_table(hostile, "50 % of _ & {", "tab:x")}, "A & B_1") + "\n"
    for name, content in (("hostile", text), ("report", (out / "tables.tex").read_text())):
        (tmp_path / f"{name}.tex").write_text(content)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", f"{name}.tex"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=600)
        assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("letters", [5, 60])
def test_long_names_of_arms_widen_figures_and_never_squeeze_axes(tmp_path: Path, letters: int) -> None:
    study = MadeStudy(tmp_path / "s", seeds=(0, 1))
    study.problem("p_1")
    study.arm("base")
    study.base = "base"
    study.arm("x" * letters, varied=("part", "x" * letters))
    for arm, rate in (("base", 0.3), ("x" * letters, 0.5)):
        for seed in study.seeds:
            study.run("p_1", arm, seed, rate)
    record = read_study(study.write())
    tables, values = report_tables(record)
    figures = report_figures(record, values, tables)
    assert {"loss-p_1", "profiles", "ablation-steps-to-target"} <= figures.keys()
    for name, figure in figures.items():
        figure.draw_without_rendering()
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert box.width / figure.dpi > 2.5, name
            labels = [text for text in axes.texts if text.get_text().startswith("x")]
            assert all(text.get_window_extent().x1 <= figure.bbox.x1 + 1 for text in labels), name


def test_damage_of_any_kind_is_said_and_never_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small_study(tmp_path / "s")
    runs = study.folder / "runs/p_1/fast"
    wrong = {"seed": "two", "value": "x", "settings": [], "phase": 3, "arm": 1}
    (runs / "final-0/trial.json").write_text(json.dumps(wrong))
    (runs / "final-1/config.json").write_text('{"seed": "one"')
    record = read_study(study.folder)
    said = " ".join(record.gaps)
    assert all(f"{key} in trial.json" in said for key in wrong) and "config.json cannot be read" in said
    assert record.runs.set_index("run").loc["runs/p_1/fast/final-0", ["arm", "seed", "state"]].tolist() == [
        "fast",
        0,
        "unfinished",
    ]
    assert execute(["report", str(study.folder)]) == 1
    for damage in ({"problems": 3}, {"arms": []}, {"problems": [{}]}, {"arms": {"a": 1}}, {"seeds": 1}):
        (study.folder / "study.json").write_text(json.dumps(damage))
        capsys.readouterr()
        assert execute(["report", str(study.folder)]) == 2
        assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "height"), [(3, 3.7), (16, 3.7), (30, 2.0)])
def test_names_of_lines_stand_in_one_column_beside_the_axes_none_over_another(names: int, height: float) -> None:
    figure, grid = new_figure(9.0, height, columns=2)
    axes = grid[-1]
    labels = [f"arm-{number}" for number in range(names)]
    styles = Styles(labels)
    ends = []
    for number, label in enumerate(labels):  # all end at the bottom, at one of two places
        x, y = (1.0, 2.0)[number % 2], 1e-3 * number
        axes.plot([0.0, x], [5.0, y], **styles.line(label))
        ends.append((label, x, y, styles.colour(label)))
    label_lines(axes, ends)
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    places = [Text.get_window_extent(text) for text in axes.texts]  # without the leader
    assert [text.get_text() for text in axes.texts] == labels
    assert all(place.x0 > box.x1 and place.x1 < figure.bbox.x1 for place in places)
    middles = [(place.y0 + place.y1) / 2 for place in places]
    slack = 2.0
    assert min(middles) >= box.y0 - slack and max(middles) <= box.y1 + slack
    assert all(above - below > 10.0 * figure.dpi / 72 for below, above in pairwise(middles))


def test_seeds_of_a_problem_and_what_an_arm_has_there_are_asked_for_and_shown(tmp_path: Path) -> None:
    small_study(tmp_path)
    file = tmp_path / "study.json"
    description = json.loads(file.read_text())
    description["problems"][0]["seeds"] = [0, 1, 7]
    description["arms"]["fast"]["on"] = {"p_1": {"settings": {"lr": 0.25}, "space": {}, "trials": 0}}
    file.write_text(json.dumps(description))
    record = read_study(tmp_path)
    assert record.seeds("p_1") == [0, 1, 7]
    assert record.gaps == tuple(f"p_1, {arm}: no final run with seed 7" for arm in ("fast", "slow & sure"))
    write_report(record, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "fast on p_1" in page and "lr=0.25" in page
    begun = pd.read_csv(tmp_path / "report" / "tables" / "overview.csv")
    assert list(begun["not begun"]) == [1, 1]
