"""T7: the convergence bound of K-BFGS(L) in the stochastic setting (PAPERS 1.5), on a tanh network with known noise.

The method is composed of the library's parts as the theorem wants it: the exact inverse of the damped A at the inputs,
L-BFGS(p) with double damping and the two-sided skip test at the outputs, no momentum. The gradient is that of the whole
data set plus Gaussian noise of known variance, so that sigma^2 is exact; H is learned from noise-free evaluations
before the noise of the step that uses it is drawn. L is the largest Hessian norm found around the start, times a safety
factor, and checked along the runs. The constants kappa are used twice: the a-priori ones of T4, and tighter ones from a
pilot run, whose validity along the actual run is an assumption that is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...curvature.estimators import SecantPairs
from ...errors import NumericalError
from ...framework.methods.method import Method
from ...framework.methods.momentum import EMA
from ...framework.optimizer.build import build
from ...framework.optimizer.second_order import SecondOrder
from ...preconditioners.damping.split import Split
from ...preconditioners.factors.factor import Covariance, CovarianceState
from ...preconditioners.factors.lbfgs import LBFGS
from ...preconditioners.pairs.damping import DoubleDamping
from ...preconditioners.pairs.skipping import TwoSidedCurvatureTest
from ...preconditioners.structures.kronecker import Kronecker, KroneckerState
from ..theorem import Curve, Evidence, Inequality, Plot, Setting, Theorem, worst
from .instances import NEWEST, Draws, eigenvalues, network
from .limited_memory import limited_memory_bounds
from .measured import flat_parameters, hessian, of_parameters

__all__ = ["THEOREMS"]

_STEPS, _RUNS, _SAMPLES = 80, 2, 12
_LAMBDA, _MU3, _MEMORY = 0.25, 0.5, 1
_NOISE = 0.05
"""Standard deviation of the noise on every entry of the gradient."""
_RADIUS, _SAFETY = 1.0, 1.5


@dataclass(frozen=True)
class _Problem:
    """A tanh network with inputs in [-1, 1], so that every layer's inputs are bounded by phi = 1, and its data."""

    model: nn.Sequential
    inputs: Tensor
    target: Tensor

    @classmethod
    def draw(cls, setting: Setting) -> _Problem:
        draws = Draws(setting, 700)
        model = network(draws, nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        return cls(model, draws.uniform(-1.0, 1.0, _SAMPLES, 2), draws.uniform(-1.0, 1.0, _SAMPLES, 1))

    def loss(self, output: Tensor) -> Tensor:
        """Mean over the data of half the squared error; bounded below by zero."""
        return 0.5 * (output - self.target).square().sum() / _SAMPLES

    def hessian_norm(self, flat: Tensor) -> Tensor:
        """Spectral norm of the Hessian at given parameters."""
        dense = hessian(of_parameters(self.model, self.loss, self.inputs))(flat)
        return eigenvalues(dense).abs().amax()

    def lipschitz(self, draws: Draws) -> float:
        """Largest Hessian norm at 40 points of the ball around the present parameters, times a safety factor."""
        start = flat_parameters(self.model)
        points = [draws.normal(len(start)) for _ in range(40)]
        norms = [self.hessian_norm(start + _RADIUS * point / point.norm()) for point in points]
        return _SAFETY * float(torch.stack(norms).max())


@dataclass(frozen=True)
class _Constants:
    """kappa_low I <= H <= kappa_high I."""

    low: float
    high: float


@dataclass
class _Run:
    """What one run recorded: per step |grad f|^2 and f, the extreme eigenvalues of H, the largest Hessian norm."""

    squares: list[Tensor]
    losses: list[Tensor]
    low: float
    high: float
    norm: float


def _method() -> Method:
    outputs = LBFGS(_MEMORY, DoubleDamping(), NEWEST, 1.0, TwoSidedCurvatureTest(_MU3, 0.0))
    return Method(
        preconditioner=Kronecker(inputs=Covariance(), outputs=outputs),
        curvature=SecantPairs(),
        damping=Split(),
        momentum=EMA(0.0),
        defaults={"lr": 1.0, "damping": _LAMBDA},
    )


def _a_priori(problem: _Problem) -> _Constants:
    """Theorem 1.5's constants: T4 at the outputs, sqrt(lambda) <= A_LM <= sqrt(lambda) + 1 + I phi^2 at the inputs."""
    root = _LAMBDA**0.5
    low, high = limited_memory_bounds(_MEMORY, 1.0, root, _MU3)
    widest = max(module.in_features for module in problem.model if isinstance(module, nn.Linear))
    return _Constants(low / (root + 1 + widest), high / root)


def _spectrum(optimizer: SecondOrder) -> tuple[float, float]:
    """Extreme eigenvalues of H_g kron H_a over all layers."""
    low, high = float("inf"), 0.0
    for block in optimizer.blocks:
        state, part = block.state, block.part
        assert isinstance(part, Kronecker) and isinstance(state, KroneckerState)
        assert isinstance(state.inputs, CovarianceState)
        outer = eigenvalues(part.outputs.to_dense(state.outputs, 0.0))
        inner = eigenvalues(state.inputs.inverse)
        low, high = min(low, float(outer[0] * inner[0])), max(high, float(outer[-1] * inner[-1]))
    return low, high


def _train(problem: _Problem, steps: Sequence[float], draws: Draws) -> _Run:
    """A run with the given step sizes from the problem's parameters, which are left as they were."""
    model, start = problem.model, flat_parameters(problem.model)
    optimizer = build(_method(), model, lr=steps[0])
    run = _Run([], [], float("inf"), 0.0, 0.0)
    fresh = [True]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model(problem.inputs))
        loss.backward()
        if fresh[0]:  # the step's own evaluation; the look-back is free of noise
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            run.losses.append(loss.detach())
            run.squares.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum())
            for gradient in gradients:
                gradient.add_(_NOISE * draws.normal(*gradient.shape))
            fresh[0] = False
        return loss

    for index, step in enumerate(steps):
        optimizer.param_groups[0]["lr"], fresh[0] = step, True
        try:
            optimizer.step(closure)
        except NumericalError:  # diverged: what was recorded so far speaks for itself
            break
        low, high = _spectrum(optimizer)
        run.low, run.high = min(run.low, low), max(run.high, high)
        if index % 10 == 0:
            run.norm = max(run.norm, float(problem.hessian_norm(flat_parameters(model))))
    optimizer.close()
    torch.nn.utils.vector_to_parameters(start, model.parameters())
    return run


def _right_side(constants: _Constants, lipschitz: float, ceiling: float, sigma2: float, beta: float) -> Tensor:
    """The bound for N = 1 ... steps, with m = 1 and the last bracket of PAPERS 1.5."""
    count = torch.arange(1, _STEPS + 1, dtype=torch.float64)
    decrease = 2 * lipschitz * ceiling * (constants.high / constants.low) ** 2 * count ** (beta - 1)
    return decrease + sigma2 / (1 - beta) * (count**-beta - 1 / count) + sigma2 / count


def _mean_square(runs: Sequence[_Run]) -> Tensor:
    """(N,) running mean over the steps of the mean over runs of |grad f|^2."""
    shortest = min(len(run.squares) for run in runs)
    squares = torch.stack([torch.stack(run.squares[:shortest]) for run in runs]).mean(0).cpu()
    return squares.cumsum(0) / torch.arange(1, shortest + 1)


def _check(setting: Setting, too_long: float = 1.0) -> Evidence:
    """Two exponents, two sets of constants, two runs each.

    Args:
        setting: seed and device.
        too_long: every step is that many times as long as the theorem allows; not 1: a control.
    """
    problem, draws = _Problem.draw(setting), Draws(setting, 701)
    lipschitz, sigma2 = problem.lipschitz(draws), _NOISE**2 * len(flat_parameters(problem.model))
    pilot = _train(problem, [0.05] * 40, draws)
    bound = _a_priori(problem)
    both = {"constants of T4": bound, "constants of a pilot run": _Constants(pilot.low / 1.5, pilot.high * 1.5)}
    with torch.no_grad():
        ceiling = 1.5 * float(problem.loss(problem.model(problem.inputs)))
    inequalities, runs, plots = [], [], []
    for name, constants in both.items():
        curves: list[Curve] = []
        for beta in (0.6, 0.75):
            first = too_long * constants.low / (lipschitz * constants.high**2)
            steps = [first * (k + 1) ** -beta for k in range(_STEPS)]
            found = [_train(problem, steps, draws) for _ in range(_RUNS)]
            left, right = _mean_square(found), _right_side(constants, lipschitz, ceiling, sigma2, beta)
            inequalities.append(worst(f"running mean of |grad f|^2, beta = {beta:g}, {name}", left, right[: len(left)]))
            runs += [(run, constants) for run in found]
            axis = [float(count) for count in range(1, len(left) + 1)]
            curves += [
                Curve(f"measured, {beta:g}", axis, left.tolist()),
                Curve(f"bound, {beta:g}", axis, right.tolist(), "bound"),
            ]
        plots.append(
            Plot(f"Running mean of the squared gradient, {name}", "steps N", "mean", tuple(curves), y_log=True)
        )
    values = {"L": lipschitz, "sigma^2": sigma2, "M_f": ceiling, "f_low": 0.0}
    for name, constants in both.items():
        values |= {f"kappa_low, {name}": constants.low, f"kappa_high, {name}": constants.high}
    return Evidence(tuple(inequalities), _assumptions(runs, lipschitz, ceiling), values, tuple(plots))


def _assumptions(runs: Sequence[tuple[_Run, _Constants]], lipschitz: float, ceiling: float) -> tuple[Inequality, ...]:
    """What the theorem supposes, along the runs."""
    losses = torch.stack([torch.stack(run.losses).max() for run, _ in runs])
    return (
        worst("Hessian norm along the runs <= L", [run.norm for run, _ in runs], lipschitz),
        worst("f along the runs <= M_f", losses, ceiling),
        worst("lambda_min(H) / kappa_low", [run.low / constants.low for run, constants in runs], 1.0, ">="),
        worst("lambda_max(H) / kappa_high", [run.high / constants.high for run, constants in runs], 1.0),
    )


THEOREMS = (
    Theorem(
        "T7",
        "K-BFGS(L) with double damping, the two-sided skip test and the exact inverse at the inputs converges: the "
        "mean squared gradient falls at the rate of the step sizes.",
        r"\frac{1}{N} \sum_{k \leq N} E\Vert\nabla f(\theta_k)\Vert^2 \leq 2 L (M_f - f_{low}) "
        r"\frac{\kappa_{high}^2}{\kappa_{low}^2} N^{\beta - 1} + \frac{\sigma^2}{1 - \beta} (N^{-\beta} - N^{-1}) "
        r"+ \frac{\sigma^2}{N}",
        "arXiv:2006.08877, section 4, after Wang, Ma, Goldfarb, Liu (2017); docs/PAPERS.md 1.5 (re-derived)",
        _check,
        partial(_check, too_long=1e5),
        "steps are 100 000 times as long as the theorem allows",
    ),
)
