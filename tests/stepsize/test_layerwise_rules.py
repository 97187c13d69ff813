"""Layer-wise and joint step sizes: the formulas, agreement with the transcriptions, and T14, T16, T18."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate import ArgumentError
from osculate.curvature import ExactHessian, HessianRowSums, Needs, SampledBatchScores, SampledScores
from osculate.stepsize import JointLayerwise, LayerwiseQuadratic, StepEvidence
from osculate.stepsize.averaged_forms import AveragedForms
from osculate.stepsize.joint import solve_semidefinite
from osculate.stepsize.layerwise import LeadingSlope, MomentumSlope, RowSums, Separate
from reference import joint as joint_reference
from reference import layerwise as reference
from torch import Tensor

seeds = st.integers(0, 2**31)
counts = st.integers(1, 6)


def plain(damping: float = 0.0, decay: float = 0.0, **options: object) -> LayerwiseQuadratic:
    """The formula of PAPERS 3.2 and nothing else."""
    parts = {"coupling": Separate(), "slope": MomentumSlope(), "factor": 1.0} | options
    return LayerwiseQuadratic(decay=decay, damping=damping, **parts)


def evidence_of(
    slopes: Tensor, squared: Tensor, forms: Tensor | None, lr: float = 1.0, gradient_slopes: Tensor | None = None
) -> StepEvidence:
    names = [str(k) for k in range(len(slopes))]
    return StepEvidence(
        names, lr, slopes, slopes if gradient_slopes is None else gradient_slopes, squared, squared.sqrt(), forms
    )


def random_case(seed: int, count: int) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]], Tensor]:
    """Momentum gradients, directions (descent) and PSD forms along them."""
    generator = np.random.default_rng(seed)
    gradients = [{"W": generator.standard_normal((2, 3))} for _ in range(count)]
    directions = [{"W": -(0.2 + generator.random((2, 3))) * g["W"] * 3 ** generator.normal()} for g in gradients]
    factor = torch.from_numpy(generator.standard_normal((count, count + 2)))
    norms = torch.from_numpy(np.sqrt(reference.layer_inner(directions, directions)))
    return gradients, directions, (factor @ factor.T) * torch.outer(norms, norms)


def numbers(gradients: list, directions: list) -> tuple[Tensor, Tensor]:
    """r_l = <momentum, d> with the step -alpha d, and |d|^2; the transcriptions step along +alpha d."""
    slopes = -reference.layer_inner(gradients, directions)
    return torch.from_numpy(slopes), torch.from_numpy(reference.layer_inner(directions, directions))


@given(seeds, counts, st.sampled_from([0.0, 0.01, 10.0]), st.floats(0.1, 3.0))
def test_the_plain_rule_is_the_transcription(seed: int, count: int, damping: float, lr: float) -> None:
    gradients, directions, forms = random_case(seed, count)
    slopes, squared = numbers(gradients, directions)
    rule = plain(damping)
    state = rule.init(count, squared)
    expected = reference.step_sizes(gradients, directions, forms.diagonal().numpy(), damping)
    close(rule.propose(state, evidence_of(slopes, squared, forms, lr)), lr * torch.from_numpy(expected), 1e-9)


@given(seeds, counts, st.floats(0.0, 0.95), st.lists(st.booleans(), min_size=1, max_size=6))
def test_averages_are_bias_corrected_and_survive_steps_without_forms(
    seed: int, count: int, decay: float, measured: list[bool]
) -> None:
    rule, other = plain(0.5, decay), JointLayerwise(decay=decay, ridge=0.3, relative_ridge=0.2)
    average, matrices = reference.CurvatureAverage(decay), joint_reference.MatrixAverage(decay)
    like = torch.zeros(1, dtype=torch.float64)
    states, rayleigh, matrix = (rule.init(count, like), other.init(count, like)), np.zeros(count), None
    for step, due in enumerate([True, *measured]):
        gradients, directions, forms = random_case(seed + step, count)
        slopes, squared = numbers(gradients, directions)
        norms = squared.sqrt().numpy()
        if due:
            rayleigh = average.update(forms.diagonal().numpy(), squared.numpy())
            matrix = matrices.update(forms.numpy() / np.outer(norms, norms))
        evidence = evidence_of(slopes, squared, forms if due else None)
        expected = reference.averaged_step_sizes(gradients, directions, rayleigh, 0.5, np.inf)
        close(rule.propose(states[0], evidence), torch.from_numpy(expected), 1e-8)
        expected = joint_reference.joint_step_sizes(gradients, directions, matrix, 0.3, 0.2)
        close(other.propose(states[1], evidence), torch.from_numpy(expected), 1e-7)


@given(seeds, counts)
def test_row_sums_bound_the_curvature_of_a_common_step(seed: int, count: int) -> None:
    """diag(RowSums |d|^2) - M is positive semi-definite, so the model decreases with factors in (0, 2)."""
    generator = generator_of(seed)
    M = random_spd(count, generator) if seed % 2 else torch.randn(count, count, generator=generator).double()
    M = (M + M.T) / 2
    norms = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    rows = RowSums().curvature(M, norms)
    difference = torch.diag(rows * norms**2) - M * torch.outer(norms, norms)
    assert torch.linalg.eigvalsh(difference)[0] > -1e-9
    assert (rows >= Separate().curvature(M, norms) - 1e-12).all()
    close(RowSums().curvature(torch.diag(M.diagonal().abs()), norms), M.diagonal().abs())


def test_row_sums_weigh_layers_by_their_own_steps() -> None:
    """A layer that moves ten times as far counts ten times."""
    M, norms = torch.tensor([[2.0, -0.5], [-0.5, 3.0]]).double(), torch.tensor([1.0, 10.0]).double()
    close(RowSums().curvature(M, norms), torch.tensor([7.0, 3.05], dtype=torch.float64))


def test_leading_slope_is_the_larger_of_two_averages() -> None:
    rule, state = LeadingSlope(0.5), AveragedForms.zeros(2, torch.zeros(1, dtype=torch.float64))
    momentum = torch.tensor([1.0, -5.0], dtype=torch.float64)
    first, second = torch.tensor([3.0, -1.0]).double(), torch.tensor([0.0, -4.0]).double()
    close(rule.value(state, momentum, first), torch.tensor([3.0, -1.0]).double())
    close(rule.value(state, momentum, second), torch.tensor([1.0, -3.0]).double())
    close(MomentumSlope().value(state, momentum, first), momentum)


@given(seeds, counts, st.integers(4, 9))
def test_joint_steps_minimise_the_error_of_a_linear_model(seed: int, count: int, n: int) -> None:
    """T18: with full-batch curvature and no ridge |e - sum alpha_l J_l d_l|^2 is minimal, hence never increases."""
    generator = generator_of(seed)
    J = torch.randn(count, n, 3, generator=generator, dtype=torch.float64)
    e = torch.randn(n, generator=generator, dtype=torch.float64)
    d = torch.einsum("lni,n->li", J, e) / n  # gradients of |e|^2 / (2n) per layer
    moved = torch.einsum("lni,li->ln", J, d)
    forms, slopes, squared = moved @ moved.T / n, d.square().sum(1), d.square().sum(1)
    rule = JointLayerwise(decay=0.0, ridge=0.0, relative_ridge=0.0)
    alpha = rule.propose(rule.init(count, d), evidence_of(slopes, squared, forms))
    unclipped = solve_semidefinite(forms, slopes)
    if (unclipped > 0).all() and torch.linalg.cond(forms) < 1e8:
        close(alpha, unclipped, 1e-5)
        close((e - moved.T @ alpha) @ moved.T, torch.zeros(count, dtype=torch.float64), 1e-5)
        assert (e - moved.T @ alpha).norm() <= e.norm() * (1 + 1e-9)
    for rule, eta in ((plain(), 1.0), (plain(), 1.99)):  # T14: eta in (0, 2/L) never increases the error
        step = rule.propose(rule.init(count, d), evidence_of(slopes, squared, forms, lr=eta / count))
        assert (e - moved.T @ step).norm() <= e.norm() * (1 + 1e-9)
    rows = plain(coupling=RowSums(), factor=1.9)
    step = rows.propose(rows.init(count, d), evidence_of(slopes, squared, forms))
    assert (e - moved.T @ step).norm() <= e.norm() * (1 + 1e-9)


def test_separate_steps_without_a_factor_can_increase_the_error() -> None:
    """T14's other half: two layers that do the same thing overshoot together; joint steps do not."""
    e = torch.ones(1, dtype=torch.float64)
    moved = torch.ones(3, 1, dtype=torch.float64)
    evidence = evidence_of(torch.ones(3).double(), torch.ones(3).double(), moved @ moved.T)
    rule = plain()
    step = rule.propose(rule.init(3, e), evidence)
    assert (e - moved.T @ step).norm() > 1.5 * e.norm()
    joint = JointLayerwise(decay=0.0)
    step = joint.propose(joint.init(3, e), evidence)
    assert (e - moved.T @ step).norm() < e.norm()


@given(seeds)
def test_one_layer_gets_the_exact_line_search(seed: int) -> None:
    """T16, for both rules."""
    generator = generator_of(seed)
    H = random_spd(4, generator)
    g = torch.randn(4, generator=generator, dtype=torch.float64)
    d = random_spd(4, generator) @ g
    evidence = evidence_of((g @ d).reshape(1), (d @ d).reshape(1), (d @ H @ d).reshape(1, 1))
    for rule in (plain(), JointLayerwise(decay=0.0, relative_ridge=0.0)):
        alpha = float(rule.propose(rule.init(1, g), evidence))
        assert abs(float(d @ (g - alpha * (H @ d)))) < 1e-7 * float(g.norm() * d.norm())


@pytest.mark.parametrize("rule", [plain(), LayerwiseQuadratic(), JointLayerwise()])
@pytest.mark.parametrize("case", ["zero direction", "no curvature", "negative curvature", "negative slope", "nothing"])
def test_degenerate_layers_get_finite_steps_that_are_not_negative(rule: LayerwiseQuadratic, case: str) -> None:
    slopes, squared = torch.ones(3).double(), torch.ones(3).double()
    forms = torch.eye(3).double() + 0.1
    if case == "zero direction":
        slopes[1] = squared[1] = 0.0
        forms[1] = forms[:, 1] = 0.0
    if case == "no curvature":
        forms[1] = forms[:, 1] = 0.0
    if case == "negative curvature":
        forms[1, 1] = -1.0
    if case == "negative slope":
        slopes[1] = -1.0
    if case == "nothing":
        forms, slopes, squared = forms * 0, slopes * 0, squared * 0
    alpha = rule.propose(rule.init(3, slopes), evidence_of(slopes, squared, forms))
    assert alpha.isfinite().all() and (alpha >= 0).all()
    if case != "nothing":
        assert alpha[0] > 0 and alpha[2] > 0
    if case != "negative curvature":
        assert alpha[1] == 0


@pytest.mark.parametrize("rule", [plain(0.1, 0.9), LayerwiseQuadratic(damping=0.1), JointLayerwise(ridge=0.1)])
def test_forms_that_are_not_finite_are_as_if_never_measured(rule: LayerwiseQuadratic) -> None:
    """Neither the average nor the weight it has gathered may see them."""
    good = evidence_of(torch.ones(2).double(), torch.ones(2).double(), 2 * torch.eye(2).double() + 0.5)
    bad = evidence_of(torch.ones(2).double(), torch.ones(2).double(), torch.full((2, 2), float("nan")).double())
    states = [rule.init(2, torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    assert rule.propose(states[0], bad).isfinite().all()
    results = [[rule.propose(state, good) for _ in range(2)][-1] for state in states]
    close(states[0].forms, states[1].forms)
    if isinstance(rule, JointLayerwise):
        close(*results)


@given(seeds, st.integers(2, 6))
def test_semidefinite_systems(seed: int, count: int) -> None:
    generator = generator_of(seed)
    right = torch.randn(count, generator=generator, dtype=torch.float64)
    matrix = random_spd(count, generator) * 10.0 ** float(6 * torch.rand((), generator=generator) - 3)
    close(matrix @ solve_semidefinite(matrix, right), right, 1e-6)
    idle = matrix.clone()
    idle[0], idle[:, 0] = 0.0, 0.0
    solution = solve_semidefinite(idle, right)
    assert solution[0] == 0
    close(idle[1:, 1:] @ solution[1:], right[1:], 1e-6)
    assert solve_semidefinite(matrix.float(), right.float()).dtype == torch.float32


def test_an_indefinite_system_is_replaced_by_one_above_it() -> None:
    matrix, right = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double(), torch.ones(2).double()
    close(solve_semidefinite(matrix, right), right / 3, 1e-6)
    for order in itertools.permutations(range(3)):
        three = torch.tensor([[1.0, 0.9, 0.9], [0.9, 4.0, -1.8], [0.9, -1.8, 1.0]]).double()
        permuted = three[list(order)][:, list(order)]
        close(
            solve_semidefinite(permuted, torch.ones(3).double()),
            solve_semidefinite(three, torch.ones(3).double())[list(order)],
            1e-6,
        )


def test_states_round_trip() -> None:
    for rule in (LayerwiseQuadratic(), JointLayerwise()):
        state, fresh = (rule.init(2, torch.zeros(1, dtype=torch.float64)) for _ in range(2))
        evidence = evidence_of(torch.ones(2).double(), torch.ones(2).double(), torch.eye(2).double() + 0.2)
        rule.propose(state, evidence)
        fresh.load_dict({name: value.clone() for name, value in state.to_dict().items()})
        for _ in range(2):
            assert torch.equal(rule.propose(state, evidence), rule.propose(fresh, evidence))


def test_schedules_and_needs() -> None:
    for rule in (LayerwiseQuadratic(every=3), JointLayerwise(every=3)):
        assert [rule.due(step) for step in range(5)] == [True, False, False, True, False]
        assert Needs.SCORES in rule.needs
    assert Needs.BATCH_SCORES in LayerwiseQuadratic(SampledBatchScores()).needs
    assert Needs.PRODUCTS in JointLayerwise(ExactHessian()).needs
    assert JointLayerwise(HessianRowSums()).curvature == HessianRowSums()
    assert isinstance(LayerwiseQuadratic().curvature, SampledScores)


@pytest.mark.parametrize("rule", [LayerwiseQuadratic, JointLayerwise])
@pytest.mark.parametrize(
    ("name", "value"), [("every", 0), ("every", 1.5), ("decay", 1.0), ("decay", -0.1), ("decay", None)]
)
def test_bad_arguments_are_named(rule: type, name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=name):
        rule(**{name: value})


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LayerwiseQuadratic(damping=-1.0), "damping"),
        (lambda: LayerwiseQuadratic(damping=float("nan")), "damping"),
        (lambda: LayerwiseQuadratic(factor=0.0), "factor"),
        (lambda: LayerwiseQuadratic(factor=float("nan")), "factor"),
        (lambda: LayerwiseQuadratic(factor="2"), "factor"),
        (lambda: LeadingSlope(decay=1.0), "decay"),
        (lambda: JointLayerwise(ridge=-1.0), "ridge"),
        (lambda: JointLayerwise(relative_ridge=float("inf")), "relative_ridge"),
    ],
)
def test_bad_numbers_are_named(make: object, word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        make()
