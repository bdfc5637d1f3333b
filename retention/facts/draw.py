"""Draw a run's facts from a pool, by seed, and with them the questions that every probe is asked.

Edited and control facts are drawn blindly; intrinsic ones must be known to the base model by the criterion that also
counts as success for an edit (direct question, every token of the answer the argmax). Knows no editor and no file
format.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from retention.facts import further
from retention.facts._part import FactsPart
from retention.facts.questions import Asked, question, questions
from retention.facts.same import Edited
from retention.presets import subject_mark
from retention.types import Edit, Fact, FactPool, Question, UserError

Known = Callable[[Sequence[Question]], list[bool]]
BATCH = 64  # edit candidates whose new objects are read at once
PASSED = 4  # candidates that are asked about, at most, for each neighbor that is wanted

T = TypeVar("T")
Rival = Callable[[Sequence[tuple[Question, Sequence[str]]]], list[str | None]]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The facts of one run. `facts` holds every fact that a question asks about, by id."""

    edits: tuple[Edit, ...]
    facts: dict[str, Fact]
    questions: tuple[Question, ...]
    dropped: dict[str, int]  # reason -> how many facts were passed over
    neighbors: dict[str, int] = field(default_factory=dict)  # candidates: asked about, known
    late: tuple[Edit, ...] = ()  # facts with a new object that ordinary training teaches just before the edits


def apart(pool: FactPool, marks: Collection[str]) -> FactPool:
    """The pool without the subjects that a preset was calibrated on (`retention.presets.subject_mark`)."""
    if not marks:
        return pool
    facts = tuple(f for f in pool.facts if subject_mark(f.subject) not in marks)
    edits = tuple(e for e in pool.edits if subject_mark(e.fact.subject) not in marks)
    near = {
        edit: tuple(f for f in found if subject_mark(f.subject) not in marks)
        for edit, found in pool.neighborhood.items()
    }
    out = len({e.fact.subject for e in pool.edits} - {e.fact.subject for e in edits})
    dropped = {**pool.dropped, **({"edit candidate: editors were calibrated on its subject": out} if out else {})}
    return replace(pool, facts=facts, edits=edits, neighborhood=near, dropped=dropped)


def draw(pool: FactPool, want: FactsPart, seed: int, known: Known, rival: Rival) -> Draw:
    """Draw edits, controls, late facts, neighbors, same-subject facts and intrinsic facts, in this order.

    Edits, controls, late, neighbor and intrinsic facts are of disjoint subjects; so are edits, but for groups that the
    source wants drawn together.

    `known` tells for direct questions whether the base model answers them; `rival` gives, for direct questions and the
    objects of their relations, the object that the base model finds most likely besides the answer. Raises UserError
    when the pool has too few facts, or the base model knows none.
    """
    rng = random.Random(f"draw {seed}")
    dropped: dict[str, int] = dict(pool.dropped)

    def drop(reason: str) -> None:
        dropped[reason] = dropped.get(reason, 0) + 1

    edits, controls, late, subjects = _candidates(pool, want, seed, rng, known, drop)
    by_subject: dict[str, list[Fact]] = defaultdict(list)
    by_object: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in pool.facts:
        by_subject[fact.subject].append(fact)
        by_object[fact.kind, fact.target].append(fact)

    asked: list[Asked] = []  # in the order in which the questions are stored
    asked += [Asked(fact=e.fact, group="edited", answer=e.target, foil=e.fact.target or None) for e in edits]
    for e in controls:
        # A control of an injection has no old object: it is asked for the one that was not written.
        answer, foil = (e.fact.target, e.target) if e.fact.target else (e.target, None)
        asked.append(Asked(fact=e.fact, group="control", answer=answer, foil=foil))
    asked += [Asked(fact=e.fact, group="late", answer=e.target, foil=e.fact.target or None) for e in late]

    changed = {e.fact.id for e in (*edits, *controls, *late)}
    taken = set(changed)
    edited = Edited([*edits, *late])

    def other(facts: Iterable[Fact], group: str) -> list[Fact]:
        """Those that are no edited fact in other words, whose old object would count as right."""
        found = []
        for fact in facts:
            if edited.has(fact):
                drop(f"{group}: asks an edited fact in other words")
            else:
                found.append(fact)
        return found

    near: list[list[Fact]] = []
    siblings: list[list[Fact]] = []
    for edit in edits:
        given = [f for f in pool.neighborhood.get(edit.fact.id, ()) if f.subject not in subjects]
        candidates = other(given, "neighbor")
        if not candidates:
            candidates = [f for f in by_object[edit.fact.kind, edit.fact.target] if f.subject not in subjects]
            rng.shuffle(candidates)
        near.append(candidates)
        others = [
            f
            for f in by_subject[edit.fact.subject]
            if f.kind != edit.fact.kind
            and f.id not in changed  # edits drawn together may share a subject
            and not {f.prompt, *f.phrasings} & set(edit.anchors)
        ]
        others = other(others, "same_subject")
        rng.shuffle(others)
        siblings.append(others[: want.same_subject])
    neighbors = _known_neighbors(near, want.neighbors, known, drop)
    for i, edit in enumerate(edits):
        for fact in neighbors.of[i]:
            # The edit's new object is the foil: CounterFact's neighborhood score asks whether it bleeds over.
            foil = edit.target if edit.target != fact.target else None
            asked.append(Asked(fact=fact, group="neighbor", answer=fact.target, foil=foil, edit_of=edit.fact.id))
            taken.add(fact.id)
        for fact in siblings[i]:
            asked.append(Asked(fact=fact, group="same_subject", answer=fact.target, edit_of=edit.fact.id))
            taken.add(fact.id)

    apart = [f for f in pool.facts if f.subject not in subjects and f.id not in taken]
    candidates = _comparable(other(apart, "intrinsic"), pool, want, edits)
    rng.shuffle(candidates)
    if want.stratified:
        candidates = _in_turn(candidates, lambda fact: fact.kind, seed)
    intrinsic = _known_facts(candidates, want.intrinsic, known, drop)
    asked += [Asked(fact=f, group="intrinsic", answer=f.target) for f in intrinsic]

    if want.two_hop:
        asked += further.two_hop(pool, edits, intrinsic, drop)
    if want.reversed:
        asked += further.turned_round(pool, edits, intrinsic, subjects, seed, drop)
    if want.specificity:
        asked += further.specificity(asked, edits)

    # Foils: the strongest rival among the relation's objects, for every fact that has no old or new object as its foil.
    bare = [i for i, a in enumerate(asked) if a.foil is None]
    rivals = rival([(question(asked[i]), pool.objects.get(asked[i].fact.kind, ())) for i in bare])
    for i, foil in zip(bare, rivals, strict=True):
        asked[i] = replace(asked[i], foil=foil)

    def paraphrases(fact: Fact) -> list[str]:
        shuffled = sorted(fact.paraphrases)
        random.Random(f"paraphrases {seed} {fact.id}").shuffle(shuffled)
        return shuffled[: want.paraphrases]

    before = further.prefixes(pool, want.prefixed, subjects, seed, drop)
    return Draw(
        edits=tuple(edits),
        facts={a.fact.id: a.fact for a in asked},
        questions=tuple(questions(asked, paraphrases, before)),
        dropped=dropped,
        neighbors={"asked": neighbors.asked, "known": neighbors.known},
        late=tuple(late),
    )


def _candidates(
    pool: FactPool, want: FactsPart, seed: int, rng: random.Random, known: Known, drop: Callable[[str], None]
) -> tuple[list[Edit], list[Edit], list[Edit], set[str]]:
    """Edits, controls, late facts and their subjects: shuffled candidates, distinct subjects, and what is asked for.

    Edits of one group (`FactPool.together`) are taken whole or not at all, and only they may share a subject.
    """
    groups: dict[str, list[Edit]] = defaultdict(list)
    candidates = list(pool.edits)
    rng.shuffle(candidates)
    if want.stratified:
        candidates = _in_turn(candidates, lambda edit: edit.fact.kind, seed)
    for edit in candidates:
        groups[pool.together.get(edit.fact.id, edit.fact.id)].append(edit)
    waiting = _unknown(list(groups.values()), known, drop) if want.unknown_targets else iter(groups.values())
    parts: list[list[Edit]] = []
    subjects: set[str] = set()
    larger: list[list[Edit]] = []  # groups that did not fit into what was left of an earlier part
    for number in (want.edited, want.control, want.late):
        part: list[Edit] = []
        again, larger = iter(larger), []
        for group in itertools.chain(again, waiting) if number else ():
            if any(edit.fact.subject in subjects for edit in group):
                drop("edit candidate: its subject is already edited or a control")
            elif len(part) + len(group) > number:
                larger.append(group)
            else:
                part += group
                subjects |= {edit.fact.subject for edit in group}
            if len(part) == number:
                break
        larger += again
        parts.append(part)
    chosen = [edit for part in parts for edit in part]
    wanted = want.edited + want.control + want.late
    if len(chosen) < wanted:
        late = f" + late ({want.late})" * (want.late > 0)
        whole = ", and groups of edits that are only drawn whole" if pool.together else ""
        raise UserError(
            f"facts: edited ({want.edited}) + control ({want.control}){late} facts with distinct subjects were asked "
            f"for; the source has {len(chosen)}{whole}. Ask for fewer."
        )
    edits, controls, late_facts = parts
    return edits, controls, late_facts, subjects


def _unknown(groups: list[list[Edit]], known: Known, drop: Callable[[str], None]) -> Iterator[list[Edit]]:
    """The groups of whose edits the base model gives no new object already; read in batches, as far as asked for."""
    for at in range(0, len(groups), BATCH):
        batch = groups[at : at + BATCH]
        asked = [question(Asked(fact=e.fact, group="edited", answer=e.target)) for group in batch for e in group]
        right = iter(known(asked))
        for group in batch:
            given = [next(right) for _ in group]
            if any(given):
                drop("edit candidate: the base model gives its new object already")
            else:
                yield group


def _comparable(facts: list[Fact], pool: FactPool, want: FactsPart, edits: Sequence[Edit]) -> list[Fact]:
    """Those of the facts that compare with the edited ones. Raises UserError naming what leaves none."""
    asked = f"facts: {want.intrinsic} intrinsic facts were asked for;"
    if not facts:
        raise UserError(
            f"{asked} of the {len(pool.facts)} facts that the source has besides injections, none has another subject "
            "than the edited, control and late facts and is asked in no other group. Edit fewer, or use another source"
        )
    if want.intrinsic_relations == "as_edited":
        kinds = {e.fact.kind for e in edits}
        found = [f for f in facts if f.kind in kinds]
        if not found:
            what = "is asked in the words of" if all(e.fact.relation is None for e in edits) else "has the relation of"
            raise UserError(
                f"{asked} none of the {len(facts)} candidates {what} an edited fact, as `facts.intrinsic_relations: "
                "as_edited` wants it. Use `intrinsic_relations: any`, or edit more facts"
            )
        facts = found
    if want.intrinsic_exposures == "as_edited":
        stated = {e.fact.exposures for e in edits}
        # Facts that pretraining never stated (injection) have no equals that the model knows: then all may do.
        if stated & {f.exposures for f in facts}:
            facts = [f for f in facts if f.exposures in stated]
    return facts


def _in_turn(items: list[T], relation: Callable[[T], str], seed: int) -> list[T]:
    """One item of each relation after another, for as long as each has some; relations in an order by the seed."""
    of: dict[str, list[T]] = defaultdict(list)
    for item in items:
        of[relation(item)].append(item)
    order = sorted(of)
    random.Random(f"relations {seed}").shuffle(order)
    rounds = itertools.zip_longest(*(of[name] for name in order))
    return [item for turn in rounds for item in turn if item is not None]


@dataclass(frozen=True, kw_only=True)
class _Neighbors:
    """Known neighbors of each edit, and how many candidates were asked about and known to find them."""

    of: list[list[Fact]]
    asked: int
    known: int


def _known_neighbors(near: list[list[Fact]], number: int, known: Known, drop: Callable[[str], None]) -> _Neighbors:
    """Of each edit's candidates the first `number` that the base model knows, among the first PASSED * number.

    What it does not know before the edit says nothing about what the edit does to it.
    """
    found: list[list[Fact]] = [[] for _ in near]
    asked = right = 0
    for at in range(0, PASSED * number, max(1, number)):
        batch = [(i, f) for i, facts in enumerate(near) if len(found[i]) < number for f in facts[at : at + number]]
        if not batch:
            break
        answers = known([question(Asked(fact=f, group="neighbor", answer=f.target)) for _, f in batch])
        asked, right = asked + len(answers), right + sum(answers)
        for (i, fact), yes in zip(batch, answers, strict=True):
            if not yes:
                drop("neighbor candidate: not known to the base model")
            elif len(found[i]) < number:
                found[i].append(fact)
    return _Neighbors(of=found, asked=asked, known=right)


def _known_facts(candidates: list[Fact], number: int, known: Known, drop: Callable[[str], None]) -> list[Fact]:
    """The first `number` candidates that the base model knows, read in batches until there are enough."""
    found: list[Fact] = []
    at = 0
    while len(found) < number and at < len(candidates):
        batch = candidates[at : at + max(64, number)]
        at += len(batch)
        direct = [question(Asked(fact=f, group="intrinsic", answer=f.target)) for f in batch]
        for fact, right in zip(batch, known(direct), strict=True):
            if len(found) == number:
                break
            if right:
                found.append(fact)
            else:
                drop("intrinsic candidate: not known to the base model")
    if len(found) < number:
        what = "knows none of them" if not found else f"knows only {len(found)}"
        raise UserError(
            f"facts: {number} intrinsic facts were asked for; of {len(candidates)} candidates the base model {what} "
            "(direct question, every token of the answer right). Ask for fewer (facts.intrinsic), another source, "
            "or a model that knows these facts."
        )
    return found
