"""Parts of one's own, one of each of five kinds, and methods made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import osculate as osc
import torch


# damping: begin
@dataclass(frozen=True)
class RelativeDamping:
    """sqrt(lambda) in units of each Kronecker factor's mean eigenvalue: the damping knows no scale of the loss."""

    uses_eigenvalues = True

    def sides(self, value, positions, eigenvalues=None):
        """(lambda, sqrt(lambda) tr A / d_a, sqrt(lambda) tr G / d_g); where nothing is measured yet, as ``Split``."""
        split = osc.Split().sides(value, positions)
        if eigenvalues is None or not 0.0 < eigenvalues.inputs * eigenvalues.outputs < float("inf"):
            return split
        return osc.SideDamping(value, value**0.5 * eigenvalues.inputs, value**0.5 * eigenvalues.outputs)


# damping: end
# structure: begin
@dataclass
class RowState(osc.State):
    """Curvature per output neuron, undamped, and the inverse of the damped one: (d_out, 1, 1) each."""

    curvature: torch.Tensor
    inverse: torch.Tensor
    weight: float


@dataclass(frozen=True)
class RowCurvature(osc.Stateless):
    """direction_o = M_o / (c_o + lambda), c_o the mean square of the gradients into output neuron o."""

    average: osc.Average = field(default_factory=lambda: osc.MovingAverage(0.95))
    needs, schedule, joint = osc.Needs.VECTORS, osc.Schedule(), True

    def serves(self, layer):
        """Weight and bias of layers that are matrices."""
        return tuple(layer.parameters) if layer.is_matrix else ()

    def init(self, layer, parameters):
        """Nothing measured."""
        zeros = parameters[0].new_zeros(layer.matrix_shape[0], 1, 1)
        return RowState(zeros, torch.ones_like(zeros), 0.0)

    def update(self, state, observation, average=None):
        """c_o <- keep c_o + add mean over samples and columns of g_oi^2."""
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        gradients = observation.statistics.layer.joint_matrix(observation.statistics.vectors())
        state.curvature.mul_(keep).add_(gradients.square().mean((0, 2)).view(-1, 1, 1), alpha=add)

    def matrices(self, state, damping):
        """The curvatures as 1 x 1 matrices: inverted with every other small matrix of the model, in one call."""
        return (osc.Request(state.curvature, damping.whole),)

    def install(self, state, results):
        """Keep the last good inverse if one failed."""
        state.inverse = state.inverse if results[0].value is None else results[0].value

    def precondition(self, state, momentum):
        """One factor per row."""
        return (momentum[0] * state.inverse.view(-1, 1),)

    def to_dense(self, state, layer, damping):
        """The diagonal matrix over (weight row by row, then bias)."""
        rows = state.curvature.flatten() + damping.whole
        weights = rows.repeat_interleave(layer.matrix_shape[1] - layer.has_bias)
        return torch.diag(torch.cat([weights, rows]) if layer.has_bias else weights)


# structure: end
# factor: begin
@dataclass
class DiagonalState(osc.State):
    """The diagonal of a second moment, undamped, and the inverse of the damped one: (d, 1, 1) each."""

    moment: torch.Tensor
    inverse: torch.Tensor
    weight: float


@dataclass(frozen=True)
class DiagonalCovariance:
    """H = diag(E[a_i^2] + lambda)^-1 at the inputs, the same of the gradients at the outputs: K-FAC for long sides."""

    average: osc.Average = field(default_factory=lambda: osc.MovingAverage(0.95))
    sides, operation = frozenset(("inputs", "outputs")), osc.Inverse()

    def needs(self, side):
        """Layer inputs, or per-sample gradients at the outputs."""
        return osc.Needs.INPUTS if side == "inputs" else osc.Needs.ROOTS

    def init(self, size, like):
        """Nothing measured."""
        zeros = like.new_zeros(size, 1, 1)
        return DiagonalState(zeros, torch.ones_like(zeros), 0.0)

    def update(self, state, statistics, side, average):
        """Average the mean squares of this side; the bias is an input that is always 1."""
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        rows, scale = getattr(osc.Expand(), side)(statistics)
        squares = scale * rows.square().sum(0)
        if len(squares) < len(state.moment):
            squares = torch.cat([squares, squares.new_full((1,), scale * len(rows))])
        state.moment.mul_(keep).add_(squares.view(-1, 1, 1), alpha=add)

    def matrices(self, state):
        """What the operation is wanted of: d matrices of order 1."""
        return (state.moment,)

    def install(self, state, results):
        """Keep the last good inverse if one failed."""
        state.inverse = state.inverse if results[0].value is None else results[0].value

    def left(self, state, value):
        """H value."""
        return state.inverse.view(-1, 1) * value

    def right(self, state, value):
        """value H."""
        return value * state.inverse.view(-1)

    def observe_step(self, state, before, after, side, damping):
        """It does not look back."""
        return {}

    def to_dense(self, state, damping):
        """H itself, as left and right apply it."""
        return torch.diag(state.inverse.flatten())

    def mean_eigenvalue(self, state):
        """Of the undamped matrix: a declaration, for dampings that ask."""
        return state.moment.mean()


# factor: end
# step size: begin
@dataclass(frozen=True)
class TrustRatio:
    """alpha_l = lr |theta_l| / |d_l|: every layer moves by the same fraction of its norm (LARS, arXiv:1708.03888)."""

    needs, curvature = osc.Needs.NORMS, None

    def due(self, step):
        """No curvature is ever measured."""
        return False

    def init(self, count, like):
        """No state."""
        return

    def propose(self, state, evidence):
        """(L,) step sizes; a layer of norm zero takes the learning rate itself."""
        norms, directions = evidence.parameter_norms, evidence.squared_norms.sqrt()
        ratio = norms / directions.clamp(min=torch.finfo(directions.dtype).tiny)
        return evidence.lr * torch.where((norms > 0) & (directions > 0), ratio, 1.0)


# step size: end
# guard: begin
@dataclass(frozen=True)
class Tolerant:
    """A step stays while the loss of its mini-batch rises by less than a share of itself."""

    share: float = 0.1
    attempts, shrink, needs = 5, 0.5, osc.Needs.NOTHING

    def init(self):
        """No state."""
        return

    def accepts(self, state, trial):
        """Whether loss after <= loss before + share |loss before|."""
        return math.isfinite(trial.after) and trial.after <= trial.before + self.share * abs(trial.before)

    def record(self, state, trial):
        """Every step is judged for itself."""


# guard: end
def rows_lars(*, momentum: float = 0.9) -> osc.Method:
    """One curvature per output neuron, layers moving by equal fractions.

    Args:
        momentum: decay in [0, 1).
    """
    return osc.Method(
        RowCurvature(),
        osc.BatchMean(),
        momentum=osc.EMA(momentum),
        step_size=TrustRatio(),
        defaults={"lr": 0.01, "damping": 1e-3},
    )


def diagonal_kfac(*, share: float = 0.1) -> osc.Method:
    """K-FAC with diagonal factors, whose steps are shortened where the loss rises.

    Args:
        share: of the loss by which it may rise, >= 0.
    """
    return osc.Method(
        osc.Kronecker(DiagonalCovariance(), DiagonalCovariance()),
        osc.SampledFisher(),
        damping=RelativeDamping(),
        guard=Tolerant(share),
        defaults={"lr": 0.1, "damping": 0.1},
    )


def register():
    """What the entry point of this package calls."""
    osc.registry.register_part("damping", RelativeDamping)
    osc.registry.register_part("structure", RowCurvature)
    osc.registry.register_part("factor", DiagonalCovariance)
    osc.registry.register_part("step size", TrustRatio)
    osc.registry.register_part("guard", Tolerant)
    osc.registry.register("rows-lars", rows_lars, paper="this page")
    osc.registry.register("diagonal-kfac", diagonal_kfac, paper="this page")
