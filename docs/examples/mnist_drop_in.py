"""Drop-in: a plain PyTorch script for MNIST in which only the line that constructs the optimizer differs.

    python docs/examples/mnist_drop_in.py --optimizer adam --data-dir DIRECTORY
    python docs/examples/mnist_drop_in.py --optimizer mbf --data-dir DIRECTORY

A convolutional network with BatchNorm and dropout, a StepLR schedule, and an evaluation between epochs. Nothing in the
loop knows which optimizer it drives. Without ``--data-dir`` the four files are downloaded and checked.
"""

import argparse
import time
from pathlib import Path

import osculate as osc
import torch
from osculate.experiments.data.datasets import MNIST, load_images
from torch import Tensor, nn


def network() -> nn.Sequential:
    """Two convolutions with BatchNorm, dropout, two dense layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.25),
        nn.Linear(32 * 7 * 7, 128), nn.ReLU(inplace=True), nn.Dropout(0.25),
        nn.Linear(128, 10),
    )  # fmt: skip


def construct(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Construct the optimizer: all that differs."""
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-3)
    # The only statement that differs. Measured in the paper's form; osc.build("mbf", model) needs no numbers.
    return osc.build("mbf", model, lr=1e-3, damping=0.03, units="absolute", limit=float("inf"))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch: int) -> None:
    """One epoch of the plain loop."""
    model.train()
    for rows in torch.randperm(len(images)).split(batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of correct classes, in evaluation mode."""
    model.eval()
    correct = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return float(torch.stack(correct).sum()) / len(labels)


def main(arguments: list[str] | None = None) -> float:
    """Train, print the test accuracy after every epoch, and return the last one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("adam", "mbf"), default="mbf")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    data = load_images(MNIST, options.data_dir)
    x, x_test = (
        (torch.tensor(images).unsqueeze(1) / 255.0 - 0.1307) / 0.3081
        for images in (data.train_images, data.test_images)
    )
    y, y_test = (torch.tensor(labels).long() for labels in (data.train_labels, data.test_labels))

    torch.manual_seed(options.seed)
    model = network()
    optimizer = construct(options.optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.3)
    result = 0.0
    for epoch in range(options.epochs):
        start = time.perf_counter()
        train(model, optimizer, x, y, options.batch_size)
        scheduler.step()
        seconds = time.perf_counter() - start
        result = accuracy(model, x_test, y_test)
        print(f"epoch {epoch + 1}: test accuracy {100 * result:.2f} %, {seconds:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    main()
