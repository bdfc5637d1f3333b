"""Two one-sided tests (TOST; Schuirmann 1987): is a difference smaller than what would matter? Knows no rows.

A large p of "no difference" says nothing; to claim one, both p of "it is at least +BOUND" and "it is at most -BOUND"
must be small. They use the standard errors and degrees of freedom of the 95 % interval, so that p < 0.025 means that
the interval is within the bounds, and p < 0.05 that the 90 % interval is.
"""

from __future__ import annotations

from math import inf, isnan

from scipy import stats

BOUND = 0.10  # share of facts (or of held-out rows): a smaller difference is called none that matters


def p_within(value: float, low: float, high: float, df: float = inf, *, bound: float = BOUND) -> float | None:
    """p of the claim that a true difference is within +-bound: the larger of the two one-sided p.

    value, low, high: estimate and 95 % interval. df: degrees of freedom of the interval's quantile, inf for a normal
    one. Each side uses its own half of the interval, which need not be symmetric. None where an end is missing or
    equals the estimate, so that it has no standard error.
    """
    if isnan(low) or isnan(high) or not low < value < high:
        return None
    quantile = stats.t.ppf(0.975, df)
    below = (bound - value) / (high - value) * quantile
    above = (value + bound) / (value - low) * quantile
    return float(max(stats.t.sf(below, df), stats.t.sf(above, df)))
