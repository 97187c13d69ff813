"""Submissions to AlgoPerf (v0.6, PyTorch) of registered methods, for either of its tuning rulesets.

AlgoPerf calls the functions of a module; this writes such a module, which needs ``osculate`` and ``algoperf`` to run.
Under external tuning the search space stands beside it; under self-tuning there is none: every workload gets the same
module, hyperparameters are None, and the method must choose its steps. Names, arguments and returned triples follow
the benchmark's documentation (version 0.6.0) and its ``algoperf/spec.py``; batch sizes are those of its baselines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from jinja2 import StrictUndefined, Template
from rich.console import Console

from ... import registry
from ...errors import ArgumentError, UnknownNameError
from ...framework.methods.method import Method
from ...framework.methods.momentum import Decoupled
from ...stepsize.constant import ConstantStep
from ..runs.config import parse_options
from ..runs.targets import require_folder, writing
from .flags import Options
from .screen import say

__all__ = ["ExportSubmission", "search_space", "submission_source"]

_AROUND = 30.0
"""A learning rate or damping is searched from its default over this to its default times this, on a log scale."""

_LARGEST_PAIR_DAMPING = 0.9
"""Double damping needs damping below 1."""

_SPACE = "tuning_search_space.json"
_SEARCHED = ("lr", "damping", "weight_decay")


def search_space(method: Method) -> dict[str, dict[str, Any]]:
    """Workload-agnostic search space: learning rate, damping where it is used, weight decay, dropout.

    A method that chooses its own step sizes keeps learning rate 1, which is a multiplier then.

    Args:
        method: whose defaults are the middle of the ranges.

    Returns:
        ``tuning_search_space.json``: ``min``, ``max`` and ``scaling``, or ``feasible_points``, by name.
    """
    values = method.hyperparameters({})
    space = {"learning_rate": _around(values["lr"]) if _has_learning_rate(method) else {"feasible_points": [1.0]}}
    if values["damping"] > 0:
        largest = _LARGEST_PAIR_DAMPING if method.looks_back else float("inf")
        space["damping"] = _around(values["damping"], largest)
    decoupled = isinstance(method.weight_decay, Decoupled)
    lowest, highest = (5e-3, 1.0) if decoupled else (1e-6, 1e-3)
    space["weight_decay"] = {"min": lowest, "max": highest, "scaling": "log"}
    space["warmup_factor"] = {"feasible_points": [0.05]}
    space["dropout_rate"] = {"feasible_points": [0.0, 0.1]}
    space["label_smoothing"] = {"feasible_points": [0.0, 0.1]}
    return space


def _around(middle: float, largest: float = float("inf")) -> dict[str, Any]:
    return {"min": middle / _AROUND, "max": min(middle * _AROUND, largest), "scaling": "log"}


def _has_learning_rate(method: Method) -> bool:
    rule = method.step_size
    while hasattr(rule, "rule"):
        rule = rule.rule
    return isinstance(rule, ConstantStep)


def submission_source(name: str, options: Mapping[str, Any], *, self_tuning: bool = False) -> str:
    """The module's source.

    Args:
        name: registered method.
        options: of the method; plain values. With ``self_tuning`` also ``damping`` and ``weight_decay``.
        self_tuning: for the ruleset of this name.

    Raises:
        ArgumentError: a value is out of range, or a method for self-tuning has a learning rate.
    """
    entry = registry.methods()[name]
    method = registry.method(name, **{key: value for key, value in options.items() if key not in _SEARCHED})
    if self_tuning:
        if _has_learning_rate(method):
            free = [other for other, known in registry.methods().items() if not _has_learning_rate(known.factory())]
            raise ArgumentError(
                f"{name!r} has a learning rate, which nobody tunes under the self-tuning ruleset; take a method that "
                f"chooses its steps ({', '.join(free)}), or leave --self-tuning out"
            )
        method.check_values(**method.hyperparameters({key: options.get(key) for key in _SEARCHED}))
    damping = "hyperparameters.damping" if method.hyperparameters({})["damping"] > 0 else "None"
    source = (Path(__file__).parent / "templates" / "submission.py.jinja").read_text(encoding="utf-8")
    template = Template(source, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text: str = template.render(
        name=name,
        summary=entry.summary.replace("\\", "\\\\").replace('"""', "'''"),
        paper=entry.paper,
        method=repr(name),
        options=repr(dict(options)),
        damping=damping,
        self_tuning=self_tuning,
    )
    return text


@dataclass(frozen=True)
class ExportSubmission:
    """Write an AlgoPerf submission of a method: submission.py and, for external tuning, tuning_search_space.json.

    The module follows AlgoPerf v0.6 (PyTorch). It needs osculate installed beside algoperf.
    """

    method: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="METHOD")]
    """Method; 'osculate methods' lists them."""
    out: Path
    """Folder to write."""
    option: Options = ()
    """Further keyword of the method: --option statistics_every=2; 'osculate methods NAME' lists them."""
    self_tuning: bool = False
    """Write the form for the self-tuning ruleset, which has no search space: for methods without a learning rate."""

    def run(self, console: Console) -> int:
        """Check, write, and return the exit status."""
        options = parse_options(self.option)
        tuned = sorted(options.keys() & ({"lr"} if self.self_tuning else set(_SEARCHED)))
        if tuned and self.self_tuning:
            raise ArgumentError("lr is no option under the self-tuning ruleset: the method chooses its steps")
        if tuned:
            raise ArgumentError(f"{', '.join(tuned)} is searched, not fixed; edit {_SPACE} instead")
        if self.self_tuning and (self.out / _SPACE).exists():
            raise ArgumentError(f"{self.out} holds {_SPACE}, which AlgoPerf refuses under this ruleset; remove it")
        if self.method not in registry.methods():
            raise UnknownNameError("method", self.method, registry.methods())
        files = {"submission.py": submission_source(self.method, options, self_tuning=self.self_tuning)}
        if not self.self_tuning:
            files[_SPACE] = json.dumps(search_space(registry.method(self.method, **options)), indent=2) + "\n"
        require_folder(self.out, *files)
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (self.out / name).write_text(text, encoding="utf-8")
        say(console, f"{' and '.join(files)} {'lie' if len(files) > 1 else 'lies'} in {self.out}")
        return 0
