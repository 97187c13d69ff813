"""The house: floors, sizes, names, packaging. Read from the sources, not from the running package."""

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


@pytest.mark.parametrize("path", [*LIBRARY, *TESTS, *EXAMPLES], ids=identity)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_the_median_file_is_under_200_lines() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in LIBRARY)
    assert lengths[len(lengths) // 2] < 200


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", [*LIBRARY, *TESTS, *EXAMPLES], ids=identity)
def test_function_bodies_are_at_most_40_lines(path: Path) -> None:
    long = {}
    for node in functions(path):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
        if lines > 40:
            long[node.name] = lines
    assert not long


@pytest.mark.parametrize("path", LIBRARY, ids=identity)
def test_every_public_function_is_annotated_and_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "module without a docstring"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    for node in public:
        assert ast.get_docstring(node), node.name
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
