"""Whether a module's forward is the one that an adapter knows, and what to say where it is not.

An adapter reads a module by its class. A subclass with a forward of its own, one that overrides a helper of that
forward, and a module whose forward was replaced on the instance compute something else: their rows would be wrong
without a word. Forward hooks are no matter: records are taken between the last forward pre-hook and the first hook.
"""

from __future__ import annotations

import types

from torch import nn

__all__ = ["keeps_forward", "own_forward"]

_HELPERS = ("_conv_forward", "_output_padding", "_apply_instance_norm", "_handle_no_batch_input")
"""What torch's own forwards call on the module."""


def keeps_forward(module: nn.Module, expected: type[nn.Module], *also: type[nn.Module]) -> bool:
    """Whether calling ``module``, an instance of ``expected``, does what calling an ``expected`` does.

    Args:
        module: the module.
        expected: the class whose forward is known.
        *also: further classes whose forward would do.
    """
    if not isinstance(module, expected) or _replaced(module):
        return False
    cls = type(module)
    if cls.forward not in [known.forward for known in (expected, *also)] or cls.__call__ is not nn.Module.__call__:
        return False
    return all(
        name not in vars(module) and getattr(cls, name, None) is getattr(expected, name, None) for name in _HELPERS
    )


def own_forward(module: nn.Module) -> str:
    """Why no adapter takes a module that has torch's layers among its ancestors or a replaced forward; else empty."""
    if _replaced(module):
        return "its forward was replaced on the instance"
    if type(module).__module__.startswith("torch.nn."):
        return ""
    known = [cls for cls in type(module).__mro__[1:] if cls.__module__.startswith("torch.nn.modules")]
    known = [cls for cls in known if cls is not nn.Module and not cls.__name__.startswith("_")]
    if not known or keeps_forward(module, known[0]):
        return ""
    return f"{type(module).__name__} does something else than {known[0].__name__} when it is called"


def _replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's."""
    own = vars(module).get("forward")
    bound = isinstance(own, types.MethodType) and own.__self__ is module and own.__func__ is type(module).forward
    return own is not None and not bound
