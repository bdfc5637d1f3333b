"""From facts to the questions that every probe is asked: one function for every group, so that all are asked alike.

Knows neither where facts come from nor how they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from retention.texts import follow
from retention.types import Fact, Question

PARAPHRASED = ("edited", "intrinsic", "control", "late")  # groups that are asked in held-out phrasings too


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A fact to ask for, and what counts as right."""

    fact: Fact
    group: str
    answer: str  # without leading space
    foil: str | None = None  # the rival answer, where one is given
    edit_of: str | None = None  # fact id of the edit that it stands beside, or is a consequence of
    form: str = "direct"  # of the question in the direct phrasing


def question(asked: Asked, form: str | None = None, phrasing: str | None = None, before: str = "") -> Question:
    """The fact put into one phrasing (left out, the direct one), after the sentence `before`, if any."""
    return Question(
        fact_id=asked.fact.id,
        group=asked.group,
        form=asked.form if form is None else form,
        text=follow(before, asked.fact.text(phrasing)) if before else asked.fact.text(phrasing),
        answer=asked.answer,
        foil=asked.foil,
        edit_of=asked.edit_of,
        joint=asked.fact.joint,
    )


def questions(
    asked: Iterable[Asked],
    paraphrases: Callable[[Fact], Sequence[str]],
    prefixes: Callable[[Asked], Sequence[str]] = lambda asked: (),
) -> list[Question]:
    """The direct question of each, then, of the groups that have them, paraphrases and prefixed ones; equal ones once.

    `prefixes` gives whole sentences.
    """
    found: list[Question] = []
    for a in asked:
        found.append(question(a))
        if a.group in PARAPHRASED:
            found += [question(a, "paraphrase", phrasing) for phrasing in paraphrases(a.fact)]
            found += [question(a, "prefixed", before=sentence) for sentence in prefixes(a)]
    return list({q.id: q for q in found}.values())
