"""What a rival is: an optimizer of another package, with the terms on which it stands beside the methods.

A rival is run as its authors say that it is to be used: an average of the parameters where they call one crucial, the
optimizer's own modes around evaluation, the loss where it wants it. It has no parts, so nothing of it can be exchanged.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError, UnknownNameError

__all__ = ["Option", "Rival"]

Groups = Sequence[Mapping[str, Any]]
Factory = Callable[[ModuleType, Groups, Mapping[str, Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Option:
    """A keyword of the package's optimizer: its default, and what it means."""

    default: Any
    meaning: str


@dataclass(frozen=True)
class Rival:
    """An optimizer of another package.

    Args:
        name: under which it runs.
        distribution: what pip installs.
        module: what is imported of it.
        factory: makes the optimizer of the module, parameter groups and keywords.
        tested: version of the package that the tests ran with.
        licence: of the package, as its metadata say.
        paper: where the method comes from.
        summary: what it is, in one line.
        lr: default learning rate; a factor on its own steps where it needs none.
        keywords: options by name.
        coupled: whether weight decay is a penalty in the gradient, unless an option ``decouple`` is set.
        takes_loss: whether ``step`` is given the loss.
        every_gradient: whether it needs a gradient of every parameter; those without one get zeros.
        one_group: whether it treats parameter groups as problems of their own, so that there must be one only.
        modes: whether it has ``train()`` and ``eval()`` of its own around evaluation.
        averager: makes the average of the parameters that is evaluated, with an option ``average``; else ``None``.
        attributes: numbers that it keeps outside its ``state_dict``.
        batch_norm: keywords whose default is another one on networks with batch normalisation.
    """

    name: str
    distribution: str
    module: str
    factory: Factory
    tested: str
    licence: str
    paper: str
    summary: str
    lr: float = 1.0
    keywords: Mapping[str, Option] = field(default_factory=dict)
    coupled: bool = False
    takes_loss: bool = False
    every_gradient: bool = False
    one_group: bool = False
    modes: bool = False
    averager: Callable[[ModuleType, nn.Module], Any] | None = None
    attributes: tuple[str, ...] = ()
    batch_norm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, float]:
        """Default ``lr`` and ``weight_decay``; there is no damping."""
        return {"lr": self.lr, "weight_decay": 0.0}

    @property
    def options(self) -> dict[str, Any]:
        """Keywords with their defaults."""
        return {name: option.default for name, option in self.keywords.items()}

    @property
    def installed(self) -> str | None:
        """Version of the package here; ``None`` where it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def library(self) -> str:
        """Package and version here, as a run records them."""
        return f"{self.distribution} {self.installed or 'of unknown version'}"

    def load(self) -> ModuleType:
        """Import the package.

        Raises:
            ArgumentError: it is not installed, or cannot be imported; the message has the line for pip.
        """
        line = f"python -m pip install '{self.distribution}=={self.tested}'"
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != self.module.partition(".")[0]:
                raise ArgumentError(f"{self.name!r} needs {error.name}, which is not installed ({error})") from error
            raise ArgumentError(
                f"{self.name!r} is the optimizer of the package {self.distribution}, which is not installed: {line} "
                "(all rivals, where the repository of osculate lies: python -m pip install -e '.[rivals]')"
            ) from error
        except ImportError as error:
            raise ArgumentError(f"{self.distribution} cannot be imported ({error}); try {line}") from error

    def arguments(self, model: nn.Module | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every keyword with its value, ``lr`` and ``weight_decay`` among them.

        Args:
            model: the network, for defaults that depend on it.
            given: keywords that are not left to the defaults.

        Raises:
            ArgumentError: a keyword is not one of this optimizer.
        """
        if given.get("damping") is not None:
            raise ArgumentError(f"{self.name!r} has no damping; leave it out, or set it for the methods that have it")
        for name in given:
            if name not in self.keywords and name not in (*self.defaults, "damping"):
                raise UnknownNameError(f"option of {self.name}", name, [*self.keywords, *self.defaults])
        normalised = model is not None and any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
        )
        usual = self.defaults | self.options | (dict(self.batch_norm) if normalised else {})
        return usual | {name: value for name, value in given.items() if name != "damping"}

    def make(self, groups: Groups, arguments: Mapping[str, Any]) -> Any:
        """The package's optimizer.

        Args:
            groups: of parameters.
            arguments: see :meth:`arguments`.

        Raises:
            ArgumentError: the package is not installed, or refuses a value.
        """
        module = self.load()
        keywords = {name: value for name, value in arguments.items() if name != "average"}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some announce themselves
                return self.factory(module, groups, keywords)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{self.name} of {self.distribution} refuses its arguments: {error}") from error

    def check_values(self, given: Mapping[str, Any]) -> None:
        """See that keywords are known and in range, by making an optimizer of one number.

        Raises:
            ArgumentError: they are not, or the package is not installed.
        """
        self.make([{"params": [nn.Parameter(torch.zeros(1))]}], self.arguments(None, given))
