"""The ``backpack`` backend: BackPACK's extensions on a structural copy of the model.

BackPACK (arXiv:1912.10985v2, version 1.7) attaches its results to parameters and its state to modules, and knows a
fixed list of layers. So it runs on a copy that shares the parameters' memory, starts from
:class:`.backpack_tools.Seed` (scaled as a sum over samples, never 1/N), and what it does not know is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, UnknownNameError
from ..layers.layer import Layer
from ..likelihoods import Likelihood
from ..records.calls import ParameterSum
from ..records.needs import Record
from ..records.statistics import SampleGradients
from .backpack_run import Run
from .backpack_tools import EXTENSIONS, Watch, extension, mean_hessian, tools
from .replay import Measured, Pass, ReplayBackend
from .sampling import require_predictive, slope_at

__all__ = ["BackpackBackend"]


class BackpackBackend(ReplayBackend):
    """Measurements by BackPACK: the same record, and on request the quantities that only it has.

    Attributes:
        quantities: names of :data:`.backpack_tools.EXTENSIONS` that the record's ``extensions`` shall hold as well.
    """

    name: ClassVar[str] = "backpack"
    reads_heads: ClassVar[bool] = False
    cannot: ClassVar[Mapping[Record, str]] = {
        Record.MEANS: "secant pairs need the pre-activations of a pass with frozen parameters, which BackPACK skips",
    }

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], likelihood: Likelihood | None, loss_reduction: str, seed: int
    ):
        tools()  # refuses before a hook is placed
        super().__init__(model, layers, likelihood, loss_reduction, seed)
        self.quantities: tuple[str, ...] = ()

    def measure(self, entry: Pass, wanted: Mapping[str, Record]) -> dict[str, Measured]:
        """Up to three backward passes: the user's gradient, the sampled one, and the roots."""
        run = Run(self.model, [layer for layer in self.layers if layer.name in wanted], entry)
        with run:
            self._gradients(run, wanted)
            self._sampled(run, wanted)
            self._roots(run, wanted)
            self._asked(run)
        return run.result

    def _gradients(self, run: Run, wanted: Mapping[str, Record]) -> None:
        """Inputs, rows and whole gradients of the user's loss; the first pass also finds out what cannot be done."""
        vector = run.entry.gradient
        watch = Watch(run.modules())
        whole = [layer for layer in run.layers if Record.GRADIENTS | Record.PER_SAMPLE in wanted[layer.name]]
        names = ["BatchGrad"] if whole and vector is not None else []
        run.backward(torch.ones_like(run.entry.output) if vector is None else vector, names, watch)
        for layer in run.layers:
            record, key = wanted[layer.name], id(run.twin(layer))
            run.start(layer, watch, record)
            for call in run.result[layer.name].calls:
                call.gradient = watch.gradients.get(key) if vector is not None and Record.GRADIENTS in record else None
        for layer in whole if names else ():
            run.result[layer.name].whole = SampleGradients(loss=run.checked(layer))

    def _sampled(self, run: Run, wanted: Mapping[str, Record]) -> None:
        """The same for the labels drawn from the model, and their parameter gradients."""
        if run.entry.targets is None:
            return
        watch = Watch(run.modules())
        whole = [layer for layer in run.layers if Record.SAMPLED | Record.PER_SAMPLE in wanted[layer.name]]
        run.backward(self._slope(run.entry), ["BatchGrad"] if whole else [], watch)
        for layer in run.layers:
            measured, record = run.result[layer.name], wanted[layer.name]
            for call in measured.calls if Record.SAMPLED in record else ():
                call.sampled = watch.gradients.get(id(run.twin(layer)))
            if layer in whole:
                measured.whole = SampleGradients(measured.whole.loss, run.checked(layer))
            if Record.SAMPLED_PARAMETERS in record:
                measured.sums = [ParameterSum(run.entry.index, run.entry.samples, run.gradients(layer))]

    def _roots(self, run: Run, wanted: Mapping[str, Record]) -> None:
        """Rows and whole gradients of the likelihood's roots, by ``SqrtGGNExact``."""
        layers = [layer for layer in run.layers if Record.CURVATURE_ROOTS in wanted[layer.name]]
        if not layers:
            return
        sqrt = extension("SqrtGGNExact", self._curvature_roots(run.entry))
        watch = Watch(run.modules(), sqrt)
        run.backward(torch.ones_like(run.entry.output), [sqrt], watch)
        for layer in layers:
            measured, twin = run.result[layer.name], run.twin(layer)
            for call in measured.calls:
                found = watch.roots.get(id(twin))
                call.roots = None if found is None else found.transpose(0, 1)
            if Record.PER_SAMPLE in wanted[layer.name]:
                values = run.saved(layer, "sqrt_ggn_exact")
                roots = tuple(value.transpose(0, 1) for value in values)
                measured.whole = SampleGradients(measured.whole.loss, measured.whole.sampled, roots)

    def _asked(self, run: Run) -> None:
        """The quantities beside the record, scaled as means over samples where they are curvature."""
        for name in self.quantities:
            if name not in EXTENSIONS:
                raise UnknownNameError("quantity of BackPACK", name, EXTENSIONS)
            active, field, vector, factor = self._prepared(name, run.entry)
            run.backward(vector, [active], Watch([]))
            for layer in run.layers:
                found = run.saved(layer, field)
                run.result[layer.name].extensions[name] = tuple(_scaled(value, factor) for value in found)

    def _prepared(self, name: str, entry: Pass) -> tuple[Any, str, Tensor, float]:
        """Extension, the field it writes, the gradient at the output, and the factor of its result."""
        user = torch.ones_like(entry.output) if entry.gradient is None else entry.gradient
        if name == "batch_l2":
            scale = float(entry.samples) if self.loss_reduction == "mean" else 1.0
            return extension("BatchL2Grad", None), "batch_l2", user * scale, 1.0
        mean = 1.0 / entry.samples
        if name in ("diag_ggn_mc", "kfac"):
            start = self._slope(entry).unsqueeze(0)
            cls, field = ("DiagGGNMC", "diag_ggn_mc") if name == "diag_ggn_mc" else ("KFAC", "kfac")
            return extension(cls, start), field, user, mean
        roots = self._curvature_roots(entry)
        if name == "diag_h":
            scale = float(entry.samples) if self.loss_reduction == "mean" else 1.0
            start_of_hessian = {"matrices": [roots], "signs": [1.0]}
            return extension("DiagHessian", start_of_hessian), "diag_h", user * scale, mean
        if name == "kfra":
            return extension("KFRA", mean_hessian(roots)), "kfra", user, 1.0
        cls, field = ("DiagGGNExact", "diag_ggn_exact") if name == "diag_ggn" else ("KFLR", "kflr")
        return extension(cls, roots), field, user, mean

    def _slope(self, entry: Pass) -> Tensor:
        """Gradient of -log p(sampled label) at the output."""
        likelihood, _ = require_predictive(entry.likelihood, entry.output)
        if entry.targets is None:
            raise ArgumentError("no labels were sampled in this pass; arm the backend with Record.SAMPLED")
        return slope_at(likelihood, entry.output, entry.targets)

    def _curvature_roots(self, entry: Pass) -> Tensor:
        likelihood, output = require_predictive(entry.likelihood, entry.output)
        return likelihood.curvature_root(output)


def _scaled(value: Any, factor: float) -> Any:
    """A tensor, or Kronecker factors of which the first is a sum over samples."""
    return [factor * value[0], *value[1:]] if isinstance(value, list) else factor * value
