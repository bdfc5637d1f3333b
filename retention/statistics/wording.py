"""Estimates, p-values and verdicts as people read them, in tables and reports alike. Knows no table.

A word of direction (lower, higher) is used only where the 95 % interval excludes zero and the false-discovery rate over
all comparisons of its table is below LEVEL. "Within" is the claim of no difference that matters, by two one-sided
tests at the same rate; a large p is never taken for it. Everything else is "cannot tell". Of a single seed a verdict
is about the facts of its run, and says that other seeds were not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import false_discovery_control

from retention.statistics.equivalence import BOUND
from retention.statistics.intervals import Estimate

LEVEL = 0.05  # of the false-discovery rate, of either claim
LOWER, HIGHER, WITHIN, UNSURE, NONE = "lower", "higher", "within", "cannot tell", "none"
ONE_SEED = "one seed only: other seeds and draws were not measured"

IMPOSSIBLE = "no comparison possible"
SELECTION = (
    "Intrinsic facts are selected by the criterion that is read later and start just above it; edits are not. "
    "With no true difference, this alone makes the unmatched difference +0.05 to +0.12."
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one comparison can say."""

    word: str  # LOWER, HIGHER, WITHIN, UNSURE or NONE
    estimate: Estimate | None
    q: float | None  # of a direction
    q_within: float | None  # of no difference that matters
    seeds: int
    why: str  # why there is no estimate

    @property
    def short(self) -> str:
        """The word for a cell of a table."""
        if self.word == NONE:
            return self.why
        word = f"within ±{BOUND:.2f}" if self.word == WITHIN else self.word
        return f"{word} (one seed)" if self.seeds < 2 else word


def verdict(
    estimate: Estimate | None, q: float | None, q_within: float | None, *, seeds: int, why: str = "not measured"
) -> Verdict:
    """What an estimate with its corrected p can say."""
    word = UNSURE
    if estimate is None:
        word = NONE
    elif q is not None and q < LEVEL and not estimate.low <= 0 <= estimate.high:
        word = LOWER if estimate.value < 0 else HIGHER
    elif q_within is not None and q_within < LEVEL:
        word = WITHIN
    return Verdict(word=word, estimate=estimate, q=q, q_within=q_within, seeds=seeds, why=why)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One comparison of a table, before the correction for how many there are."""

    estimate: Estimate | None
    p: float | None
    seeds: int
    why: str = "not measured"

    @property
    def p_within(self) -> float | None:
        """Of no difference that matters."""
        return self.estimate.p_within if self.estimate else None


def verdicts(found: Sequence[Compared]) -> list[Verdict]:
    """What each comparison of one table can say. Those of one seed are a family of tests of their own."""
    out: dict[int, Verdict] = {}
    for single in (False, True):
        own = [(i, c) for i, c in enumerate(found) if (c.seeds < 2) == single]
        qs = adjusted([c.p for _, c in own])
        within = adjusted([c.p_within for _, c in own])
        for (i, c), q, w in zip(own, qs, within, strict=True):
            out[i] = verdict(c.estimate, q, w, seeds=c.seeds, why=c.why)
    return [out[i] for i in range(len(found))]


def where(count: int, n: int) -> str:
    """In how many of n cells."""
    return "here" if n == 1 else f"in all {n} cells" if count == n else f"in {count} of {n} cells"


def span(numbers: Sequence[int]) -> str:
    """A range of counts: "6", or "6 to 8"."""
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def size(found: Iterable[Verdict], word: str) -> str:
    """The estimates of one verdict: of one comparison with its interval, of several their range."""
    own = [v.estimate for v in found if v.word == word and v.estimate is not None]
    if len(own) == 1:
        return told(own[0], "", signed=True, n=False)
    return f"{min(e.value for e in own):+.2f} to {max(e.value for e in own):+.2f}"


def tally(found: Sequence[Verdict], what: str, *, seeds: bool = True) -> str:
    """One sentence of what a table's comparisons say: "Retention is lower in 2 of 3 cells (-0.30 to -0.20); ..."

    what: the subject of the sentence. Cells without a comparison are counted with their reason. seeds: add what must be
    said of cells with one seed.
    """
    n, parts = len(found), []
    for word in (LOWER, HIGHER):
        if count := sum(v.word == word for v in found):
            parts.append(f"{word} {where(count, n)} ({size(found, word)})")
    if count := sum(v.word == WITHIN for v in found):
        parts.append(f"within ±{BOUND:.2f} of equal {where(count, n)}")
    text = f"{what} is {' and '.join(parts)}" if parts else ""
    rest = []
    if count := sum(v.word == UNSURE for v in found):
        unsure = [v for v in found if v.word == UNSURE]
        ends = "" if parts else f" ({size(unsure, UNSURE)})"
        rest.append(f"{where(count, n)} these data cannot tell{ends}")
    if count := sum(v.word == NONE for v in found):
        reasons = ", ".join(dict.fromkeys(v.why for v in found if v.word == NONE))
        rest.append(f"{where(count, n)} there is no comparison: {reasons}")
    if not parts:
        text = f"{what}: {rest.pop(0)}"
    text = "; ".join([text, *rest]) + "."
    return f"{text} {note_of_one_seed(found)}".rstrip() if seeds else text


def matched(found: Sequence[Verdict], on: str = "lead") -> str:
    """Edited against intrinsic facts on equal terms, in one sentence. on: what facts are matched on."""
    if all(v.word == NONE for v in found):
        reasons = ", ".join(dict.fromkeys(v.why.removeprefix(f"{IMPOSSIBLE}: ") for v in found))
        return f"Edited and intrinsic facts cannot be compared on equal terms: {reasons}."
    return tally(found, f"Matched on the {on} at step 0, retention of edited facts against intrinsic ones")


def unmatched(found: Sequence[Verdict], after: Sequence[Verdict] = ()) -> str:
    """Edited against intrinsic facts as they are, and what is wrong with that.

    after: what `matched` said before; where it said that there is one seed, that is not repeated.
    """
    said = bool(note_of_one_seed(after))
    return f"{tally(found, 'Unmatched, retention of edited facts', seeds=not said)} {SELECTION}"


def note_of_one_seed(found: Sequence[Verdict]) -> str:
    """What must be said where cells have one seed; empty where there are none."""
    single = [v for v in found if v.seeds < 2 and v.word != NONE]
    if not single:
        return ""
    if len(single) == len(found):
        return f"Intervals are over facts, of {ONE_SEED}."
    return f"{len(single)} of these cells {'has' if len(single) == 1 else 'have'} {ONE_SEED}."


def named(found: Sequence[tuple[str, Verdict]], what: str) -> str:
    """One sentence of what each named arm does: "Retention of edited facts: higher with freeze (+0.30 [...])...".

    An arm that was compared in several contexts is named once for each verdict, with the range of its differences.
    """
    times = {name: sum(other == name for other, _ in found) for name, _ in found}
    parts = []
    for word in (HIGHER, LOWER, WITHIN):
        arms: dict[str, list[Verdict]] = {}
        for name, v in found:
            if v.word == word:
                arms.setdefault(name, []).append(v)
        if arms:
            order = sorted(arms, key=lambda name: -max(abs(v.estimate.value) for v in arms[name] if v.estimate))
            texts = [
                f"{name} ({size(arms[name], word)}{f'; {len(arms[name])} of {times[name]}' if times[name] > 1 else ''})"
                for name in order
            ]
            parts.append(f"{f'within ±{BOUND:.2f}' if word == WITHIN else word} with {', '.join(texts)}")
    rest = sum(v.word in (UNSURE, NONE) for _, v in found)
    if rest:
        parts.append(f"{'all' if rest == len(found) else rest} of {len(found)} comparisons cannot tell")
    return f"{what}: {'; '.join(parts)}. {note_of_one_seed([v for _, v in found])}".rstrip()


def told(estimate: Estimate | None, why: str, *, signed: bool = False, n: bool = True) -> str:
    """An estimate with its interval and n, or why there is none; never NaN."""
    if estimate is None:
        return why
    form = "+z.2f" if signed else "z.2f"  # z: no minus before a zero
    count = f" ({estimate.n})" if n else ""
    if estimate.low != estimate.low:
        return f"{estimate.value:{form}} [one run]{count}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]{count}"


def p_value(p: float | None) -> str:
    """A p-value."""
    if p is None or p != p:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def adjusted(p: Sequence[float | None]) -> list[float | None]:
    """Benjamini and Hochberg's (1995) q of each p that is known; None where it is None or NaN."""
    known = {i: float(x) for i, x in enumerate(p) if x is not None and x == x}
    if not known:
        return [None] * len(p)
    q = dict(zip(known, false_discovery_control(list(known.values()), method="bh"), strict=True))
    return [float(q[i]) if i in q else None for i in range(len(p))]
