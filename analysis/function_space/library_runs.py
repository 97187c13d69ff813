"""The same problems run by the library's own optimizer, so that what is verified is what ships."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...curvature.estimators import ExactGGN
from ...curvature.likelihoods import Gaussian
from ...errors import ArgumentError
from ...framework.methods.method import Method
from ...framework.methods.momentum import NoMomentum
from ...framework.optimizer.build import build
from ...framework.optimizer.second_order import SecondOrder
from ...preconditioners.averages import MovingAverage
from ...preconditioners.damping.split import ConstantDamping, Split
from ...preconditioners.factors.factor import Covariance
from ...preconditioners.protocol import Schedule
from ...preconditioners.structures.dense import Dense
from ...preconditioners.structures.kronecker import Kronecker
from ...preconditioners.structures.mini_block import MiniBlock
from ...preconditioners.structures.partitions import Kernel, PerOutput
from .function_models import LinearModel, TwoLayerTanh, UnitModel

__all__ = [
    "LIBRARY_STRUCTURES",
    "AsModule",
    "UnitResiduals",
    "disagreement",
    "full_batch_method",
    "library_residuals",
    "train",
]

LIBRARY_STRUCTURES = ("per-output", "kernel", "whole", "kfac")
"""Structures of :mod:`.function_structures` that the library has without averaging over blocks."""

_FRESH = MovingAverage(0.0)


class UnitResiduals(Gaussian):
    """Labels one off the output: every sampled gradient is minus the output's own, and nothing is random.

    For one output per sample the mean of (s(i))^2, s(i) the score along a direction, is then exactly its Gauss-Newton
    form: the library's rules that sample labels become exact.
    """

    name = "unit residuals"

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """output + 1."""
        return output + 1.0


class AsModule(nn.Module):
    """A function-space model as a network with one output.

    Args:
        model: a linear model (one ``Linear`` per block) or a two-layer net (one ``Linear``, or a ``Conv1d`` whose
            stride is its kernel, over the patches one behind another).

    Raises:
        ArgumentError: for another kind of model.
    """

    def __init__(self, model: UnitModel) -> None:
        super().__init__()
        like = model.targets
        if isinstance(model, LinearModel):
            blocks, size = model.features.shape[1:]
            layers: Sequence[nn.Module] = [nn.Linear(size, 1, bias=False) for _ in range(blocks)]
            inputs = model.features
        elif isinstance(model, TwoLayerTanh):
            units, channels, kernel = model.initial.shape
            if model.positions == 1:
                layers = [nn.Linear(channels * kernel, units, bias=False)]
                inputs = model.patches.flatten(1)
            else:
                layers = [nn.Conv1d(channels, units, kernel, stride=kernel, bias=False)]
                inputs = model.patches.transpose(1, 2).flatten(2)
        else:
            raise ArgumentError(f"no network is known for {type(model).__name__}; take LinearModel or TwoLayerTanh")
        self.layers = nn.ModuleList(layers).to(like)
        self.model, self.inputs = model, inputs
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                weight = layer.get_parameter("weight")
                start = model.initial[index] if len(self.layers) > 1 else model.initial
                weight.copy_(start.reshape(weight.shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, 1) outputs."""
        if isinstance(self.model, TwoLayerTanh):
            hidden = self.layers[0](inputs).tanh()
            if self.model.positions > 1:
                hidden = hidden.sum(2)
            outputs: Tensor = (hidden @ self.model.signs * self.model.scale).unsqueeze(1)
            return outputs
        return torch.stack([layer(inputs[:, index]) for index, layer in enumerate(self.layers)]).sum(0)


def full_batch_method(structure: str, model: UnitModel) -> Method:
    """The library's method without momentum and averages, with the exact Gauss-Newton matrix.

    Args:
        structure: one of ``LIBRARY_STRUCTURES``.
        model: the problem; per-output blocks of a convolution are not among the library's.

    Raises:
        ArgumentError: if the library has no such structure for this model.
    """
    every = Schedule(statistics=1, inverses=1)
    convolution = model.positions > 1
    if structure == "per-output" and not convolution:
        preconditioner: object = MiniBlock(PerOutput(limit=2**40), _FRESH, every)
    elif structure == "kernel" and convolution:
        preconditioner = MiniBlock(Kernel(), _FRESH, every)
    elif structure == "whole":
        preconditioner = Dense(average=_FRESH, schedule=every)
    elif structure == "kfac":
        preconditioner = Kronecker(Covariance(_FRESH), Covariance(_FRESH), schedule=every)
    else:
        raise ArgumentError(
            f"the library has no {structure!r} blocks without averaging for this model; compare one of "
            f"{', '.join(LIBRARY_STRUCTURES)}, 'kernel' with a convolution and 'per-output' with a dense layer"
        )
    return Method(
        preconditioner=preconditioner,  # type: ignore[arg-type]
        curvature=ExactGGN(),
        damping=Split() if structure == "kfac" else ConstantDamping(),
        momentum=NoMomentum(),
        defaults={"lr": 0.1, "damping": 0.1},
    )


def train(module: nn.Module, inputs: Tensor, targets: Tensor, optimizer: SecondOrder, steps: int) -> list[Tensor]:
    """Full-batch steps on the mean of half the squared residual; the residuals e_0, ..., e_steps, (n,) each."""
    residuals: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        difference = module(inputs).squeeze(1) - targets
        residuals.append(difference.detach())
        loss: Tensor = 0.5 * difference.square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    with torch.no_grad():
        residuals.append(module(inputs).squeeze(1) - targets)
    optimizer.close()
    return residuals


def library_residuals(model: UnitModel, structure: str, damping: float, eta: float, steps: int) -> list[Tensor]:
    """e_0, ..., e_steps of the library's own optimizer on a function-space problem.

    Args:
        model: the problem.
        structure: one of ``LIBRARY_STRUCTURES``.
        damping: lambda > 0.
        eta: step size > 0.
        steps: >= 1.
    """
    module = AsModule(model)
    method = full_batch_method(structure, model)
    optimizer = build(method, module, lr=eta, damping=damping, likelihood="gaussian")
    return train(module, module.inputs, model.targets, optimizer, steps)


def disagreement(library: Sequence[Tensor], engine: Sequence[Tensor]) -> float:
    """Largest difference of two sequences of residuals, relative to the first residual."""
    pairs = zip(library, engine, strict=False)
    return max(float((left - right).norm()) for left, right in pairs) / float(engine[0].norm())
