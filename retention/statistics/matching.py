"""Edited against intrinsic facts on equal terms: matched pairs, and a regression that says the same.

Edits start with another lead over the best other token than what a model learned, and a fact that starts near the brink
falls first. Intrinsic facts are moreover chosen by the very criterion that is read later: they begin just above it. So
facts right at step 0 are paired within their run and relation, nearest in lead, answer length and frequency (optimal
one-to-one assignment with a caliper); how equal the pairs are is shown before and after. Reads tables of probe rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from scipy.optimize import linear_sum_assignment
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

from retention.statistics.intervals import Estimate
from retention.statistics.paired import Comparison, compare_counts
from retention.statistics.shares import Counts, difference
from retention.statistics.wording import IMPOSSIBLE

COVARIATES = {  # name -> what it is
    "lead": "log-probability of the answer's weakest token minus that of the best other token, at step 0, nats",
    "length": "tokens of the answer",
    "frequency": "log of the statements in pretraining",
}
# Standard deviations of the lead (pooled over both groups) that a pair may differ by. Never widened: where fewer than
# LEAST_PAIRS overlap there is no comparison.
CALIPER = 0.25
LEAST_PAIRS = 20


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Edited minus intrinsic, unmatched and matched, and how equal the groups are."""

    unmatched: Estimate | None
    matched: Comparison  # arm: edited; against: intrinsic; pairs are matched facts of one run
    pairs: np.ndarray  # [pairs, 2] positions in the table, as `pairs`
    balance: pd.DataFrame  # covariate, edited, intrinsic, before, after: means and standardised mean differences
    edited: int  # facts that could be matched
    intrinsic: int
    left_out: tuple[str, ...]  # covariates that the study does not have
    state: str  # of the matched comparison: ok, or `IMPOSSIBLE` and why


def fact_table(rows: pd.DataFrame, facts: pd.DataFrame | None, criterion: str, *, form: str = "direct") -> pd.DataFrame:
    """Edited and intrinsic facts right at step 0: run_id, fact_id, edited, kept (at the run's last step), COVARIATES,
    relation. A covariate that was not measured is NaN.
    """
    part = rows[rows["group"].isin(["edited", "intrinsic"]) & (rows["form"] == form)]
    part = part.astype({"run_id": str, "group": str, "base_id": str})
    last = part.groupby("run_id")["step"].transform("max")
    key = ["run_id", "group", "fact_id", "question_id"]
    end = part[(part["step"] == last) & (last > 0)].set_index(key)[criterion].dropna().astype(float).rename("kept")
    first = part[part["step"] == 0].set_index(key)
    first = first[first[criterion].fillna(False).astype(bool)]
    found = first[["base_id", "lead", "n_target_tokens"]].join(end, how="inner").reset_index()
    found["lead"] = found["lead"].astype(float)
    found["length"] = found["n_target_tokens"].astype(float)
    by = found.groupby(["run_id", "base_id", "group", "fact_id"], as_index=False)[["kept", "lead", "length"]].mean()
    by["edited"] = (by["group"] == "edited").astype(float)
    if facts is None:
        return by.assign(relation="", frequency=np.nan)
    known = facts[["base_id", "fact_id", "relation", "exposures"]].astype({"base_id": str}).drop_duplicates()
    by = by.merge(known, on=["base_id", "fact_id"], how="left")
    by["relation"] = by["relation"].fillna("").astype(str)
    by["frequency"] = np.log(by["exposures"].astype(float).where(by["exposures"] > 0))
    return by


def matched(table: pd.DataFrame, *, caliper: float = CALIPER) -> Matched:
    """Pair the edited facts of `fact_table` with intrinsic ones, and compare.

    Fewer than LEAST_PAIRS pairs over all runs give no comparison: `matched` is then that of no pairs, and `state` says
    why.
    """
    used = _used(table)
    at = pairs(table, caliper=caliper)
    state = _impossible(table) or _too_few(len(at))
    compared = at[:0] if state else at
    edited = table["edited"].to_numpy() == 1
    one, two, first, second = (
        counts_of(table, i) for i in (np.flatnonzero(edited), np.flatnonzero(~edited), compared[:, 0], compared[:, 1])
    )
    lines = []
    for name in used:
        values, sd = table[name].to_numpy(float), _pooled_sd(table, name)
        means = [float(v.mean()) if len(v) else np.nan for v in (values[edited], values[~edited])]
        after = float((values[at[:, 0]] - values[at[:, 1]]).mean()) / sd if len(at) else np.nan
        lines.append([name, *means, (means[0] - means[1]) / sd, after])
    return Matched(
        unmatched=difference(one, two),
        matched=compare_counts(first, second),
        pairs=at,
        balance=pd.DataFrame(lines, columns=["covariate", "edited", "intrinsic", "before", "after"]),
        edited=int(edited.sum()),
        intrinsic=int((~edited).sum()),
        left_out=tuple(name for name in COVARIATES if name not in used),
        state=state or "ok",
    )


def counts_of(table: pd.DataFrame, which: np.ndarray) -> Counts:
    """The facts at these positions of a `fact_table`, over all its runs."""
    runs, run = np.unique(table["run_id"].to_numpy(str), return_inverse=True)
    fact, kept = table["fact_id"].to_numpy(object), table["kept"].to_numpy(float)
    return Counts(runs=tuple(runs), run=run[which], fact=fact[which], right=kept[which])


def _impossible(table: pd.DataFrame) -> str:
    """Why no facts can be compared on equal terms; empty where they can."""
    for value, name in ((1, "edited"), (0, "intrinsic")):
        if not (table["edited"] == value).any():
            return f"{IMPOSSIBLE}: no {name} fact is right at step 0"
    if table["lead"].isna().any():
        return f"{IMPOSSIBLE}: the lead was not read (no probe score, or rows of an older version)"
    return ""


def _too_few(n: int) -> str:
    if n >= LEAST_PAIRS:
        return ""
    return f"{IMPOSSIBLE}: {n} pairs of facts start alike, fewer than {LEAST_PAIRS}"


def pairs(table: pd.DataFrame, *, caliper: float = CALIPER) -> np.ndarray:
    """[pairs, 2]: positions in the table of an edited fact and of the intrinsic one that it is matched with.

    As many pairs as the caliper allows within each run and relation, of these the nearest. None where a lead is NaN.
    """
    if table.empty or table["lead"].isna().any():
        return np.zeros((0, 2), int)
    used = _used(table)
    values = {name: table[name].to_numpy(float) / _pooled_sd(table, name) for name in used}
    edited = table["edited"].to_numpy() == 1
    block = np.unique(table["run_id"].to_numpy(str), return_inverse=True)[1]
    relations, relation = np.unique(table["relation"].to_numpy(str), return_inverse=True)
    block = block * len(relations) + relation
    order = np.argsort(block, kind="stable")
    found = [np.zeros((0, 2), int)]
    for members in np.split(order, np.flatnonzero(np.diff(block[order])) + 1):
        one, two = members[edited[members]], members[~edited[members]]
        if not len(one) or not len(two):
            continue
        apart = {name: v[one][:, None] - v[two] for name, v in values.items()}
        cost = sum((d * d for d in apart.values()), np.zeros((len(one), len(two))))
        far = np.abs(apart["lead"]) > caliper if "lead" in apart else np.zeros(cost.shape, bool)
        i, j = linear_sum_assignment(np.where(far, 1e6, cost))
        near = ~far[i, j]
        found.append(np.stack([one[i[near]], two[j[near]]], axis=1))
    return np.concatenate(found)


def _used(table: pd.DataFrame) -> list[str]:
    """Covariates that all facts have, and that differ at all."""
    values = {name: table[name].to_numpy(float) for name in COVARIATES}
    return [name for name, v in values.items() if len(v) and not np.isnan(v).any() and np.ptp(v) > 0]


def _pooled_sd(table: pd.DataFrame, name: str) -> float:
    """Root of the mean of both groups' variances: the usual unit of a standardised mean difference."""
    values, edited = table[name].to_numpy(float), table["edited"].to_numpy() == 1
    variances = [v.var(ddof=1) for v in (values[edited], values[~edited]) if len(v) > 1]
    pooled = float(np.sqrt(np.mean(variances))) if variances else 0.0
    return pooled if pooled > 0 else float(values.std(ddof=1))


@dataclass(frozen=True, kw_only=True)
class Regressed:
    """Logistic regression of being kept on group and lead. Numbers are None where `state` says why there are none."""

    difference: Estimate | None  # average marginal effect of being edited, in shares; n = facts
    log_odds: float | None  # coefficient of edited
    p: float | None
    clusters: int
    state: str  # ok, or why it cannot be told


def regression(table: pd.DataFrame) -> Regressed:
    """P(kept) on edited, COVARIATES and relation over `fact_table`: GEE, errors clustered by run, with the small-sample
    correction of Mancl and DeRouen (2001) and Student's quantile; one run: errors clustered by fact. Relations enter
    where there are more clusters than coefficients.

    The marginal effect is the mean over all facts of P(kept | edited) - P(kept | intrinsic), its interval by the delta
    method.
    """

    def none(state: str) -> Regressed:
        return Regressed(difference=None, log_odds=None, p=None, clusters=0, state=state)

    if impossible := _impossible(table):
        return none(impossible)
    for value, name in ((1, "edited"), (0, "intrinsic")):
        kept = table.loc[table["edited"] == value, "kept"]
        if kept.min() == kept.max():
            return none(f"all {name} facts are {'kept' if kept.min() == 1 else 'lost'}: log-odds are infinite")
    x = table[["edited"]].astype(float).assign(const=1.0)
    for name in _used(table):
        x[name] = (table[name] - table[name].mean()) / table[name].std()
    several = table["run_id"].nunique() > 1
    cluster = (table["run_id"] if several else table["fact_id"]).to_numpy(str)
    clusters = len(np.unique(cluster))
    # A relation of which all are kept would have infinite log-odds, and few clusters tell few coefficients' errors.
    ends = table.groupby("relation")["kept"].agg(["min", "max"])
    if (ends["min"] < ends["max"]).all() and clusters > x.shape[1] + len(ends):
        for relation in ends.index[1:]:
            more = x.assign(**{f"relation {relation}": (table["relation"] == relation).astype(float)})
            if np.linalg.matrix_rank(more.to_numpy()) == more.shape[1]:  # a relation may fix the length of its answers
                x = more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            fit = sm.GEE(table["kept"].to_numpy(), x.to_numpy(), groups=cluster, family=sm.families.Binomial())
            result = fit.fit(cov_type="bias_reduced", maxiter=100)
        except (PerfectSeparationWarning, RuntimeWarning, UserWarning, np.linalg.LinAlgError) as reason:
            return none(f"the fit does not converge ({str(reason).splitlines()[0]})")
    beta, cov = result.params, result.cov_params()
    if np.abs(beta).max() > 15 or not np.isfinite(cov).all():
        return none("covariates tell kept from lost facts without error: log-odds are infinite")
    quantile = stats.t.ppf(0.975, clusters - 1)
    with_, without = x.assign(edited=1.0).to_numpy(), x.assign(edited=0.0).to_numpy()
    p1, p0 = (1 / (1 + np.exp(-m @ beta)) for m in (with_, without))
    gradient = ((p1 * (1 - p1))[:, None] * with_ - (p0 * (1 - p0))[:, None] * without).mean(axis=0)
    half = float(quantile * np.sqrt(gradient @ cov @ gradient))
    effect, se = float((p1 - p0).mean()), float(np.sqrt(cov[0, 0]))
    return Regressed(
        difference=Estimate(value=effect, low=max(effect - half, -1.0), high=min(effect + half, 1.0), n=len(table)),
        log_odds=float(beta[0]),
        p=float(2 * stats.t.sf(abs(beta[0]) / se, clusters - 1)) if se > 0 else None,
        clusters=clusters,
        state="ok",
    )
