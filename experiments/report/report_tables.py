"""The tables of a report, from the runs of a study; misses are infinite and stay in every one of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from itertools import product

import numpy as np
import pandas as pd

from .breakdowns import COLUMNS, Breakdown, breakdown_rows
from .scoring import higher_is_better, summarise, time_to_target, value_within
from .scoring_budget import budget_curve
from .scoring_pairs import Values, as_costs, combined_effect, compare_pairs, paired_ratios
from .scoring_profiles import profile_scores
from .study_records import StudyRecord
from .tables import Spread

__all__ = [
    "CLOCKS",
    "ablation_table",
    "breakdowns_table",
    "budget_table",
    "costs_by_seed",
    "final_values",
    "measures",
    "overview_table",
    "pairs_table",
    "primary_measures",
    "profile_table",
    "profile_times",
    "reference_arm",
    "runs_table",
    "scores_table",
]

CLOCKS = {"steps": "iterations", "gradient evaluations": "gradient_evaluations", "seconds": "seconds"}
"""What time is counted in, and the column of the evaluations."""

_METRICS = ("train_loss", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy", "relative_l2", "suboptimality")
_ALWAYS = ("train_loss", "test_loss")
_KEYS = ["problem", "arm", "seed", "run", "state"]
ALL_PROBLEMS = "all problems"


def final_values(record: StudyRecord) -> pd.DataFrame:
    """One row per final run whose outcome is known, one column per measure.

    A run that missed has an infinite time, loss and (negative) accuracy. ``train_loss at equal seconds`` and ``at equal
    epochs`` are taken at the last evaluation within what every finished run of the problem had.
    """
    rows: list[dict[str, object]] = []
    for problem in record.problems:
        runs = pd.concat([record.runs.iloc[:0], *(record.finals(problem, arm) for arm in record.arms)])
        ends = [record.course(run).iloc[-1] for run in runs.loc[runs.state == "finished", "run"]]
        shared = {clock: min((float(end[clock]) for end in ends), default=math.nan) for clock in ("seconds", "epoch")}
        measured = _measured(record, problem)
        rows += [_final_row(record, run, shared, measured) for run in runs.to_dict("records")]
    return pd.DataFrame(rows, columns=None if rows else _KEYS)


def _measured(record: StudyRecord, problem: str) -> list[str]:
    """Which metrics runs of a problem have: a miss is infinitely bad by these, and not by the accuracy of values."""
    mine = record.courses[record.courses["run"].isin(record.runs.loc[record.runs.problem == problem, "run"])]
    return [name for name in _METRICS if name in mine and (name in _ALWAYS or mine[name].notna().any())]


def _final_row(
    record: StudyRecord, run: Mapping[Hashable, object], shared: dict[str, float], measured: list[str]
) -> dict[str, object]:
    """Measures of a run; ``shared``: what every finished run of the problem reached."""
    course, missed = record.course(str(run["run"])), run["state"] == "missed"
    row: dict[str, object] = {key: run[key] for key in _KEYS}
    target = record.target(str(run["problem"]))
    if target is not None:
        for clock, column in CLOCKS.items():
            row[f"{clock} to target"] = math.inf if missed else time_to_target(course, column, *target)
    for metric in measured:
        worst = -math.inf if higher_is_better(metric) else math.inf
        row[metric] = worst if missed else float(course[metric].iloc[-1])
    for clock, name in (("seconds", "seconds"), ("epoch", "epochs")):
        found = value_within(course, clock, shared[clock], "train_loss")
        row[f"train_loss at equal {name}"] = math.inf if missed else found
    row["ms per step"] = math.nan
    if len(course) and course["iterations"].iloc[-1]:
        last = course.iloc[-1]  # warm start and evaluation left out
        row["ms per step"] = 1e3 * float(last["seconds"] - last.get("warm_start_seconds", 0.0)) / last["iterations"]
    return row


def measures(values: pd.DataFrame) -> list[str]:
    """Columns of :func:`final_values` that measure something."""
    return [column for column in values.columns if column not in _KEYS]


def primary_measures(record: StudyRecord, problem: str) -> list[str]:
    """What arms of a problem are compared by: times to the target where there is one, and the final tuning metric."""
    times = [f"{clock} to target" for clock in CLOCKS] if record.target(problem) else []
    tuned = record.tuning_metric(problem)
    return list(dict.fromkeys([*times, "train_loss", *([tuned] if tuned in _METRICS else [])]))


def _counts(record: StudyRecord, problem: str, arm: str) -> dict[str, int]:
    finals = record.of(problem, arm, "final")
    announced = len(record.seeds(problem))
    ends = {"finished": "finished", "broke down": "missed", "unfinished": "unfinished"}
    counts = {name: int((finals.state == state).sum()) for name, state in ends.items()}
    return counts | {"not begun": max(0, announced - finals.seed.nunique())}


def scores_table(record: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """Long table: problem, arm, measure; how many runs; median, quartiles and interval over seeds.

    ``missed`` counts runs whose measure is infinite: they broke down, or never met the target.
    """
    rows = []
    for problem, arm in product(record.problems, record.arms):
        mine = values[(values.problem == problem) & (values.arm == arm)]
        counts = _counts(record, problem, arm)
        for measure in measures(values):
            found = mine[measure].dropna()
            if not len(found):
                continue
            sign = -1.0 if higher_is_better(measure) else 1.0
            spread = {key: sign * value for key, value in summarise(sign * found).items()}
            if sign < 0:
                spread |= {"q25": spread["q75"], "q75": spread["q25"], "low": spread["high"], "high": spread["low"]}
            missed = {"runs": len(found), "missed": int(np.isinf(found).sum())}
            rows.append({"problem": problem, "arm": arm, "measure": measure} | missed | counts | spread)
    return pd.DataFrame(rows)


def overview_table(record: StudyRecord, scores: pd.DataFrame) -> pd.DataFrame:
    """One row per problem and arm with how its runs ended and a :class:`Spread` per measure; every arm is there."""
    rows = []
    for problem, arm in product(record.problems, record.arms):
        row: dict[str, object] = {"problem": problem, "arm": arm} | dict(_counts(record, problem, arm))
        mine = scores[(scores.problem == problem) & (scores.arm == arm)] if len(scores) else scores
        for entry in mine.to_dict("records"):
            row[str(entry["measure"])] = Spread(*(float(entry[name]) for name in Spread._fields))
        rows.append(row)
    order = ["problem", "arm", "finished", "broke down", "unfinished", "not begun"]
    frame = pd.DataFrame(rows, columns=None if rows else order)
    return frame.dropna(axis="columns", how="all")


def profile_times(record: StudyRecord, values: pd.DataFrame, clock: str) -> dict[tuple[str, str], list[float]]:
    """Time-to-target of every known final run by (problem, arm).

    Only arms with a run, and of the problems with a target those on which all of these arms have one: what has not
    been run yet is no miss.
    """
    column = f"{clock} to target"
    known = values.dropna(subset=[column]) if column in values else values.iloc[:0]
    found = {key: list(group[column]) for key, group in known.groupby(["problem", "arm"], sort=False)}
    arms = [arm for arm in record.arms if any(arm == other for _, other in found)]
    shared = [problem for problem in record.problems if all((problem, arm) in found for arm in arms)]
    return {(problem, arm): found[problem, arm] for problem in shared for arm in arms}


def profile_table(record: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """Score of every arm's performance profile, per clock."""
    tables = [
        profile_scores(times).assign(clock=clock) for clock in CLOCKS if (times := profile_times(record, values, clock))
    ]
    columns = ["clock", "arm", "score", "low", "high", "problems", "solved"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def budget_table(record: StudyRecord) -> pd.DataFrame:
    """Best tuning value after k trials, for every problem, arm and k; accuracies as error rates."""
    tables = []
    for problem, arm in product(record.problems, record.arms):
        mine = record.of(problem, arm, "tune")
        known = mine[mine.state != "unfinished"]
        if len(known):
            metric = record.tuning_metric(problem)
            costs = as_costs(known.value.where(known.state == "finished"), higher_is_better(metric)).fillna(math.inf)
            label = f"1 - {metric}" if higher_is_better(metric) else metric
            left = len(mine) - len(known)
            curve = budget_curve(list(costs)).assign(problem=problem, arm=arm, metric=label, unfinished=left)
            tables.append(curve)
    columns = ["problem", "arm", "metric", "trials", "expected", "median", "q25", "q75", "miss", "unfinished"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def costs_by_seed(values: pd.DataFrame, problem: str, arm: str, measure: str) -> Values:
    """Of every seed, smaller is better."""
    mine = values[(values.problem == problem) & (values.arm == arm)]
    if measure not in mine:
        return {}
    known = mine.dropna(subset=[measure])
    costs = as_costs(known[measure], higher_is_better(measure))
    return {int(seed): float(cost) for seed, cost in zip(known.seed, costs, strict=True)}


def reference_arm(record: StudyRecord, values: pd.DataFrame, problem: str, measure: str) -> str | None:
    """The study's base, or else the arm with the best median."""
    if record.base is not None:
        return record.base
    costs = {arm: costs_by_seed(values, problem, arm, measure) for arm in record.arms}
    medians = {arm: summarise(list(found.values()))["median"] for arm, found in costs.items()}
    known = {arm: median for arm, median in medians.items() if not math.isnan(median)}
    return min(known, key=known.__getitem__) if known else None


def pairs_table(record: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """Every arm against the reference on the same seeds: the study's base, else the best arm of the problem."""
    rows = []
    for problem in record.problems:
        for measure in primary_measures(record, problem):
            reference = reference_arm(record, values, problem, measure)
            for arm in record.arms if reference is not None else ():
                own = costs_by_seed(values, problem, arm, measure)
                if arm == reference or not own:
                    continue
                found = compare_pairs(own, costs_by_seed(values, problem, str(reference), measure))
                names = {"problem": problem, "measure": measure, "arm": arm, "reference": reference}
                rows.append(names | found)
    columns = ["problem", "measure", "arm", "reference", "pairs", "wins", "ties", "losses", "ratio", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)


def ablation_table(record: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """What replacing one part of the base does: ratio to the base on the same seeds, per problem and over all.

    Below 1 the replacement is better; ``misses`` and ``base misses`` count the pairs in which the arm and the base
    miss: where both do, the ratio 1 says that neither is ahead, not that the part has no effect. A problem counts
    towards a measure where the base and the arm have a pair.
    """
    rows = []
    for arm in record.arms if record.base is not None else ():
        varied = record.varied(arm)
        if varied is None or arm == record.base:
            continue
        for measure in dict.fromkeys(m for problem in record.problems for m in primary_measures(record, problem)):
            base = str(record.base)
            both = {
                problem: (costs_by_seed(values, problem, arm, measure), costs_by_seed(values, problem, base, measure))
                for problem in record.problems
            }
            groups = {problem: [pair] for problem, pair in both.items() if pair[0].keys() & pair[1].keys()}
            if len(groups) > 1:
                groups[ALL_PROBLEMS] = [pair for (pair,) in groups.values()]
            for problem, entries in groups.items():
                effect = combined_effect([paired_ratios(*pair) for pair in entries])
                rows.append([*varied, arm, problem, measure, *_pairs_and_misses(entries), *effect])
    columns = ["part", "value", "arm", "problem", "measure", "pairs", "misses", "base misses", "ratio", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _pairs_and_misses(entries: list[tuple[Values, Values]]) -> tuple[int, int, int]:
    """Number of pairs, and of the infinite values of either side in them."""
    pairs = [(own[seed], base[seed]) for own, base in entries for seed in own.keys() & base.keys()]
    return len(pairs), sum(math.isinf(own) for own, _ in pairs), sum(math.isinf(base) for _, base in pairs)


def breakdowns_table(record: StudyRecord) -> pd.DataFrame:
    """One row per problem, arm and reason of runs that broke down: which runs, after how many steps, why."""
    missed = record.runs[record.runs.state == "missed"]
    found = [
        Breakdown(
            str(run["problem"]),
            str(run["arm"]),
            str(run["run"]).rpartition("/")[2],
            None if math.isnan(run["broke after"]) else int(run["broke after"]),
            str(run["reason"]),
        )
        for run in missed.to_dict("records")
    ]
    return pd.DataFrame(breakdown_rows(found), columns=list(COLUMNS))


def runs_table(record: StudyRecord) -> pd.DataFrame:
    """Every run there is, trials included, with its settings and how it ended."""
    table = record.runs.assign(settings=[_settings(entry) for entry in record.runs.settings])
    ends = record.courses.groupby("run").tail(1).set_index("run")
    columns = ["epoch", "iterations", "seconds", "train_loss"]
    return table.join(ends.reindex(columns=columns).astype(float), on="run")


def _settings(entry: dict[str, object]) -> str:
    return ", ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in entry.items()
    )
