"""The table of docs/backends.md says what is: every cell is tried, and what is served is checked."""

from pathlib import Path

import pytest
from backend_table import LAYERS, OF_LOSSES, QUANTITIES, TRAINING, serves, table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "backends.md"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_page_holds_the_table() -> None:
    missing = [line for line in table().splitlines() if line not in PAGE.read_text().splitlines()]
    assert not missing, "docs/backends.md is out of date; paste what `python tests/backend_table.py` prints"


def test_every_backend_and_quantity_has_a_yes_and_a_no() -> None:
    """So that the table cannot be true by accident."""
    quantities = list(QUANTITIES)
    assert all(serves(backend, "`Linear`", quantities[0]) for backend in OF_LOSSES)
    assert not serves("backpack", "`Linear`", "secant pairs")
    assert not serves("hooks", "any other module", "per-sample gradients")
    assert not any(serves("func", layer, quantities[0]) for layer in TRAINING)
    assert set(TRAINING) < set(LAYERS)
