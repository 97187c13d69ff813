"""Networks and one-line measurements for the tests that compare backends. Everything is float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import osculate as osc
import torch
from measuring import half_squares
from osculate.curvature import Categorical, LayerStatistics, Likelihood, Needs, Record
from osculate.curvature import discover_layers as discover
from osculate.curvature.backends.table import make_backend
from torch import Tensor, nn

EVERYTHING = (
    Record.INPUTS
    | Record.GRADIENTS
    | Record.MEANS
    | Record.SAMPLED
    | Record.SAMPLED_PARAMETERS
    | Record.CURVATURE_ROOTS
    | Record.PER_SAMPLE
)


class Twice(nn.Module):
    """One module called twice, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Keywords(nn.Module):
    """An input and a mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, *, scale: Tensor, power: int = 2) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) * scale**power)


class Recurrent(nn.Module):
    """An LSTM, which no adapter reads."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Custom(nn.Module):
    """Parameters outside any known module, used twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.scale * x) + self.scale)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)), (5, 4)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), (5, 1, 4, 4)),
    "batchnorm": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).eval(),
        (5, 1, 4, 4),
    ),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)), (5, 3, 4)),
    "twice": (Twice, (5, 4)),
}
UNREAD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (Recurrent, (4, 3, 3)),
    "custom": (Custom, (4, 4)),
}
FIELDS = (
    "inputs",
    "output_gradient",
    "sampled_gradient",
    "curvature_roots",
    "mean_preactivation",
    "mean_gradient",
)


def record(
    name: str,
    model: nn.Module,
    batches: list[Tensor],
    *,
    likelihood: Likelihood | None = None,
    wanted: Record = EVERYTHING,
    reduction: str = "mean",
    loss: Callable[[Tensor], Tensor] = half_squares,
    kind: str = "gradient",
) -> dict[str, LayerStatistics]:
    """One backend's records of the given micro-batches, at step 7 with seed 3."""
    backend = make_backend(name, model, discover(model), likelihood or Categorical(), reduction, 3)
    backend.step = 7
    backend.arm(dict.fromkeys([layer.name for layer in discover(model)], wanted), kind)
    for x in batches:
        output = model(x)
        if kind == "gradient":
            loss(output).backward()
    found = backend.collect()
    backend.close()
    return found


def vectors_of(entry: LayerStatistics) -> list[Tensor]:
    return [*entry.loss_vectors(), *entry.sampled_vectors(), *entry.root_vectors()]


@dataclass(frozen=True)
class WantsMatrix(osc.Identity):
    """A structure that asks for the dense matrix, keeps what it saw, and takes what it says it takes."""

    needs = Needs.MATRIX
    takes_indefinite: bool = False

    def update(self, state: object, observation: osc.Observation, average: object = None) -> None:
        statistics = observation.statistics
        assert isinstance(statistics, LayerStatistics) and statistics.matrix is not None
        SEEN.append(statistics.matrix())


SEEN: list[Tensor] = []
