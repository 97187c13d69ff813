"""Steps that are bounded by the loss know it in plain loops too, where it is a cross entropy that nobody has named."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import osculate as osc
import pytest
import torch
from osculate.curvature.backends.loss_seen import (
    _is_binary_cross_entropy,
    _is_cross_entropy,
    binary_cross_entropy_seen,
    cross_entropy_seen,
)
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def at_output(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient that it sends into the logits."""
    logits = logits.clone().requires_grad_()
    value = loss(logits, targets)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def weighted(logits: Tensor, targets: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 0.2, 3.0, 1.0]).to(logits)
    return functional.cross_entropy(logits, targets, weight=weight, ignore_index=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropies_are_recognised_and_read(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    logits, targets = (scale * torch.randn(50, 4)).to(dtype), torch.randint(0, 4, (50,))
    for loss in (functional.cross_entropy, weighted):
        value, gradient = at_output(loss, logits, targets)
        assert _is_cross_entropy(logits, gradient)
        torch.testing.assert_close(cross_entropy_seen(logits, gradient).to(dtype), value, rtol=2e-2, atol=1e-3)
    some, hard = logits[:, :3], (targets[:, None] > torch.arange(3)).to(dtype)
    value, gradient = at_output(functional.binary_cross_entropy_with_logits, some, hard)
    assert _is_binary_cross_entropy(some, gradient)
    torch.testing.assert_close(binary_cross_entropy_seen(some, gradient).to(dtype), value, rtol=2e-2, atol=1e-3)


def smooth(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, label_smoothing=0.2)


def squares(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(logits, functional.one_hot(targets, 4).to(logits))


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.multi_margin_loss(logits, targets)


def soft(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.3))


@pytest.mark.parametrize("loss", [smooth, squares, margins, soft])
def test_other_losses_are_not_taken_for_one(loss: Loss) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 4), torch.randint(0, 4, (50,))
    _, gradient = at_output(loss, logits, targets)
    assert not _is_cross_entropy(logits, gradient) and not _is_binary_cross_entropy(logits, gradient)


def trained(likelihood: str | None, loss: Loss, steps: int = 60, closure: bool = False, classes: int = 4) -> Tensor:
    """All parameters after some steps on one small classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))
    x = torch.randn(40, 6)
    y = x[:, :4].argmax(1)
    optimizer = osc.build("mbf", model, likelihood=likelihood)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    for _ in range(steps):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_plain_loop_that_names_nothing_ends_where_a_closure_ends() -> None:
    expected = trained(None, functional.cross_entropy, closure=True)
    torch.testing.assert_close(trained(None, functional.cross_entropy), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trained("categorical", functional.cross_entropy), expected, rtol=1e-3, atol=1e-4)


def test_the_same_of_a_binary_cross_entropy() -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], (targets > 1).to(logits))

    expected = trained(None, loss, closure=True, classes=1)
    torch.testing.assert_close(trained(None, loss, classes=1), expected, rtol=1e-3, atol=1e-4)


def test_a_loss_that_cannot_be_read_is_told_once_and_only_where_it_matters() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained(None, squares, 3)
    said = [str(warning.message) for warning in told if issubclass(warning.category, osc.LossWarning)]
    assert len(said) == 1 and "optimizer.step(closure)" in said[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(None, squares, 3, closure=True)


def test_a_closure_tells_its_loss_in_both_evaluations() -> None:
    """A method that looks back evaluates the closure twice; neither time is anything guessed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer, x, y = osc.build("kbfgs", model), torch.randn(8, 4), torch.randn(8, 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", osc.LossWarning)
        for _ in range(3):
            optimizer.step(closure)


def test_an_optimizer_that_rests_says_nothing_of_another_ones_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    resting, busy = osc.build("mbf", model), osc.build("sgdm", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", osc.LossWarning)
        functional.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 2)).backward()
        busy.step()
    with pytest.warns(osc.LossWarning, match="bounded by the loss"):
        resting.step()
