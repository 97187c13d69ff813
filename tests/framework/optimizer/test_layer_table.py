"""``layer_table()``: the list of rows that it is, and the table that it prints."""

import copy
import dataclasses
import re
from html.parser import HTMLParser

import osculate as osc
import pytest
import torch
from osculate.framework.optimizer.layer_table import LayerTable


@pytest.fixture(name="table")
def _table() -> LayerTable:
    model = torch.nn.Sequential(
        torch.nn.Linear(300, 200), torch.nn.Tanh(), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 2, bias=False)
    )
    return osc.build("kfac", model, likelihood="categorical").layer_table()


def test_it_is_the_list_of_rows(table: LayerTable) -> None:
    rows = list(table)
    assert isinstance(table, list) and table == rows and len(table) == 3 and table[0] is rows[0]
    assert [row.layer for row in table] == ["0", "2", "3"] and table[-1].shape == (2, 200)
    assert all(isinstance(row, osc.LayerRow) for row in table) and copy.copy(table) == rows


def test_it_prints_one_aligned_line_per_row_under_headings_and_the_total_below(table: LayerTable) -> None:
    lines = str(table).splitlines()
    assert str(table) == repr(table) and len(lines) == 1 + 1 + len(table) + 1
    starts = [match.start() for match in re.finditer(r"\S+", lines[0])]
    for line, row in zip(lines[2:], table, strict=False):
        assert [line[start - 1] for start in starts[1:-1]] == [" "] * (len(starts) - 2)
        for text in (row.layer, row.kind, ", ".join(row.parameters), " x ".join(map(str, row.shape)), row.part):
            assert text in line
    assert "yes" in lines[3] and "yes" not in lines[2]
    assert lines[-1].startswith("3 rows") and lines[-1].endswith("MiB")
    assert not any(line != line.rstrip() for line in lines)


def test_every_field_that_says_something_is_a_column(table: LayerTable) -> None:
    names = [field.name for field in dataclasses.fields(osc.LayerRow)]
    heads = str(table).splitlines()[0].split()
    assert heads == [name for name in names if name not in ("note", "owner")]
    noted = LayerTable([*table, dataclasses.replace(table[0], note="why not", owner=1)])
    assert str(noted).splitlines()[0].split() == names and "why not" in str(noted)


def test_bytes_have_units() -> None:
    def size(number: int) -> str:
        return (
            str(LayerTable([osc.LayerRow("a", "Linear", ("w",), (2,), "P", False, number)]))
            .splitlines()[2]
            .split("  ")[-1]
        )

    assert [size(n).strip() for n in (12, 2048, 3 << 20, 5 << 30)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_many_parameters_are_counted_and_no_row_is_said() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(20)))
    text = str(osc.build("lm", model).layer_table())
    assert "40 parameters" in text and max(map(len, text.splitlines())) < 80
    assert str(LayerTable()) == "no parameters"


def test_a_notebook_shows_a_table_in_which_nothing_is_markup(table: LayerTable) -> None:
    class Cells(HTMLParser):
        rows = 0

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.rows += tag == "tr"

    hostile = LayerTable([*table, dataclasses.replace(table[0], layer="<b>")])
    parser = Cells()
    parser.feed(hostile._repr_html_())
    assert parser.rows == 1 + len(hostile) + 1 and "&lt;b&gt;" in hostile._repr_html_()
