"""No question of any group asks what was edited, in whatever words, and expects the old answer."""

import json
import re

import pytest

from retention.facts.counterfact import CounterFact
from retention.facts.draw import draw
from retention.facts.jsonl import JsonLines
from retention.facts.knowedit import KnowEdit
from retention.facts.qaedit import QAEdit
from retention.facts.same import Edited
from retention.facts.trex import TRex
from retention.facts.wikibigedit import WikiBigEdit
from retention.facts.zsre import ZsRE
from retention.types import Edit, Fact, UserError
from tests.facts.test_readers import WIKI

HALL = [
    {"subject": "Larch Hall", "src": src, "answers": ["Erik Sand"], "alt": "Anton Beck", "rephrase": rephrase,
     "loc": "nq question: who was the designer of Larch Hall", "loc_ans": loc}
    for src, rephrase, loc in (
        ("Who was the designer of Larch Hall?", "Who was behind Larch Hall?", "Erik Sand"),
        ("Which person is the architect of Larch Hall?", "Who made Larch Hall?", "A. Singer"),
        ("Who made the Larch Hall?", "By whom is Larch Hall?", "A. Singer"),
    )
]  # fmt: skip
BORN = {"subject": "Alva Brun", "src": "Where was Alva Brun born?", "answers": ["Oslo"], "alt": "Rome"}


def drawn(source, seed=0):
    return draw(source.pool(seed), source, seed, lambda qs: [True] * len(qs), lambda asked: [None] * len(asked))


def asking_the_edited(found):
    """Questions that mention an edit's subject and take its old object for right, but for facts of another relation."""
    plain = lambda text: " ".join(re.findall(r"\w+", text.casefold()))  # noqa: E731
    wrong = []
    for q in found.questions:
        for edit in found.edits:
            fact, old = found.facts[q.fact_id], edit.fact.target
            named = fact.relation and edit.fact.relation and "locality" not in fact.tags
            other = named and fact.relation != edit.fact.relation
            mine = f" {plain(edit.fact.subject)} " in f" {plain(q.text)} "
            if mine and q.group != "edited" and plain(q.answer) == plain(old) and not other:
                wrong.append(q)
    return wrong


def know(subject, prompt, old, new, near):
    return {
        "subject": subject, "prompt": prompt, "ground_truth": [old], "target_new": new, "rephrase_prompt": prompt,
        "locality": {"Relation_Specificity": [{"prompt": p, "ground_truth": a} for p, a in near]},
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_zsre(write, seed):
    source = ZsRE(path=write(json.dumps([*HALL, BORN]), "zsre.json"), edited=1, intrinsic=1, intrinsic_relations="any")
    found = drawn(source, seed)
    assert not asking_the_edited(found)
    assert not [q for q in found.questions if q.group == "same_subject"]
    if found.edits[0].fact.subject == "Larch Hall":
        assert found.dropped["same_subject: asks an edited fact in other words"] == 2
        if found.edits[0].fact.id == "zsre-0":
            assert found.dropped["neighbor: asks an edited fact in other words"] == 1


def test_real_zsre(real):
    real("zsre/zsre_3k.json")
    left = 0
    for seed in range(3):
        found = drawn(ZsRE(edited=50, intrinsic=1, control=0, intrinsic_relations="any"), seed)
        assert not asking_the_edited(found)
        left += found.dropped["same_subject: asks an edited fact in other words"]
    assert left > 30


def test_real_counterfact_draws_what_it_drew(real):
    real("counterfact/counterfact_10k.jsonl")
    found = drawn(CounterFact(edited=50, intrinsic=20))
    assert not asking_the_edited(found)
    assert not any("other words" in reason for reason in found.dropped)


def test_knowedit(write):
    records = [
        know("Tessa Varn", "The country of Tessa Varn is", "Norway", "Chile",
             [("Tessa Varn is a citizen of", "norway"), ("The country of Tessa Varn is", "Norwegen"),
              ("The gender of Tessa Varn is", "female")]),
        know("Bo Ek", "The city of Bo Ek is", "Oslo", "Rome", [("The mother of Tessa Varn comes from", "Norway")]),
        know("Cy Lund", "The job of Cy Lund is", "baker", "pilot", [("The sky is", "blue")]),
    ]  # fmt: skip
    for seed in range(4):
        found = drawn(KnowEdit(path=write(records), edited=1, intrinsic=1), seed)
        assert not asking_the_edited(found)
        if found.edits[0].fact.subject == "Tessa Varn":
            near = [q.text for q in found.questions if q.group == "neighbor"]
            assert near == ["The gender of Tessa Varn is"]
            assert found.dropped["neighbor: asks an edited fact in other words"] == 2
            assert {q.text for q in found.questions if q.group == "intrinsic"} == {"The sky is"}


EMMA = {"prompt": "who wrote Emma", "subject": "Emma", "target": "Bo", "rephrase": "By whom is Emma?"}
FAUST = {"prompt": "who wrote Faust", "subject": "Faust", "target": "Cy"}
BLUE = {"loc": "what is blue", "loc_ans": "sky"}


@pytest.mark.parametrize(
    ("source", "records"),
    [
        (
            QAEdit,
            [
                EMMA | {"locality": [{"loc": "Who wrote the Emma?", "loc_ans": "Jane"}]},
                FAUST | {"locality": [BLUE, {"loc": "by whom is Emma", "loc_ans": "Jane"}]},
            ],
        ),
        (
            WikiBigEdit,
            [
                WIKI | {"loc": "where does Ann Lee live", "loc_ans": "Oslo"},
                WIKI | BLUE | {"subject": "Zed", "update": "Where does Zed live?", "rephrase": "Where is Zed?"},
            ],
        ),
    ],
)
def test_an_injection_is_not_asked_for_what_was_true(write, source, records):
    """These data name no old object: a question in the edit's words expects it all the same."""
    facts = source(path=write(records), edited=1, intrinsic=1)
    found = next(d for d in (drawn(facts, seed) for seed in range(9)) if d.edits[0].target in ("Bo", "Rome"))
    assert found.edits[0].fact.subject in ("Emma", "Ann Lee", "Zed")
    if found.edits[0].fact.subject != "Zed":
        assert {q.text for q in found.questions if q.group in ("neighbor", "intrinsic")} == {"what is blue"}


def fact(subject, relation, prompt, target, **more):
    return Fact(
        id=f"{subject} {prompt} {target}", subject=subject, relation=relation, prompt=prompt, target=target, **more
    )


def test_what_is_the_same_fact():
    edited = fact("Ann", "born", "{} was born in", "Oslo", paraphrases=("{} comes from",))
    has = Edited([Edit(fact=edited, target="Rome", prompts=(edited.prompt,))]).has
    assert has(fact("Ann", "born", "The birthplace of {} is", "Bergen"))  # one relation
    assert has(fact("ann", None, "Where is {} from?", "OSLO"))  # no relation is named, and the objects agree
    assert has(fact("Ann", None, "{} comes from", "Bergen"))  # a rephrasing
    assert has(fact("where is Ann from", "locality", "{}", "Oslo", tags=frozenset({"locality"})))
    assert not has(fact("Ann", "lives", "{} lives in", "Oslo"))  # another relation, named
    assert not has(fact("Ann", None, "{} plays the", "flute"))
    assert not has(fact("Bob", "born", "{} was born in", "Oslo"))
    assert not has(fact("where is Anna from", "locality", "{}", "Oslo", tags=frozenset({"locality"})))
    assert has(fact("Ann", "lives", "{} was born in", "Bergen"))  # whatever it is called, it is asked in these words


def test_nothing_left_to_know_names_the_filter(write):
    zsre = write(json.dumps([*HALL, BORN]), "zsre.json")
    with pytest.raises(UserError, match=r"none of the . candidates is asked in the words of.*intrinsic_relations: any"):
        drawn(ZsRE(path=zsre, edited=1, intrinsic=1))
    record = {"subject": "Ann", "relation": "born", "object": "Oslo", "target_new": "Rome", "prompt": "{} was born in"}
    with pytest.raises(UserError, match=r"of the 1 facts .* none has another subject"):
        drawn(JsonLines(path=write([record]), edited=1, intrinsic=1))
    with pytest.raises(UserError, match="none of the 1 candidates has the relation of"):
        drawn(JsonLines(path=write([record, record | {"subject": "Bo", "relation": "died"}]), edited=1, intrinsic=1))


def test_trex(real):
    real("trex_pararel")
    found = drawn(TRex(edited=30, intrinsic=20))
    assert not asking_the_edited(found)
