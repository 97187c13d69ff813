"""A structure measures a statistic of its own: nothing but the structure is written for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import osculate as osc
import pytest
import torch
from osculate.curvature.declarations import StructureDeclarations
from osculate.preconditioners.structures.identity import Identity
from torch import Tensor, nn


def energy(layer: Any, inputs: Tensor, outputs: Tensor, gradients: Tensor) -> Tensor:
    """Per output unit the sum of squares of gradient times pre-activation."""
    return (gradients * outputs).square().sum((0, 1))


def mass(layer: Any, inputs: Tensor, outputs: Tensor, gradients: Tensor) -> Tensor:
    return inputs.abs().sum(0)


@dataclass(frozen=True)
class Energy(Identity, StructureDeclarations):
    """Keeps what it has measured, and steps along the momentum."""

    measures: ClassVar = {"energy": energy, "mass": mass}
    seen: ClassVar = []

    def update(self, state: Any, observation: Any, average: Any = None) -> None:
        self.seen.append((observation.statistics.samples, dict(observation.statistics.measured)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


@pytest.mark.parametrize("parts", [[slice(None)], [slice(0, 3), slice(3, 8)]])
def test_it_is_added_up_over_samples_and_micro_batches(parts: list[slice]) -> None:
    Energy.seen.clear()
    model, x, y = net(), torch.randn(8, 4).double(), torch.arange(8) % 2
    method = osc.Method(Energy(), osc.InputsOnly(), defaults={"lr": 0.1, "damping": 0.1})
    optimizer = osc.build(method, model)
    values, slopes = [], []
    for part in parts:
        hidden = model[0](x[part])
        hidden.retain_grad()
        (len(x[part]) / 8 * nn.functional.cross_entropy(model[2](model[1](hidden)), y[part])).backward()
        values.append(hidden.detach())
        slopes.append(hidden.grad)
    optimizer.zero_grad()
    for part in parts:
        (len(x[part]) / 8 * nn.functional.cross_entropy(model(x[part]), y[part])).backward()
    optimizer.step()
    samples, found = Energy.seen[0]
    assert samples == 8
    torch.testing.assert_close(
        found["energy"], sum((v * g).square().sum(0) for v, g in zip(values, slopes, strict=True))
    )
    torch.testing.assert_close(found["mass"], x.abs().sum(0))
    optimizer.close()


def test_other_backends_refuse_it_by_name() -> None:
    method = osc.Method(Energy(), osc.InputsOnly(), defaults={"lr": 0.1, "damping": 0.1})
    with pytest.raises(osc.CompatibilityError, match="measures itself"):
        osc.build(method, net(), backend="func")
