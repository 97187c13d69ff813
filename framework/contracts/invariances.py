"""Contracts of one structure under changes of its data that must not matter, or that matter by a known law."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import StructureDeclarations, declared
from ...curvature.records.needs import Needs
from .cases import Batch, Case, low_rank
from .contract import NotApplicable, contract, contracts_of, require_close, require_finite
from .structures import _nonlinear
from .workbench import Workbench

__all__ = ["CONTRACTS"]

_KINDS = ("structure", "factor")
_SAMPLES = Needs.INPUTS | Needs.ROOTS | Needs.VECTORS | Needs.MATRIX
_FACTOR = 3.0


def _no_samples(part: Any) -> str | None:
    return None if part.needs & _SAMPLES else "its needs name no statistics of samples"


def _no_law(part: Any) -> str | None:
    return None if declared(part, StructureDeclarations).scaling is not None else "states no scaling law"


def _compare(what: str, actual: Workbench, expected: Workbench) -> None:
    for one, two in zip(actual.blocks, expected.blocks, strict=True):
        where = f"of layer {two.layer.name!r} {what}"
        require_close(f"direction {where}", actual.direction(one), expected.direction(two))


@contract("permuted-samples", _KINDS, "the order of the samples in a mini-batch does not matter")
def permuted_samples(part: Any, case: Case) -> None:
    """Directions after updates and looks back on permuted mini-batches."""
    order = case.order()
    permuted = Workbench(part, case).run(case.batches(2, lambda value: value[order]))
    _compare("with permuted samples", permuted, Workbench(part, case).run())


@contract("duplicated-batch", _KINDS, "a mini-batch in which every sample comes twice is the same mini-batch")
def duplicated_batch(part: Any, case: Case) -> None:
    """Statistics are means over samples."""
    doubled = Workbench(part, case).run(case.batches(2, lambda value: torch.cat([value, value])))
    _compare("with every sample twice", doubled, Workbench(part, case).run())


def _matrices(part: Any, case: Case, batch: Batch) -> list[Tensor]:
    bench = Workbench(part, case)
    bench.step(batch)
    requests = [request for block in bench.blocks for request in block.part.matrices(block.state, bench.sides(block))]
    return [request.matrix.clone() for request in requests]


def _not_additive(part: Any) -> str | None:
    return None if declared(part, StructureDeclarations).additive else "declares additive = False"


@contract(
    "batch-splitting",
    _KINDS,
    "the matrix of a mini-batch is the mean of the matrices of its halves",
    unless=(_no_samples, _not_additive),
)
def batch_splitting(part: Any, case: Case) -> None:
    """The undamped matrices that a part wants inverted, after one update."""
    (inputs, targets), half = case.batch(), case.samples // 2
    whole = _matrices(part, case, (inputs, targets))
    if not whole:
        raise NotApplicable("it asks for no inverse")
    first = _matrices(part, case, (inputs[:half], targets[:half]))
    second = _matrices(part, case, (inputs[half:], targets[half:]))
    for index, (one, two, both) in enumerate(zip(first, second, whole, strict=True)):
        require_close(f"mean of matrix {index} over two halves", 0.5 * (one + two), both)


@contract(
    "scaled-loss",
    _KINDS,
    "a loss c times as large changes to_dense by the stated power of c",
    unless=(_nonlinear, _no_law),
)
def scaled_loss(part: Any, case: Case) -> None:
    """``scaling`` states the powers of c: of the curvature, and of the dampings that go with it."""
    law = part.scaling
    powers = [_FACTOR**power for power in (law.whole, law.inputs, law.outputs)]
    plain, scaled = Workbench(part, case), Workbench(part, case)
    plain.step()
    scaled.step(scale=_FACTOR, damped=powers)
    for one, two in zip(plain.blocks, scaled.blocks, strict=True):
        dense, other = plain.dense(one), scaled.dense(two, powers)
        offset = law.offset * torch.eye(len(dense), dtype=dense.dtype, device=dense.device)
        what = f"to_dense of layer {one.layer.name!r} for a loss {_FACTOR:g} times as large"
        require_close(what, other - offset, _FACTOR**law.curvature * (dense - offset))


@contract(
    "mean-versus-sum",
    _KINDS,
    "a summed loss gives the same curvature per sample as its mean",
    unless=lambda part: None if part.needs & ~Needs.INPUTS else "its needs name no gradients",
)
def mean_versus_sum(part: Any, case: Case) -> None:
    """Rows as autograd gave them, with their factor; the directions of one momentum."""
    mean = Workbench(part, case).run(raw=True)
    total = Workbench(part, case).run(reduction="sum", raw=True)
    _compare("with a summed loss", total, mean)


def _require_usable(what: str, bench: Workbench) -> None:
    for block in bench.blocks:
        where = f"of layer {block.layer.name!r} {what}"
        require_finite(f"the state {where}", *block.state.tensors())
        require_finite(f"the direction {where}", bench.direction(block))


@contract("zero-gradients", _KINDS, "zero gradients, statistics and momentum give finite directions")
def zero_gradients(part: Any, case: Case) -> None:
    """Two steps of nothing, from a fresh state and from a used one; then a zero momentum."""
    for bench in (Workbench(part, case), Workbench(part, case).run()):
        for block in bench.blocks:
            for value in block.vector:
                value.zero_()
        for _ in range(2):
            bench.step(scale=0.0)
        _require_usable("with zero gradients", bench)


@contract("rank-deficient-batch", _KINDS, "a mini-batch of one sample many times gives finite directions")
def rank_deficient_batch(part: Any, case: Case) -> None:
    """Also with inputs that are all zero."""
    for what, batches in islice(low_rank(case), 2):
        _require_usable(what, Workbench(part, case).run(batches))


@contract("one-sample", _KINDS, "a mini-batch of one sample gives finite directions")
def one_sample(part: Any, case: Case) -> None:
    """N = 1."""
    _require_usable("with one sample", Workbench(part, case).run([case.batch(0, 1), case.batch(1, 1)]))


@contract("huge-and-tiny-scales", _KINDS, "gradients 1e12 or 1e-12 times as long, damped to match, stay finite")
def huge_and_tiny_scales(part: Any, case: Case) -> None:
    """The dampings follow the scaling law, where the part states one; else each follows the square."""
    law = declared(part, StructureDeclarations).scaling
    powers: Sequence[float] = (2.0, 0.0, 2.0) if law is None else (law.whole, law.inputs, law.outputs)
    for scale in (1e12, 1e-12):
        bench = Workbench(part, case)
        for block in bench.blocks:
            for value in block.vector:
                value.mul_(scale)
        for index in (0, 1):
            bench.step(case.batch(index), scale=scale, damped=[scale**power for power in powers])
        _require_usable(f"at scale {scale:g}", bench)


CONTRACTS = contracts_of(globals())
