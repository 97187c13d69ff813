"""Who serves what: matrices without a layer, the one warning about the fallback, and what ``strict`` sees."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import osculate as osc
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

BY_GRADIENT = ("shampoo", "soap", "muon")


class Pair(nn.Module):
    """Two matrices and a vector in one module that no adapter reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 5))
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first.T) @ self.second.T + self.shift


class Plain(nn.Module):
    """The same in two layers and a shift."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)
        self.first.weight, self.second.weight = nn.Parameter(pair.first.clone()), nn.Parameter(pair.second.clone())
        self.rest = nn.ParameterList([pair.shift.detach().clone()])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) + self.rest[0]


class Standardised(nn.Conv2d):
    """A kernel that is standardised when it is used."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Kept(nn.Module):
    """Low-rank matrices kept in a list and a dictionary, which are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Embedding(9, 4)
        self.base.weight.requires_grad_(False)
        self.down = nn.ParameterDict({"default": torch.randn(2, 9)})
        self.up = nn.ParameterList([torch.randn(4, 2)])
        self.scale = nn.ParameterList([torch.randn(4)])
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        low = functional.embedding(tokens, self.down["default"].T) @ self.up[0].T
        return self.head(((self.base(tokens) + low) * self.scale[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.unflatten(1, (2, 2)).repeat(1, 1, 2))[0][:, -1])


EVERY_MATRIX: dict[str, Any] = {"heads": ""}
"""Muon leaves the last matrix to AdamW unless it is told otherwise."""


def by_matrix(row: Any) -> bool:
    """Whether the method's structure for matrices serves a row; Muon's other structure is a part of it, too."""
    return not row.fallback and not row.part.startswith("Diagonal")


def steps(optimizer: osc.SecondOrder, model: nn.Module, x: Tensor, count: int = 3) -> list[float]:
    labels, losses = torch.arange(len(x)) % 3, []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(count):
        optimizer.step(closure)
    return losses


def warned(name: str, model: nn.Module, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        osc.build(name, model, **({"likelihood": "categorical"} | options)).close()
    assert all(entry.category is osc.FallbackWarning for entry in found)
    assert all(entry.filename == __file__ for entry in found)
    return [str(entry.message) for entry in found]


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_matrix_without_a_layer_moves_as_the_same_matrix_in_a_layer(name: str) -> None:
    pair = Pair().double()
    plain, x = Plain(pair), torch.randn(8, 4, dtype=torch.float64)
    for model in (pair, plain):
        optimizer = osc.build(name, model, **(EVERY_MATRIX if name == "muon" else {}))
        assert sum(by_matrix(row) for row in optimizer.layer_table()) == 2
        steps(optimizer, model, x)
    for own, other in (
        (pair.first, plain.first.weight),
        (pair.second, plain.second.weight),
        (pair.shift, plain.rest[0]),
    ):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_matrices_of_recurrent_layers_kernels_and_lists_are_served(name: str) -> None:
    tokens = torch.randint(0, 9, (8, 5))
    for model, x, matrices in (
        (Recurrent(), torch.randn(8, 4), {"cell": ["weight_ih_l0", "weight_hh_l0"]}),
        (
            nn.Sequential(nn.Unflatten(1, (1, 2, 2)), Standardised(1, 3, 2), nn.Flatten()),
            torch.randn(8, 4),
            {"1": ["weight"]},
        ),
        (Kept(), tokens, {"down": ["default"], "up": ["0"]}),
    ):
        optimizer = osc.build(name, model, **(EVERY_MATRIX if name == "muon" else {}))
        table = [row for row in optimizer.layer_table() if by_matrix(row)]
        for layer, names in matrices.items():
            assert [row.parameters[0] for row in table if row.layer == layer] == names
        before = [value.detach().clone() for value in model.parameters() if value.requires_grad]
        losses = steps(optimizer, model, x, 8)
        assert losses[-1] < losses[0]
        after = [value for value in model.parameters() if value.requires_grad]
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_matrix_without_a_layer_is_saved_copied_and_resumed() -> None:
    for name in BY_GRADIENT:
        model, x = Pair(), torch.randn(8, 4)
        optimizer = osc.build(name, model)
        steps(optimizer, model, x)
        twin, other = copy.deepcopy((model, optimizer))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        again = Pair()
        again.load_state_dict(weights)
        resumed = osc.build(name, again)
        resumed.load_state_dict(state)
        for chosen, own in ((optimizer, model), (other, twin), (resumed, again)):
            steps(chosen, own, x)
        for first, second, third in zip(model.parameters(), twin.parameters(), again.parameters(), strict=True):
            assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kbfgs", "tnt", "mbf", "lw-adamw", "joint-kfac", "ngd-exact"])
def test_methods_that_need_rows_leave_lists_to_their_fallback_and_step(name: str) -> None:
    model, tokens = Kept(), torch.randint(0, 9, (8, 5))
    optimizer = osc.build(name, model, likelihood="categorical")
    before = [value.detach().clone() for value in model.parameters() if value.requires_grad]
    steps(optimizer, model, tokens)
    rows = {row.layer: row for row in optimizer.layer_table()}
    assert "ParameterList" in rows["up"].note and "ParameterDict" in rows["down"].note
    after = [value for value in model.parameters() if value.requires_grad]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_one_warning_names_the_biggest_layers_and_why() -> None:
    (message,) = warned("kfac", Kept())
    assert "osculate serves 66.7 % of the parameters by Identity" in message
    assert message.index("down (ParameterDict, 18)") < message.index("up (ParameterList, 8)")
    assert "which is never called" in message and "head" not in message
    (message,) = warned("kfac", Recurrent())
    assert "cell (LSTM, 220): no adapter reads it as a matrix" in message
    assert not warned("muon", nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 3)))  # AdamW is meant for it
    (message,) = warned("mbf", nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 3)))
    assert "0 (Embedding, 200)" in message


def test_long_lists_are_cut() -> None:
    (message,) = warned("kfac", nn.Sequential(*(nn.LayerNorm(4) for _ in range(9)), nn.Linear(4, 3)))
    assert "; and 5 more" in message


@pytest.mark.parametrize("name", ["sgdm", "adam", "shampoo", "kfac", "mbf", "muon"])
def test_nothing_is_said_where_the_method_serves_nearly_everything(name: str) -> None:
    assert not warned(name, nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 3)))


def test_a_changed_forward_is_named_however_small_it_is() -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(20, 30), Doubled(30), nn.LayerNorm(30), nn.Linear(30, 3))
    (message,) = warned("kfac", model)
    assert "1 (Doubled, 60): Doubled does something else than LayerNorm" in message and "2 (" not in message
    assert not warned("adam", model)


def test_strict_sees_matrices_that_by_layer_takes_otherwise() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises(osc.CompatibilityError, match=r"ByLayer takes otherwise, Diagonal.*0 \(Embedding\): weight"):
        osc.build("mbf", model, likelihood="categorical", strict=True)
    osc.build("mbf", nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), strict=True)  # its norms are the table's
    table = osc.ByLayer({"Linear": osc.MiniBlock(), "Embedding": osc.Diagonal()}, otherwise=osc.Diagonal())
    method = osc.Method(table, osc.BatchMean(), defaults={"damping": 0.1})
    osc.build(method, model, strict=True)


def test_strict_refuses_a_matrix_behind_a_table_in_a_table() -> None:
    inner = osc.ByLayer({"1": osc.MiniBlock()}, otherwise=osc.Identity())
    method = osc.Method(osc.ByLayer({"Linear": inner}), osc.BatchMean(), defaults={"damping": 0.1})
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(osc.CompatibilityError, match=r"0 \(Linear\): weight"):
        osc.build(method, model, strict=True)
