"""The rivals by name, and everything that runs by name: methods, methods over the whole model, rivals."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch

from ... import registry
from ...framework.whole_model.method import WholeEntry, whole_methods
from .rival import Factory, Groups, Option, Rival

__all__ = ["RIVALS", "Runnable", "numbers_of", "runnable"]

Runnable = registry.MethodEntry | WholeEntry | Rival

_GROWTH = Option(math.inf, "largest factor by which the estimated distance may grow in a step")
_FIRST = Option(1e-6, "first estimate of the distance to the solution")
_CORRECTED = Option(False, "Adam's bias correction")
_DECOUPLED = Option(True, "weight decay as in AdamW; else a penalty in the gradient")
_BOUND = Option(0.0, "lower bound of the loss")
_ONLINE = Option(False, "estimate that bound while training")


def _named(name: str) -> Factory:
    def make(module: ModuleType, groups: Groups, keywords: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(module, name)(groups, **keywords)
        return optimizer

    return make


def _mechanised(module: ModuleType, groups: Groups, keywords: Any) -> torch.optim.Optimizer:
    own = {name: keywords[name] for name in ("s_decay", "s_init")}
    base = {name: value for name, value in keywords.items() if name not in own}
    optimizer: torch.optim.Optimizer = module.mechanize(torch.optim.AdamW, **own)(groups, **base)
    return optimizer


def _averaged(module: ModuleType, model: torch.nn.Module) -> Any:
    return module.PolynomialDecayAverager(model)


def _distance(name: str, of: str, summary: str) -> Rival:
    """DoG and its layer-wise form."""
    return Rival(
        name,
        "dog-optimizer",
        "dog",
        _named(of),
        tested="1.0.3",
        licence="MIT",
        paper="arXiv:2302.12022",
        summary=summary,
        keywords={
            "reps_rel": Option(1e-6, "first step, relative to the parameters' norm; 1e-4 with batch normalisation"),
            "average": Option(True, "evaluate the average of the parameters, which its authors call crucial"),
        },
        coupled=True,
        every_gradient=True,
        one_group=True,
        averager=_averaged,
        batch_norm={"reps_rel": 1e-4},
    )


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival(
            "prodigy",
            "prodigyopt",
            "prodigyopt",
            _named("Prodigy"),
            tested="1.1.2",
            licence="MIT",
            paper="arXiv:2306.06101",
            summary="Adam whose learning rate is an estimated distance to the solution.",
            keywords={
                "d_coef": Option(1.0, "factor on the estimate: the way its authors tune it"),
                "d0": _FIRST,
                "growth_rate": _GROWTH,
                "use_bias_correction": _CORRECTED,
                "safeguard_warmup": Option(False, "keep warm-up schedules out of the estimate"),
                "decouple": _DECOUPLED,
            },
            coupled=True,
        ),
        Rival(
            "dadapt-adam",
            "dadaptation",
            "dadaptation",
            _named("DAdaptAdam"),
            tested="3.2",
            licence="MIT",
            paper="arXiv:2301.07733",
            summary="Adam whose learning rate is D-Adaptation's lower bound of the distance to the solution.",
            keywords={
                "d0": _FIRST,
                "growth_rate": _GROWTH,
                "use_bias_correction": _CORRECTED,
                "decouple": _DECOUPLED,
            },
            coupled=True,
        ),
        Rival(
            "mechanic-adamw",
            "mechanic-pytorch",
            "mechanic_pytorch",
            _mechanised,
            tested="0.0.1",
            licence="Apache-2.0",
            paper="arXiv:2306.00144",
            summary="torch's AdamW whose learning rate is scaled by Mechanic.",
            keywords={
                "s_decay": Option(0.01, "decay towards the start; smaller or 0 for large data"),
                "s_init": Option(1e-8, "first scale, an underestimate"),
            },
        ),
        Rival(
            "momo",
            "momo-opt",
            "momo",
            _named("Momo"),
            tested="0.1.0",
            licence="MIT",
            paper="arXiv:2305.07583",
            summary="SGD with momentum and a Polyak step from a model of the loss, at most the learning rate 1.",
            keywords={
                "beta": Option(0.9, "of the momentum"),
                "lb": _BOUND,
                "bias_correction": Option(False, "correct the averages for their start"),
                "use_fstar": _ONLINE,
            },
            takes_loss=True,
            every_gradient=True,
            one_group=True,
            attributes=("loss_avg", "_number_steps", "lb"),
        ),
        Rival(
            "momo-adam",
            "momo-opt",
            "momo",
            _named("MomoAdam"),
            tested="0.1.0",
            licence="MIT",
            paper="arXiv:2305.07583",
            summary="Adam with a Polyak step from a model of the loss, at most the learning rate.",
            lr=1e-2,
            keywords={"lb": _BOUND, "use_fstar": _ONLINE},
            takes_loss=True,
            every_gradient=True,
            one_group=True,
            attributes=("loss_avg", "_number_steps", "lb"),
        ),
        _distance(
            "dog", "DoG", "SGD; its step is the distance from the start over the root of summed squared gradients."
        ),
        _distance("ldog", "LDoG", "DoG with a step of its own for every parameter tensor."),
        Rival(
            "schedule-free-adamw",
            "schedulefree",
            "schedulefree",
            _named("AdamWScheduleFree"),
            tested="1.4.1",
            licence="Apache-2.0",
            paper="arXiv:2405.15682",
            summary="AdamW with iterate averaging in the place of a schedule; its learning rate is still to be tuned.",
            lr=0.0025,
            keywords={
                "warmup_steps": Option(0, "steps over which the learning rate rises"),
                "r": Option(0.0, "power of the step in the weights of the average"),
                "weight_lr_power": Option(2.0, "power of the learning rate in those weights"),
            },
            modes=True,
        ),
    )
}
"""Optimizers of other packages by name."""


def runnable() -> dict[str, Runnable]:
    """Everything that ``train``, ``compare`` and ``study`` run by name; a registered method goes before a rival."""
    return {**RIVALS, **whole_methods(), **registry.methods()}


def numbers_of(entry: Runnable) -> dict[str, float]:
    """Default ``lr``, ``damping`` and ``weight_decay`` of what has them."""
    return {"damping": entry.factory().damping} if isinstance(entry, WholeEntry) else dict(entry.defaults)
