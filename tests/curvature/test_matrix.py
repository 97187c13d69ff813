"""The dense curvature matrix of a layer, and who may use one that is indefinite."""

from dataclasses import dataclass, replace

import osculate as osc
import pytest
import torch
from backend_nets import SEEN, WantsMatrix
from measuring import close, measure
from osculate.curvature import BatchMean, EmpiricalFisher, Estimator, Gaussian, Needs, SampledBatchMean, SampledFisher
from torch import Tensor, nn

WITH_VECTORS: list[Estimator] = [BatchMean(), EmpiricalFisher(), SampledBatchMean(), SampledFisher()]


@pytest.mark.parametrize("estimator", WITH_VECTORS, ids=lambda part: type(part).__name__)
def test_the_matrix_is_the_mean_outer_product_of_the_vectors(estimator: Estimator) -> None:
    assert Needs.MATRIX in estimator.provides and estimator.definite
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    for name, entry in measure(model, [x], estimator.records(Needs.MATRIX), likelihood=Gaussian()).items():
        gradients = tuple(parameter.grad for parameter in entry.layer.parameters.values())
        filled = estimator.fill(replace(entry, gradients=gradients))
        expected: Tensor = torch.zeros((), dtype=torch.float64)
        vectors = filled.vectors()
        for index in range(len(vectors[0])):
            row = torch.cat([value[index].flatten() for value in vectors])
            expected = expected + torch.outer(row, row) / len(vectors[0])
        assert expected.abs().max() > 0, name
        close(filled.matrix(), expected)


@dataclass(frozen=True)
class Indefinite(EmpiricalFisher):
    """Pretends to have negative eigenvalues."""

    definite = False


def test_an_indefinite_matrix_goes_only_to_structures_that_take_it() -> None:
    defaults = {"damping": 0.1}
    with pytest.raises(osc.CompatibilityError, match=r"negative eigenvalues.*SampledFisher\(\)"):
        osc.Method(WantsMatrix(), Indefinite(), defaults=defaults)
    osc.Method(WantsMatrix(takes_indefinite=True), Indefinite(), defaults=defaults)
    osc.Method(WantsMatrix(), EmpiricalFisher(), defaults=defaults)
    with pytest.raises(osc.CompatibilityError, match="dense curvature matrix"):
        osc.Method(WantsMatrix(), osc.SecantPairs(), defaults=defaults)


def test_the_optimizer_hands_the_matrix_to_the_structure() -> None:
    SEEN.clear()
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer = osc.build(osc.Method(WantsMatrix(), EmpiricalFisher(), defaults={"damping": 0.1}), model, lr=0.0)
    (0.5 * model(x).square().sum() / 5).backward()
    optimizer.step()
    (matrix,) = SEEN
    residual = model(x).detach()
    rows = torch.cat([torch.einsum("no,ni->noi", residual, x).flatten(1), residual], 1)
    close(matrix, rows.T @ rows / 5)
