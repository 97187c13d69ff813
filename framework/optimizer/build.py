"""The front door: a method by name, or your own composition, applied to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ...curvature.backends.outputs import Choice
from ...curvature.likelihoods import Likelihood
from ...errors import ArgumentError, UnknownNameError, near_misses
from ..methods import registry
from ..methods.method import Method
from ..methods.registry import MethodEntry
from ..whole_model.method import WholeEntry, WholeMethod, whole_method, whole_methods
from ..whole_model.optimizer import WholeModel
from .second_order import SecondOrder

__all__ = ["build"]


_Whole = Literal["lm", "engd", "spring", "bfgs", "ssbfgs", "ssbroyden", "lbfgs"]


@overload
def build(
    method: _Whole | WholeMethod,
    model: nn.Module,
    *,
    damping: float | None = None,
    on_nonfinite: str = "raise",
    **options: Any,
) -> WholeModel: ...


@overload
def build(
    method: str | Method,
    model: nn.Module,
    *,
    lr: float | None = None,
    damping: float | None = None,
    weight_decay: float | None = None,
    likelihood: str | Likelihood | Mapping[str | int, str | Likelihood] | None = None,
    output: Choice = None,
    loss_reduction: str = "mean",
    seed: int = 0,
    strict: bool = False,
    on_nonfinite: str = "raise",
    groups: Sequence[Mapping[str, Any]] | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    backend: str = "hooks",
    samples: int | Callable[[Any], Tensor] = 0,
    process_group: Any = "auto",
    certify_records: str = "start",
    division: str = "auto",
    **options: Any,
) -> SecondOrder: ...


def build(
    method: str | Method | WholeMethod,
    model: nn.Module,
    *,
    lr: float | None = None,
    damping: float | None = None,
    weight_decay: float | None = None,
    likelihood: str | Likelihood | Mapping[str | int, str | Likelihood] | None = None,
    output: Choice = None,
    loss_reduction: str = "mean",
    seed: int = 0,
    strict: bool = False,
    on_nonfinite: str = "raise",
    groups: Sequence[Mapping[str, Any]] | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    backend: str = "hooks",
    samples: int | Callable[[Any], Tensor] = 0,
    process_group: Any = "auto",
    certify_records: str = "start",
    division: str = "auto",
    **options: Any,
) -> SecondOrder | WholeModel:
    """Build an optimizer.

    Args:
        method: a registered name (``osculate methods`` lists them) or a :class:`Method`; or the name of a method over
            the whole model (``"lm"``, ``"bfgs"``, ...) or a :class:`~osculate.WholeMethod`, which take ``damping`` and
            ``on_nonfinite`` alone: see :class:`~osculate.WholeModel`.
        model: the module to train.
        lr: learning rate >= 0; a multiplier (default 1) for methods that choose their steps. ``None``: the default.
        damping: lambda >= 0; ``None``: the default.
        weight_decay: >= 0; ``None``: the default.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"`` or a ``Likelihood``, for methods that sample
            labels from the model; the weights of samples in the loss are read off its gradient. ``"from-loss"``: the
            curvature of any twice differentiable loss, in ``step(closure)``. For a model with several heads a
            dictionary, from the name or index of each head in what the model returns to its likelihood:
            ``{"policy": "categorical", "value": "gaussian"}``.
        output: which tensor of what the model returns the likelihood reads: a name (a key or an attribute), an index,
            or a function of what the model returns. ``None``: the only tensor, ``.logits`` or the key ``"logits"``.
        loss_reduction: ``"mean"`` or ``"sum"`` over samples. Curvature is counted per sample either way: with a sum a
            method with an lr takes the steps of the mean at lr / N (``mbf``: lr N), one without an lr the same.
        seed: of the sampled labels.
        strict: refuse parameters that no part serves, and matrices that ``ByLayer`` serves by its ``otherwise``.
            Otherwise a :class:`~osculate.FallbackWarning` names them if they are more than a fifth of the model.
        on_nonfinite: ``"raise"`` or ``"skip"``.
        groups: torch's parameter groups, ``[{"params": ["*.bias"], "weight_decay": 0.0}, ...]``: ``"params"`` holds
            parameters or shell patterns of their names; ``lr``, ``damping`` and ``weight_decay`` default to the
            values above. Parameters in no group form one more, the last. ``lr`` and ``damping`` are one number per
            layer; ``weight_decay`` may differ within a layer.
        grad_scaler: the ``torch.amp.GradScaler`` of the loop, if there is one.
        backend: who measures the curvature: ``"hooks"`` (fast), ``"func"`` (``torch.func``, exact, any module) or
            ``"backpack"`` (BackPACK, for the layers it knows).
        samples: which axis of the model's output counts the samples of a mini-batch (1 for a time-major output), or a
            function of the output that returns it as (N, ...), e.g. ``lambda out: out.unflatten(0, (-1, tokens))``.
            From there the sample of every row of every layer is found out. Likelihoods read the output in that form.
        process_group: the processes that share a mini-batch: ``"auto"`` (the world group, if ``torch.distributed`` is
            initialised), ``None`` (every process for itself) or a group. Methods that look back take the
            ``DistributedDataParallel`` itself as ``model``.
        certify_records: when what was recorded of the layers is compared, along a random direction, with the gradients
            that it must explain: ``"always"``, ``"start"`` (the first ten steps, and every hundredth) or ``"never"``.
        division: who has the states where several processes share a mini-batch: ``"replicated"`` (every process all of
            them), ``"owners"`` (each layer one process, which alone computes its inverses and directions),
            ``"owners-only"`` (which alone gets its gradient, too), or ``"auto"``: ``"owners"`` where parameters are
            sharded, else ``"replicated"``.
        **options: options of the registered method, e.g. ``memory=20`` for ``kbfgs-l``.

    Example:
        >>> import torch, osculate as osc
        >>> optimizer = osc.build("kfac", torch.nn.Linear(3, 2), likelihood="gaussian")

    Raises:
        ArgumentError: for a value out of range, an unknown name, or options beside a ready :class:`Method`.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself, not its parameters, "
            "after the method: osculate.build(method, model)"
        )
    if isinstance(method, str):
        _require_options(method, options)
    if isinstance(method, WholeMethod) or (isinstance(method, str) and method in whole_methods()):
        given = {
            "lr": (lr, None),
            "weight_decay": (weight_decay, None),
            "likelihood": (likelihood, None),
            "output": (output, None),
            "loss_reduction": (loss_reduction, "mean"),
            "groups": (groups, None),
            "grad_scaler": (grad_scaler, None),
            "backend": (backend, "hooks"),
            "samples": (samples, 0),
            "division": (division, "auto"),
        }
        return _build_whole(method, model, damping, on_nonfinite, options, given)
    if not isinstance(method, str | Method):
        raise ArgumentError(
            f"method must be a registered name or a Method, got {type(method).__name__}; put parts together with "
            "osculate.Method(...)"
        )
    if isinstance(method, Method):
        if options:
            raise ArgumentError(f"a composed Method takes no options, got {', '.join(options)}; set them on its parts")
        composed = method
    else:
        composed = registry.method(method, **options)
    return SecondOrder(
        model,
        composed,
        lr=lr,
        damping=damping,
        weight_decay=weight_decay,
        likelihood=likelihood,
        output=output,
        loss_reduction=loss_reduction,
        seed=seed,
        strict=strict,
        on_nonfinite=on_nonfinite,
        groups=groups,
        grad_scaler=grad_scaler,
        backend=backend,
        samples=samples,
        process_group=process_group,
        certify_records=certify_records,
        division=division,
    )


def _require_options(name: str, options: Mapping[str, Any]) -> None:
    """A method exists, and a keyword is an option of it; what ``build`` itself takes may be meant, too.

    Raises:
        UnknownNameError: with the near misses among the methods, or among both, and where to see all.
    """
    entries: Mapping[str, MethodEntry | WholeEntry] = {**registry.methods(), **whole_methods()}
    if name not in entries:
        raise UnknownNameError("method", name, entries)
    known = entries[name].options
    for option in options:
        if option in known:
            continue
        taken = inspect.signature(build).parameters.values()
        own = [entry.name for entry in taken if entry.kind is entry.KEYWORD_ONLY]
        if isinstance(entries[name], WholeEntry):
            own = ["damping", "on_nonfinite"]
        near = near_misses(option, [*known, *own])
        raise UnknownNameError(
            f"option of {name}",
            option,
            [*known, *own] if near else known,
            f"'osculate methods {name}' in a shell explains all options, help(osculate.build) the arguments that are "
            f"not the method's own: {', '.join(own[:3])} ...",
        )


def _build_whole(
    method: str | WholeMethod,
    model: nn.Module,
    damping: float | None,
    on_nonfinite: str,
    options: Mapping[str, Any],
    given: Mapping[str, tuple[Any, Any]],
) -> WholeModel:
    """An optimizer over the whole model, which has no use for most of what others are told."""
    for name, (value, default) in given.items():
        if value is not default and value != default:
            way_out = {
                "lr": "it searches for the length of every step",
                "weight_decay": "add a block of residuals, {'decay': Residual(theta, weight=...)}",
                "likelihood": "its curvature is that of the residuals that step() is given",
            }.get(name, "it works on all parameters and on what the function of residuals returns")
            raise ArgumentError(f"a method over the whole model takes no {name}, got {value!r}: {way_out}")
    if isinstance(method, WholeMethod):
        if options:
            raise ArgumentError(f"a WholeMethod takes no options, got {', '.join(options)}; set them on its parts")
        return WholeModel(model, method, damping=damping, on_nonfinite=on_nonfinite)
    return WholeModel(model, whole_method(method, **options), damping=damping, on_nonfinite=on_nonfinite)
