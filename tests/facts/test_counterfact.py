"""CounterFact: its three forms, the subjects of neighborhood prompts, what is refused, and the real file."""

import json
import time
from pathlib import Path

import pytest

from retention.facts.counterfact import CounterFact, Phrasings, read_cases
from retention.types import UserError

FLAT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Nobody came. The mother tongue of Danielle Darrieux is",
    "locality_prompt": "The mother tongue of Michel Rocard is",
    "locality_ground_truth": "French",
    "split": "edit",
    "relation_candidates": ["P103", "P1412"],
}
NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "subject": "Miles Davis",
        "target_new": {"str": "piano", "id": "Q1"},
        "target_true": {"str": "trumpet", "id": "Q2"},
    },
    "paraphrase_prompts": ["It rained. Miles Davis performs on the", "Miles Davis, playing the"],
    "neighborhood_prompts": ["Chet Baker plays the", "Clark Terry performs on the"],
}


def pool(path, **settings):
    return CounterFact(path=path, **settings).pool(0)


def test_flat_record(write):
    found = pool(write([FLAT]))
    (edit,) = found.edits
    fact = edit.fact
    assert (fact.id, fact.subject, fact.relation) == ("counterfact-0", "Danielle Darrieux", "P103")
    assert (fact.prompt, fact.target, edit.target) == ("The mother tongue of {} is", "French", "English")
    assert fact.paraphrases == ("Nobody came. The mother tongue of {} is",)
    assert edit.prompts == (fact.prompt,)
    assert found.facts == (fact,)
    (near,) = found.neighborhood[fact.id]
    assert (near.prompt, near.subject, near.target) == ("The mother tongue of {} is", "Michel Rocard", "French")
    assert near.tags == {"locality"}
    assert found.objects == {"P103": ("French", "English")}


def test_nested_record(write):
    for text in ([NESTED], json.dumps([NESTED], indent=1)):  # lines, and the array of the original release
        found = pool(write(text))
        (edit,) = found.edits
        assert (edit.fact.prompt, edit.fact.target, edit.target) == ("{} plays the", "trumpet", "piano")
        assert edit.fact.relation == "P1303"
        assert edit.fact.paraphrases == ("It rained. {} performs on the", "{}, playing the")
        near = found.neighborhood["counterfact-7"]
        assert [f.text() for f in near] == NESTED["neighborhood_prompts"]
        # The first by the record's own phrasing; no phrasing fits the second, so its capitalised words are taken.
        assert [f.subject for f in near] == ["Chet Baker", "Clark Terry"]
        assert {f.target for f in near} == {"trumpet"}


def test_multi_counterfact_neighbors_have_their_own_answers(write):
    near = [
        {"prompt": "Chet Baker plays the", "target": "flute"},
        {"prompt": "Bill plays the", "target": {"str": "oboe"}},
    ]
    found = pool(write([NESTED | {"neighborhood_prompts": near}]))
    assert [f.target for f in found.neighborhood["counterfact-7"]] == ["flute", "oboe"]


def test_generation_prompts_are_no_rephrasings(write):
    generation = FLAT | {"case_id": 1, "rephrase_prompt": "Where Danielle Darrieux is from, people speak"}
    path = write([FLAT, generation])
    found = pool(path)
    assert [f.paraphrases for f in found.facts] == [("Nobody came. The mother tongue of {} is",), ()]
    assert found.dropped == {"rephrasing that does not say the fact again (a generation prompt)": 1}
    everything = pool(path, restatements_only=False)
    assert everything.facts[1].paraphrases == ("Where {} is from, people speak",)
    assert everything.dropped == {}


def test_the_subjects_last_whole_word_counts(write):
    record = FLAT | {
        "subject": "Al",
        "prompt": "Also Al met Albert; Al speaks",
        "rephrase_prompt": "Al's home is Alma. Al, of",
    }
    found = pool(write([record]), restatements_only=False)
    assert found.facts[0].prompt == "Also Al met Albert; {} speaks"
    assert found.facts[0].paraphrases == ("Al's home is Alma. {}, of",)


def test_without_a_candidate_no_relation_is_named(write):
    assert pool(write([FLAT | {"relation_candidates": []}])).facts[0].relation is None


def test_subject_of_a_text_that_no_phrasing_fits(write):
    phrasings = Phrasings(read_cases(Path(write([FLAT]))))
    assert phrasings.split("P103", "Bing Crosby's record label is") == ("{}'s record label is", "Bing Crosby")
    assert phrasings.split("P103", "the city of Jean de la Fontaine in") == ("the city of {} in", "Jean de la Fontaine")
    assert phrasings.split("P103", "nothing here") == ("{}", "nothing here")


def without(record, key):
    return {k: v for k, v in record.items() if k != key}


def rewritten(**changes):
    return NESTED | {"requested_rewrite": NESTED["requested_rewrite"] | changes}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without(FLAT, "subject"), "line 2: no key 'subject'"),
        (without(FLAT, "target_new") | {"target_knew": "x"}, "did you mean 'target_knew'"),
        (without(FLAT, "case_id"), "no key 'case_id'"),
        (FLAT | {"case_id": 5, "target_new": " "}, "'target_new' is empty"),
        (FLAT | {"case_id": 5, "ground_truth": ""}, "'ground_truth' is empty"),
        (FLAT | {"case_id": 5, "target_new": "French"}, "the new target is the old one ('French')"),
        (FLAT | {"case_id": 5, "target_new": ["x"]}, "must be a text, not a list"),
        (FLAT | {"case_id": 5, "relation_candidates": [3]}, "item 1 of 'relation_candidates' must be a text"),
        (FLAT, "its case_id 0 is also that of"),
        ({"question": "x", "answer": "y"}, "neither nested CounterFact"),
        (rewritten(prompt="{} and {} play"), "exactly one {} for the subject, not 2"),
        (rewritten(target_new={"id": "Q1"}), "line 2, requested_rewrite, target_new: no key 'str'"),
        (rewritten(target_new={"str": "trumpet"}), "the new target is the old one"),
        (rewritten(target_new="piano"), "'target_new' must be an object, not a text"),
        (NESTED | {"requested_rewrite": None}, "'requested_rewrite' must be an object, not null"),
    ],
)
def test_refused(write, record, message):
    path = write([FLAT, record])
    with pytest.raises(UserError) as error:
        pool(path)
    assert message in str(error.value)
    assert f"{path}, line 2" in str(error.value)


def test_real_file(real):
    path = real("counterfact/counterfact_10k.jsonl")
    start = time.process_time()
    found = CounterFact().pool(0)
    assert time.process_time() - start < 1.5  # 0.25 s on the machine it was written on
    assert CounterFact().files() == [path]
    assert len(found.facts) == len(found.edits) == len(found.neighborhood) == 10_000
    # Against the raw lines: every text is reproduced, every answer and target is as given.
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record, edit in zip(raw, found.edits, strict=True):
        assert edit.fact.text() == record["prompt"]
        assert (edit.fact.target, edit.target) == (record["ground_truth"], record["target_new"])
        (near,) = found.neighborhood[edit.fact.id]
        assert (near.text(), near.target) == (record["locality_prompt"], record["locality_ground_truth"])
        assert near.subject
    by_prompt = {f.prompt for f in found.facts}
    assert sum(f.prompt not in by_prompt for near in found.neighborhood.values() for f in near) == 5
    assert found.dropped == {
        "rephrasing that does not say the fact again (a generation prompt)": 8171,
        "rephrasing that is the prompt itself": sum(r["rephrase_prompt"] == r["prompt"] for r in raw),
    }
    assert sum(len(f.paraphrases) for f in found.facts) == 1829 - 15
    assert sum(f.relation == "P495" for f in found.facts) == 453
    assert sum(f.relation is None for f in found.facts) == 141
    unnamed = {f.prompt for f in found.facts if f.relation is None}
    assert len(found.objects) == 33 + len(unnamed)
