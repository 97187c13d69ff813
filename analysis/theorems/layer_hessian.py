"""T1: the Hessian of one sample's loss over a layer is a a' kron d2 loss / dh2, for any loss and any smooth network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...curvature.layers.discovery import discover_layers
from ...curvature.products import GraphKeepingBackward, hessian_block
from ..theorem import Evidence, Inequality, Setting, Theorem, agreement, together
from .instances import Draws, network
from .measured import hessian

__all__ = ["THEOREMS"]

_NETS = 4


def _losses(draws: Draws, classes: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Per-sample losses (N, classes) -> (N,): convex, likelihood, and neither."""
    target, weights = draws.normal(classes), draws.normal(classes)
    return {
        "half squared error": lambda output: 0.5 * (output - target).square().sum(-1),
        "cross entropy": lambda output: output.logsumexp(-1) - output[..., 0],
        "a non-convex loss": lambda output: (weights * output.cos() + output[..., :1] * output.sin()).sum(-1),
    }


def _blocks(model: nn.Sequential, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Hessian blocks of the mean loss, as the library measures them: second derivatives of the user's backward."""
    layers = discover_layers(model)
    products = GraphKeepingBackward(layers)
    with products:
        loss(model(inputs)).mean().backward()
    blocks = [hessian_block(products, layer) for layer in layers]
    products.release()
    return blocks


def _tail(rest: nn.Sequential, loss: Callable[[Tensor], Tensor], preactivation: Tensor) -> Tensor:
    """The loss as a function of one pre-activation."""
    return loss(rest(preactivation))


def _kronecker(model: nn.Sequential, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """mean(a a') kron mean(d2 loss / dh2) over (weight row by row, then bias)."""
    found = []
    for index, module in enumerate(model):
        if not isinstance(module, nn.Linear):
            continue
        rest = nn.Sequential(*list(model)[index + 1 :])
        with torch.no_grad():
            value = model[:index](inputs)
            preactivation = module(value)
        extended = torch.cat([value, torch.ones_like(value[:, :1])], 1)
        outer = torch.vmap(hessian(partial(_tail, rest, loss)))(preactivation).mean(0)
        dense = torch.kron(outer.contiguous(), extended.T @ extended / len(extended))
        places = torch.arange(dense.shape[0]).reshape(module.out_features, -1)
        order = torch.cat([places[:, :-1].flatten(), places[:, -1]]).to(dense.device)
        found.append(dense[order][:, order])
    return found


def _check(setting: Setting, samples: int = 1) -> Evidence:
    """Three layers, three losses, several nets; with more samples the product of the means is compared: a control."""
    draws = Draws(setting, 100)
    found: dict[str, list[Inequality]] = {}
    for activation in (nn.Tanh, nn.Softplus):
        for _ in range(_NETS // 2):
            layers = (nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 3))
            model, inputs = network(draws, *layers), draws.normal(samples, 3)
            for name, loss in _losses(draws, 3).items():
                pairs = zip(_blocks(model, inputs, loss), _kronecker(model, inputs, loss), strict=True)
                found.setdefault(name, []).extend(
                    agreement(f"layer Hessian, {name}", block.unsqueeze(0), dense.unsqueeze(0), 1e-12)
                    for block, dense in pairs
                )
    return Evidence(tuple(together(entries) for entries in found.values()))


THEOREMS = (
    Theorem(
        "T1",
        "The Hessian of one sample's loss over a layer is the Kronecker product of its input's outer product with the "
        "Hessian at its pre-activation, for any loss and any smooth network.",
        r"\nabla^2_{W_l} \ell_i = (a_{l-1} a_{l-1}^T) \otimes \frac{\partial^2 \ell_i}{\partial h_l^2}",
        "arXiv:2006.08877, section 2 (structure); docs/PAPERS.md 1.1",
        _check,
        partial(_check, samples=3),
        "three samples: the Kronecker product of the means is only an approximation",
    ),
)
