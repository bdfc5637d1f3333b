"""Further questions about facts that are drawn already: what follows from them, their reversal, distracting prefixes.

Knows neither how facts are drawn nor the model. Two-hop: is the consequence of an edit answered by what follows from
the new object (ripple effects, Cohen et al. 2023, arXiv:2307.12976)? Reversed: does "A is B" tell "B is A" (Berglund et
al. 2023, arXiv:2309.12288)? The prefix is a statement of another fact, where EVOKE (arXiv:2410.07819) has its own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from retention.facts.questions import Asked
from retention.texts import closed, join, mentions
from retention.types import Edit, Fact, FactPool, UserError

Drop = Callable[[str], None]


def two_hop(pool: FactPool, edits: Sequence[Edit], intrinsic: Sequence[Fact], drop: Drop) -> list[Asked]:
    """Group two_hop: what follows from each fact. Of an edit (`edit_of`) from its new object, with what follows from
    the old one as the foil; of an intrinsic fact from its object, with no foil given.

    What cannot be asked is counted. Raises UserError if nothing can.
    """
    found: list[Asked] = []
    for edit in edits:
        hop = pool.hops.get(edit.fact.id)
        if hop is None:
            drop("two_hop: nothing is known to follow from an edited fact")
            continue
        answer, foil = hop.through.get(edit.target), hop.through.get(edit.fact.target)
        if answer is None:
            drop("two_hop: nothing is known to follow from an edit's new object")
        elif answer == foil:
            drop("two_hop: the same follows from an edit's new object as from the old one")
        else:
            found.append(Asked(fact=hop.fact, group="two_hop", answer=answer, foil=foil, edit_of=edit.fact.id))
    for fact in intrinsic:
        hop = pool.hops.get(fact.id)
        answer = None if hop is None else hop.through.get(fact.target)
        if hop is None or answer is None:
            drop("two_hop: nothing is known to follow from an intrinsic fact")
        else:
            found.append(Asked(fact=hop.fact, group="two_hop", answer=answer))
    if not found:
        raise UserError(
            "facts.two_hop: of no edited or intrinsic fact that was drawn is it known what follows from it. Leave "
            "facts.two_hop out, draw more facts, or draw from relations that have consequences (facts: world: "
            "`relations: [employer]`; facts: jsonl: the key `two_hop`)"
        )
    return found


def turned_round(
    pool: FactPool,
    edits: Sequence[Edit],
    intrinsic: Sequence[Fact],
    apart: Collection[str],
    seed: int,
    drop: Drop,
) -> list[Asked]:
    """Group reversed: the object is given and the subject asked for; of an edit (`edit_of`) by its new object.

    The foil is another subject of the relation, of which neither the old nor the new object is true, and none of the
    subjects `apart`, of which something else is to become true. Where no other fact of the pool has the relation and
    the object, the fact asked for is tagged `unique`; elsewhere there are other right answers, and only the comparison
    with the foil means something. What cannot be asked is counted. Raises UserError if nothing can.
    """
    holders: dict[tuple[str, str], set[str]] = defaultdict(set)
    subjects: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in pool.facts:
        holders[fact.kind, fact.target].add(fact.subject)
        if fact.subject not in apart:
            subjects[fact.kind][fact.subject] = None

    def ask(fact: Fact, given: str, edit_of: str | None) -> Asked | None:
        phrasing = pool.reversals.get(fact.id)
        if phrasing is None:
            drop("reversed: no phrasing of the relation ends in the subject")
            return None
        right = {fact.subject} | holders[fact.kind, fact.target] | holders[fact.kind, given]
        others = [s for s in subjects[fact.kind] if s not in right]
        foil = random.Random(f"reversed {seed} {fact.id}").choice(others) if others else None
        alone = not holders[fact.kind, given] - {fact.subject}
        turned = Fact(
            id=f"{fact.id}-reversed",
            subject=given,
            relation=f"{fact.kind} (reversed)",
            prompt=phrasing,
            target=fact.subject,
            tags=frozenset({"unique"} if alone else ()),
        )
        return Asked(fact=turned, group="reversed", answer=fact.subject, foil=foil, edit_of=edit_of)

    found = [ask(e.fact, e.target, e.fact.id) for e in edits] + [ask(f, f.target, None) for f in intrinsic]
    asked = [a for a in found if a is not None]
    if not asked:
        raise UserError(
            "facts.reversed: no edited or intrinsic fact that was drawn has a phrasing that ends in its subject. Leave "
            "facts.reversed out, draw from other relations, or give phrasings (facts: jsonl: the key `reversed`)"
        )
    return asked


def specificity(asked: Sequence[Asked], edits: Sequence[Edit]) -> list[Asked]:
    """The same_subject questions once more, as form specificity: the edit's new object is the foil.

    Whether an edited model answers it to whatever is asked of the subject is EVOKE's subject specificity (relation
    specificity is what the neighbors ask). Not where the new object is the right answer.
    """
    new = {e.fact.id: e.target for e in edits}
    return [
        replace(a, form="specificity", foil=new[a.edit_of])
        for a in asked
        if a.group == "same_subject" and a.edit_of is not None and new[a.edit_of] != a.answer
    ]


def prefixes(
    pool: FactPool, number: int, apart: Collection[str], seed: int, drop: Drop
) -> Callable[[Asked], Sequence[str]]:
    """For a fact, `number` statements of other facts that mention neither its subject nor an old or new object.

    apart: subjects of which no statement is taken, because what is said of them is to change.
    """
    order = [fact for fact in pool.facts if fact.subject not in apart] if number else []
    random.Random(f"prefixed {seed}").shuffle(order)

    def of(asked: Asked) -> Sequence[str]:
        found: list[str] = []
        if not order:
            return found
        texts = {t.lower() for t in (asked.fact.subject, asked.fact.target, asked.answer, asked.foil) if t}
        start = random.Random(f"prefixed {seed} {asked.fact.id}").randrange(len(order))
        for fact in (*order[start:], *order[:start]):
            statement = closed(join(fact.text(), fact.target, fact.joint), pool.end)
            if statement not in found and not any(mentions(statement.lower(), text) for text in texts):
                found.append(statement)
                if len(found) == number:
                    return found
        drop("prefixed: too few statements mention neither subject, answer nor foil")
        return found

    return of
