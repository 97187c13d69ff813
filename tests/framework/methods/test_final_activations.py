"""A model that ends in a softmax or a sigmoid, where logits are expected, is told so, with the way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import osculate as osc
import pytest
import torch
from osculate.curvature.final_activation import final_activation, sent_by_likelihood, way_out_of_activation
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def nll(output: Tensor, y: Tensor) -> Tensor:
    return functional.nll_loss(output, y)


def nll_of_logarithm(output: Tensor, y: Tensor) -> Tensor:
    return functional.nll_loss(output.log(), y)


def bits(output: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy(output, functional.one_hot(y, output.shape[1]).to(output))


HEADS: dict[str, tuple[nn.Module, Loss, str, str]] = {
    "LogSoftmax": (nn.LogSoftmax(1), nll, "categorical", "CrossEntropyLoss"),
    "Softmax": (nn.Softmax(1), nll_of_logarithm, "categorical", "CrossEntropyLoss"),
    "Sigmoid": (nn.Sigmoid(), bits, "bernoulli", "BCEWithLogitsLoss"),
}


class InForward(nn.Module):
    """The same in a forward of one's own, with a dropout that is the last module."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.noise = nn.Identity()
        self._head = [head]  # not a module of this one

    def forward(self, x: Tensor) -> Tensor:
        return self._head[0](self.out(self.noise(self.hidden(x)).relu()))


def told(method: str, model: nn.Module, loss: Loss, closure: bool = False, **build: object) -> list[str]:
    """What is said of the loss in three steps."""
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    y = x[:, :4].argmax(1)
    optimizer = osc.build(method, model, **build)  # type: ignore[call-overload]

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    return [str(entry.message) for entry in caught if entry.category is osc.LossWarning]


def network(*head: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), *head)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_a_named_likelihood_names_the_module_and_the_way_out(name: str, closure: bool) -> None:
    head, loss, likelihood, way_out = HEADS[name]
    (text,) = told("kfac", network(head), loss, closure, likelihood=likelihood)
    assert f"its last module, '3', is a {name}" in text and f"nn.{way_out}()" in text and "return the logits" in text
    (text,) = told("kfac", InForward(head), loss, closure, likelihood=likelihood)
    assert f"after a {name}" in text and "its last module" not in text and f"nn.{way_out}()" in text


@pytest.mark.parametrize("likelihood", [None, "categorical"])
@pytest.mark.parametrize("name", HEADS)
def test_a_loss_that_bounds_steps_is_read_off_logits_only(name: str, likelihood: str | None) -> None:
    head, loss, _, way_out = HEADS[name]
    (text,) = told("mbf", network(head), loss, likelihood=likelihood)
    assert f"its last module, '3', is a {name}" in text and f"nn.{way_out}()" in text
    assert told("mbf", network(head), loss, closure=True) == []


def squares(output: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(output, functional.one_hot(y, output.shape[1]).to(output))


def twice(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y)


@pytest.mark.parametrize("likelihood", [None, "categorical"])
def test_a_softmax_before_a_cross_entropy_is_right_and_told(likelihood: str | None) -> None:
    """The commonest mistake of all: the loss has a softmax of its own."""
    for method in ("mbf",) if likelihood is None else ("mbf", "kfac", "joint-kfac"):
        for model in (network(nn.Softmax(1)), InForward(nn.Softmax(1))):
            (text,) = told(method, model, twice, **({} if likelihood is None else {"likelihood": likelihood}))
            assert "as after a Softmax" in text and "return the logits" in text


def summed(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y, reduction="sum")


def test_sums_and_means_that_are_announced_as_the_other_are_told() -> None:
    for build in ({}, {"likelihood": "categorical", "loss_reduction": "sum"}):
        (text,) = told("mbf", network(), summed, **build)
        assert "a sum over samples" in text and "multiply lr" in text
    (text,) = told("kfac", network(), twice, likelihood="categorical", loss_reduction="sum")
    assert "weight 1 / N" in text and "loss_reduction='mean'" in text
    assert told("kfac", network(), summed, likelihood="categorical", loss_reduction="sum") == []


def test_what_is_right_as_it_is_stays_without_a_word() -> None:
    assert told("kfac", network(), twice, likelihood="categorical") == []
    assert told("kfac", network(nn.LogSoftmax(1)), twice, likelihood="categorical") == []  # twice is as good as once
    assert told("mbf", network(), twice, likelihood="categorical") == []
    for head in (nn.Sigmoid(), nn.Softmax(1)):  # a squared error of probabilities expects no logits
        (text,) = told("mbf", network(head), squares)
        assert "the gradient at the model's output is not that of a cross entropy" in text and "logits are" not in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 4), (5, 4, 7), (5, 7, 4), (6, 3, 4, 4), (9, 2)])
def test_outputs_of_every_shape_are_recognised(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape)
    for axis in {-1, 1}:
        assert final_activation(logits.softmax(axis).to(dtype)) == "Softmax"
        assert final_activation(logits.log_softmax(axis).to(dtype)) == "LogSoftmax"
    assert final_activation(logits.sigmoid().to(dtype)) == "Sigmoid"
    for other in (logits, logits.relu(), logits.tanh(), 3 * logits.sigmoid(), torch.zeros(shape), torch.ones(shape)):
        assert final_activation(other.to(dtype)) == ""
    assert final_activation(torch.rand(3)) == "" and final_activation(torch.tensor(0.5)) == ""


def test_only_gradients_of_labels_are_evidence() -> None:
    torch.manual_seed(0)
    p, y = torch.rand(20, 4).clamp(0.1, 0.9).requires_grad_(), torch.randint(0, 4, (20,))
    (hard,) = torch.autograd.grad(bits(p, y), p)
    (square,) = torch.autograd.grad(squares(p, y), p)
    assert sent_by_likelihood("Sigmoid", p, hard, 0.01) and not sent_by_likelihood("Sigmoid", p, square, 0.01)
    (single,) = torch.autograd.grad(nll(p, y), p)
    assert sent_by_likelihood("LogSoftmax", p, single, 0.01) and not sent_by_likelihood("Softmax", p, square, 0.01)


def test_a_module_of_another_kind_is_not_named() -> None:
    assert "last module" not in way_out_of_activation("Softmax", network(nn.Sigmoid()))
    assert "'3', is a Softmax" in way_out_of_activation("Softmax", network(nn.Softmax(1)))
