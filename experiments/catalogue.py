"""The commands that show what there is: methods, parts, problems; and the one that times it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import registry
from ..errors import UnknownNameError
from .environment import choose_device, describe_environment, prepare_process
from .problems import PROBLEMS, get_problem
from .records import write_json

__all__ = ["Bench", "Methods", "Problems"]


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods, with their papers and defaults; or the parts they are composed of."""

    parts: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the parts instead."""

    def run(self, console: Console) -> int:
        """Print the table."""
        console.print(_parts_table() if self.parts else _methods_table())
        return 0


@dataclass(frozen=True, kw_only=True)
class Problems:
    """List the problems."""

    def run(self, console: Console) -> int:
        """Print the table."""
        table = Table("problem", "summary", "likelihood", "batch", title="problems")
        for name in PROBLEMS:
            problem = get_problem(name)
            table.add_row(f"[bold]{name}", escape(problem.summary), problem.likelihood, str(problem.batch_size))
        console.print(table)
        return 0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a training step of every method beside one of torch.optim.SGD, and count the bytes of its state."""

    problem: str = "mnist-autoencoder"
    """Problem whose network is trained."""
    batch_size: int = 1000
    """Samples in a mini-batch."""
    rounds: int = 7
    """Interleaved rounds; the table shows medians over them."""
    threads: int = 2
    """Threads of one operation on the CPU."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    data_dir: Path | None = None
    """Folder with the data sets. Default: uniform random numbers in [0, 1] instead of images."""
    only: tuple[str, ...] = ()
    """Contestants, by the labels of the table. Default: all."""
    out: Path | None = None
    """JSON file to write."""

    def run(self, console: Console) -> int:
        """Measure, print the table, and write it."""
        from .batches import move_data
        from .bench import CONTESTANTS, benchmark, benchmark_table, random_data

        prepare_process(self.threads)
        device = choose_device(self.device)
        known = {contestant.label: contestant for contestant in CONTESTANTS}
        for label in self.only:
            if label not in known:
                raise UnknownNameError("contestant", label, known)
        chosen = tuple(known[label] for label in self.only or known)
        problem = get_problem(self.problem)
        data = move_data(random_data(problem) if self.data_dir is None else problem.load(self.data_dir), device)
        with console.status("preparing") as status:
            note = status.update if console.is_terminal else console.print
            timings = benchmark(chosen, problem, data, self.rounds, self.batch_size, note)
        title = f"{problem.name}, batch {self.batch_size}, {self.threads} threads, {self.rounds} rounds"
        console.print(benchmark_table(timings, title))
        if self.out is not None:
            rows = [dataclasses.asdict(timing) for timing in timings]
            settings = {"problem": problem.name, "batch_size": self.batch_size, "rounds": self.rounds}
            settings["data"] = "random" if self.data_dir is None else "images"
            write_json(self.out, {"settings": settings, "environment": describe_environment(device), "rows": rows})
        return 0


def _methods_table() -> Table:
    table = Table("method", "summary", "paper", "defaults", title="methods")
    for name, entry in sorted(registry.methods().items()):
        defaults = ", ".join(f"{key}={value:g}" for key, value in entry.defaults.items())
        table.add_row(f"[bold]{name}", escape(entry.summary), escape(entry.paper or ""), defaults)
    return table


def _parts_table() -> Table:
    table = Table("kind", "part", "what it is", title="parts")
    for kind, parts in registry.parts().items():
        for name, part in sorted(parts.items()):
            first = (part.__doc__ or "").strip().splitlines()
            table.add_row(kind, f"[bold]{escape(name)}", escape(first[0]) if first else "")
        table.add_section()
    return table
