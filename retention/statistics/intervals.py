"""Intervals of shares, differences and means that know what was drawn anew: runs, and facts within them.

Facts of one run share its draw of data, its edit and its training, so a run is the unit of replication: variances are
those of run totals (linearised, cluster-robust), and with R runs the quantiles are Student's with R - 1 degrees of
freedom. A fact that recurs over runs is a cluster too (two-way, Cameron, Gelbach and Miller 2011). Of one run alone
nothing can be said about other runs; then facts are the unit, and the interval is of that run. Knows no rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from retention.statistics.equivalence import p_within

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share, a mean or a difference of them, with a 95 % interval."""

    value: float
    low: float  # NaN where no interval can be told (a mean over one run)
    high: float
    n: int  # facts, over all runs; for a difference the smaller of the two; for a mean over runs, runs
    p: float | None = None  # of a difference: how often chance alone differs as much, two-sided
    p_within: float | None = None  # of a difference: that it is smaller than equivalence.BOUND, by two one-sided tests

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Variance of an estimate, and how many degrees of freedom it was told from."""

    variance: float
    df: float
    replicated: bool  # told from several runs; else facts of one run are all there is

    @property
    def quantile(self) -> float:
        """Half width of a 95 % interval in standard errors."""
        return float(stats.t.ppf(0.5 + LEVEL / 2, self.df))

    def half_width(self, alone: float) -> float:
        """Half a 95 % interval. alone: the variance if facts were independent.

        Few runs may agree by chance: the interval is no narrower than of twice as many independent facts, and where
        runs agree exactly (or there is one) that of so many as there are.
        """
        normal = float(stats.norm.ppf(0.5 + LEVEL / 2))
        if not self.replicated or self.variance < 1e-12 * alone or self.variance == 0:
            return normal * float(np.sqrt(alone))
        return max(self.quantile * float(np.sqrt(self.variance)), normal * float(np.sqrt(alone / 2)))

    def p_value(self, value: float, alone: float) -> float | None:
        """Two-sided p of no effect, dual to the interval; None where nothing varies."""
        half = self.half_width(alone)
        return float(2 * stats.t.sf(abs(value) / half * self.quantile, self.df)) if half > 0 else None


def spread(u: np.ndarray, run: np.ndarray, fact: np.ndarray) -> Spread:
    """Cluster-robust variance of an estimate that is a sum of contributions `u` about its value.

    u [n]: what each unit adds to (estimate - truth), to first order; they sum to zero. run, fact [n]: codes from 0 on.
    With several runs: the variance of run totals, and where facts recur, what their recurring adds (two-way clusters;
    taken as zero where it is estimated below). With one run: that of facts' totals.
    """
    runs, facts = len(np.unique(run)), len(np.unique(fact))
    by_fact = _of_totals(u, fact)
    if runs == 1:
        return Spread(variance=by_fact, df=max(facts - 1, 1), replicated=False)
    by_run, beside = _of_totals(u, run), 0.0
    if facts < len(u):
        both = np.unique(run * (int(fact.max()) + 1) + fact, return_inverse=True)[1]
        beside = max(by_fact - _of_totals(u, both), 0.0)
    variance = by_run + beside
    # Satterthwaite's degrees of freedom of a sum of two variances.
    df = variance**2 / (by_run**2 / (runs - 1) + beside**2 / max(facts - 1, 1)) if variance > 0 else runs - 1
    return Spread(variance=variance, df=df, replicated=True)


def _of_totals(u: np.ndarray, cluster: np.ndarray) -> float:
    totals = np.bincount(cluster, weights=u)
    count = len(np.unique(cluster))
    return float((totals**2).sum() * count / max(count - 1, 1))


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean over runs with Student's interval; of one run the interval is NaN, since nothing tells how runs differ."""
    values = np.asarray(values, float)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Estimate(value=mean, low=float("nan"), high=float("nan"), n=1)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    low, high = mean - half, mean + half
    return Estimate(value=mean, low=low, high=high, n=n, p_within=p_within(mean, low, high, n - 1))
