"""Curves: the share of a group's facts that are right at each checkpoint. Reads tables of probe rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from retention.statistics.intervals import Estimate
from retention.statistics.shares import Counts, share


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Shares by step. A step at which no such fact was measured is left out."""

    kept: dict[int, Estimate]  # of the facts right at step 0; from step 0 on
    every: dict[int, Estimate]  # of all facts; from step -1 on
    end: Estimate | None  # of the facts right at step 0, right at each run's last step


def curves(rows: pd.DataFrame, group: str, criterion: str, *, form: str = "direct") -> Curves:
    """Each share equals that of `share(counts(...))` at its step, but the rows are sorted once for all steps."""
    part = rows[(rows["group"] == group) & (rows["form"] == form)]
    if part.empty:
        return Curves(kept={}, every={}, end=None)
    questions, question = np.unique(_joined(part, "run_id", "fact_id", "question_id"), return_inverse=True)
    steps, step = np.unique(part["step"].to_numpy(), return_inverse=True)
    right = np.full((len(questions), len(steps)), np.nan)
    right[question, step] = part[criterion].astype("boolean").to_numpy(float, na_value=np.nan)
    first = np.unique(question, return_index=True)[1]
    run_of, fact_of = (part[name].astype(str).to_numpy(object)[first] for name in ("run_id", "fact_id"))
    runs, run = np.unique(run_of.astype(str), return_inverse=True)
    unit = np.unique(_joined(part.iloc[first], "run_id", "fact_id"), return_inverse=True)[1]
    start = right[:, list(steps).index(0)] == 1 if 0 in steps else np.zeros(len(right), bool)

    def of(end: np.ndarray, which: np.ndarray) -> Estimate | None:
        known = which & ~np.isnan(end)
        units, at, inverse = np.unique(unit[known], return_index=True, return_inverse=True)
        mean = np.bincount(inverse, weights=end[known], minlength=len(units)) / np.bincount(inverse)
        return share(Counts(runs=tuple(runs), run=run[known][at], fact=fact_of[known][at], right=mean))

    all_ = np.ones(len(right), bool)
    kept = {int(s): of(right[:, i], start) for i, s in enumerate(steps) if s >= 0}
    every = {int(s): of(right[:, i], all_) for i, s in enumerate(steps)}
    last = np.zeros(len(runs), int)  # place of each run's last step
    np.maximum.at(last, run[question], step)
    same = (last == last[0]).all()
    end = kept.get(int(steps[last[0]])) if same else of(right[np.arange(len(right)), last[run]], start)
    return Curves(kept=_known(kept), every=_known(every), end=end)


def _joined(table: pd.DataFrame, *columns: str) -> np.ndarray:
    """One integer for each line's values in `columns`: equal where they are."""
    out = np.zeros(len(table), np.int64)
    for name in columns:
        codes, values = pd.factorize(table[name])
        out = out * (len(values) + 1) + codes
    return out


def _known(found: dict[int, Estimate | None]) -> dict[int, Estimate]:
    return {step: estimate for step, estimate in found.items() if estimate is not None}
