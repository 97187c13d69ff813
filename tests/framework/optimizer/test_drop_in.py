"""A plain PyTorch script in which only the optimizer's construction is replaced."""

from __future__ import annotations

from collections.abc import Callable

import osculate as osc
import pytest
import torch
from torch import Tensor, nn

SIDE = 10


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy bars: horizontal, vertical, or on the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    places = torch.randint(0, SIDE, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    for image, label, place in zip(images, labels.tolist(), places.tolist(), strict=True):
        if label == 0:
            image[0, place] += 1.0
        elif label == 1:
            image[0, :, place] += 1.0
        else:
            image[0] += torch.roll(torch.eye(SIDE), place, 0)
    return images, labels


def plain_script(construct: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
    """CNN with dropout and BatchNorm, StepLR, evaluation between epochs; returns the test accuracy."""
    torch.manual_seed(0)
    x, y = pictures(1200, 1)
    x_test, y_test = pictures(400, 2)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(150, 20), nn.ReLU(inplace=True), nn.Linear(20, 3),
    )  # fmt: skip
    optimizer = construct(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    accuracy = 0.0
    for _ in range(3):
        model.train()
        for rows in torch.randperm(len(x)).split(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            accuracy = float((model(x_test).argmax(1) == y_test).double().mean())
    return accuracy


def test_adam_learns_the_task() -> None:
    assert plain_script(lambda model: torch.optim.Adam(model.parameters(), lr=0.01)) >= 0.95


@pytest.mark.parametrize(("name", "numbers"), [("mbf", {}), ("mbf-released", {"lr": 1e-4, "damping": 1e-3})])
def test_mbf_replaces_adam(name: str, numbers: dict[str, float]) -> None:
    """At its defaults; the released form has numbers that were chosen for large batches."""
    assert plain_script(lambda model: osc.build(name, model, **numbers)) >= 0.97


@pytest.mark.parametrize("name", ["kfac", "joint-kfac", "lw-adamw", "lw-sgdm", "joint-sgdm"])
def test_methods_that_sample_need_one_more_word(name: str) -> None:
    assert plain_script(lambda model: osc.build(name, model, likelihood="categorical")) >= 0.8


def test_our_adam_is_their_adam() -> None:
    ours = plain_script(lambda model: osc.build("adam", model, lr=0.01))
    theirs = plain_script(lambda model: torch.optim.Adam(model.parameters(), lr=0.01))
    assert ours == pytest.approx(theirs, abs=0.03)
