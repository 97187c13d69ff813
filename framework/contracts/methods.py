"""Contracts of whole methods: a few steps of training on the small networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.declarations import (
    EstimatorDeclarations,
    StepSizeDeclarations,
    StructureDeclarations,
    declared,
)
from ...curvature.records.needs import LOOKING_BACK, Needs
from ...preconditioners.protocol import ScalingLaw
from ...preconditioners.structures.by_layer import leaves
from ..optimizer.second_order import SecondOrder
from .cases import Batch, Case
from .contract import (
    contract,
    contracts_of,
    require,
    require_bound,
    require_close,
    require_equal,
    require_finite,
    require_same_state,
    require_unchanged,
)
from .workbench import saved_copy

__all__ = ["CONTRACTS", "Training"]

_KIND = "method"
_STEPS = 3
_LONG = 10
_DATA = Needs.ROOTS | Needs.VECTORS | LOOKING_BACK


class Training:
    """A method that trains a case's network with closures.

    Args:
        method: a :class:`~osculate.Method`.
        case: network and data.
        model: default: the case's network.
        **options: of the optimizer.
    """

    def __init__(self, method: Any, case: Case, model: nn.Module | None = None, **options: Any):
        self.case, self.model = case, case.model() if model is None else model
        self.optimizer = SecondOrder(self.model, method, likelihood=case.likelihood, **options)

    def step(self, *batches: Batch, reduction: str = "mean") -> Tensor:
        """One step on a mini-batch, or on several micro-batches that make one up."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            total = torch.zeros((), dtype=self.case.dtype, device=self.case.device)
            for inputs, targets in batches:
                share = 1.0 / len(batches) if reduction == "mean" else 1.0
                loss = share * self.case.loss(self.model(inputs), targets, reduction)
                loss.backward()
                total += loss.detach()
            return total

        loss = self.optimizer.step(closure)
        assert loss is not None
        return loss

    def run(self, batches: Sequence[Batch] | None = None, **options: Any) -> Training:
        """One step per mini-batch; the case's first three by default."""
        for batch in batches or self.case.batches(_STEPS):
            self.step(batch, **options)
        return self

    def vector(self) -> Tensor:
        """A copy of all parameters."""
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def _sampled(method: Any) -> str | None:
    forms = method.step_size.needs & (Needs.SCORES | Needs.BATCH_SCORES)
    exact = declared(method.curvature, EstimatorDeclarations).exact and not forms
    return "draws labels from the model (needs_likelihood)" if method.needs_likelihood and not exact else None


def _units(method: Any) -> str | None:
    """Why a loss N times as large is not undone by an lr N times as small."""
    if not declared(method.step_size, StepSizeDeclarations).proportional:
        return "its step size does not declare proportional (to lr, and to nothing else)"
    for part in [*leaves(method.preconditioner), method.fallback]:
        plain = declared(part, StructureDeclarations).scaling == ScalingLaw(0.0)
        if not part.needs & _DATA and not plain:
            return f"{type(part).__name__} measures curvature in the units of the loss (its needs name no statistics)"
    if Needs.VECTORS in method.needs and not declared(method.curvature, EstimatorDeclarations).per_sample:
        return f"{type(method.curvature).__name__} declares per_sample = False"
    return None


@contract("method-trains", _KIND, "ten steps with the method's own defaults stay finite and move the parameters")
def method_trains(method: Any, case: Case) -> None:
    """Losses, parameters and states."""
    training = Training(method, case)
    start = training.vector()
    for index in range(_LONG):
        require_finite(f"the loss of step {index}", training.step(case.batch(index % 2)))
    require_finite("the parameters", training.vector())
    for block in training.optimizer.blocks:
        require_finite(f"the state of layer {block.layer.name!r}", *block.state.tensors())
    require(not torch.equal(start, training.vector()), "no parameter has moved")


@contract("method-descends", _KIND, "the first step goes downhill")
def method_descends(method: Any, case: Case) -> None:
    """Inner product of gradient and change of the parameters, for a small lr."""
    model = case.model()
    inputs, targets = case.batch()
    with torch.enable_grad():
        gradients = torch.autograd.grad(case.loss(model(inputs), targets), list(model.parameters()))
    gradient = torch.cat([value.flatten() for value in gradients])
    lr = 1e-3 * method.hyperparameters({})["lr"]
    training = Training(method, case, lr=lr, weight_decay=0.0)
    before = training.vector()
    training.step(case.batch())
    require_bound("inner product of gradient and step", gradient @ (training.vector() - before), "less than", 0.0)


@contract("method-save-load-continue", _KIND, "a saved and loaded optimizer continues bit for bit")
def method_save_load(method: Any, case: Case) -> None:
    """Through a file, into another network and optimizer; three steps before, three after."""
    original = Training(method, case).run()
    saved = saved_copy({"model": original.model.state_dict(), "optimizer": original.optimizer.state_dict()})
    resumed = Training(method, case)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    later = [case.batch(index) for index in range(3, 6)]
    for training in (original, resumed):
        training.run(later)
    require_equal("the parameters", resumed.vector(), original.vector())
    require_same_state("the state", resumed.optimizer.state_dict(), original.optimizer.state_dict())


@contract("method-permuted-samples", _KIND, "the order of the samples does not matter", unless=_sampled)
def method_permuted(method: Any, case: Case) -> None:
    """Three steps."""
    order = case.order()
    other = Training(method, case).run(case.batches(_STEPS, lambda value: value[order]))
    require_close("the parameters", other.vector(), Training(method, case).run().vector())


@contract("method-duplicated-batch", _KIND, "a mini-batch with every sample twice is the same", unless=_sampled)
def method_duplicated(method: Any, case: Case) -> None:
    """Three steps."""
    other = Training(method, case).run(case.batches(_STEPS, lambda value: torch.cat([value, value])))
    require_close("the parameters", other.vector(), Training(method, case).run().vector())


@contract(
    "method-micro-batches", _KIND, "a gradient accumulated over micro-batches takes the same step", unless=_sampled
)
def method_micro_batches(method: Any, case: Case) -> None:
    """Two halves per step, three steps."""
    half, training = case.samples // 2, Training(method, case)
    for x, y in case.batches(_STEPS):
        training.step((x[:half], y[:half]), (x[half:], y[half:]))
    require_close("the parameters", training.vector(), Training(method, case).run().vector())


@contract("method-mean-versus-sum", _KIND, "a summed loss takes the same steps with lr / N", unless=_units)
def method_mean_versus_sum(method: Any, case: Case) -> None:
    """Three steps without weight decay."""
    lr = method.hyperparameters({})["lr"]
    mean = Training(method, case, lr=lr, weight_decay=0.0).run()
    total = Training(method, case, lr=lr / case.samples, weight_decay=0.0, loss_reduction="sum").run(reduction="sum")
    require_close("the parameters", total.vector(), mean.vector())


@contract("method-renamed-layers", _KIND, "the names of the layers change nothing")
def method_renamed(method: Any, case: Case) -> None:
    """The network inside another module; three steps, bitwise."""
    inner = case.model()
    wrapped = nn.Sequential(OrderedDict([("inner", inner)]))
    require_equal(
        "the parameters", Training(method, case, wrapped).run().vector(), Training(method, case).run().vector()
    )


@contract("method-idle-passes", _KIND, "passes without gradients between steps leave no trace")
def method_idle_passes(method: Any, case: Case) -> None:
    """Evaluation under ``torch.no_grad`` before each step; bitwise."""
    training = Training(method, case)
    for index in range(_STEPS):
        training.model.eval()
        with torch.no_grad():
            training.model(case.batch(20 + index)[0])
        training.model.train()
        training.step(case.batch(index))
    plain = Training(method, case).run()
    require_equal("the parameters", training.vector(), plain.vector())
    require_same_state("the state", training.optimizer.state_dict(), plain.optimizer.state_dict())


@contract("method-dtype", _KIND, "parameters and states keep their precision")
def method_dtype(method: Any, case: Case) -> None:
    """float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        training = Training(method, case.to(dtype=dtype)).run()
        for name, parameter in training.model.named_parameters():
            require(parameter.dtype == dtype, f"{name} became {parameter.dtype}, was {dtype}")
        for block in training.optimizer.blocks:
            for value in (*block.storage, *block.state.tensors()):
                precise = not value.is_floating_point() or torch.finfo(value.dtype).eps <= torch.finfo(dtype).eps
                require(precise, f"the state of layer {block.layer.name!r} has only {value.dtype}, parameters {dtype}")


@contract("method-purity", _KIND, "a step changes neither the mini-batch nor the gradients")
def method_purity(method: Any, case: Case) -> None:
    """Inputs and targets bitwise; gradients are those of the loss before the step."""
    training, (inputs, targets) = Training(method, case), case.batch()
    with torch.enable_grad():
        expected = torch.autograd.grad(case.loss(training.model(inputs), targets), list(training.model.parameters()))
    with require_unchanged("the inputs", inputs), require_unchanged("the targets", targets):
        training.step((inputs, targets))
    for (name, parameter), gradient in zip(training.model.named_parameters(), expected, strict=True):
        require(parameter.grad is not None, f"the gradient of {name} is gone")
        require_close(f"the gradient of {name}", parameter.grad, gradient, tolerance=1e-12)  # type: ignore[arg-type]


@contract("method-zero-lr", _KIND, "with lr = 0 no parameter moves")
def method_zero_lr(method: Any, case: Case) -> None:
    """Three steps, bitwise, with weight decay."""
    training = Training(method, case, lr=0.0, weight_decay=0.1)
    before = training.vector()
    require_equal("the parameters", training.run().vector(), before)


@contract("method-random-state", _KIND, "the global random state is neither used nor moved")
def method_random_state(method: Any, case: Case) -> None:
    """Two global states, the same parameters; and the state stays where it was."""
    saved, found = torch.get_rng_state(), []
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(Training(method, case).run().vector())
            require(torch.equal(torch.get_rng_state(), before), "a step moved the global random state")
    finally:
        torch.set_rng_state(saved)
    require_equal("the parameters under another global random state", found[1], found[0])


CONTRACTS = contracts_of(globals())
