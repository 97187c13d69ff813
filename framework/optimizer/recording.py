"""Which layer records what at which step: the union of the parts' needs, and no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from torch import Tensor

from ...curvature.declarations import Measure
from ...curvature.estimators import Estimator
from ...curvature.layers.layer import Layer
from ...curvature.products import GraphKeepingBackward, hessian_block
from ...curvature.records.needs import LOOKING_BACK, Needs, Record
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError, CompatibilityError
from ..methods.method import Method
from .blocks import Block, present_gradients

__all__ = [
    "all_records",
    "fill",
    "own_measures",
    "records_for_forward",
    "records_for_step",
    "require_filled",
    "require_pairs",
    "require_sampled",
    "with_hessians",
]


def records_for_step(
    blocks: Sequence[Block], layers: Sequence[Layer], method: Method, step: int, warm: bool
) -> dict[str, Record]:
    """What each layer must record for step ``step``."""
    wanted: dict[str, Record] = {}
    for block in blocks:
        needs = block.needs
        if not block.statistics_due(step, warm):
            # Parts that look back use the mean input of every step; the rest sits this step out.
            needs = needs & (LOOKING_BACK | Needs.INPUTS) if needs & LOOKING_BACK else Needs.NOTHING
        _add(wanted, block.layer.name, method.curvature.records(needs))
        if block.structure.measures and block.statistics_due(step, warm):
            _add(wanted, block.layer.name, Record.COUNT)
    for layer in layers:
        _add(wanted, layer.name, _records_for_scores(layer, method.measures_at(step)))
    return wanted


def _records_for_scores(layer: Layer, needs: Needs) -> Record:
    """What quadratic forms with these needs ask of a layer."""
    scores = needs & (Needs.SCORES | Needs.BATCH_SCORES)
    if not scores:
        return Record.NOTHING
    rows = layer.adapter is not None and Needs.SCORES in scores
    return Record.SAMPLED | Record.INPUTS if rows else Record.SAMPLED_PARAMETERS


def records_for_forward(blocks: Sequence[Block], estimator: Estimator) -> dict[str, Record]:
    """What each layer must record in a warm-start pass."""
    wanted: dict[str, Record] = {}
    for block in blocks:
        _add(wanted, block.layer.name, estimator.records(block.needs))
    return wanted


def all_records(blocks: Sequence[Block], layers: Sequence[Layer], method: Method) -> dict[str, Record]:
    """What each layer may have to record at any step, in the warm start, or when looking back."""
    wanted = records_for_forward(blocks, method.warm_start) if method.warm_start is not None else {}
    for block in blocks:
        _add(wanted, block.layer.name, method.curvature.records(block.needs))
        if block.structure.measures:
            _add(wanted, block.layer.name, Record.COUNT)
    for layer in layers:
        _add(wanted, layer.name, _records_for_scores(layer, method.measures_at(None)))
    return wanted


def own_measures(blocks: Sequence[Block]) -> dict[str, dict[str, Measure]]:
    """By layer what its structures measure themselves.

    Raises:
        CompatibilityError: if nobody can read the layer, or two structures give one name to different measures.
    """
    found: dict[str, dict[str, Measure]] = {}
    for block in blocks:
        own = found.setdefault(block.layer.name, {}) if block.structure.measures else {}
        for name, measure in block.structure.measures.items():
            if block.layer.adapter is None or own.setdefault(name, measure) is not measure:
                reason = "two structures call two measures so" if name in own else "no adapter reads the layer"
                raise CompatibilityError(
                    f"{type(block.part).__name__} measures {name!r} of layer {block.layer.name!r} itself, but {reason}"
                )
    return found


def with_hessians(
    statistics: Mapping[str, LayerStatistics],
    layers: Sequence[Layer],
    products: GraphKeepingBackward | None,
    loss_reduction: str,
    inverse_scale: Tensor | None,
) -> dict[str, LayerStatistics]:
    """The statistics with every layer's dense Hessian to be built on demand.

    Args:
        statistics: by layer.
        layers: all layers.
        products: Hessian products of this mini-batch; ``None``: the statistics stay as they are.
        loss_reduction: ``"mean"`` or ``"sum"``.
        inverse_scale: 1 / scale of the loss, ``None`` for 1.

    Raises:
        ArgumentError: if the loss is a sum over samples whose number no hook saw.
    """
    result = dict(statistics)
    if products is None:
        return result
    for layer in layers:
        record = result.get(layer.name)
        if record is None and loss_reduction == "sum":
            raise ArgumentError(
                f"the number of samples that layer {layer.name!r} saw is unknown, so the Hessian of a summed loss "
                "cannot be scaled; use a mean loss and loss_reduction='mean'"
            )
        record = LayerStatistics(layer, 1, 1) if record is None else record
        scale: float | Tensor = record.gradient_scale / record.samples
        scale = scale if inverse_scale is None else scale * inverse_scale
        result[layer.name] = record.with_fields(hessian=partial(hessian_block, products, layer, scale))
    return result


def fill(
    estimator: Estimator, layer: Layer, record: LayerStatistics | None, gradients: Tensors | None = None
) -> LayerStatistics | None:
    """A layer's statistics with gradients and the estimator's choice of curvature filled in.

    A layer that no hook recorded still has its gradients, which is all that ``BatchMean`` uses.

    Args:
        estimator: the estimator.
        layer: the layer.
        record: as measured.
        gradients: of all its parameters, in their own precision, if somebody has gathered them already.
    """
    if gradients is None:
        gradients = present_gradients(tuple(layer.parameters.values()))
    if record is None:
        if gradients is None:
            return None
        record = LayerStatistics(layer, 1, 1)
    if gradients is not None:
        record = record.with_fields(gradients=gradients)
    return estimator.fill(record)


def require_filled(block: Block, record: LayerStatistics) -> None:
    """Check that a structure finds what it declared, before it is given the record.

    Raises:
        ArgumentError: naming the layer and the ways to run the model that leave its record empty.
    """
    asked = block.asked
    if (
        (asked.roots and record.roots is None and "outputs" not in record.moments)
        or (asked.vectors and record.vectors is None)
        or (asked.matrix and record.matrix is None)
        or (asked.inputs and record.inputs is None and "inputs" not in record.moments)
    ):
        raise _nothing_recorded(block)


def require_pairs(block: Block, record: LayerStatistics | None) -> None:
    """Check that there is something to compare with after the step.

    Raises:
        ArgumentError: as :func:`require_filled`.
    """
    if record is None or (block.asked.pairs and record.mean_gradient is None):
        raise _nothing_recorded(block)


def _nothing_recorded(block: Block) -> ArgumentError:
    return ArgumentError(
        f"nothing was recorded of layer {block.layer.name!r}: run the whole model that was given to osculate.build "
        "(not its submodules one by one), with gradients enabled (no torch.no_grad(), not inside "
        "optimizer.paused()), and call loss.backward() (torch.autograd.grad fills no .grad, so it is not counted); "
        "the layer must be called as a module and must influence the model's output, else give it Identity() with "
        "ByLayer"
    )


def require_sampled(statistics: Mapping[str, LayerStatistics], active: Collection[str]) -> None:
    """Check that labels were sampled, for the same samples of all layers, at a step whose rule measures with them.

    Args:
        statistics: per layer.
        active: names of the layers that have a gradient: each must have been measured, or it would never move.

    Raises:
        ArgumentError: naming the layers that have nothing from the sampled backward, or other samples than the rest.
    """
    missing = []
    counts: dict[int, str] = {}
    for name in active:
        entry = statistics.get(name)
        rows = entry is not None and (entry.sampled_gradient is not None or entry.sample_gradients.sampled is not None)
        if entry is None or not (rows or entry.sampled_parameter_gradients is not None):
            missing.append(name)
        elif rows:
            counts.setdefault(entry.samples, name)
    if missing:
        raise ArgumentError(
            f"no labels were sampled for layers {', '.join(missing)}: run the whole model that was given to "
            "osculate.build, not its parts one by one; the layer must be called as a module (not read by "
            "F.linear(x, layer.weight)), must influence the model's output, and must not run "
            "inside checkpoint(..., use_reentrant=True), whose forward pass has no graph (use_reentrant=False has)"
        )
    if len(counts) > 1:
        seen = ", ".join(f"layer {name!r} {count}" for count, name in counts.items())
        raise ArgumentError(
            f"the layers saw different numbers of samples in this mini-batch ({seen}), so no curvature along a step of "
            "all of them can be measured: some gradient does not come from the model's own output. Let the loss depend "
            "on the model's output for all samples (if it contains derivatives of the model, return its residuals: "
            "backend='residuals'), keep such passes out with "
            "optimizer.paused(), or take a rule that measures nothing, step_size=ConstantStep(); no parameter and no "
            "state was changed"
        )


def _add(wanted: dict[str, Record], name: str, record: Record) -> None:
    if record:
        wanted[name] = wanted.get(name, Record.NOTHING) | record
