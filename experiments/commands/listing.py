"""What ``osculate methods`` shows: lists of methods and parts, and one of them in full."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ... import Method, registry
from ...framework.methods.parts import label
from ...framework.whole_model.method import WholeEntry
from ..rivals.catalogue import Runnable, numbers_of, runnable
from ..rivals.rival import Rival
from ..runs.on_screen import FittedTable
from .docstrings import Argument, Description, describe
from .one_liners import one_line
from .screen import names_with_texts, show_named

__all__ = ["exported_name", "options_table", "pairs_table", "show_methods", "show_parts"]

_NUMBERS = {
    "lr": "learning rate; where the method chooses its steps itself, a factor on them",
    "damping": "lambda: what is added to the curvature before it is inverted",
    "weight_decay": "strength of the weight decay",
}
_RELATIVE = "relative to the largest eigenvalue of the curvature; where the search adapts it, its beginning"
_SECTIONS = (
    "methods of parts",
    "methods over the whole model, for residuals or a fixed mini-batch",
    "optimizers of other packages",
)
_ONE_IN_FULL = (
    "'osculate methods NAME' shows one in full, --details papers and default numbers of all, "
    "--parts what methods are made of."
)
_QUESTIONS = ("preconditioner", "curvature", "damping", "momentum", "weight_decay", "step_size", "guard", "fallback")


def show_methods(console: Console, words: Sequence[str], details: bool = False) -> None:
    """Print the methods that ``words`` name: full names one by one in full, anything else as a list.

    Args:
        console: where to print.
        words: names, or pieces of names; none means all.
        details: whether the list has the whole sentence, the paper and the numbers of each instead of a short line.

    Raises:
        UnknownNameError: a word occurs in no name.
    """
    table = {**registry.methods(), **runnable()}
    table = dict(sorted(table.items(), key=lambda entry: (_section(entry[1]), entry[0])))
    show_named(console, "method", words, table, _method_page, _details_list if details else _methods_list)


def show_parts(console: Console, words: Sequence[str]) -> None:
    """Print the parts that ``words`` name: full names one by one in full, kinds and pieces of names as a list.

    Args:
        console: where to print.
        words: kinds (``damping``, ``step-size``), names, or pieces of either; none means all.

    Raises:
        UnknownNameError: a word occurs in no kind and no name.
    """
    rows = {
        name: (kind, name, part)
        for kind, parts in registry.parts().items()
        for name, part in sorted({exported_name(part): part for part in parts.values()}.items(), key=_small_letters)
    }

    def matching(word: str) -> list[str]:
        """Of the kind ``word``; where there is no such kind, parts that hold it in kind or name."""
        wanted = word.lower().replace("-", " ").replace("_", " ")
        exact = [name for name, (kind, _, _) in rows.items() if kind == wanted]
        return exact or [name for name, (kind, _, _) in rows.items() if wanted in kind or wanted in name.lower()]

    show_named(console, "part or kind of part", words, rows, _part_page, _parts_list, matching, registry.parts())


def _small_letters(entry: tuple[str, type]) -> str:
    return entry[0].lower()


def exported_name(part: type) -> str:
    """Return the name under which the package exports a part, or module and name of one that comes from elsewhere."""
    root = importlib.import_module((__package__ or "").partition(".")[0])
    for name in root.__all__:
        if getattr(root, name) is part:
            return str(name)
    return f"{part.__module__}.{part.__qualname__}"


def _section(entry: Runnable) -> int:
    """Where it stands in the table: methods of parts, methods over the whole model, optimizers of other packages."""
    return 2 if isinstance(entry, Rival) else 1 if isinstance(entry, WholeEntry) else 0


def _methods_list(entries: Sequence[Runnable]) -> RenderableType:
    """Names with one short line each, by sections."""
    lines = {entry.name: one_line(entry.name, _summary(entry)) for entry in entries}
    return _by_section(entries, lines, _ONE_IN_FULL)


def _details_list(entries: Sequence[Runnable]) -> RenderableType:
    """Names with the whole first sentence, the paper and the numbers, by sections."""
    texts = {}
    for entry in entries:
        numbers = {name: value for name, value in numbers_of(entry).items() if value or name == "lr"}
        defaults = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in numbers.items())
        facts = [f"paper {entry.paper}" if entry.paper else "", f"defaults {defaults}" if defaults else ""]
        texts[entry.name] = "\n".join([_summary(entry), "; ".join(filter(None, facts))]).strip() + "\n"
    return _by_section(entries, texts, _ONE_IN_FULL)


def _by_section(entries: Sequence[Runnable], texts: Mapping[str, str], footer: str) -> RenderableType:
    shown: list[RenderableType] = []
    width = max(len(entry.name) for entry in entries)
    for section, heading in enumerate(_SECTIONS):
        own = {entry.name: texts[entry.name] for entry in entries if _section(entry) == section}
        if own:
            shown += [f"[bold underline]{heading}[/]", names_with_texts(own, width), ""]
    return Group(*shown, footer)


def _parts_list(rows: Sequence[tuple[str, str, type]]) -> RenderableType:
    shown: list[RenderableType] = []
    width = max(len(name) for _, name, _ in rows)
    for kind in dict.fromkeys(kind for kind, _, _ in rows):
        own = {name: describe(part).summary for other, name, part in rows if other == kind}
        shown += [f"[bold underline]{escape(kind)}[/]", names_with_texts(own, width), ""]
    footer = "import osculate as osc; a part is osc.NAME(...). 'osculate methods --parts NAME' shows one in full."
    return Group(*shown, footer)


def _summary(entry: Runnable) -> str:
    if isinstance(entry, Rival):
        return f"{entry.summary} Of the package {entry.distribution}."
    return describe(entry.factory).summary


def _method_page(entry: Runnable) -> RenderableType:
    if isinstance(entry, Rival):
        return _rival_page(entry)
    if isinstance(entry, WholeEntry):
        return _whole_page(entry)
    described, method = describe(entry.factory), entry.factory()
    numbers = [Argument(name, f"{value:g}", _NUMBERS[name]) for name, value in entry.defaults.items()]
    options = described.arguments
    told = ", likelihood='categorical'" if method.needs_likelihood else ""
    keyword = f" --option {options[0].name}={options[0].default}" if options else ""
    facts = {
        "paper": entry.paper or "none",
        "closure": "needed, step(closure)" if method.needs_closure else "not needed",
        "likelihood": _likelihood(method),
        "warm start": "optional pass over the data" if method.warm_start is not None else "none",
        "in Python": f"osc.build({entry.name!r}, model, lr={entry.defaults['lr']:g}{told}, ...)",
        "in a shell": f"osculate train --method {entry.name} --lr {entry.defaults['lr']:g}{keyword}",
    }
    parts = {name.replace("_", " "): label(getattr(method, name)) for name in _QUESTIONS}
    return _page(entry.name, described, facts, [*numbers, *options], ("composed of", parts))


def _whole_page(entry: WholeEntry) -> RenderableType:
    described, method = describe(entry.factory), entry.factory()
    numbers = [Argument(name, f"{value:g}", _RELATIVE) for name, value in numbers_of(entry).items()]
    options = [argument for argument in described.arguments if argument.name not in numbers_of(entry)]
    facts = {
        "paper": entry.paper or "none",
        "closure": "needed, step(residuals)" + ("" if method.needs_residuals else " or step(closure)"),
        "learning rate": "none: it searches along every step",
        "in Python": f"osc.build({entry.name!r}, model)",
        "in a shell": f"osculate train --problem poisson-2d --method {entry.name} --seconds 60",
    }
    parts = {name: label(getattr(method, name)) for name in ("curvature", "search")}
    return _page(entry.name, described, facts, [*numbers, *options], ("composed of", parts))


def _rival_page(rival: Rival) -> RenderableType:
    facts = {
        "paper": rival.paper,
        "package": f"{rival.distribution}, {rival.licence}; tested with {rival.tested}",
        "installed": rival.installed or f"no; python -m pip install '{rival.distribution}=={rival.tested}'",
        "in a shell": f"osculate train --method {rival.name}",
    }
    numbers = [Argument(name, f"{value:g}", _NUMBERS[name]) for name, value in rival.defaults.items()]
    options = [Argument(name, str(entry.default), entry.meaning) for name, entry in rival.keywords.items()]
    return _page(rival.name, Description(rival.summary, "", (), ""), facts, [*numbers, *options])


def _likelihood(method: Method) -> str:
    if method.needs_likelihood:
        return "needed: categorical, bernoulli or gaussian"
    start = method.warm_start
    return "only for the warm start" if start is not None and start.needs_likelihood else "not needed"


def _part_page(row: tuple[str, str, type]) -> RenderableType:
    kind, name, part = row
    described = describe(part)
    required = ", ".join(f"{entry.name}=..." for entry in described.arguments if entry.default == "required")
    facts = {"kind": kind, "in Python": f"osc.{name}({required})" if "." not in name else f"{name}({required})"}
    return _page(name, described, facts, described.arguments)


def _page(
    name: str,
    described: Description,
    facts: Mapping[str, str],
    arguments: Iterable[Argument],
    further: tuple[str, Mapping[str, str]] | None = None,
) -> RenderableType:
    shown: list[RenderableType] = [f"[bold]{escape(name)}[/]  {escape(described.summary)}", ""]
    for text in (described.body, described.rest):
        shown += [escape(text), ""] if text else []
    shown += [pairs_table(facts), ""]
    options = options_table(arguments)
    if options.row_count:
        shown += [options, ""]
    if further is not None:
        shown += [f"[italic]{further[0]}", pairs_table(further[1]), ""]
    return Group(*shown)


def options_table(arguments: Iterable[Argument]) -> Table:
    """Return a table of keywords with their defaults and meanings."""
    options = FittedTable(title="options", title_justify="left")
    options.add_column("name", no_wrap=True, style="bold")
    options.add_column("default", overflow="fold")
    options.add_column("meaning", overflow="fold")
    for entry in arguments:
        options.add_row(escape(entry.name), escape(entry.default), escape(entry.meaning))
    return options


def pairs_table(rows: Mapping[str, Any]) -> Table:
    """Return names with their values, without lines."""
    return names_with_texts({name: str(value) for name, value in rows.items()})
