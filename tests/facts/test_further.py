"""Late facts, two-hop, reversed, prefixed and specificity questions: what is asked, with which answer and foil."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from retention.facts import draw as draws
from retention.facts.counterfact import CounterFact
from retention.facts.draw import draw
from retention.facts.jsonl import JsonLines
from retention.facts.trex import TRex
from retention.facts.verbalised import Verbalised
from retention.facts.world import WorldFacts
from retention.facts.zsre import ZsRE
from retention.types import UserError
from retention.world import WorldModel, build, phrases
from retention.world.generate import words

WORLD = WorldModel()
PLAIN = {"edited": 20, "control": 5, "intrinsic": 30}
ALL = {"late": 10, "prefixed": 2, "specificity": True, "two_hop": True, "reversed": True}


def first_rival(asked: Any) -> list[str | None]:
    return [next((o for o in objects if o != question.answer), None) for question, objects in asked]


def drawn(facts: Any, seed: int = 0, pool: Any = None) -> draws.Draw:
    pool = pool or (facts.pool(WORLD, seed) if isinstance(facts, WorldFacts) else facts.pool(seed))
    return draw(pool, facts, seed, lambda asked: [True] * len(asked), first_rival)


def of(found: draws.Draw, group: str, form: str = "direct") -> list[Any]:
    return [q for q in found.questions if (q.group, q.form) == (group, form)]


def test_what_was_asked_before_is_asked_as_before():
    plain = drawn(WorldFacts(**PLAIN))
    more = drawn(WorldFacts(**PLAIN, **ALL | {"late": 0}))
    kept = [q for q in more.questions if q.group not in ("two_hop", "reversed")]
    assert tuple(q for q in kept if q.form not in ("prefixed", "specificity")) == plain.questions
    assert more.edits == plain.edits
    assert plain.late == ()
    late = drawn(WorldFacts(**PLAIN, late=10))
    assert late.edits == plain.edits
    assert of(late, "control") == of(plain, "control")


def test_late_facts_are_drawn_and_asked_as_edited_ones():
    facts = WorldFacts(**PLAIN, late=10, paraphrases=1, prefixed=1)
    found = drawn(facts)
    assert len(found.late) == 10
    assert drawn(facts).late == found.late
    candidates = {e.fact.id: e for e in facts.pool(WORLD, 0).edits}
    assert all(candidates[e.fact.id] == e for e in found.late)
    asked = {q.fact_id: q for q in of(found, "late")}
    for e in found.late:
        assert (asked[e.fact.id].answer, asked[e.fact.id].foil) == (e.target, e.fact.target)
        assert asked[e.fact.id].text == e.fact.text()
    assert len(of(found, "late", "paraphrase")) == len(of(found, "late", "prefixed")) == 10
    subjects = {e.fact.subject for e in found.late}
    assert len(subjects) == 10
    others = {found.facts[q.fact_id].subject for q in found.questions if q.group != "late"}
    assert not subjects & others
    with pytest.raises(UserError, match=r"edited \(20\) \+ control \(5\) \+ late \(60\) .* the source has 80\."):
        drawn(WorldFacts(**PLAIN, late=60))


def test_the_consequence_of_an_edit_follows_from_its_new_object():
    made = build(WORLD)
    seat = {f.subject: f.target for f in made.facts if f.relation == "headquarters"}
    employer = {f.subject: f.target for f in made.facts if f.relation == "employer"}
    found = drawn(WorldFacts(edited=40, intrinsic=30, relations=("employer",), two_hop=True))
    assert {e.fact.relation for e in found.edits} == {"employer"}
    asked = of(found, "two_hop")
    new = {e.fact.id: e for e in found.edits}
    edited = {q.edit_of: q for q in asked if q.edit_of}
    same = {e.fact.id for e in found.edits if seat[e.target] == seat[e.fact.target]}
    assert edited.keys() == new.keys() - same
    reason = "two_hop: the same follows from an edit's new object as from the old one"
    assert found.dropped.get(reason, 0) == len(same)
    for key, q in edited.items():
        assert (q.answer, q.foil) == (seat[new[key].target], seat[employer[new[key].fact.subject]])
        assert new[key].fact.subject in q.text
    kept = [q for q in asked if not q.edit_of]
    assert [found.facts[q.fact_id].subject for q in kept] == [
        found.facts[q.fact_id].subject for q in of(found, "intrinsic")
    ]
    for q in kept:
        assert q.answer == seat[employer[found.facts[q.fact_id].subject]]
        assert q.foil in made.objects["headquarters"]
        assert q.foil != q.answer


def test_two_hop_counts_what_has_no_consequence_and_refuses_if_nothing_has():
    found = drawn(WorldFacts(**PLAIN, two_hop=True))
    employers = sum(e.fact.relation == "employer" for e in found.edits)
    assert found.dropped["two_hop: nothing is known to follow from an edited fact"] == 20 - employers
    with pytest.raises(UserError, match=r"facts\.two_hop: of no .* `relations: \[employer\]`"):
        drawn(WorldFacts(**PLAIN, two_hop=True, relations=("pet",)))


def test_an_injected_employer_has_a_consequence_without_a_foil():
    found = drawn(WorldFacts(kind="injection", share=1, edited=1, intrinsic=5, relations=("employer",), two_hop=True))
    (edit,) = found.edits
    (q,) = [q for q in of(found, "two_hop") if q.edit_of]
    assert edit.fact.target == ""
    seat = {f.subject: f.target for f in build(WORLD).facts if f.relation == "headquarters"}
    assert q.answer == seat[edit.target]


def test_reversed_questions_give_the_object_and_ask_for_the_subject():
    found = drawn(WorldFacts(edited=75, intrinsic=30, reversed=True))  # so many that a wrong foil would turn up
    new = {e.fact.id: e for e in found.edits}
    asked = of(found, "reversed")
    assert len(asked) == 75 + 30
    holders: dict[tuple[str, str], set[str]] = {}
    for fact in build(WORLD).facts:
        if fact.exposures:
            holders.setdefault((fact.relation, fact.target), set()).add(fact.subject)
    for q in asked:
        turned = found.facts[q.fact_id]
        fact = new[q.edit_of].fact if q.edit_of else found.facts[q.fact_id.removesuffix("-reversed")]
        given = new[q.edit_of].target if q.edit_of else fact.target
        assert q.text == phrases.REVERSED[fact.relation].replace("{}", given)
        assert q.answer == turned.target == fact.subject
        assert q.foil not in holders[fact.relation, given] | holders[fact.relation, fact.target] | {fact.subject}
        assert any(q.foil in of for (relation, _), of in holders.items() if relation == fact.relation)
        assert q.foil not in {e.fact.subject for e in found.edits}
        assert ("unique" in turned.tags) == (not holders[fact.relation, given] - {fact.subject})
    assert len({q.foil for q in asked}) > 20


def test_every_word_of_a_reversed_phrasing_is_known_to_the_model():
    known = set(build(WORLD).vocabulary)
    assert set(phrases.REVERSED) == set(phrases.PERSON_RELATIONS) | set(phrases.PLACE_RELATIONS)
    assert all(set(words(text.replace("{}", " "))) <= known for text in phrases.REVERSED.values())


def test_prefixes_mention_neither_subject_nor_objects():
    facts = WorldFacts(**PLAIN, late=5, prefixed=3)
    found = drawn(facts)
    pool = facts.pool(WORLD, 0)
    statements = {f"{f.text()} {f.target} .": f for f in pool.facts}
    apart = {found.facts[q.fact_id].subject for q in found.questions if q.group in ("edited", "control", "late")}
    for group in ("edited", "control", "late", "intrinsic"):
        direct = {q.fact_id: q for q in of(found, group)}
        asked = of(found, group, "prefixed")
        assert len(asked) == 3 * len(direct)
        for q in asked:
            plain = direct[q.fact_id]
            assert (q.answer, q.foil) == (plain.answer, plain.foil)
            prefix = q.text.removesuffix(" " + plain.text)
            assert prefix != q.text
            assert statements[prefix].subject not in apart
            for name in (found.facts[q.fact_id].subject, q.answer, q.foil):
                assert not re.search(rf"\b{re.escape(name)}\b", prefix)
    assert len({q.text.split(" . ")[0] for q in of(found, "intrinsic", "prefixed")}) > 30


def test_prefixes_that_cannot_be_had_are_counted(write):
    records = [
        {"subject": s, "relation": "r", "prompt": "{} lives in", "object": o, "target_new": n}
        for s, o, n in (("Anna", "Rome", "Oslo"), ("Berta", "Rome", "Oslo"), ("Carl", "Bern", "Oslo"))
    ]
    facts = JsonLines(path=write(records), edited=1, intrinsic=2, prefixed=1, neighbors=0, same_subject=0)
    found = drawn(facts)
    reason = "prefixed: too few statements mention neither subject, answer nor foil"
    asked = {q.fact_id for q in found.questions if q.form == "prefixed"}
    assert found.dropped[reason] == 3 - len(asked) > 0


def test_specificity_asks_the_same_question_against_the_new_object():
    found = drawn(WorldFacts(**PLAIN, specificity=True))
    new = {e.fact.id: e.target for e in found.edits}
    plain = {(q.text, q.answer, q.edit_of) for q in of(found, "same_subject")}
    asked = of(found, "same_subject", "specificity")
    assert {(q.text, q.answer, q.edit_of) for q in asked} == plain
    assert all(q.foil == new[q.edit_of] != q.answer for q in asked)
    with pytest.raises(ValidationError, match="specificity: asks the same_subject questions once more"):
        WorldFacts(specificity=True, same_subject=0)


def test_specificity_is_not_asked_where_the_new_object_is_right(write):
    records = [
        {"subject": "Anna", "relation": "born", "prompt": "{} was born in", "object": "Rome", "target_new": "Oslo"},
        {"subject": "Anna", "relation": "lives", "prompt": "{} lives in", "object": "Oslo"},
        {"subject": "Berta", "relation": "born", "prompt": "{} was born in", "object": "Bern"},
    ]
    found = drawn(JsonLines(path=write(records), edited=1, intrinsic=1, specificity=True))
    assert len(of(found, "same_subject")) == 1
    assert of(found, "same_subject", "specificity") == []


LINES = [
    {
        "subject": "Anna", "relation": "works", "prompt": "{} works for", "object": "Fiat", "target_new": "BMW",
        "two_hop": {
            "relation": "seat", "prompt": "The employer of Anna sits in", "object": "Turin", "object_new": "Munich",
        },
        "reversed": "{} employs",
    },
    {
        "subject": "Berta", "relation": "works", "prompt": "{} works for", "object": "Volvo",
        "two_hop": {"relation": "seat", "prompt": "The employer of {} sits in", "object": "Gothenburg"},
    },
]  # fmt: skip


def test_a_file_of_ones_own_may_say_what_follows_and_how_to_ask_back(write):
    facts = JsonLines(path=write(LINES), edited=1, intrinsic=1, two_hop=True, reversed=True)
    found = drawn(facts)
    edited, kept = of(found, "two_hop")
    assert (edited.text, edited.answer, edited.foil) == ("The employer of Anna sits in", "Munich", "Turin")
    assert edited.edit_of == found.edits[0].fact.id
    assert (kept.text, kept.answer, kept.edit_of) == ("The employer of Berta sits in", "Gothenburg", None)
    assert kept.foil in ("Turin", "Munich")
    (turned,) = of(found, "reversed")
    assert (turned.text, turned.answer, turned.foil) == ("BMW employs", "Anna", "Berta")
    assert found.facts[turned.fact_id].tags == {"unique"}
    assert found.dropped["reversed: no phrasing of the relation ends in the subject"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reversed": "employs"}, r"line 1: reversed must have exactly one \{\} for the object, not 0"),
        ({"two_hop": "Turin"}, "line 1: 'two_hop' must be an object, not a text"),
        ({"two_hop": {"relation": "seat", "promt": "x", "object": "y"}}, "two_hop: unknown key 'promt'.*'prompt'"),
        ({"target_new": None}, "two_hop: 'object_new' says what follows from `target_new`"),
    ],
)
def test_mistakes_in_such_a_file_are_told(write, change, message):
    with pytest.raises(UserError, match=message):
        JsonLines(path=write([LINES[0] | change])).pool(0)


@pytest.mark.parametrize("source", [CounterFact, ZsRE])
@pytest.mark.parametrize("setting", ["two_hop", "reversed"])
def test_sources_without_hops_or_reversals_say_so(source, setting):
    with pytest.raises(ValidationError, match=rf"{setting}: (CounterFact|zsRE) .*jsonl with the key `{setting}`"):
        source(**{setting: True})


@pytest.mark.parametrize("source", [TRex, Verbalised])
def test_trex_knows_reversals_but_no_hops(source):
    assert source(reversed=True).reversed
    with pytest.raises(ValidationError, match=r"two_hop: .* world does"):
        source(two_hop=True)


def test_reversals_of_trex_end_in_the_subject(real):
    facts = TRex(path=str(real("trex_pararel")), relations=["P36"])
    pool = facts.pool(0)
    capitals = {pool.reversals[f.id] for f in pool.facts if f.relation == "P36"}
    assert capitals == {"{} is the capital of"}  # of its six patterns this is the first that ends in [X]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relations": ["employr"]}, r"people have no relation 'employr' \(did you mean 'employer'\?\)"),
        ({"relations": []}, "name at least one of birthplace"),
        ({"late": -1}, "late"),
        ({"prefixed": -1}, "prefixed"),
        ({"two_hop": "maybe"}, "two_hop"),
        ({"reverse": True}, "reverse"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        WorldFacts(**settings)
