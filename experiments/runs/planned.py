"""What a step of K-FAC would take on 8 to 512 accelerators, by formula from shapes and stated rates. Nothing is run.

Rates are those of the makers' data sheets ("NVIDIA H200 Tensor Core GPU Datasheet", "NVIDIA DGX H200 Datasheet",
"NVIDIA ConnectX-7 Datasheet") times the shares of them that we assume to be reached. Times of collectives are those of
rings within a node and between nodes one after the other, with trees for what is latency (R. Thakur, R. Rabenseifner
and W. Gropp, "Optimization of Collective Communication Operations in MPICH", 2005; NVIDIA, "Scaling Deep Learning
Training with NCCL", 2018). Nothing is taken to overlap, so a time is an upper bound of what the parts cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from rich.table import Table
from torch import Tensor, nn

from ... import registry
from ...framework.methods.method import Method
from ...framework.optimizer.forecast import DIVISIONS
from ...framework.processes.ownership import owners_of
from ...framework.processes.packing import packed_size
from ...preconditioners.structures.kronecker import Kronecker
from .sharing import Outlined, outline

__all__ = [
    "COUNTS",
    "MODELS",
    "RATES",
    "Crossing",
    "Planned",
    "PlannedStep",
    "Rates",
    "crossings_of",
    "crossings_table",
    "plan",
    "plan_all",
    "planned_table",
]

COUNTS = (8, 32, 128, 512)
INVERSES_EVERY = 20
BYTES = 4


@dataclass(frozen=True)
class Rates:
    """Of one accelerator and its links, per second.

    Attributes:
        passes: operations of forward and backward passes: 989e12 dense in bfloat16, of which 40 % are reached.
        products: of matrix products of statistics and directions: 494e12 dense in TF32, of which 50 %.
        inverses: of Cholesky factors and inverses: 67e12 in float32, of which 15 %.
        inside: bytes that one process sends to others of its node: NVLink, 900e9 both ways together, so 450e9, of
            which 80 %.
        outside: to other nodes: one port of 400 Gb/s, so 50e9, of which 80 %.
        near: seconds until a message arrives within the node.
        far: between nodes.
        node: processes of one node.
    """

    passes: float = 0.4 * 989e12
    products: float = 0.5 * 494e12
    inverses: float = 0.15 * 67e12
    inside: float = 0.8 * 450e9
    outside: float = 0.8 * 50e9
    near: float = 3e-6
    far: float = 8e-6
    node: int = 8

    def ring(self, size: float, count: int, collectives: int = 1) -> float:
        """Seconds of a reduction to one process or a broadcast from one, or to and from all in parts.

        Args:
            size: bytes that everybody has, or gets, all collectives together.
            count: processes.
            collectives: that follow each other.
        """
        if count == 1 or not size:
            return 0.0
        within, nodes = min(count, self.node), math.ceil(count / self.node)
        latency = (within - 1) * self.near + (math.log2(nodes) * self.far if nodes > 1 else 0.0)
        time = size * (within - 1) / within / self.inside
        time += size / within * (nodes - 1) / nodes / self.outside
        return time + collectives * latency

    def straight(self, sent: float, received: float, count: int) -> float:
        """Seconds of an exchange in which every process sends to every other; the busiest link counts.

        Args:
            sent: bytes that the process that sends most sends.
            received: that the one receives that receives most.
            count: processes.
        """
        if count == 1 or not max(sent, received):
            return 0.0
        others = count - 1
        far = max(0, count - self.node) / others
        busiest = max(sent, received)
        time = max(busiest * (1 - far) / self.inside, busiest * far / self.outside)
        return time + (self.far if far else self.near) * math.log2(count)


RATES = Rates()


# -- networks ----------------------------------------------------------------------------------------------------------


_Parts = list[tuple[nn.Module, tuple[int, ...]]]


class _Sheaf(nn.Module):
    """Layers side by side, each with inputs of its own: as much of a network as its shapes say."""

    def __init__(self, layers: _Parts, others: int = 0) -> None:
        super().__init__()
        self.parts = nn.ModuleList(module for module, _ in layers)
        self._shapes = [shape for _, shape in layers]
        self.others = nn.ParameterList([nn.Parameter(torch.empty(others, device="meta"))] if others else [])

    def forward(self, example: Tensor) -> Tensor:
        """(N, 1) zeros to a sum that is not looked at."""
        for part, shape in zip(self.parts, self._shapes, strict=True):
            dtype = torch.long if isinstance(part, nn.Embedding) else None
            part(torch.empty(len(example), *shape, device="meta", dtype=dtype))
        return example


def _resnet_50() -> nn.Module:
    """Convolutions and the last layer of ResNet-50 (version 1.5: stride at the 3 x 3 kernels), 224 x 224 pixels."""
    found: _Parts = []
    norms = 0

    def convolution(inputs: int, outputs: int, kernel: int, stride: int, pixels: int) -> None:
        nonlocal norms
        module = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, device="meta")
        found.append((module, (inputs, pixels, pixels)))
        norms += 2 * outputs

    convolution(3, 64, 7, 2, 224)
    channels, pixels = 64, 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(blocks):
            stride = 2 if index == 0 and width > 64 else 1
            if index == 0:
                convolution(channels, 4 * width, 1, stride, pixels)
            convolution(channels, width, 1, 1, pixels)
            convolution(width, width, 3, stride, pixels)
            pixels //= stride
            convolution(width, 4 * width, 1, 1, pixels)
            channels = 4 * width
    found.append((nn.Linear(2048, 1000, device="meta"), (2048,)))
    return _Sheaf(found, norms)


def _blocks_of_transformer(
    depth: int, width: int, tokens: int, merged: bool
) -> list[tuple[nn.Module, tuple[int, ...]]]:
    found: _Parts = []
    for _ in range(depth):
        queries = [(width, 3 * width)] if merged else [(width, width)] * 3
        for inputs, outputs in (*queries, (width, width), (width, 4 * width), (4 * width, width)):
            found.append((nn.Linear(inputs, outputs, device="meta"), (tokens, inputs)))
    return found


def _vit_b() -> nn.Module:
    """ViT-B/16 on 224 x 224 pixels: 12 blocks of width 768, queries, keys and values in one layer of 2304."""
    found: _Parts = [(nn.Conv2d(3, 768, 16, 16, device="meta"), (3, 224, 224))]
    found += _blocks_of_transformer(12, 768, 197, True)
    found.append((nn.Linear(768, 1000, device="meta"), (768,)))
    return _Sheaf(found, 25 * 2 * 768 + 197 * 768 + 768)


def _transformer() -> nn.Module:
    """24 blocks of width 1792, queries, keys and values apart, 50257 tokens whose embedding is the last layer, too."""
    found: _Parts = [(nn.Embedding(50257, 1792, device="meta"), (1024,))]
    found += _blocks_of_transformer(24, 1792, 1024, False)
    return _Sheaf(found, 49 * 2 * 1792 + 1024 * 1792)


@dataclass(frozen=True)
class Planned:
    """A network of the plan.

    Attributes:
        make: it.
        unit: what a sample is.
        samples: of each process in a step.
        elsewhere: multiplications of one sample outside of layers that the backend reads: attention, and a last layer
            that is the embedding.
        limit: of the structure; larger sides get the method's fallback. The library's default is 5120.
    """

    make: Callable[[], nn.Module]
    unit: str
    samples: int
    elsewhere: float = 0.0
    limit: int = 5120


_ATTENTION = 24 * 1024**2 * 1792  # causal: half of twice
_HEAD = 1024 * 1792 * 50257

MODELS: Mapping[str, Planned] = {
    "ResNet-50": Planned(_resnet_50, "images of 224 x 224", 64),
    "ViT-B/16": Planned(_vit_b, "images of 224 x 224", 64, 2 * 12 * 197**2 * 768),
    "1 B transformer": Planned(_transformer, "sequences of 1024 tokens", 8, _ATTENTION + _HEAD),
    "1 B, limit 7169": Planned(_transformer, "sequences of 1024 tokens", 8, _ATTENTION + _HEAD, 7169),
}


def _kfac(limit: int) -> Method:
    """K-FAC, statistics at every step; inverses every 20 are the rates' affair."""
    method = registry.method("kfac", statistics_every=1, inverses_every=INVERSES_EVERY)
    structure = method.preconditioner
    assert isinstance(structure, Kronecker)
    return replace(method, preconditioner=replace(structure, limit=limit))


# -- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedStep:
    """Milliseconds of a step, inverses spread over the steps between their renewals.

    Attributes:
        division: of the work.
        count: of processes.
        travels: ``"rows"`` or ``"moments"``.
        passes: forward, backward and the backward for sampled labels.
        gradients: and FSDP2's parameters, exchanged.
        statistics: exchanged.
        products: statistics and directions computed, by the busiest process.
        inverses: computed, by the busiest process.
        directions: exchanged.
        state: bytes of state and momentum on the fullest process.
        total: all of it.
    """

    division: str
    count: int
    travels: str
    passes: float
    gradients: float
    statistics: float
    products: float
    inverses: float
    directions: float
    state: int
    total: float


def plan(
    found: Outlined,
    samples: float,
    division: str,
    count: int,
    travels: str,
    rates: Rates = RATES,
    elsewhere: float = 0.0,
) -> PlannedStep:
    """One step.

    Args:
        found: the network under the method.
        samples: of each process.
        division: a name from :data:`~osculate.framework.optimizer.forecast.DIVISIONS`.
        count: processes P >= 1.
        travels: ``"rows"`` or ``"moments"``.
        rates: of the machine.
        elsewhere: multiplications of one sample outside of layers.
    """
    owners = None if division == "replicated" else owners_of(found.work, count)
    of_owner: list[list[str]] = [[] for _ in range(1 if owners is None else count)]
    for layer in found.layers:
        of_owner[0 if owners is None else owners[layer.name]].append(layer.name)
    numbers = {layer.name: sum(p.numel() for p in layer.parameters.values()) for layer in found.layers}
    total = sum(numbers.values())
    owning = sum(1 for names in of_owner if names)
    shapes = _shapes(found)
    passes = sum(found.rows[name].positions * r * c for name, (r, c) in _matrices(found).items()) + elsewhere
    moments = sum(packed_size(r) + packed_size(c) for r, c in shapes.values())
    own_rows = {name: samples * (found.rows[name].inputs + found.rows[name].outputs) for name in shapes}
    grams = {name: 2.0 * samples * found.rows[name].positions * (r * r + c * c) for name, (r, c) in shapes.items()}
    products = max(sum(found.work[name].directions for name in names) for names in of_owner)
    if travels == "moments":
        products += sum(grams.values())
        statistics = rates.ring(BYTES * moments, count, owning) * (2 if owners is None else 1)
    else:
        products += max(count * sum(grams.get(name, 0.0) for name in names) for names in of_owner)
        gets = max(sum(own_rows.get(name, 0) for name in names) for names in of_owner) * (count - 1)
        gives = sum(own_rows.values()) * (count - 1 if owners is None else 1)
        statistics = rates.straight(BYTES * gives, BYTES * gets, count)
    largest = max(sum(numbers[name] for name in names) for names in of_owner)
    once = rates.ring(BYTES * total, count)
    gradients, directions = 2 * once, rates.ring(BYTES * total, count, owning)
    if division == "replicated":
        directions = 0.0
    elif division == "owners-only":
        gradients = rates.ring(BYTES * total, count, owning)
    elif division == "fsdp":
        pieces = rates.straight(BYTES * total / count, BYTES * largest * (count - 1) / count, count)
        gradients, directions = 3 * once + pieces, pieces
    inverses = max(sum(found.work[name].inverses for name in names) for names in of_owner) / INVERSES_EVERY
    state = max(sum(block.row().bytes for block in found.blocks if block.layer.name in set(n)) for n in of_owner)
    seconds = {
        "passes": (1 + 2 + 1) * 2.0 * samples * passes / rates.passes,
        "gradients": gradients,
        "statistics": statistics,
        "products": products / rates.products,
        "inverses": inverses / rates.inverses,
        "directions": directions,
    }
    rounded = {name: round(1e3 * value, 3) for name, value in seconds.items()}
    return PlannedStep(division, count, travels, **rounded, state=state, total=round(sum(rounded.values()), 3))


def _matrices(found: Outlined) -> dict[str, tuple[int, int]]:
    """Layers that multiply."""
    looked_up = {layer.name for layer in found.layers if isinstance(layer.module, nn.Embedding)}
    return {layer.name: layer.matrix_shape for layer in found.layers if layer.name in found.rows.keys() - looked_up}


def _shapes(found: Outlined) -> dict[str, tuple[int, int]]:
    """Layers that the structure serves."""
    return {block.layer.name: block.layer.matrix_shape for block in found.blocks if not block.fallback}


# -- where moments are less than rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """The number of rows of each process from which on a second moment is less than the rows.

    Attributes:
        layer: its name.
        rows: numbers of outputs and of inputs, the orders of the two moments.
        positions: rows of one sample.
        outputs: rows, by bytes sent to an owner; output side.
        inputs: the same; input side. A kernel's inputs travel before they are unfolded.
    """

    layer: str
    rows: tuple[int, int]
    positions: int
    outputs: float
    inputs: float


def crossings_of(found: Outlined) -> list[Crossing]:
    """Of every layer that the structure serves: n* = (numbers of the packed moment) / (numbers of one row)."""
    result = []
    for name, (outputs, inputs) in _shapes(found).items():
        rows = found.rows[name]
        result.append(
            Crossing(
                name,
                (outputs, inputs),
                rows.positions,
                packed_size(outputs) * rows.positions / rows.outputs,
                packed_size(inputs) * rows.positions / rows.inputs,
            )
        )
    return result


@dataclass(frozen=True)
class Plans:
    """All that is planned.

    Attributes:
        parameters: of each network.
        served: share of them that the structure serves; the rest gets the declared fallback.
        steps: of each network.
        crossings: of each network, by layer.
        overall: of each network, samples of each process from which on an owner is sent less by all moments than by
            all rows.
        in_time: the same by the time of a step of owners, by number of processes: whoever owns a layer receives, and
            multiplies, the rows of all.
    """

    parameters: dict[str, int]
    served: dict[str, float]
    steps: dict[str, list[PlannedStep]]
    crossings: dict[str, list[Crossing]]
    overall: dict[str, float]
    in_time: dict[str, dict[int, float]]


def plan_all(counts: Sequence[int] = COUNTS, rates: Rates = RATES) -> Plans:
    """Every network in every division, statistics as rows and as moments.

    Args:
        counts: numbers of processes.
        rates: of the machine.
    """
    found = Plans({}, {}, {}, {}, {}, {})
    for name, network in MODELS.items():
        shown = outline(network.make(), torch.empty(1, 1, device="meta"), _kfac(network.limit))
        sizes = {block.key: sum(p.numel() for p in block.parameters) for block in shown.blocks}
        served = sum(sizes[block.key] for block in shown.blocks if not block.fallback)
        found.parameters[name] = sum(sizes.values())
        found.served[name] = served / sum(sizes.values())
        found.steps[name] = [
            plan(shown, network.samples, division, count, travels, rates, network.elsewhere)
            for count in counts
            for division in DIVISIONS
            for travels in ("rows", "moments")
        ]
        found.crossings[name] = crossings_of(shown)
        shapes = _shapes(shown)
        moments = sum(packed_size(r) + packed_size(c) for r, c in shapes.values())
        each = sum(shown.rows[key].inputs + shown.rows[key].outputs for key in shapes)
        found.overall[name] = moments / each
        found.in_time[name] = {count: _even(shown, count, rates) for count in counts}
    return found


def _even(shown: Outlined, count: int, rates: Rates) -> float:
    """Samples of each process with which owners take as long with rows as with moments, by bisection."""
    low, high = 1e-3, 1e6
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        rows, moments = (plan(shown, middle, "owners", count, travels, rates).total for travels in ("rows", "moments"))
        low, high = (middle, high) if rows < moments else (low, middle)
    return low


def planned_table(name: str, steps: Sequence[PlannedStep]) -> Table:
    """The better of rows and moments of every division, and the total of both; 80 columns."""
    caption = "ms; rows, mom.: the step with statistics gathered or reduced, the parts being those of the faster one"
    title = f"{name}, {MODELS[name].samples} {MODELS[name].unit} on each process"
    table = Table(title=title, caption=caption, pad_edge=False, collapse_padding=True, box=None, header_style="bold")
    headings = ("P", "division", "passes", "grad.", "stat.", "prod.", "inv.", "dir.", "rows", "mom.", "GB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "division" else "right", no_wrap=True)
    for rows, moments in zip(steps[::2], steps[1::2], strict=True):
        best = min(rows, moments, key=lambda step: step.total)
        parts = (best.passes, best.gradients, best.statistics, best.products, best.inverses, best.directions)
        table.add_row(
            str(best.count) if best.division == DIVISIONS[0] else "",
            best.division,
            *map(_short, (*parts, rows.total, moments.total)),
            f"{best.state / 1e9:.2f}",
        )
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def crossings_table(found: Plans) -> Table:
    """From how many rows of each process on moments are less, layer by layer and overall; 80 columns."""
    caption = (
        "Bytes: rows of each process from which on a moment is less, over the layers' sides, and samples from which on "
        "all are. Time: samples from which on a step of owners is shorter with moments, on P processes. Served: share "
        "of the parameters that get K-FAC."
    )
    table = Table(title="crossover", caption=caption, pad_edge=False, collapse_padding=True, box=None)
    counts = list(next(iter(found.in_time.values())))
    for heading in ("network", "least", "median", "most", "all", *(f"P {count}" for count in counts), "served"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for name, crossings in found.crossings.items():
        sides = [value for entry in crossings for value in (entry.outputs, entry.inputs)]
        numbers = (min(sides), median(sides), max(sides))
        samples = (found.overall[name], *found.in_time[name].values())
        served = f"{100 * found.served[name]:.0f} %"
        table.add_row(name, *(f"{value:.0f}" for value in numbers), *(f"{value:.2g}" for value in samples), served)
    return table
