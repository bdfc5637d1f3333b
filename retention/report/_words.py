"""What was found, in words no stronger than the statistics. Knows no page.

A cell tells edited from intrinsic facts only if it has several runs (seeds), its 95 % interval leaves out zero, and so
does the false-discovery rate over all cells of the study (q < 0.05). Anything else is "cannot tell".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from retention import statistics as st
from retention.report._cells import Arm, Cell
from retention.statistics.wording import adjusted

LEVEL = 0.05  # of the false-discovery rate
LESS, MORE, UNSURE, ONE_SEED, NONE = "less", "more", "cannot tell", "one seed", "none"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one comparison can say."""

    word: str  # LESS, MORE, UNSURE, ONE_SEED or NONE
    estimate: st.Estimate | None
    q: float | None
    why: str  # of NONE

    @property
    def told(self) -> str:
        """The word for a table."""
        return {
            LESS: "kept less", MORE: "kept more", UNSURE: "cannot tell", ONE_SEED: "cannot tell: one seed",
            NONE: self.why,
        }[self.word]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The headline, and what must be read with it."""

    headline: str
    sentences: tuple[str, ...]
    cautions: tuple[str, ...]


def verdict(estimate: st.Estimate | None, q: float | None, seeds: int, why: str) -> Verdict:
    """What an estimate with its corrected p can say."""
    if estimate is None:
        word = NONE
    elif seeds < 2:
        word = ONE_SEED
    elif q is None or q >= LEVEL or estimate.low <= 0 <= estimate.high:
        word = UNSURE
    else:
        word = LESS if estimate.value < 0 else MORE
    return Verdict(word=word, estimate=estimate, q=q, why=why)


def verdicts(cells: Sequence[Cell]) -> tuple[list[Verdict], list[Verdict]]:
    """Edited against intrinsic in each cell: unmatched, and matched on where they start."""
    plain = [c.fair.unmatched.p if c.fair.unmatched and c.seeds > 1 else None for c in cells]
    fair = [c.fair.matched.p_t if c.seeds > 1 else None for c in cells]
    unmatched = [
        verdict(c.fair.unmatched, q, c.seeds, c.fair.states["unmatched"])
        for c, q in zip(cells, adjusted(plain), strict=True)
    ]
    matched = [
        verdict(c.fair.matched.difference, q, c.seeds, c.fair.states["matched"])
        for c, q in zip(cells, adjusted(fair), strict=True)
    ]
    return unmatched, matched


def finding(cells: Sequence[Cell], arms: Sequence[Arm], axis: str | None, criterion: str, left: int) -> Finding:
    """The headline of one study. left: runs that are not complete."""
    if not cells:
        return Finding(headline="No run is complete yet: nothing can be said.", sentences=(), cautions=())
    unmatched, matched = verdicts(cells)
    sentences = [_kept_sentence(cells), _fair_sentence(matched), *_arm_sentences(arms, axis or "")]
    return Finding(
        headline=_headline(unmatched, matched),
        sentences=tuple(s for s in sentences if s),
        cautions=tuple(_cautions(cells, criterion, left)),
    )


def _headline(found: Sequence[Verdict], matched: Sequence[Verdict]) -> str:
    tally, n = Counter(v.word for v in found), len(found)
    if tally[NONE] == n:
        reasons = ", ".join(dict.fromkeys(v.why for v in found))
        return f"Edited and intrinsic facts cannot be compared: {reasons}."
    if tally[ONE_SEED] + tally[NONE] == n:
        ends = [v.estimate.value for v in found if v.estimate is not None]
        apart = f"{min(ends):+.2f}" if len(ends) == 1 else f"{min(ends):+.2f} to {max(ends):+.2f}"
        return (
            "One seed cannot tell whether edited facts are kept less or more than intrinsic ones "
            f"(differences in {'this run' if n == 1 else 'these runs'}: {apart})."
        )
    if not tally[LESS] and not tally[MORE]:
        where = "" if n == 1 else f" in any of the {n} cells"
        return f"We cannot tell edited from intrinsic facts by how well they are kept{where}."
    parts = [f"{word} {_where(tally[word], n)}{_size(found, word)}" for word in (LESS, MORE) if tally[word]]
    parts[0] = parts[0].replace(" ", " than intrinsic ones ", 1)
    rest = n - tally[LESS] - tally[MORE]
    tail = f"; {_where(rest, n)} we cannot tell" if rest else ""
    return f"Edited facts are kept {' and '.join(parts)}{tail}.{_but(found, matched)}"


def _but(found: Sequence[Verdict], matched: Sequence[Verdict]) -> str:
    """Whether what was told is still told against facts that start as firmly."""
    said = [(a.word, b.word) for a, b in zip(found, matched, strict=True) if a.word in (LESS, MORE)]
    same = sum(a == b for a, b in said)
    if same == len(said):
        return ""
    turned = sum(b in (LESS, MORE) and a != b for a, b in said)
    if turned:
        cells = "" if len(said) == 1 else f" in {turned} of these {len(said)} cells and holds in {same}"
        return f" Against intrinsic facts that start as firmly it is the other way round{cells}."
    if not same:
        return " Against intrinsic facts that start as firmly this can no longer be told."
    return f" Against intrinsic facts that start as firmly this holds in {same} of these {len(said)} cells."


def _where(count: int, n: int) -> str:
    return "here" if n == 1 else f"in all {n} cells" if count == n else f"in {count} of {n} cells"


def _size(found: Sequence[Verdict], word: str) -> str:
    sizes = [abs(v.estimate.value) for v in found if v.word == word and v.estimate]
    low, high = f"{min(sizes):.2f}", f"{max(sizes):.2f}"
    return f" (by {low})" if low == high else f" (by {low} to {high})"


def _kept_sentence(cells: Sequence[Cell]) -> str:
    """How much was kept at all: the span over cells."""
    told = []
    for group in ("edited", "intrinsic"):
        ends = [e.value for cell in cells if (e := cell.kept(group)) is not None]
        if ends:
            span = f"{min(ends):.2f}" if len(ends) == 1 else f"{min(ends):.2f} to {max(ends):.2f}"
            told.append(f"{span} of the {group} facts")
    over = f", over {len(cells)} cells" if len(cells) > 1 else ""
    return f"Kept at the last step: {' and '.join(told)}{over}." if told else ""


def _fair_sentence(matched: Sequence[Verdict]) -> str:
    tally, n = Counter(v.word for v in matched), len(matched)
    if tally[NONE] == n:
        reasons = ", ".join(dict.fromkeys(v.why for v in matched))
        return f"Matched on where they start (lead, relation, answer length, frequency): no comparison, {reasons}."
    against = "Against intrinsic facts that start as firmly (matched on lead, relation, answer length, frequency)"
    told = [f"kept {word} {_where(tally[word], n)}{_size(matched, word)}" for word in (LESS, MORE) if tally[word]]
    unsure = tally[UNSURE] + tally[ONE_SEED]
    none = f"; {_where(tally[NONE], n)} no two facts match" if tally[NONE] else ""
    if not told:
        where = f"in any of the {n} cells" if unsure == n > 1 else _where(unsure, n)
        return f"{against}, we cannot tell {where}{none}."
    tail = f"; {_where(unsure, n)} we cannot tell" if unsure else ""
    return f"{against}, edited facts are {' and '.join(told)}{tail}{none}."


def _arm_sentences(arms: Sequence[Arm], axis: str) -> list[str]:
    """What each value of the first axis keeps of the edits, against the baseline."""
    edited = [a for a in arms if a.measure == "edited"]
    if not edited:
        return []
    against = edited[0].against
    what = "without" if against == "none" else f"with {axis} {against}"
    if all(a.seeds < 2 for a in edited):
        return [f"With one seed a value of {axis}, we cannot tell what it does to edited facts."]
    lines = []
    for word, said in ((MORE, "more"), (LESS, "fewer")):
        sizes: dict[str, list[float]] = {}
        for a in edited:
            if a.found.difference and verdict(a.found.difference, a.q, a.seeds, a.state).word == word:
                sizes.setdefault(a.name, []).append(a.found.difference.value)
        if sizes:
            named = sorted(sizes, key=lambda name: -max(map(abs, sizes[name])))
            names = [_arm(name, sizes[name], sum(a.name == name for a in edited)) for name in named]
            lines.append(f"{said} edited facts are kept with {', '.join(names)}")
    rest = len(edited) - sum(verdict(a.found.difference, a.q, a.seeds, a.state).word in (MORE, LESS) for a in edited)
    if rest:
        lines.append(f"for {'all' if rest == len(edited) else rest} of {len(edited)} comparisons we cannot tell")
    text = "; ".join(lines)
    return [f"{axis.capitalize()}, each run paired with the same one {what}: {text}."]


def _arm(name: str, sizes: Sequence[float], of: int) -> str:
    """An arm, its effects, and in how many of its comparisons they are told."""
    low, high = f"{min(sizes):+.2f}", f"{max(sizes):+.2f}"
    span = low if low == high else f"{low} to {high}"
    return f"{name} ({span}{f'; {len(sizes)} of {of}' if of > 1 else ''})"


def _cautions(cells: Sequence[Cell], criterion: str, left: int) -> list[str]:
    seeds, runs = sorted({c.seeds for c in cells}), sorted({len(c.runs) for c in cells})
    out = []
    if seeds == [1]:
        of = "that run" if runs == [1] else "those runs"
        out.append(
            f"Each cell has one seed. Its intervals are over the facts of {of}, and say nothing about other seeds, "
            "other draws of facts or other models."
        )
    else:
        many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        out.append(
            f"The unit of replication is the run, of {many} seeds a cell: 95 % intervals are over runs, and the facts "
            "within them."
        )
        if 1 in seeds:
            out.append("Cells with one seed have intervals that say nothing about other seeds, and count as untold.")
    out.append(
        f"Right means {criterion.replace('_', ' ')}, on direct questions; kept means right at a run's last step, of "
        "the facts that were right at step 0, just after the edit."
    )
    if len(cells) > 1 and seeds[-1] > 1:
        out.append(
            f"A cell counts only where its interval leaves out zero and the false-discovery rate over all {len(cells)} "
            "cells is below 5 %."
        )
    if broken := _not_finite(cells):
        out.append(
            f"{broken} {'run has' if broken == 1 else 'runs have'} readings that are not finite (training diverged, as "
            "a rule). Facts without a reading count as neither kept nor forgotten."
        )
    if left:
        out.append(f"{left} {'run is' if left == 1 else 'runs are'} not complete: this is not yet the whole study.")
    return out


def _not_finite(cells: Sequence[Cell]) -> int:
    """Runs with readings that are not finite."""
    return sum(int(c.rows.loc[c.rows["state"] == "nan_logits", "run_id"].nunique()) for c in cells)
