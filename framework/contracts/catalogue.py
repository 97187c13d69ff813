"""All contracts."""

from __future__ import annotations

from . import (
    dampings,
    estimators,
    guards,
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
    *dampings.CONTRACTS,
    *rules.CONTRACTS,
    *guards.CONTRACTS,
    *estimators.CONTRACTS,
    *steps.CONTRACTS,
    *signs.CONTRACTS,
    *likelihoods.CONTRACTS,
    *methods.CONTRACTS,
)
