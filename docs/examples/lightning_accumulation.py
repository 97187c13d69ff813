"""Accumulate gradients over four micro-batches in Lightning, by optimizers of osculate.

    pip install -e ".[foreign]"                      # Lightning among others
    python docs/examples/lightning_accumulation.py

Lightning runs three backward passes and hands ``step`` a closure that makes the fourth. What is worth a look:

* A method that does not look back (``kfac``, ``joint-kfac``, ``soap``, ``muon``) counts all four: ``Trainer`` with
  ``accumulate_grad_batches=4`` does what four times the batch would do.
* A method that evaluates the mini-batch again after the step (``kbfgs``) would see a quarter of it, and refuses. It
  wants one closure that runs every micro-batch: manual optimization, as in :class:`Manual`.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import osculate as osc
import torch
from torch import Tensor, nn

MICRO, COUNT = 16, 4
OPTIONS = {"kfac": {"lr": 0.1, "damping": 0.03}, "joint-kfac": {}, "soap": {"lr": 0.01}, "muon": {"lr": 0.02}}
LOOKING_BACK = {"kbfgs": {"lr": 0.1}}


class Automatic(lightning.LightningModule):
    """A classifier whose loop is Lightning's.

    Args:
        method: name of a registered method.
        options: numbers of it.
    """

    def __init__(self, method: str, options: dict[str, float]):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
        self.method, self.options = method, options
        self.losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy, mean over samples."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch: Any, index: int) -> Any:
        """The loss; Lightning divides it by four."""
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build on the network."""
        return osc.build(self.method, self.net, likelihood="categorical", **self.options)


class Manual(Automatic):
    """The same, with the four micro-batches inside one closure."""

    def __init__(self, method: str, options: dict[str, float]):
        super().__init__(method, options)
        self.automatic_optimization = False
        self.waiting: list[Any] = []

    def training_step(self, batch: Any, index: int) -> None:
        """Wait for four, then step."""
        self.waiting.append(batch)
        if len(self.waiting) < COUNT:
            return
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for part in self.waiting:
                loss = self.loss(part) / COUNT
                self.manual_backward(loss)
                total = total + loss.detach()
            return total

        optimizer.step(closure)
        self.waiting = []


def train(module: Automatic, epochs: int = 6) -> tuple[float, float]:
    """Train with the ``Trainer``. Returns the mean losses of the first four micro-batches and of the last four."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (256,), generator=generator)
    inputs = torch.randn(256, 20, generator=generator) + 2.0 * nn.functional.one_hot(labels, 20)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=MICRO)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=COUNT if module.automatic_optimization else 1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return sum(module.losses[:COUNT]) / COUNT, sum(module.losses[-COUNT:]) / COUNT


def main() -> None:
    """Train by every method, and show what a method that looks back says."""
    for kind, methods in ((Automatic, OPTIONS), (Manual, LOOKING_BACK)):
        for method, options in methods.items():
            torch.manual_seed(0)
            first, last = train(kind(method, options))
            print(f"{method:11s} {kind.__name__.lower()}: loss {first:.3f} to {last:.3f}", flush=True)
    for method, options in LOOKING_BACK.items():
        try:
            train(Automatic(method, options))
        except osc.ArgumentError as error:
            print(f"{method:11s} automatic: refused, {error}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")
    main()
