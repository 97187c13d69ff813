"""Complex parameters and sparse gradients are refused by name before anything is written; sparse inputs are served."""

from __future__ import annotations

import re
from collections.abc import Callable

import osculate as osc
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

METHODS = ("sgdm", "adam", "lw-adamw", "kfac", "joint-kfac", "kbfgs", "mbf", "shampoo", "soap", "muon")
LABELS = torch.tensor([0, 1, 2, 0])


class Lookup(nn.Module):
    """A table read by the functional form, whose gradient is sparse without any module that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(10, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.embedding(x, self.table, sparse=True).mean(1))


class Rotation(nn.Module):
    """Complex weights beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.out = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x * self.phase).real)


class RealRotation(nn.Module):
    """The way out: the same with the real form as the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.out = nn.Parameter(torch.randn(4, 2)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x * torch.view_as_complex(self.phase)).real)


def closure_of(optimizer: osc.SecondOrder, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), LABELS)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "model",
    [
        Rotation,
        lambda: nn.Linear(4, 3, dtype=torch.cdouble),
        lambda: nn.Sequential(nn.Conv1d(1, 2, 3, dtype=torch.cfloat)),
    ],
    ids=["phase", "linear", "convolution"],
)
def test_complex_parameters_are_refused_at_construction(method: str, model: Callable[[], nn.Module]) -> None:
    made = model()
    name = next(name for name, p in made.named_parameters() if p.is_complex())
    with pytest.raises(osc.ArgumentError, match=rf"{name}.* complex.*view_as_real"):
        osc.build(method, made, likelihood="categorical")


@pytest.mark.parametrize("method", METHODS)
def test_the_real_form_and_frozen_complex_parameters_are_served(method: str) -> None:
    torch.manual_seed(0)
    frozen = Rotation()
    frozen.phase.requires_grad_(False)
    for model in (RealRotation(), frozen):
        optimizer = osc.build(method, model, likelihood="categorical")
        before = model.out.weight.detach().clone()
        optimizer.step(closure_of(optimizer, model, torch.randn(4, 4)))
        assert not torch.equal(before, model.out.weight)
    frozen.phase.requires_grad_(True)
    with pytest.raises(osc.ArgumentError, match=r"phase.*complex"):
        optimizer.add_param_group({"params": [frozen.phase]})


@pytest.mark.parametrize("method", METHODS)
def test_sparse_gradients_of_modules_are_refused_at_construction(method: str) -> None:
    for bag in (nn.EmbeddingBag(10, 4, sparse=True), nn.Embedding(10, 4, sparse=True)):
        with pytest.raises(osc.ArgumentError, match="sparse=True"):
            osc.build(method, nn.Sequential(bag, nn.Linear(4, 3)), likelihood="categorical")
        bag.requires_grad_(False)
        osc.build(method, nn.Sequential(bag, nn.Linear(4, 3)), likelihood="categorical")


@pytest.mark.parametrize("method", METHODS)
def test_sparse_gradients_are_refused_before_anything_is_written(method: str) -> None:
    torch.manual_seed(0)
    model = Lookup()
    optimizer = osc.build(method, model, likelihood="categorical")
    saved = optimizer.state_dict()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(osc.ArgumentError, match=r"table.*sparse.*sparse=False"):
        optimizer.step(closure_of(optimizer, model, torch.randint(0, 10, (4, 3))))
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, parameter)
    counted = re.compile("'gradient_evaluations': [0-9]")  # the passes were made
    assert counted.sub("", str(optimizer.state_dict())) == counted.sub("", str(saved))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("form", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("method", METHODS)
def test_sparse_inputs_give_the_step_of_dense_ones(method: str, form: str) -> None:
    """Bags of words into the first layer."""
    x = torch.zeros(4, 6)
    x[[0, 0, 1, 2, 3], [1, 2, 5, 2, 0]] = torch.tensor([1.0, 2.0, -1.0, 3.0, 0.5])
    results = []
    for value in (x, getattr(x, form)()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        value = value.double()
        optimizer = osc.build(method, model, likelihood="categorical")
        for _ in range(3):
            optimizer.step(closure_of(optimizer, model, value))
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_sparse_inputs_of_backpack_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = osc.build("kfac", model, likelihood="categorical", backend="backpack")
    functional.cross_entropy(model(torch.eye(6)[:4].to_sparse()), LABELS).backward()
    with pytest.raises(osc.ArgumentError, match=r"layers 0 were given sparse inputs.*to_dense"):
        optimizer.step()
