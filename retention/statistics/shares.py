"""Shares of facts that are right or kept, and the difference of two groups. Reads tables of probe rows.

Retention is conditional: of the facts that were right at step 0 (just after the edit), the share that is right at a
later step, by one criterion for every group. The unit is the fact within its run: of a fact that is asked in several
ways, or beside several edits, the mean counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import (
    confint_proportions_2indep,
    proportion_confint,
    test_proportions_2indep,
)

from retention.statistics.equivalence import p_within
from retention.statistics.intervals import Estimate, spread
from retention.store import ROWS
from retention.types import UserError

CRITERIA = ("all_correct", "first_correct", "prefers_target", "gen_exact", "gen_contains")
CELL = ["editor", "task", "objective", "adapter", "mitigations"]  # runs that differ in their seeds alone are one cell


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Facts that could be kept, one entry for each fact and run, and whether they were."""

    runs: tuple[str, ...]  # all runs that were looked at, those without such a fact too
    run: np.ndarray  # [n] index into runs
    fact: np.ndarray  # [n] fact_id
    right: np.ndarray  # [n] 0 or 1; a fact asked in two ways and right in one of them is 0.5

    @property
    def kept(self) -> np.ndarray:
        """[runs]"""
        return np.bincount(self.run, weights=self.right, minlength=len(self.runs))

    @property
    def possible(self) -> np.ndarray:
        """[runs]"""
        return np.bincount(self.run, minlength=len(self.runs))


def cell_columns(rows: pd.DataFrame) -> list[str]:
    """Columns that tell the cells of a study apart: CELL, and each other axis of its grid (tune.steps, model ...)."""
    return [*CELL, *(name for name in rows.columns if name not in (*ROWS.names, "only", "study"))]


def check_criterion(rows: pd.DataFrame, criterion: str) -> None:
    """Raises UserError for a criterion that is unknown, or that the study's probes did not take."""
    if criterion not in CRITERIA:
        raise UserError(f"criterion: unknown {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if rows[criterion].isna().all():
        probe = "generate" if criterion.startswith("gen_") else "score"
        raise UserError(f"criterion {criterion}: not measured in this study; add the probe {probe}")


def asked(
    rows: pd.DataFrame, group: str, criterion: str, *, form: str = "direct", step: int | None = None, given: int = 0
) -> pd.DataFrame:
    """One line for each question and run: run_id, fact_id, question_id, start and end (bool, right at `given`, `step`).

    step None: the last one of each run. A question whose measure is missing at either step is left out.
    """
    part = rows[(rows["group"] == group) & (rows["form"] == form)]
    last = part.groupby("run_id", observed=True)["step"].transform("max") if step is None else step
    key = ["run_id", "fact_id", "question_id"]

    def at(when: object, name: str) -> pd.Series:
        found = part[part["step"] == when][[*key, criterion]].dropna(subset=criterion)
        found = found.astype({"run_id": str})  # a category knows runs that this part does not have
        return found.set_index(key)[criterion].astype(bool).rename(name)

    return pd.concat([at(given, "start"), at(last, "end")], axis=1, join="inner").reset_index()


def counts(
    rows: pd.DataFrame, group: str, step: int | None, criterion: str, *, form: str = "direct", given: int | None = 0
) -> Counts:
    """Facts of a group that are right at `step` (None: at each run's last), among those right at `given` (None: all).

    A question whose measure is missing at either step counts in neither. Only questions that were right at `given`
    count, and a fact is kept by the share of them that is right at `step`.
    """
    if given is None:
        found = asked(rows, group, criterion, form=form, step=step, given=_same(rows, step))
    else:
        found = asked(rows, group, criterion, form=form, step=step, given=given)
        found = found[found["start"]]
    return of_questions(found, tuple(sorted(rows["run_id"].unique())))


def _same(rows: pd.DataFrame, step: int | None) -> int:
    return 0 if step is None else step


def of_questions(found: pd.DataFrame, runs: tuple[str, ...], column: str = "end") -> Counts:
    """Questions (run_id, fact_id, `column`) as facts: the mean over a fact's questions within a run."""
    by_fact = found.groupby(["run_id", "fact_id"], observed=True)[column].mean()
    index = by_fact.index
    return Counts(
        runs=runs,
        run=np.searchsorted(runs, index.get_level_values("run_id").to_numpy(str)) if len(index) else np.zeros(0, int),
        fact=index.get_level_values("fact_id").to_numpy(object),
        right=by_fact.to_numpy(float),
    )


def share(c: Counts) -> Estimate | None:
    """Share kept over all runs, with its interval; None where no fact could be kept.

    Wilson's interval of as many independent facts as would have the variance that `intervals.spread` finds, Student's
    quantile included (the effective sample size of Korn and Graubard 1998; theirs is Clopper and Pearson's interval,
    which covers 96 to 97 % here). Of one run of all facts, and where all or none are kept of all different facts: what
    a fact does once tells much of what it does in another run.
    """
    n = len(c.right)
    if n == 0:
        return None
    p = float(c.right.mean())
    effective = float(_different(c))
    if 0 < p < 1:
        half = spread((c.right - p) / n, c.run, codes(c.fact)).half_width(p * (1 - p) / n)
        effective = p * (1 - p) * (stats.norm.ppf(0.975) / half) ** 2
    low, high = proportion_confint(p * effective, effective, alpha=0.05, method="wilson")
    return Estimate(value=p, low=float(low), high=float(high), n=n)


def _different(c: Counts) -> int:
    return len(set(c.fact))


def codes(names: np.ndarray) -> np.ndarray:
    """Names as integers from 0 on."""
    return np.unique(names.astype(str), return_inverse=True)[1]


def difference(a: Counts, b: Counts) -> Estimate | None:
    """Share kept in a minus share kept in b, both over the same runs. None where either has no fact.

    Several runs: Student's interval of run totals, a run's contributions to either share taken together. A group of
    which all or none are kept is counted from its share shrunk by one half fact (Jeffreys), so that it does not pretend
    to be certain. One run: Newcombe's interval and the score test of two independent shares.
    """
    na, nb = len(a.right), len(b.right)
    if na == 0 or nb == 0:
        return None
    value, n = float(a.right.mean() - b.right.mean()), min(na, nb)
    u = np.concatenate([(a.right - a.right.mean()) / na, -(b.right - b.right.mean()) / nb])
    s = spread(u, np.concatenate([a.run, b.run]), codes(np.concatenate([a.fact, b.fact])))
    if not s.replicated:
        two = (a.right.sum(), na, b.right.sum(), nb)
        low, high = confint_proportions_2indep(*two, method="newcomb", compare="diff")
        if 0 < two[0] + two[2] < na + nb:
            with np.errstate(
                divide="ignore", invalid="ignore"
            ):  # it also works out an odds ratio, which may be infinite
                p = float(test_proportions_2indep(*two, method="score").pvalue)
        else:
            p = 1.0
        within = p_within(value, float(low), float(high))
        return Estimate(value=value, low=float(low), high=float(high), n=n, p=p, p_within=within)
    certain = sum(_jeffreys(c) for c in (a, b) if c.right.min() == c.right.max())
    s = replace(s, variance=s.variance + certain)
    alone = float(a.right.var() / na + b.right.var() / nb + certain)
    half = s.half_width(alone)
    chance = s.p_value(value, alone)
    low, high = max(value - half, -1.0), min(value + half, 1.0)
    return Estimate(value=value, low=low, high=high, n=n, p=chance, p_within=p_within(value, low, high, s.df))


def _jeffreys(c: Counts) -> float:
    n = _different(c)
    p = (n * c.right.mean() + 0.5) / (n + 1)
    return float(p * (1 - p) / n)
