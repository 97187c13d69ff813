"""Records that do not explain the gradient are refused before a step, however they went wrong; others are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import differences
from torch import Tensor, nn
from torch.nn import functional

METHODS = ("kfac", "ekfac", "lw-sgdm", "joint-kfac")


class AlsoByHand(nn.Module):
    """A weight that a plain function uses besides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.first(value)
        return self.last(torch.tanh(hidden + functional.linear(value.flip(1), self.first.weight)))


class Hooked(nn.Module):
    """A module whose call is changed by a hook of somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)
        self.line.register_forward_hook(lambda module, args, output: 3.0 * output)

    def forward(self, value: Tensor) -> Tensor:
        return self.line(value)


class Slopes(nn.Module):
    """Returns its own output, to be differentiated by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, value: Tensor) -> Tensor:
        return self.net(value)


def plain(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(inputs), labels)


def of_derivatives(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    inputs = inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return plain(model, inputs, labels) + slope.square().sum()


def step(method: str, model: nn.Module, loss: Callable[..., Tensor], **options: Any) -> osc.SecondOrder:
    optimizer = osc.build(method, model, likelihood="categorical", **options)
    inputs, labels = torch.randn(6, 3), torch.tensor([0, 1] * 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, inputs, labels)
        value.backward()
        return value

    optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("model", "loss", "layer"), [(AlsoByHand, plain, "first"), (Slopes, of_derivatives, "net.0")])
def test_records_that_miss_a_part_of_the_gradient_are_refused(
    method: str, model: type[nn.Module], loss: Callable[..., Tensor], layer: str
) -> None:
    torch.manual_seed(0)
    net = model()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(osc.ArgumentError, match=rf"'{layer}'.* does not explain"):
        step(method, net, loss)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    if loss is plain:
        step(method, model(), loss, certify_records="never")


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_of_somebody_else_changes_no_record(method: str) -> None:
    step(method, Hooked(), plain, certify_records="always")  # ours stands before theirs


@pytest.mark.parametrize("how", ["model", "parameters", "another optimizer", "to zeros"])
def test_gradients_thrown_away_take_their_records_along(how: str) -> None:
    def trained(through: str) -> tuple[list[Tensor], str]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        optimizer = osc.build("kfac", net, likelihood="categorical", damping=0.1)
        first, second, labels = 10 * torch.randn(8, 3), torch.randn(8, 3), torch.tensor([0, 1] * 4)
        plain(net, first, labels).backward()
        if through == "model":
            net.zero_grad()
        elif through == "parameters":
            for parameter in net.parameters():
                parameter.grad = None
        elif through == "another optimizer":
            torch.optim.SGD(net.parameters(), lr=0.1).zero_grad()
        elif through == "to zeros":
            net.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad()
        plain(net, second, labels).backward()
        try:
            optimizer.step()
        except osc.ArgumentError as error:
            return [], str(error)
        return [parameter.detach().clone() for parameter in net.parameters()], ""

    found, refused = trained(how)
    right, _ = trained("the optimizer")
    if how == "to zeros":  # zeros tell nobody that they were made: the records are seen not to fit
        assert "optimizer.zero_grad()" in refused
    else:
        torch.testing.assert_close(found, right, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "lw-sgdm"])
def test_one_buffer_for_several_micro_batches_is_refused(method: str) -> None:
    net, buffer = nn.Sequential(nn.Linear(3, 2)), torch.empty(4, 3)
    optimizer = osc.build(method, net, likelihood="categorical")
    for _ in range(2):
        plain(net, buffer.copy_(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
    with pytest.raises(osc.ArgumentError, match=r"changed in place.*clone"):
        optimizer.step()
    optimizer.zero_grad()
    for _ in range(2):
        plain(net, buffer.copy_(torch.randn(4, 3)).clone(), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "joint-kfac"])
def test_output_sizes_of_a_call_are_read(method: str, dimensions: int) -> None:
    layer: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = layer(2, 3, 3, stride=2, padding=1)

        def forward(self, value: Tensor) -> Tensor:
            found: Tensor = self.up(value, output_size=[6] * dimensions)
            return found.flatten(2).sum(2)

    net = Up().double()
    optimizer = osc.build(method, net, likelihood="categorical", certify_records="always")
    for _ in range(3):
        optimizer.zero_grad()
        plain(net, torch.randn(4, 2, *[3] * dimensions, dtype=torch.float64), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [False, True])
def test_accumulation_clipping_and_many_kinds_of_layers_are_explained(dtype: torch.dtype, clip: bool) -> None:
    torch.manual_seed(1)
    shared = nn.Linear(6, 6)
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(1),
        nn.Linear(4 * 5, 6),
        shared,
        nn.Tanh(),
        shared,
        nn.LayerNorm(6),
        nn.Linear(6, 3, bias=False),
    ).to(dtype)
    optimizer = osc.build("kfac", net, likelihood="categorical", certify_records="always")
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(3):
            (plain(net, 1e3 * torch.randn(7, 2, 5, dtype=dtype), torch.randint(0, 3, (7,))) / 3).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        optimizer.step()


def test_what_is_asked_for_is_checked() -> None:
    with pytest.raises(osc.ArgumentError, match="certify_records"):
        osc.build("kfac", nn.Linear(2, 2), likelihood="categorical", certify_records="often")


@pytest.mark.parametrize("method", ["lw-sgdm", "lw-adamw", "joint-kfac", "joint-sgdm", "joint-kbfgs"])
def test_layers_that_saw_other_numbers_of_samples_are_refused_where_all_are_measured_together(method: str) -> None:
    """Second derivatives at inner points do not reach the last layer's output: only the points of the edge do."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = osc.build(method, net, likelihood="gaussian", certify_records="never")
    inner, edge = torch.rand(20, 2, requires_grad=True), torch.rand(6, 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        (slope,) = torch.autograd.grad(net(inner).sum(), inner, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), inner, create_graph=True)
        loss = (second + 1).square().mean() + net(edge).square().mean()
        loss.backward()
        return loss

    before = [p.detach().clone() for p in net.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(osc.ArgumentError, match=r"only of its derivatives.*ConstantStep"):
        optimizer.step(closure)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert differences(optimizer.state_dict()["state"], state) == []
