"""What a replay reads off an optimizer, under the names that the recorded files use.

Recorded pairs are old minus new, the library's new minus old: ``s`` and ``y`` change sign. A recorded ``ema`` e is the
0.9/0.1 average, the library's momentum M = e / 0.1 heavy ball; the recorded second moment of e is not bias-corrected,
the library's second moment of M is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...framework import HeavyBall, SecondOrder
from ...framework.optimizer.blocks import Block
from ...preconditioners.factors.bfgs import BFGSState, HessianActionState
from ...preconditioners.factors.factor import CovarianceState
from ...preconditioners.factors.lbfgs import LBFGSState
from ...preconditioners.structures.diagonal import DiagonalState
from ...preconditioners.structures.kronecker import Kronecker, KroneckerState
from ...preconditioners.structures.mini_block import MiniBlockState
from .replay_methods import Log

__all__ = ["Observer", "load_initial"]

_LETTERS = {"weight": "W", "bias": "b"}

_INITIAL = {"A": ("inputs", "second_moment"), "G": ("outputs", "second_moment"), "F": ("blocks",)}
"""Where the saved state of a block keeps what a warm start makes."""


class Observer:
    """Names of the recorded format to tensors.

    Args:
        optimizer: the running optimizer.
        layers: the model's modules with parameters; the l-th is layer l.
        log: what the watched parts wrote.
    """

    def __init__(self, optimizer: SecondOrder, layers: list[nn.Module], log: Log):
        self.optimizer, self.log, self.count = optimizer, log, len(layers)
        self.blocks = [(layers.index(block.layer.module), block) for block in optimizer.blocks]

    def initial(self) -> dict[str, Tensor]:
        """After the warm start: ``A_init_l``, ``G_init_l``, ``F_init_l``."""
        found = {name: value for l, block in self.blocks for name, value in _of_state(l, block)}
        return {f"{name[0]}_init_{name[2:]}": found[name] for name in found if re.fullmatch(r"[AGF]_\d+", name)}

    def after_step(self) -> dict[str, Tensor]:
        """After an iteration."""
        found = self._of_log()
        for l, block in self.blocks:
            found |= dict(self._of_parameters(l, block)) | dict(_of_state(l, block))
        return found

    def _of_parameters(self, l: int, block: Block) -> Iterator[tuple[str, Tensor]]:
        suffixes = [f"{_LETTERS.get(name, name)}_{l}" for name in block.names]
        for suffix, parameter, momentum in zip(suffixes, block.parameters, block.views, strict=True):
            yield suffix, parameter.detach()
            yield f"momentum_{suffix}", momentum
            if parameter.grad is not None:
                yield f"grad_{suffix}", parameter.grad
        if isinstance(block.state, DiagonalState) and isinstance(self.optimizer.method.momentum, HeavyBall):
            share = 1.0 - self.optimizer.method.momentum.decay
            for suffix, momentum, moment in zip(suffixes, block.views, block.state.second_moment, strict=True):
                yield f"ema_{suffix}", share * momentum
                yield f"v_{suffix}", share**2 * block.state.weight * moment

    def _of_log(self) -> dict[str, Tensor]:
        if not self.log.outputs:
            return {}
        flags = {name: torch.zeros(self.count) for name in ("damped_powell", "damped_lm", "status_H_g", "status_H_a")}
        paired = [l for l, block in self.blocks if isinstance(block.state, KroneckerState)]
        found: dict[str, Tensor] = {}
        for l, pair, outer, inner in zip(paired, self.log.pairs, self.log.outputs, self.log.inputs, strict=True):
            found[f"s_{l}"], found[f"y_{l}"] = -pair.step, -pair.change
            values = (pair.first, pair.second, outer["rejected_pairs"], inner["rejected_pairs"])
            for flag, value in zip(flags.values(), values, strict=True):
                flag[l] = value
        return found | flags


def _of_state(l: int, block: Block) -> Iterator[tuple[str, Tensor]]:
    state, part = block.state, block.part
    if isinstance(state, KroneckerState) and isinstance(part, Kronecker):
        inputs, outputs = state.inputs, state.outputs
        if isinstance(inputs, HessianActionState | CovarianceState):
            yield f"A_{l}", inputs.second_moment
            yield f"{'H_a' if isinstance(inputs, HessianActionState) else 'A_inv'}_{l}", inputs.inverse
        if isinstance(outputs, BFGSState | LBFGSState):
            yield f"H_g_{l}", part.outputs.to_dense(outputs, 0.0)
            yield f"s_avg_{l}", -outputs.pair.step
            yield f"y_avg_{l}", -outputs.pair.change
        elif isinstance(outputs, CovarianceState):
            yield f"G_{l}", outputs.second_moment
            yield f"G_inv_{l}", outputs.inverse
    elif isinstance(state, MiniBlockState):
        shape = block.parameters[0].shape[:2] if block.layer.kind == "Conv2d" and not part.joint else None
        for name, value in (("F", state.blocks), ("F_inv", state.inverse)):
            yield f"{name}_{l}", value if shape is None else value.unflatten(0, shape)


def load_initial(observer: Observer, arrays: Mapping[str, Tensor], warm: bool) -> None:
    """Put recorded ``A_init_l``, ``G_init_l``, ``F_init_l`` into an optimizer as if its warm start had made them.

    Args:
        observer: of the optimizer.
        arrays: by name; others are ignored.
        warm: whether the first step is to treat them as fresh (mini-batch mode).
    """
    optimizer = observer.optimizer
    saved = optimizer.state_dict()
    for l, block in observer.blocks:
        for letter, path in _INITIAL.items():
            value, entry = arrays.get(f"{letter}_init_{l}"), saved["state"][block.key]["state"]
            for name in path[:-1]:
                entry = entry.get(name, {})
            if value is not None and path[-1] in entry:
                entry[path[-1]] = value.reshape(entry[path[-1]].shape)
                entry["weight"] = 1.0
    saved["progress"]["warm"] = warm
    optimizer.load_state_dict(saved)
