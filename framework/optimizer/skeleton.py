"""The modules and parameters that an optimizer was built for, and whether the model still has them.

Layers hold modules, and blocks hold parameters, from the moment of ``build``. A layer that is replaced afterwards, a
parameter that is created again or a model that changes its dtype leaves them with the old ones: training would go on
without a word, on parameters that the model no longer uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ...curvature.layers.layer import Layer
from ...errors import ArgumentError
from .groups import unowned_parameters

__all__ = ["Skeleton"]

_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")
_BUILD_AGAIN = "no parameter and no state was changed; build a new optimizer for the model as it is"


class Skeleton:
    """Where every module and parameter of a model stood.

    Asked at every step, so :meth:`unchanged` is a few comparisons of lists, 0.2 microseconds per parameter; only when
    one differs somebody looks at what has changed.

    Args:
        model: the model.
        layers: its layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        owned = {id(parameter) for layer in layers for parameter in layer.parameters.values()}
        holders: list[dict[str, Any]] = []
        self._owned: list[tuple[str, nn.Module, str, nn.Parameter]] = []
        self.modules = list(model.modules())
        for path, module in model.named_modules():
            holders += [module._modules, module._parameters]
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in owned:
                    self._owned.append((f"{path}.{name}" if path else name, module, name, parameter))
        self._parameters = [parameter for _, _, _, parameter in self._owned]
        self._dtypes, self._shapes = list(map(_DTYPE, self._parameters)), list(map(_SHAPE, self._parameters))
        self._holders = [holder for holder in holders if holder]
        self._empty = [holder for holder in holders if not holder]
        self._names = list(chain.from_iterable(self._holders))
        self._held = [value for holder in self._holders for value in holder.values()]  # alive, so that ids stay theirs
        self._ids = list(map(id, self._held))

    def unchanged(self) -> bool:
        """Whether every module and parameter is where it was, in the dtype and shape that it had."""
        return (
            [id(value) for holder in self._holders for value in holder.values()] == self._ids
            and list(chain.from_iterable(self._holders)) == self._names
            and not any(self._empty)
            and list(map(_DTYPE, self._parameters)) == self._dtypes
            and list(map(_SHAPE, self._parameters)) == self._shapes
        )

    def updated(self, model: nn.Module, layers: Sequence[Layer], unowned: dict[str, Tensor]) -> Skeleton:
        """The skeleton of a model that has changed around the layers that are served, which must be what they were.

        Args:
            model: the model as it is now.
            layers: as they were found.
            unowned: parameters of the model that no layer has; brought up to date in place.

        Raises:
            ArgumentError: if a parameter that is served has another dtype or shape, is another one, or is no longer in
                the model.
        """
        for (name, _, _, parameter), shape in zip(self._owned, self._shapes, strict=True):
            if parameter.shape != shape:
                raise ArgumentError(
                    f"parameter {name!r} had shape {tuple(shape)} when the optimizer was built and has "
                    f"{tuple(parameter.shape)} now (parameter.data = ...); {_BUILD_AGAIN}"
                )
        for (name, _, _, parameter), dtype in zip(self._owned, self._dtypes, strict=True):
            if parameter.dtype is not dtype:
                raise ArgumentError(
                    f"parameter {name!r} was {dtype} when the optimizer was built and is {parameter.dtype} now "
                    f"(model.to(dtype), .double(), .half()), while its momentum and statistics are not; {_BUILD_AGAIN}"
                )
        present = {id(module) for module in model.modules()}
        gone: list[str] = []
        replaced: list[str] = []
        for path, module, name, parameter in self._owned:
            if id(module) not in present:
                gone.append(path)
            elif module._parameters.get(name) is not parameter:
                replaced.append(path)
        if gone:
            raise ArgumentError(
                f"the modules of parameters {', '.join(gone)} are no longer in the model: a layer was replaced or "
                f"removed after osculate.build, and what stands in its place would never be trained; {_BUILD_AGAIN}"
            )
        if replaced:
            raise ArgumentError(
                f"parameters {', '.join(replaced)} are not those that the optimizer was built for: they were created "
                "again (load_state_dict(assign=True), module.weight = nn.Parameter(...), a parametrisation, pruning), "
                f"and would never be trained; {_BUILD_AGAIN}, or load with assign=False, which writes into them"
            )
        fresh = unowned_parameters(model, layers)
        unowned.clear()
        unowned.update(fresh)
        return Skeleton(model, layers)
