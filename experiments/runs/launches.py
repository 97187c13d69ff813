"""How many operations a training step asks of its device: counted, not timed, so the same on every machine.

On an accelerator a step of many small operations costs what it takes to start them, not what they compute. That number
can be read without the accelerator: every operation that reaches torch's dispatcher and is no view is one launch, or a
few. What holds a queue up is counted beside it: places where the program waits for a value, and tensors that are made
on the host and would have to be copied first.

The network is small on purpose: how many operations there are depends on the number of layers, not on their widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ... import registry
from .bench import optimizer_of
from .on_screen import FittedTable

__all__ = ["WIDTHS", "Launches", "MethodLaunches", "count_launches", "counting", "launches_table"]

WIDTHS = (78, 100, 50, 25, 8, 25, 50, 100, 78)
"""Of the autoencoder that is trained: eight dense layers, each width but the code's occurring twice."""

_BATCH = 32
_STEPS = 45  # two renewals of the rarest schedule among the methods' defaults, of every 20 steps
_SETTLED = 10  # earlier steps fill memories, start averages and certify records

_WAITING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "linalg_eig",
    "linalg_eigvals",
    "linalg_lstsq",
    "masked_select",
    "multinomial",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations that return to the host, or shape their result by what they find on the device."""

_NO_KERNEL = {"_local_scalar_dense", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "set_"}
_FROM_NUMBERS = {"lift_fresh", "scalar_tensor"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Launches:
    """Of one training step.

    Attributes:
        update: operations between the passes and after them: what the optimizer computes.
        passes: operations of all forward and backward passes, curvature gathered on the way included.
        synchronisations: how often the host waits for the device.
        host_tensors: tensors made from numbers of the host.
    """

    update: int = 0
    passes: int = 0
    synchronisations: int = 0
    host_tensors: int = 0

    def __or__(self, other: Launches) -> Launches:
        """The larger of each count."""
        return Launches(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True)
class MethodLaunches:
    """Of one method, the largest counts over its settled steps.

    Attributes:
        method: its name.
        quiet: of steps that renew no matrix, if there are such.
        renewing: of steps that do, if there are such.
    """

    method: str
    quiet: Launches | None
    renewing: Launches | None


class _Counter(TorchDispatchMode):
    """Sorts every dispatched operation; ``operations`` are counted by where the program is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = "update"
        self.clear()

    def clear(self) -> None:
        """Begin at zero."""
        self.operations = {"update": 0, "passes": 0}
        self.waits = self.made = 0

    def read(self) -> Launches:
        """Counts since the last ``clear``."""
        return Launches(self.operations["update"], self.operations["passes"], self.waits, self.made)

    @contextmanager
    def inside_a_pass(self) -> Iterator[None]:
        """What follows belongs to a forward or backward pass."""
        before, self.place = self.place, "passes"
        try:
            yield
        finally:
            self.place = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Count, and do what was asked."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        waits = name in _WAITING or _depends_on_data(func, name, args, kwargs or {}) or _crosses(name, given, made)
        copied = name == "_to_copy" and made[0].device.type != "cpu" and any(v.device.type == "cpu" for v in given)
        returns = [value.alias_info for value in func._schema.returns]
        view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
        self.waits += waits
        self.made += copied or name in _FROM_NUMBERS
        self.operations[self.place] += not view and name not in _NO_KERNEL
        return result


class _Lists(TorchFunctionMode):
    """Counts what fetches whole tensors without the dispatcher, which sees it only where there is a device."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do what was asked."""
        fetches = func in (torch.Tensor.tolist, torch.Tensor.numpy)
        if fetches and args[0].device.type == "cpu" and (args[0].dim() > 0 or func is torch.Tensor.numpy):
            self.counter.waits += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[_Counter]:
    """Count the operations of whatever runs inside; ``read()`` tells how many there were so far."""
    counter = _Counter()
    with counter, _Lists(counter):
        yield counter


def count_launches(methods: Sequence[str], device: torch.device | None = None) -> list[MethodLaunches]:
    """Train a small autoencoder with each method and count.

    Args:
        methods: registered ones, ``torch-sgd`` or ``torch-adam``; none at all: every registered one.
        device: where; ``None``: the CPU.

    Raises:
        ArgumentError: a method is unknown.
    """
    names = list(methods) or sorted(registry.methods())
    return [_count(name, device or torch.device("cpu")) for name in names]


def launches_table(found: Sequence[MethodLaunches], title: str) -> Table:
    """Return the table for the screen."""
    caption = "Operations that are no views, at most, per step: when no matrix is renewed | when some are."
    table = FittedTable(title=title, caption=caption, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("update", "in passes", "synchronisations", "host tensors"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        kinds = (row.quiet, row.renewing)
        cells = [
            " | ".join("-" if counts is None else str(getattr(counts, name)) for counts in kinds)
            for name in ("update", "passes", "synchronisations", "host_tensors")
        ]
        table.add_row(row.method, *cells)
    return table


def _count(method: str, device: torch.device) -> MethodLaunches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _autoencoder().to(device)
        inputs = torch.rand(_BATCH, WIDTHS[0]).to(device)
    optimizer = optimizer_of(method, model, "bernoulli")
    kinds: dict[bool, Launches] = {}
    with counting() as counter:

        def closure() -> Tensor:
            with counter.inside_a_pass():
                optimizer.zero_grad()
                loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), inputs, reduction="sum") / _BATCH
                loss.backward()
            return loss

        for step in range(_STEPS):
            counter.clear()
            optimizer.step(closure)  # type: ignore[arg-type]  # torch declares that the loss is a float
            report = getattr(optimizer, "last_report", None)
            if step >= _SETTLED:
                renewing = report is not None and report.refreshes > 0
                kinds[renewing] = kinds.get(renewing, Launches()) | counter.read()
    return MethodLaunches(method, kinds.get(False), kinds.get(True))


def _autoencoder() -> nn.Sequential:
    """Sigmoids after every layer but the one of the code and the last."""
    linear = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(WIDTHS)]
    half = len(linear) // 2
    plain = {linear[half - 1], linear[-1]}
    return nn.Sequential(*(part for layer in linear for part in ([layer] if layer in plain else [layer, nn.Sigmoid()])))


def _depends_on_data(func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Boolean masks and repetitions by a tensor of counts have a size that only the device knows."""
    if name in _INDEXING:
        return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in args[1])
    return name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None


def _crosses(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Copies between host and device wait, whichever way they go, as the host's memory is not pinned."""
    if name == "copy_":
        return len(given) > 1 and (given[0].device.type == "cpu") != (given[1].device.type == "cpu")
    return name == "_to_copy" and any((v.device.type == "cpu") != (made[0].device.type == "cpu") for v in given)
