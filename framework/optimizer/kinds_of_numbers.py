"""Parameters and gradients that no part can take: complex numbers, and sparse tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...curvature.records.statistics import LayerStatistics
from ...errors import ArgumentError
from .blocks import Block

__all__ = ["require_dense_gradients", "require_real_and_dense"]


def require_real_and_dense(model: nn.Module, chosen: Iterable[nn.Parameter] | None = None) -> None:
    """Check that the trainable parameters of a model are real, dense, and get dense gradients.

    Args:
        model: the model.
        chosen: parameters to check; ``None``: all that are trainable.

    Raises:
        ArgumentError: naming the parameters and the way out.
    """
    wanted = {id(parameter) for parameter in (model.parameters() if chosen is None else chosen)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) in wanted]
    found = [name for name, parameter in named if parameter.is_complex()]
    if found:
        raise ArgumentError(
            f"parameters {_listed(found)} are complex, and every part works on real numbers; keep the real form, "
            "nn.Parameter(torch.view_as_real(value)), and call torch.view_as_complex on it in forward, or freeze them"
        )
    found = [name for name, parameter in named if parameter.layout is not torch.strided]
    if found:
        raise ArgumentError(
            f"parameters {_listed(found)} are sparse tensors, and every part works on dense ones; keep "
            "value.to_dense(), or freeze them"
        )
    tables = [
        f"{name or '(root)'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if module.weight.requires_grad and id(module.weight) in wanted
    ]
    if tables:
        raise ArgumentError(
            f"modules {_listed(tables)} have sparse=True, and no part takes sparse gradients; build them with "
            "sparse=False, or freeze them"
        )


def require_dense_gradients(blocks: Iterable[Block], statistics: Mapping[str, LayerStatistics]) -> None:
    """Name what is sparse, gradients or records of inputs; asked when these could not be summed.

    Raises:
        ArgumentError: if something is.
    """
    found = [
        f"{block.layer.name}.{name}"
        for block in blocks
        for name, parameter in zip(block.names, block.parameters, strict=True)
        if parameter.grad is not None and parameter.grad.layout is not torch.strided
    ]
    if found:
        raise ArgumentError(
            f"the gradients of {_listed(found)} are sparse, and no part takes sparse gradients; no parameter and no "
            "state was changed. Call torch.nn.functional.embedding with sparse=False, or torch.mm in the place of "
            "what made them"
        )
    found = [name for name, entry in statistics.items() if any(v.layout is not torch.strided for v in entry.recorded())]
    if found:
        raise ArgumentError(
            f"layers {_listed(found)} were given sparse inputs, which this backend records as they are; no parameter "
            "and no state was changed. Give them value.to_dense(), or build with backend='hooks'"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
