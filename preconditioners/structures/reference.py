"""The reference mode of a method: the same composition, preconditioned by solves with dense matrices.

A structure keeps factors, blocks or eigenbases and multiplies with stored inverses; its reference writes the whole
damped matrix of a layer down (``to_dense``) and solves with it in double precision. What the two share is how
statistics are averaged; what they do not share is everything that makes a structure fast: layouts, batching, stored
inverses, products with factors. Both run the same schedule, so their trajectories agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import StructureDeclarations, declared, derived
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import LOOKING_BACK, Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import CompatibilityError
from ..averages import Average
from ..damping.split import MeanEigenvalues, SideDamping, TwoSided
from ..linalg import Computed
from ..protocol import Events, Observation, Preconditioner, Request, Schedule, refining
from ..state import State
from .by_layer import ByLayer
from .identity import Identity
from .kronecker import Kronecker, KroneckerState

__all__ = ["DenseReference", "reference_of", "reference_of_part"]


def reference_of(part: Preconditioner | ByLayer) -> Preconditioner | ByLayer:
    """A structure, or a mixture of structures by layer, with every structure replaced by its dense reference."""
    if not isinstance(part, ByLayer):
        return reference_of_part(part)
    otherwise = None if part.otherwise is None else reference_of_part(part.otherwise)
    return ByLayer({key: reference_of(entry) for key, entry in part.table.items()}, otherwise)


def reference_of_part(part: Preconditioner) -> Preconditioner:
    """A structure's dense reference, or what it brings instead: rules not linear in the momentum have no matrix."""
    own: Callable[[], Preconditioner] | None = declared(part, StructureDeclarations).reference
    if own is not None:
        return own()
    return part if isinstance(part, Identity) else DenseReference(part)


@dataclass
class ReferenceState(State):
    """The structure's own state, what its last refresh saw, and the damping now and then."""

    live: State
    frozen: State
    live_damping: Tensor
    frozen_damping: Tensor
    layer: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the layer."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self) if entry.name != "layer"}

    def written(self) -> Iterator[Tensor]:
        """All of it: a refresh copies one state into the other."""
        return self.tensors()

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy saved values into place."""
        for name in ("live", "frozen"):
            getattr(self, name).load_dict(values[name])
        for name in ("live_damping", "frozen_damping"):
            getattr(self, name).copy_(values[name])


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, State) else value


@dataclass(frozen=True)
class DenseReference(StructureDeclarations, forwards="part"):
    """A structure whose ``precondition`` solves with the dense matrix of another one.

    Args:
        part: the structure; linear in the momentum, with ``to_dense``.

    Raises:
        CompatibilityError: if the structure's inverses lag.

    Memory: that of ``part`` twice, and d^2 numbers of double precision per layer while it solves. For small layers.
    """

    part: Preconditioner
    numbers = bounds = reference = partition = None

    def __post_init__(self) -> None:
        if self.part.schedule.lag:
            raise CompatibilityError(
                f"the dense reference of {type(self.part).__name__} solves with what it sees now, and its schedule has "
                f"lag={self.part.schedule.lag}; take the reference of the structure with lag=0"
            )

    @property
    def needs(self) -> Needs:
        """As the structure."""
        return self.part.needs

    @property
    def schedule(self) -> Schedule:
        """As the structure."""
        return self.part.schedule

    @property
    def joint(self) -> bool:
        """As the structure."""
        return self.part.joint

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """As the structure."""
        return self.part.serves(layer)

    def init(self, layer: Layer, parameters: Tensors) -> ReferenceState:
        """Two copies of the structure's fresh state."""
        nothing = torch.zeros(3, dtype=torch.float64)
        live, frozen = self.part.init(layer, parameters), self.part.init(layer, parameters)
        return ReferenceState(live, frozen, nothing, nothing.clone(), layer)

    def update(self, state: ReferenceState, observation: Observation, average: Average | None = None) -> None:
        """The structure's own rule."""
        self.part.update(state.live, observation, average)

    def without_eigenvalues(self) -> tuple[str, ...] | None:
        """As the structure."""
        return self.part.without_eigenvalues() if isinstance(self.part, TwoSided) else None

    def mean_eigenvalues(self, state: ReferenceState) -> MeanEigenvalues:
        """Those of the structure."""
        assert isinstance(self.part, TwoSided)
        return self.part.mean_eigenvalues(state.live)

    @derived
    def mean_eigenvalue(self) -> Any:
        """That of the structure."""
        own = declared(self.part, StructureDeclarations).mean_eigenvalue
        return None if own is None else lambda state: own(state.live)

    def matrices(self, state: ReferenceState, damping: SideDamping) -> Sequence[Request]:
        """What the structure asks for: states that keep an inverse as their approximation start from it."""
        for target in (state.live_damping, state.frozen_damping):
            target.copy_(torch.tensor([damping.whole, damping.inputs, damping.outputs], dtype=torch.float64))
        return self.part.matrices(state.live, damping)

    def install(self, state: ReferenceState, results: Sequence[Computed]) -> None:
        """Remember what this refresh saw."""
        self.part.install(state.live, results)
        state.frozen.load_dict(deepcopy(state.live.to_dict()))

    refines = True

    def refine(self, state: ReferenceState, observation: Observation) -> None:
        """The structure's own rule, if it has one."""
        if (part := refining(self.part)) is not None:
            part.refine(state.live, observation)

    def precondition(self, state: ReferenceState, momentum: Tensors) -> Tensors:
        """Solve with the dense matrix over the entries of (weight, bias)."""
        layer: Layer = state.layer
        damping = SideDamping(*state.frozen_damping.tolist())
        matrix = self.part.to_dense(_mixed(self.part, state), layer, damping).double()
        order = _order_of_entries(self.part, layer, momentum)
        vector = torch.cat([value.flatten() for value in momentum])[order].double()
        solution = torch.cholesky_solve(vector.unsqueeze(1), torch.linalg.cholesky(matrix)).squeeze(1)
        result = torch.empty_like(solution)
        result[order] = solution
        pieces = result.to(momentum[0].dtype).split([value.numel() for value in momentum])
        return tuple(piece.reshape(value.shape) for piece, value in zip(pieces, momentum, strict=True))

    def observe_step(
        self, state: ReferenceState, before: LayerStatistics, after: LayerStatistics | None, damping: SideDamping
    ) -> Events:
        """The structure's own rule."""
        return self.part.observe_step(state.live, before, after, damping)

    def to_dense(self, state: ReferenceState, layer: Layer, damping: SideDamping) -> Tensor:
        """That of the structure."""
        return self.part.to_dense(state.live, layer, damping)


def _mixed(part: Preconditioner, state: ReferenceState) -> State:
    """The state that the structure multiplies with now.

    Quasi-Newton factors change after every step, structures without inverses at every step, and so do squares in an
    eigenbasis; what is inverted on a schedule stays as the last refresh saw it.
    """
    if isinstance(part, Kronecker):
        live, frozen = state.live, state.frozen
        assert isinstance(live, KroneckerState) and isinstance(frozen, KroneckerState)
        inputs = live.inputs if Needs.PAIRS in part.inputs.needs("inputs") else frozen.inputs
        outputs = live.outputs if Needs.PAIRS in part.outputs.needs("outputs") else frozen.outputs
        return KroneckerState(inputs, outputs)
    changing = refining(part) is not None or part.needs & LOOKING_BACK
    return state.frozen if part.needs and not changing else state.live


def _order_of_entries(part: Preconditioner, layer: Layer, momentum: Tensors) -> Tensor:
    """Where the entries of (weight, bias), in the parameters' own order, stand in the flattened storage."""
    return layer.entries() if part.joint else torch.arange(sum(value.numel() for value in momentum))
