"""The house: floors, circles, names, packaging. Read from the sources, not from the running package."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "errors": 0,
    "checking": 1,
    "curvature": 2,
    "preconditioners": 3,
    "stepsize": 3,
    "framework": 4,
    "analysis": 5,
    "experiments": 6,
}
FOLDERS = [name for name in FLOORS if (ROOT / name).is_dir()]
LIBRARY = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])
CORE = [path for path in LIBRARY if path.relative_to(ROOT).parts[0] not in ("analysis", "experiments")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EXAMPLES = sorted((ROOT / "docs").rglob("*.py"))
ELSEWHERE = {"torchvision", "backpack", "curvlinops", "hypothesis", "pytest", "tests", "reference", "small_nets"}


def identity(path: Path) -> str:
    """Path within the repository."""
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[ast.AST, str, bool]]:
    """(node, absolute dotted name, whether at module level); relative imports count from ``osculate``."""
    tree = ast.parse(path.read_text())
    package = ["osculate", *path.relative_to(ROOT).parts[:-1]]
    eager = set(map(id, _eager(tree.body)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, id(node) in eager
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            for alias in node.names:
                yield node, f"{module}.{alias.name}" if node.level and not node.module else module, id(node) in eager


def _eager(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _eager(getattr(statement, field, []))


def upward(path: Path, floors: dict[str, int] = FLOORS) -> list[str]:
    """Imports of a file that point upward or sideways into another folder of the same floor."""
    parts = path.relative_to(ROOT).parts
    own = parts[0].removesuffix(".py")
    if own == "__init__":
        return []
    found = []
    for node, name, _ in imports(path):
        pieces = name.split(".")
        if pieces[0] != "osculate" or len(pieces) < 2:
            continue
        target = pieces[1]
        if target in floors and target != own and floors[target] >= floors[own]:
            found.append(f"line {getattr(node, 'lineno', 0)}: {name}")
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=identity)
def test_no_import_points_upward(path: Path) -> None:
    assert not upward(path)


def test_the_check_would_see_an_upward_import() -> None:
    """With the floors turned upside down nearly every file offends."""
    turned = {name: -floor for name, floor in FLOORS.items()}
    offending = [path for path in LIBRARY if upward(path, turned)]
    assert len(offending) > len(LIBRARY) // 2


def module_name(path: Path) -> str:
    """Dotted name of a file of the library."""
    return ".".join(["osculate", *path.relative_to(ROOT).with_suffix("").parts])


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which files a file imports, by dotted name, wherever the import stands: also in functions and for types alone.

    Args:
        sources: text of every file by dotted name; imports of anything else, such as a package, do not count.
    """
    graph: dict[str, set[str]] = {}
    for name, text in sources.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                base = name.split(".")[: -node.level] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = found & sources.keys()
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of files that reach each other by imports, each as large as it can be (Tarjan, SIAM J. Comput. 1:146)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in graph[name]:
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            start = stack.index(name)
            group = set(stack[start:])
            del stack[start:]
            if len(group) > 1 or name in graph[name]:
                found.append(group)

    for name in graph:
        if name not in order:
            visit(name)
    return found


def test_no_file_takes_part_in_a_circle_of_imports() -> None:
    sources = {module_name(path): path.read_text() for path in LIBRARY if path.name != "__init__.py"}
    found = circles(import_graph(sources))
    assert not [sorted(group) for group in found]


@pytest.mark.parametrize(
    "closing",
    [
        "from ..a import first",
        "from .. import a",
        "def late():\n    from ..a import first",
        "if TYPE_CHECKING:\n    from ..a import first",
        "import house.a",
    ],
)
def test_the_check_would_see_a_circle(closing: str) -> None:
    """Three made-up files in two folders; the last import closes the circle, a fourth file looks on."""
    sources = {
        "house.a": "from .room.b import second",
        "house.room.b": "from . import c",
        "house.room.c": "import math",
        "house.guest": "from .a import first",
    }
    assert not circles(import_graph(sources))
    sources["house.room.c"] = closing
    assert circles(import_graph(sources)) == [{"house.a", "house.room.b", "house.room.c"}]


@pytest.mark.parametrize("path", LIBRARY, ids=identity)
def test_imports_inside_the_library_are_relative_and_nothing_foreign_is_eager(path: Path) -> None:
    for node, name, eager in imports(path):
        top = name.split(".")[0]
        if isinstance(node, ast.Import) or not node.level:  # type: ignore[attr-defined]
            assert top != "osculate", f"line {node.lineno}: write a relative import"  # type: ignore[attr-defined]
        foreign = ELSEWHERE - ({"hypothesis"} if path.name == "strategies.py" else set())
        assert not (eager and top in foreign), f"line {node.lineno}: {name}"  # type: ignore[attr-defined]
        assert top not in {"tests", "pytest", "reference", "small_nets"}, name
        assert top != "hypothesis" or path.name == "strategies.py", name


@pytest.mark.parametrize("path", EXAMPLES, ids=identity)
def test_examples_use_the_package_by_its_name(path: Path) -> None:
    names = {name.split(".")[0] for _, name, _ in imports(path)}
    assert "osculate" in names and not names & {"tests", "reference", *FOLDERS}


@pytest.mark.parametrize("path", LIBRARY, ids=identity)
def test_every_public_function_is_annotated_and_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "module without a docstring"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    for node in public:
        overload = any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list)
        assert overload or ast.get_docstring(node), node.name
        assert node.returns is not None, node.name


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.stem != "__main__"], ids=identity)
def test_public_names_are_listed_exist_and_have_docstrings(path: Path) -> None:
    """``__all__`` is declared in every file, complete for its classes and functions, and documented."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(["osculate", *(parts[:-1] if parts[-1] == "__init__" else parts)])
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", None)
    if path.name == "__init__.py" and listed is None:
        return
    assert listed is not None, "no __all__"
    assert len(listed) == len(set(listed)), "a name is listed twice"
    for entry in listed:
        value = getattr(module, entry)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__ and not value.__doc__.startswith(f"{entry}("), f"{entry} has no docstring"


def test_packaging_names_every_folder_and_no_test() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {"osculate"} | {
        ".".join(["osculate", *path.parent.relative_to(ROOT).parts])
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(tool["packages"]) == expected
    with_code = {path.parent for path in LIBRARY}
    assert all((folder / "__init__.py").exists() for folder in with_code)
    assert not any("test" in name for name in tool["packages"])
    assert tool["package-dir"] == {"osculate": "."}
    assert (ROOT / "py.typed").exists()


def test_importing_the_library_stays_light() -> None:
    """No plotting, no tables, no command line, no optional backends behind ``import osculate``."""
    heavy = [
        "matplotlib",
        "tyro",
        "pandas",
        "rich",
        "pooch",
        "torchvision",
        "backpack",
        "osculate.experiments",
        "hypothesis",
    ]
    code = f"import sys, osculate; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_no_machine_paths_in_the_sources() -> None:
    offending = ("/" + "work/", "/" + "tmp/", "/" + "home/")
    for path in [*LIBRARY, *TESTS, *EXAMPLES]:
        text = path.read_text()
        assert not any(word in text for word in offending), identity(path)
