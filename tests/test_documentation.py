"""The documentation says what is: code runs, commands exist, links lead somewhere, every public name is in it."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
import re
import sys
from pathlib import Path

import osculate as osc
import pytest
from osculate import analysis, contracts, strategies
from osculate.curvature import declarations
from osculate.experiments import commands
from osculate.experiments.commands.cli import execute
from osculate.experiments.problems import PROBLEMS
from osculate.experiments.rivals.catalogue import RIVALS
from osculate.framework.whole_model.method import whole_methods
from pages import DOCS, ROOT, blocks, pages, run_python

RUN_ELSEWHERE = {  # pages whose Python blocks another file runs, with more to say about them
    "README.md": "test_readme.py",
    "docs/loops.md": "framework/optimizer/test_loop_recipes.py",
    "docs/residuals.md": "framework/whole_model/test_residuals_page.py",
    "docs/guides/own_loop.md": "test_guides.py",
    "docs/guides/new_variant.md": "test_guides.py",
    "docs/guides/figure_and_table.md": "test_guides.py",
    "docs/gallery/check_a_bound.md": "test_gallery_bound.py",
    "docs/gallery/run_an_ablation.md": "test_gallery_runs.py",
    "docs/gallery/train_a_pinn.md": "test_gallery_runs.py",
    "docs/gallery/which_structure_fits_my_layer.md": "test_gallery_runs.py",
    "docs/gallery/why_did_this_run_diverge.md": "test_gallery_runs.py",
    "docs/gallery/write_your_own_part.md": "test_own_parts.py",
}
PAGES = {str(path.relative_to(ROOT)): path for path in pages()}
PYTHON = {
    name: [block for block in blocks(path.read_text()) if block.language == "python"] for name, path in PAGES.items()
}
COMMANDS = [
    (name, words)
    for name, path in PAGES.items()
    for block in blocks(path.read_text())
    if block.language == "sh"
    for words in block.commands()
    if words[0] == "osculate" and len(words) > 1
]
API = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))


@pytest.mark.parametrize("name", [name for name, found in PYTHON.items() if found and name not in RUN_ELSEWHERE])
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(PYTHON[name], name)


def test_the_code_of_every_other_page_runs_in_a_test_of_its_own() -> None:
    for name, file in RUN_ELSEWHERE.items():
        assert PYTHON[name], f"{name} has no code any more"
        assert Path(name).name in (ROOT / "tests" / file).read_text(), name


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are read and checked, and do nothing."""
    for module in pkgutil.iter_modules(commands.__path__):
        found = importlib.import_module(f"{commands.__name__}.{module.name}")
        for value in vars(found).values():
            if inspect.isclass(value) and "run" in vars(value) and value.__module__ == found.__name__:
                monkeypatch.setattr(value, "run", lambda self, console: 0)


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize(
    ("name", "words"), COMMANDS, ids=[f"{name}: {' '.join(words)}"[:120] for name, words in COMMANDS]
)
def test_a_command_exists_with_its_options(name: str, words: list[str]) -> None:
    try:
        assert execute(words[1:]) == 0
    except SystemExit as end:  # --help
        assert end.code in (0, None)


def test_commands_name_what_is_registered() -> None:
    """Methods and problems of the command lines; those that a page registers itself aside."""
    known = {*osc.registry.methods(), *whole_methods(), *RIVALS, "rows-lars", "diagonal-kfac", "tilted-kbfgs", "METHOD"}
    for name, words in COMMANDS:
        given: dict[str, list[str]] = {}
        flag = ""
        for word in words:
            flag = word if word.startswith("-") else flag
            given.setdefault(flag, []).append(word)
        methods = [*given.get("--method", ())[1:], *given.get("--methods", ())[1:]]
        assert set(methods) <= known, (name, words)
        assert set(given.get("--problem", ())[1:]) <= set(PROBLEMS), (name, words)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Files; anchors are checked by the build of the site."""
    text = re.sub(r"^```.*?^```", "", PAGES[name].read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (PAGES[name].parent / target).exists(), target


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("osculate", osc.__all__),
        ("osculate.analysis", analysis.__all__),
        ("osculate.contracts", contracts.__all__),
        ("osculate.strategies", strategies.__all__),
        ("osculate.framework.methods.registry", osc.registry.__all__),
    ],
    ids=["osculate", "analysis", "contracts", "strategies", "registry"],
)
def test_every_public_name_is_in_the_reference_once(prefix: str, names: list[str]) -> None:
    found = re.findall(rf"^\.\. (?:py:)?(?:auto)?\w+:: {re.escape(prefix)}\.(\w+)$", API, re.MULTILINE)
    assert sorted(found) == sorted(names)


def test_what_is_data_in_the_reference_is_described_there() -> None:
    """A tuple or a dictionary has no docstring but that of its class, which autodata would show."""
    assert ":: autodata" not in API and ".. autodata" not in API
    for description in re.findall(r"^\.\. py:data:: .+\n((?:   .*\n|\n)+)", API, re.MULTILINE):
        assert len(re.sub(r"^ *:type:.*", "", description, flags=re.MULTILINE).split()) > 5, description


def test_every_contract_is_in_the_reference_with_its_claim() -> None:
    table = (DOCS / "api" / "contracts.md").read_text().split("| contract | of a | promise |\n| --- | --- | --- |\n")[1]
    rows = [f"| `{entry.name}` | {', '.join(entry.kinds)} | {entry.claim} |" for entry in contracts.CONTRACTS]
    assert table.partition("\n\n")[0].splitlines() == rows


def test_every_declaration_of_a_part_is_in_the_reference() -> None:
    """What docstrings name, by kind: its class, and the protocols of what parts are given."""
    kinds = [name for name in declarations.__all__ if name.endswith("Declarations") and name != "Declarations"]
    assert len(kinds) > 10
    for name in kinds:
        assert f"autoclass:: osculate.curvature.declarations.{name}\n   :members:\n" in API, name
    for name in ("operations.Operation", "linalg.Computed"):
        assert f"autoclass:: osculate.preconditioners.{name}\n" in API, name


def test_every_registered_part_is_in_the_reference() -> None:
    for kind, parts in osc.registry.parts().items():
        for part in parts.values():
            assert f":: osculate.{part.__name__}\n" in API, (kind, part)


def test_every_method_has_its_section_and_its_options() -> None:
    sections = re.findall(r"^### (.+)$", (DOCS / "methods.md").read_text(), re.MULTILINE)
    names = [*osc.registry.methods(), *whole_methods()]
    assert sorted(sections) == sorted(names)
    reference = (DOCS / "api" / "methods.md").read_text()
    factories = {name: entry.factory for name, entry in (*osc.registry.methods().items(), *whole_methods().items())}
    for name, factory in factories.items():
        assert f"## {name}\n\n```{{eval-rst}}\n.. autofunction:: {factory.__module__}.{factory.__name__}\n" in reference


def test_every_problem_theorem_and_rival_is_on_its_page() -> None:
    for page, names in (("problems", PROBLEMS), ("rivals", RIVALS), ("verification", analysis.THEOREMS)):
        text = (DOCS / f"{page}.md").read_text()
        assert not [name for name in names if f"`{name}`" not in text]


def test_the_table_of_parts_names_what_is_registered() -> None:
    table = (DOCS / "parts.md").read_text().split("| question | parts |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([A-Z]\w+)`", table))
    assert named <= set(dir(osc)), named - set(dir(osc))
    registered = [cls for kind in osc.registry.parts().values() for cls in kind.values()]
    exported = {name for name in dir(osc) if any(getattr(osc, name) is cls for cls in registered)}
    assert exported <= named, f"parts missing from the table: {sorted(exported - named)}"


def test_the_tables_of_defaults_are_what_was_measured() -> None:
    """Where every method's defaults ended, and what one knob does: every cell from the runs beside the page."""
    folder = DOCS / "results" / "defaults"
    runs, turned = (json.loads((folder / f"{name}.json").read_text())["runs"] for name in ("every_method", "one_knob"))
    methods, page = (DOCS / "methods.md").read_text(), (folder / "README.md").read_text()
    loss = {(run["arm"], run["problem"], run["seed"]): run["train_loss"] for run in [*runs, *turned]}
    heads = [line for line in methods.splitlines() if line.startswith("| method | `")]
    tables = [re.findall(r" `([\w-]+)`, \d+ steps ", head) for head in heads]
    problems = [problem for table in tables for problem in table]
    assert len(tables) == 2 and len(problems) == 23 and {run["problem"] for run in runs} == set(problems)

    def mean(arm: str, problem: str) -> float:
        return sum(math.inf if (at := loss[arm, problem, seed]) is None else at for seed in (100, 101)) / 2

    for arm in osc.registry.methods():
        total = 0
        for table in tables:
            ends = [(mean(arm, problem), mean("sgdm", problem)) for problem in table]
            cells = [f"{'∞' if math.isinf(end) else f'{end:.3g}'}{' †' * (end > plain)}" for end, plain in ends]
            behind = sum(end > plain for end, plain in ends)
            assert f"| `{arm}` | {' | '.join(cells)} | {behind} |" in methods, arm
            assert 3 * behind <= 12 or table is tables[1], arm
            total += behind
        assert 3 * total <= len(problems), f"the defaults of {arm} end behind those of sgdm on {total} problems"
    for arm in {run["arm"] for run in runs} - {"ngd-exact"}:
        row = f"| `{arm}` |"
        for knob in ("lr-low", "lr-high", "damping-low", "damping-high"):
            pairs = [(loss.get((f"{arm}-{knob}", problem, 100)), loss[arm, problem, 100]) for problem in problems[:4]]
            row += " " + " / ".join(f"{max(a, 0.01) / max(b, 0.01):.2f}" for a, b in pairs if a is not None) + " |"
        assert row in page, arm


def test_the_glossary_names_what_exists() -> None:
    """Every class, attribute and keyword in it."""
    literals = re.findall(r"`([A-Z]\w+[^`]*)`", (DOCS / "glossary.md").read_text())
    found = [match for text in literals if (match := re.fullmatch(r"([A-Z]\w+)(?:\.(\w+)|\((\w+)=.*\))?", text))]
    assert len(found) > 80
    for name, attribute, keyword in (match.groups() for match in found):
        value = getattr(osc, name)
        assert not attribute or hasattr(value, attribute) or attribute in value.__dataclass_fields__, (name, attribute)
        assert not keyword or keyword in inspect.signature(value).parameters, (name, keyword)


def test_the_claims_are_those_that_are_checked() -> None:
    text = (DOCS / "verification.md").read_text()
    for name, theorem in analysis.THEOREMS.items():
        assert f"| `{name}` | {theorem.claim.rstrip('.')} |" in text, name


def test_blocks_are_told_apart() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n<!-- exit status 2 -->\n```sh\nls \\\n  -l && pwd  # no\n```\n"
    text += "\n```\nplain\n```\n"
    first, second = blocks(text)
    assert (first.language, first.code, first.line, first.note) == ("python", "x = 1\n", 3, "")
    assert second.status == 2 and list(second.commands()) == [["ls", "-l"], ["pwd"]]
    assert blocks("") == [] and sys.modules["pages"]
