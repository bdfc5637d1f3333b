"""One arm of a study against another, pair by pair: the same seed, the same facts. Reads tables of probe rows.

An arm is a value of one axis (mitigations, objective ...); within each cell of the other axes it is compared with the
baseline of that axis. Effect sizes come first; tests say how often chance alone would do as much.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from retention.statistics.equivalence import p_within
from retention.statistics.intervals import Estimate, mean_estimate, spread
from retention.statistics.shares import Counts, cell_columns, codes, of_questions
from retention.types import UserError

AXES = ("mitigations", "objective", "adapter", "task", "editor")
AGAINST = {"mitigations": "none", "objective": "sft", "adapter": "full"}  # what an axis is compared with, unless said
EXACT = 2**16  # sign patterns that are all counted; of more, so many are drawn


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus its baseline over paired runs and facts. Numbers are None where nothing was paired."""

    difference: Estimate | None  # mean over paired facts; n = pairs of facts
    arm: float | None  # mean over the same pairs
    against: float | None
    runs: int  # paired runs with a pair of facts
    more: int  # pairs in which the arm is better
    less: int
    p_seeds: float | None  # sign-flip permutation of the runs' totals, two-sided; None with fewer than two runs
    p_t: float | None  # Student's t over the runs' totals, dual to the interval
    p_facts: float | None  # McNemar, mid-p: these facts in these runs, runs taken as fixed
    least_p: float | None  # the smallest p_seeds that so many runs can give


def arms_of(rows: pd.DataFrame, axis: str | None = None) -> str:
    """The axis to compare: the one asked for, else the first that the study varies. Raises UserError if none varies."""
    if axis is not None and axis not in AXES:
        near = difflib.get_close_matches(axis, AXES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"axis: unknown {axis!r}; expected one of {', '.join(AXES)}{hint}")
    varied = [name for name in AXES if rows[name].nunique() > 1]
    if axis is None:
        if not varied:
            raise UserError(f"nothing to compare: no two complete runs differ in {', '.join(AXES[:-1])} or {AXES[-1]}")
        return varied[0]
    if axis not in varied:
        only = ", ".join(map(str, rows[axis].unique()))
        hint = f"; varied here: {', '.join(varied)}" if varied else ""
        raise UserError(f"axis {axis}: complete runs have one value alone ({only}), nothing to compare{hint}")
    return axis


def baseline_of(rows: pd.DataFrame, axis: str, against: str | None = None) -> str:
    """The value of the axis that others are compared with. Raises UserError if no complete run has it."""
    there = sorted(map(str, rows[axis].unique()))
    name = against if against is not None else AGAINST.get(axis)
    if name in there:
        return str(name)
    near = difflib.get_close_matches(str(name), there, n=1) if name else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    what = f"no complete run has {axis} {name!r}" if name else f"axis {axis} has no baseline of its own"
    raise UserError(f"{what}; name one with --against: {', '.join(there)}{hint}")


def arms_by_arguments(rows: pd.DataFrame, runs: pd.DataFrame, axis: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, with the arguments of whole fine-tunes (an axis `tune`) as part of the arm, not of its context.

    Where objective, adapter or task is compared, the learning rate that goes with one of its values must not keep it
    from being compared with the others. A value that the study trains in several ways is named with its arguments.
    """
    if axis not in ("objective", "adapter", "task") or "tune" not in rows:
        return rows, runs
    columns = [name for name in cell_columns(rows) if name != "tune"]
    cells = rows[[*columns, "tune"]].drop_duplicates().astype(str)
    several = set(cells[cells.duplicated(columns, keep=False)][axis])

    def named(table: pd.DataFrame) -> pd.DataFrame:
        values, arguments = table[axis].astype(str), table["tune"].astype(str)
        return table.assign(**{axis: values.where(~values.isin(several), values + ", " + arguments)}).drop(
            columns="tune"
        )

    return named(rows), named(runs)


def context_columns(rows: pd.DataFrame, axis: str) -> list[str]:
    """Columns that must be equal in both arms: all that tell cells apart but the axis, and what goes with the axis.

    A column that has one value within each value of the axis (the learning rate of an adapter, say) is part of the arm.
    """
    left = [name for name in cell_columns(rows) if name != axis]
    arms = rows[[axis, *left]].drop_duplicates()
    with_axis = [n for n in left if arms[n].nunique() > 1 and arms.groupby(axis, observed=True)[n].nunique().max() == 1]
    return [name for name in left if name not in with_axis]


def pair_runs(runs: pd.DataFrame, rows: pd.DataFrame, axis: str, against: str) -> pd.DataFrame:
    """Complete runs beside the baseline's run with the same seed, draw and context.

    runs: as `retention.load(path, "runs")`. Columns: the context's, the axis, seed, run (of the arm), baseline (run).
    """
    context = context_columns(rows, axis)
    key = [*context, "seed", "facts_seed", "only"]
    done = runs[runs["complete"]].rename(columns={"run_id": "run"}).astype(dict.fromkeys((*context, axis), str))
    done = done.assign(only=done["only"].fillna(-1))
    base = done[done[axis] == against].rename(columns={"run": "baseline"})[[*key, "baseline"]]
    found = done[done[axis] != against].merge(base, on=key)
    return found[[*context, axis, "seed", "run", "baseline"]]


def paired_questions(questions: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Questions asked in both runs of a pair: run_id, fact_id, question_id, start, end; start_base, end_base.

    questions: as `asked`, of all runs. pairs: columns run and baseline.
    """
    arm = questions.merge(pairs[["run", "baseline"]], left_on="run_id", right_on="run")
    base = questions.rename(columns={"run_id": "baseline"})
    return arm.merge(base, on=["baseline", "fact_id", "question_id"], suffixes=("", "_base"))


def compare(paired: pd.DataFrame, *, both: bool = True) -> Comparison:
    """The arm against its baseline at each run's last step.

    paired: as `paired_questions`. both: only questions right at step 0 in both arms (retention); else all questions
    (what is right in the end, which also holds what the arm does to the edit itself).
    """
    found = paired[paired["start"] & paired["start_base"]] if both else paired
    runs = tuple(sorted(found["run_id"].unique()))
    return compare_counts(of_questions(found, runs), of_questions(found, runs, "end_base"))


def compare_counts(arm: Counts, base: Counts) -> Comparison:
    """The same of counts that hold the pairs in the same order."""
    d = arm.right - base.right
    n, runs = len(d), len(np.unique(arm.run))
    if n == 0:
        return Comparison(
            difference=None, arm=None, against=None, runs=0, more=0, less=0,
            p_seeds=None, p_t=None, p_facts=None, least_p=None,
        )  # fmt: skip
    more, less = int((d > 0).sum()), int((d < 0).sum())
    value = float(d.mean())
    # What is paired need not be one fact twice: matching pairs two, of which one may recur over runs.
    u = np.concatenate([arm.right - arm.right.mean(), base.right.mean() - base.right]) / n
    s = spread(u, np.concatenate([arm.run, base.run]), codes(np.concatenate([arm.fact, base.fact])))
    # A pair that differs one way and one the other way are added (Bonett and Price 2012), so that arms which never
    # differ do not pretend to be certain.
    a, b = (more + 1) / (n + 2), (less + 1) / (n + 2)
    careful = (a + b - (a - b) ** 2) / (n + 2)
    tells = runs > 1 and s.variance > 0
    half = s.half_width(float(d.var() / n)) if tells else float(stats.norm.ppf(0.975) * np.sqrt(careful))
    low, high = max(value - half, -1.0), min(value + half, 1.0)
    within = p_within(value, low, high, s.df if tells else np.inf)
    totals = np.bincount(arm.run, weights=d)[np.unique(arm.run)]
    return Comparison(
        difference=Estimate(value=value, low=low, high=high, n=n, p_within=within),
        arm=float(arm.right.mean()),
        against=float(base.right.mean()),
        runs=runs,
        more=more,
        less=less,
        p_seeds=sign_flip(totals) if runs > 1 else None,
        p_t=s.p_value(value, float(d.var() / n)) if tells else None,
        p_facts=mcnemar(more, less),
        least_p=2.0 ** (1 - runs) if runs > 1 else None,
    )


def paired_means(arm: np.ndarray, against: np.ndarray) -> Comparison:
    """The same for one number a run (a task's gain): pairs are runs."""
    d = np.asarray(arm, float) - np.asarray(against, float)
    runs = len(d)
    return Comparison(
        difference=mean_estimate(d),
        arm=float(np.mean(arm)),
        against=float(np.mean(against)),
        runs=runs,
        more=int((d > 0).sum()),
        less=int((d < 0).sum()),
        p_seeds=sign_flip(d) if runs > 1 else None,
        p_t=float(stats.ttest_1samp(d, 0).pvalue) if runs > 1 and np.ptp(d) > 0 else None,
        p_facts=None,
        least_p=2.0 ** (1 - runs) if runs > 1 else None,
    )


def mcnemar(more: int, less: int) -> float:
    """Two-sided mid-p of McNemar's test (Fagerland, Lydersen and Laake 2013).

    The exact test rejects 1 to 3 % where it says 5 %, since few pairs differ; half of the observed table's probability
    off brings that near to 5 %, without going over it by more than a little.
    """
    n, least = more + less, min(more, less)
    if n == 0:
        return 1.0
    p = 2 * float(stats.binom.cdf(least, n, 0.5)) - float(stats.binom.pmf(least, n, 0.5))
    return min(p, 1.0)


def sign_flip(d: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p of a mean difference if each run's sign were chance; exact up to 16 runs."""

    def total(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return (x - y).sum(axis=axis)

    if not d.any():
        return 1.0
    found = stats.permutation_test(
        (d, np.zeros_like(d)), total, permutation_type="samples", vectorized=True, n_resamples=EXACT,
        alternative="two-sided", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)
