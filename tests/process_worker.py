"""One process of a run in which many share every mini-batch; started by :mod:`process_runs`, once per test session.

``python process_worker.py RANK WORLD INIT_FILE OUT_FILE``: trains every registered method in every way that processes
can divide the work, then odd models, losses and loops, and saves what came out. Imported by the tests, it makes the
same runs in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import osculate as osc
import torch
from process_end import end
from small_nets import make
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)

WRAPPED = {"replicated", "owners", "owners-only"}
WAYS = {2: ("replicated", "owners", "owners-only", "fsdp", "tp"), 4: ("replicated", "owners", "fsdp")}
MESHES = ("hsdp", "tp", "fsdp+tp")
"""Ways of four processes that a few methods stand for."""
PARTS = {2: ("own group", "own group, owners", "own group, owners-only")}
PARTS[4] = ("own group, owners", "halves", "each half")
"""Ways of processes that share a mini-batch two by two, for which still fewer stand."""
FEWER = ("kbfgs", "kfac", "joint-kfac-momentum", "adamw")
FEW = ("kbfgs", "kfac", "joint-kfac-momentum", "mbf", "ekfac", "adamw")
STEPS = 20


class Fixed:
    """A likelihood whose labels do not depend on random numbers: joint and split batches see the same ones."""

    name = "fixed"

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return (output.argmin(-1) + 1) % output.shape[-1]

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def curvature_root(self, output: Tensor) -> Tensor:
        raise NotImplementedError


def names() -> list[str]:
    """Registered methods that take part; Hessian products are refused by name, which another test sees."""
    found = []
    for name, entry in osc.registry.methods().items():
        method = entry.factory()
        if osc.Needs.PRODUCTS not in method.measures_at(None) | method.asks:
            found.append(name)
    return found


def cases(world: int) -> list[tuple[str, str]]:
    """(method, way) of every run of as many processes."""
    found = [(name, way) for name in names() for way in WAYS[world]]
    found += [(name, way) for name in FEWER for way in PARTS[world]]
    return found + ([(name, way) for name in FEW for way in MESHES] if world == 4 else [])


def two_layers() -> nn.Module:
    """3-4-5: gradients as matrices have full rank but for one direction, so that rounding decides no eigenvector."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def batches(model: nn.Module, steps: int = STEPS, samples: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(3)
    shape, classes = getattr(model, "data", ((3,), 5))
    found = []
    for _ in range(steps):
        if shape == "tokens":
            x = torch.randint(0, 9, (samples, 4), generator=generator)
        else:
            x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
        found.append((x, torch.randint(0, classes, (samples,), generator=generator)))
    return found


class Sequences(nn.Module):
    """(N, 4, 3) inputs; norms between linears, as tensor parallelism lays them along the sequence."""

    data = (4, 3), 5

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 12)
        self.down, self.last, self.head = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, value: Tensor) -> Tensor:
        value = self.embed(value)
        found: Tensor = self.head(self.last(value + self.down(torch.tanh(self.up(self.norm(value))))))
        return found.mean(1)


def sequences() -> nn.Module:
    """Its weights, the same everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Sequences()


@cache
def pairs() -> list[Any]:
    """Groups of two, none of which is the default group."""
    return [distributed.new_group([first, first + 1]) for first in range(0, distributed.get_world_size(), 2)]


class Laid:
    """A model laid out over processes, and this process's share of a mini-batch."""

    def __init__(self, model: nn.Module, way: str):
        self.model, self.outer, self.place, self.shares = model, model, 0, 1
        self.options: dict[str, Any] = {}
        if way == "one":
            self.options = {"process_group": None}
            return
        world = distributed.get_world_size()
        self.place, self.shares = distributed.get_rank(), world
        if way in WRAPPED:
            self.outer = DistributedDataParallel(model)
            self.options = {"division": way}
        elif way == "fsdp":
            sharded(model, init_device_mesh("cpu", (world,)))
        elif way == "hsdp":
            sharded(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "pieces")))
        elif way == "tp":
            parallel(model, init_device_mesh("cpu", (world,)))
            self.place, self.shares = 0, 1
        elif way == "fsdp+tp":
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
            parallel(model, mesh["tensor"])
            sharded(model, mesh["data"])
            self.place, self.shares = self.place // 2, world // 2
        elif way == "sequence":
            along_the_sequence(model, init_device_mesh("cpu", (world,)))
            self.place, self.shares = 0, 1
        elif way.startswith("own group"):
            self.outer = DistributedDataParallel(model, process_group=pairs()[self.place // 2])
            self.options = {"division": way.removeprefix("own group").removeprefix(", ") or "replicated"}
            self.place, self.shares = self.place % 2, 2
        else:
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("halves", "pieces"))["pieces"]
            sharded(model, mesh)
            self.options = {"process_group": mesh.get_group()} if way == "each half" else {}
            self.place, self.shares = self.place % 2, 2

    def own(self, value: Tensor, cuts: Mapping[int, list[int]] | None = None) -> Tensor:
        """This process's part of a mini-batch."""
        if self.shares == 1:
            return value
        if cuts is not None:
            return value.split(cuts[self.shares])[self.place]
        return value.chunk(self.shares)[self.place]


def sharded(model: nn.Module, mesh: Any) -> None:
    """Each part of the model, then the rest; parts that share parameters together."""
    own = [set(map(id, part.parameters())) for part in model.children()]
    if sum(map(len, own)) == len(set().union(*own)):
        for part, found in zip(model.children(), own, strict=True):
            if found:
                fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallel(model: nn.Module, mesh: Any) -> None:
    """Columns of the first layer, rows of the last."""
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def along_the_sequence(model: nn.Module, mesh: Any) -> None:
    """Norms see a part of the positions of every sample, linears a part of the columns or rows of all."""
    plan = {
        "embed": ColwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def whole(value: Tensor) -> Tensor:
    """All of a parameter."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def result(laid: Laid, optimizer: Any, losses: list[Any]) -> dict[str, Any]:
    """What a run is compared by: whole parameters, and the states that this process has."""
    parameters = {name: whole(value) for name, value in laid.model.named_parameters()}
    state = {block.key: block.to_dict() for block in optimizer.own_blocks}
    rule = optimizer._rule.to_dict()
    lasts = rule.pop("last_steps", {})
    copied = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, state)
    early = None if optimizer.together is None else optimizer.together.early
    found = {"parameters": parameters, "state": copied, "rule": rule, "lasts": lasts, "losses": losses}
    return found | {"early": None if early is None else early.used}


def run(name: str, way: str) -> dict[str, Any]:
    """Twenty steps of a registered method."""
    laid = Laid(two_layers(), way)
    optimizer = osc.build(name, laid.outer, likelihood=Fixed(), **laid.options)
    given = batches(laid.model)
    if optimizer.has_warm_start:
        optimizer.warm_start([lambda x=x: laid.outer(laid.own(x)) for x, _ in given[:2]])
    losses = []
    for inputs, labels in given:
        own = laid.own(inputs), laid.own(labels)

        def closure(own: tuple[Tensor, Tensor] = own) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(laid.outer(own[0]), own[1])
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
    found = result(laid, optimizer, losses)
    optimizer.close()
    return found


# -- other models, losses and loops ------------------------------------------------------------------------------------


class RowsOfAll(osc.SampledScores):
    """A form that has never heard of processes: it is given everybody's rows."""

    adds_up = False

    def measure(self, evidence: Any) -> Tensor:
        assert evidence.total is None and evidence.share == 1.0
        return super().measure(evidence)


def kfac(**options: Any) -> osc.Method:
    """K-FAC with what is asked for."""
    fields: dict[str, Any] = {
        "curvature": osc.EmpiricalFisher(),
        "defaults": {"lr": 0.05, "damping": 0.1, "weight_decay": 0.0},
    }
    return osc.Method(osc.Kronecker(osc.Covariance(), osc.Covariance()), **(fields | options))


def composed() -> dict[str, Callable[[], osc.Method]]:
    """Compositions beside the registered ones."""
    secant = {"curvature": osc.SecantPairs(), "defaults": {"lr": 0.05, "damping": 0.1}}
    rows = {"curvature": osc.EmpiricalFisher(), "defaults": {"lr": 0.05, "damping": 1.0}}
    scores = {"curvature": osc.SampledFisher()}
    return {
        "adaptive damping": lambda: kfac(damping=osc.LevenbergMarquardt(), **scores),
        "sufficient decrease": lambda: kfac(guard=osc.Armijo(), defaults={"lr": 20.0, "damping": 0.1}),
        "coupled decay": lambda: kfac(defaults={"lr": 0.05, "damping": 0.1, "weight_decay": 0.01}),
        "balanced damping": lambda: kfac(damping=osc.Factored()),
        "pairs of parameters": lambda: osc.Method(osc.SecantBlocks(), **secant),
        "rows of all": lambda: kfac(step_size=osc.JointLayerwise(RowsOfAll()), **scores),
        "mean scores": lambda: kfac(step_size=osc.LayerwiseQuadratic(osc.SampledBatchScores()), **scores),
        "late inverses": lambda: osc.Method(osc.Kronecker(*(osc.Covariance(),) * 2, osc.Schedule(1, 2, lag=1)), **rows),
        "late bases": lambda: osc.Method(osc.Eigenbasis(schedule=osc.Schedule(1, 2, lag=1)), **rows),
        "dense": lambda: osc.Method(osc.Dense(), **rows),
        "blocks of rows": lambda: osc.Method(osc.MiniBlock(), **rows),
    }


def net(name: str) -> nn.Module:
    """A network of :mod:`small_nets` with what its data look like, or the one above."""
    if name == "sequences":
        return sequences()
    model = make(name)
    model.data = ("tokens" if name == "tokens" else (1, 6, 6) if name == "cnn" else (6,)), 3  # type: ignore[assignment]
    return model


SITUATIONS: dict[str, dict[str, Any]] = {
    **{f"composed: {name}": {"method": make_one} for name, make_one in composed().items()},
    "tokens, kfac": {"net": "tokens", "method": "kfac"},
    "tokens, kbfgs": {"net": "tokens", "method": "kbfgs"},
    "tokens, mbf": {"net": "tokens", "method": "mbf"},
    "called twice, kfac": {"net": "called-twice", "method": "kfac"},
    "signals, kfac-conv": {"net": "signals", "method": "kfac-conv"},
    "signals, kbfgs-conv": {"net": "signals", "method": "kbfgs-conv"},
    "attention, kfac": {"net": "attention", "method": "kfac", "eval": True},
    "attention, muon": {"net": "attention", "method": "muon", "eval": True},
    "images, kfac-conv": {"net": "cnn", "method": "kfac-conv", "eval": True},
    "tied, kfac": {"net": "tied", "method": "kfac"},
    "frozen parts, kfac": {"net": "partly-frozen", "method": "kfac"},
    "shares of other sizes, kfac": {"method": "kfac", "cuts": {2: [10, 6], 4: [6, 4, 4, 2]}},
    "shares of other sizes, kbfgs": {"method": "kbfgs", "cuts": {2: [15, 1], 4: [6, 4, 5, 1]}},
    "shares of other sizes, empirical": {"method": kfac, "cuts": {2: [11, 5], 4: [6, 4, 4, 2]}},
    "shares of other sizes, exact": {
        "method": partial(kfac, curvature=osc.ExactGGN()),
        "likelihood": "categorical",
        "cuts": {2: [11, 5], 4: [6, 4, 4, 2]},
    },
    "weights of samples, exact": {
        "method": partial(kfac, curvature=osc.ExactGGN()),
        "likelihood": "categorical",
        "classes": [1.0, 2.0, 0.5, 1.0, 3.0],
    },
    "accumulated, kfac": {"method": "kfac", "pieces": 2},
    "a sum, kfac": {"method": "kfac", "options": {"loss_reduction": "sum", "lr": 1e-3}, "reduction": "sum"},
    "clipped, kbfgs": {"method": "kbfgs", "clip": 0.5},
    "groups, kfac": {
        "method": "kfac",
        "options": {
            "groups": [{"params": ["*.bias"], "weight_decay": 0.0}, {"params": ["*.weight"], "weight_decay": 0.1}]
        },
    },
    **{f"sequences, {name}": {"net": "sequences", "method": name, "ways": ("sequence",)} for name in FEW},
    "single precision, joint-kfac": {"method": "joint-kfac", "dtype": torch.float32},
}


def situation(name: str, way: str, steps: int = 6) -> dict[str, Any]:
    """A few steps of something unusual."""
    given = SITUATIONS[name]
    model = net(given["net"]) if "net" in given else two_layers()
    model = model.to(given.get("dtype", torch.float64)).train(not given.get("eval", False))
    laid, data, cuts = Laid(model, way), batches(model, steps), given.get("cuts")
    method, pieces = given["method"], given.get("pieces", 1)
    method = method() if callable(method) else method
    likelihood = given.get("likelihood", Fixed())
    optimizer = osc.build(method, laid.outer, likelihood=likelihood, **laid.options, **given.get("options", {}))
    losses = []
    reduction = given.get("reduction", "mean")
    weights = torch.tensor(given["classes"], dtype=torch.float64) if "classes" in given else None
    for inputs, labels in data:
        inputs = inputs.to(given["dtype"]) if "dtype" in given else inputs
        x, y = laid.own(inputs, cuts), laid.own(labels, cuts)

        def closure(x: Tensor = x, y: Tensor = y, size: int = len(labels)) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for index, rows in enumerate(torch.arange(len(x)).chunk(pieces)):
                with exchanged(laid, index == pieces - 1):
                    output = laid.outer(x[rows])
                    if weights is None:
                        loss = nn.functional.cross_entropy(output, y[rows], reduction=reduction) / pieces
                    else:
                        loss = (
                            weights[y[rows]] * nn.functional.cross_entropy(output, y[rows], reduction="none")
                        ).mean()
                    if cuts is not None:  # means are averaged: what each counts is the loop's affair
                        loss = loss * (len(x) * laid.shares / size)
                    elif reduction == "sum":  # and sums as well
                        loss = loss * laid.shares
                    loss.backward()
                total = total + loss.detach()
            if "clip" in given:
                nn.utils.clip_grad_norm_(laid.outer.parameters(), given["clip"])
            return total

        losses.append(float(optimizer.step(closure)))
    found = result(laid, optimizer, losses)
    optimizer.close()
    return found


def exchanged(laid: Laid, last: bool) -> Any:
    """Context of one micro-batch, of which only the last exchanges gradients."""
    if isinstance(laid.outer, DistributedDataParallel) and not last:
        return laid.outer.no_sync()
    if isinstance(laid.outer, FSDPModule):
        laid.outer.set_requires_gradient_sync(last)
    return nullcontext()


def situations(world: int) -> list[tuple[str, str]]:
    """(situation, way) of every run; what a way cannot do is refused by name elsewhere."""
    found = []
    for name, given in SITUATIONS.items():
        found += [(name, way) for way in given.get("ways", ("replicated", "owners", "fsdp"))]
        if world == 2 and "net" not in given and "pieces" not in given:
            found.append((name, "owners-only" if "clip" not in given else "fsdp"))
    return list(dict.fromkeys(found))


def attempted(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What came out, or what was raised."""
    try:
        return action()
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def main(rank: int, world: int, init: str, out: str) -> None:
    """Everything, one run after the other."""
    distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    found: dict[str, Any] = {f"{name}: {way}": attempted(lambda n=name, w=way: run(n, w)) for name, way in cases(world)}
    for name, way in situations(world):
        found[f"{name}: {way}"] = attempted(lambda n=name, w=way: situation(n, w))
    end(found, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
