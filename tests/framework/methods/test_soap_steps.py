"""SOAP moves by about its learning rate, whatever gradients made its basis, and leaves long sides as they are."""

from __future__ import annotations

import osculate as osc
import pytest
import torch
from osculate.preconditioners import Eigenbasis, GradientMoments, LayerMoments
from torch import nn
from torch.nn import functional

LR = 3e-3


def moves(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], **options: object) -> list[float]:
    """Largest change of an entry of the first layer in every step, in learning rates."""
    optimizer = osc.build("soap", model, lr=LR, weight_decay=0.0, **options)
    weight = next(model.parameters())
    found = []
    for x, labels in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        before = weight.detach().clone()
        optimizer.step()
        found.append(float((weight.detach() - before).abs().max()) / LR)
    return found


def test_rows_that_leave_the_gradient_do_not_explode() -> None:
    """Tokens of the first batch are in the momentum, and not in the gradient that comes with the first basis."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3))
    labels = torch.tensor([0, 1, 2, 0])
    first, second = moves(model, [(torch.tensor(ids), labels) for ids in ([0, 1, 2, 3], [4, 5, 6, 7])])
    assert 0.9 < first < 1.1
    assert 0.8 < second < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "width"), [(8, 4), (50, 16), (200, 5)])
def test_rare_tokens_never_explode(rows: int, width: int, seed: int, dtype: torch.dtype) -> None:
    """Through six bases, with tokens that come once, and steps of a single token."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(rows, width), nn.Linear(width, 3)).to(dtype)
    batches = []
    for step in range(60):
        ids = torch.randint(0, rows, (4,)) if step % 3 else torch.full((4,), step % rows)
        batches.append((ids, ids % 3))
    assert max(moves(model, batches)) < 3.0


@pytest.mark.parametrize("seed", range(3))
def test_features_that_come_and_go_do_not_explode(seed: int) -> None:
    """Sparse inputs, two samples a batch, a ReLU network whose units die and return; also a convolution."""
    torch.manual_seed(seed)
    x = torch.randn(64, 20) * (torch.rand(64, 20) > 0.8)
    labels = torch.randint(0, 10, (64,))
    batches = [(x[rows], labels[rows]) for rows in (torch.randint(0, 64, (2,)) for _ in range(40))]
    assert max(moves(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), batches)) < 3.0
    convolution = nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
    )
    assert max(moves(convolution, batches)) < 3.0


@pytest.mark.parametrize("largest", [40, 30, 10])
def test_long_sides_keep_their_coordinates(largest: int) -> None:
    """A vocabulary-size side has no matrix; the other one, or none, is turned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 35, bias=False), nn.Tanh(), nn.Linear(35, 3))
    batches = [(torch.randn(16, 12), torch.randint(0, 3, (16,))) for _ in range(12)]
    assert max(moves(model, batches, largest=largest)) < 3.0
    row = osc.build("soap", model, largest=largest).layer_table()[0]
    sides = sum(size**2 for size in (12, 35) if size <= largest)
    assert not row.fallback
    assert row.bytes == 4 * (2 * sides + 2 * 12 * 35)


@pytest.mark.parametrize("moments", [GradientMoments(), LayerMoments()], ids=["soap", "ekfac"])
@pytest.mark.parametrize("turned", [4, 1])
def test_a_side_that_is_not_turned_has_the_basis_of_its_coordinates(moments: object, turned: int) -> None:
    """Directions equal a solve with the dense form, which has an identity in the place of the missing basis."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 7)).double()
    estimator = osc.BatchMean() if isinstance(moments, GradientMoments) else osc.SampledFisher()
    power = 0.5 if isinstance(moments, GradientMoments) else 1.0
    part = Eigenbasis(moments, power=power, turned=turned)  # type: ignore[arg-type]
    method = osc.Method(part, estimator, momentum=osc.NoMomentum(), defaults={"damping": 0.1, "lr": 1.0})
    optimizer = osc.build(method, model, likelihood="categorical")
    reference = osc.build(method.reference(), model, likelihood="categorical")
    for _ in range(5):
        x, labels = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 7, (9,))
        steps = []
        start = [parameter.detach().clone() for parameter in model.parameters()]
        for each in (reference, optimizer):
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), start, strict=True):
                    parameter.copy_(value)
            each.zero_grad()
            functional.cross_entropy(model(x), labels).backward()
            each.step()
            steps.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=1e-12)
