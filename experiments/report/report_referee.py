"""What a referee asks of a study: are there enough seeds, is the target reached beyond chance, do arms differ.

The tables of :mod:`.report_tables` describe; these decide. Misses are infinite in both.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd

from .report_tables import CLOCKS, costs_by_seed, primary_measures, reference_arm
from .scoring import higher_is_better, quantile
from .scoring_pairs import paired_ratios
from .scoring_targets import first_step, order_interval, target_rule
from .scoring_tests import holm, paired_t, signed_rank
from .study_records import StudyRecord

__all__ = ["FEW_SEEDS", "SMALL", "rule_table", "seed_warnings", "targets_table", "tests_table"]

SMALL = 10_000
"""A problem with at most so many training samples is a small one."""

FEW_SEEDS = {"small": 10, "other": 5}
"""Seeds that a claim needs at least."""


def seed_warnings(record: StudyRecord) -> list[str]:
    """One sentence for every problem that has been run on too few seeds; the arm with the fewest counts."""
    warnings = []
    for problem in record.problems:
        counts = {arm: len(record.finals(problem, arm)) for arm in record.arms}
        known = {arm: count for arm, count in counts.items() if count}
        if not known:
            continue
        fewest = min(known.values())
        samples = record.samples.get(problem)
        kind = "small" if samples is not None and samples <= SMALL else "other"
        if fewest < FEW_SEEDS[kind]:
            size = f"a small problem ({samples:,} training samples)" if kind == "small" else "a problem"
            warnings.append(
                f"{problem}: {fewest} seed{'s' if fewest > 1 else ''}, where a claim needs at least {FEW_SEEDS[kind]} "
                f"on {size}{'' if kind == 'small' else ' of its size'}: an order of the arms may be chance"
            )
    return warnings


def targets_table(record: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """Time-to-target of every arm on every clock: how many runs met it, median, quartiles and exact interval."""
    rows = []
    for problem, arm, clock in product(record.problems, record.arms, CLOCKS):
        measure = f"{clock} to target"
        if measure not in values or record.target(problem) is None:
            continue
        found = values.loc[(values.problem == problem) & (values.arm == arm), measure].dropna().to_numpy(dtype=float)
        if len(found):
            interval = order_interval(found)
            quartiles = (float(quantile(found, share)) for share in (0.25, 0.75))
            met = int(np.isfinite(found).sum())
            rows.append([problem, arm, clock, len(found), met, interval.point, *quartiles, *interval[1:]])
    columns = ["problem", "arm", "clock", "runs", "met", "median", "q25", "q75", "low", "high", "coverage"]
    return pd.DataFrame(rows, columns=columns)


def rule_table(record: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """The league's rule on the last evaluation of every arm, and the first step at which it holds for all seeds."""
    rows = []
    for problem, arm in product(record.problems, record.arms):
        target = record.target(problem)
        finals = record.finals(problem, arm)
        if target is None or not len(finals) or target[0] not in values:
            continue
        metric, bound = target
        sign = -1.0 if higher_is_better(metric) else 1.0
        mine = values[(values.problem == problem) & (values.arm == arm)]
        ends = (sign * mine[metric]).fillna(math.inf)
        found = target_rule(list(ends), sign * bound)
        missed = (finals.state != "finished").any()
        courses = [] if missed else [record.course(str(run)) for run in finals["run"]]
        named = {"problem": problem, "arm": arm, "metric": metric, "target": bound, "runs": len(ends)}
        numbers = {"mean": sign * found.mean, "sigma": found.sigma, "margin": found.margin, "needed": found.needed}
        ended = {"p": found.p, "holds": "yes" if found.passes else "no", "steps": first_step(courses, metric, bound)}
        rows.append(named | numbers | ended)
    columns = ["problem", "arm", "metric", "target", "runs", "mean", "sigma", "margin", "needed", "p", "holds", "steps"]
    return pd.DataFrame(rows, columns=columns)


def tests_table(record: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """Paired tests of every arm against the reference, adjusted for the number of arms of the problem and measure."""
    columns = ["problem", "measure", "arm", "reference", "pairs", "ratio", "t", "Wilcoxon", "t, Holm", "Wilcoxon, Holm"]
    tables = []
    for problem in record.problems:
        for measure in primary_measures(record, problem):
            reference = reference_arm(record, values, problem, measure)
            rows = []
            for arm in record.arms if reference is not None else ():
                own = costs_by_seed(values, problem, arm, measure)
                if arm == reference or not own:
                    continue
                ratios = paired_ratios(own, costs_by_seed(values, problem, str(reference), measure))
                tested = [len(ratios), _geometric_mean(ratios), paired_t(ratios), signed_rank(ratios)]
                rows.append([problem, measure, arm, reference, *tested])
            table = pd.DataFrame(rows, columns=columns[:8])
            if rows:
                for name in ("t", "Wilcoxon"):
                    table[f"{name}, Holm"] = holm(list(table[name]))
                tables.append(table)
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _geometric_mean(ratios: np.ndarray) -> float:
    """Of all ratios; not a number where one is infinite and another 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.exp(np.log(ratios).mean())) if len(ratios) else math.nan
