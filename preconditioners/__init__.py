"""Floor 2: how curvature is stored, damped and inverted. Structures, factors, partitions, damping, linear algebra."""

from .averages import Average, MovingAverage, PlainAverage, RunningSum, ZeroStartAverage
from .bfgs import BFGS, HessianActionBFGS
from .by_layer import ByLayer
from .damping import ConstantDamping, Damping, SideDamping, Split
from .diagonal import Diagonal
from .factors import Covariance, Factor, IdentityFactor
from .identity import Identity
from .kronecker import Kronecker
from .lbfgs import LBFGS
from .mini_block import MiniBlock
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
from .protocol import Observation, Preconditioner, Request, Schedule
from .skipping import CurvatureTest, SkipRule, TwoSidedCurvatureTest
from .state import NoState, State

__all__ = [
    "BFGS",
    "LBFGS",
    "Average",
    "ByLayer",
    "ConstantDamping",
    "Covariance",
    "CurvatureTest",
    "Damping",
    "Diagonal",
    "DoubleDamping",
    "Factor",
    "FlatChunk",
    "HessianActionBFGS",
    "Identity",
    "IdentityFactor",
    "Kernel",
    "Kronecker",
    "MergedDoubleDamping",
    "MiniBlock",
    "MovingAverage",
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
    "Preconditioner",
    "Request",
    "RunningSum",
    "Schedule",
    "SideDamping",
    "SkipRule",
    "Split",
    "State",
    "TwoSidedCurvatureTest",
    "ZeroStartAverage",
]
