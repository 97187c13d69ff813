"""The commands that show what there is: methods, parts, problems; and the one that times it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from ...errors import ArgumentError, UnknownNameError
from ..data.datafiles import data_folder
from ..problems import get_problem
from ..runs.environment import choose_device, describe_environment, prepare_process
from ..runs.records import write_json
from ..runs.targets import require_file
from .compose import show_compositions
from .flags import Count, DeviceFlag, Place
from .listing import show_methods, show_parts
from .problem_listing import show_problems

__all__ = ["Bench", "Methods", "Problems"]

Names = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods, or show one in full: options with their defaults, paper, what it needs.

    With --parts, the same for the parts that methods are composed of. With --compose, which parts fit together. For
    example: 'osculate methods kfac', 'osculate methods --parts damping', 'osculate methods --parts Kronecker',
    'osculate methods --compose MiniBlock'. 'osculate show --help' says what other commands show.
    """

    names: Names = ()
    """Names to show in full, or pieces of names to list. With --parts also kinds, such as damping. Default: all."""
    details: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """List papers and default numbers, too."""
    parts: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """Parts instead of methods."""
    compose: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """Which structures fit which estimators and damping rules, and why not; names choose structures."""

    def run(self, console: Console) -> int:
        """Print the table or the pages."""
        if self.parts and self.compose:
            raise ArgumentError("--parts and --compose are two different tables; give one of them")
        if self.details and (self.parts or self.compose):
            raise ArgumentError("--details is about methods; leave out --parts and --compose")
        if self.compose:
            show_compositions(console, self.names)
        elif self.parts:
            show_parts(console, self.names)
        else:
            show_methods(console, self.names, self.details)
        return 0


@dataclass(frozen=True, kw_only=True)
class Problems:
    """List the problems, or show one in full: data, licence, citation, batch, target, options, recommended numbers.

    For example: 'osculate problems digits-classifier', or 'osculate problems digits' for all with that in their name.
    """

    names: Names = ()
    """Names to show in full, or pieces of names to list. Default: all."""

    def run(self, console: Console) -> int:
        """Print the table or the pages."""
        show_problems(console, self.names)
        return 0


@dataclass(frozen=True, kw_only=True)
class Bench(DeviceFlag):
    """Time a training step of every method beside one of torch.optim.SGD, and count the bytes of its state.

    With --launches, count a step's operations instead, on a small autoencoder: what a GPU would be asked to do is
    seen without one. With --processes, count what each of several processes sends and keeps that train together; with
    --planned, work out from published rates what up to 512 of them would take for larger networks.
    """

    problem: str = "mnist-autoencoder"
    """Problem whose network is trained."""
    batch_size: int = 1000
    """Samples in a mini-batch."""
    rounds: int = 7
    """Interleaved rounds; the table shows medians over them."""
    threads: int = 2
    """Threads of one operation on the CPU."""
    data_dir: Place = None
    """Folder with the data sets. Default: uniform random numbers in [0, 1] instead of images."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LABEL ...", help_behavior_hint="")] = ()
    """Contestants, by the labels of the table. Default: all."""
    out: Place = None
    """JSON file to write. Default: none."""
    launches: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[METHOD ...]", help_behavior_hint="")] = None
    """Operations, synchronisations and host tensors of these methods' steps (torch-sgd and torch-adam are known, too),
    counted and not timed. Without names: of all methods. Of the other options, --device and --out are heeded."""
    processes: Count = None
    """Start as many processes here, one thread each, and count bytes sent and kept, by what they carry, beside the
    formula. Of the other options, --batch-size (of all processes together) and --out are heeded, and the next four."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...", help_behavior_hint="")] = ()
    """Methods of --processes. Default: kfac, kbfgs, joint-kfac, mbf and shampoo."""
    divisions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIVISION ...", help_behavior_hint="")] = ()
    """Divisions of the work of --processes: replicated, owners, owners-only, fsdp. Default: all."""
    network: str = "small-autoencoder"
    """Network of --processes: small-autoencoder, mnist-autoencoder, small-resnet, resnet-32; data are random."""
    steps: int = 20
    """Steps of --processes, the first included."""
    planned: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """K-FAC on 8 to 512 processes by formula: nothing is run. Of the other options, --out is heeded."""

    def run(self, console: Console) -> int:
        """Measure, print the table, and write it."""
        modes = (self.launches is not None, self.processes is not None, self.planned)
        if sum(modes) > 1:
            raise ArgumentError("--launches, --processes and --planned are different tables; give one of them")
        if self.launches is not None:
            return self._count(console, self.launches)
        if self.processes is not None:
            return self._share(console, self.processes)
        if self.planned:
            return self._plan(console)
        from ..runs.batches import move_data
        from ..runs.bench import CONTESTANTS, benchmark, benchmark_table, random_data

        if self.data_dir is not None:
            data_folder(self.data_dir)
        if self.out is not None:
            require_file(self.out)
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

    def _count(self, console: Console, methods: tuple[str, ...]) -> int:
        from ..runs.launches import WIDTHS, count_launches, launches_table

        if self.out is not None:
            require_file(self.out)
        device = choose_device(self.device)
        found = count_launches(methods, device)
        network = "-".join(str(width) for width in WIDTHS)
        console.print(launches_table(found, f"operations of a step, autoencoder {network}, {device}"))
        if self.out is not None:
            rows = [dataclasses.asdict(row) for row in found]
            write_json(self.out, {"environment": describe_environment(device), "launches": rows})
        return 0

    def _share(self, console: Console, count: int) -> int:
        from ...framework.optimizer.forecast import DIVISIONS
        from ..runs.process_bench import METHODS, benchmark_processes, processes_table
        from ..runs.sharing import network_named

        if self.out is not None:
            require_file(self.out)
        network_named(self.network)
        methods, divisions, samples = (
            self.methods or METHODS,
            self.divisions or DIVISIONS,
            self.batch_size // max(1, count),
        )
        with console.status("starting") as status:
            note = status.update if console.is_terminal else console.print
            found = benchmark_processes(count, self.network, methods, divisions, samples, self.steps, note)
        title = f"{self.network}, {count} processes, {samples} samples each, {self.steps} steps"
        console.print(processes_table(found, title))
        if self.out is not None:
            settings = {"network": self.network, "processes": count, "samples": samples, "steps": self.steps}
            environment = describe_environment(choose_device("cpu"))
            rows = [dataclasses.asdict(row) | {"agrees": row.agrees} for row in found]
            write_json(self.out, {"settings": settings, "environment": environment, "rows": rows})
        return 0

    def _plan(self, console: Console) -> int:
        from ..runs.planned import RATES, crossings_table, plan_all, planned_table

        if self.out is not None:
            require_file(self.out)
        found = plan_all()
        for name, rows in found.steps.items():
            console.print(planned_table(name, rows))
        console.print(crossings_table(found))
        if self.out is not None:
            write_json(self.out, {"rates": dataclasses.asdict(RATES), **dataclasses.asdict(found)})
        return 0
