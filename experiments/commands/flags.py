"""Flags that several commands have."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from ..runs.config import RunConfig, parse_options

__all__ = [
    "NUMBERS",
    "Count",
    "DataFlag",
    "DeviceFlag",
    "Number",
    "Options",
    "Place",
    "ProblemFlags",
    "SavedRunFlags",
    "Schedules",
    "StyleFlag",
]

# The help of these flags says in words what is taken where they are left out; "(default: None)" would contradict it.
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Place = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
Options = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")]
Schedules = Annotated[
    Literal["cosine", "linear", "constant"] | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")
]
Saved = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]

NUMBERS = tyro.constructors.ConstructorRegistry()
"""How numbers are read: what is none is refused in plain words, not in those of Python's types."""

_NUMBERS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number, such as 3"),
    float: (float, "a number, such as 0.1 or 1e-3"),
}


@NUMBERS.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    kinds = {kind for kind in get_args(info.type) or (info.type,) if kind is not type(None)}
    if len(kinds) != 1 or (kind := kinds.pop()) not in _NUMBERS or info.type_origin is tuple:
        return None
    optional = info.type is not kind
    read, phrase = _NUMBERS[kind]

    def made(words: list[str]) -> int | float | None:
        if optional and words == ["None"]:
            return None
        try:
            number: int | float = read(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {phrase}") from None
        return number

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=made,
        is_instance=lambda value: (optional and value is None) or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


@dataclass(frozen=True, kw_only=True)
class DeviceFlag:
    """Where a command computes."""

    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True, kw_only=True)
class DataFlag:
    """Where a command finds the data sets."""

    data_dir: Place = None
    """Folder with the data sets. Default: download, or generate; see also OSCULATE_DATA."""


@dataclass(frozen=True, kw_only=True)
class StyleFlag:
    """How the figures of a command look."""

    style: Place = None
    """File of matplotlib's settings for the figures (or the name of one of its styles), on top of the house's. Default:
    the house's alone."""

    def drawing(self) -> AbstractContextManager[None]:
        """Within this context figures have the style.

        Raises:
            ArgumentError: the file is no style.
        """
        from ..report.style import drawing

        return drawing(self.style)


@dataclass(frozen=True, kw_only=True)
class ProblemFlags(DataFlag, DeviceFlag):
    """What a command that trains on a problem of its own takes."""

    problem: str = "digits-autoencoder"
    """Problem; 'osculate problems' lists them."""
    problem_option: Options = ()
    """Further keyword of the problem: --problem-option size=small."""
    seed: int = 0
    """Seed of the parameters, the order of the data and the method's sampling."""

    def config(self, method: str, **given: Any) -> RunConfig:
        """Return the configuration of a run with these flags.

        Args:
            method: registered name.
            **given: further fields of :class:`RunConfig`.
        """
        options = parse_options(self.problem_option)
        return RunConfig(self.problem, method, seed=self.seed, device=self.device, problem_options=options, **given)


@dataclass(frozen=True, kw_only=True)
class SavedRunFlags(DataFlag):
    """What a command that looks into a run takes."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
    """Folder of a run."""
    device: Saved = None
    """cpu, cuda or cuda:N. Default: the run's own."""
