"""Edited against intrinsic facts on equal terms: matched pairs, and a regression that says the same.

Edits start with another margin than what a model learned, and a fact that starts near the brink falls first. So facts
right at step 0 are paired within their run and relation, nearest in margin, answer length and frequency (optimal
one-to-one assignment with a caliper); how equal the pairs are is told before and after. Reads tables of probe rows.
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

COVARIATES = {  # name -> what it is
    "margin": "log-probability of the answer minus that of its foil at step 0, nats",
    "length": "tokens of the answer",
    "frequency": "log of the statements in pretraining",
}
CALIPER = 0.25  # standard deviations of the margin (pooled over both groups) that a pair may differ by


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
    found = first[["base_id", "logp_target", "logp_foil", "n_target_tokens"]].join(end, how="inner").reset_index()
    found["margin"] = (found["logp_target"] - found["logp_foil"]).astype(float)
    found["length"] = found["n_target_tokens"].astype(float)
    by = found.groupby(["run_id", "base_id", "group", "fact_id"], as_index=False)[["kept", "margin", "length"]].mean()
    by["edited"] = (by["group"] == "edited").astype(float)
    if facts is None:
        return by.assign(relation="", frequency=np.nan)
    known = facts[["base_id", "fact_id", "relation", "exposures"]].astype({"base_id": str}).drop_duplicates()
    by = by.merge(known, on=["base_id", "fact_id"], how="left")
    by["relation"] = by["relation"].fillna("").astype(str)
    by["frequency"] = np.log(by["exposures"].astype(float).where(by["exposures"] > 0))
    return by


def matched(table: pd.DataFrame, *, caliper: float = CALIPER) -> Matched:
    """Pair the edited facts of `fact_table` with intrinsic ones, and compare."""
    used = _used(table)
    sd = {name: _pooled_sd(table, name) for name in used}
    at = pairs(table, caliper=caliper)
    first, second = (table.iloc[at[:, k]] for k in (0, 1))
    runs = tuple(sorted(table["run_id"].unique()))

    def counts_of(part: pd.DataFrame) -> Counts:
        at = np.searchsorted(runs, part["run_id"].to_numpy(str)) if len(part) else np.zeros(0, int)
        return Counts(runs=runs, run=at, fact=part["fact_id"].to_numpy(object), right=part["kept"].to_numpy(float))

    one, two = table[table["edited"] == 1], table[table["edited"] == 0]
    lines = []
    for name in used:
        before, after = one[name].mean() - two[name].mean(), first[name].mean() - second[name].mean()
        lines.append(
            {"covariate": name, "edited": one[name].mean(), "intrinsic": two[name].mean(), "before": before / sd[name]}
            | {"after": after / sd[name] if len(at) else np.nan}
        )
    return Matched(
        unmatched=difference(counts_of(one), counts_of(two)),
        matched=compare_counts(counts_of(first), counts_of(second)),
        pairs=at,
        balance=pd.DataFrame(lines, columns=["covariate", "edited", "intrinsic", "before", "after"]),
        edited=len(one),
        intrinsic=len(two),
        left_out=tuple(name for name in COVARIATES if name not in used),
    )


def pairs(table: pd.DataFrame, *, caliper: float = CALIPER) -> np.ndarray:
    """[pairs, 2]: positions in the table of an edited fact and of the intrinsic one that it is matched with.

    As many pairs as the caliper allows within each run and relation, of these the nearest.
    """
    used = _used(table)
    values = {name: table[name].to_numpy(float) / _pooled_sd(table, name) for name in used}
    edited = table["edited"].to_numpy() == 1
    found = [np.zeros((0, 2), int)]
    for members in table.groupby(["run_id", "relation"]).indices.values():
        one, two = members[edited[members]], members[~edited[members]]
        if not len(one) or not len(two):
            continue
        apart = [np.abs(np.subtract.outer(values[name][one], values[name][two])) for name in used]
        cost = np.sum(np.square(apart), axis=0) if apart else np.zeros((len(one), len(two)))
        far = apart[used.index("margin")] > caliper if "margin" in used else np.zeros(cost.shape, bool)
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
    """Logistic regression of being kept on group and margin. Numbers are None where `state` says why there are none."""

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

    for value, name in ((1, "edited"), (0, "intrinsic")):
        kept = table.loc[table["edited"] == value, "kept"]
        if kept.empty:
            return none(f"no {name} fact is right at step 0")
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
