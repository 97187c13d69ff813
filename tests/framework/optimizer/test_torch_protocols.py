"""What torch's own tools do with models and optimizers of ours: checkpoints by parameter, hooks, programs, copies."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, cross_entropy, data, differences, everything, make, train
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

SOME = ("sgdm", "adam", "kfac", "kbfgs", "joint-kfac-momentum", "soap")
NETS = ("mlp", "cnn", "tokens", "called-twice", "attention", "tied")


def numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


# -- distributed checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_takes_no_step_and_goes_on_bit_for_bit(name: str, gradients: bool) -> None:
    model = make()
    optimizer = build(name, model, groups=[{"params": ["*.bias"], "weight_decay": 0.0}])
    train(optimizer, model, batches(count=3))
    if not gradients:
        optimizer.zero_grad()
    before, own, groups = everything(model), copy.deepcopy(optimizer.state_dict()), numbers(optimizer)
    saved = get_optimizer_state_dict(model, optimizer)
    assert differences(before, everything(model)) == [] and numbers(optimizer) == groups
    assert differences(own, optimizer.state_dict()) == []
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    twin = make(seed=5)
    twin.load_state_dict(model.state_dict())
    other = build(name, twin, groups=[{"params": ["*.bias"], "weight_decay": 0.0}])
    set_optimizer_state_dict(twin, other, copy.deepcopy(saved))
    assert differences(own, other.state_dict()) == []
    train(optimizer, model, batches(count=2)), train(other, twin, batches(count=2))
    assert differences(everything(model), everything(twin)) == []


@pytest.mark.parametrize("options", [StateDictOptions(full_state_dict=True), StateDictOptions(cpu_offload=True)])
def test_a_checkpoint_with_options(options: StateDictOptions) -> None:
    model = make("partly-frozen")
    optimizer = build("kfac", model, lr=0.05)
    train(optimizer, model, batches(count=2))
    own = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = make("partly-frozen")
    other = build("kfac", twin, lr=0.5)
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert differences(own, other.state_dict()) == [] and other.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("name", ["sgdm", "kfac", "kbfgs-l", "joint-kfac-momentum", "joint-kfac-noise-aware"])
def test_a_checkpoint_goes_through_torchs_files(name: str, tmp_path: Path) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2))
    own = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process only
        checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
        twin = make()
        other = build(name, twin)
        train(other, twin, batches(count=1))
        found = {"optimizer": get_optimizer_state_dict(twin, other)}
        checkpoint.load(found, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, found["optimizer"])
    assert differences(own, other.state_dict()) == []


def test_a_fresh_optimizer_is_saved_without_a_step() -> None:
    model = make()
    optimizer = build("adam", model, lr=0.125)
    before = everything(model)
    get_optimizer_state_dict(model, optimizer)
    assert differences(before, everything(model)) == []
    assert optimizer.param_groups[0]["lr"] == 0.125 and optimizer.state_dict()["progress"]["step"] == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    model = make()
    torchs = torch.optim.Adam(model.parameters())
    saved = get_optimizer_state_dict(model, torchs)
    optimizer = build("adam", model)
    with pytest.raises(osc.ArgumentError, match="not a state of an osculate optimizer"):
        set_optimizer_state_dict(model, optimizer, saved)


def test_the_state_by_parameter_is_the_momentum() -> None:
    model = make()
    optimizer = build("sgdm", model)
    train(optimizer, model, batches(count=1))
    assert set(optimizer.state) == set(model.parameters())
    for parameter, entry in optimizer.state.items():
        assert parameter.shape == entry["momentum"].shape and bool(entry["momentum"].any())
    twin, other = copy.deepcopy((model, optimizer))
    assert set(other.state) == set(twin.parameters())


# -- hooks of states ------------------------------------------------------------------------------------------------


def test_hooks_on_saving_and_loading_are_called_in_torchs_order() -> None:
    model = make()
    optimizer = build("kfac", model)
    told: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: told.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: told.append("before loading"))
    handle = optimizer.register_load_state_dict_pre_hook(
        lambda _, saved: {key: value for key, value in saved.items() if key != "note"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: told.append("after loading"))
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    optimizer.load_state_dict(saved)
    assert told == ["before saving", "before loading", "after loading"] and "note" in saved
    handle.remove()


# -- programs and copies --------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "lw-sgdm"])
@pytest.mark.parametrize("net", NETS)
def test_copies_carry_no_hooks(net: str, name: str) -> None:
    model = make(net)
    plain = hooks(model)
    optimizer = build(name, model)
    assert hooks(model) > plain
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]
    for twin in copies:
        assert hooks(twin) == plain
        for module in twin.modules():
            assert not module._forward_hooks_with_kwargs and not module._forward_hooks_always_called
    train(optimizer, model, batches(net, 2))
    optimizer.close()
    assert hooks(model) == plain


@pytest.mark.parametrize("theirs", ["before", "after", "removed before", "removed after"])
def test_hooks_of_others_live_on(theirs: str) -> None:
    told: list[int] = []

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        told.append(len(args))

    model = make()
    handle = None
    if theirs.endswith("before"):
        handle = model[2].register_forward_hook(watch, with_kwargs=True)
    optimizer = build("kfac", model)
    if theirs.endswith("after"):
        handle = model[2].register_forward_hook(watch, with_kwargs=True)
    assert handle is not None
    if theirs.startswith("removed"):
        handle.remove()
    x, _ = data()
    model(x)
    copy.deepcopy(model)(x)
    assert told == ([] if theirs.startswith("removed") else [1, 1])
    train(optimizer, model, batches(count=1))
    optimizer.close()
    handle.remove()
    told.clear()
    model(x)
    assert told == [] and hooks(model) == 0


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("net", ["mlp", "cnn", "signals"])
def test_scripts_traces_and_exported_programs_are_of_the_model_alone(net: str, backend: str) -> None:
    model, bare = make(net), make(net)
    optimizer = build("kfac", model, backend=backend) if net != "cnn" or backend == "hooks" else build("sgdm", model)
    x, _ = data(net)
    model.eval(), bare.eval()
    right = bare(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), right)
    assert torch.equal(torch.export.export(model, (x,), strict=True).module()(x), right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and GroupNorm asks for sizes
        assert torch.equal(torch.jit.script(model)(x), right)
        assert torch.equal(torch.jit.trace(model, (x,))(x), right)
        assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), right)
    model.train()
    if net != "cnn" or backend == "hooks":
        train(optimizer, model, batches(net, 2))  # nothing of them was recorded


def test_a_whole_model_in_a_file_does_not_need_this_library(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].register_forward_hook(contextlib.nullcontext().__exit__)
    optimizer = build("kfac", model)
    train(optimizer, model, batches(count=1))
    torch.save(model, tmp_path / "model.pt")
    x, _ = data()
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    program = (
        "import sys, torch\n"
        "class Finder:\n    def find_spec(self, name, *rest):\n"
        "        assert not name.startswith('osculate'), name\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"x, right = torch.load({str(tmp_path / 'data.pt')!r})\n"
        "assert torch.equal(model(x), right)\n"
        "model(x).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# -- sharded parameters ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def evaluated(optimizer: torch.optim.Optimizer, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", ["fsdp2", "tensor parallel"])
@pytest.mark.parametrize("name", ["sgdm", "kfac", "kbfgs"])
def test_sharded_parameters_in_a_world_of_one(name: str, how: str) -> None:
    """As ``torchrun --nproc-per-node 1`` makes it: the same trajectory as without."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    found = []
    for way in ("plain", how):
        mesh, model = init_device_mesh("cpu", (1,)), make()
        if way == "fsdp2":
            fully_shard(model, mesh=mesh)
        elif way == "tensor parallel":
            parallelize_module(model, mesh, {"0": ColwiseParallel()})
        optimizer = build(name, model, process_group="auto" if way != "plain" else None)
        for x, y in batches("mlp", 4):
            optimizer.step(partial(evaluated, optimizer, model, x, y))
        optimizer.close()
        found.append([getattr(value, "_local_tensor", value).detach() for value in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
