"""Contracts of one structure by itself: its matrix, what it leaves alone, what it saves, what it costs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import StructureDeclarations, declared
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.linalg import RETRIES, Computed
from ...preconditioners.protocol import refining
from .cases import Case, low_rank
from .contract import (
    ContractViolation,
    NotApplicable,
    contract,
    contracts_of,
    require,
    require_bound,
    require_close,
    require_equal,
    require_finite,
    require_same_state,
    require_symmetric,
    require_unchanged,
)
from .workbench import Workbench, saved_copy

__all__ = ["CONTRACTS", "given_tensors"]

_KINDS = ("structure", "factor")
_MEASURED = (Needs.INPUTS, Needs.ROOTS, Needs.VECTORS, Needs.MATRIX, Needs.PAIRS, Needs.CHANGES)


def _nonlinear(part: Any) -> str | None:
    return None if declared(part, StructureDeclarations).linear else "declares linear = False: it has no matrix"


def _indefinite(part: Any) -> str | None:
    return None if declared(part, StructureDeclarations).definite else "declares definite = False"


def _no_bounds(part: Any) -> str | None:
    return "states no bounds(state, layer, damping)" if declared(part, StructureDeclarations).bounds is None else None


@contract("dense-solve", _KINDS, "precondition equals a solve with to_dense, right after a refresh", unless=_nonlinear)
def dense_solve(part: Any, case: Case) -> None:
    """Residual of the direction, relative to the momentum."""
    bench = Workbench(part, case).run()
    for block in bench.blocks:
        momentum = bench.momentum(block)
        expected = bench.vector(block, momentum)
        direction, dense = bench.direction(block, momentum), bench.dense(block)
        scale = expected.abs() + dense.abs() @ direction.abs()
        require_close(f"to_dense @ direction of layer {block.layer.name!r}", dense @ direction, expected, scale=scale)


@contract("positive-definite", _KINDS, "to_dense is symmetric positive definite", unless=(_nonlinear, _indefinite))
def positive_definite(part: Any, case: Case) -> None:
    """Symmetry to rounding, smallest eigenvalue above zero; also of statistics without full rank."""
    for what, batches in (("", None), *low_rank(case)):
        bench = Workbench(part, case).run(batches)
        for block in bench.blocks:
            dense, name = bench.dense(block), f"to_dense of layer {block.layer.name!r} {what}".rstrip()
            require_symmetric(name, dense, tolerance=1e-9)
            smallest = torch.linalg.eigvalsh(0.5 * (dense + dense.T))[0]
            require_bound(f"smallest eigenvalue of {name}", smallest, "more than", 0.0)


@contract(
    "spectrum-bounds", _KINDS, "the spectrum of to_dense lies inside the stated bounds", unless=(_nonlinear, _no_bounds)
)
def spectrum_bounds(part: Any, case: Case) -> None:
    """``bounds(state, layer, damping)`` gives (lowest, highest)."""
    bench = Workbench(part, case).run()
    for block in bench.blocks:
        eigenvalues = torch.linalg.eigvalsh(bench.dense(block))
        bounds = declared(block.part, StructureDeclarations).bounds
        assert bounds is not None
        low, high = bounds(block.state, block.layer, bench.sides(block))
        slack = 1e-9 * float(eigenvalues.abs().max())
        where = f"eigenvalue of to_dense of layer {block.layer.name!r}"
        require_bound(f"smallest {where}", eigenvalues[0], "at least", low, slack=slack)
        require_bound(f"largest {where}", eigenvalues[-1], "at most", high, slack=slack)


@contract("direction-layout", _KINDS, "a direction has the shapes of the momentum that was given")
def direction_layout(part: Any, case: Case) -> None:
    """As many tensors, each in the shape of its own."""
    bench = Workbench(part, case).run()
    for block in bench.blocks:
        momentum = bench.momentum(block)
        given = [tuple(value.shape) for value in momentum]
        found = [tuple(value.shape) for value in block.part.precondition(block.state, momentum)]
        what = f"the direction of layer {block.layer.name!r} has the shapes {found}, its momentum has {given}"
        require(found == given, what)


@contract("failed-inverse", _KINDS, "where nothing could be computed of its matrices, a part keeps what it had")
def failed_inverse(part: Any, case: Case) -> None:
    """``install`` with results whose ``value`` is ``None``: finite when fresh, unchanged after use."""
    asked = False
    for used, bench in ((False, Workbench(part, case)), (True, Workbench(part, case).run())):
        for block in bench.blocks:
            requests = block.part.matrices(block.state, bench.sides(block))
            if not requests:
                continue
            asked, name = True, f"the direction of layer {block.layer.name!r} after an inverse failed"
            before = bench.direction(block).clone()
            block.part.install(block.state, [Computed(None, RETRIES, request.damping) for request in requests])
            after = bench.direction(block)
            require_finite(name, after)
            if used:
                require_equal(name, after, before)
    if not asked:
        raise NotApplicable("it asks for no inverse")


def given_tensors(statistics: LayerStatistics) -> list[Tensor]:
    """Every tensor of a record that a part may read."""
    rows = [] if statistics.roots is None else [statistics.roots[0]]
    single = (
        statistics.inputs,
        statistics.output_gradient,
        statistics.sampled_gradient,
        statistics.mean_preactivation,
        statistics.mean_gradient,
    )
    whole = (*(statistics.gradients or ()), *(statistics.parameters or ()))
    return [value for value in (*single, *whole, *rows) if value is not None]


@contract("purity", _KINDS, "what a part is given stays bitwise as it was, and asking changes no state")
def purity(part: Any, case: Case) -> None:
    """Momentum, statistics, gradients and parameters; then the state while directions are asked for."""
    bench = Workbench(part, case).run()
    before, after = bench.measure(), bench.measure(case.batch(1))
    for block in bench.blocks:
        own, where = block.part, f"of layer {block.layer.name!r}"
        momentum, state = bench.momentum(block), [tensor.clone() for tensor in block.state.tensors()]
        with require_unchanged(f"the momentum {where}", *momentum):
            first = [value.clone() for value in own.precondition(block.state, momentum)]
            own.to_dense(block.state, block.layer, bench.sides(block)) if _nonlinear(own) is None else None
            own.matrices(block.state, bench.sides(block))
            for value, copy in zip(block.state.tensors(), state, strict=True):
                require_equal(f"the state {where} after asking for a direction", value, copy)
        for value, copy in zip(own.precondition(block.state, bench.momentum(block)), first, strict=True):
            require_equal(f"a second direction {where}", value, copy)
        one, other = before[block.layer.name], after[block.layer.name]
        observation = bench.observation(block, one)
        seen = (*observation.gradients, *observation.momentum, *observation.parameters)
        given = (*given_tensors(one), *given_tensors(other), *seen)
        with require_unchanged(f"what update and observe_step {where} were given", *given):
            own.update(block.state, observation)
            if (part_that_refines := refining(own)) is not None:
                part_that_refines.refine(block.state, observation)
            own.observe_step(block.state, one, other, bench.sides(block))


@contract("save-load-continue", _KINDS, "a saved and loaded state continues bit for bit")
def save_load_continue(part: Any, case: Case) -> None:
    """Through a file, loaded with ``weights_only=True``; what was saved is not changed by going on."""
    original, resumed = Workbench(part, case).run(), Workbench(part, case)
    saved = saved_copy([block.state.to_dict() for block in original.blocks])
    for block, values in zip(resumed.blocks, saved, strict=True):
        block.state.load_dict(values)
        block.positions = original.blocks[resumed.blocks.index(block)].positions
    for bench in (original, resumed):
        bench.step(case.batch(2))
        bench.look_back(2, case.batch(2))
    for one, other in zip(original.blocks, resumed.blocks, strict=True):
        where = f"of layer {one.layer.name!r}"
        require_same_state(f"the continued state {where}", other.state.to_dict(), one.state.to_dict())
        require_equal(f"the continued direction {where}", resumed.direction(other), original.direction(one))
    again = Workbench(part, case)
    for block, values, other in zip(again.blocks, saved, saved_copy(saved), strict=True):
        block.state.load_dict(values)
        require_same_state("what was saved, after loading and going on,", values, other)


@contract("dtype-and-device", _KINDS, "directions have the precision and device of the parameters, states no less")
def dtype_and_device(part: Any, case: Case) -> None:
    """float64 and float32, and bfloat16 where the part lists it under ``dtypes``."""
    extra = tuple(declared(part, StructureDeclarations).dtypes)
    for dtype in dict.fromkeys((torch.float64, torch.float32, *extra)):
        bench = Workbench(part, case.to(dtype=dtype)).run()
        for block in bench.blocks:
            where = f"of layer {block.layer.name!r} in {dtype}"
            for value in block.part.precondition(block.state, bench.momentum(block)):
                require(value.dtype == dtype, f"the direction {where} has {value.dtype}")
                require(value.device == block.parameters[0].device, f"the direction {where} lies on {value.device}")
            for value in block.state.tensors():
                precise = not value.is_floating_point() or torch.finfo(value.dtype).eps <= torch.finfo(dtype).eps
                require(precise, f"a tensor of the state {where} has only {value.dtype}")
                require(value.device == block.parameters[0].device, f"the state {where} lies on {value.device}")


@contract("memory", _KINDS, "the state holds as many numbers as numbers(layer) says, and does not grow")
def memory(part: Any, case: Case) -> None:
    """Fresh and after use; without ``numbers`` only growth is checked."""
    fresh, used = Workbench(part, case), Workbench(part, case).run()
    for one, other in zip(fresh.blocks, used.blocks, strict=True):
        counts = [sum(tensor.numel() for tensor in block.state.tensors()) for block in (one, other)]
        where = f"size of the state of layer {one.layer.name!r}"
        require_bound(f"{where} after use", counts[1], "exactly", counts[0])
        numbers = one.structure.numbers
        stated = None if numbers is None else numbers(one.layer)
        if stated is not None:
            require_bound(f"{where}, of which numbers(layer) tells,", counts[0], "exactly", stated)


@contract("renamed-layers", _KINDS, "the name of a layer changes nothing")
def renamed_layers(part: Any, case: Case) -> None:
    """States and directions, bitwise."""
    plain, other = Workbench(part, case).run(), Workbench(part, case, names="renamed.").run()
    for one, two in zip(plain.tensors() + plain.directions(), other.tensors() + other.directions(), strict=True):
        require_equal("state or direction of a renamed layer", two, one)


@contract("declared-needs", _KINDS, "a part reads nothing that its needs do not name")
def declared_needs(part: Any, case: Case) -> None:
    """States and directions are the same, bitwise, when everything else is left out of the statistics."""
    whole, bare = _seen(part, case, None), _seen(part, case, lambda needs: needs)
    if isinstance(whole, Exception):
        raise whole
    if _same(whole, bare):
        return
    records = _seen(part, case, lambda needs: ~Needs.NOTHING)
    # each time everything is shown but one need, unless that one is declared
    read = [need for need in _MEASURED if not _same(records, _seen(part, case, partial(operator.or_, ~need)))]
    found = " and ".join(f"Needs.{need.name}" for need in read)
    if not _same(whole, records):
        found = "raw gradients of the record (output_gradient, sampled_gradient), which are the estimator's"
    what = f"it then raises {type(bare).__name__}: {bare}" if isinstance(bare, Exception) else "it then does otherwise"
    raise ContractViolation(
        f"it reads {found or 'something'} without declaring it: add it to needs (now {part.needs}), which is all that "
        f"is measured for it; {what}"
    )


def _seen(part: Any, case: Case, shown: Callable[[Needs], Needs] | None) -> list[Tensor] | Exception:
    """States and directions of a part that is shown only some statistics, or what it raised."""
    try:
        bench = Workbench(part, case, shown=shown).run()
        return bench.tensors() + bench.directions()
    except NotApplicable:
        raise
    except Exception as error:  # whatever a part raises is the finding
        return error


def _same(one: list[Tensor] | Exception, other: list[Tensor] | Exception) -> bool:
    if isinstance(one, Exception) or isinstance(other, Exception):
        return isinstance(one, Exception) and isinstance(other, Exception)
    return all(torch.equal(value.nan_to_num(), copy.nan_to_num()) for value, copy in zip(one, other, strict=True))


CONTRACTS = contracts_of(globals())
