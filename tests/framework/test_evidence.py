"""What a step-size rule is told of every layer: sums along the directions, as plain loops over parameters have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import osculate as osc
import pytest
import torch
from measuring import close
from osculate.stepsize import LayerwiseQuadratic, RelativeBound, StepEvidence
from small_nets import cross_entropy
from torch import Tensor, nn


class Heard(LayerwiseQuadratic):
    """Keeps what it was told."""

    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        HEARD.append(evidence)
        return super().propose(state, evidence)


HEARD: list[StepEvidence] = []

STRUCTURES = {
    "plain": osc.Identity(),
    "joint": osc.Kronecker(osc.Covariance(), osc.Covariance()),
    "diagonal": osc.Diagonal(),
    "mixed": osc.ByLayer({"Linear": osc.Kronecker(osc.Covariance(), osc.Covariance()), "*": osc.Diagonal()}),
}


def network() -> nn.Sequential:
    """Layers of two parameters, one and two again, five short vectors among them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 7), nn.LayerNorm(7), nn.Linear(7, 6, bias=False),
        nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4),
    ).double()  # fmt: skip


class Watch:
    """Compares every step's evidence with sums over its moves."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.compared = 0

    def before_step(self, optimizer: Any) -> None:
        layers = optimizer.layers
        self.norms = [torch.cat([p.detach().flatten() for p in layer.parameters.values()]).norm() for layer in layers]

    def after_step(self, optimizer: Any, trace: Any) -> None:
        evidence, names = HEARD.pop(), [layer.name for layer in optimizer.layers]
        sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
        for layer, row in products(optimizer, trace):
            sums[layer] += row
        slopes, gradients, squares = torch.stack([sums[name] for name in names], 1)
        for told, expected in (
            (evidence.slopes, slopes),
            (evidence.gradient_slopes, gradients),
            (evidence.squared_norms, squares),
            (evidence.parameter_norms, torch.stack(self.norms)),
        ):
            assert told is not None
            close(told, expected, 1e-12)
        self.compared += 1


def products(optimizer: Any, trace: Any) -> Iterator[tuple[str, Tensor]]:
    """Per parameter: its layer, and <vector, d>, <gradient, d> and |d|^2."""
    moves = {
        id(parameter): (move, place) for move in trace.proposal.moves for place, parameter in enumerate(move.parameters)
    }
    for block in optimizer.blocks:
        factor = optimizer.method.momentum.correction(block.updates)
        for parameter, vector in zip(block.parameters, block.parameter_views(block.vector), strict=True):
            if id(parameter) not in moves or not parameter.requires_grad:
                continue
            move, place = moves[id(parameter)]
            direction = move.directions[place]
            others = (factor * vector, parameter.grad, direction)
            yield block.layer.name, torch.stack([(other * direction).sum() for other in others])


def run(optimizer: Any, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        x, y = torch.randn(16, 1, 4, 4, dtype=torch.float64), torch.randint(0, 4, (16,))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("late", [False, True], ids=["together", "one layer joins late"])
@pytest.mark.parametrize("frozen", ["", "3.bias", "8.weight"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_rule_is_told_the_sums_over_each_layer(structure: str, frozen: str, late: bool) -> None:
    method = osc.Method(
        STRUCTURES[structure],
        curvature=osc.EmpiricalFisher(),
        momentum=osc.CorrectedEMA(0.9),
        step_size=RelativeBound(Heard()),
        defaults={"lr": 0.1, "damping": 0.1},
    )
    model = network()
    if late:
        model[7].requires_grad_(False)
    optimizer = osc.build(method, model, likelihood="categorical")
    watch = Watch()
    optimizer.observers.append(watch)
    run(optimizer, model, 2)
    if late:
        model[7].requires_grad_(True)
        optimizer.add_param_group({"params": model[7].parameters()})
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    run(optimizer, model, 2)
    assert watch.compared == 4 and not HEARD
