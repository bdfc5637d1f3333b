"""What was found, in words no stronger than the statistics (retention/statistics/wording.py). Knows no page.

Headline: edited against intrinsic facts that start as firmly. The unmatched difference comes second, with what is
wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retention.report._cells import FIRST, Arm, Cell
from retention.statistics import wording
from retention.statistics.equivalence import BOUND
from retention.statistics.wording import NONE, Compared, Verdict


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The headline, and what must be read with it."""

    headline: str
    sentences: tuple[str, ...]
    cautions: tuple[str, ...]


def verdicts(cells: Sequence[Cell]) -> tuple[list[Verdict], list[Verdict]]:
    """Edited against intrinsic in each cell: unmatched, and matched on where they start."""
    unmatched = [
        Compared(
            estimate=c.fair.unmatched, p=c.fair.unmatched.p if c.fair.unmatched else None, seeds=c.seeds,
            why=c.fair.states["unmatched"],
        )
        for c in cells
    ]  # fmt: skip
    matched = [
        Compared(
            estimate=c.fair.matched.difference, p=c.fair.matched.p_t if c.seeds > 1 else c.fair.matched.p_facts,
            seeds=c.seeds, why=c.fair.states["matched"],
        )
        for c in cells
    ]  # fmt: skip
    return wording.verdicts(unmatched), wording.verdicts(matched)


def finding(cells: Sequence[Cell], arms: Sequence[Arm], axis: str | None, criterion: str, left: int) -> Finding:
    """The headline of one study. left: runs that are not complete."""
    if not cells:
        return Finding(headline="No run is complete yet: nothing can be said.", sentences=(), cautions=())
    unmatched, matched = verdicts(cells)
    sentences = [_kept_sentence(cells), _unmatched_sentence(unmatched, matched), *_arm_sentences(arms, axis or "")]
    return Finding(
        headline=wording.matched(matched),
        sentences=tuple(s for s in sentences if s),
        cautions=tuple(_cautions(cells, criterion, left)),
    )


def _kept_sentence(cells: Sequence[Cell]) -> str:
    """How much was retained at all: the span over cells."""
    told = []
    for group in ("edited", "intrinsic"):
        ends = [e.value for cell in cells if (e := cell.kept(group)) is not None]
        if ends:
            span = f"{min(ends):.2f}" if len(ends) == 1 else f"{min(ends):.2f} to {max(ends):.2f}"
            told.append(f"{span} of the {group} facts")
    over = f", over {len(cells)} cells" if len(cells) > 1 else ""
    return f"Retention at the last step: {' and '.join(told)}{over}." if told else ""


def _unmatched_sentence(unmatched: Sequence[Verdict], matched: Sequence[Verdict]) -> str:
    """The difference that selection alone moves, and that it does."""
    return "" if all(v.word == NONE for v in unmatched) else wording.unmatched(unmatched, matched)


def _arm_sentences(arms: Sequence[Arm], axis: str) -> list[str]:
    """What each value of the first axis does to retention, against the baseline."""
    out = []
    for group in FIRST:
        own = [a for a in arms if a.measure == group]
        if own:
            against = "none" if own[0].against == "none" else f"{axis} {own[0].against}"
            p = [a.found.p_t if a.seeds > 1 else a.found.p_facts for a in own]
            found = wording.verdicts(
                [
                    Compared(estimate=a.found.difference, p=x, seeds=a.seeds, why=a.state)
                    for a, x in zip(own, p, strict=True)
                ]
            )
            what = f"{axis.capitalize()} against {against}, in paired runs, retention of {group} facts"
            out.append(wording.named([(a.name, v) for a, v in zip(own, found, strict=True)], what))
    return out


def _cautions(cells: Sequence[Cell], criterion: str, left: int) -> list[str]:
    seeds = sorted({c.seeds for c in cells})
    out = []
    if seeds == [1]:
        out.append(
            "Each cell has one seed: its intervals are over the facts of one run. Other seeds, other draws of facts "
            "and other models were not measured."
        )
    else:
        many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        out.append(
            f"The unit of replication is the run, of {many} seeds a cell: 95 % intervals are over runs, and the facts "
            "within them."
        )
        if 1 in seeds:
            out.append("Cells with one seed have intervals over facts: other seeds were not measured there.")
    out.append(
        f"Correct means {criterion.replace('_', ' ')}, on direct questions. Retention is the share correct at a run's "
        "last step, of the facts that were correct at step 0, just after the edit."
    )
    among = f" over all {len(cells)} cells" if len(cells) > 1 else ""
    out.append(
        f"Lower and higher: the 95 % interval excludes zero and the false-discovery rate{among} is below 5 %. Within "
        f"±{BOUND:.2f}: two one-sided tests at the same rate. Neither: these data cannot tell."
    )
    if broken := _not_finite(cells):
        out.append(
            f"{broken} {'run has' if broken == 1 else 'runs have'} readings that are not finite (training diverged, as "
            "a rule). Facts without a reading count as neither retained nor forgotten."
        )
    if left:
        out.append(f"{left} {'run is' if left == 1 else 'runs are'} not complete: this is not yet the whole study.")
    return out


def _not_finite(cells: Sequence[Cell]) -> int:
    """Runs with readings that are not finite."""
    return sum(int(c.rows.loc[c.rows["state"] == "nan_logits", "run_id"].nunique()) for c in cells)
