"""Hooks that belong to a module and to none of its copies.

``copy.deepcopy`` (teachers, exponential moving averages, ``AveragedModel``), ``pickle`` and ``torch.jit.script`` take
a module's hooks along: a copy would hold objects of this library, a file would need it to be read, and a script would
have to compile them. Torch keeps hooks in dictionaries of the module; ours stand in dictionaries that leave them out.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["NOTHING", "after", "before_call"]

NOTHING: tuple[Any, tuple[Any, ...]] = (getattr, (contextlib.nullcontext(), "__exit__"))
"""How an object is pickled that becomes a function of any arguments which does nothing, of Python's own library."""

_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class HookTable(OrderedDict[int, Any]):
    """Hooks of a module by number, or what torch notes of them; ``own``: the numbers of ours."""

    def __init__(self, *entries: Any) -> None:
        self.own: set[int] = set()
        super().__init__(*entries)

    def theirs(self) -> list[tuple[int, Any]]:
        """Numbers and hooks that are not ours."""
        return [(number, hook) for number, hook in self.items() if number not in self.own]

    def values(self) -> Any:
        """Theirs: what ``torch.jit.script`` compiles. A module that is called asks for ``items``."""
        return [hook for _, hook in self.theirs()]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy is an ordinary dictionary of theirs."""
        return OrderedDict, (self.theirs(),)


def after(module: nn.Module, hook: Callable[..., Any], **options: bool) -> RemovableHandle:
    """A forward hook of ours. Arguments as those of ``register_forward_hook``."""
    _prepare(module, _AFTER)
    return _noted(module, _AFTER, module.register_forward_hook(hook, **options))


def before_call(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """A forward pre-hook of ours."""
    _prepare(module, _BEFORE)
    return _noted(module, _BEFORE, module.register_forward_pre_hook(hook))


def _prepare(module: nn.Module, names: tuple[str, ...]) -> None:
    """Put tables of ours in the place of torch's.

    Where somebody else has hooks already, the handles of these know the dictionary, so it stays.
    """
    if not any(getattr(module, name) for name in names):
        for name in names:
            setattr(module, name, HookTable())


def _noted(module: nn.Module, names: tuple[str, ...], handle: RemovableHandle) -> RemovableHandle:
    for name in names:
        table = getattr(module, name)
        if isinstance(table, HookTable):
            table.own.add(handle.id)
    return handle
