"""The command that turns a study into figures, tables and one page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from ...errors import ArgumentError, UnknownNameError
from ..report.breakdowns import breakdown_screen
from ..report.study_records import StudyRecord, read_study, side_by_side
from ..report.tables import Spread, screen_table
from ..runs.records import write_json
from ..runs.targets import require_folder, writing
from .flags import Place, StyleFlag
from .screen import say

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Report", "report_tables", "write_report"]

_SHOWN = {
    "steps to target": "steps",
    "seconds to target": "seconds",
    "train_loss": "train",
    "valid_loss": "valid",
    "test_accuracy": "accuracy",
}
"""Measures on the terminal, and their headings."""

_LEFT_OUT = ("gradient evaluations to target", "test_loss", "ms per step")
"""Columns of the overview that are left out in LaTeX; the CSV has all."""

_CAPTIONS = {
    "overview": "Median over seeds with quartiles; a miss counts as infinite.",
    "profiles": "Area under the performance profile up to a ratio of 4, scaled to [0, 1], with bootstrap intervals.",
    "targets": "Time to the target: median over seeds, quartiles and exact interval between order statistics.",
    "rule": "Whether the mean over seeds meets the target beyond one chance in a thousand.",
    "tests": "Paired tests on the same seeds, with Holm's correction over the arms.",
    "pairs": "Comparison on the same seeds: median ratio to the reference with bootstrap intervals.",
    "ablation": "One part replaced at a time: ratio to the base on the same seeds with bootstrap intervals.",
}


@dataclass(frozen=True, kw_only=True)
class Report(StyleFlag):
    """Turn a study into its paper's figures and tables, and one page that opens from disk.

    Writes report.html; figures as PNG and PDF; every table as CSV, and the main ones for LaTeX (tables.tex compiles by
    itself, tables/NAME.tex are to be included); report.json. A study that is not complete gets a report that says what
    is missing.

    Exit status: 0 if everything that the study names is there and ended, 1 if not, 2 for bad input.
    """

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY")]
    """Folder of the study, or any folder with run folders below it."""
    compare: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="STUDY ...", help_behavior_hint="")] = ()
    """Further studies to put beside it; each arm gets its study's name in front."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="ARM", help_behavior_hint="")] = None
    """Arm that all others are compared with on the same seeds. Default: the study's base, else the best arm, which the
    data have chosen."""
    out: Place = None
    """Folder to write. Default: STUDY/report, with --compare STUDY/report-and-OTHER."""

    def run(self, console: Console) -> int:
        """Read, score, draw, write, and return the exit status."""
        default = "-and-".join(["report", *(path.resolve().name for path in self.compare)])
        out = self.out or self.study / default
        require_folder(out, "report.html", "report.json", "tables.tex")
        record = side_by_side([read_study(path) for path in (self.study, *self.compare)])
        if self.reference is not None:
            if self.reference not in record.arms:
                raise UnknownNameError("arm", self.reference, record.arms)
            record = dataclasses.replace(record, description={**record.description, "base": self.reference})
        with console.status("scoring and drawing"):
            tables = write_report(record, out)
        _show(record, tables, console)
        say(console, f"report.html, figures and tables lie in {out}")
        return 1 if record.gaps else 0


def report_tables(record: StudyRecord) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """All tables of a report by name, and the values of the final runs they come from."""
    from ..report import report_referee as referee
    from ..report import report_tables as made

    values = made.final_values(record)
    scores = made.scores_table(record, values)
    tables = {
        "overview": made.overview_table(record, scores),
        "breakdowns": made.breakdowns_table(record),
        "profiles": made.profile_table(record, values),
        "targets": referee.targets_table(record, values),
        "rule": referee.rule_table(record, values),
        "pairs": made.pairs_table(record, values),
        "tests": referee.tests_table(record, values),
        "ablation": made.ablation_table(record, values),
        "budget": made.budget_table(record),
        "scores": scores,
        "runs": made.runs_table(record),
    }
    return tables, values


def write_report(record: StudyRecord, out: Path) -> dict[str, pd.DataFrame]:
    """Write the whole report of a study.

    Args:
        record: the study.
        out: folder to write; made if need be.

    Returns:
        The tables.

    Raises:
        ArgumentError: there is no run yet.
        OutputError: a file cannot be written.
    """
    from ..report.figures import save_figure
    from ..report.pages import study_page
    from ..report.report_figures import report_figures
    from ..report.style import drawing
    from ..report.svg import figure_svg

    if not len(record.runs):
        raise ArgumentError(f"study {record.name!r} has no run yet; run 'osculate study' on it first")
    tables, values = report_tables(record)
    with writing(out):
        (out / "tables").mkdir(parents=True, exist_ok=True)
        figures = {}
        with drawing():
            for name, figure in report_figures(record, values, tables).items():
                save_figure(figure, out / "figures" / _file_name(name))
                figures[name] = figure_svg(figure, name)
        files = {
            name: _flat(table).to_csv(index=False)
            for name, table in (tables | {"values": values, "curves": record.courses}).items()
        }
        for name, text in files.items():
            (out / "tables" / f"{name}.csv").write_text(text, encoding="utf-8")
        (out / "report.html").write_text(study_page(record, tables, figures, files), encoding="utf-8")
        _write_latex(record, tables, out)
    write_json(out / "report.json", _values(record, tables, figures))
    return tables


def _write_latex(record: StudyRecord, tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    from ..report.report_latex import document, latex_table

    overview = tables["overview"]
    empty = [
        name for name in ("broke down", "unfinished", "not begun") if name in overview and not overview[name].any()
    ]
    narrow = [name for name in overview.columns if name not in (*_LEFT_OUT, *empty) and " at equal " not in name]
    chosen = dict(tables) | {"overview": overview[narrow]}
    written = {
        name: latex_table(chosen[name], caption, f"tab:{name}")
        for name, caption in _CAPTIONS.items()
        if len(chosen[name])
    }
    for name, text in written.items():
        (out / "tables" / f"{name}.tex").write_text(text, encoding="utf-8")
    title = str(record.description.get("title") or record.name)
    (out / "tables.tex").write_text(document(written, title), encoding="utf-8")


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Spreads as columns of numbers."""
    import pandas as pd

    flat: dict[str, Any] = {}
    for column in map(str, table.columns):
        cells = list(table[column])
        if any(isinstance(cell, Spread) for cell in cells):
            for name in Spread._fields:
                flat[f"{column} {name}"] = [getattr(cell, name, None) for cell in cells]
        else:
            flat[column] = cells
    return pd.DataFrame(flat)


def _values(record: StudyRecord, tables: Mapping[str, pd.DataFrame], figures: Collection[str]) -> dict[str, Any]:
    """Plain values for report.json; infinities, which JSON lacks, are the word ``inf``."""
    from ..report.report_referee import seed_warnings

    plain = {
        name: [{key: _word(value) for key, value in row.items()} for row in _flat(table).to_dict("records")]
        for name, table in tables.items()
    }
    return {
        "study": dict(record.description) or {"name": record.name},
        "complete": not record.gaps,
        "gaps": list(record.gaps),
        "warnings": seed_warnings(record),
        "figures": sorted(map(_file_name, figures)),
        "tables": plain,
    }


def _word(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and value in (float("inf"), -float("inf")) else value


def _show(record: StudyRecord, tables: Mapping[str, pd.DataFrame], console: Console) -> None:
    """The overview on the terminal, what is missing, and what too few seeds cannot show."""
    from ..report.report_referee import seed_warnings

    overview = tables["overview"]
    targeted = any("to target" in str(name) for name in overview)
    rows = []
    for row in overview.to_dict("records"):
        total = sum(int(row[name]) for name in ("finished", "broke down", "unfinished", "not begun"))
        medians = {name: row[name].median if isinstance(row.get(name), Spread) else None for name in _SHOWN}
        rows.append(row | medians | {"finished": f"{row['finished']} of {total}"})
    columns = {name: name for name in ("problem", "arm", "finished")}
    columns |= {name: heading for name, heading in _SHOWN.items() if name in overview}
    caption = "medians; steps and seconds to target" if targeted else "medians"
    console.print(screen_table(str(record.description.get("title") or record.name), rows, columns, caption=caption))
    if len(tables["breakdowns"]):
        console.print(breakdown_screen(tables["breakdowns"].to_dict("records")))
    for warning in seed_warnings(record):
        say(console, warning, "yellow")
    for gap in record.gaps[:8]:
        say(console, gap, "yellow")
    if len(record.gaps) > 8:
        say(console, f"... and {len(record.gaps) - 8} more gaps", "yellow")
