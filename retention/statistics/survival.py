"""Time to forgetting. A fact right at step 0 is lost at the first checkpoint that finds it wrong, that is, somewhere
between the checkpoint before and that one (interval-censored); what is never found wrong is censored at the last one.

Kaplan-Meier at the checkpoints (the maximum-likelihood curve, since all facts are read at the same ones), log-rank, the
half-life of a Weibull law by maximum likelihood on the intervals, and discrete-time hazard regression. Recovery after a
loss is another matter (fates). Reads tables of probe rows.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from scipy.optimize import minimize
from statsmodels.duration.survfunc import SurvfuncRight, survdiff
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

from retention.statistics.fates import histories
from retention.statistics.intervals import spread
from retention.statistics.shares import codes


def lifetimes(rows: pd.DataFrame, group: str, criterion: str, *, form: str = "direct") -> pd.DataFrame:
    """One line for each fact right at step 0: run_id, fact_id, low, high: last checkpoint it was right at and first it
    was wrong at, in steps (high infinite: never seen wrong). Of a fact asked in several ways, its first question's.
    """
    table = histories(rows, group, criterion, form=form)
    columns = ["run_id", "fact_id", "low", "high"]
    if table.empty or 0 not in table or len(table.columns) < 2:
        return pd.DataFrame(columns=columns)
    right = table.to_numpy(float, na_value=np.nan)
    steps = table.columns.to_numpy(float)
    alive = right[:, 0] == 1
    right, index = right[alive], table.index[alive]
    wrong, seen = right == 0, right == 1
    lost = wrong.any(axis=1)
    first = np.where(lost, wrong.argmax(axis=1), len(steps))
    seen &= np.arange(len(steps)) < first[:, None]
    last = len(steps) - 1 - seen[:, ::-1].argmax(axis=1)  # checkpoints without a reading widen the interval
    found = index.to_frame(index=False).assign(low=steps[last], high=np.append(steps, np.inf)[first])
    found = found[found["high"].lt(np.inf) | found["low"].gt(0)]
    return found.drop_duplicates(["run_id", "fact_id"])[columns].reset_index(drop=True)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Share of facts not yet found wrong, at the checkpoints where one was."""

    steps: np.ndarray
    surviving: np.ndarray
    low: np.ndarray  # pointwise, log-log; facts as units
    high: np.ndarray
    n: int


def kaplan_meier(lives: pd.DataFrame) -> Curve | None:
    """Facts are counted lost at the checkpoint that found them wrong; None without a fact."""
    if lives.empty:
        return None
    lost = np.isfinite(lives["high"].to_numpy(float))
    time = np.where(lost, lives["high"], lives["low"])
    if not lost.any():
        none = np.zeros(0)
        return Curve(steps=none, surviving=none, low=none, high=none, n=len(lives))
    with np.errstate(divide="ignore", invalid="ignore"):  # the last of all may be lost
        fit = SurvfuncRight(time, lost.astype(int))
        s, se = fit.surv_prob, fit.surv_prob_se
        width = 1.959964 * se / (s * np.abs(np.log(s)))
        low, high = s ** np.exp(width), s ** np.exp(-width)
    low, high = (np.where(np.isfinite(b) & (s > 0) & (s < 1), b, s) for b in (low, high))
    return Curve(steps=fit.surv_times, surviving=s, low=low, high=high, n=len(lives))


def log_rank(a: pd.DataFrame, b: pd.DataFrame) -> float | None:
    """p of equal survival of two groups of `lifetimes`, stratified by run where both share runs.

    Facts are units here: of these runs, no claim about others. None without a loss, or if all are lost at once.
    """
    if a.empty or b.empty:
        return None
    lives = pd.concat([a.assign(group=0), b.assign(group=1)])
    lost = np.isfinite(lives["high"].to_numpy(float))
    if not lost.any():
        return None
    time = np.where(lost, lives["high"], lives["low"])
    if len(np.unique(time)) == 1:
        return None
    both = set(a["run_id"]) == set(b["run_id"]) and a["run_id"].nunique() > 1
    strata = lives["run_id"].to_numpy() if both else None
    with np.errstate(all="ignore"):
        p = survdiff(time, lost.astype(int), lives["group"].to_numpy(), strata=strata)[1]
    return float(p) if np.isfinite(p) else None


@dataclass(frozen=True, kw_only=True)
class HalfLife:
    """Steps after which half of the facts are found wrong, by a Weibull law. None where `state` says why."""

    value: float | None  # steps
    low: float | None
    high: float | None
    shape: float | None  # of the Weibull law: below 1, losses come early
    n: int  # facts
    lost: int
    runs: int
    state: str  # ok; ok, extrapolated: beyond the last checkpoint; or why it cannot be told


def half_life(lives: pd.DataFrame, *, least: int = 5) -> HalfLife:
    """Interval-censored maximum likelihood of S(t) = exp(-ln 2 (t / h)^k), started from several points.

    The interval is on log h, by the rules of `intervals`: with several runs the sandwich of run totals of the score
    (facts that recur are clusters too), with one run the curvature of the likelihood. Fewer than `least` losses, or all
    at one checkpoint, tell none.
    """
    n, lost = len(lives), int(np.isfinite(lives["high"].to_numpy(float)).sum()) if len(lives) else 0
    runs = lives["run_id"].nunique() if n else 0

    def none(state: str) -> HalfLife:
        return HalfLife(value=None, low=None, high=None, shape=None, n=n, lost=lost, runs=runs, state=state)

    if n == 0:
        return none("no fact is right at step 0")
    if lost < least:
        return none(f"{lost} of {n} facts lost: too few to tell a half-life")
    # Facts lost between the same two checkpoints are alike to the likelihood.
    bounds, kind, times = np.unique(
        lives[["low", "high"]].to_numpy(float), axis=0, return_inverse=True, return_counts=True
    )
    low, high = bounds.T
    if np.isfinite(high).sum() < 2:
        return none("all losses fall between the same two checkpoints: the law's shape is not told")
    last = np.max(np.where(np.isfinite(high), high, low))
    fits = [
        minimize(_loss, start, (low, high, times), method="L-BFGS-B", jac=True, bounds=_bounds(last))
        for start in ([np.log(last), 0.0], [np.log(last / 4), -0.5], [np.log(4 * last), -0.7])
    ]
    x = min(fits, key=lambda f: f.fun).x
    if any(abs(v - b) < 1e-3 for v, pair in zip(x, _bounds(last), strict=True) for b in pair):
        return none("the law's fit runs to the edge of what is sensible: not identified")
    scores, information = _log_likelihood(x, low, high)[1], _information(x, low, high, times)
    try:
        inverse = np.linalg.inv(information)
    except np.linalg.LinAlgError:
        return none("the likelihood is flat: not identified")
    if not inverse[0, 0] > 0:
        return none("the likelihood is flat: not identified")
    u = (scores @ inverse[0])[kind.ravel()]  # what each fact adds to the error of log h, to first order
    half = spread(u, codes(lives["run_id"].to_numpy()), codes(lives["fact_id"].to_numpy())).half_width(
        float(inverse[0, 0])
    )
    value = float(np.exp(x[0]))
    return HalfLife(
        value=value, low=float(value * np.exp(-half)), high=float(value * np.exp(half)), shape=float(np.exp(x[1])), n=n,
        lost=lost, runs=runs, state="ok" if value <= last else "ok, extrapolated: beyond the last checkpoint",
    )  # fmt: skip


def _bounds(last: float) -> list[tuple[float, float]]:
    """Of log half-life (steps) and log shape."""
    return [(np.log(1e-3), np.log(1e6 * last)), (np.log(0.05), np.log(20.0))]


def _log_likelihood(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] log P(lost between low and high), or of outliving low; and its derivatives [n, 2]."""

    def hazard(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative hazard ln 2 (t / h)^k at finite t (else 0), and its derivatives by log h and log k."""
        there = np.isfinite(t) & (t > 0)
        power = np.where(there, np.exp(x[1]) * (np.log(np.where(there, t, 1.0)) - x[0]), 0.0)
        power = np.minimum(power, 18.0)  # beyond, nothing survives to the last digit
        value = np.where(there, np.log(2) * np.exp(power), 0.0)
        return value, np.stack([-np.exp(x[1]) * value, value * power], axis=1)

    (a, da), (b, db) = hazard(low), hazard(high)
    ends = np.isfinite(high)
    within = np.where(ends, np.clip(b - a, 1e-300, 700.0), 1.0)
    value = -a + np.where(ends, np.log(-np.expm1(-within)), 0.0)
    return value, -da + np.where(ends, 1 / np.expm1(within), 0.0)[:, None] * (db - da)


def _loss(x: np.ndarray, low: np.ndarray, high: np.ndarray, times: np.ndarray) -> tuple[float, np.ndarray]:
    value, slope = _log_likelihood(x, low, high)
    return -float(times @ value), -times @ slope


def _information(x: np.ndarray, low: np.ndarray, high: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Observed information [2, 2] of `times` facts of each kind, by central differences of the scores."""
    d = 1e-4 * np.eye(2)
    found = -np.stack(
        [times @ (_log_likelihood(x + e, low, high)[1] - _log_likelihood(x - e, low, high)[1]) / 2e-4 for e in d]
    )
    return (found + found.T) / 2


@dataclass(frozen=True, kw_only=True)
class Hazards:
    """Discrete-time hazard regression: log hazard ratios with clustered errors."""

    table: pd.DataFrame  # covariate, hazard_ratio, low, high, p
    intervals: int  # fact x checkpoint
    lost: int
    clusters: int
    state: str


def hazards(lives: pd.DataFrame, covariates: Sequence[str], checkpoints: Sequence[float]) -> Hazards:
    """Complementary log-log regression of being lost in each interval between checkpoints (proportional hazards).

    lives: `lifetimes`, with the covariates as further numeric columns. One baseline for each interval in which any fact
    is lost. Errors by the rules of `intervals`: clustered by run (and by fact, where facts recur; of one run by fact
    alone), Student's quantile.
    """
    edges = np.array(sorted({0.0, *checkpoints}))
    blank = pd.DataFrame(columns=["covariate", "hazard_ratio", "low", "high", "p"])
    lost_all = int(np.isfinite(lives["high"].to_numpy(float)).sum()) if len(lives) else 0

    def none(state: str) -> Hazards:
        return Hazards(table=blank, intervals=0, lost=lost_all, clusters=0, state=state)

    used = [name for name in covariates if len(lives) and lives[name].notna().all() and lives[name].nunique() > 1]
    if not used:
        return none("no covariate that all facts have varies")
    if lost_all <= len(used):
        return none(f"{lost_all} of {len(lives)} facts lost: too few for {len(used)} covariates")
    parts = []
    for begin, end in itertools.pairwise(edges):
        at_risk = lives[(lives["low"] >= end) | ((lives["low"] <= begin) & (lives["high"] == end))]
        if (at_risk["high"] == end).any():
            parts.append(at_risk.assign(event=(at_risk["high"] == end).astype(float), interval=end))
    if not parts:
        return none("no fact is lost between two readings in a row")
    long = pd.concat(parts, ignore_index=True)
    base = pd.get_dummies(long["interval"], dtype=float)
    x = np.column_stack([long[used].to_numpy(float), base.to_numpy()])
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return none(f"covariates repeat each other: {', '.join(used)}")
    run, fact = codes(long["run_id"].to_numpy()), codes(long["fact_id"].to_numpy())
    clusters = int((run if run.max() > 0 else fact).max()) + 1
    if clusters < 2:
        return none("one fact alone: no errors to be told")
    family = sm.families.Binomial(link=sm.families.links.CLogLog())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model = sm.GLM(long["event"].to_numpy(), x, family=family)
            fit = model.fit()
        except (PerfectSeparationWarning, RuntimeWarning, UserWarning, np.linalg.LinAlgError) as reason:
            return none(f"the fit does not converge ({str(reason).splitlines()[0]})")
    if np.abs(fit.params[: len(used)]).max() > 15:
        return none("a covariate tells lost from kept facts without error: its hazard ratio is infinite")
    u = (x * model.score_factor(fit.params)[:, None]) @ fit.normalized_cov_params  # [intervals, coefficients]
    spreads = [spread(u[:, i], run, fact) for i in range(len(used))]
    beta, se = fit.params[: len(used)], np.array([np.sqrt(s.variance) for s in spreads])
    if not (se > 0).all():
        return none("nothing differs between clusters: no errors to be told")
    q = np.array([s.quantile for s in spreads])
    table = pd.DataFrame(
        {
            "covariate": used, "hazard_ratio": np.exp(beta),
            "low": np.exp(beta - q * se), "high": np.exp(beta + q * se),
            "p": [float(2 * stats.t.sf(abs(b) / e, s.df)) for b, e, s in zip(beta, se, spreads, strict=True)],
        }
    )  # fmt: skip
    return Hazards(table=table, intervals=len(long), lost=lost_all, clusters=clusters, state="ok")
