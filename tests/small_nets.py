"""Small networks, data and loops that the tests of the optimizer share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import osculate as osc
import torch
from torch import Tensor, nn

METHODS = tuple(osc.registry.methods())
WITHOUT_CLOSURE = tuple(name for name, entry in osc.registry.methods().items() if not entry.factory().needs_closure)
LOOKING_BACK = tuple(name for name, entry in osc.registry.methods().items() if entry.factory().looks_back)


class Residual(nn.Module):
    """Two layers around a skip connection: one module is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tokens(nn.Module):
    """Embedding and LayerNorm around a Linear with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.mix = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.mix(self.embedding(x)))).mean(1))


class Attentive(nn.Module):
    """Self-attention inside a residual block, dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x.unflatten(1, (3, 2)))).mean(1))


class TiedEnds(nn.Module):
    """Two modules with one weight and one bias, one of them on positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x.unflatten(1, (3, 2)))).sum(1))))


def signals() -> nn.Module:
    """A grouped convolution down, a transposed one up again, in one dimension."""
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 4, 2, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def mlp() -> nn.Module:
    """6-5-4-3 with a ReLU and a tanh."""
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def cnn() -> nn.Module:
    """Convolution, BatchNorm, in-place ReLU, pooling, dropout, dense."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(27, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 3),
    )


def partly_frozen() -> nn.Module:
    """The MLP with a frozen first layer, a frozen bias and a frozen weight."""
    model = mlp()
    for parameter in (*model[0].parameters(), model[2].bias, model[4].weight):  # type: ignore[index]
        parameter.requires_grad_(False)
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "tokens": Tokens,
    "partly-frozen": partly_frozen,
    "called-twice": Residual,
    "attention": Attentive,
    "signals": signals,
    "tied": TiedEnds,
}


def make(net: str = "mlp", dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A network of the table from a seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[net]().to(dtype)


def data(
    net: str = "mlp", samples: int = 16, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Inputs and classes for a network of the table; the global random state stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    if net == "tokens":
        return torch.randint(0, 9, (samples, 4), generator=generator), labels
    shape = (samples, 1, 6, 6) if net == "cnn" else (samples, 6)
    return torch.randn(shape, generator=generator).to(dtype), labels


def cross_entropy(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Mean (or sum) of the cross entropy."""
    return nn.functional.cross_entropy(output, labels, reduction=reduction)


def build(name: str, model: nn.Module, **options: Any) -> osc.SecondOrder:
    """A registered method for a classifier."""
    return osc.build(name, model, **({"likelihood": "categorical"} | options))


def closure_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean"
) -> Callable[[], Tensor]:
    """Torch's closure convention."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y, reduction)
        loss.backward()
        return loss

    return closure


def plain_step(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Torch's plain loop."""
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(optimizer: torch.optim.Optimizer, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """One closure step per batch; the losses before the steps."""
    return [float(optimizer.step(closure_of(optimizer, model, x, y))) for x, y in batches]  # type: ignore[arg-type]


def batches(net: str = "mlp", count: int = 4, samples: int = 16, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Different mini-batches."""
    return [data(net, samples, seed=100 + index, **options) for index in range(count)]


def flat(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state as a flat dictionary from path to tensor or number."""
    if isinstance(value, Mapping):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), entry) for index, entry in enumerate(value)]
    else:
        return {prefix: value.detach().clone() if isinstance(value, Tensor) else value}
    result: dict[str, Any] = {}
    for key, entry in items:
        result |= leaves(entry, f"{prefix}/{key.lstrip('/')}")
    return result


def differences(first: Any, second: Any) -> list[str]:
    """Paths at which two nested states are not bitwise equal."""
    left, right = leaves(first), leaves(second)
    found = sorted(set(left) ^ set(right))
    for path in sorted(set(left) & set(right)):
        one, other = left[path], right[path]
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same = one.dtype == other.dtype and torch.equal(one, other)
        else:
            same = one == other or (one != one and other != other)
        if not same:
            found.append(path)
    return found
