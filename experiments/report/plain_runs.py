"""Runs of no study, side by side: arms and problems are told apart by what differs in their configurations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

__all__ = ["seeds_run_twice", "told_apart"]

_SAME_ARM = (
    *("problem", "method", "seed", "device", "library", "problem_options", "test_set"),
    *("training_samples", "data_checksum", "data_origin"),
)
"""Entries of a configuration by which arms do not differ."""


def told_apart(runs: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The runs with what differs in the names of their problems and arms: ``sgdm lr=0.03``.

    Args:
        runs: see ``StudyRecord``.
        configs: of those runs that no study made, by run.
    """
    problems, arms = runs["problem"].copy(), runs["arm"].copy()
    plain = runs[runs["run"].isin(configs)]
    for _, group in plain.groupby("problem", sort=False):
        options = {run: _flat(configs[run].get("problem_options")) for run in group["run"]}
        _name(problems, group, options)
    for _, group in plain.groupby([problems, "arm"], sort=False):
        _name(arms, group, {run: _arm_entries(configs[run]) for run in group["run"]})
    return runs.assign(problem=problems, arm=arms)


def seeds_run_twice(runs: pd.DataFrame) -> list[str]:
    """One sentence for every seed that an arm has run more than once; the first run counts."""
    finals = runs[(runs["phase"] == "final") & (runs["state"] != "unfinished")]
    return [
        f"{problem}, {arm}: seed {seed} was run {len(group)} times; {group['run'].iloc[0]} counts, "
        f"{', '.join(group['run'].iloc[1:])} not"
        for (problem, arm, seed), group in finals.groupby(["problem", "arm", "seed"], sort=False)
        if len(group) > 1
    ]


def _name(labels: pd.Series[str], group: pd.DataFrame, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to the labels of a group the entries that are not the same in all its runs."""
    keys = dict.fromkeys(key for own in entries.values() for key in own)
    differ = [key for key in keys if len({_written(own.get(key)) for own in entries.values()}) > 1]
    for index, run in zip(group.index, group["run"], strict=True):
        pieces = [f"{key}={_written(entries[run].get(key))}" for key in differ]
        labels.loc[index] = " ".join([str(labels.loc[index]), *pieces])


def _arm_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in config.items() if key not in _SAME_ARM}
    options = own.pop("method_options", None)
    return _flat(own) | _flat(options)


def _flat(entries: Any, prefix: str = "") -> dict[str, Any]:
    """Entries of nested tables by the names of both."""
    pairs: Iterable[tuple[str, Any]] = entries.items() if isinstance(entries, Mapping) else ()
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _written(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
