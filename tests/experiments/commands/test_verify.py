"""The command that verifies: lines, files, the report, exit statuses, bad input."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import markupsafe
import pytest
from osculate.analysis import Control, Curve, Evidence, Inequality, Plot, Setting, Theorem, verify
from osculate.analysis.theorems import catalogue
from osculate.experiments.commands.cli import execute
from osculate.experiments.report.pages import verify_page
from osculate.experiments.report.theorem_figures import equation_pieces, equation_svg, plots_figure

VOID = {"meta", "img", "br"}
NAMES = ["T2", "T9", "T16"]


class Page(HTMLParser):
    """Checks that tags are balanced; gathers sections, sources, links and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.rows = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(values["id"] or "")
        if tag == "img":
            assert values["alt"]
            self.sources.append(values["src"] or "")
        if "href" in values:
            self.links.append(values["href"] or "")
        assert "src" not in values or tag == "img"
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    assert execute(["verify", *NAMES, "--seed", "1", "--out", str(folder)]) == 0
    return folder


def test_all_files_are_written(results: Path) -> None:
    figures = {f"{name}.{kind}" for name in ("T2", "T16") for kind in ("png", "pdf")}
    assert {path.name for path in results.iterdir()} == figures | {"report.html", "verify.json", "verify.csv"}


def test_json_holds_everything(results: Path) -> None:
    content = json.loads((results / "verify.json").read_text())
    assert content["ok"] is True and content["setting"] == {"seed": 1, "device": "cpu", "widths": []}
    assert {"versions", "device_name", "threads"} <= content["environment"].keys()
    assert [entry["name"] for entry in content["theorems"]] == NAMES
    for entry in content["theorems"]:
        assert entry["status"] == "held" and entry["control_fails"] and entry["seconds"] > 0
        assert entry["claim"] and entry["equation"] and entry["source"]
        for inequality in entry["evidence"]["inequalities"]:
            assert inequality["holds"] and {"measured", "bound", "margin", "instances"} <= inequality.keys()
        assert all(control["fails"] and control["claim"] for control in entry["controls"])
    assert content["theorems"][0]["evidence"]["plots"][0]["curves"]


def test_csv_agrees_with_json(results: Path) -> None:
    content = json.loads((results / "verify.json").read_text())["theorems"]
    rows = list(csv.DictReader((results / "verify.csv").read_text().splitlines()))
    for entry in content:
        own = [row for row in rows if row["theorem"] == entry["name"]]
        claims = [row for row in own if row["role"] == "claim"]
        assert [float(row["measured"]) for row in claims] == [e["measured"] for e in entry["evidence"]["inequalities"]]
        assert {row["holds"] for row in claims} == {"True"}
        for index, control in enumerate(entry["controls"], 1):
            found = [row for row in own if row["role"] == f"control {index}"]
            assert len(found) == len(control["inequalities"]) and {row["status"] for row in found} == {"fails"}


def test_the_report_is_whole_and_needs_no_network(results: Path) -> None:
    text = (results / "report.html").read_text()
    page = Page(text)
    assert page.sections == NAMES
    assert page.links == [f"#{name}" for name in NAMES]
    assert not re.search(r"(src|href)=\"(https?:)?//|@import|url\((?!#f)", text)
    kinds = [source.split(";")[0] for source in page.sources]
    assert set(kinds) == {"data:image/svg+xml"} and len(kinds) == 7
    for source in page.sources:
        content = base64.b64decode(source.split(",", 1)[1], validate=True)
        assert ElementTree.fromstring(content).tag.endswith("svg")
    figures = re.findall(r"<figure>(<svg .*?</svg>)\s*</figure>", text, re.DOTALL)
    drawn_names = [name for name in NAMES if (results / f"{name}.png").exists()]
    assert len(figures) == len(drawn_names) == 2
    for name, figure in zip(drawn_names, figures, strict=True):
        drawn = ElementTree.fromstring(figure.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        assert str(drawn.get("aria-label")).startswith(f"{name}: ") and len(list(drawn.iter("path"))) > 20
    data = json.loads((results / "verify.json").read_text())["theorems"]
    inequalities = [e["name"] for entry in data for e in entry["evidence"]["inequalities"]]
    assert all(str(markupsafe.escape(name)) in text for name in inequalities)
    assert page.rows > len(inequalities) + len(NAMES) and text.count('<table class="sortable">') == text.count("<table")


def _theorem(name: str, claim: Evidence, control: Evidence) -> Theorem:
    plot = Plot("a & b", "x", "y", (Curve("c", [0.0, 1.0], [math.nan, 2.0]),), y_log=True)
    checked = Evidence(claim.inequalities, claim.assumptions, {"k": 1.0}, (plot,))
    more = (Control("more <wrong>", lambda setting: control),)
    return Theorem(name, "a < b & c", r"\notacommand{x}", "ours", lambda s: checked, lambda s: control, "wrong", more)


GOOD = Evidence((Inequality("1 <= 2", 1.0, 2.0),))
BAD = Evidence((Inequality("3 <= 2", 3.0, 2.0), Inequality("not a number", math.nan, 1.0)))
NOWHERE = Evidence(BAD.inequalities, (Inequality("assumed", 3.0, 2.0),))


@pytest.mark.parametrize(
    ("claim", "control", "status", "words"),
    [
        (BAD, BAD, 1, "1 violated"),
        (GOOD, GOOD, 1, "control passes: the check cannot fail"),
        (NOWHERE, BAD, 0, "1 assumption not met"),
        (GOOD, BAD, 0, "1 held"),
    ],
)
def test_exit_status(
    claim: Evidence,
    control: Evidence,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(catalogue, "THEOREMS", {"T0": _theorem("T0", claim, control)})
    assert execute(["verify", "--out", str(tmp_path)]) == status
    assert words in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert Page(page).sections == ["T0"] and "a &lt; b &amp; c" in page and "more &lt;wrong&gt;" in page
    assert r"<code>\notacommand{x}</code>" in page  # an equation that cannot be set is shown as it is written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["T1O"], "did you mean"),
        (["T99"], "unknown theorem"),
        (["T2", "--widths", "0"], "widths"),
        (["T2", "--seed", "-1"], "seed"),
        (["T2", "--device", "tpu"], "device must be"),
    ],
)
def test_bad_input(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["verify", *arguments, "--out", str(tmp_path / "none")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_every_equation_of_the_catalogue_can_be_set() -> None:
    for theorem in catalogue.THEOREMS.values():
        for piece in equation_pieces(theorem.equation):
            assert equation_svg(piece) is not None, f"{theorem.name}: {piece}"


def test_latex_that_mathtext_lacks_is_said_otherwise() -> None:
    assert equation_svg(r"\|e\|^2 \le \Big(1 - \textstyle\sum_l \kappa_l\Big) \iff \eta \ge \lambda_{\min}") is not None
    assert equation_svg(r"\nosuchthing") is None
    assert equation_pieces(r"a \leq b, \quad c\; d") == [r"a \leq b", "c", "d"]


def test_maps_and_single_points_are_drawn() -> None:
    grid = Plot(
        "map", "x", "y", grid=[[1.0, math.nan], [2.0, 3000.0]], grid_x=(1.0, 2.0), grid_y=(1.0, 10.0), x_log=True
    )
    point = Plot(
        "point", "x", "y", (Curve("p", [1.0], [2.0], "bound"), Curve("q", [0.0], [1.0], "control")), x_log=True
    )
    figure = plots_figure([grid, point, point])
    assert [axes.get_title() for axes in figure.axes][:3] == ["map", "point", "point"]


def test_curves_that_differ_by_rounding_are_one_line() -> None:
    apart = Plot(
        "apart", "x", "y", (Curve("p", [0, 1], [0.5, 0.4]), Curve("q", [0, 1], [0.5, 0.5], "bound")), y_log=True
    )
    equal = Plot("equal", "x", "y", (Curve("p", [0, 1], [0.5, 0.5 - 1e-9]), Curve("q", [0, 1], [0.5, 0.5])), y_log=True)
    zeros = Plot("zeros", "x", "y", (Curve("p", [0, 1], [0.0, 0.0]),))
    drawn = plots_figure([apart, equal, zeros]).axes
    assert drawn[0].get_yscale() == "log" and drawn[1].get_yscale() == "linear"
    lowest, highest = drawn[1].get_ylim()
    assert highest - lowest > 0.009
    shown = [float(label.get_text()) for label in drawn[1].get_yticklabels()]
    assert len(set(shown)) == len(shown) > 2


def test_every_curve_of_a_legend_has_a_colour_of_its_own() -> None:
    plot = Plot("many", "x", "y", tuple(Curve(f"layer {index}", [0, 1], [index, 1]) for index in range(14)))
    (axes,) = plots_figure([plot]).axes
    assert len({line.get_color() for line in axes.get_lines()}) == 14


def test_a_report_of_nothing_but_controls_that_pass_says_so() -> None:
    verdict = verify(_theorem("T0", GOOD, GOOD), Setting())
    page = verify_page([verdict], {}, {})
    assert "passes: the checker cannot tell" in page and "1 controls that pass" in page
