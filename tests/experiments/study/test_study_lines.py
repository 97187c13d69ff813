"""Lines of a study file are found under names that TOML quotes."""

from __future__ import annotations

import pytest
from osculate.experiments.study.reading import line_of


@pytest.mark.parametrize(
    ("header", "name"),
    [(r'[arms."a\"b"]', 'a"b'), ("[arms.'q q']", "q q"), ("[arms.plain]", "plain"), (r'[arms."\u00e9"]', "é")],
)
def test_a_quoted_name_has_its_line(header: str, name: str) -> None:
    text = f"seeds = [1]\n[budget]\nepochs = 2\n{header}\nmethod = 3\n"
    assert line_of(text, ("arms", name)) == 4 and line_of(text, ("arms", name, "method")) == 5
