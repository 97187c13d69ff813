"""Every theorem that can be checked, by its name in docs/PAPERS.md section 6."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import UnknownNameError
from ..theorem import Theorem
from . import (
    bfgs_bounds,
    convolution_factors,
    input_factor,
    joint_layer_steps,
    layer_hessian,
    layer_steps,
    limited_memory,
    line_search,
    linear_limit,
    mini_block_convergence,
    mini_blocks,
    natural_gradient_limit,
    quadratic_forms,
    residual_steps,
    secant_pairs,
    stochastic,
)

__all__ = ["THEOREMS", "find_theorems"]

_FILES: tuple[tuple[Theorem, ...], ...] = (
    layer_hessian.THEOREMS,
    secant_pairs.THEOREMS,
    bfgs_bounds.THEOREMS,
    limited_memory.THEOREMS,
    input_factor.THEOREMS,
    stochastic.THEOREMS,
    convolution_factors.THEOREMS,
    mini_blocks.THEOREMS,
    quadratic_forms.THEOREMS,
    line_search.THEOREMS,
    linear_limit.THEOREMS,
    mini_block_convergence.THEOREMS,
    natural_gradient_limit.THEOREMS,
    layer_steps.THEOREMS,
    joint_layer_steps.THEOREMS,
    residual_steps.THEOREMS,
    # a file with theorems of its own adds one line here
)

THEOREMS: dict[str, Theorem] = {
    theorem.name: theorem
    for theorem in sorted((entry for file in _FILES for entry in file), key=lambda entry: int(entry.name[1:]))
}
"""From ``"T1"`` on, in the order of their numbers."""


def find_theorems(names: Iterable[str] = ()) -> tuple[Theorem, ...]:
    """The theorems of these names, each once, in the order of the catalogue; without names all of them.

    Args:
        names: e.g. ``("T2", "t11")``; upper and lower case are one.

    Raises:
        UnknownNameError: if a name is not in the catalogue; the message lists the near misses.
    """
    wanted = {name.upper() for name in names}
    for name in sorted(wanted):
        if name not in THEOREMS:
            raise UnknownNameError("theorem", name, THEOREMS)
    return tuple(theorem for name, theorem in THEOREMS.items() if not wanted or name in wanted)
