"""Probabilities that have reached 0 or 1: sampled labels see no curvature, and steps must not explode."""

from __future__ import annotations

from collections.abc import Callable

import osculate as osc
import pytest
import torch
from osculate.curvature.backends.loss_seen import cross_entropy_seen
from torch import Tensor, nn
from torch.nn import functional

RULES = (
    "joint-kfac",
    "joint-kfac-momentum",
    "joint-kfac-noise-aware",
    "joint-sgdm",
    "joint-kbfgs",
    "lw-adamw",
    "lw-sgdm",
)


def trained(
    name: str, model: nn.Module, batches: list[tuple[Tensor, Tensor]], closures: bool, reduction: str = "mean"
) -> list[float]:
    """Losses of all steps, in a plain loop or with closures."""
    optimizer = osc.build(name, model, likelihood="categorical", loss_reduction=reduction)
    losses = []
    for x, labels in batches:

        def closure(x: Tensor = x, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), labels, reduction=reduction)
            loss.backward()
            losses.append(float(loss.detach()))
            return loss

        before = len(losses)
        if closures or optimizer.needs_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        del losses[before + 1 :]  # looks back
    return losses


def raw(kind: str, activation: type[nn.Module], seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A table whose columns nobody has scaled, and a network that answers with logits in the hundreds."""
    torch.manual_seed(seed)
    x = torch.randn(256, 10)
    labels = (x @ torch.randn(10, 3)).argmax(1)
    scales = {"all": torch.full((10,), 1e4), "mixed": torch.logspace(0, 4, 10), "shifted": torch.full((10,), 1e4)}
    x = x * scales[kind] + (1e4 if kind == "shifted" else 0.0)
    model = nn.Sequential(nn.Linear(10, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 3))
    return model, [(x[rows], labels[rows]) for rows in (torch.randint(0, 256, (64,)) for _ in range(120))]


@pytest.mark.parametrize("closures", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Identity])
@pytest.mark.parametrize("kind", ["all", "mixed", "shifted"])
def test_raw_features_do_not_blow_up(kind: str, activation: type[nn.Module], closures: bool) -> None:
    """The first loss is about 500; it used to end between 1e6 and 1e19."""
    losses = trained("joint-kfac", *raw(kind, activation, 0), closures)
    assert losses[0] > 50.0
    assert max(losses) < 3.0 * losses[0]
    assert sum(losses[-5:]) / 5 < 0.05 * losses[0]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_without_a_learning_rate_stays_bounded(name: str) -> None:
    for seed in (0, 1):
        losses = trained(name, *raw("mixed", nn.ReLU, seed), closures=False)
        assert max(losses) < 5.0 * losses[0]


@pytest.mark.parametrize("closures", [True, False])
@pytest.mark.parametrize("name", ["kfac", *RULES])
def test_a_memorised_batch_stays_memorised(name: str, closures: bool) -> None:
    """16 random labels in float32, until every probability is 0 or 1 and long after."""
    torch.manual_seed(1)
    x, labels = torch.randn(16, 20), torch.randint(0, 3, (16,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    losses = trained(name, model, [(x, labels)] * 600, closures)
    first = next(step for step, loss in enumerate(losses) if loss < 1e-2)
    assert max(losses[first:]) < 0.1


def test_nothing_moves_where_the_loss_is_zero() -> None:
    """Momentum remembers a slope, and a loss of exactly 0 has nothing left to give."""
    rule = osc.RelativeBound(osc.ConstantStep(), decrease=0.5)
    for loss, factor in ((0.0, 0.0), (0.3, 0.5), (0.6, 1.0), (5.0, 1.0), (None, 1.0), (-0.3, 0.5)):
        evidence = osc.StepEvidence(
            ("a", "b"),
            0.1,
            slopes=torch.tensor([2.0, 1.0]),
            squared_norms=torch.ones(2),
            parameter_norms=torch.full((2,), 100.0),
            loss=None if loss is None else torch.tensor(loss),
        )
        sizes = rule.propose(None, evidence)
        torch.testing.assert_close(torch.as_tensor(sizes), torch.full((2,), 0.1 * factor))
    uphill = osc.StepEvidence(
        ("a",), 0.1, slopes=torch.tensor([-2.0]), squared_norms=torch.ones(1), parameter_norms=torch.ones(1),
        loss=torch.tensor(0.01),
    )  # fmt: skip
    torch.testing.assert_close(torch.as_tensor(rule.propose(None, uphill)), torch.tensor([0.1]))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": functional.cross_entropy,
    "sum": lambda z, y: functional.cross_entropy(z, y, reduction="sum"),
    "class weights": lambda z, y: functional.cross_entropy(z, y, weight=torch.arange(1.0, 6.0).to(z)),
    "ignored rows": lambda z, y: functional.cross_entropy(z, torch.where(y == 2, -100, y)),
    "a mask": lambda z, y: (functional.cross_entropy(z, y, reduction="none") * (y > 1)).sum() / 7,
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_read_off_the_gradient(loss: str, scale: float) -> None:
    """Whatever the user averages; also where the probabilities have reached 0 and 1."""
    torch.manual_seed(0)
    logits = (scale * torch.randn(40, 5)).requires_grad_()
    labels = torch.randint(0, 5, (40,))
    value = LOSSES[loss](logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(cross_entropy_seen(logits.detach(), gradient), value.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_loops_and_closures_take_the_same_steps(reduction: str) -> None:
    first = trained("joint-kfac", *raw("mixed", nn.ReLU, 2), True, reduction)
    second = trained("joint-kfac", *raw("mixed", nn.ReLU, 2), False, reduction)
    torch.testing.assert_close(torch.tensor(first[:10]), torch.tensor(second[:10]), rtol=1e-2, atol=0.1)
