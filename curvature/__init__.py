"""Floor 1: what is measured. Layers, statistics, capture, likelihoods, estimators, quadratic forms."""

from .backends.capture import Capture, Record
from .estimators import BatchMean, EmpiricalFisher, Estimator, InputsOnly, SampledBatchMean, SampledFisher, SecantPairs
from .exact_estimators import ExactGGN, ExactHessianBlock
from .layers.layer import Layer, LayerAdapter, discover_layers
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from .quadratic_forms import (
    ExactHessian,
    HessianRowSums,
    QuadraticForm,
    SampledBatchScores,
    SampledScores,
    SignedHessian,
)
from .records.statistics import LayerStatistics, Needs, SampleGradients
from .with_pairs import WithPairs

__all__ = [
    "BatchMean",
    "Bernoulli",
    "Capture",
    "Categorical",
    "EmpiricalFisher",
    "Estimator",
    "ExactGGN",
    "ExactHessian",
    "ExactHessianBlock",
    "Gaussian",
    "HessianRowSums",
    "InputsOnly",
    "Layer",
    "LayerAdapter",
    "LayerStatistics",
    "Likelihood",
    "Needs",
    "QuadraticForm",
    "Record",
    "SampleGradients",
    "SampledBatchMean",
    "SampledBatchScores",
    "SampledFisher",
    "SampledScores",
    "SecantPairs",
    "SignedHessian",
    "WithPairs",
    "discover_layers",
]
