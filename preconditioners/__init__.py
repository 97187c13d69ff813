"""Floor 2: how curvature is stored, damped and inverted. Structures, factors, partitions, damping, linear algebra."""

from .averages import Average, MovingAverage, PlainAverage, RunningSum, ZeroStartAverage
from .damping.levenberg_marquardt import AdaptiveDamping, LevenbergMarquardt
from .damping.own_units import CurvatureUnits
from .damping.scheduled import Geometric, Scheduled
from .damping.split import ConstantDamping, Damping, Factored, MeanEigenvalues, SideDamping, Split
from .factors.bfgs import BFGS, HessianActionBFGS
from .factors.factor import Covariance, Factor, IdentityFactor
from .factors.gradient_products import Root
from .factors.lbfgs import LBFGS
from .factors.sharing import Expand, Reduce, Sharing, Sum
from .gradient_covariance import GradientCovariance
from .operations import AbsoluteInverse, Eigenvectors, Inverse, InverseRoot, PowerIteration
from .pairs.damping import DoubleDamping, MergedDoubleDamping, NoDamping, PairDamping, PowellB0, PowellH, PowellThenLM
from .pairs.initial_scale import ConstantScale, InitialScale, NewestPair
from .pairs.skipping import AngleTest, CurvatureTest, SkipRule, TwoSidedCurvatureTest
from .protocol import Observation, Preconditioner, Refining, Request, ScalingLaw, Schedule
from .state import NoState, State
from .structures.by_layer import ByLayer
from .structures.dense import Absolute, Dense, Semidefinite
from .structures.diagonal import Diagonal
from .structures.eigenbasis import Eigenbasis
from .structures.identity import Identity, Stateless
from .structures.kronecker import Kronecker
from .structures.mini_block import MiniBlock
from .structures.moments import GradientMoments, LayerMoments, Moments
from .structures.partitions import FlatChunk, Kernel, Partition, PerInputAveraged, PerOutput, PerOutputAveraged
from .structures.secant_blocks import SecantBlocks
from .structures.spectral import AspectRatio, MatchAdam, Spectral
from .whole.models import GaussNewton, Secant, Spring
from .whole.secant import FullBFGS, LimitedBFGS, SelfScaledBFGS, SelfScaledBroyden
from .whole.systems import ConjugateGradients, NormalEquations, ResidualKernel, SingularValues, SystemBySize

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
    "ConjugateGradients",
    "ConstantDamping",
    "ConstantScale",
    "Covariance",
    "CurvatureTest",
    "CurvatureUnits",
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
    "FullBFGS",
    "GaussNewton",
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
    "LimitedBFGS",
    "MatchAdam",
    "MeanEigenvalues",
    "MergedDoubleDamping",
    "MiniBlock",
    "Moments",
    "MovingAverage",
    "NewestPair",
    "NoDamping",
    "NoState",
    "NormalEquations",
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
    "ResidualKernel",
    "Root",
    "RunningSum",
    "ScalingLaw",
    "Schedule",
    "Scheduled",
    "Secant",
    "SecantBlocks",
    "SelfScaledBFGS",
    "SelfScaledBroyden",
    "Semidefinite",
    "Sharing",
    "SideDamping",
    "SingularValues",
    "SkipRule",
    "Spectral",
    "Split",
    "Spring",
    "State",
    "Stateless",
    "Sum",
    "SystemBySize",
    "TwoSidedCurvatureTest",
    "ZeroStartAverage",
]
