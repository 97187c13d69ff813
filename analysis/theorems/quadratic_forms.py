"""T15: the estimators of d_l' C_l d_l are unbiased, by full enumeration.

Nothing is sampled here: all C^n label strings enter with the probabilities the model gives them, all 2^L sign patterns
with the same one, so that the mean is the expectation up to rounding (PAPERS 3.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...curvature.layers.layer import Layer
from ...curvature.likelihoods import Categorical
from ...curvature.products import GraphKeepingBackward
from ...curvature.quadratic_forms import (
    DirectionalEvidence,
    ExactHessian,
    HessianRowSums,
    SampledBatchScores,
    SampledScores,
    SignedHessian,
)
from ...curvature.records.needs import Record
from ...curvature.records.statistics import LayerStatistics, Tensors
from ..theorem import Control, Evidence, Inequality, Setting, Theorem, agreement, worst
from .instances import Draws, eigenvalues, network
from .measured import flat_parameters, hessian, of_parameters, statistics

__all__ = ["THEOREMS"]

_NETS, _SAMPLES, _CLASSES = 3, 3, 3
_RECORD = Record.INPUTS | Record.SAMPLED | Record.SAMPLED_PARAMETERS


class _Given(Categorical):
    """A categorical likelihood that 'draws' the labels it was given."""

    def __init__(self, labels: Tensor):
        self.labels = labels

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """The labels."""
        return self.labels


@dataclass(frozen=True)
class _Problem:
    """A network of three layers, a mini-batch with true labels, and one direction per layer."""

    model: nn.Sequential
    inputs: Tensor
    labels: Tensor
    directions: Tensors

    @classmethod
    def draw(cls, draws: Draws) -> _Problem:
        layers = (nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, _CLASSES))
        model = network(draws, *layers)
        directions = tuple(draws.normal(*parameter.shape) for parameter in model.parameters())
        return cls(model, draws.normal(_SAMPLES, 2), draws.choice(_CLASSES, _SAMPLES), directions)

    def loss(self, output: Tensor) -> Tensor:
        """Mean cross entropy with the true labels."""
        return functional.cross_entropy(output, self.labels)

    def by_layer(self, layers: list[Layer]) -> dict[str, Tensors]:
        """The directions per layer."""
        pairs = iter(self.directions)
        return {layer.name: tuple(next(pairs) for _ in layer.parameters) for layer in layers}

    def along(self) -> Tensor:
        """(P, L): column l is the direction of layer l, zero elsewhere."""
        flat = [torch.cat([d.flatten() for d in self.directions[2 * l : 2 * l + 2]]) for l in range(3)]
        columns: Tensor = torch.block_diag(*(column.unsqueeze(1) for column in flat))
        return columns

    def fisher(self) -> Tensor:
        """(L, L) D' F D from the dense Jacobian of the logits: mean over samples of J' (diag p - p p') J."""
        value = of_parameters(self.model, lambda output: output, self.inputs)
        jacobian = torch.func.jacrev(value)(flat_parameters(self.model)) @ self.along()
        probability = self.model(self.inputs).softmax(1).detach()
        inner = torch.diag_embed(probability) - probability.unsqueeze(2) * probability.unsqueeze(1)
        return torch.einsum("nck,ncd,ndl->kl", jacobian, inner, jacobian) / _SAMPLES

    def hessian(self) -> Tensor:
        """(L, L) D' H D from the dense Hessian of the loss with the true labels."""
        dense = hessian(of_parameters(self.model, self.loss, self.inputs))(flat_parameters(self.model))
        forms: Tensor = self.along().T @ dense @ self.along()
        return forms


def _enumerated(problem: _Problem, uniform: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Expectation of both sampled forms over all label strings, and the smallest eigenvalue of any single one."""
    probability = problem.model(problem.inputs).softmax(1).detach()
    total: dict[str, Tensor] = {}
    lowest = []
    for labels in itertools.product(range(_CLASSES), repeat=_SAMPLES):
        string = torch.tensor(labels, device=probability.device)
        layers, found = statistics(problem.model, problem.inputs, problem.loss, _RECORD, _Given(string))
        evidence = _evidence(problem, layers, found)
        weight = probability.gather(1, string.unsqueeze(1)).prod()
        weight = torch.full_like(weight, _CLASSES**-_SAMPLES) if uniform else weight
        for name, form in (
            ("(a) sampled scores", SampledScores()),
            ("(a') sampled batch scores", SampledBatchScores()),
        ):
            value = form.measure(evidence)
            total[name] = total.get(name, 0.0) + weight * value
            lowest.append(eigenvalues(value)[0] / value.diagonal().sum())
    return total, torch.stack(lowest)


def _evidence(
    problem: _Problem,
    layers: list[Layer],
    found: Mapping[str, LayerStatistics],
    products: GraphKeepingBackward | None = None,
) -> DirectionalEvidence:
    generator = torch.Generator(device=problem.inputs.device)
    product = None if products is None else products.product
    return DirectionalEvidence([layer.name for layer in layers], problem.by_layer(layers), found, product, generator)


def _hessians(problem: _Problem, row_sums: bool) -> tuple[Tensor, Tensor]:
    """(L,) mean of the signed form over all sign patterns, and the (L, L) exact form."""
    layers, found = statistics(problem.model, problem.inputs, problem.loss, Record.INPUTS)
    products = GraphKeepingBackward(layers)
    problem.model.zero_grad()
    with products:
        problem.loss(problem.model(problem.inputs)).backward()
    evidence = _evidence(problem, layers, found, products)
    patterns = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1.0, 1.0), repeat=3)]
    patterns = [signs.to(problem.inputs.device) for signs in patterns]
    signed = torch.stack([signs * SignedHessian().signed(evidence, signs) for signs in patterns]).mean(0)
    exact = ExactHessian().measure(evidence)
    plain = HessianRowSums().measure(evidence).diagonal()
    products.release()
    return (plain if row_sums else signed), exact


def _check(setting: Setting, uniform: bool = False, row_sums: bool = False) -> Evidence:
    """Three networks, 27 label strings and 8 sign patterns each.

    Args:
        setting: seed and device.
        uniform: labels are uniform instead of drawn from the model: a control.
        row_sums: one plain product instead of the signed ones: a control.
    """
    draws = Draws(setting, 150)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    lowest = []
    for _ in range(_NETS):
        problem = _Problem.draw(draws)
        sampled, low = _enumerated(problem, uniform)
        signed, exact = _hessians(problem, row_sums)
        lowest.append(low)
        fisher, exactly = problem.fisher(), problem.hessian()
        for name, value in sampled.items():
            found.setdefault(f"E {name} = D'FD", []).append((value, fisher))
        found.setdefault("E (b) signed Hessian = d'Hd", []).append((signed, exactly.diagonal()))
        found.setdefault("(c) exact Hessian = D'HD", []).append((exact, exactly))
    inequalities: list[Inequality] = []
    for name, pairs in found.items():
        values, expected = zip(*pairs, strict=True)
        inequalities.append(agreement(name, torch.stack(values), torch.stack(expected), 1e-10))
    inequalities.append(worst("(a), (a') >= 0: lambda_min / trace", torch.cat(lowest), 0.0, ">=", 1e-12))
    return Evidence(tuple(inequalities), (), {"label strings": float(_CLASSES**_SAMPLES), "sign patterns": 8.0})


THEOREMS = (
    Theorem(
        "T15",
        "Sampled scores, sampled batch scores and signed Hessian products are unbiased for the quadratic forms of the "
        "layers, and the first two are never negative.",
        r"E[(\sum_t \delta_l^T d_l a)^2] = d_l^T F_l d_l, \quad E[m (\tilde g_l^T d_l)^2] = d_l^T F_l d_l, \quad "
        r"E[\epsilon_l d_l^T (H v)_l] = d_l^T H_{ll} d_l",
        "arXiv:2305.13664 (the quantity); docs/PAPERS.md 3.3 (a), (a'), (b), (c) (ours)",
        _check,
        partial(_check, uniform=True),
        "labels are uniform instead of drawn from the model",
        (Control("one plain Hessian product without signs, (d)", partial(_check, row_sums=True)),),
    ),
)
