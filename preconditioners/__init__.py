"""Floor 2: how curvature is stored, damped and inverted. Structures, factors, partitions, damping, linear algebra."""

from .averages import Average, MovingAverage, PlainAverage, RunningSum, ZeroStartAverage
from .bfgs import BFGS, HessianActionBFGS
from .by_layer import ByLayer
from .damping import ConstantDamping, Damping, Factored, MeanEigenvalues, SideDamping, Split
from .dense import Absolute, Dense, Semidefinite
from .diagonal import Diagonal
from .eigenbasis import Eigenbasis
from .factors import Covariance, Factor, IdentityFactor
from .gradient_covariance import GradientCovariance
from .identity import Identity, Stateless
from .initial_scale import ConstantScale, InitialScale, NewestPair
from .kronecker import Kronecker
from .lbfgs import LBFGS
from .levenberg_marquardt import AdaptiveDamping, LevenbergMarquardt
from .mini_block import MiniBlock
from .moments import GradientMoments, LayerMoments, Moments
from .operations import AbsoluteInverse, Eigenvectors, Inverse, InverseRoot, PowerIteration
from .pairs import (
    DoubleDamping,
    MergedDoubleDamping,
    NoDamping,
    PairDamping,
    PowellB0,
    PowellH,
    PowellThenLM,
)
from .partitions import FlatChunk, Kernel, Partition, PerInputAveraged, PerOutput, PerOutputAveraged
from .protocol import Observation, Preconditioner, Refining, Request, ScalingLaw, Schedule
from .root import Root
from .scheduled import Geometric, Scheduled
from .secant_blocks import SecantBlocks
from .sharing import Expand, Reduce, Sharing, Sum
from .skipping import AngleTest, CurvatureTest, SkipRule, TwoSidedCurvatureTest
from .spectral import AspectRatio, MatchAdam, Spectral
from .state import NoState, State

__all__ = [
    "BFGS",
    "LBFGS",
    "Absolute",
    "AbsoluteInverse",
    "AdaptiveDamping",
    "AngleTest",
    "AspectRatio",
    "Average",
    "ByLayer",
    "ConstantDamping",
    "ConstantScale",
    "Covariance",
    "CurvatureTest",
    "Damping",
    "Dense",
    "Diagonal",
    "DoubleDamping",
    "Eigenbasis",
    "Eigenvectors",
    "Expand",
    "Factor",
    "Factored",
    "FlatChunk",
    "Geometric",
    "GradientCovariance",
    "GradientMoments",
    "HessianActionBFGS",
    "Identity",
    "IdentityFactor",
    "InitialScale",
    "Inverse",
    "InverseRoot",
    "Kernel",
    "Kronecker",
    "LayerMoments",
    "LevenbergMarquardt",
    "MatchAdam",
    "MeanEigenvalues",
    "MergedDoubleDamping",
    "MiniBlock",
    "Moments",
    "MovingAverage",
    "NewestPair",
    "NoDamping",
    "NoState",
    "Observation",
    "PairDamping",
    "Partition",
    "PerInputAveraged",
    "PerOutput",
    "PerOutputAveraged",
    "PlainAverage",
    "PowellB0",
    "PowellH",
    "PowellThenLM",
    "PowerIteration",
    "Preconditioner",
    "Reduce",
    "Refining",
    "Request",
    "Root",
    "RunningSum",
    "ScalingLaw",
    "Schedule",
    "Scheduled",
    "SecantBlocks",
    "Semidefinite",
    "Sharing",
    "SideDamping",
    "SkipRule",
    "Spectral",
    "Split",
    "State",
    "Stateless",
    "Sum",
    "TwoSidedCurvatureTest",
    "ZeroStartAverage",
]
