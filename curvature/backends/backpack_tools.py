"""What of BackPACK is used, imported when it is first needed, and the seeds that start its backward pass.

BackPACK starts from loss modules that it knows. Here it starts from a loss of ours, the inner product of the output
with a given vector, and every extension is told what to propagate from there: the likelihood's own roots, or the
gradient for labels that were drawn already. So any likelihood works, and all backends share the sampled labels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError

__all__ = ["EXTENSIONS", "Seed", "Watch", "extension", "mean_hessian", "tools"]

EXTENSIONS = ("batch_l2", "diag_ggn", "diag_ggn_mc", "diag_h", "kfac", "kflr", "kfra")
"""Quantities beside the record that can be asked of BackPACK, by the names of its fields."""


@cache
def tools() -> SimpleNamespace:
    """BackPACK's names that are used.

    Raises:
        ArgumentError: if it is not installed.
    """
    try:
        root, extensions = importlib.import_module("backpack"), importlib.import_module("backpack.extensions")
        base = importlib.import_module("backpack.extensions.backprop_extension")
        context = importlib.import_module("backpack.context")
        module = importlib.import_module("backpack.extensions.module_extension")
    except ImportError as error:
        raise ArgumentError(
            f"backend='backpack' needs the package backpack-for-pytorch ({error}); install it with "
            "pip install backpack-for-pytorch, or use backend='func'"
        ) from error
    return SimpleNamespace(
        activate=root.backpack,
        extend=root.extend,
        handles=context.CTX,
        extensions=extensions,
        Extension=base.BackpropExtension,
        ModuleExtension=module.ModuleExtension,
    )


class Seed(nn.modules.loss._Loss):
    """The inner product of the model's output with a constant; the gradient at the output is that constant.

    Args:
        vector: of the output's shape.
    """

    def __init__(self, vector: Tensor):
        super().__init__()
        self.vector = vector

    def forward(self, output: Tensor) -> Tensor:
        """0-dimensional."""
        return (output * self.vector).sum()


def extension(name: str, start: Any) -> Any:
    """An extension of BackPACK by the name of its class that propagates ``start`` from a :class:`Seed`.

    Args:
        name: e.g. ``"DiagGGNExact"``.
        start: the quantity at the model's output; ``None`` for extensions of first order.
    """
    result = getattr(tools().extensions, name)()
    if start is not None:
        result.set_module_extension(Seed, _starter()(start))
    return result


@cache
def _starter() -> Callable[[Any], Any]:
    class Start(tools().ModuleExtension):  # type: ignore[misc]
        """Hands out the quantity at the model's output."""

        def __init__(self, start: Any):
            super().__init__()
            self._start = start

        def backpropagate(self, ext: Any, module: Any, g_inp: Any, g_out: Any, quantities: Any) -> Any:
            """The start, whatever the loss."""
            return self._start

    return Start


class Watch:
    """Inputs, gradients and backpropagated roots of chosen modules during one backward pass.

    Args:
        modules: what is watched.
        roots: the ``SqrtGGN`` extension whose quantity is read off at the modules' outputs, before it runs.
    """

    def __init__(self, modules: Sequence[nn.Module], roots: Any = None):
        self.inputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.roots: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self._watched = {id(module) for module in modules}
        self._sqrt = roots

    def extension(self) -> Any:
        """This object as an extension of BackPACK."""
        see = self._see

        class Seen(tools().Extension):  # type: ignore[misc]
            """Only looks on."""

            def expects_backpropagation_quantities(self) -> bool:
                """Nothing is propagated."""
                return False

            def __call__(self, module: Any, g_inp: Any, g_out: Any) -> None:
                """Look at one module."""
                see(module, g_out)

        return Seen(savefield="osculate", module_exts={})

    def _see(self, module: Any, g_out: tuple[Tensor | None, ...]) -> None:
        key = id(module)
        if key not in self._watched:
            return
        self.counts[key] = self.counts.get(key, 0) + 1
        self.inputs[key] = module.input0.detach()
        if g_out[0] is not None:
            self.gradients[key] = g_out[0].detach()
        if self._sqrt is not None:
            found = self._sqrt.saved_quantities.retrieve_quantity(module.output.data_ptr(), False)
            if isinstance(found, Tensor):
                self.roots[key] = found.detach()


def mean_hessian(roots: Tensor) -> Tensor:
    """(D, D): mean over samples of the output's curvature, from its roots (V, N, ...)."""
    flat = roots.flatten(2)
    return torch.einsum("vni,vnj->ij", flat, flat) / flat.shape[1]
