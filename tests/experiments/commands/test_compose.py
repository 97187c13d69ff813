"""osculate methods --compose: the table says what the compositions say."""

from __future__ import annotations

import io

import osculate as osc
import pytest
from osculate.experiments.commands.compose import show_compositions
from rich.console import Console


def shown(*names: str) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    show_compositions(console, names)
    return console.export_text()


def test_the_counts_are_those_of_the_registry() -> None:
    legal, refused = len(osc.registry.compatible_methods()), len(osc.registry.refused_compositions())
    first = shown().splitlines()[0]
    assert first == f"{legal + refused} compositions: {legal} legal, {refused} refused at construction"


def test_cells_and_reasons() -> None:
    text = shown("kronecker(covariance, covariance)")
    header = next(line for line in text.splitlines() if line.startswith("structure x curvature"))
    estimators = [entry.split()[1] for entry in header.split(": ", 1)[1].split(", ")]
    row = next(line for line in text.splitlines() if line.startswith("Kronecker(Covariance, Covariance)"))
    cells = dict(zip(estimators, row.split()[2:], strict=True))
    assert {cells["EmpiricalFisher"], cells["SampledFisher"], cells["ExactGGN"], cells["WithPairs"]} == {"+"}
    letter = cells["BatchMean"]
    reason = next(line for line in text.splitlines() if line.startswith(f"{letter}: "))
    assert "Needs.ROOTS" in reason and "EmpiricalFisher()" in reason


def test_the_damping_is_named_where_it_is_the_reason() -> None:
    text = shown("MiniBlock")
    factored = next(line for line in text.splitlines() if line.startswith("structure x damping"))
    column = [entry.split()[1] for entry in factored.split(": ", 1)[1].split(", ") if entry[0].isdigit()].index(
        "Factored"
    )
    rows = [line for line in text.splitlines() if line.startswith("MiniBlock ")]
    letter = rows[-1].split()[1 + column]
    assert "Factored" in next(line for line in text.splitlines() if line.startswith(f"{letter}: "))


def test_an_unknown_structure_is_named() -> None:
    with pytest.raises(osc.UnknownNameError, match="unknown structure 'Kroneker'"):
        shown("Kroneker")
