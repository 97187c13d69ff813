"""Floor 1: what is measured. Layers, statistics, capture, likelihoods, estimators, quadratic forms."""

from .backends.capture import Capture
from .estimators import (
    BatchMean,
    EmpiricalFisher,
    Estimator,
    ExactGGN,
    ExactHessianBlock,
    InputsOnly,
    SampledBatchMean,
    SampledFisher,
    SecantPairs,
    WithPairs,
)
from .layers.discovery import discover_layers
from .layers.layer import Layer, LayerAdapter
from .layers.recognition import register_adapter
from .likelihoods import Bernoulli, Categorical, FromLoss, Gaussian, Likelihood
from .quadratic_forms import (
    ExactHessian,
    HessianRowSums,
    QuadraticForm,
    SampledBatchScores,
    SampledScores,
    SignedHessian,
)
from .records.needs import Needs, Record
from .records.statistics import LayerStatistics, SampleGradients
from .residuals.derivatives import Derivatives, derivatives
from .residuals.penalty import Cauchy, HalfSquare, Huber, Penalty, PseudoHuber
from .residuals.residual import Residual

__all__ = [
    "BatchMean",
    "Bernoulli",
    "Capture",
    "Categorical",
    "Cauchy",
    "Derivatives",
    "EmpiricalFisher",
    "Estimator",
    "ExactGGN",
    "ExactHessian",
    "ExactHessianBlock",
    "FromLoss",
    "Gaussian",
    "HalfSquare",
    "HessianRowSums",
    "Huber",
    "InputsOnly",
    "Layer",
    "LayerAdapter",
    "LayerStatistics",
    "Likelihood",
    "Needs",
    "Penalty",
    "PseudoHuber",
    "QuadraticForm",
    "Record",
    "Residual",
    "SampleGradients",
    "SampledBatchMean",
    "SampledBatchScores",
    "SampledFisher",
    "SampledScores",
    "SecantPairs",
    "SignedHessian",
    "WithPairs",
    "derivatives",
    "discover_layers",
    "register_adapter",
]
