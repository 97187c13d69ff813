"""Types of flags that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["Count", "Number", "Place"]

# The help of these flags says in words what is taken where they are left out; "(default: None)" would contradict it.
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Place = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
