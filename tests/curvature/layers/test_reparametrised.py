"""Weights that are computed from other parameters: no structure may mistake them for the layer's matrix."""

from __future__ import annotations

from collections.abc import Callable

import osculate as osc
import pytest
import torch
from osculate.curvature import discover_layers
from small_nets import METHODS, build, closure_of, data, flat
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

REPARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "pruned bias": lambda module: prune.l1_unstructured(module, "bias", 0.3),
    "old spectral_norm": spectral_norm,
    "old weight_norm": weight_norm,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def net(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(change(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_its_parameters_go_to_the_fallback_and_the_table_says_why(kind: str) -> None:
    model = net(REPARAMETRISED[kind])
    layers = discover_layers(model)
    served = [id(p) for layer in layers for p in layer.parameters.values()]
    assert sorted(served) == sorted(id(p) for p in model.parameters())
    for name in ("kfac", "ngd-exact", "kbfgs"):
        rows = build(name, model).layer_table()
        first = [row for row in rows if row.layer.startswith("0")]
        assert first and all(row.kind == "Other" and row.fallback and "weight" in row.note for row in first)
        assert [row.note for row in rows if row.layer == "2"] == [""] and not rows[-1].fallback
        with pytest.raises(osc.CompatibilityError, match="weight is computed"):
            build(name, model, strict=True)


@pytest.mark.parametrize("kind", REPARAMETRISED)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_it(kind: str, name: str) -> None:
    model = net(REPARAMETRISED[kind])
    optimizer = build(name, model, lr=None if name != "sgdm" else 0.1)
    x, y = data()
    losses = [float(optimizer.step(closure_of(optimizer, model, x, y))) for _ in range(3)]
    assert all(0.0 < loss < 5.0 for loss in losses)


def test_what_is_left_of_the_model_is_served_as_if_the_weight_were_plain() -> None:
    """The layer behind a normalised one gets the same natural gradient as behind a plain one of equal weight."""
    ends = []
    for change in (parametrizations.weight_norm, nn.Identity()):
        model = net(change)
        optimizer = build("ngd-exact", model, seed=3)
        optimizer.step(closure_of(optimizer, model, *data()))
        ends.append(flat(model[2]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("change", [spectral_norm, parametrizations.spectral_norm, prune.identity])
@pytest.mark.parametrize("where", ["in_proj_weight", "out_proj"])
def test_attention_with_a_reparametrised_projection_is_another_module(
    change: Callable[..., nn.Module], where: str
) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    target, weight = (attention, where) if where == "in_proj_weight" else (attention.out_proj, "weight")
    change(target, weight)
    layers = discover_layers(attention)
    served = [id(p) for layer in layers for p in layer.parameters.values()]
    assert sorted(served) == sorted(id(p) for p in attention.parameters())
    assert {layer.kind for layer in layers} == {"Other"} and any(layer.note for layer in layers)


class Positions(nn.Module):
    """Learned positions: a forward without any argument."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))

    def forward(self) -> torch.Tensor:
        return self.table


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = Positions(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.positions())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_a_module_without_arguments(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model = Placed().double()
    optimizer = build(name, model, backend=backend)
    before = flat(model.positions)
    for seed in range(2):
        optimizer.step(closure_of(optimizer, model, *data(seed=seed)))
    assert bool(flat(model).isfinite().all()) and not torch.equal(flat(model.positions), before)
