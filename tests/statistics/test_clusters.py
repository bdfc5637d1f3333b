"""Intervals and paired tests against other routes to the same numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

from retention import statistics as st
from retention.statistics.bootstrap import bootstrap
from retention.statistics.intervals import spread
from retention.statistics.paired import compare_counts, mcnemar, sign_flip


def counts(right: np.ndarray, *, same: bool = False, name: str = "f") -> st.Counts:
    """right [runs, facts]; same: the facts recur over runs."""
    runs, n = right.shape
    fact = np.tile(np.arange(n), runs) if same else np.arange(runs * n)
    return st.Counts(
        runs=tuple(str(i) for i in range(runs)),
        run=np.repeat(np.arange(runs), n),
        fact=np.array([f"{name}{i}" for i in fact], object),
        right=right.ravel().astype(float),
    )


def test_two_way_clusters_are_statsmodels():
    rng = np.random.default_rng(0)
    runs, facts = 6, 40
    y = (rng.normal(size=(runs, 1)) + 2 * rng.normal(size=(1, facts)) + rng.normal(size=(runs, facts))).ravel()
    run, fact = np.repeat(np.arange(runs), facts), np.tile(np.arange(facts), runs)
    fit = sm.OLS(y, np.ones(len(y))).fit()
    both, by_run, _ = cov_cluster_2groups(fit, run, fact, use_correction=False)
    found = spread((y - y.mean()) / len(y), run, fact)
    # Theirs is without, ours with the correction of count / (count - 1) for each way of clustering.
    one = by_run[0, 0] * runs / (runs - 1)
    u = (y - y.mean()) / len(y)
    other = (np.bincount(fact, u) ** 2).sum() * facts / (facts - 1) - (u**2).sum() * len(u) / (len(u) - 1)
    assert found.variance == pytest.approx(one + max(other, 0))
    assert found.variance == pytest.approx(float(both[0, 0]), rel=0.25)
    assert runs - 1 < found.df < facts  # facts carry most of it here
    alone = spread(u, run, np.arange(len(u)))
    assert (alone.variance, alone.df) == (pytest.approx(one), runs - 1)


def test_where_all_are_kept_only_different_facts_count():
    """20 facts in 6 runs, some of them less firm than others: as 120 facts, all kept, the truth would be missed."""
    every = st.share(counts(np.ones((6, 20)), same=True))
    assert every is not None
    z2 = stats.norm.ppf(0.975) ** 2
    wilson = 20 / (20 + z2)  # of 20 in 20
    assert (every.low, every.high, every.n) == (pytest.approx(wilson), pytest.approx(1), 120)
    apart = st.share(counts(np.ones((6, 20))))
    assert apart is not None
    assert apart.low == pytest.approx(120 / (120 + z2))
    rng = np.random.default_rng(0)
    kept = stats.logistic.cdf(5 + 2 * rng.normal(size=100_000)).mean()
    hits = [
        (e := st.share(counts(rng.random((6, 20)) < stats.logistic.cdf(5 + 2 * rng.normal(size=20)), same=True)))
        is not None and e.low <= kept <= e.high
        for _ in range(300)
    ]  # fmt: skip
    assert np.mean(hits) > 0.93
    none = st.difference(counts(np.ones((6, 20)), same=True), counts(np.zeros((6, 20)), same=True, name="g"))
    wide = st.difference(counts(np.ones((6, 20))), counts(np.zeros((6, 20)), name="g"))
    assert none is not None
    assert wide is not None
    assert none.high - none.low >= wide.high - wide.low
    assert none.low < wide.low


def test_facts_that_recur_count_once():
    rng = np.random.default_rng(1)
    fact = rng.random((1, 30)) < 0.6  # each fact is kept in all runs or in none
    right = np.repeat(fact, 8, axis=0)
    right[:, 0] = [0, 1] * 4
    recur, anew = st.share(counts(right, same=True)), st.share(counts(right))
    assert recur is not None
    assert anew is not None
    assert recur.high - recur.low > 1.7 * (anew.high - anew.low)


def test_an_interval_of_runs_that_agree_is_not_narrower_than_of_independent_facts():
    same = st.share(counts(np.tile([1.0] * 49 + [0.0], (3, 1))))
    binomial = st.share(counts(np.array([[1.0] * 147 + [0.0] * 3])))
    assert same is not None
    assert binomial is not None
    assert (same.low, same.high) == (pytest.approx(binomial.low), pytest.approx(binomial.high))


def test_student_over_runs_is_what_an_arm_is_compared_by():
    rng = np.random.default_rng(2)
    arm, base = (rng.random((5, 20)) < p for p in (np.linspace(0.6, 1, 5)[:, None], 0.6))
    found = compare_counts(counts(arm), counts(base))
    d = (arm.mean(axis=1) - base.mean(axis=1)).astype(float)
    t = stats.ttest_1samp(d, 0)
    low, high = t.confidence_interval(0.95)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(d.mean())
    assert (found.difference.low, found.difference.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p_t == pytest.approx(t.pvalue)
    more, less = int((arm & ~base).sum()), int((base & ~arm).sum())
    assert (found.more, found.less, found.runs) == (more, less, 5)
    exact, observed = stats.binomtest(more, more + less).pvalue, stats.binom.pmf(more, more + less, 0.5)
    assert found.p_facts == pytest.approx(exact - observed)  # mid-p
    assert found.least_p == 2 / 2**5


def test_sign_flips_are_all_counted():
    d = np.array([3.0, 1.0, 2.0, -0.5, 4.0, 1.5])
    sums = [abs((d * signs).sum()) for signs in itertools.product([-1, 1], repeat=6)]
    assert sign_flip(d) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))
    assert sign_flip(np.abs(d)) == pytest.approx(2 / 64)
    assert sign_flip(np.zeros(4)) == 1.0


def test_arms_that_never_differ_are_not_certain_and_one_run_has_no_test_over_runs():
    same = np.array([[1.0, 0.0, 1.0, 1.0]])
    found = compare_counts(counts(same), counts(same))
    assert found.difference is not None
    assert found.difference.low < 0 < found.difference.high
    assert (found.p_seeds, found.p_t, found.p_facts) == (None, None, 1.0)
    nothing = compare_counts(counts(np.zeros((1, 0))), counts(np.zeros((1, 0))))
    assert (nothing.difference, nothing.p_facts) == (None, None)


def test_bca_of_one_level_is_scipys():
    rng = np.random.default_rng(3)
    x = rng.exponential(size=40)
    ours = bootstrap(lambda at: float(x[at].mean()), np.zeros(40, int), np.arange(40), resamples=4000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=4000, method="BCa", rng=np.random.default_rng(4))
    assert (ours.method, ours.unit) == ("bca", "facts of one run")
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.03)


def test_the_bootstrap_says_where_it_falls_back():
    run, fact = np.repeat([0, 1, 2], 4), np.arange(12)
    flat = bootstrap(lambda at: 1.0, run, fact, resamples=50)
    assert (flat.method[:10], flat.low, flat.high) == ("percentile", 1.0, 1.0)
    none = bootstrap(lambda at: float("nan"), run, fact, resamples=50)
    assert none.method.startswith("none")
    x = np.random.default_rng(5).normal(size=12)
    crossed = bootstrap(lambda at: float(x[at].mean()), run, np.tile(np.arange(4), 3), resamples=200)
    assert (crossed.unit, crossed.method) == ("runs and facts, crossed", "bca")
    assert crossed.low < x.mean() < crossed.high


def test_task_gains_count_up_for_accuracy_and_down_for_loss():
    scores = pd.DataFrame(
        [
            *(("a", 0, "task_accuracy", 0.1), ("a", 9, "task_accuracy", 0.7), ("a", 9, "task_accuracy_2", 0.5)),
            *(("a", 0, "task_accuracy_2", 0.1), ("b", 0, "task_loss", 3.0), ("b", 9, "task_loss", 1.0)),
            *(("a", -1, "task_accuracy", 0.0), ("b", 5, "task_loss", 0.1)),
        ],
        columns=["run_id", "step", "score", "value"],
    )
    assert st.task_gains(scores, "task_accuracy").to_dict() == {"a": pytest.approx((0.6 + 0.4) / 2)}
    assert st.task_gains(scores, "task_loss").to_dict() == {"b": 2.0}


def test_mcnemars_mid_p_rejects_about_as_often_as_it_says():
    assert mcnemar(3, 3) == pytest.approx(1.0)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(7, 1) == mcnemar(1, 7)
    pairs = np.arange(41)
    for differing in (10, 20, 40):  # of so many pairs that differ, each way is as likely
        chance = stats.binom.pmf(pairs[: differing + 1], differing, 0.5)
        rejected = [mcnemar(int(k), differing - int(k)) <= 0.05 for k in pairs[: differing + 1]]
        assert 0.02 < chance[rejected].sum() < 0.06
