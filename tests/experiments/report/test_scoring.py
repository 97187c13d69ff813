"""Scores against numbers worked out by hand, slow enumerations, and properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from osculate.errors import ArgumentError
from osculate.experiments.report.scoring import Floats, bootstrap, quantile, summarise, time_to_target, value_within
from osculate.experiments.report.scoring_budget import best_of, budget_curve
from osculate.experiments.report.scoring_pairs import combined_effect, compare_pairs, paired_ratios
from osculate.experiments.report.scoring_profiles import profile, profile_score, profile_scores, ratios_to_best

INF = math.inf
COURSE = pd.DataFrame(
    {
        "iterations": [0, 10, 20, 30],
        "seconds": [2.0, 3.0, 5.0, 9.0],
        "train_loss": [8.0, 4.0, 2.0, 3.0],
        "test_accuracy": [0.1, 0.5, 0.9, 0.8],
    }
)
TIMES = st.lists(st.one_of(st.floats(0.1, 100.0), st.just(INF)), min_size=1, max_size=6)


# -- time to target ----------------------------------------------------------------------------------------------------


def test_time_to_target_by_hand() -> None:
    assert time_to_target(COURSE, "iterations", "train_loss", 3.0) == 15.0  # halfway between 4 at 10 and 2 at 20
    assert time_to_target(COURSE, "seconds", "train_loss", 3.5) == 3.5  # a quarter of the way from 3 s to 5 s
    assert time_to_target(COURSE, "iterations", "train_loss", 2.0) == 20.0  # met exactly at an evaluation
    assert time_to_target(COURSE, "seconds", "train_loss", 8.0) == 2.0  # met from the start: the warm start's seconds
    assert time_to_target(COURSE, "iterations", "train_loss", 1.9) == INF
    assert time_to_target(COURSE, "iterations", "valid_loss", 1.9) == INF


def test_accuracies_are_met_from_below() -> None:
    assert time_to_target(COURSE, "iterations", "test_accuracy", 0.7) == pytest.approx(15.0)
    assert time_to_target(COURSE, "iterations", "test_accuracy", 0.95) == INF


def test_nothing_is_interpolated_from_an_evaluation_that_is_not_finite() -> None:
    course = COURSE.assign(train_loss=[8.0, math.nan, 2.0, 3.0])
    assert time_to_target(course, "iterations", "train_loss", 3.0) == 20.0


@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=8), st.floats(0.005, 11.0), st.floats(0.0, 5.0))
def test_an_easier_target_is_met_no_later(losses: list[float], target: float, easier: float) -> None:
    course = pd.DataFrame({"iterations": range(len(losses)), "train_loss": losses})
    hard = time_to_target(course, "iterations", "train_loss", target)
    assert time_to_target(course, "iterations", "train_loss", target + easier) <= hard
    assert (hard == INF) == (min(losses) > target)


def test_values_within_a_limit() -> None:
    assert value_within(COURSE, "seconds", 5.5, "train_loss") == 2.0
    assert math.isnan(value_within(COURSE, "seconds", 1.0, "train_loss"))


# -- quantiles and intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0, INF], 0.5, 2.0),
        ([1.0, INF], 0.5, INF),
        ([1.0, 2.0, 3.0, INF], 0.5, 2.5),
        ([1.0, 2.0, INF, INF], 0.5, INF),
        ([1.0, 2.0, INF, INF], 0.25, 1.75),
        ([INF, INF], 0.5, INF),
        ([-INF, -INF], 0.5, -INF),
        ([7.0], 0.75, 7.0),
        ([1.0, math.nan], 0.5, math.nan),
    ],
)
def test_quantiles_with_misses_by_hand(values: list[float], share: float, expected: float) -> None:
    assert float(quantile(values, share)) == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), st.floats(0, 1))
def test_quantiles_of_finite_values_are_numpys(values: list[float], share: float) -> None:
    assert float(quantile(values, share)) == pytest.approx(float(np.quantile(values, share)), abs=1e-9)


def test_a_quantile_of_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="needs values"):
        quantile([], 0.5)


def medians(strata: Sequence[Floats]) -> Floats:
    return quantile(strata[0], 0.5)


def test_the_interval_of_three_values_by_enumeration() -> None:
    """The median of three draws is the smallest with probability 7/27 and the largest as often: both ends at 95 %."""
    draws = [sorted(draw)[1] for draw in itertools.product([1.0, 2.0, 9.0], repeat=3)]
    assert draws.count(1.0) / 27 == pytest.approx(7 / 27)
    assert tuple(bootstrap([[1.0, 2.0, 9.0]], medians)) == (2.0, 1.0, 9.0)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    sample = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = bootstrap([sample], lambda strata: strata[0].mean(axis=-1))
    error = 1.96 * sample.std() / 20
    assert found.low == pytest.approx(sample.mean() - error, abs=0.15 * error)
    assert found.high == pytest.approx(sample.mean() + error, abs=0.15 * error)


def test_draws_stay_within_their_stratum_and_rows_together() -> None:
    def check(strata: Sequence[Floats]) -> Floats:
        assert (strata[0] < 10).all() and (strata[1] >= 10).all()
        assert strata[0].shape[1:] == (3,) and strata[1].shape[1:] == (2, 2)
        assert (strata[1][..., 1] == 2 * strata[1][..., 0]).all()
        return strata[0].sum(axis=-1)

    bootstrap([[1.0, 2.0, 3.0], [[10.0, 20.0], [11.0, 22.0]]], check)


def test_one_run_has_a_point_and_no_interval() -> None:
    found = bootstrap([[4.0]], medians)
    assert found.point == 4.0 and math.isnan(found.low) and math.isnan(found.high)


@given(TIMES)
def test_summaries_are_ordered(values: list[float]) -> None:
    found = summarise(values)
    assert found["q25"] <= found["median"] <= found["q75"]
    if len(values) > 1:
        assert min(values) <= found["low"] <= found["high"] <= max(values)


def test_a_summary_of_nothing_is_not_a_number() -> None:
    assert all(math.isnan(value) for value in summarise([]).values())


# -- performance profiles ----------------------------------------------------------------------------------------------


def test_profiles_by_hand() -> None:
    times = np.array([[10.0, 20.0, INF], [30.0, 15.0, 90.0], [INF, INF, INF]])
    ratios = ratios_to_best(times)
    assert ratios.tolist() == [[1.0, 2.0, INF], [2.0, 1.0, 6.0], [INF, INF, INF]]
    assert profile(ratios[:, 0], np.array([1.0, 1.99, 2.0, 4.0])).tolist() == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    )
    # Arm 0: ratio 1 adds (4 - 1) / 3 = 1, ratio 2 adds 2 / 3, a miss 0; over three problems.
    assert profile_score(ratios.T).tolist() == pytest.approx([5 / 9, 5 / 9, 0.0])


def test_a_target_met_at_once_divides_by_nothing() -> None:
    assert ratios_to_best(np.array([[0.0, 5.0, 0.0]])).tolist() == [[1.0, INF, 1.0]]


def test_the_score_is_the_integral_of_the_profile() -> None:
    ratios = np.array([1.0, 1.3, 2.7, 5.0, INF])
    grid = np.linspace(1.0, 4.0, 300001)
    assert float(profile_score(ratios)) == pytest.approx(np.trapezoid(profile(ratios, grid), grid) / 3, abs=1e-5)


def test_profile_scores_take_medians_over_seeds_and_count_absent_arms_as_misses() -> None:
    times = {("p", "a"): [1.0, 2.0, INF], ("p", "b"): [4.0, 4.0, 4.0], ("q", "a"): [], ("q", "b"): [1.0, INF, INF]}
    table = profile_scores(times).set_index("arm")
    assert table.loc["a", "score"] == pytest.approx(0.5) and table.loc["b", "score"] == pytest.approx(1 / 3)
    assert table["solved"].to_dict() == {"a": 1, "b": 1} and set(table["problems"]) == {2}
    assert (table.low <= table.score).all() and (table.score <= table.high).all()


@given(st.lists(st.lists(st.floats(0.1, 50), min_size=3, max_size=3), min_size=1, max_size=4), st.floats(0.1, 10))
def test_profiles_do_not_depend_on_the_unit(rows: list[list[float]], unit: float) -> None:
    times = np.array(rows)
    scores = profile_score(ratios_to_best(times).T)
    assert profile_score(ratios_to_best(unit * times).T) == pytest.approx(scores)
    assert ((scores >= 0) & (scores <= 1)).all() and ratios_to_best(times).min() == 1


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_budget_curve_by_hand() -> None:
    curve = budget_curve([3.0, 1.0, 2.0])
    assert curve.expected.tolist() == pytest.approx([2.0, 4 / 3, 1.0])  # k = 2: pairs give 1, 1, 2
    assert curve["median"].tolist() == [2.0, 1.0, 1.0] and curve.miss.tolist() == [0.0, 0.0, 0.0]


def test_a_miss_makes_the_expectation_infinite_until_it_can_be_avoided() -> None:
    curve = budget_curve([5.0, INF, INF, 1.0])
    assert curve.expected.tolist() == [INF, INF, pytest.approx(2.0), 1.0]  # k = 3: {5, miss, miss} once in four
    assert curve.miss.tolist() == pytest.approx([1 / 2, 1 / 6, 0.0, 0.0])
    assert curve["median"].tolist() == [5.0, 1.0, 1.0, 1.0]


@given(TIMES, st.data())
def test_budgets_agree_with_enumeration(values: list[float], data: st.DataObject) -> None:
    trials = data.draw(st.integers(1, len(values)))
    bests = [min(choice) for choice in itertools.combinations(values, trials)]
    ordered, weights = best_of(values, trials)
    assert weights.sum() == pytest.approx(1.0)
    row = budget_curve(values).iloc[trials - 1]
    assert row.expected == pytest.approx(sum(bests) / len(bests))
    assert row.miss == pytest.approx(sum(map(math.isinf, bests)) / len(bests), abs=1e-12)
    assert row["median"] == sorted(bests)[math.ceil(len(bests) / 2) - 1]
    for value in set(ordered):
        assert weights[ordered == value].sum() == pytest.approx(bests.count(value) / len(bests), abs=1e-12)


@given(TIMES)
def test_more_trials_are_never_worse(values: list[float]) -> None:
    curve = budget_curve(values)
    for name in ("expected", "median", "q25", "q75"):
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(curve[name]))


def test_more_trials_than_were_run_are_refused() -> None:
    with pytest.raises(ArgumentError, match="1 <= k <= 2"):
        best_of([1.0, 2.0], 3)


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_by_hand() -> None:
    arm = {0: 1.0, 1: 4.0, 2: INF, 3: INF, 4: 2.0, 9: 1.0}
    reference = {0: 2.0, 1: 2.0, 2: 5.0, 3: INF, 4: 4.0, 7: 1.0}
    assert paired_ratios(arm, reference).tolist() == [0.5, 2.0, INF, 1.0, 0.5]
    found = compare_pairs(arm, reference)
    assert (found["pairs"], found["wins"], found["ties"], found["losses"], found["ratio"]) == (5, 2, 1, 2, 1.0)
    assert found["p"] == 1.0


def test_the_sign_test_by_hand() -> None:
    found = compare_pairs(dict.fromkeys(range(5), 1.0), dict.fromkeys(range(5), 3.0))
    assert found["p"] == pytest.approx(2 / 2**5) and (found["low"], found["high"]) == pytest.approx((1 / 3, 1 / 3))


def test_effects_over_problems_are_geometric_means_of_medians() -> None:
    found = combined_effect([np.array([0.5, 0.5, 9.0]), np.array([2.0, 8.0]), np.array([])])
    assert found.point == pytest.approx(math.sqrt(0.5 * 5.0))
    assert combined_effect([np.array([0.1, 0.1]), np.array([INF, INF])]).point == INF
    assert combined_effect([np.array([0.0, 0.0]), np.array([INF, INF])]).point == INF


@given(st.dictionaries(st.integers(0, 6), st.one_of(st.floats(0.1, 10), st.just(INF)), min_size=1))
def test_an_arm_ties_with_itself(values: dict[int, float]) -> None:
    found = compare_pairs(values, values)
    assert found["ties"] == len(values) and found["ratio"] == 1.0 and found["p"] == 1.0
