"""What ``osculate methods`` shows: every option with its default, every part under the name one types."""

import re
from dataclasses import dataclass, field
from functools import partial
from io import StringIO

import osculate as osc
import pytest
from osculate.errors import UnknownNameError
from osculate.experiments.commands.docstrings import describe, plain
from osculate.experiments.commands.listing import exported_name, show_methods, show_parts
from osculate.experiments.commands.one_liners import LINES, one_line
from osculate.experiments.commands.problem_listing import show_problems
from osculate.experiments.problems import PROBLEMS, get_problem
from osculate.experiments.rivals.catalogue import runnable
from osculate.framework.whole_model.method import whole_methods
from rich.console import Console


def shown(show: object, *words: str, width: int = 80) -> str:
    file = StringIO()
    show(Console(file=file, width=width), words)  # type: ignore[operator]
    return file.getvalue()


def words(text: str) -> str:
    """Words with one blank between them."""
    return " ".join(text.split())


def squeezed(text: str) -> str:
    """Letters alone, so that a text wrapped in a column can be found."""
    return re.sub(r"[\s│┃]+", "", text)


class TestPlainText:
    """Docstrings are written for the site; nothing of its markup reaches a screen."""

    @pytest.mark.parametrize(
        ("written", "shown"),
        [
            ("as for :class:`Reduce`; see", "as for Reduce; see"),
            (":class:`.Factored`, :class:`!Other`", "Factored, Other"),
            (":meth:`~osculate.curvature.Layer.gradient`", "gradient"),
            (":py:class:`Kronecker`", "Kronecker"),
            (":func:`the rule <osculate.rules.rule>`", "the rule"),
            ("(:data:`LAST`) stands", "(LAST) stands"),
            (":math:`x_{t-1}`", "x_{t-1}"),
            ("``lr`` and `damping`", "lr and damping"),
            ("`the site <https://a.org>`_, `two <b>`__", "the site (https://a.org), two (b)"),
            ("as for :func:`layerwise_sgdm`.", "as for lw-sgdm."),
            (":class:`of two\nlines <x.y>`", "of two\nlines"),
            ("before\n```toml\na = 1\n```\nbehind", "before\na = 1\nbehind"),
            ("a : b: c, 3:1, x_{t-1}, <none>", "a : b: c, 3:1, x_{t-1}, <none>"),
        ],
    )
    def test_markup_leaves_what_is_read(self, written: str, shown: str) -> None:
        assert plain(written) == shown

    def test_no_list_and_no_page_has_any(self) -> None:
        parts = [exported_name(part) for kind in osc.registry.parts().values() for part in kind.values()]
        texts = [
            shown(show_parts, width=200),
            shown(show_parts, *parts, width=200),
            shown(partial(show_methods, details=True), width=200),
            shown(show_methods, *runnable(), width=200),
            shown(show_problems, *PROBLEMS, width=200),
        ]
        assert [line for text in texts for line in text.splitlines() if re.search(r":\w+:`|`", line)] == []


class TestMethods:
    @pytest.mark.parametrize("width", [60, 80, 200])
    def test_the_list_wraps_and_leaves_nothing_out(self, width: int) -> None:
        text = shown(show_methods, width=width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        for name in runnable():
            assert re.search(rf"^{name} ", text, re.MULTILINE)
            assert words(LINES[name]) in words(text)

    def test_a_name_and_what_it_is_stand_on_one_line_of_80_columns(self) -> None:
        lines = [line.rstrip() for line in shown(show_methods).splitlines()]
        longest = max(map(len, runnable()))
        assert set(LINES) == set(runnable())
        for name in runnable():
            assert f"{name:<{longest}}  {LINES[name]}" in lines

    @pytest.mark.parametrize("width", [60, 80, 200])
    def test_details_are_the_whole_sentence_the_paper_and_the_numbers(self, width: int) -> None:
        text = shown(partial(show_methods, details=True), width=width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        found = squeezed(text)
        for name, entry in osc.registry.methods().items():
            assert squeezed(entry.summary.replace("``", "")) in found
            assert squeezed(f"paper {entry.paper}") in found
            defaults = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in entry.defaults.items() if value)
            assert squeezed(f"defaults {defaults}") in found, name

    def test_a_method_without_a_line_has_the_beginning_of_its_summary_in_whole_clauses(self) -> None:
        assert one_line("mine", "K-FAC (arXiv:1503.05671), twice; and more.") == "K-FAC, twice; and more"
        long = "A direction of mine (see below): it has a clause, and another one, and still one more, and so on."
        assert one_line("mine", long) == "A direction of mine: it has a clause, and another one"
        assert one_line("mine", "word " * 30) == ("word " * 30)

    @pytest.mark.parametrize("name", sorted(osc.registry.methods()))
    def test_a_page_has_every_option_its_default_and_its_meaning(self, name: str) -> None:
        text, entry = shown(show_methods, name, width=120), osc.registry.methods()[name]
        assert "…" not in text
        for option, default in (entry.defaults | entry.options).items():
            row = next(line for line in text.splitlines() if re.match(rf"│ {option} ", line))
            _, _, value, meaning, _ = (cell.strip() for cell in row.split("│"))
            expected = f"{default:g}" if option in entry.defaults else str(default)
            assert value
            assert expected.startswith(value)  # a long one goes on in the next line
            assert meaning, f"the docstring of {name} says nothing about {option}"
        assert entry.paper in text

    def test_a_page_says_what_the_method_needs(self) -> None:
        assert re.search(r"closure +needed, step\(closure\)", shown(show_methods, "kbfgs"))
        assert re.search(r"likelihood +only for the warm start", shown(show_methods, "mbf"))
        assert re.search(r"likelihood +needed: categorical", shown(show_methods, "joint-kfac"))
        adam = shown(show_methods, "adam")
        assert re.search(r"closure +not needed", adam)
        assert re.search(r"warm start +none", adam)

    def test_pieces_of_names_filter(self) -> None:
        text = shown(show_methods, "joint", "KBFGS-")
        for name, listed in {"joint-kfac": True, "joint-sgdm": True, "kbfgs-l": True, "adam": False}.items():
            assert bool(re.search(rf"^{name} ", text, re.MULTILINE)) is listed

    def test_a_name_that_is_nowhere(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown method 'kbfsg'; did you mean 'kbfgs'"):
            shown(show_methods, "kbfsg")


class TestMethodsOverTheWholeModel:
    def test_they_stand_in_a_section_of_their_own_between_the_methods_of_parts_and_other_packages(self) -> None:
        text = shown(show_methods, width=200)
        sections = [set(re.findall(r"^(\S+)  ", part, re.MULTILINE)) for part in text.split("\n\n")]
        assert set(whole_methods()) in sections
        assert sections.index(set(whole_methods())) == 1 and set(osc.registry.methods()) <= sections[0]
        for entry in whole_methods().values():
            assert squeezed(entry.summary) in squeezed(shown(partial(show_methods, details=True)))

    @pytest.mark.parametrize("name", sorted(whole_methods()))
    def test_a_page_has_options_and_how_it_is_called(self, name: str) -> None:
        text, entry = shown(show_methods, name, width=120), whole_methods()[name]
        for option, default in ({"damping": f"{entry.factory().damping:g}"} | entry.options).items():
            row = next(line for line in text.splitlines() if re.match(rf"│ {option} ", line))
            _, _, value, meaning, _ = (cell.strip() for cell in row.split("│"))
            assert value and str(default).startswith(value) and meaning
        assert text.count("│ damping ") == 1
        assert f"osc.build({name!r}, model)" in text and "step(residuals)" in text and entry.paper in text
        assert ("step(closure)" in text) is not entry.factory().needs_residuals
        assert type(entry.factory().search).__name__ in text


class TestParts:
    def test_every_name_can_be_typed(self) -> None:
        text = shown(show_parts, width=200)
        for kind, parts in osc.registry.parts().items():
            assert kind in text
            for part in parts.values():
                assert getattr(osc, exported_name(part)) is part
                assert f"\n{exported_name(part)} " in text

    def test_a_part_from_elsewhere_has_its_module(self) -> None:
        assert exported_name(describe) == f"{describe.__module__}.describe"  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", sorted(osc.registry.parts()))
    def test_a_kind_filters(self, kind: str) -> None:
        text = shown(show_parts, kind.replace(" ", "-"), width=200)
        assert text.startswith(f"{kind}\n")
        listed = set(re.findall(r"^(\S+) ", text.partition("\n")[2].partition("\n\n")[0], re.MULTILINE))
        assert listed == {exported_name(part) for part in osc.registry.parts()[kind].values()}

    def test_a_piece_of_a_name_and_a_piece_of_a_kind_filter(self) -> None:
        assert "LBFGS" in shown(show_parts, "bfgs")
        assert "Split" not in shown(show_parts, "bfgs")
        assert "PerOutput" in shown(show_parts, "partit")

    def test_every_part_has_a_page_with_its_arguments(self) -> None:
        for parts in osc.registry.parts().values():
            for part in parts.values():
                text = shown(show_parts, exported_name(part), width=160)
                for argument in describe(part).arguments:
                    assert f"│ {argument.name} " in text

    def test_a_name_that_is_nowhere(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'BFGS'"):
            shown(show_parts, "BFSG")


def test_a_docstring_taken_apart() -> None:
    @dataclass
    class Inner:
        size: int = 3

    @dataclass
    class Part:
        """What it is,
        on two lines.

        A paragraph that goes
        on.
        - an item
          that goes on

            formula = 1
        Args:
            one: first, see
                ``two``: below.
            inner: made anew.

        Raises:
            ArgumentError: never.

        Memory: none.
        """

        one: float
        inner: Inner = field(default_factory=lambda: Inner(5))
        unsaid: str = "x"

    found = describe(Part)
    assert found.summary == "What it is, on two lines."
    assert found.body == "A paragraph that goes on.\n- an item that goes on\n\n    formula = 1"
    assert found.rest == "Memory: none."
    assert [(entry.name, entry.default, entry.meaning) for entry in found.arguments] == [
        ("one", "required", "first, see two: below."),
        ("inner", "Inner(size=5)", "made anew."),
        ("unsaid", "x", ""),
    ]


class TestProblems:
    def test_the_table_has_every_problem_and_pieces_of_names_choose(self) -> None:
        text = shown(show_problems, width=200)
        assert all(name in text for name in PROBLEMS)
        chosen = shown(show_problems, "gcn", "logistic", width=200)
        assert {name for name in PROBLEMS if name in chosen} == {"cora-gcn", "citeseer-gcn", "pubmed-gcn", "logistic"}
        with pytest.raises(UnknownNameError, match="problem 'cifra'"):
            shown(show_problems, "cifra")

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_a_page_says_where_the_data_come_from_and_what_can_be_chosen(self, name: str) -> None:
        text, problem = squeezed(shown(show_problems, name, width=120)), get_problem(name)
        for fact in (problem.summary, problem.source.title, problem.source.licence, problem.source.citation):
            assert squeezed(fact) in text
        assert "size" in text and "batch" in text
        if problem.target is not None:
            assert f"{problem.target.metric}{problem.target.value:g}" in text
        for method, numbers in problem.settings.items():
            assert squeezed(f"{method} takes") in text
            shown_as = {key: value if isinstance(value, str) else f"{value:g}" for key, value in numbers.items()}
            assert all(f"{option}{value}" in text for option, value in shown_as.items())
        options = shown(show_problems, name, width=120).split("options")[1]
        assert "source" not in options and "classes" not in options


def test_problems_of_residuals_say_so() -> None:
    text = shown(show_problems, "heat-1d", width=120)
    assert re.search(r"likelihood +none: residuals", text) and re.search(r"target +relative_l2 1e-06", text)
    assert "data_seed" in text and "resample" in text


def test_changes_of_images_are_told_in_words() -> None:
    text = squeezed(shown(show_problems, "svhn-vgg11"))
    assert squeezed("crops within a margin of 2 pixels, then brightness times") in text and "RandomCrop(" not in text
