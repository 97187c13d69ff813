"""Which tensor of what a model returns is the one that its likelihood reads.

A model may return a tuple, a dictionary, a dataclass. The user's ``output`` (a name, an index or a function) says which
tensor it is; the obvious ones are found without a word: ``.logits``, the key ``"logits"``, or the only tensor of
floating point with a batch axis. A model with several heads takes one likelihood per head: their parameters form one
vector per sample, and its negative log-likelihood is the sum over the heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...errors import ArgumentError
from ..likelihoods import Likelihood, resolve_likelihood

__all__ = ["Choice", "Heads", "JointLikelihood", "Read", "read_output", "resolve_heads", "select_output"]

Choice = str | int | Callable[[Any], Tensor] | None
"""How the user says which tensor is meant."""


class Heads:
    """Likelihoods of several heads, by the name or index of each head in what the model returns.

    Args:
        parts: per head its likelihood.
    """

    def __init__(self, parts: Mapping[str | int, Likelihood]):
        self.parts = dict(parts)
        self.name = " and ".join(f"{entry.name} at {key!r}" for key, entry in self.parts.items())

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Not before the heads' shapes are known: :func:`read_output`."""
        raise _unread(self)

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """As for ``sample``."""
        raise _unread(self)

    def curvature_root(self, output: Tensor) -> Tensor:
        """As for ``sample``."""
        raise _unread(self)


class JointLikelihood:
    """Independent heads, given the model's output: ``output`` is (N, D), the heads' parameters one after another.

    Args:
        parts: likelihoods in the order of the columns.
        shapes: of each head for one sample.
    """

    def __init__(self, parts: Sequence[Likelihood], shapes: Sequence[torch.Size]):
        self.parts, self.shapes = list(parts), list(shapes)
        self.name = " and ".join(entry.name for entry in self.parts)

    def sample(self, output: Tensor, generator: torch.Generator) -> Any:
        """One set of labels per head, drawn in turn."""
        return tuple(part.sample(head, generator) for part, head in self.heads(output))

    def negative_log_likelihood(self, output: Tensor, target: Any) -> Tensor:
        """Sum over the heads."""
        found = [
            part.negative_log_likelihood(head, labels)
            for (part, head), labels in zip(self.heads(output), target, strict=True)
        ]
        return torch.stack(found).sum()

    def curvature_root(self, output: Tensor) -> Tensor:
        """Roots of each head in turn, zero in the columns of the others."""
        found, start, width = [], 0, output.shape[1]
        for part, head in self.heads(output):
            roots = part.curvature_root(head)
            roots = roots.reshape(*roots.shape[:2], -1)  # a head (N,) has one coordinate
            found.append(torch.nn.functional.pad(roots, (start, width - start - roots.shape[2])))
            start += roots.shape[2]
        return torch.cat(found)

    def heads(self, output: Tensor) -> Iterator[tuple[Likelihood, Tensor]]:
        """Per head its likelihood and its own columns in its own shape."""
        widths = [shape.numel() for shape in self.shapes]
        for part, shape, columns in zip(self.parts, self.shapes, output.split(widths, 1), strict=True):
            yield part, columns.reshape(-1, *shape)


@dataclasses.dataclass(frozen=True)
class Read:
    """What was read off one output.

    Attributes:
        likelihood: of ``output``; ``None`` if none is known.
        output: (N, ...) the one tensor, or (N, D) all heads side by side.
        sources: the tensors that the model returned, each with its first column in a joint output.
    """

    likelihood: Likelihood | None
    output: Tensor
    sources: tuple[tuple[Tensor, int], ...]


def resolve_heads(likelihood: Any) -> Likelihood | None:
    """A likelihood from a name, an object, or a dictionary with one for each head.

    Raises:
        UnknownNameError: for an unknown name.
        ArgumentError: for an empty dictionary, or heads that are neither names nor indices.
    """
    if not isinstance(likelihood, Mapping):
        return resolve_likelihood(likelihood)
    if not likelihood or not all(isinstance(key, str | int) for key in likelihood):
        raise ArgumentError(
            f"a dictionary of likelihoods has the name or index of each head as its keys, got {likelihood!r}; e.g. "
            "likelihood={'policy': 'categorical', 'value': 'gaussian'}"
        )
    parts: dict[str | int, Likelihood] = {}
    for key, entry in likelihood.items():
        resolved = resolve_likelihood(entry)
        if resolved is None:
            raise ArgumentError(f"head {key!r} has no likelihood; leave it out, or name one")
        parts[key] = resolved
    return Heads(parts)


def read_output(likelihood: Likelihood | None, output: Any, choice: Choice = None) -> Read:
    """The tensor that the likelihood reads, from what the model returned.

    Raises:
        ArgumentError: if it is not there, or none or several could be meant.
    """
    if not isinstance(likelihood, Heads):
        chosen = select_output(output, choice)
        return Read(likelihood, chosen, ((chosen, 0),))
    heads = [select_output(output, key) for key in likelihood.parts]
    counts = {len(head) for head in heads}
    if len(counts) > 1:
        raise ArgumentError(
            f"the heads {', '.join(map(repr, likelihood.parts))} have {sorted(counts)} rows; their first axis counts "
            "the same samples"
        )
    flat = [head.reshape(len(head), -1) for head in heads]
    sources, start = [], 0
    for head, columns in zip(heads, flat, strict=True):
        sources.append((head, start))
        start += columns.shape[1]
    joint = JointLikelihood(list(likelihood.parts.values()), [head.shape[1:] for head in heads])
    return Read(joint, torch.cat(flat, 1), tuple(sources))


def select_output(output: Any, choice: Choice = None) -> Tensor:
    """The tensor that is meant, (N, ...).

    Args:
        output: what the model returned.
        choice: a name, an index or a function; ``None``: the obvious one.

    Raises:
        ArgumentError: if it is not there, is no tensor with a batch axis, or none or several could be meant.
    """
    if choice is None:
        found = output if isinstance(output, Tensor) else _obvious(output)
    elif isinstance(choice, str | int):
        found = _entry(output, choice)
    else:
        found = choice(output)
    if not isinstance(found, Tensor) or found.ndim == 0:
        what = f"output={choice!r} of the model is" if choice is not None else "the model returns"
        shown = "a single number, which has no batch axis" if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(
            f"{what} {shown}; the likelihood reads one Tensor whose first axis counts samples: {_WAY_OUT}"
        )
    return found


_WAY_OUT = (
    "say which with osculate.build(..., output=...): a name ('logits'), an index (0) or a function of what the model "
    "returns (lambda result: result['head'].logits), or give one likelihood per head, "
    "likelihood={'policy': 'categorical', 'value': 'gaussian'}"
)


def _obvious(output: Any) -> Tensor:
    """``logits``, or the only tensor of floating point with a batch axis."""
    entries = _entries(output)
    logits = entries.get("logits")
    if isinstance(logits, Tensor):
        return logits
    found: dict[Hashable, Tensor] = {key: value for key, value in entries.items() if _may_be_read(value)}
    inside = [value for value in tree_leaves(list(entries.values())) if _may_be_read(value)]
    if len(found) == len(inside) == 1:
        return next(iter(found.values()))
    several = f"several tensors ({', '.join(map(repr, found))}{', and deeper' if len(inside) > len(found) else ''})"
    raise ArgumentError(
        f"the model returns {_shown(output)} with {several if inside else 'no tensor with a batch axis'}, and the "
        f"likelihood reads one Tensor whose first axis counts samples; {_WAY_OUT}"
    )


def _entry(output: Any, key: str | int) -> Any:
    if isinstance(output, Tensor):
        pass
    elif isinstance(key, int) and not isinstance(output, Mapping) and hasattr(output, "__getitem__"):
        try:
            return output[key]
        except (IndexError, TypeError):
            pass
    elif isinstance(output, Mapping) and key in output:
        return output[key]
    elif isinstance(key, str) and hasattr(output, key):
        return getattr(output, key)
    elif isinstance(key, int) and isinstance(output, Mapping) and -len(output) <= key < len(output):
        return list(output.values())[key]
    raise ArgumentError(f"the model returns {_shown(output)}, which has no {key!r}; {_WAY_OUT}")


def _entries(output: Any) -> dict[Hashable, Any]:
    """What an output consists of, by name or index."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        return dict(zip(names, output, strict=True))
    if dataclasses.is_dataclass(output):
        return {entry.name: getattr(output, entry.name, None) for entry in dataclasses.fields(output)}
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _may_be_read(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.is_floating_point()


def _shown(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"one Tensor of shape {tuple(output.shape)}"
    keys = ", ".join(map(repr, _entries(output)))
    return f"a {type(output).__name__} ({keys})" if keys else f"a {type(output).__name__}"


def _unread(heads: Heads) -> ArgumentError:
    return ArgumentError(f"the likelihoods {heads.name} read several heads; take read_output(likelihood, output)")
