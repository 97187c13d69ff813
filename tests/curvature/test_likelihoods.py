"""Likelihoods against autograd's Hessian, against their own samples, and by enumeration of all labels (T15)."""

import itertools
from collections.abc import Iterator
from typing import Any

import osculate as osc
import pytest
import torch
from measuring import FixedTargets, close, flat, generator_of, measure
from osculate import ArgumentError
from osculate.curvature import Bernoulli, Categorical, Gaussian, Likelihood, Record
from osculate.curvature.likelihoods import resolve_likelihood
from torch import Tensor, nn

OUTPUT = torch.tensor([[0.3, -1.2, 0.8], [2.0, 0.1, -0.4]], dtype=torch.float64)
CASES: dict[str, tuple[Likelihood, Tensor]] = {
    "categorical": (Categorical(), torch.tensor([2, 0])),
    "bernoulli": (Bernoulli(), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)),
    "gaussian": (Gaussian(), torch.tensor([[0.5, 0.0, -2.0], [1.0, 3.0, 0.2]], dtype=torch.float64)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("trailing", [(3,), (3, 1), (1, 3, 1)])
def test_curvature_roots_are_roots_of_the_hessian(name: str, trailing: tuple[int, ...]) -> None:
    likelihood, target = CASES[name]
    if name == "categorical" and trailing != (3,):
        return
    output = OUTPUT.reshape(2, *trailing)
    target = target if name == "categorical" else target.reshape(2, *trailing)
    hessian = torch.autograd.functional.hessian(
        lambda value: likelihood.negative_log_likelihood(value.reshape(output.shape), target), output.flatten()
    )
    roots = likelihood.curvature_root(output)
    assert roots.shape[1:] == output.shape
    for n in range(2):
        rows = roots[:, n].flatten(1)
        close(rows.T @ rows, hessian[3 * n : 3 * n + 3, 3 * n : 3 * n + 3])
    assert not hessian[:3, 3:].any()


def log_probability(name: str, output: Tensor, target: Tensor) -> Tensor:
    """log p(target | output) per sample, from torch's distributions."""
    if name == "categorical":
        return torch.distributions.Categorical(logits=output).log_prob(target)
    if name == "bernoulli":
        return torch.distributions.Bernoulli(logits=output).log_prob(target).sum(1)
    return torch.distributions.Normal(output, 1.0).log_prob(target).sum(1)


@pytest.mark.parametrize("name", CASES)
def test_negative_log_likelihood_is_one_up_to_a_constant(name: str) -> None:
    likelihood, target = CASES[name]
    shift = torch.tensor([[0.4, -0.3, 0.9], [-1.0, 0.2, 0.0]], dtype=torch.float64)
    found = [likelihood.negative_log_likelihood(value, target) for value in (OUTPUT, OUTPUT + shift)]
    expected = [-log_probability(name, value, target).sum() for value in (OUTPUT, OUTPUT + shift)]
    close(found[1] - found[0], expected[1] - expected[0])
    leaf = OUTPUT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.negative_log_likelihood(leaf, target), leaf)
    (reference,) = torch.autograd.grad(-log_probability(name, leaf, target).sum(), leaf)
    close(gradient, reference)


def test_label_frequencies_follow_the_model() -> None:
    count = 40_000
    output = OUTPUT[:1].expand(count, 3)
    labels = Categorical().sample(output, generator_of(1))
    assert labels.shape == (count,) and labels.dtype == torch.int64
    expected = OUTPUT[0].softmax(0) * count
    observed = torch.bincount(labels, minlength=3)
    assert ((observed - expected).square() / expected).sum() < 14  # chi-squared with 2 degrees: p < 1e-3
    bits = Bernoulli().sample(output, generator_of(2))
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    p = OUTPUT[0].sigmoid()
    assert ((bits.sum(0) - count * p).square() / (count * p * (1 - p))).sum() < 17  # 3 degrees
    assert torch.corrcoef(bits.T).fill_diagonal_(0).abs().max() < 0.02
    noise = Gaussian().sample(output, generator_of(3)) - output
    assert (noise.mean(0) * count**0.5).abs().max() < 4 and (noise.var(0) - 1).abs().max() < 0.03


def test_categorical_sampling_at_the_edges() -> None:
    """Certain labels, impossible labels and a single class."""
    certain = torch.tensor([[-1e4, 0.0, -1e4]]).expand(1000, 3)
    assert (Categorical().sample(certain, generator_of(0)) == 1).all()
    impossible = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]]).expand(1000, 4)
    assert set(Categorical().sample(impossible, generator_of(0)).tolist()) == {1, 2}
    many = Categorical().sample(torch.zeros(20_000, 7), generator_of(0))
    assert set(many.tolist()) == set(range(7))


@pytest.mark.parametrize(("uniform", "label"), [(0.0, 1), (0.499, 1), (0.5, 2), (1 - 2**-53, 2)])
def test_categorical_sampling_inverts_the_distribution(
    monkeypatch: pytest.MonkeyPatch, uniform: float, label: int
) -> None:
    """An impossible class is not drawn even where the uniform number falls on its edge."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(*shape, uniform, dtype=dtype))
    output = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]], dtype=torch.float64)
    assert Categorical().sample(output, generator_of(0)).tolist() == [label]


def outcomes(name: str, output: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Every label of the whole batch with its probability; the Gaussian by a two-point rule with equal moments."""
    n, size = output.shape
    if name == "categorical":
        p = output.softmax(1)
        for labels in itertools.product(range(size), repeat=n):
            yield float(p[range(n), labels].prod()), torch.tensor(labels)
        return
    p = output.sigmoid() if name == "bernoulli" else torch.full_like(output, 0.5)
    for bits in itertools.product((0.0, 1.0), repeat=n * size):
        value = torch.tensor(bits, dtype=output.dtype).reshape(n, size)
        target = value if name == "bernoulli" else output + 2 * value - 1
        yield float(torch.where(value == 1, p, 1 - p).prod()), target


def gauss_newton(model: nn.Module, x: Tensor, likelihood: Likelihood) -> Tensor:
    """Mean over samples of J' H J, from autograd's Jacobian and the Hessian of the loss at the output."""
    parameters = dict(model.named_parameters())

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), x)

    pieces = torch.autograd.functional.jacobian(outputs, tuple(parameters.values()))
    jacobian = torch.cat([piece.flatten(2) for piece in pieces], 2)  # (N, C, P)
    roots = likelihood.curvature_root(model(x).detach())
    rows = torch.einsum("vnc,ncp->vnp", roots, jacobian)
    return torch.einsum("vnp,vnq->pq", rows, rows) / len(x)


@pytest.mark.parametrize(("name", "n", "size"), [("categorical", 3, 3), ("bernoulli", 3, 2), ("gaussian", 2, 3)])
def test_sampled_gradients_average_to_the_gauss_newton_matrix(name: str, n: int, size: int) -> None:
    """T15 (a) and (a'): per-sample outer products, and n times the outer product of the batch mean, are unbiased."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, size)).double()
    x, likelihood = torch.randn(n, 2, dtype=torch.float64), CASES[name][0]
    expected = gauss_newton(model, x, likelihood)
    total, batch_total = torch.zeros_like(expected), torch.zeros_like(expected)
    weight = 0.0
    record = Record.SAMPLED | Record.INPUTS | Record.SAMPLED_PARAMETERS
    for probability, targets in outcomes(name, model(x).detach()):
        statistics = measure(model, [x], record, likelihood=FixedTargets(likelihood, targets))
        rows = torch.cat(
            [v.flatten(1) for e in statistics.values() for v in e.per_sample_gradients(e.sampled_rows())], 1
        )
        total += probability * rows.T @ rows / n
        mean = flat([value for entry in statistics.values() for value in entry.sampled_parameter_gradients])
        batch_total += probability * n * torch.outer(mean, mean)
        weight += probability
    assert weight == pytest.approx(1.0)
    close(total, expected)
    close(batch_total, expected)


def test_names_resolve_and_unknown_names_are_refused() -> None:
    for name, (likelihood, _) in CASES.items():
        resolved = resolve_likelihood(name)
        assert type(resolved) is type(likelihood) and resolved.name == name
        assert resolve_likelihood(likelihood) is likelihood
    assert resolve_likelihood(None) is None
    with pytest.raises(ArgumentError, match="categorical"):
        resolve_likelihood("categoric")


@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("estimator", [osc.ExactGGN(), osc.EmpiricalFisher(), osc.SampledFisher()])
def test_an_output_of_one_number_per_sample_has_one_coordinate(name: str, estimator: Any) -> None:
    """(N,) and (N, 1) are one model: the same curvature, draw by draw."""
    found = []
    for squeezed in (True, False):
        torch.manual_seed(0)
        line = nn.Linear(3, 1).double()
        model = nn.Sequential(line, nn.Flatten(0)) if squeezed else nn.Sequential(line)
        inputs, targets = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64).round()
        method = osc.Method(osc.Dense(), estimator, defaults={"lr": 1.0, "damping": 0.1})
        optimizer = osc.build(method, model, likelihood=name)
        output = model(inputs).reshape(-1)
        if name == "gaussian":
            loss = 0.5 * (output - targets).square().mean()
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(output, targets)
        loss.backward()
        record = estimator.fill(optimizer.collect()["0"])
        found.append(record.matrix())
        if isinstance(estimator, osc.ExactGGN):
            weights = torch.ones(5).double() if name == "gaussian" else output.sigmoid() * (1 - output.sigmoid())
            rows = torch.cat([inputs, inputs.new_ones(5, 1)], 1)
            torch.testing.assert_close(found[-1], (rows.T * weights.detach()) @ rows / 5)
        optimizer.close()
    torch.testing.assert_close(*found)
