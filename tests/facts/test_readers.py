"""MQuAKE, KnowEdit, WikiBigEdit, QAEdit, S2RKE, the CHRONOEDIT-like form and PopQA.

No copy of these data lies here: the records are written by hand after the published schemas.
"""

import json

import pytest
from pydantic import ValidationError

from retention.facts.chronoedit import ChronoEdit
from retention.facts.files import read_pool
from retention.facts.knowedit import KnowEdit
from retention.facts.mquake import MQuAKE
from retention.facts.popqa import PopQA
from retention.facts.qaedit import QAEdit
from retention.facts.s2rke import S2RKE
from retention.facts.wikibigedit import WikiBigEdit
from retention.types import UserError


def rewrite(subject, relation, prompt, old, new, question):
    return {
        "prompt": prompt, "relation_id": relation, "subject": subject, "question": question,
        "target_true": {"str": old, "id": "Q1"}, "target_new": {"str": new, "id": "Q2"},
    }  # fmt: skip


HEAD = rewrite("France", "P35", "The head of state of {} is", "Ann", "Bob", "Who is the head of state of France?")
SEAT = rewrite("Bob", "P19", "{} was born in", "Oslo", "Rome", "Where was Bob born?")
HOPS = [
    {"question": "Who is the head of state of France?", "cloze": "The head of state of France is", "answer": "Ann"},
    {"question": "Who is the spouse of Ann?", "cloze": "Ann is married to", "answer": "Cy", "answer_alias": []},
]
CASE = {
    "case_id": 1,
    "requested_rewrite": [HEAD],
    "questions": ["Who is married to the head of France?", "b?", "c?"],
    "answer": "Cy",
    "answer_alias": ["Cyrus"],
    "new_answer": "Dee",
    "new_answer_alias": [],
    "single_hops": HOPS,
    "new_single_hops": [HOPS[0] | {"answer": "Bob"}, {"question": "q", "cloze": "Bob is married to", "answer": "Dee"}],
    "orig": {
        "triples": [["Q142", "P35", "Q1"], ["Q1", "P26", "Q3"]],
        "triples_labeled": [["France", "head of state", "Ann"], ["Ann", "spouse", "Cy"]],
    },
}


def test_mquake_case(write):
    found = MQuAKE(path=write(json.dumps([CASE]), "MQuAKE-T.json")).pool(0)
    (edit,) = found.edits
    assert (edit.fact.text(), edit.fact.target, edit.target) == ("The head of state of France is", "Ann", "Bob")
    assert edit.fact.paraphrases == ("Who is the head of state of {}?",)
    hop = found.hops[edit.fact.id]
    assert hop.fact.text() == "Who is married to the head of France?"
    assert hop.through == {"Ann": "Cy", "Bob": "Dee"}
    assert [(f.text(), f.target) for f in found.facts if f.id != edit.fact.id] == [("Ann is married to", "Cy")]
    assert not found.together


def test_a_file_of_cases_is_told_from_counterfact(write):
    """Both have `requested_rewrite`: CounterFact's is one object, a case's a list."""
    file = write(json.dumps([CASE]), "of_any_name.json")
    assert read_pool(file) == MQuAKE(path=file).pool(0)
    broken = write(json.dumps([CASE, CASE | {"requested_rewrite": []}]), "broken.json")
    with pytest.raises(UserError, match=r"broken\.json, record 2: 'requested_rewrite' must be a list with an edit"):
        read_pool(broken)


def test_mquake_edits_of_a_case_belong_together(write):
    both = CASE | {"requested_rewrite": [HEAD, SEAT], "case_id": 2}
    found = MQuAKE(path=write([both])).pool(0)
    ids = [e.fact.id for e in found.edits]
    assert len(set(found.together.values())) == 1
    assert set(found.together) == set(ids)
    assert set(found.hops) == {ids[-1]}
    assert found.hops[ids[-1]].through == {"Oslo": "Cy", "Rome": "Dee"}
    assert MQuAKE(path=write([CASE, both]), edits_in_case=2).pool(0).dropped == {"case: has not 2 edits": 1}


def test_mquake_repeated_and_contradicting_cases(write):
    other = CASE | {"requested_rewrite": [HEAD | {"target_new": {"str": "Eve"}}], "new_answer": "Flo"}
    found = MQuAKE(path=write([CASE, CASE | {"case_id": 2}])).pool(0)
    assert len(found.edits) == 1
    assert found.dropped == {"case: its edits are those of another case": 1}
    targets = set()
    for seed in range(8):
        found = MQuAKE(path=write([CASE, other])).pool(seed)
        assert found.dropped == {"case: an edit contradicts another case's": 1}
        targets |= {e.target for e in found.edits}
    assert targets == {"Bob", "Eve"}  # which one stays is drawn


def test_mquake_answer_that_is_an_alias_of_the_old_one(write):
    found = MQuAKE(path=write([CASE | {"new_answer": "CYRUS"}])).pool(0)
    assert not found.hops
    assert "its answer stays the same" in str(found.dropped)


RECENT = {
    "subject": "Ann Lee",
    "prompt": "The name of the position held by Ann Lee is",
    "target_new": "mayor",
    "portability": {"Logical_Generalization": [{"prompt": "x", "ground_truth": [["y"]]}], "Subject_Aliasing": None},
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Ann Lee is", "ground_truth": [["female", "woman"]]}]
    },
}


def test_knowedit_sub_sets(write):
    counterfact = RECENT | {
        "ground_truth": [["poet"]], "rephrase_prompt": "Ann Lee has the position of",
        "portability": {"Reasoning": [{"prompt": "Ann Lee works in the", "ground_truth": "town hall"}]},
    }  # fmt: skip
    bio = {"text": "Ann Lee was a poet.", "labels": "She wrote odes.", "concept": "Ann Lee", "locality": {}}
    found = KnowEdit(path=write(json.dumps([RECENT, counterfact, bio]))).pool(0)
    recent, changed, biography = found.edits
    assert recent.fact.target == ""
    assert "injection" in recent.fact.tags
    assert recent.target == "mayor"
    assert recent.fact.prompt == "The name of the position held by {} is"
    assert (changed.fact.target, changed.fact.paraphrases) == ("poet", ("{} has the position of",))
    assert found.hops[changed.fact.id].through == {"mayor": "town hall"}
    assert (biography.fact.prompt, biography.target) == ("{} was a poet.", "She wrote odes.")
    (near,) = found.neighborhood[recent.fact.id]
    assert (near.text(), near.target, near.relation) == ("The gender of Ann Lee is", "female", "Relation_Specificity")
    assert near in found.facts
    assert recent.fact not in found.facts
    assert changed.fact in found.facts


WIKI = {
    "tag": "new", "subject": "Ann Lee", "update": "Where does Ann Lee live?", "ans": "Rome",
    "rephrase": "In which city does Ann Lee live?", "personas": "Tell me, where does she live?",
    "loc": "Where does Bob live?", "loc_ans": "Oslo", "mhop": None, "mhop_ans": None,
}  # fmt: skip


def test_wikibigedit(write):
    hop = {"mhop": "Which river runs through the city of Ann Lee?", "mhop_ans": "Tiber"}
    path = write([WIKI, WIKI | hop | {"tag": "update"}, WIKI | {"subject": "Zed"}])
    found = WikiBigEdit(path=path).pool(0)
    first, second = found.edits
    assert (first.fact.prompt, first.fact.target, first.target) == ("Where does {} live?", "", "Rome")
    assert first.fact.paraphrases == ("In which city does {} live?",)
    assert first.fact.tags == {"injection", "tag:new"}
    assert found.hops[second.fact.id].through == {"Rome": "Tiber"}
    assert found.dropped == {
        "edit: its subject is not in it": 1,
        "question in another voice: its subject is not in it": 2,
    }
    assert [(f.text(), f.target) for f in found.neighborhood[first.fact.id]] == [("Where does Bob live?", "Oslo")]
    assert len(WikiBigEdit(path=path, tag="update").pool(0).edits) == 1


def test_qaedit(write):
    record = {
        "prompt": "who wrote Emma", "subject": "Emma", "target": "Jane Austen", "rephrase": "Emma is by whom?",
        "locality": [{"loc": "who wrote Faust", "loc_ans": "Goethe"}],
    }  # fmt: skip
    found = QAEdit(path=write([record])).pool(0)
    (edit,) = found.edits
    assert (edit.fact.prompt, edit.target, edit.fact.paraphrases) == (
        "who wrote {}",
        "Jane Austen",
        ("{} is by whom?",),
    )
    assert [f.text() for f in found.facts] == ["who wrote Faust"]


def star(relation, old, new):
    return {
        "requested_rewrite": {"prompt": "{} has " + relation, "relation": f"<{relation}>", "target_true": old,
                              "target_new": new},
        "paraphrase_prompts": [f"Of X one says {relation}"], "neighborhood_prompts": ["Y has"],
    }  # fmt: skip


TOPOLOGY = {
    "subjectID": 7, "subject": {"name": "X"},
    "Star_Topology": [star("size", "small", "big"), star("place", "Oslo", "Rome"), star("age", "old", "new")],
}  # fmt: skip


def test_s2rke(write):
    path = write(json.dumps([TOPOLOGY]))
    found = S2RKE(path=path).pool(0)
    assert [(e.fact.subject, e.fact.relation) for e in found.edits].__len__() == 3
    assert not found.together
    assert {f.relation for f in found.facts} == {"size", "place", "age"}
    assert found.edits[0].fact.paraphrases[0].startswith("Of {} one says")
    pairs = S2RKE(path=path, edits_per_subject=2).pool(0)
    assert len(pairs.edits) == 2
    assert set(pairs.together.values()) == {"7"}
    assert len(pairs.facts) == 3
    assert S2RKE(path=path, edits_per_subject=4).pool(0).edits == ()


CHANGE = {
    "kind": "modification", "time": "2021-03", "subject": "Ann", "relation": "team", "prompt": "{} plays for",
    "target_true": "Ajax", "target_new": "Lyon", "rephrase_prompts": ["The team of Ann is"],
    "locality": [{"prompt": "Ann was born in", "answer": "Oslo"}],
    "multi_hop": {"question": "The city of Ann's team is", "answer_true": "Amsterdam", "answer_new": "Lyon city"},
}  # fmt: skip
NEW = {k: v for k, v in CHANGE.items() if k not in ("target_true", "multi_hop")} | {"kind": "injection", "time": "2023"}


def test_chronoedit(write):
    path = write([CHANGE, NEW])
    found = ChronoEdit(path=path).pool(0)
    change, new = found.edits
    assert (change.fact.target, new.fact.target) == ("Ajax", "")
    assert change.fact.tags == {"modification", "time:2021-03"}
    assert change.fact.paraphrases == ("The team of {} is",)
    assert found.hops[change.fact.id].through == {"Ajax": "Amsterdam", "Lyon": "Lyon city"}
    assert [e.fact.id for e in ChronoEdit(path=path, kind="injection").pool(0).edits] == [new.fact.id]
    assert [e.fact.id for e in ChronoEdit(path=path, since="2022").pool(0).edits] == [new.fact.id]
    with pytest.raises(ValidationError, match="since"):
        ChronoEdit(path=path, since="last year")


def test_popqa(write):
    head = "id\tsubj\tprop\tobj\ts_pop\tquestion\tpossible_answers\n"
    rows = [
        (1, "Ann", "occupation", "poet", 12, "What is Ann's occupation?", '["poet", "bard"]'),
        (2, "Bob", "occupation", "bard", 34.5, "What is Bob's occupation?", '["bard"]'),
        (3, "Cy", "occupation", "judge", 0, "What is Cy's occupation?", '["judge"]'),
        (4, "Dee", "occupation", "judge", 1, "What is Dee's occupation?", '["judge"]'),
        (5, "Dee", "occupation", "poet", 1, "What is Dee's occupation?", '["poet"]'),
    ]
    content = head + "".join("\t".join(json.dumps(c) if '"' not in str(c) else '"' + c.replace('"', '""') + '"'
                                       for c in row) + "\n" for row in rows)  # fmt: skip
    path = write(content, "test.tsv")
    found = PopQA(path=path).pool(0)
    assert {f.subject: f.popularity for f in found.facts} == {"Ann": 12.0, "Bob": 34.5, "Cy": 0.0}
    assert found.dropped == {"subject with several objects of one relation": 2}
    for seed in range(5):
        new = {e.fact.subject: e.target for e in PopQA(path=path).pool(seed).edits}
        assert new["Ann"] == "judge"  # a bard is right as well


@pytest.mark.parametrize(
    ("source", "record", "change", "message"),
    [
        (MQuAKE, CASE, {"questions": []}, "'questions' must hold the multi-hop question"),
        (MQuAKE, CASE, {"requested_rewrite": [HEAD | {"target_new": {"str": "Ann"}}]}, "the new target is the old one"),
        (
            MQuAKE,
            CASE,
            {"requested_rewrite": [HEAD | {"subject": 3}]},
            "requested_rewrite[0]: 'subject' must be a text",
        ),
        (KnowEdit, RECENT, {"locality": ["x"]}, "'locality' must be an object"),
        (KnowEdit, RECENT, {"ground_truth": 3}, "'ground_truth' must be a text, or a list of texts, not 3"),
        (WikiBigEdit, WIKI, {"ans": None}, "'ans' is empty"),
        (WikiBigEdit, WIKI, {"mhop": "Who?"}, "'mhop_ans' is empty"),
        (S2RKE, TOPOLOGY, {"Star_Topology": []}, "'Star_Topology' must be a list with a fact or more"),
        (S2RKE, TOPOLOGY, {"subject": "X"}, "'subject' must be an object"),
        (ChronoEdit, CHANGE, {"kind": "change"}, "'kind' must be modification or injection"),
        (ChronoEdit, CHANGE, {"time": "March"}, "'time' must be a year"),
        (ChronoEdit, CHANGE, {"target_true": None}, "a modification needs 'target_true'"),
        (ChronoEdit, NEW, {"target_true": "Ajax"}, "an injection replaces nothing"),
        (ChronoEdit, CHANGE, {"tme": "2021"}, "unknown key 'tme' (did you mean 'time'?)"),
    ],
)
def test_refused(write, source, record, change, message):
    path = write([record, record | change])
    with pytest.raises(UserError) as error:
        source(path=path).pool(0)
    assert message in str(error.value)
    assert f"{path}, line 2" in str(error.value)


def test_popqa_refuses(write):
    for change, message in (
        ("a lot", "'s_pop' must be a number"),
        ("3\tWho is Ann?\tpoet", "'possible_answers' is no JSON list"),
    ):
        cells = change if "\t" in change else f'{change}\tWho is Ann?\t"[]"'
        path = write(f"subj\tprop\tobj\ts_pop\tquestion\tpossible_answers\nAnn\tjob\tpoet\t{cells}\n", "test.tsv")
        with pytest.raises(UserError) as error:
            PopQA(path=path).pool(0)
        assert message in str(error.value)
        assert f"{path}, line 2" in str(error.value)


def test_of_the_hub_at_a_commit(monkeypatch, tmp_path):
    import datasets

    commit, asked = "0123456789abcdef0123456789abcdef01234567", []

    def load_dataset(path, name=None, **how):
        asked.append((path, name, how))
        return [WIKI]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    source = WikiBigEdit(path="lukasthede/WikiBigEdit", revision=commit, file="a.json")
    assert len(source.pool(0).edits) == 1
    assert source.files() == []
    assert asked == [("lukasthede/WikiBigEdit", None, {"split": "train", "revision": commit, "data_files": "a.json"})]
    assert source.model_dump()["revision"] == commit
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [WIKI | {"ans": ""}])
    with pytest.raises(UserError, match=r"lukasthede/WikiBigEdit: a\.json, row 1: 'ans' is empty"):
        source.pool(0)
    for settings, message in (
        ({"path": "a/b", "revision": "main"}, "expected a commit, 40 hexadecimal digits, got 'main'"),
        ({"path": "a/b", "split": "test"}, "split is of a dataset on the Hub"),
        ({"revision": commit}, "give its name as `path`"),
    ):
        with pytest.raises(ValidationError, match=message):
            WikiBigEdit(**settings)
