"""Which backend serves which layer and which quantity, found out by trying: the table of docs/backends.md.

``python tests/backend_table.py`` prints it.
"""

from __future__ import annotations

from collections.abc import Callable

import osculate as osc
import torch
from backend_nets import Custom, Recurrent, Twice
from func_products import ggn_block
from osculate.curvature import Categorical, LayerStatistics, Record
from osculate.curvature.backends.table import BACKENDS, make_backend
from torch import Tensor, nn

OF_LOSSES = [name for name, backend in BACKENDS.items() if not backend.takes_residuals]  # type: ignore[attr-defined]
"""Backends that measure a loss; residuals have a page of their own."""


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Attention(nn.Module):
    """Self-attention with its batch axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


def chain(*modules: nn.Module, features: int) -> Callable[[], nn.Module]:
    """The modules, flattened, before a linear head; the layer that is looked at comes first."""
    return lambda: nn.Sequential(*modules, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "`Linear`": (chain(nn.Linear(4, 5), features=5), (4, 4)),
    "`Linear` on sequences": (chain(nn.Linear(4, 2), features=6), (4, 3, 4)),
    "`Conv1d`": (chain(nn.Conv1d(2, 2, 3), features=6), (4, 2, 5)),
    "`Conv2d`": (chain(nn.Conv2d(1, 2, 3), features=8), (4, 1, 4, 4)),
    "`Conv3d`": (chain(nn.Conv3d(1, 2, 2), features=16), (4, 1, 3, 3, 3)),
    "`Conv2d`, grouped": (chain(nn.Conv2d(2, 4, 3, groups=2), features=16), (4, 2, 4, 4)),
    "`ConvTranspose2d`": (chain(nn.ConvTranspose2d(1, 2, 2), features=18), (4, 1, 2, 2)),
    "`Embedding`": (chain(nn.Embedding(7, 3), features=9), (4, 3)),
    "`BatchNorm2d` in eval mode": (chain(nn.BatchNorm2d(2).eval(), features=8), (4, 2, 2, 2)),
    "`BatchNorm2d` in training mode": (chain(nn.BatchNorm2d(2), features=8), (4, 2, 2, 2)),
    "`LayerNorm`": (chain(nn.LayerNorm(4), features=4), (4, 4)),
    "`GroupNorm`": (chain(nn.GroupNorm(1, 2), features=8), (4, 2, 2, 2)),
    "below `GELU`": (chain(nn.Linear(4, 5), nn.GELU(), features=5), (4, 4)),
    "below active `Dropout`": (chain(nn.Linear(4, 5), nn.Dropout(0.2), features=5), (4, 4)),
    "`MultiheadAttention`": (Attention, (4, 3, 4)),
    "module called twice": (Twice, (4, 4)),
    "tied weights": (Tied, (4, 4)),
    "`LSTM`": (Recurrent, (4, 3, 3)),
    "any other module": (Custom, (4, 4)),
}

Quantity = Callable[[LayerStatistics], object]
QUANTITIES: dict[str, tuple[Record, Quantity]] = {
    "inputs, rows of gradients": (Record.INPUTS | Record.GRADIENTS, lambda e: (e.input_rows(), e.gradient_rows())),
    "per-sample gradients": (Record.INPUTS | Record.GRADIENTS | Record.PER_SAMPLE, lambda e: e.loss_vectors()),
    "sampled Fisher": (Record.INPUTS | Record.SAMPLED | Record.PER_SAMPLE, lambda e: e.sampled_vectors()),
    "exact Gauss-Newton": (Record.INPUTS | Record.CURVATURE_ROOTS | Record.PER_SAMPLE, lambda e: e.root_vectors()),
    "sampled mean gradient": (Record.SAMPLED_PARAMETERS, lambda e: e.sampled_parameter_gradients),
    "secant pairs": (Record.MEANS, lambda e: (e.mean_preactivation, e.mean_gradient)),
}
TRAINING = ("`BatchNorm2d` in training mode", "below active `Dropout`")


def inputs_of(shape: tuple[int, ...], model: nn.Module) -> Tensor:
    """Random numbers, or indices for an embedding."""
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return torch.arange(shape[0] * shape[1]).reshape(shape) % 7
    return torch.randn(shape, dtype=torch.float64)


def serves(backend: str, layer: str, quantity: str) -> bool:
    """Whether a backend gives a quantity of the first layer of a model; wrong values are an error, not a no."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = make().double()
    model.train(layer in TRAINING)
    x = inputs_of(shape, model)
    wanted, read = QUANTITIES[quantity]
    layers = osc.discover_layers(model)
    if any(record in wanted for record in BACKENDS[backend].cannot):  # type: ignore[attr-defined]
        return False
    device = make_backend(backend, model, layers, Categorical(), "mean", 0)
    device.arm({layers[0].name: wanted})
    try:
        nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        found = device.collect()
        if layers[0].name not in found:
            return False
        values = read(found[layers[0].name])
    except (osc.OsculateError, AttributeError):
        return False
    finally:
        device.close()
    if values is None or any(value is None for value in values):
        return False
    if layer not in TRAINING:
        check(model, layers[0], x, quantity, found[layers[0].name])
    return True


def check(model: nn.Module, layer: osc.Layer, x: Tensor, quantity: str, entry: LayerStatistics) -> None:
    """Compare with autograd on single samples, or with the Gauss-Newton block by torch.func."""
    if quantity == "per-sample gradients":
        own = list(layer.parameters.values())
        for index in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[index : index + 1]), torch.tensor([index % 3]))
            for value, slope in zip(entry.loss_vectors(), torch.autograd.grad(loss, own), strict=True):
                torch.testing.assert_close(value[index], slope, rtol=1e-10, atol=1e-10)
    if quantity == "exact Gauss-Newton":
        matrix = osc.ExactGGN().fill(entry).matrix()  # type: ignore[misc]
        torch.testing.assert_close(matrix, ggn_block(model, layer, (x,), Categorical()), rtol=1e-10, atol=1e-10)


def table() -> str:
    """The whole table in Markdown: in every cell the backends that serve it."""
    lines = ["| layer | " + " | ".join(QUANTITIES) + " |", "| --- |" + " --- |" * len(QUANTITIES)]
    for layer in LAYERS:
        cells = []
        for quantity in QUANTITIES:
            names = [backend for backend in OF_LOSSES if serves(backend, layer, quantity)]
            cells.append("all" if len(names) == len(OF_LOSSES) else ", ".join(names) or "–")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
