"""One process of many that train together: what it sends, keeps and computes, counted; and the same from shapes alone.

``python -m osculate.experiments.runs.sharing RANK WORLD FOLDER`` is one process of what ``FOLDER/cases.json`` asks for;
it writes ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ... import build, registry
from ...curvature.layers.discovery import discover_layers, last_matrix
from ...curvature.layers.layer import Layer
from ...errors import UnknownNameError
from ...framework.methods.method import Method
from ...framework.optimizer.blocks import Block, make_blocks
from ...framework.optimizer.forecast import Laid, Rows, rows_of, traffic_of_step, traffic_of_wrapper
from ...framework.optimizer.workload import work_of_layers
from ...framework.processes.ownership import Work, owners_of
from ...framework.processes.packing import packed_size
from ...preconditioners.structures.by_layer import with_last
from ..networks.image_models import Standardise, residual_network
from .launches import WIDTHS

__all__ = ["NETWORKS", "Case", "Network", "Outlined", "forecast", "measure", "network_named", "outline"]


@dataclass(frozen=True)
class Network:
    """A network to train on random numbers.

    Attributes:
        make: it.
        shape: of one input.
        likelihood: of its loss.
        classes: of the targets; ``None``: the inputs themselves.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    likelihood: str
    classes: int | None = None

    def batch(self, samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.rand(samples, *self.shape, generator=generator)
        if self.classes is None:
            return inputs, inputs
        return inputs, torch.randint(0, self.classes, (samples,), generator=generator)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over samples."""
        if self.classes is None:
            summed = functional.binary_cross_entropy_with_logits(output, targets, reduction="sum")
            return summed / len(targets)
        return functional.cross_entropy(output, targets)


def _autoencoder(widths: Sequence[int]) -> nn.Module:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


_MNIST = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)

NETWORKS: Mapping[str, Network] = {
    "small-autoencoder": Network(lambda: _autoencoder(WIDTHS), WIDTHS[:1], "bernoulli"),
    "mnist-autoencoder": Network(lambda: _autoencoder(_MNIST), _MNIST[:1], "bernoulli"),
    "small-resnet": Network(
        lambda: residual_network(Standardise((0.5,) * 3, (0.25,) * 3), 10, 1, 8), (3, 8, 8), "categorical", 10
    ),
    "resnet-32": Network(
        lambda: residual_network(Standardise((0.5,) * 3, (0.25,) * 3), 10), (3, 32, 32), "categorical", 10
    ),
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        network: a name from :data:`NETWORKS`.
        method: a registered name.
        division: a name from :data:`~osculate.framework.optimizer.forecast.DIVISIONS`.
        samples: of every process in a step.
        steps: that are taken, the first included.
        options: of the method.
    """

    network: str
    method: str
    division: str
    samples: int = 64
    steps: int = 20
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells cases apart."""
        return self.network, self.method, self.division, self.samples


# -- from shapes alone -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlined:
    """A model's blocks without values.

    Attributes:
        layers: all.
        blocks: of them.
        method: the composition.
        work: by layer.
        rows: sizes of records, by layer.
    """

    layers: Sequence[Layer]
    blocks: Sequence[Block]
    method: Method
    work: Mapping[str, Work]
    rows: Mapping[str, Rows]


def outline(model: nn.Module, example: Tensor, method: Method) -> Outlined:
    """A model on the meta device, under a method.

    Args:
        model: on the meta device.
        example: inputs of at least one sample, there.
        method: the composition.
    """
    layers = discover_layers(model)
    rows = rows_of(model.eval(), layers, example)
    blocks = make_blocks(
        layers,
        with_last(method.preconditioner, last_matrix(model, layers)),
        method.fallback,
        strict=False,
        estimator=method.curvature,
        owner=lambda layer: (None, False),
    )
    return Outlined(layers, blocks, method, work_of_layers(blocks), rows)


def forecast(case: Case, count: int) -> list[dict[str, Any]]:
    """By process, what :func:`measure` counts, and operations besides, from shapes alone.

    Args:
        case: the run.
        count: number of processes P >= 1.
    """
    network, method = NETWORKS[case.network], registry.method(case.method, **case.options)
    known = outline(network.make().to("meta"), torch.empty(2, *network.shape, device="meta"), method)
    layers, blocks, work = known.layers, known.blocks, known.work
    owners = None if case.division == "replicated" else owners_of(work, count)
    laid = Laid(case.division, count, owners, case.samples)
    parameters = [value for layer in layers for value in layer.parameters.values()]
    found: list[dict[str, Any]] = []
    for rank in range(count):
        total: Counter[str] = Counter()
        for step in range(case.steps):
            total += traffic_of_step(blocks, layers, method, laid, rank, known.rows, step, step < 10)
            passes = 1 + (case.division == "fsdp" and method.looks_back_at(step))
            for name, value in traffic_of_wrapper(parameters, laid).items():
                total[name] += passes * value
        own = [layer.name for layer in layers if owners is None or owners[layer.name] == rank]
        found.append(
            {
                "traffic": dict(total),
                "state": sum(block.row().bytes for block in blocks if block.layer.name in own),
                "inverses": sum(work[name].inverses for name in own),
                "directions": sum(work[name].directions for name in own),
                "inverses of all": sum(entry.inverses for entry in work.values()),
                "allowed": case.steps * _allowed(known, laid),
            }
        )
    return found


def _allowed(known: Outlined, laid: Laid) -> int:
    """Bytes of a step in which DDP brings all gradients to all, and each moment and pair is added up once.

    A pair is two means before the step, two after it, and the mean input where it is multiplied by the inputs' matrix.
    """
    numbers = sum(value.numel() for layer in known.layers for value in layer.parameters.values())
    moments = 0
    for block in known.blocks:
        takes = {} if block.alone is not None else block.structure.takes_moments
        rows, columns = block.seen.matrix_shape if takes or block.asked.pairs else (0, 0)
        moments += packed_size(columns) if "inputs" in takes and block.asked.inputs else 0
        moments += packed_size(rows) if "outputs" in takes and block.asked.roots else 0
        moments += 4 * rows + ("inputs" in takes) * (columns - block.seen.has_bias) if block.asked.pairs else 0
    return round(laid.one_way * (2 * numbers + moments) * laid.size)


# -- measured ----------------------------------------------------------------------------------------------------------


def _laid_out(model: nn.Module, division: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model as the processes share it, and what :func:`osculate.build` is told of it."""
    if division != "fsdp":
        return DistributedDataParallel(model), {"division": division}
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, {}


def measure(case: Case) -> dict[str, Any]:
    """Train in a group of processes that has been formed, and count what this one sends and keeps.

    Args:
        case: the run.
    """
    network, rank = NETWORKS[case.network], distributed.get_rank()
    torch.manual_seed(0)
    model = network.make()
    outer, division = _laid_out(model, case.division)
    optimizer = build(case.method, outer, likelihood=network.likelihood, seed=0, **division, **case.options)
    optimizer.ranks.traffic.clear()
    shortened, seconds = 0, []
    for step in range(case.steps):
        inputs, targets = network.batch(case.samples, 1000 * rank + step)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = network.loss(outer(inputs), targets)
            loss.backward()
            return loss.detach()

        begun = time.perf_counter()
        optimizer.step(closure)
        seconds.append(time.perf_counter() - begun)
        shortened += optimizer.last_report.shortened
    state = sum(value.numel() * value.element_size() for block in optimizer.own_blocks for value in _held(block))
    optimizer.close()
    return {
        "traffic": dict(optimizer.ranks.traffic),
        "state": state,
        "shortened": shortened,
        "seconds": sorted(seconds)[len(seconds) // 2],
    }


def _held(block: Block) -> list[Tensor]:
    return [*block.state.tensors(), *block.storage]


def main(rank: int, count: int, folder: Path) -> None:
    """Every case, one after the other; written after each, for whoever waits."""
    torch.set_num_threads(1)
    cases = [Case(**entry) for entry in json.loads((folder / "cases.json").read_text())]
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=count)
    found: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        found.append(measure(case))
        if rank == 0:
            (folder / "progress").write_text(str(number + 1))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def network_named(name: str) -> Network:
    """A network of the table.

    Raises:
        UnknownNameError: if there is none.
    """
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    return NETWORKS[name]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
