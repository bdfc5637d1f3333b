"""Rows that state facts, in the form of the rows that they are put among. Knows nothing of why they are stated."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from retention.data._draw import Row, same
from retention.texts import closed, join
from retention.types import Fact, UserError


@dataclass(frozen=True, kw_only=True)
class Said:
    """A fact with the object that is stated of it, and the phrasings it is stated in."""

    fact: Fact
    answer: str  # without leading space
    phrasings: tuple[str, ...]  # with `{}`; never the fact's paraphrases, which only probes read
    rejected: str | None = None  # the wrong answer, for rows with one; None: another answer of the same relation


def statements(
    said: Sequence[Said], count: int, *, like: Sequence[Row], seed: int, avoid: Collection[str] = ()
) -> list[Row]:
    """`count` rows of the form of `like`: each fact equally often, give or take one, its phrasings in turn.

    The form is the keys of the first row, and the full stop (" ." or ".") if all rows of `like` end with it; plain text
    always ends with one. A "." is that of the statement's own script. Statements whose prompt (text) is in `avoid`, as
    `same` gives it, are passed over. Drawn by seed. Raises UserError if nothing can be stated, or nothing be rejected
    where the rows need it.
    """
    rng = random.Random(f"statements {seed}")
    form, stop = like[0], _full_stop(like)
    stated = [(one, row) for one in said for row in [_rows(one, said, form, stop, rng, avoid)] if row]
    if count and not stated:
        raise UserError("there is no fact to state that is not asked by a held-out row")
    out: list[Row] = []
    turn = 0
    while len(out) < count:
        order = rng.sample(stated, min(len(stated), count - len(out)))
        out += [rows[turn % len(rows)] for _, rows in order]
        turn += 1
    return out


def _rows(
    one: Said, said: Sequence[Said], form: Row, stop: str, rng: random.Random, avoid: Collection[str]
) -> list[Row]:
    """One fact in each of its phrasings, in an order drawn by `rng`."""
    rows = []
    rejected = (one.rejected or _other_answer(one, said, rng)) if "rejected" in form else ""
    for phrasing in rng.sample(one.phrasings, len(one.phrasings)):
        prompt = one.fact.text(phrasing)
        if "text" in form:
            row = {"text": closed(join(prompt, one.answer, one.fact.joint), stop)}
        else:
            row = {"prompt": prompt, "completion": closed(one.answer, stop)}
            if "rejected" in form:
                row["rejected"] = closed(rejected, stop)
            if one.fact.joint is not None:
                row["joint"] = one.fact.joint
        if same(row, "prompt") not in avoid:
            rows.append(row)
    return rows


def _other_answer(one: Said, said: Sequence[Said], rng: random.Random) -> str:
    others = sorted({s.answer for s in said if s.fact.kind == one.fact.kind} - {one.answer})
    others = others or sorted({s.answer for s in said} - {one.answer})
    if not others:
        raise UserError(
            f"no wrong answer for {one.fact.text()!r}: all facts to be stated have the answer {one.answer!r}"
        )
    return rng.choice(others)


def _full_stop(like: Sequence[Row]) -> str:
    ends = [(row["text"] if "text" in row else row["completion"]).rstrip() for row in like]
    if all(end.endswith(" .") for end in ends):
        return " ."
    return "." if "text" in like[0] or all(end.endswith(".") for end in ends) else ""
