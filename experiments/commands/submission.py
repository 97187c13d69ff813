"""Submissions to AlgoPerf (v0.6, external tuning, PyTorch) of registered methods.

AlgoPerf calls the functions of a module; this writes such a module, which needs ``osculate`` and ``algoperf`` to run,
and the search space beside it. Names, arguments and returned triples follow the benchmark's documentation (version
0.6.0) and its ``algoperf/spec.py``; batch sizes are those of its published baselines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Any

import tyro
from rich.console import Console

from ... import registry
from ...errors import ArgumentError
from ...framework.methods.method import Method
from ...framework.methods.momentum import Decoupled
from ...stepsize.constant import ConstantStep
from ..runs.config import parse_options
from ..runs.targets import require_folder, writing
from .flags import Options, say

__all__ = ["ExportSubmission", "search_space", "submission_source"]

_AROUND = 30.0
"""A learning rate or damping is searched from its default over this to its default times this, on a log scale."""

_LARGEST_PAIR_DAMPING = 0.9
"""Double damping needs damping below 1."""

_SEARCHED = ("lr", "damping", "weight_decay")


def search_space(method: Method) -> dict[str, dict[str, Any]]:
    """Workload-agnostic search space: learning rate, damping where it is used, weight decay, dropout.

    A method that chooses its own step sizes keeps learning rate 1, which is a multiplier then.

    Args:
        method: whose defaults are the middle of the ranges.

    Returns:
        ``tuning_search_space.json``: ``min``, ``max`` and ``scaling``, or ``feasible_points``, by name.
    """
    values = method.hyperparameters({})
    space = {"learning_rate": _around(values["lr"]) if _has_learning_rate(method) else {"feasible_points": [1.0]}}
    if values["damping"] > 0:
        largest = _LARGEST_PAIR_DAMPING if method.looks_back else float("inf")
        space["damping"] = _around(values["damping"], largest)
    decoupled = isinstance(method.weight_decay, Decoupled)
    lowest, highest = (5e-3, 1.0) if decoupled else (1e-6, 1e-3)
    space["weight_decay"] = {"min": lowest, "max": highest, "scaling": "log"}
    space["warmup_factor"] = {"feasible_points": [0.05]}
    space["dropout_rate"] = {"feasible_points": [0.0, 0.1]}
    space["label_smoothing"] = {"feasible_points": [0.0, 0.1]}
    return space


def _around(middle: float, largest: float = float("inf")) -> dict[str, Any]:
    return {"min": middle / _AROUND, "max": min(middle * _AROUND, largest), "scaling": "log"}


def _has_learning_rate(method: Method) -> bool:
    rule = method.step_size
    while hasattr(rule, "rule"):
        rule = rule.rule
    return isinstance(rule, ConstantStep)


def submission_source(name: str, options: Mapping[str, Any]) -> str:
    """The module's source.

    Args:
        name: registered method.
        options: of the method; plain values.
    """
    entry = registry.methods()[name]
    method = registry.method(name, **options)
    damping = "hyperparameters.damping" if method.hyperparameters({})["damping"] > 0 else "None"
    return Template(_SOURCE).substitute(
        name=name,
        summary=entry.summary.replace("\\", "\\\\").replace('"""', "'''"),
        paper=entry.paper,
        method=repr(name),
        options=repr(dict(options)),
        damping=damping,
    )


@dataclass(frozen=True)
class ExportSubmission:
    """Write an AlgoPerf submission of a method: submission.py and tuning_search_space.json.

    The module follows AlgoPerf v0.6 (PyTorch, external tuning). It needs osculate installed beside algoperf.
    """

    method: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="METHOD")]
    """Method; 'osculate methods' lists them."""
    out: Path
    """Folder to write."""
    option: Options = ()
    """Further keyword of the method: --option statistics_every=2; 'osculate methods NAME' lists them."""

    def run(self, console: Console) -> int:
        """Check, write, and return the exit status."""
        options = parse_options(self.option)
        tuned = sorted(options.keys() & set(_SEARCHED))
        if tuned:
            raise ArgumentError(f"{', '.join(tuned)} is searched, not fixed; edit tuning_search_space.json instead")
        method = registry.method(self.method, **options)
        files = {
            "submission.py": submission_source(self.method, options),
            "tuning_search_space.json": json.dumps(search_space(method), indent=2) + "\n",
        }
        require_folder(self.out, *files)
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (self.out / name).write_text(text, encoding="utf-8")
        say(console, f"{' and '.join(files)} lie in {self.out}")
        return 0


_SOURCE = '''"""AlgoPerf submission: $name.

$summary

Source: $paper. Written by 'osculate export-submission'; PyTorch, external tuning ruleset. Learning rate: linear warm-up
over a share of the step hint, then a cosine to zero. The loss is a mean over valid examples of all devices. Methods
that average statistics in a pass over the data before training start without it here: a submission sees no data before
its first step. Where a batch is padded, statistics count padded examples too.
"""

import math

import osculate as osc
import torch
from algoperf import spec

METHOD = $method
OPTIONS = $options

LIKELIHOODS = {
    spec.LossType.SOFTMAX_CROSS_ENTROPY: "categorical",
    spec.LossType.SIGMOID_CROSS_ENTROPY: "bernoulli",
    spec.LossType.MEAN_SQUARED_ERROR: "gaussian",
}
"""What a method that samples labels draws them from; other losses have no such distribution."""

BATCH_SIZES = {
    "cifar": 1024,
    "criteo1tb": 262_144,
    "fastmri": 32,
    "finewebedu_lm": 64,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "mnist": 256,
    "ogbg": 512,
    "wmt": 128,
}


def get_batch_size(workload_name):
    """Global batch size of a workload."""
    if workload_name not in BATCH_SIZES:
        raise ValueError(f"unknown workload {workload_name!r}; known: {', '.join(BATCH_SIZES)}")
    return BATCH_SIZES[workload_name]


def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
    """Build the optimizer and the schedule of its learning rate."""
    del model_state
    optimizer = osc.build(
        METHOD,
        model_params,
        lr=hyperparameters.learning_rate,
        damping=$damping,
        weight_decay=hyperparameters.weight_decay,
        likelihood=LIKELIHOODS.get(workload.loss_type),
        seed=_seed(rng),
        on_nonfinite="skip",
        **OPTIONS,
    )
    steps = max(1, workload.step_hint)
    warm_up = max(1, int(hyperparameters.warmup_factor * steps))

    def factor(step):
        if step < warm_up:
            return (step + 1) / warm_up
        share = (step - warm_up) / max(1, steps - warm_up)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))

    return {"optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}


def update_params(
    workload,
    current_param_container,
    current_params_types,
    model_state,
    hyperparameters,
    batch,
    loss_type,
    optimizer_state,
    eval_results,
    global_step,
    rng,
    train_state=None,
):
    """One step; returns (optimizer_state, params, model_state)."""
    del current_params_types, loss_type, eval_results, train_state
    optimizer, model = optimizer_state["optimizer"], current_param_container
    model.train()
    new_state = model_state

    def closure():
        nonlocal new_state
        optimizer.zero_grad()
        logits, new_state = workload.model_fn(
            params=model,
            augmented_and_preprocessed_input_batch=batch,
            model_state=model_state,
            mode=spec.ForwardPassMode.TRAIN,
            rng=rng,
            update_batch_norm=True,
            dropout_rate=hyperparameters.dropout_rate,
        )
        loss = _mean_loss(workload, batch, logits, hyperparameters.label_smoothing)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    optimizer_state["scheduler"].step()
    if workload.metrics_logger is not None and (global_step <= 100 or global_step % 500 == 0):
        workload.metrics_logger.append_scalar_metrics({"loss": float(loss)}, global_step)
    return optimizer_state, current_param_container, new_state


def prepare_for_eval(
    workload,
    current_param_container,
    current_params_types,
    model_state,
    hyperparameters,
    loss_type,
    optimizer_state,
    eval_results,
    global_step,
    rng,
):
    """Nothing to prepare: the parameters that are trained are those that are evaluated."""
    del workload, current_params_types, hyperparameters, loss_type, eval_results, global_step, rng
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload,
    input_queue,
    optimizer_state,
    current_param_container,
    model_state,
    hyperparameters,
    global_step,
    rng,
):
    """The next batch of the queue."""
    del workload, optimizer_state, current_param_container, model_state, hyperparameters, global_step, rng
    return next(input_queue)


def _mean_loss(workload, batch, logits, label_smoothing):
    """Mean over the valid examples of all devices; averaging gradients over devices gives its gradient."""
    found = workload.loss_fn(
        label_batch=batch["targets"],
        logits_batch=logits,
        mask_batch=batch.get("weights"),
        label_smoothing=label_smoothing,
    )
    summed, count, devices = found["summed"], torch.as_tensor(found["n_valid_examples"]).detach().clone(), 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.to(summed.device)
        torch.distributed.all_reduce(count)
        devices = torch.distributed.get_world_size()
    return summed * devices / count


def _seed(rng):
    """One number from AlgoPerf's random state, which is a number or a list of them."""
    numbers = [int(number) for number in torch.as_tensor(rng, dtype=torch.int64).flatten()]
    return sum(number * 1_000_003**place for place, number in enumerate(numbers)) % 2**32
'''
