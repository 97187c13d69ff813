"""Flags that several commands have, and the line in which they say where their results lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

__all__ = ["Count", "DataFlags", "DeviceFlag", "Number", "Options", "Place", "SavedRunFlags", "say"]

# The help of these flags says in words what is taken where they are left out; "(default: None)" would contradict it.
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Place = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
Options = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")]
Saved = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class DeviceFlag:
    """Where a command computes."""

    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True, kw_only=True)
class DataFlags(DeviceFlag):
    """What a command that trains on a problem of its own takes."""

    data_dir: Place = None
    """Folder with the data sets. Default: download, or generate."""
    problem_option: Options = ()
    """Further keyword of the problem: --problem-option size=small."""


@dataclass(frozen=True, kw_only=True)
class SavedRunFlags:
    """What a command that looks into a run takes."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
    """Folder of a run."""
    device: Saved = None
    """cpu, cuda or cuda:N. Default: the run's own."""
    data_dir: Place = None
    """Folder with the data sets. Default: download, or generate."""


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: nothing in it is markup or coloured, and a long path is not broken."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
