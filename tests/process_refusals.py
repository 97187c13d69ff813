"""One process of runs in which something is wrong somewhere; started by :mod:`process_runs`.

``python process_refusals.py RANK WORLD INIT_FILE OUT_FILE``: saves, by case, what the steps said here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import osculate as osc
import torch
from osculate.framework.processes.ranks import Ranks
from process_end import end
from process_worker import Fixed, Laid, batches, sharded, two_layers, whole
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)

WAYS = ("replicated", "owners", "fsdp")


class Net(nn.Module):
    """Two layers, the weight of the first also used by hand where that is asked for."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.first, self.last, self.by_hand = nn.Linear(3, 4), nn.Linear(4, 2), by_hand

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.first(value)
        if self.by_hand:
            hidden = hidden + functional.linear(value.flip(1), self.first.weight)
        found: Tensor = self.last(torch.tanh(hidden))
        return found


CERTIFIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "accumulated": {"pieces": 3},
    "accumulated and exchanged each time": {"pieces": 3, "exchange": True},
    "accumulated in views": {"pieces": 3, "gradient_as_bucket_view": True, "exchange": True},
    "zeroed": {"zeroed": True},
    "zeroed in views": {"zeroed": True, "gradient_as_bucket_view": True},
    "dropped": {"dropped": True},
    "by hand": {"by_hand": (True, True)},
    "by hand on the last rank": {"by_hand": (False, True)},
    "by hand, not asked": {"by_hand": (True, True), "certify_records": "never"},
}


def certified(rank: int, method: str, case: dict[str, Any]) -> str:
    """What four steps said: an error's text, or that they were taken."""
    torch.manual_seed(0)
    by_hand = case.get("by_hand", (False, False))[min(rank, 1)]
    views = {"gradient_as_bucket_view": case.get("gradient_as_bucket_view", False)}
    model = DistributedDataParallel(Net(by_hand), **views)
    options = {"certify_records": case.get("certify_records", "always")}
    optimizer = osc.build(method, model, likelihood="categorical", **options)
    torch.manual_seed(7 + rank)

    def backward(count: int, last: bool) -> None:
        inputs, labels = torch.randn(6, 3), torch.tensor([0, 1] * 3)
        with nullcontext() if last or case.get("exchange") else model.no_sync():
            (functional.cross_entropy(model(inputs), labels) / count).backward()

    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        for _ in range(4):
            optimizer.zero_grad()
            if case.get("zeroed") or case.get("dropped"):
                backward(1, True)
                model.zero_grad(set_to_none=bool(case.get("dropped")))
            count = case.get("pieces", 1)
            for index in range(count):
                backward(count, index == count - 1)
            optimizer.step()
    except osc.ArgumentError as error:
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        return str(error)
    finally:
        optimizer.close()
    return "stepped"


def everything(laid: Laid, optimizer: Any) -> list[Tensor]:
    """Parameters and states of this process, copied."""
    held = [getattr(p, "_local_tensor", p).detach() for p in laid.model.parameters()]
    states = [value for block in optimizer.own_blocks for value in (*block.state.tensors(), *block.storage)]
    return [value.clone() for value in (*held, *states)]


def disagreeing(rank: int, world: int, way: str, method: str, what: str) -> dict[str, Any]:
    """Three good steps, then one in which the last process does ``what``, then a good one."""
    laid = Laid(two_layers(), way)
    how = "skip" if what.startswith("skipped") else "raise"
    late = {"inverses_every": 2, "eager": 0, "lag": 1} if what == RAISES else {}  # due at step 2, installed at 3
    optimizer = osc.build(method, laid.outer, likelihood=Fixed(), on_nonfinite=how, **laid.options, **late)
    last, said, same = rank == world - 1, "stepped", True
    for index, (inputs, labels) in enumerate(batches(laid.model, 5)):
        x, y, odd = laid.own(inputs), laid.own(labels), index == 3

        def closure(x: Tensor = x, y: Tensor = y, odd: bool = odd) -> Tensor:
            optimizer.zero_grad()
            if odd and last and what.endswith("input is infinite"):
                x = x.clone()
                x[0, 0] = torch.inf
            loss = functional.cross_entropy(laid.outer(x), y)
            loss.backward()
            if odd and last and what == "a gradient vanishes":
                next(iter(laid.model.parameters())).grad = None
            if odd and last and what == "another loss":
                return {"loss": loss}  # type: ignore[return-value]
            return loss.detach()

        if odd and last and what == RAISES:
            for entry in optimizer.lagging.pending.values():
                entry.task._future = Future()
                entry.task._future.set_exception(MemoryError("no room for this matrix"))
        before = everything(laid, optimizer)
        try:
            optimizer.step(closure)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if odd:
            same = all(torch.equal(one, two) for one, two in zip(before, everything(laid, optimizer), strict=True))
    moved = not all(torch.equal(one, two) for one, two in zip(before, everything(laid, optimizer), strict=True))
    optimizer.close()
    return {"said": said, "same": same, "moved": moved, "skipped": optimizer.skipped_steps}


class OwnError(Exception):
    """Of a user's loop."""


def raising(rank: int, world: int, way: str, method: str, when: str) -> dict[str, Any]:
    """Nine steps; in the eighth the closure of the last process raises, and whoever was told an error tries again."""
    laid = Laid(two_layers(), way)
    optimizer = osc.build(method, laid.outer, likelihood=Fixed(), **laid.options)
    said, same, calls = "stepped", True, 0
    for index, (inputs, labels) in enumerate(batches(laid.model, 9)):
        x, y, raises = laid.own(inputs), laid.own(labels), index == 7 and rank == world - 1
        calls = 0

        def closure(x: Tensor = x, y: Tensor = y, raises: bool = raises) -> Tensor:
            nonlocal calls
            calls += 1
            if raises and when == "before its backward" and calls == 1:
                raise OwnError("no data")
            optimizer.zero_grad()
            loss = functional.cross_entropy(laid.outer(x), y)
            loss.backward()
            if raises and calls == CALLS.get(when):
                raise OwnError("no disk")
            return loss.detach()

        before = everything(laid, optimizer)
        try:
            optimizer.step(closure)
        except (OwnError, osc.ProcessError) as error:
            said = f"{type(error).__name__}: {error}"
            same = all(torch.equal(one, two) for one, two in zip(before, everything(laid, optimizer), strict=True))
            optimizer.step(closure)
    parameters = [whole(value) for value in laid.model.parameters()]
    optimizer.close()
    return {"said": said, "same": same, "parameters": parameters}


CALLS = {"after its backward": 1, "when evaluated again": 2}
INTERRUPTED = [("kfac", "before its backward"), ("kbfgs", "before its backward")]
INTERRUPTED += [(method, "after its backward") for method in ("kfac", "kbfgs", "adam")]
INTERRUPTED += [("kbfgs", "when evaluated again")]


def joined(rank: int, method: str, counts: tuple[int, int]) -> dict[str, Any]:
    """Inside ``join()``, with so many mini-batches for each process; whoever is refused leaves."""
    laid = Laid(two_layers(), "replicated")
    optimizer = osc.build(method, laid.outer, likelihood=Fixed(), **laid.options)
    before, said = everything(laid, optimizer), "never stepped"
    with laid.outer.join():  # type: ignore[operator]
        for x, y in batches(laid.model, counts[rank]):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = functional.cross_entropy(laid.outer(x), y)
                loss.backward()
                return loss.detach()

            said = "stepped"
            try:
                if optimizer.needs_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            except osc.ArgumentError as error:
                said = str(error)
                break
    same = all(torch.equal(one, two) for one, two in zip(before, everything(laid, optimizer), strict=True))
    optimizer.close()
    return {"said": said, "same": same}


JOINED = [(method, counts) for method in ("kfac", "kbfgs") for counts in ((3, 2), (2, 0), (2, 2))]


def overflown(rank: int, way: str, everywhere: bool) -> dict[str, Any]:
    """Three steps under a GradScaler, in the second of which a gradient is infinite, on the last process or on all."""
    laid, scaler = Laid(two_layers(), way), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = osc.build("kfac", laid.outer, likelihood=Fixed(), grad_scaler=scaler, **laid.options)
    said, same = [], True
    for index, (inputs, labels) in enumerate(batches(laid.model, 3)):
        x, y = laid.own(inputs), laid.own(labels)

        def closure(x: Tensor = x, y: Tensor = y, index: int = index) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(laid.outer(x), y)
            scaler.scale(loss).backward()
            if index == 1 and (everywhere or rank == 1):
                gradient: Any = next(laid.model.parameters()).grad
                getattr(gradient, "_local_tensor", gradient)[0, 0] = torch.inf
            return loss.detach()

        before = everything(laid, optimizer)
        try:
            optimizer.step(closure)
            said.append(optimizer.last_report.skipped or "stepped")
        except osc.ArgumentError as error:
            said.append(str(error))
            break
        finally:
            if index == 1:
                now = everything(laid, optimizer)
                same = all(torch.equal(one, two) for one, two in zip(before, now, strict=True))
        scaler.update()
    optimizer.close()
    return {"said": said, "same": same}


def left_alone(rank: int) -> dict[str, Any]:
    """The last process takes part in a table to which nobody else comes, in a group with a short time-out."""
    group = distributed.new_group([0, 1], timeout=timedelta(seconds=1))
    ranks = Ranks(group, None)
    began = time.monotonic()
    if rank == 1:
        ranks.leave(torch.zeros(3, dtype=torch.float64))
    return {"seconds": time.monotonic() - began, "broken": ranks.broken}


RAISES = "the thread of inverses raises"
DISAGREEMENTS = ("input is infinite", "skipped: input is infinite", "a gradient vanishes", "another loss")


def refused() -> dict[str, Callable[[], Any]]:
    """What cannot be right, each as it is built."""

    def packed() -> Any:
        laid = Laid(nn.MultiheadAttention(4, 2).double(), "fsdp")
        return osc.build("kfac", laid.outer, likelihood=Fixed())

    def ignored() -> Any:
        model = two_layers()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params={model[0].weight})  # type: ignore[index]
        return osc.build("kfac", model, likelihood=Fixed())

    def hooked() -> Any:
        laid = Laid(two_layers(), "owners-only")
        osc.build("kfac", laid.outer, likelihood=Fixed(), **laid.options)
        return osc.build("kfac", laid.outer, likelihood=Fixed(), **laid.options)

    def fsdp(**options: Any) -> Any:
        laid = Laid(two_layers(), "fsdp")
        return osc.build("kfac", laid.outer, likelihood=Fixed(), **options)

    def hessian() -> Any:
        laid = Laid(two_layers(), "owners")
        rule = osc.LayerwiseQuadratic(osc.SignedHessian())
        return osc.build(osc.Method(osc.Identity(), step_size=rule), laid.outer, **laid.options)

    def trained(model: nn.Module, optimizer: Any) -> None:
        x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1] * 3)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def alone() -> None:
        torch.manual_seed(distributed.get_rank())
        model = two_layers()
        trained(model, osc.build("kfac", model, likelihood=Fixed()))

    def apart() -> None:
        model = two_layers()
        sharded(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("parts", "pieces"))["pieces"])
        torch.manual_seed(distributed.get_rank())
        trained(model, osc.build("adam", model))

    def unfrozen() -> None:
        model = two_layers()
        model[0].requires_grad_(False)  # type: ignore[index]
        outer = DistributedDataParallel(model)
        optimizer = osc.build("adam", outer)
        model[0].requires_grad_(True)  # type: ignore[index]
        optimizer.add_param_group({"params": model[0].parameters()})  # type: ignore[index]
        torch.manual_seed(distributed.get_rank())
        trained(outer, optimizer)

    def ignored_by_ddp() -> Any:
        model = two_layers()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
        return osc.build("adam", DistributedDataParallel(model))

    def scaled() -> Any:
        laid = Laid(two_layers(), "owners-only")
        return osc.build("adam", laid.outer, grad_scaler=torch.amp.GradScaler("cpu"), **laid.options)

    def shorter() -> None:
        laid = Laid(two_layers(), "owners")
        optimizer = osc.build("kbfgs", laid.outer, likelihood=Fixed(), **laid.options)
        given = batches(laid.model, 2 - distributed.get_rank())
        optimizer.warm_start([lambda x=x: laid.outer(x) for x, _ in given])

    def nowhere() -> None:
        laid = Laid(two_layers(), "owners")
        osc.build("kfac", laid.outer, likelihood=Fixed(), **laid.options).consolidate_state_dict(to=2)

    def unsaved() -> Any:
        laid = Laid(two_layers(), "owners")
        return osc.build("kfac", laid.outer, likelihood=Fixed(), **laid.options).state_dict()

    return {
        "fsdp, packed attention": packed,
        "fsdp, ignored parameters": ignored,
        "fsdp, replicated": lambda: fsdp(division="replicated"),
        "fsdp, func": lambda: fsdp(backend="func"),
        "fsdp, each for itself": lambda: fsdp(process_group=None),
        "owners-only, hook taken": hooked,
        "owners-only, not wrapped": lambda: osc.build("adam", two_layers(), division="owners-only"),
        "Hessian products": hessian,
        "a part of a state": unsaved,
        "a warm start that ends early": shorter,
        "a state for nobody": nowhere,
        "nobody averages": alone,
        "nobody averages over meshes": apart,
        "unfrozen inside DistributedDataParallel": unfrozen,
        "ignored by DistributedDataParallel": ignored_by_ddp,
        "owners-only, scaled": scaled,
    }


def what_is_said(action: Callable[[], Any]) -> str:
    """The error of something that is refused."""
    try:
        action()
    except osc.OsculateError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def main(rank: int, world: int, init: str, out: str) -> None:
    """Every case."""
    distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    methods = ("kfac", "joint-kfac")
    found: dict[str, Any] = {
        f"{method}: {name}": certified(rank, method, case) for method in methods for name, case in CERTIFIED.items()
    }
    for way in WAYS:
        for method in ("kfac", "kbfgs", "adam"):
            for what in DISAGREEMENTS:
                found[f"{way}, {method}: {what}"] = disagreeing(rank, world, way, method, what)
        for method, when in INTERRUPTED:
            found[f"{way}, {method}: raises {when}"] = raising(rank, world, way, method, when)
        found[f"{way}, kfac: {RAISES}"] = disagreeing(rank, world, way, "kfac", RAISES)
    for way in WAYS:
        for everywhere in (True, False):
            found[f"{way}: overflown everywhere: {everywhere}"] = overflown(rank, way, everywhere)
    for method, counts in JOINED:
        found[f"{method}: join of {counts}"] = joined(rank, method, counts)
    for name, action in refused().items():
        found[f"refused: {name}"] = what_is_said(action)
    found["left alone"] = left_alone(rank)
    end(found, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
