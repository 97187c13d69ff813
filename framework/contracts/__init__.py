"""Contracts: what every part of a kind promises, checked on small networks; shipped so that your parts can be too.

``certify(part)`` runs every contract of the part's kind and returns a table of what held. Nothing here needs more than
torch; :mod:`osculate.strategies` has the same ingredients for Hypothesis.
"""

from .cases import CASES, Case, MeanOverPositions
from .certificate import CONTRACTS, Certificate, Row, certify, contracts_for
from .contract import (
    Contract,
    ContractViolation,
    NotApplicable,
    contract,
    require,
    require_close,
    require_equal,
    require_finite,
    require_same_state,
    require_symmetric,
)
from .methods import Training
from .subjects import KINDS, Subject, kind_of, registered_subjects, resolve, subjects_of
from .workbench import Workbench

__all__ = [
    "CASES",
    "CONTRACTS",
    "KINDS",
    "Case",
    "Certificate",
    "Contract",
    "ContractViolation",
    "MeanOverPositions",
    "NotApplicable",
    "Row",
    "Subject",
    "Training",
    "Workbench",
    "certify",
    "contract",
    "contracts_for",
    "kind_of",
    "registered_subjects",
    "require",
    "require_close",
    "require_equal",
    "require_finite",
    "require_same_state",
    "require_symmetric",
    "resolve",
    "subjects_of",
]
