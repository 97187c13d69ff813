"""All contracts."""

from __future__ import annotations

from . import (
    estimators,
    invariances,
    likelihoods,
    matrices,
    methods,
    pairs,
    partitions,
    rules,
    signs,
    steps,
    structures,
)
from .contract import Contract

__all__ = ["CONTRACTS"]

CONTRACTS: tuple[Contract, ...] = (
    *structures.CONTRACTS,
    *invariances.CONTRACTS,
    *partitions.CONTRACTS,
    *matrices.CONTRACTS,
    *pairs.CONTRACTS,
    *rules.CONTRACTS,
    *estimators.CONTRACTS,
    *steps.CONTRACTS,
    *signs.CONTRACTS,
    *likelihoods.CONTRACTS,
    *methods.CONTRACTS,
)
