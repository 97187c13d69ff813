"""Contracts of step-size rules, and of the couplings and slopes they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import CouplingDeclarations, StepSizeDeclarations, declared
from ...stepsize.averaged_forms import AveragedForms
from ...stepsize.protocol import StepEvidence
from .cases import Case
from .contract import (
    contract,
    contracts_of,
    require,
    require_bound,
    require_close,
    require_equal,
    require_finite,
    require_same_state,
    require_unchanged,
    undeclared,
)

__all__ = ["CONTRACTS", "evidence_for"]

_LAYERS = 3
_SIZE = 4


def evidence_for(
    case: Case, key: int = 0, *, lr: float = 0.5, length: float = 1.0, recalls: bool = False
) -> StepEvidence:
    """What a rule sees of three layers with four parameters each: consistent slopes, norms and quadratic forms.

    Args:
        case: seed, precision and device.
        key: of the random directions.
        lr: learning rate.
        length: factor on every direction.
        recalls: whether the layers' last steps follow their directions.
    """
    momentum = case.randn(_LAYERS, _SIZE, key=40 + key)
    gradient = momentum + 0.3 * case.randn(_LAYERS, _SIZE, key=60 + key)
    directions = length * torch.stack([case.spd(_SIZE, 10.0, key=layer) @ momentum[layer] for layer in range(_LAYERS)])
    curvature = case.spd(_LAYERS * _SIZE, 50.0, key=80 + key)
    columns = torch.block_diag(*directions)
    if recalls:
        last = length * case.randn(_LAYERS, _SIZE, key=140 + key)
        directions, columns = torch.cat([directions, last]), torch.cat([columns, torch.block_diag(*last)])
        momentum, gradient = momentum.repeat(2, 1), gradient.repeat(2, 1)
    forms = columns @ curvature @ columns.T
    return StepEvidence(
        [f"layer{index}" for index in range(_LAYERS)],
        lr,
        slopes=(momentum * directions).sum(1),
        gradient_slopes=(gradient * directions).sum(1),
        squared_norms=directions.square().sum(1),
        parameter_norms=case.randn(_LAYERS, key=90).abs() + 1.0,
        forms=0.5 * (forms + forms.T),
    )


def _recalls(rule: Any) -> bool:
    return declared(rule, StepSizeDeclarations).recalls


def _count(rule: Any) -> int:
    """How many step sizes it proposes."""
    return 2 * _LAYERS if _recalls(rule) else _LAYERS


def _changed(evidence: StepEvidence, change: Any) -> StepEvidence:
    """Every tensor of the evidence replaced by ``change(name, tensor)``."""
    tensors = {entry.name: getattr(evidence, entry.name) for entry in fields(evidence)}
    return replace(
        evidence, **{name: change(name, value) for name, value in tensors.items() if isinstance(value, Tensor)}
    )


def _copied(evidence: StepEvidence) -> StepEvidence:
    return _changed(evidence, lambda name, value: value.clone())


def _fresh(rule: Any, case: Case) -> Any:
    return rule.init(_LAYERS, torch.zeros((), dtype=case.dtype, device=case.device))


def _steps(rule: Any, case: Case, sequence: list[StepEvidence], state: Any = None) -> list[Tensor]:
    """Step sizes for one evidence after another, as vectors."""
    state = _fresh(rule, case) if state is None else state
    found = []
    for evidence in sequence:
        sizes = rule.propose(state, _copied(evidence))
        found.append(torch.as_tensor(sizes, dtype=case.dtype, device=case.device).expand(_count(rule)).clone())
    return found


def _usual(rule: Any, case: Case, **options: Any) -> list[StepEvidence]:
    return [evidence_for(case, key, recalls=_recalls(rule), **options) for key in range(3)]


def _unusual(rule: Any, case: Case) -> Iterator[tuple[str, StepEvidence]]:
    recalls = _recalls(rule)
    normal = evidence_for(case, recalls=recalls)
    yield "nothing moves", _changed(normal, lambda name, value: torch.zeros_like(value))
    yield "no curvature", replace(normal, forms=torch.zeros_like(normal.forms))  # type: ignore[arg-type]
    yield "one layer at rest", _changed(normal, _zeroed(0))
    yield "long directions", evidence_for(case, length=1e12, recalls=recalls)
    yield "short directions", evidence_for(case, length=1e-12, recalls=recalls)
    yield "no curvature at this step", replace(normal, forms=None)
    if recalls:
        yield "no layer has a last step", _changed(normal, _zeroed(_LAST_STEPS))
        yield "the last step is the direction", _changed(normal, _same_twice)


def _zeroed(places: int | slice) -> Callable[[str, Tensor], Tensor]:
    """A change that takes some directions out of the evidence."""

    def change(name: str, value: Tensor) -> Tensor:
        result = value.clone()
        if name != "parameter_norms":
            result[places] = 0.0
        if name == "forms":
            result[:, places] = 0.0
        return result

    return change


_LAST_STEPS = slice(_LAYERS, None)
"""Where the layers' last steps stand, behind their directions."""


def _same_twice(name: str, value: Tensor) -> Tensor:
    if name == "parameter_norms":
        return value.clone()
    return value[:_LAYERS, :_LAYERS].repeat(2, 2) if name == "forms" else value[:_LAYERS].repeat(2)


@contract("step-finite", "step size", "step sizes are finite, whatever is zero, long or short")
def step_finite(rule: Any, case: Case) -> None:
    """From a fresh state and after usual steps."""
    for what, evidence in _unusual(rule, case):
        for before in ([], _usual(rule, case)):
            require_finite(f"step sizes where {what}", *_steps(rule, case, [*before, evidence]))


@contract(
    "step-nonnegative",
    "step size",
    "no step goes against its direction",
    unless=lambda rule: "declares signed" if declared(rule, StepSizeDeclarations).signed else None,
)
def step_nonnegative(rule: Any, case: Case) -> None:
    """Also where the momentum points uphill; along its last step a layer may go either way."""
    usual = _usual(rule, case)
    uphill = [replace(entry, slopes=-entry.slopes, gradient_slopes=-entry.gradient_slopes) for entry in usual]  # type: ignore[operator]
    for sequence in (usual, uphill):
        for sizes in _steps(rule, case, sequence):
            require_bound("smallest step size", sizes[:_LAYERS].min(), "at least", 0.0)


@contract(
    "step-shape",
    "step size",
    "one number, or one step size per layer (and per last step) in the precision of the evidence",
)
def step_shape(rule: Any, case: Case) -> None:
    """float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        other = case.to(dtype=dtype)
        sizes = rule.propose(_fresh(rule, other), evidence_for(other, recalls=_recalls(rule)))
        if isinstance(sizes, Tensor):
            fits = tuple(sizes.shape) == (_count(rule),) and sizes.dtype == dtype and sizes.device.type == other.device
            found = f"{tuple(sizes.shape)} in {sizes.dtype}"
            require(fits, f"step sizes of {_LAYERS} layers in {dtype} have shape {found}")
        else:
            fits = isinstance(sizes, float | int) and not _recalls(rule)
            require(fits, f"step sizes are a {type(sizes).__name__}")


@contract("step-order", "step size", "the order of the layers does not matter")
def step_order(rule: Any, case: Case) -> None:
    """Three steps with the layers in another order."""
    order = torch.tensor([2, 0, 1], device=case.device)

    whole = torch.cat([order, order + _LAYERS])

    def turned(name: str, value: Tensor) -> Tensor:
        places = whole[: len(value)]
        return value[places][:, places] if value.ndim == 2 else value[places]

    sequence = _usual(rule, case)
    other = [_changed(replace(entry, names=[entry.names[i] for i in order]), turned) for entry in sequence]
    for one, two in zip(_steps(rule, case, sequence), _steps(rule, case, other), strict=True):
        require_close("step sizes of layers in another order", two, one[whole[: len(one)]])


@contract("step-learning-rate", "step size", "no step at lr = 0, and none is shorter for a larger lr")
def step_learning_rate(rule: Any, case: Case) -> None:
    """lr = 0, 0.1, 0.2, 0.7."""
    previous = None
    for lr in (0.0, 0.1, 0.2, 0.7):
        sizes = _steps(rule, case, _usual(rule, case, lr=lr))
        for index, size in enumerate(sizes):
            if previous is None:
                require_close("step sizes at lr = 0", size, torch.zeros_like(size), tolerance=0.0)
            else:
                least = (size.abs() - previous[index].abs()).min()
                require_bound(f"change of a step size up to lr = {lr:g}", least, "at least", -1e-12)
        previous = sizes


@contract(
    "step-length",
    "step size",
    "directions c times as long are followed 1/c times as far",
    unless=undeclared(StepSizeDeclarations, "length_free"),
)
def step_length(rule: Any, case: Case) -> None:
    """c = 8."""
    plain, longer = _steps(rule, case, _usual(rule, case)), _steps(rule, case, _usual(rule, case, length=8.0))
    for one, two in zip(plain, longer, strict=True):
        require_close("step sizes along directions 8 times as long, times 8", 8.0 * two, one)


@contract("step-purity", "step size", "the evidence stays bitwise as it was")
def step_purity(rule: Any, case: Case) -> None:
    """Every tensor of it."""
    evidence = evidence_for(case, recalls=_recalls(rule))
    kept = _copied(evidence)
    rule.propose(_fresh(rule, case), evidence)
    for entry in fields(evidence):
        value = getattr(evidence, entry.name)
        if isinstance(value, Tensor):
            require_equal(f"{entry.name} of the evidence", value, getattr(kept, entry.name))


@contract("step-save-load-continue", "step size", "a saved and loaded state continues bit for bit")
def step_save_load(rule: Any, case: Case) -> None:
    """After three steps, for two more."""
    state = _fresh(rule, case)
    _steps(rule, case, _usual(rule, case), state)
    resumed = _fresh(rule, case)
    if state is not None:
        saved = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.to_dict().items()}
        resumed.load_dict(saved)
    later = [evidence_for(case, key, recalls=_recalls(rule)) for key in (5, 6)]
    for one, two in zip(_steps(rule, case, later, state), _steps(rule, case, later, resumed), strict=True):
        require_equal("step sizes after loading", two, one)
    if state is not None:
        require_same_state("state after loading and going on", resumed.to_dict(), state.to_dict())


@contract(
    "step-no-last-step",
    "step size",
    "along a last step that a layer does not have it does not go",
    unless=undeclared(StepSizeDeclarations, "recalls"),
)
def step_no_last_step(rule: Any, case: Case) -> None:
    """At the first step, and later where one layer has none."""
    first = _changed(evidence_for(case, recalls=True), _zeroed(_LAST_STEPS))
    (sizes,) = _steps(rule, case, [first])
    require_close(
        "step sizes along last steps at the first step", sizes[_LAYERS:], 0.0 * sizes[_LAYERS:], tolerance=0.0
    )
    sizes = _steps(rule, case, [*_usual(rule, case), first])[-1]
    require_close("step sizes along last steps that are zero", sizes[_LAYERS:], 0.0 * sizes[_LAYERS:], tolerance=0.0)


def _forms(case: Case) -> tuple[Tensor, Tensor]:
    norms = case.randn(_LAYERS, key=91).abs() + 0.5
    return case.spd(_LAYERS, 30.0, key=92), norms


@contract("coupling-scale", "coupling", "curvature c times as large is c times as large along each layer")
def coupling_scale(rule: Any, case: Case) -> None:
    """c = 4; the norms' common factor does not matter."""
    forms, norms = _forms(case)
    plain = rule.curvature(forms.clone(), norms.clone())
    require_close("curvature", rule.curvature(4.0 * forms, 2.0 * norms), 4.0 * plain)


@contract("coupling-order", "coupling", "the order of the layers does not matter")
def coupling_order(rule: Any, case: Case) -> None:
    """Another order."""
    (forms, norms), order = _forms(case), torch.tensor([2, 0, 1], device=case.device)
    plain = rule.curvature(forms.clone(), norms.clone())
    require_close("curvature", rule.curvature(forms[order][:, order], norms[order]), plain[order])


@contract(
    "coupling-majorises",
    "coupling",
    "along the common step no less curvature than the whole matrix has",
    unless=undeclared(CouplingDeclarations, "majorises"),
)
def coupling_majorises(rule: Any, case: Case) -> None:
    """sum of c_l |d_l|^2 >= |d|' |M| |d|."""
    forms, norms = _forms(case)
    found = float((rule.curvature(forms.clone(), norms.clone()) * norms.square()).sum())
    bound = float(norms @ forms.abs() @ norms)
    require_bound("curvature along the common step", found, "at least", bound, slack=1e-12 * bound)


@contract("coupling-purity", "coupling", "forms and norms stay bitwise as they were")
def coupling_purity(rule: Any, case: Case) -> None:
    """Both."""
    given = _forms(case)
    with require_unchanged("forms or norms", *given):
        rule.curvature(*given)


def _slopes(rule: Any, case: Case, change: Any = lambda value: value) -> list[Tensor]:
    state = AveragedForms.zeros(_LAYERS, torch.zeros((), dtype=case.dtype, device=case.device))
    pairs = [(case.randn(_LAYERS, key=93 + key), case.randn(_LAYERS, key=96 + key)) for key in range(3)]
    return [rule.value(state, change(one).clone(), change(two).clone()).clone() for one, two in pairs]


@contract("slope-scale", "slope", "slopes c times as steep give a slope c times as steep")
def slope_scale(rule: Any, case: Case) -> None:
    """c = 4, over three steps."""
    for one, two in zip(_slopes(rule, case), _slopes(rule, case, lambda value: 4.0 * value), strict=True):
        require_close("slope", two, 4.0 * one)


@contract("slope-order", "slope", "the order of the layers does not matter")
def slope_order(rule: Any, case: Case) -> None:
    """Three steps in another order."""
    order = torch.tensor([2, 0, 1], device=case.device)
    for one, two in zip(_slopes(rule, case), _slopes(rule, case, lambda value: value[order]), strict=True):
        require_close("slope", two, one[order])


CONTRACTS = contracts_of(globals())
