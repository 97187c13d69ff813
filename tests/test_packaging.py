"""What people install: sources, wheel, and the commands of a wheel that knows no checkout.

Nothing is downloaded: setuptools is that of the environment, and the environment made here sees its libraries.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import osculate
import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_CODE = {".py", ".pyc"}
ABOUT = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "pyproject.toml"}
WRITTEN = {"setup.cfg", "PKG-INFO"}
LEFT_OUT = {"build", "dist", "runs", "site"}
"""Folders at the root that git ignores: what other commands make there."""


def clean_environment() -> dict[str, str]:
    """Without what makes this process find the checkout."""
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTEST_ADDOPTS")
    return {key: value for key, value in os.environ.items() if key not in left_out} | {"OMP_NUM_THREADS": "1"}


def left_out(folder: str, names: list[str]) -> set[str]:
    """What is no source: hidden, made by Python, or made by a command at the root."""
    made = {name for name in names if name.startswith(".") or name == "__pycache__" or name.endswith(".egg-info")}
    return made | (LEFT_OUT if Path(folder) == ROOT else set())


def call(*command: str | Path, cwd: Path) -> str:
    found = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, f"{command}: {found.returncode}\n{found.stdout[-4000:]}\n{found.stderr[-4000:]}"
    return found.stdout + found.stderr


def build(kind: str, source: Path, target: Path) -> Path:
    """What ``python -m build`` asks the backend for, with warnings of Python as errors and none of setuptools."""
    code = f"from setuptools import build_meta; print('made', build_meta.build_{kind}({str(target)!r}))"
    said = call(sys.executable, "-W", "error", "-c", code, cwd=source)
    assert not [line for line in said.splitlines() if re.search(r"warn|deprecat|!!", line, re.I)], said
    made = re.search(r"^made (\S+)$", said, re.M)
    assert made is not None, said
    return target / made[1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77")
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT, folder / "checkout", ignore=left_out)
    return build("sdist", folder / "checkout", folder)


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    """The wheel, from the source distribution, as ``python -m build`` makes it."""
    with tarfile.open(sources) as archive:
        archive.extractall(sources.parent, filter="data")
    return build("wheel", sources.parent / sources.name.removesuffix(".tar.gz"), sources.parent)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and sees the libraries of this one."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", system_site_packages=True, symlinks=True)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    own = call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    # A path in a .pth file adds a folder without what its own .pth files add: an editable install of the checkout.
    (Path(own) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    where = call(python, "-c", "import osculate; print(osculate.__file__)", cwd=folder).strip()
    assert Path(where).is_relative_to(folder), "the checkout is found before the wheel"
    return programs


def needed() -> set[str]:
    """Every file of a package that is in the checkout."""
    folders = [name.split(".")[1:] for name in PROJECT["tool"]["setuptools"]["packages"]]
    return {
        str(Path("osculate", *folder, path.name)) for folder in folders for path in ROOT.joinpath(*folder).glob("*.py")
    }


def data_files() -> set[str]:
    """Every file below the packages that is no code."""
    tops = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    found = {path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()}
    names = {path.relative_to(ROOT) for path in found if path.suffix not in NOT_CODE}
    hidden = {name for name in names if any(part.startswith((".", "__pycache__")) for part in name.parts)}
    return {str("osculate" / name) for name in names - hidden}


def test_every_pattern_of_data_finds_files_and_no_file_is_forgotten() -> None:
    found: set[str] = {"osculate/py.typed"}
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            matched = [path for path in folder.glob(pattern) if path.is_file()]
            assert matched, f"{pattern} of {package} finds nothing"
            found |= {str("osculate" / path.relative_to(ROOT)) for path in matched}
    assert found == data_files() | {"osculate/py.typed"}


def test_the_wheel_has_what_it_must_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        about = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    own = {name for name in names if ".dist-info/" not in name}
    assert own == needed() | data_files() | {"osculate/py.typed"}
    assert {name.split("/")[0] for name in names} == {"osculate", f"osculate-{osculate.__version__}.dist-info"}
    assert "Typing :: Typed" in about and "License-Expression: MIT" in about


def test_the_sources_have_what_the_wheel_is_made_of_and_no_tests(sources: Path) -> None:
    with tarfile.open(sources) as archive:
        names = {Path(*Path(entry.name).parts[1:]) for entry in archive.getmembers() if entry.isfile()}
    own = {str(name) for name in names if name.parts[0] != "osculate.egg-info"}
    packaged = {name.removeprefix("osculate/") for name in needed() | data_files() | {"osculate/py.typed"}}
    assert own == packaged | ABOUT | WRITTEN


def test_one_version_is_told_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert osculate.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", changes, re.M)
    assert dated is not None, f"the changelog has no section of version {version} with its date"
    assert f"version: {version}\n" in citation and f'date-released: "{dated[1]}"' in citation


def test_a_newcomer_with_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    command = installed / "osculate"
    small = ("--problem", "digits-classifier", "--problem-option", "size=small", "--epochs", "1")
    said = call(command, "compare", *small, "--methods", "sgdm", "kfac", "--out", "race", cwd=tmp_path)
    assert "kfac" in said and (tmp_path / "race" / "comparison.png").exists()
    said = call(command, "study", "smoke", "--dry-run", cwd=tmp_path)
    assert "30 runs" in said
    said = call(command, "verify", "T4", "--out", "theorem", cwd=tmp_path)
    assert "1 held" in said and (tmp_path / "theorem" / "report.html").exists()
    call(command, "train", *small, "--method", "sgdm", "--out", "runs/sgdm/final-0", cwd=tmp_path)
    said = call(command, "report", "runs", cwd=tmp_path)
    assert "1 of 1" in said and (tmp_path / "runs" / "report" / "report.html").exists()


PROGRAM = """
from typing import assert_type

import osculate as osc
from torch import nn

model = nn.Linear(2, 2)
assert_type(osc.build("kfac", model, lr=0.1), osc.SecondOrder)
assert_type(osc.build("lm", model), osc.WholeModel)
parts: list[osc.Preconditioner | osc.ByLayer] = [
    osc.Kronecker(osc.Covariance(), osc.Covariance()),
    osc.Kronecker(osc.Root(4.0), osc.Root(4.0)),
    osc.Kronecker(osc.HessianActionBFGS(), osc.LBFGS(20)),
    osc.Diagonal(power=0.5),
    osc.MiniBlock(osc.PerOutput()),
    osc.Eigenbasis(),
    osc.Dense(),
    osc.Identity(),
]
methods = [osc.Method(part, damping=osc.Factored(), momentum=osc.EMA()) for part in parts]
methods += [osc.Method(osc.Identity(), step_size=osc.RelativeBound(osc.ConstantStep(), 0.1), guard=osc.Backtrack())]
assert_type(osc.build(methods[0], model), osc.SecondOrder)
"""


@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_type_checkers_see_the_types_of_the_wheel(checker: str, installed: Path, tmp_path: Path) -> None:
    """A program that composes methods has no error, and a wrong one has: ``Any`` everywhere would hide it."""
    program = shutil.which(checker) or shutil.which(checker, path=str(Path(sys.executable).parent))
    if program is None or (checker == "pyright" and shutil.which("node") is None):
        pytest.skip(f"{checker} is not installed, or would download a part of itself")
    where = {"pyright": "--pythonpath", "mypy": "--python-executable"}[checker]
    (tmp_path / "right.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(PROGRAM + "osc.EMA(0.9).nothing\n", encoding="utf-8")
    with pytest.raises(AssertionError) as told:
        call(program, where, installed / "python", "right.py", "wrong.py", cwd=tmp_path)
    errors = [line for line in str(told.value).splitlines() if "error:" in line]
    assert len(errors) == 1 and "wrong.py" in errors[0] and "nothing" in errors[0], told.value
