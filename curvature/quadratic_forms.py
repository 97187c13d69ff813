"""Quadratic forms d_l' C_l d_l of all layers along given directions for about one extra gradient (PAPERS 3.3).

Every estimator returns an (L, L) matrix M whose diagonal holds the layers' own forms; off the diagonal stands the
curvature *between* layers where the estimator knows it, else zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CompatibilityError
from .declarations import FormDeclarations, declared
from .records.needs import Needs
from .records.statistics import LayerStatistics, Tensors, scores_of_many

__all__ = [
    "DirectionalEvidence",
    "ExactHessian",
    "HessianRowSums",
    "QuadraticForm",
    "SampledBatchScores",
    "SampledScores",
    "SignedHessian",
    "require_coupled",
]


@dataclass(frozen=True)
class DirectionalEvidence:
    """What an estimator of quadratic forms may use.

    Attributes:
        names: the L directions in order: the layers, or more than one name for each layer.
        directions: by name one tensor per parameter of its layer.
        statistics: by name what the backend recorded of its layer: the same object under all names of one layer.
        hessian_product: from one direction per name (all of them) to the product H d of the mini-batch loss, by name,
            where d is the sum of a layer's directions; ``None`` unless the rule declared ``Needs.PRODUCTS``.
        generator: for random signs.
        share: what ``statistics`` count in the mean over a mini-batch that many processes share, in [0, 1].
        samples: N of the joint mini-batch.
        total: sum of a tensor over the processes; ``None``: the statistics are of the whole mini-batch. Only forms that
            declare ``adds_up`` ever see another value.
    """

    names: Sequence[str]
    directions: Mapping[str, Tensors]
    statistics: Mapping[str, LayerStatistics]
    hessian_product: Callable[[Mapping[str, Tensors]], Mapping[str, Tensors]] | None
    generator: torch.Generator
    share: float = 1.0
    samples: int = 0
    total: Callable[[Tensor], Tensor] | None = None


class QuadraticForm(Protocol):
    """A way to measure M.

    A form that knows the blocks between layers may be summed to the form of the common direction; one that does not
    declares ``couples = False``. It may declare more: :class:`.FormDeclarations`.
    """

    needs: Needs

    def measure(self, evidence: DirectionalEvidence) -> Tensor:
        """(L, L) matrix."""


def require_coupled(rule: str, form: QuadraticForm) -> None:
    """Check that a form knows the curvature between layers.

    Raises:
        CompatibilityError: naming the rule and the forms that do.
    """
    if not declared(form, FormDeclarations).couples:
        raise CompatibilityError(
            f"{rule} sums the curvature of all layers along their common step, and {type(form).__name__} does not "
            "measure it between layers; use SampledScores(), SampledBatchScores() or ExactHessian()"
        )


def _inner(left: Tensors, right: Tensors) -> Tensor:
    products = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]
    return torch.stack(products).sum()


def _slopes_of_shared(statistics: LayerStatistics, direction: Tensors) -> Tensor:
    """(passes,) Slopes along a direction of a layer whose rows belong to several samples; their mean square counts."""
    vectors = statistics.sampled_vectors()
    return torch.stack([(v * d).reshape(len(v), -1).sum(1) for v, d in zip(vectors, direction, strict=True)]).sum(0)


def _has_scores(statistics: LayerStatistics) -> bool:
    return statistics.sampled_gradient is not None or statistics.sample_gradients.sampled is not None


@dataclass(frozen=True)
class SampledScores(FormDeclarations):
    """(a) Sampled Fisher: M = mean_i s(i) s(i)' from per-sample scores s_l(i); one backward, one product per layer.

    Unbiased for d' F d including the blocks between layers. A layer without an adapter has no scores: its diagonal
    entry comes from the mean gradient as in (a') and its row is zero elsewhere, but for other directions of that layer.
    So it is with a layer whose rows belong to several samples (learned positions).
    """

    needs = Needs.SCORES
    definite = True
    estimates = "fisher"
    adds_up = True

    def measure(self, evidence: DirectionalEvidence) -> Tensor:
        """One product of the (L, N) score matrix with itself."""
        rows: dict[int, Tensor] = {}
        known: dict[int, LayerStatistics] = {}
        shared: dict[int, list[tuple[int, Tensor]]] = {}
        means: dict[int, list[tuple[int, Tensor]]] = {}
        measured = [evidence.statistics[name] for name in evidence.names if name in evidence.statistics]
        samples = next((entry.samples for entry in measured if _has_scores(entry)), 1)
        for index, name in enumerate(evidence.names):
            statistics, direction = evidence.statistics.get(name), evidence.directions[name]
            if statistics is not None and _has_scores(statistics) and statistics.shared_by == 1.0:
                known[index] = statistics
                continue
            rows[index] = direction[0].new_zeros(samples)
            if statistics is not None and statistics.sampled_gradient is not None:
                shared.setdefault(id(statistics), []).append((index, _slopes_of_shared(statistics, direction)))
            elif statistics is not None and statistics.sampled_parameter_gradients is not None:
                slope = _inner(statistics.sampled_parameter_gradients, direction)
                means.setdefault(id(statistics), []).append((index, slope))
        found = scores_of_many(list(known.values()), [evidence.directions[evidence.names[index]] for index in known])
        rows.update(zip(known, found, strict=True))
        stacked = torch.stack([rows[index] for index in range(len(evidence.names))])
        result = stacked @ stacked.T / samples
        for of_layer in shared.values():
            for row, slopes in of_layer:
                for column, along in of_layer:
                    result[row, column] = (slopes * along).mean()
        if evidence.total is not None:
            result = evidence.total(evidence.share * result)
        for places in means.values():
            slopes, count = _joint_slopes(evidence, [slope for _, slope in places], evidence.names[places[0][0]])
            for (row, _), slope in zip(places, slopes, strict=True):
                for (column, _), along in zip(places, slopes, strict=True):
                    result[row, column] = count * (slope * along)
        return result


@dataclass(frozen=True)
class SampledBatchScores(FormDeclarations):
    """(a') Sampled Fisher from the batch mean: M_kl = m (g_k'd_k)(g_l'd_l), g the mean gradient for sampled labels.

    Unbiased, works for every module, costs one gradient; a single number per layer, hence a relative standard
    deviation near sqrt(2).
    """

    needs = Needs.BATCH_SCORES
    definite = True
    estimates = "fisher"
    adds_up = True

    def measure(self, evidence: DirectionalEvidence) -> Tensor:
        """Rank one."""
        slopes: list[Tensor] = []
        known = evidence.names[0]
        for name in evidence.names:
            statistics, direction = evidence.statistics.get(name), evidence.directions[name]
            if statistics is None or statistics.sampled_parameter_gradients is None:
                slopes.append(direction[0].new_zeros(()))
                continue
            known = name
            slopes.append(_inner(statistics.sampled_parameter_gradients, direction))
        stacked, samples = _joint_slopes(evidence, slopes, known)
        return samples * torch.outer(stacked, stacked)


def _joint_slopes(evidence: DirectionalEvidence, slopes: Sequence[Tensor], name: str) -> tuple[Tensor, int]:
    """Slopes of the mean gradient of the joint mini-batch, and its number of samples.

    Args:
        evidence: of this process.
        slopes: of its own mean gradient.
        name: of a direction whose layer has been measured.
    """
    stacked, statistics = torch.stack(list(slopes)), evidence.statistics.get(name)
    if evidence.total is not None:
        return evidence.total(evidence.share * stacked), evidence.samples
    return stacked, 1 if statistics is None else statistics.samples


class _HessianForm(FormDeclarations):
    needs = Needs.PRODUCTS

    @staticmethod
    def _product(evidence: DirectionalEvidence, directions: Mapping[str, Tensors]) -> Tensor:
        """(L,) inner products of each layer's own direction with the Hessian product of ``directions``."""
        assert evidence.hessian_product is not None
        product = evidence.hessian_product(directions)
        return torch.stack([_inner(evidence.directions[name], product[name]) for name in evidence.names])


@dataclass(frozen=True)
class SignedHessian(_HessianForm):
    """(b) One Hessian-vector product with independent random signs per layer: unbiased for d_l' H_ll d_l.

    Cross terms carry a product of two signs and average out. May be negative: use with an average and a floor.
    """

    couples = False
    estimates = "hessian"

    def measure(self, evidence: DirectionalEvidence) -> Tensor:
        """Diagonal matrix."""
        example = evidence.directions[evidence.names[0]][0]
        bits = torch.randint(0, 2, (len(evidence.names),), generator=evidence.generator, device=example.device)
        signs = (2 * bits - 1).to(example.dtype)
        return torch.diag(signs * self.signed(evidence, signs))

    def signed(self, evidence: DirectionalEvidence, signs: Tensor) -> Tensor:
        """(L,) of d_l' (H v)_l for v = (signs_l d_l)."""
        directions = {
            name: tuple(signs[index] * value for value in evidence.directions[name])
            for index, name in enumerate(evidence.names)
        }
        return self._product(evidence, directions)


@dataclass(frozen=True)
class ExactHessian(_HessianForm):
    """(c) One Hessian-vector product per layer: exact M_kl = d_k' H_kl d_l. Cost L products; a reference."""

    estimates = "hessian"

    def measure(self, evidence: DirectionalEvidence) -> Tensor:
        """Full symmetric matrix."""
        columns: list[Tensor] = []
        for chosen in evidence.names:
            directions = {
                name: value if name == chosen else tuple(torch.zeros_like(entry) for entry in value)
                for name, value in evidence.directions.items()
            }
            columns.append(self._product(evidence, directions))
        return torch.stack(columns, 1)


@dataclass(frozen=True)
class HessianRowSums(_HessianForm):
    """(d) Row sums d_l' (H d)_l from one plain product: cheap, but *not* block diagonal. For ablations only."""

    couples = False

    def measure(self, evidence: DirectionalEvidence) -> Tensor:
        """Diagonal matrix."""
        return torch.diag(self._product(evidence, evidence.directions))
