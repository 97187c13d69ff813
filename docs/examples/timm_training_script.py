"""Train by the loop of timm's ``train.py``: mixup, soft targets, schedule, weight decay, average, checkpoints.

    pip install -e ".[foreign]"                              # timm among others
    python docs/examples/timm_training_script.py             # all of them
    python docs/examples/timm_training_script.py kfac adamw

``adamw`` is timm's own: names that osculate does not know go to timm. Random weights and made-up images: nothing is
downloaded. In a copy of ``train.py`` one line changes: :func:`create_optimizer` takes the place of
``create_optimizer_v2(model, **optimizer_kwargs(cfg=args))``. What is worth a look:

* An optimizer of osculate is built on the model, not on parameters. timm's groups (no weight decay for biases and
  norms) are taken as they are.
* ``create_scheduler_v2`` writes ``lr`` into the groups, and methods without a learning rate take what it writes as a
  factor on the steps that they choose: 1 is no change, so the schedule starts there.
* Mixup makes soft targets; curvature reads the weights that the loss gives, so ``SoftTargetCrossEntropy`` is a
  categorical likelihood.
* ``ModelEmaV3`` copies the model, and no hook with it; ``CheckpointSaver`` saves the optimizer by its ``state_dict``.
* ``create_graph`` stays off: that is what ``is_second_order`` of timm's own AdaHessian asks for, nothing here does.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import osculate as osc
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from timm_network import CLASSES, images, network
from torch import nn

SETTINGS: dict[str, dict[str, Any]] = {
    "kfac": {"lr": 0.1, "damping": 0.1},
    "lw-adamw": {"lr": 1.0},  # this one and the next choose their steps themselves
    "joint-kfac": {"lr": 1.0},
    "soap": {"lr": 1e-3},
    "adamw": {"lr": 1e-3},
}
"""What stands on the command line of ``train.py``; ``damping`` is new there."""


def arguments(method: str, folder: str) -> Namespace:
    """What ``train.py`` reads from its command line, as far as it is used here."""
    common = {
        "model": "test_efficientnet",
        "opt": method,
        "weight_decay": 1e-3,
        "momentum": 0.9,
        "epochs": 4,
        "damping": None,
        "output": folder,
    }
    return Namespace(**common | SETTINGS[method])


def create_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Build on the model, with timm's groups; optimizers that osculate does not have are timm's."""
    if args.opt not in osc.registry.methods() or args.opt == "adamw":
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    groups = [group for group in param_groups_weight_decay(model, args.weight_decay) if not group["weight_decay"]]
    numbers = {"lr": args.lr, "damping": args.damping, "weight_decay": args.weight_decay}
    known = {name: value for name, value in numbers.items() if value is not None}
    return osc.build(args.opt, model, likelihood="categorical", groups=groups, **known)


def train(args: Namespace, updates: int = 10) -> tuple[float, float, Path]:
    """The loop of ``train.py``. Returns the first loss, the mean of the last epoch, and the last checkpoint."""
    model = network().train()
    optimizer = create_optimizer(args, model)
    average = ModelEmaV3(model, decay=0.9)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, min_lr=0.1 * args.lr, updates_per_epoch=updates
    )
    saver = CheckpointSaver(
        model, optimizer, args, average, checkpoint_dir=args.output, recovery_dir=args.output, decreasing=True
    )
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.0, num_classes=CLASSES)
    criterion = SoftTargetCrossEntropy()
    generator, losses = torch.Generator().manual_seed(0), []
    for epoch in range(epochs):
        for index in range(updates):
            inputs, targets = images(64, generator)
            inputs, targets = mixup(inputs, targets)
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            average.update(model, step=epoch * updates + index)
            scheduler.step_update(num_updates=epoch * updates + index + 1)
            losses.append(float(loss.detach()))
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=sum(losses[-updates:]) / updates)
    return losses[0], sum(losses[-updates:]) / updates, Path(args.output) / "last.pth.tar"


def main(methods: list[str]) -> None:
    """Train a new network by every method, and continue from its checkpoint."""
    for method in methods:
        torch.manual_seed(0)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore", osc.FallbackWarning)  # it names every BatchNormAct2d
            args = arguments(method, folder)
            first, last, file = train(args)
            saved = torch.load(file, weights_only=False)
            model = network()
            model.load_state_dict(saved["state_dict"])
            create_optimizer(args, model).load_state_dict(saved["optimizer"])
        print(
            f"{method:11s} train.py: loss {first:.3f} to {last:.3f}, {len(saved)} entries in the checkpoint", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:] or list(SETTINGS))
