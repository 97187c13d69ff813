"""Which layers Muon orthogonalises: hidden matrices; its output layer, embeddings and vectors get AdamW."""

from __future__ import annotations

from collections.abc import Callable

import osculate as osc
import pytest
import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(12, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.table(x))))


class ActorCritic(nn.Module):
    """Two heads, the first of them made before the body."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.body, self.critic = nn.Linear(6, 3), nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return torch.cat([self.actor(hidden), self.critic(hidden)], 1)


def spectral(model: nn.Module, **options: str) -> list[str]:
    """Layers whose weight is orthogonalised."""
    table = osc.build("muon", model, strict=True, **options).layer_table()
    for row in table:
        assert row.part in ("Spectral", "Diagonal") and not row.fallback
        assert row.part == "Diagonal" or row.parameters == ("weight",)
    return [row.layer for row in table if row.part == "Spectral"]


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
        nn.ReLU(),
    )


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (deep, {}, ["0", "3"]),
        (deep, {"heads": ""}, ["0", "3", "5"]),
        (deep, {"heads": "0, (last)"}, ["3"]),
        (Tied, {}, ["hidden"]),
        (ActorCritic, {}, ["actor", "body"]),
        (ActorCritic, {"heads": "actor,critic"}, ["body"]),
        (ActorCritic, {"heads": "*or, crit*"}, ["body"]),
        (lambda: nn.Linear(3, 2), {}, []),
        (lambda: nn.LayerNorm(3), {}, []),
    ],
)
def test_the_output_layer_is_adams(make: Callable[[], nn.Module], options: dict[str, str], expected: list[str]) -> None:
    assert spectral(make(), **options) == expected


def test_an_attention_block_keeps_its_projections() -> None:
    """A transformer layer: everything but the last matrix of the model is hidden."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 9))
    found = spectral(model)
    assert "0" not in found and "2" not in found
    assert sum(name.startswith("1.") for name in found) == len(found) >= 3


def test_a_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(osc.ArgumentError, match="head"):
        osc.build("muon", nn.Linear(3, 2), heads="head")


def test_the_last_entry_of_a_table_of_ones_own() -> None:
    """Also nested, and beside patterns; a model without any matrix has no such layer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inner = osc.ByLayer({"(last)": osc.Identity()}, otherwise=osc.Diagonal())
    for table in (osc.ByLayer({"(last)": osc.Identity(), "*": osc.Diagonal()}), osc.ByLayer({"*": inner})):
        rows = osc.build(osc.Method(table), model).layer_table()
        assert [row.part for row in rows] == ["Diagonal", "Identity"]
    with pytest.raises(osc.ArgumentError, match="no trainable matrix"):
        osc.build(osc.Method(osc.ByLayer({"(last)": osc.Identity()})), nn.LayerNorm(3))


def test_unfrozen_layers_join_as_hidden_ones() -> None:
    model = deep()
    model[0].requires_grad_(False)
    optimizer = osc.build("muon", model)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": ["0.*"]})
    parts = {(row.layer, row.parameters): row.part for row in optimizer.layer_table()}
    assert parts["0", ("weight",)] == parts["3", ("weight",)] == "Spectral"
    assert parts["5", ("weight", "bias")] == "Diagonal"
