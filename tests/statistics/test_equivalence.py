"""Two one-sided tests: against statsmodels, against intervals, and how often they are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from retention import statistics as st
from retention.statistics.equivalence import BOUND, p_within
from retention.statistics.shares import Counts


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_statsmodels_where_the_interval_is_students(seed):
    d = np.random.default_rng(seed).normal(0.02, 0.1, 6)
    expected = DescrStatsW(d).ttost_mean(-BOUND, BOUND)[0]
    found = st.mean_estimate(d)
    assert found.p_within == pytest.approx(expected)
    assert st.paired_means(d, np.zeros(6)).difference == found


@pytest.mark.parametrize("df", [2, 5, 40, np.inf])
@pytest.mark.parametrize("value", [-0.07, 0.0, 0.03])
def test_below_one_in_forty_just_where_the_interval_is_within_the_bounds(df, value):
    room = BOUND - abs(value)
    for half, within in ((0.99 * room, True), (1.01 * room, False)):
        p = p_within(value, value - half, value + half, df)
        assert p is not None
        assert (p < 0.025) == within


def test_each_side_has_its_own_error():
    wide_above = p_within(0.0, -0.02, 0.2)
    wide_below = p_within(0.0, -0.2, 0.02)
    assert wide_above == pytest.approx(wide_below)
    assert wide_above == pytest.approx(stats.norm.sf(BOUND / 0.2 * stats.norm.ppf(0.975)))


def test_no_error_no_claim():
    assert p_within(0.0, 0.0, 0.0) is None
    assert p_within(0.1, float("nan"), float("nan")) is None


def simulated(rng: np.random.Generator, difference: float, runs: int) -> float:
    """p_within of the difference of two groups' shares, of 100 facts each a run, runs apart by 0.03."""
    base = 0.8 + rng.normal(0, 0.03, runs)
    run = np.repeat(np.arange(runs), 100)
    names = np.array([f"{group} {i}" for group in "ab" for i in range(len(run))], object).reshape(2, -1)
    kept = [
        (rng.random(len(run)) < np.repeat(np.clip(base + shift, 0, 1), 100)).astype(float)
        for shift in (difference, 0.0)
    ]
    a, b = (
        Counts(runs=tuple(map(str, range(runs))), run=run, fact=f, right=k) for f, k in zip(names, kept, strict=True)
    )
    found = st.difference(a, b)
    assert found is not None
    assert found.p_within is not None
    return found.p_within


@pytest.mark.parametrize("runs", [1, 3, 6])
def test_a_difference_that_matters_is_seldom_called_none(runs):
    """At the bound itself 5 % of claims are wrong, at most; where there is no difference, claims are made."""
    rng = np.random.default_rng([11, runs])
    at_bound = np.mean([simulated(rng, BOUND, runs) < 0.05 for _ in range(400)])
    assert at_bound < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    if runs > 1:
        assert np.mean([simulated(rng, 0.0, runs) < 0.05 for _ in range(60)]) > 0.2
