"""The numbers of a report, cell by cell: curves, what was kept in the end, the fair difference, the task's gain.

A cell is the runs that differ in their seeds alone. All numbers come from `retention.statistics`. Knows no page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from retention import statistics as st
from retention.report._read import Opened
from retention.statistics import matching
from retention.statistics.curves import Curves, curves
from retention.statistics.wording import IMPOSSIBLE, adjusted
from retention.types import UserError

FIRST = ("edited", "intrinsic")  # groups that stand first


@dataclass(frozen=True, kw_only=True)
class Fair:
    """Edited minus intrinsic facts: share kept in the end, of those right at step 0."""

    unmatched: st.Estimate | None
    matched: st.Comparison
    regression: st.Estimate | None
    states: dict[str, str]  # unmatched, matched, regression -> ok, or why there is none


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that differ in their seeds alone."""

    study: str
    named: dict[str, str]  # the columns that tell cells apart -> value
    rows: pd.DataFrame
    runs: tuple[str, ...]
    seeds: int  # different draws of facts and training among the runs
    steps: int  # the last one of any run
    curves: dict[tuple[str, str], dict[str, Curves]]  # (group, form) -> criterion that was measured -> curves
    criterion: str  # of the headline and the tables
    fair: Fair
    gain: st.Estimate | None  # of the task, over runs
    gained: str | None  # task_accuracy or task_loss

    def at_0(self, group: str, form: str) -> st.Estimate | None:
        """Right at step 0, among all facts."""
        found = self.curves[group, form].get(self.criterion)
        return found.every.get(0) if found else None

    def kept(self, group: str) -> st.Estimate | None:
        """Kept in the end, direct questions."""
        found = self.curves.get((group, "direct"), {}).get(self.criterion)
        return found.end if found else None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a curve, or with step None the end of each run."""

    cell: int
    group: str
    form: str
    criterion: str
    of: str  # kept: facts right at step 0; all: all facts
    step: int | None
    estimate: st.Estimate


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One value of an axis against the axis' baseline, paired by seed and fact; q over all lines of a measure."""

    context: dict[str, str]
    name: str
    against: str
    measure: str  # edited, intrinsic, or the task's gain
    found: st.Comparison
    seeds: int
    q: float | None
    state: str


def criterion_of(rows: pd.DataFrame, asked: str | None) -> str | None:
    """The criterion asked for, else the first that was measured; None where none was. Raises UserError."""
    if asked is not None:
        st.check_criterion(rows, asked)
        return asked
    return next((c for c in st.CRITERIA if rows[c].notna().any()), None)


def cells_of(study: Opened, criterion: str) -> list[Cell]:
    """All cells of a study that have a complete run."""
    if study.rows is None:
        return []
    gains = {m: st.task_gains(study.scores, m) for m in st.MEASURES} if study.scores is not None else {}
    found = []
    for key, rows in study.rows.groupby(study.columns, observed=True, sort=True, dropna=False):
        runs = tuple(sorted(map(str, rows["run_id"].unique())))
        measure = next((m for m in gains if set(runs) <= set(gains[m].index)), None)
        found.append(
            Cell(
                study=study.name, named=dict(zip(study.columns, map(str, key), strict=True)), rows=rows, runs=runs,
                seeds=len(rows[["seed", "facts_seed"]].drop_duplicates()), steps=int(rows["step"].max()),
                curves=_curves(rows), criterion=criterion,
                fair=_fair(rows, study.facts, criterion), gained=measure,
                gain=st.mean_estimate(gains[measure][list(runs)].to_numpy()) if measure else None,
            )
        )  # fmt: skip
    return sorted(found, key=order)


def order(cell: Cell) -> list[tuple[bool, str]]:
    """By name, the baseline first where it is called none."""
    return [(value != "none", value) for value in cell.named.values()]


def _curves(rows: pd.DataFrame) -> dict[tuple[str, str], dict[str, Curves]]:
    asked = rows[["group", "form"]].drop_duplicates().astype(str).itertuples(index=False)
    out = {}
    for group, form in sorted(asked, key=lambda a: (FIRST.index(a[0]) if a[0] in FIRST else len(FIRST), *a)):
        part = rows[(rows["group"] == group) & (rows["form"] == form)]
        measured = [c for c in st.CRITERIA if part[c].notna().any()]
        out[group, form] = {c: curves(part, group, c, form=form) for c in measured}
    return out


def _fair(rows: pd.DataFrame, facts: pd.DataFrame | None, criterion: str) -> Fair:
    asked = set(rows["group"].astype(str))
    table = matching.fact_table(rows, facts, criterion)
    pairs, model = matching.matched(table), matching.regression(table)
    missing = [g for g in FIRST if g not in asked]
    empty = [g for g in FIRST if g in asked and not (pairs.edited if g == "edited" else pairs.intrinsic)]
    none = f"no {missing[0]} facts in this study" if missing else ""
    none = none or (f"no {empty[0]} fact is right at step 0" if empty else "")
    return Fair(
        unmatched=pairs.unmatched, matched=pairs.matched, regression=model.difference,
        states={
            "unmatched": "ok" if pairs.unmatched else none,
            "matched": pairs.state if pairs.state == "ok" or not missing else f"{IMPOSSIBLE}: {none}",
            "regression": none or model.state,
        },
    )  # fmt: skip


def points_of(cells: list[Cell]) -> Iterator[Point]:
    """Every point of every curve."""
    for number, cell in enumerate(cells):
        for (group, form), by_criterion in cell.curves.items():
            for criterion, found in by_criterion.items():
                own: dict[str, Any] = {"cell": number, "group": group, "form": form, "criterion": criterion}
                for of, curve in (("kept", found.kept), ("all", found.every)):
                    yield from (Point(**own, of=of, step=step, estimate=e) for step, e in curve.items())
                if found.end is not None:
                    yield Point(**own, of="kept", step=None, estimate=found.end)


def arms_of(study: Opened, criterion: str) -> tuple[str | None, list[Arm], str]:
    """The axis that the study varies first, each of its values against the baseline, and why there are none."""
    if study.rows is None or study.scores is None:
        return None, [], "no run is complete"
    try:
        axis = st.arms_of(study.rows)
        rows, runs = st.arms_by_arguments(study.rows, study.runs, axis)
        against = st.baseline_of(rows, axis)
    except UserError as reason:
        return None, [], str(reason).partition(";")[0]
    pairs = st.pair_runs(runs, rows, axis, against)
    context = [name for name in st.context_columns(rows, axis) if rows[name].astype(str).nunique() > 1]
    gains = {measure: st.task_gains(study.scores, measure) for measure in st.MEASURES}
    asked = {group: st.asked(rows, group, criterion) for group in FIRST}
    arms = []
    for key, part in pairs.groupby([*context, axis], sort=True):
        named = dict(zip([*context, axis], map(str, key), strict=True))
        name = named.pop(axis)
        own: dict[str, Any] = {
            "context": named,
            "name": name,
            "against": against,
            "q": None,
            "seeds": part["seed"].nunique(),
        }
        for group in FIRST:
            found = st.compare(st.paired_questions(asked[group], part))
            state = "ok" if found.difference else "no fact is right at step 0 in both"
            arms.append(Arm(**own, measure=group, found=found, state=state))
        both = [*part["run"], *part["baseline"]]
        measure = next((m for m, gain in gains.items() if set(both) <= set(gain.index)), None)
        if measure is not None:
            arm, base = (gains[measure][part[c]].to_numpy() for c in ("run", "baseline"))
            arms.append(Arm(**own, measure=measure, found=st.paired_means(arm, base), state="ok"))
    if not arms:
        return axis, [], f"no run with another of {axis} has a run with {against} of the same seed beside it"
    return axis, _corrected(arms), ""


def _corrected(arms: list[Arm]) -> list[Arm]:
    """With Benjamini and Hochberg's q of Student's p over runs, over all lines of the same measure."""
    for measure in {arm.measure for arm in arms}:
        at = [i for i, arm in enumerate(arms) if arm.measure == measure and arm.found.p_t is not None]
        for i, q in zip(at, adjusted([arms[i].found.p_t for i in at]), strict=True):
            arms[i] = replace(arms[i], q=q)
    return arms
