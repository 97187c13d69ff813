"""What :func:`osculate.build` is given besides the parts, checked before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...checking import require_kind
from ...curvature.likelihoods import Likelihood
from ...errors import ArgumentError, ClosureRequiredError, CompatibilityError

__all__ = [
    "as_number",
    "require_arguments",
    "require_callable",
    "require_closure",
    "require_one_choice",
    "require_one_process",
    "require_residual_method",
    "require_values",
]

_KINDS: dict[str, tuple[Any, str]] = {
    "loss_reduction": (Literal["mean", "sum"], "say how your loss combines samples"),
    "on_nonfinite": (Literal["raise", "skip"], "choose what becomes of such a step"),
    "likelihood": (
        str | Likelihood | Mapping[Any, Any] | None,
        "name 'categorical', 'bernoulli' or 'gaussian', pass an object as in osculate.curvature.likelihoods, or a "
        "dictionary with one of these for each head of the model",
    ),
    "output": (
        str | int | Callable | None,
        "name the tensor that the likelihood reads: a key or attribute, an index, or a function of the model's output",
    ),
    "seed": (int, "any whole number will do"),
    "strict": (bool, "strict=True refuses parameters that no part serves"),
    "backend": (str, "take 'hooks', 'func' or 'backpack', or 'residuals' for a loss that is a sum over residuals"),
    "certify_records": (Literal["always", "start", "never"], "choose how often records are compared with gradients"),
    "division": (
        Literal["auto", "replicated", "owners", "owners-only"],
        "choose who has the states where processes share a mini-batch",
    ),
    "samples": (
        int | Callable,
        "give the axis of the model's output that counts the samples, or a function of the output",
    ),
    "grad_scaler": (torch.amp.GradScaler | None, "pass the loop's torch.amp.GradScaler, or leave it out"),
}


def require_arguments(given: Mapping[str, Any]) -> None:
    """Check the arguments of the optimizer by name.

    Args:
        given: values of the names in this module's table; others are ignored.

    Raises:
        ArgumentError: naming the first that does not fit, what it must be, and the way out.
    """
    for name, (kind, way_out) in _KINDS.items():
        require_kind(name, given[name], kind, way_out)


def require_one_choice(likelihood: Any, output: Any) -> None:
    """Check that a dictionary of likelihoods, whose keys say where the heads are, stands alone.

    Raises:
        ArgumentError: if ``output`` says it as well.
    """
    if isinstance(likelihood, Mapping) and output is not None:
        raise ArgumentError(
            f"the keys of likelihood say which heads are read, so output={output!r} says it twice; leave output out"
        )


def require_residual_method(asks_products: bool, likelihood: Likelihood | None, grad_scaler: Any) -> None:
    """Check what ``backend='residuals'`` is given beside the method.

    Args:
        asks_products: whether a part wants products with the Hessian.
        likelihood: that was named.
        grad_scaler: of the loop.

    Raises:
        CompatibilityError: if a part wants the Hessian of a loss that the user runs backward.
        ArgumentError: if a likelihood is named, or the loss is scaled.
    """
    if asks_products:
        raise CompatibilityError(
            "backend='residuals' differentiates the residuals itself, and products with the Hessian are made of the "
            "user's own backward; take SampledScores() or ExactGGN(), which are exact for residuals"
        )
    if likelihood is not None:
        raise ArgumentError(
            "backend='residuals' takes the curvature from the residuals that step() is given: leave the likelihood "
            "out, and give blocks their weights by osculate.Residual(values, weight=...)"
        )
    if grad_scaler is not None:
        raise ArgumentError(
            "backend='residuals' runs the backward passes itself and scales nothing: leave grad_scaler out"
        )


def require_one_process(count: int) -> None:
    """Check that residuals are evaluated by one process.

    Raises:
        ArgumentError: if several share a mini-batch.
    """
    if count > 1:
        raise ArgumentError(
            f"backend='residuals' works in one process, and {count} share a mini-batch here; build with "
            "process_group=None for a process of its own"
        )


def require_values(model: nn.Module) -> None:
    """Check that the parameters of a model have values.

    Raises:
        ArgumentError: if one is on the meta device.
    """
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ArgumentError(
            f"parameters {', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''} are on the meta device and have no "
            "values; call model.to_empty(device=...), initialise or load the parameters, and build the optimizer then"
        )


def require_callable(name: str, value: Any) -> None:
    """Check that something can be called without arguments.

    Raises:
        ArgumentError: if it cannot.
    """
    if not callable(value):
        require_kind(
            name, value, Callable, "write `def closure(): ...` and pass the function itself, without calling it"
        )


def require_closure(closure: Any, needed: bool, residuals: bool = False) -> None:
    """Check the argument of ``step``.

    Args:
        closure: what the user gave.
        needed: whether there has to be one.
        residuals: whether it is one that returns residuals.

    Raises:
        ClosureRequiredError: if there is none and the method evaluates the mini-batch itself.
        ArgumentError: if it cannot be called.
    """
    if closure is not None:
        require_callable("closure", closure)
    elif needed:
        raise ClosureRequiredError(_RESIDUALS_MESSAGE if residuals else _CLOSURE_MESSAGE)


def as_number(name: str, value: Any) -> float:
    """A number from what users write: int, float, or a tensor or NumPy scalar with one entry.

    Raises:
        ArgumentError: if it is none; a truth value and a string are none.
    """
    single = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, bool | str) or not (single or hasattr(value, "__float__")):
        raise ArgumentError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"{name} must be a number, got {value!r}") from None


_CLOSURE_MESSAGE = """this method (or likelihood='from-loss') evaluates the mini-batch itself; give step() a closure:
    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)"""

_RESIDUALS_MESSAGE = """backend='residuals' evaluates residuals; give step() a function that returns them by name:
    def residuals():
        return {"fit": model(x) - y}
    optimizer.step(residuals)"""
