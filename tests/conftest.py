"""What every test file relies on.

* The folder of the tests lies on ``sys.path``: ``from reference import kbfgs`` works in any test file. Neither
  ``tests/`` nor its subfolders (``reference/`` excepted) hold an ``__init__.py``.
* The root of the repository is the package ``osculate``. pytest would import it a second time under the name of
  the checkout's folder (for a root with an ``__init__.py`` it builds a Package); it is collected as a plain folder.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))
torch.set_num_threads(1)  # the workers of pytest-xdist are the parallelism

settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


class RootIsAPlainFolder:
    """Keeps pytest from importing the root package under the name of its folder."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Collect the root as a folder, everything else as pytest would."""
        return pytest.Dir.from_parent(parent, path=path) if path == TESTS.parent else None


def pytest_configure(config: pytest.Config) -> None:
    """Register the hook globally: a conftest's own hooks do not see the folders above it."""
    config.pluginmanager.register(RootIsAPlainFolder(), "root-is-a-plain-folder")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the suite enumerated: the sums over all passed tests of ``record_property("count: ...", number)``."""
    totals: dict[str, int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name.startswith("count: "):
                key = name.removeprefix("count: ")
                totals[key] = totals.get(key, 0) + int(value)
    if totals:
        terminalreporter.section("enumerated")
    for key, total in sorted(totals.items()):
        terminalreporter.write_line(f"{total:6d} {key}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """Undo what commands set for the whole process: Hypothesis refuses to run where denormals are flushed."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture
def data_folder() -> Path:
    """Folder of the recorded trajectories."""
    return TESTS / "data"
