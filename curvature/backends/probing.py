"""Whose row is it? A probe finds the sample of every row of every call, where shapes do not say it.

The probe is a backward pass from the model's output with a random vector per sample times one weight per sample: the
gradient at a row is linear in the weights, ``g(w) = sum over n of w_n g_n``. If the row belongs to sample n alone, then
``g(w) = w_n g(1)`` for all w. So weights that spell the samples' numbers, digit by digit, come back in every row that
belongs to one sample; rows that belong to several samples show no digit, and rows without influence no gradient. One
more probe with random weights checks what was read.

It runs once per signature of shapes, and again at the 2nd, 8th, 64th, 512th, ... pass of that signature: where data
decide (experts, packed sequences, graphs), two passes differ, or samples have different numbers of rows, and such
signatures are probed in every pass. Of a model all of whose calls have N entries on the first axis it is asked once, by
two backward passes, whether they are the samples in their order (:meth:`Probes.shuffles`); if so, it is never probed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten

from ...errors import ArgumentError, FallbackWarning
from ..layers.layer import Layer
from ..layers.sharding import wholes
from ..records.calls import Call
from ..records.ownership import NOBODY, Ownership
from .passes import extra_backward
from .sampling import seeded_generator
from .uses import Use, observed

__all__ = ["Known", "Probes", "batch_of", "is_square", "read_owners"]

SEVERAL = -2
"""What :func:`read_owners` says of a row that belongs to several samples."""

_FREE_AXES = ("Linear", "LayerNorm", "RMSNorm", "Embedding")
"""Kinds of layers that do not care which of their leading axes counts samples."""

_COUPLED = (
    "the samples of a mini-batch see each other in layer {layer!r} (a graph network, attention across the batch): "
    "every row of it is taken for a sample of its own, as with batch normalisation; backend='func' tells whole "
    "gradients and exact Gauss-Newton matrices of the samples apart"
)

_BASE = 16
_SEED = 20_231


def batch_of(output: Any) -> Tensor | None:
    """The tensor whose first axis counts the samples: the model's output, or the first with an axis inside of it."""
    if isinstance(output, Tensor):
        return output if output.ndim else None
    leaves = tree_flatten(output)[0]
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)


def is_square(layer: Layer, output: Tensor) -> bool:
    """Whether the shape of a call's output leaves open which of two axes counts samples."""
    return output.ndim > 2 and output.shape[0] == output.shape[1] and layer.kind in _FREE_AXES


@dataclass
class Known:
    """What earlier passes with one signature of shapes have shown.

    Attributes:
        found: per call; ``None``: the first axis counts the samples.
        passes: how many there were.
        fixed: the shapes decide: not seen to differ between passes, and no sample has more rows than another.
    """

    found: list[Ownership | None]
    passes: int = 0
    fixed: bool = True


class Probes:
    """What is known of the rows of one model.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.known: dict[Any, Known] = {}
        self._told = False  # that samples see each other

    def settle(
        self,
        layers: Mapping[str, Layer],
        output: Tensor,
        calls: Sequence[Call],
        edges: Mapping[int, GradientEdge],
        replay: Callable[[dict[str, Tensor]], Any],
        again: bool = False,
    ) -> None:
        """Say of every call of one pass whose its rows are.

        Args:
            layers: by name.
            output: of the pass, samples first.
            calls: of the pass.
            edges: where a gradient arrives at each call, by the call's id; may be missing.
            replay: runs the model once more with the given buffers; returns the output, samples first.
            again: whether the pass repeats the mini-batch before: it shows nothing of what differs between batches.

        Raises:
            ArgumentError: if it cannot be found out, naming the layer.
        """
        signature = tuple((call.layer, call.samples, call.positions) for call in calls)
        key = (tuple(output.shape), self.model.training, signature)
        known = self.known.get(key)
        if known is not None and not again:
            known.passes += 1
        if known is None or not known.fixed or (not again and _is_due(known.passes)):
            found = self._probe(layers, output, calls, edges, replay)
            regular = all(entry is None or entry.regular for entry in found)
            if known is None:
                known = self.known[key] = Known(found, 1, regular)
            elif known.fixed:
                pairs = zip(found, known.found, strict=True)
                same = all(old is None if new is None else new.same(old) for new, old in pairs)
                known.fixed = regular and same
            known.found = found
        for call, entry in zip(calls, known.found, strict=True):
            call.ownership = entry

    def shuffles(
        self, layers: Mapping[str, Layer], output: Tensor, calls: Sequence[Call], points: Sequence[GradientEdge]
    ) -> bool:
        """Whether entry n of some call is not sample n alone. Two backward passes.

        Args:
            layers: by name.
            output: of the pass, samples first.
            calls: of the pass, with N entries each.
            points: where a gradient arrives at each call.
        """
        if not points or not output.requires_grad or any(_normalises_over_batch(part) for part in self.model.modules()):
            return False
        weights = 1 + torch.rand(len(output), generator=seeded_generator(_SEED, output.device), device=output.device)
        direction = _direction(output)
        vectors = direction, direction * weights.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1))
        try:
            with extra_backward():
                plain, scaled = (
                    wholes(torch.autograd.grad(output, points, vector, retain_graph=True, allow_unused=True))
                    for vector in vectors
                )
        except RuntimeError:  # reentrant checkpoints
            return False
        tolerance = 0.1 if output.dtype in (torch.float16, torch.bfloat16) else 1e-2
        doubts = []
        for call, one, other in zip(calls, plain, scaled, strict=True):
            if one is None or other is None:
                continue
            adapter, module = layers[call.layer].adapter, layers[call.layer].module
            assert adapter is not None
            rows, found = (adapter.expand_output(module, call.arranged(value)).detach() for value in (one, other))
            wanted = rows.double() * weights.double().reshape(-1, *[1] * (rows.ndim - 1))
            size = torch.linalg.vector_norm(wanted)
            doubts.append(torch.linalg.vector_norm(found.double() - wanted) > tolerance * size)
        return bool(torch.stack(doubts).any()) if doubts else False

    def _probe(
        self,
        layers: Mapping[str, Layer],
        output: Tensor,
        calls: Sequence[Call],
        edges: Mapping[int, GradientEdge],
        replay: Callable[[dict[str, Tensor]], Any],
    ) -> list[Ownership | None]:
        coupling = [module for module in self.model.modules() if _couples(module)]
        points: list[Any] = [edges.get(id(call)) for call in calls]
        arrange: list[Callable[[Tensor], Tensor]] = [call.arranged for call in calls]
        if coupling or not output.requires_grad or any(point is None for point in points):
            output, points, arrange = self._again(layers, output, calls, coupling, replay)
        adapters = [(layers[call.layer], make) for call, make in zip(calls, arrange, strict=True)]

        def rows(gradients: Sequence[Tensor | None]) -> list[Tensor]:
            result = []
            for call, (layer, make), value in zip(calls, adapters, gradients, strict=True):
                assert layer.adapter is not None
                shape = call.samples, call.positions
                row = (
                    output.new_zeros(*shape, 1)
                    if value is None
                    else layer.adapter.expand_output(layer.module, make(value))
                )
                result.append(row.detach())
            return result

        def pull(weights: Tensor) -> list[Tensor]:
            vector = _direction(output) * weights.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1))
            with extra_backward():
                found = torch.autograd.grad(output, points, vector, retain_graph=True, allow_unused=True)
            return rows(wholes(found))

        samples = output.shape[0]
        found = read_owners(pull, samples, output.device, output.dtype)
        result = [
            _ownership(layers[call.layer], call, owners, samples) for call, owners in zip(calls, found, strict=True)
        ]
        for call, owners, entry in zip(calls, found, result, strict=True):
            if entry is None and not (coupling or self._told) and bool((owners == SEVERAL).any()):
                self._told = True
                warnings.warn(_COUPLED.format(layer=call.layer), FallbackWarning, stacklevel=2)
        return result

    def _again(
        self,
        layers: Mapping[str, Layer],
        output: Tensor,
        calls: Sequence[Call],
        coupling: Sequence[nn.Module],
        replay: Callable[[dict[str, Tensor]], Any],
    ) -> tuple[Tensor, list[Any], list[Callable[[Tensor], Tensor]]]:
        """The same pass once more, for the probe alone: with modules that couple samples in evaluation mode.

        Raises:
            ArgumentError: if the second pass is another one.
        """
        seen: list[tuple[Call, Any]] = []

        def watch(uses: Sequence[Use], value: Tensor) -> Tensor:
            shifted = value + torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
            seen.extend((use.call(0, shifted), get_gradient_edge(shifted)) for use in uses)
            return shifted

        names = {call.layer for call in calls}
        own = _uncoupled(coupling, output.device)
        with (
            extra_backward(),
            torch.enable_grad(),
            own,
            observed([layers[name] for name in layers if name in names], watch),
        ):
            second = batch_of(replay({name: buffer.clone() for name, buffer in self.model.named_buffers()}))
        left: dict[str, list[tuple[Call, Any]]] = {}
        for entry in seen:
            left.setdefault(entry[0].layer, []).append(entry)
        found: list[tuple[Call, Any]] = []
        for call in calls:
            others = left.get(call.layer, [])
            if not others or (others[0][0].samples, others[0][0].positions) != (call.samples, call.positions):
                second = None
                break
            found.append(others.pop(0))
        if second is None or second.shape != output.shape or not second.requires_grad:
            uneven = next((call for call in calls if call.samples != output.shape[0]), calls[0])
            raise ArgumentError(
                f"layer {uneven.layer!r} was called on {uneven.samples} entries of the first axis in a mini-batch of "
                f"{output.shape[0]} samples, and a second pass, which was to find out whose they are, was another one; "
                "run the model with gradients enabled, put modules that couple samples into eval mode, or give the "
                "layer a part that needs no statistics (ByLayer with Identity() or Diagonal())"
            )
        return second, [edge for _, edge in found], [call.arranged for call, _ in found]


def _is_due(passes: int) -> bool:
    """Whether a signature that was probed before is probed again at its pass of this number: 2, 8, 64, 512, ..."""
    if passes == 2:
        return True
    while passes % 8 == 0:
        passes //= 8
    return passes == 1


def read_owners(
    pull: Callable[[Tensor], list[Tensor]], samples: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """The sample of every row, from probes.

    Args:
        pull: gradients (R, S, d_out) at every call for weights (N,) of the samples.
        samples: N.
        device: of the weights.
        dtype: of the model's output, which limits what can be told apart.

    Returns:
        For every call (R, S) on the host: a sample, -1 for nobody's, -2 for several's.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    digits: list[Tensor] = []
    count = 1
    while not digits or count < samples:
        digits.append(torch.arange(samples, device=device) // count % _BASE)
        count *= _BASE
    check = 1 + torch.rand(samples, generator=seeded_generator(_SEED, device), device=device)
    plain = pull(torch.ones(samples, device=device))
    probes = [pull(1.0 + digit) for digit in digits]
    checks = pull(check)
    result: list[Tensor] = []
    for index, base in enumerate(plain):
        square = base.double().square().sum(-1)
        silent = square <= square.max() * (1e-3 if half else 1e-6) ** 2 if square.numel() else square <= 0
        single, owner = ~silent, torch.zeros(square.shape, dtype=torch.long, device=square.device)
        for place, probe in enumerate(probes):
            ratio, one = _ratio(base, probe[index], square, 0.05 if half else 0.01)
            digit = ratio.round()
            single &= one & ((ratio - digit).abs() < (0.3 if half else 0.1)) & (digit >= 1) & (digit <= _BASE)
            owner += (digit.nan_to_num().clamp(1, _BASE).long() - 1) * _BASE**place
        single &= owner < samples
        ratio, one = _ratio(base, checks[index], square, 0.05 if half else 0.01)
        single &= one & ((ratio - check[owner.clamp(max=samples - 1)].double()).abs() < (0.03 if half else 0.003))
        owner = torch.where(single, owner, torch.where(silent, NOBODY, SEVERAL))
        result.append(owner.cpu())
    return result


def _ratio(base: Tensor, other: Tensor, square: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Factor from one gradient to the other per row, and whether one factor does for all entries."""
    base, other = base.double(), other.double()
    ratio = (base * other).sum(-1) / square
    rest = (other - ratio.unsqueeze(-1) * base).square().sum(-1)
    return ratio, rest <= tolerance**2 * other.square().sum(-1)


def _direction(output: Tensor) -> Tensor:
    """A random vector per sample, in the output's shape; the same for every probe of one shape."""
    generator = seeded_generator(_SEED + 1, output.device)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


def _ownership(layer: Layer, call: Call, owners: Tensor, samples: int) -> Ownership | None:
    """What is made of the readings (R, S) of one call; ``None``: one entry of the first axis per sample.

    Rows that show nothing (a dead unit, a token that is cut off), and a few that rounding has blurred, are filled in
    where all others follow a pattern.
    """
    entries, positions = owners.shape
    several, told = owners == SEVERAL, owners >= 0
    for pattern in _patterns(entries, positions, samples):
        if told.any() and bool((pattern == owners)[told].all()) and int(several.sum()) * 10 <= int(told.sum()):
            plain = entries == samples and torch.equal(pattern[:, 0], torch.arange(samples))
            return None if plain and not bool((pattern != pattern[:, :1]).any()) else Ownership(samples, pattern)
    if bool(several.any()) or not bool(told.any()):
        # With one entry per sample this is a coupling of samples inside the model, as by BatchNorm; a table of as many
        # entries as there are samples is not.
        table = layer.kind == "Embedding" and positions == 1
        coupled = entries == samples and not (table and bool(several.any()))
        return None if coupled else Ownership(samples, None)
    first = owners.max(1, keepdim=True).values
    if bool(((owners == first) | (owners == NOBODY)).all()):
        owners = first.expand(entries, positions)  # every entry belongs to one sample as a whole
    return Ownership(samples, owners.contiguous())


def _patterns(entries: int, positions: int, samples: int) -> Iterator[Tensor]:
    """(R, S) The usual ways in which N samples lie in the rows of a call."""
    row, column = torch.arange(entries)[:, None], torch.arange(positions)[None]
    shape = torch.zeros(entries, positions, dtype=torch.long)
    if entries % samples == 0:
        yield row // (entries // samples) + shape
        yield row % samples + shape
    if positions % samples == 0:
        yield column % samples + shape
        yield column // (positions // samples) + shape


def _normalises_over_batch(module: nn.Module) -> bool:
    """Whether a module uses the statistics of the batch now: known, and documented."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)


def _couples(module: nn.Module) -> bool:
    """Whether a module normalises with the statistics of the batch now, and could do without."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.running_mean is not None


@contextmanager
def _uncoupled(coupling: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules in evaluation mode; the random state ends up as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for module in coupling:
                module.training = False
            yield
        finally:
            for module in coupling:
                module.training = True
