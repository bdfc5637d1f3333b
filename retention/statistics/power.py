"""How many seeds and facts a study needs to see a given difference, from a pilot's variances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
from statsmodels.stats.power import TTestPower

from retention.statistics import matching
from retention.statistics.paired import Comparison, compare, context_columns, pair_runs, paired_questions
from retention.statistics.shares import asked
from retention.types import UserError

SEEDS = range(3, 201)
FACTS = (10, 25, 50, 100, 200, 400)


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Seeds needed with a number of facts, for a power of `chance` at the 5 % level (two-sided, paired over seeds)."""

    facts: int  # edited facts a seed; between arms, facts of the group
    seeds: int | None  # None: more than SEEDS ends with
    standard_error: float | None  # of the difference with so many


@dataclass(frozen=True, kw_only=True)
class Power:
    """What a pilot says about the study that is to come."""

    difference: float  # to be seen, in shares
    between: float  # variance of the difference between seeds, beyond what its facts explain
    within: float  # variance that one fact adds (its pair's; of those without a partner none): divided by facts, seeds
    pilot_seeds: int
    pilot_facts: float  # a seed, harmonic mean
    needed: tuple[Needed, ...]
    state: str


def power(
    rows: pd.DataFrame,
    difference: float,
    *,
    known: pd.DataFrame | None = None,
    criterion: str = "all_correct",
    form: str = "direct",
    facts: Sequence[int] = FACTS,
    chance: float = 0.8,
) -> Power:
    """Seeds needed to see `difference` (edited minus intrinsic, matched on the lead), by number of edited facts.

    rows: one cell of the pilot (runs that differ in their seeds alone). known: as `retention.load(path, "facts")`, for
    relations and frequencies. As many of the edited facts find a partner as in the pilot. Raises UserError for a
    difference outside (0, 1], a power outside (0, 1), or a pilot without a matched comparison.
    """
    _check(difference, facts, chance)
    table = matching.fact_table(rows, known, criterion, form=form)
    found = matching.matched(table)
    if found.state != "ok":
        raise UserError(f"power: {found.state}")
    kept, at = table["kept"].to_numpy(float), found.pairs
    d = pd.Series(kept[at[:, 0]] - kept[at[:, 1]]).groupby(table["run_id"].to_numpy(str)[at[:, 0]])
    n, partnered = d.size().to_numpy(), len(at) / found.edited
    within = _of_pairs(found.matched, len(at))
    return _planned(d.mean().to_numpy(), within / n, within / partnered, n / partnered, difference, facts, chance)


def paired_power(
    paired: pd.DataFrame, difference: float, *, facts: Sequence[int] = FACTS, chance: float = 0.8
) -> Power:
    """The same for an arm minus its baseline, of the facts right at step 0 in both.

    paired: as `paired_questions`, of one arm and context.
    """
    _check(difference, facts, chance)
    found = paired[paired["start"] & paired["start_base"]]
    if found.empty:
        raise UserError("power: no fact is right at step 0 in both arms")
    d = (found["end"].astype(float) - found["end_base"].astype(float)).groupby([found["run_id"], found["fact_id"]])
    of_runs = d.mean().groupby(level="run_id")
    n = of_runs.size().to_numpy()
    within = _of_pairs(compare(paired), int(n.sum()))
    return _planned(of_runs.mean().to_numpy(), within / n, within, n, difference, facts, chance)


def _planned(
    found: np.ndarray,
    by_facts: np.ndarray,
    within: float,
    n: np.ndarray,
    difference: float,
    facts: Sequence[int],
    chance: float,
) -> Power:
    """found, by_facts, n [seeds]: the pilot's differences, what facts alone add to their variance, facts.

    Over seeds the difference varies by between + within / facts: between is what is left of the spread over seeds, but
    at least zero. The test is a paired t over seeds. A pilot of one seed tells no `between`; then it is taken as zero,
    which `state` says.
    """
    between, state = 0.0, "ok"
    if len(found) == 1:
        state = "one seed: how seeds differ is not known, taken as nothing"
    else:
        between = max(float(np.var(found, ddof=1) - by_facts.mean()), 0.0)
        if len(found) < 5:
            state = f"{len(found)} seeds: how seeds differ is known roughly"
    needed = []
    for count in facts:
        sd = float(np.sqrt(between + within / count))
        # The tail of the true direction alone: the other one is less than 0.001, and scipy gives NaN for it at times.
        seen = (TTestPower().power(abs(difference) / sd, s, 0.025, alternative="larger") for s in SEEDS)
        enough = (s for s, p in zip(SEEDS, seen, strict=True) if p >= chance)
        seeds = next(enough, None)
        needed.append(Needed(facts=count, seeds=seeds, standard_error=sd / np.sqrt(seeds) if seeds else None))
    return Power(
        difference=difference, between=between, within=within, pilot_seeds=len(found),
        pilot_facts=float(1 / np.mean(1 / n)), needed=tuple(needed), state=state,
    )  # fmt: skip


def _check(difference: float, facts: Sequence[int], chance: float) -> None:
    """Raises UserError for a plan that no pilot could make."""
    if not 0 < abs(difference) <= 1:
        raise UserError(f"difference: expected a share between 0 and 1, such as 0.1; got {difference}")
    if not 0 < chance < 1:
        raise UserError(f"power: expected a probability between 0 and 1, such as 0.8; got {chance}")
    if wrong := [count for count in facts if count < 1]:
        raise UserError(f"facts: expected numbers of facts, such as 50; got {wrong[0]}")


def _of_pairs(found: Comparison, n: int) -> float:
    """Variance of one pair's difference; two pairs, one each way, are added, so that none is certain."""
    more, less = ((k + 1) / (n + 2) for k in (found.more, found.less))
    return float(more + less - (more - less) ** 2)


def plans(
    rows: pd.DataFrame,
    difference: float,
    *,
    columns: Sequence[str],
    known: pd.DataFrame | None = None,
    criterion: str = "all_correct",
    form: str = "direct",
    facts: Sequence[int] = FACTS,
    chance: float = 0.8,
) -> pd.DataFrame:
    """One line for each cell of a pilot (by `columns`): edited minus intrinsic, as `power`."""
    lines: list[dict[str, object]] = []
    for key, cell in rows.groupby(list(columns), observed=True, sort=True):
        named = dict(zip(columns, map(str, key), strict=True))
        with _told_of(named, lines):
            plan = power(cell, difference, known=known, criterion=criterion, form=form, facts=facts, chance=chance)
            lines.append({**named, **_line(plan)})
    return _table(lines, columns, "editor", facts)


def paired_plans(
    rows: pd.DataFrame,
    runs: pd.DataFrame,
    difference: float,
    *,
    axis: str,
    against: str,
    group: str = "edited",
    criterion: str = "all_correct",
    form: str = "direct",
    facts: Sequence[int] = FACTS,
    chance: float = 0.8,
) -> pd.DataFrame:
    """One line for each arm and context: the arm minus the baseline, of one group's facts, as `paired_power`."""
    pairs, context = pair_runs(runs, rows, axis, against), context_columns(rows, axis)
    if pairs.empty:
        raise UserError(f"no run of another {axis} has a complete partner with {axis} {against!r} and the same seed")
    questions = asked(rows, group, criterion, form=form)
    columns = [*context, axis]
    lines: list[dict[str, object]] = []
    for key, part in pairs.groupby(columns, sort=True):
        named = dict(zip(columns, map(str, key), strict=True))
        with _told_of(named, lines):
            plan = paired_power(paired_questions(questions, part), difference, facts=facts, chance=chance)
            lines.append({**named, **_line(plan)})
    return _table(lines, columns, axis, facts)


@contextmanager
def _told_of(named: Mapping[str, str], lines: list[dict[str, object]]) -> Iterator[None]:
    """A pilot that tells of no variance becomes a line that says why."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith("power: no"):
            raise
        lines.append({**named, "state": str(error).removeprefix("power: ")})


def _line(plan: Power) -> dict[str, object]:
    return {
        "pilot_seeds": plan.pilot_seeds,
        "pilot_facts": plan.pilot_facts,
        "sd_between": float(np.sqrt(plan.between)),
        "sd_fact": float(np.sqrt(plan.within)),
        **{f"{n.facts} facts": f"{n.seeds}" if n.seeds else f"over {SEEDS[-1]}" for n in plan.needed},
        "state": plan.state,
    }


def _table(lines: list[dict[str, object]], columns: Sequence[str], always: str, facts: Sequence[int]) -> pd.DataFrame:
    """Columns that tell the lines apart, the pilot's variances, and seeds needed by number of facts."""
    found = pd.DataFrame(lines)
    shown = [name for name in columns if name == always or found[name].nunique() > 1]
    measured = ["pilot_seeds", "pilot_facts", "sd_between", "sd_fact", *(f"{count} facts" for count in facts)]
    return found.reindex(columns=[*shown, *measured, "state"])
