"""Solve Poisson's equation with DeepXDE, whose PyTorch backend takes an optimizer of osculate.

    pip install -e . deepxde
    python docs/examples/deepxde_equation.py               # all of them
    python docs/examples/deepxde_equation.py lm

DeepXDE hands ``step`` a closure that makes the gradient of the weighted sum of mean squares. That is all that a method
needs which works on any loss (``ssbroyden``). A least-squares method (``lm``, ``spring``) needs the residuals
themselves, row by row; :class:`OnResiduals` asks DeepXDE's data for them, by a loss that keeps what it is given. What
is worth a look:

* ``model.compile`` takes any ``torch.optim.Optimizer``; geometry, conditions, callbacks and the loss history stay
  DeepXDE's.
* Double precision: in single precision these methods end where its rounding does.
* Points of conditions and of the equation lie in one batch, which DeepXDE cuts apart: residuals are differentiated row
  by row, which a ``FallbackWarning`` says. The result is the same, and for hundreds of points the time hardly matters.
* DeepXDE weighs means of squares and osculate their halves: hence the factor two.
"""

from __future__ import annotations

import os
import sys
import warnings

os.environ["DDE_BACKEND"] = "pytorch"  # before DeepXDE is imported

import deepxde as dde
import numpy as np
import osculate as osc
import torch
from torch import Tensor

METHODS = ("lm", "spring", "ssbroyden")


class OnResiduals(torch.optim.Optimizer):
    """What DeepXDE takes for its optimizer: steps of a method over the residuals of the problem.

    Args:
        model: whose data and network they are.
        method: name of a registered method over the whole model.
    """

    def __init__(self, model: dde.Model, method: str) -> None:
        super().__init__(model.net.parameters(), {})
        self.model, self.inner = model, osc.build(method, model.net)

    def step(self, closure: object = None) -> object:
        """One step; DeepXDE's closure has squared and summed already, so it is not called."""
        return self.inner.step(self.residuals)

    def residuals(self) -> dict[str, osc.Residual]:
        """The equation's residuals and each condition's, at the points of this step."""
        kept: list[Tensor] = []

        def keep(target: Tensor, error: Tensor) -> Tensor:
            kept.append(error - target)
            return error.sum()

        state, net = self.model.train_state, self.model.net
        points = torch.as_tensor(state.X_train).requires_grad_()
        targets = None if state.y_train is None else torch.as_tensor(state.y_train)
        dde.grad.clear()  # DeepXDE remembers derivatives
        self.model.data.losses_train(targets, net(points), keep, points, self.model)
        dde.grad.clear()
        weights = self.model.loss_weights or [1.0] * len(kept)
        pairs = zip(kept, weights, strict=True)
        return {f"residual {number}": osc.Residual(r, weight=2.0 * w) for number, (r, w) in enumerate(pairs)}


def problem() -> dde.Model:
    """-u'' = pi^2 sin(pi x) on [-1, 1], zero at the ends; the solution is sin(pi x)."""
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(0)

    def equation(x: Tensor, u: Tensor) -> Tensor:
        return dde.grad.hessian(u, x) + np.pi**2 * torch.sin(np.pi * x)

    line = dde.geometry.Interval(-1, 1)
    ends = dde.icbc.DirichletBC(line, lambda x: 0 * x, lambda x, on_boundary: on_boundary)
    data = dde.data.PDE(
        line, equation, ends, num_domain=32, num_boundary=2, solution=lambda x: np.sin(np.pi * x), num_test=100
    )
    net = dde.nn.FNN([1, 24, 24, 1], "tanh", "Glorot uniform")
    return dde.Model(data, net)


def train(method: str, steps: int = 60) -> tuple[float, float]:
    """Train by a method. Returns the first loss of DeepXDE's history and the last error relative to the solution."""
    model = problem()
    optimizer = osc.build(method, model.net) if method == "ssbroyden" else OnResiduals(model, method)
    model.compile(optimizer, metrics=["l2 relative error"], verbose=0)
    history, _ = model.train(iterations=steps, display_every=steps, verbose=0)
    return float(sum(history.loss_train[0])), float(history.metrics_test[-1][0])


def main(methods: list[str]) -> None:
    """Train by every method."""
    for method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", osc.FallbackWarning)
            first, error = train(method, 300 if method == "ssbroyden" else 60)
        print(f"{method:11s} poisson: loss {first:.3f} at first, relative error {error:.1e} at last", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(METHODS))
