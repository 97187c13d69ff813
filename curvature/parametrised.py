"""Modules whose weight is computed: from a direction and a length, from a masked or normalised original, ..."""

from __future__ import annotations

from torch import nn

__all__ = ["has_plain_weights"]

_ROLES = ("weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def has_plain_weights(module: nn.Module) -> bool:
    """Whether every weight and bias that the module (or attention's output projection) multiplies with is a parameter.

    Both of torch's ways to reparametrise take the name out of the module's parameters: ``weight_norm``,
    ``spectral_norm`` and ``prune`` leave a plain tensor, ``parametrize`` a property of the class.
    """
    parts = [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]
    return all(name in part._parameters or getattr(part, name, None) is None for part in parts for name in _ROLES)
