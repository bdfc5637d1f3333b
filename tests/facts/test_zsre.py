"""zsRE in MEND's form: one record, what is refused, and the real file."""

import json

import pytest

from retention.facts.zsre import ZsRE
from retention.types import UserError

RECORD = {
    "subject": "Charity Creek",
    "src": "Which river system contains Charity Creek?",
    "pred": "Parramatta River",
    "rephrase": "What river system is Charity Creek in?",
    "alt": "Chichester River",
    "answers": ["Hunter River", "Hunter"],
    "loc": "nq question: who won the battle of britain",
    "loc_ans": "Britain",
    "cond": "Parramatta River >> Chichester River",
}


def test_record(write):
    found = ZsRE(path=write(json.dumps([RECORD], indent=0), "zsre.json")).pool(0)
    (edit,) = found.edits
    assert edit.fact.text() == RECORD["src"]
    assert (edit.fact.prompt, edit.fact.relation) == ("Which river system contains {}?", None)
    assert (edit.fact.target, edit.target) == ("Hunter River", "Chichester River")  # the truth, not a model's guess
    assert edit.fact.paraphrases == ("What river system is {} in?",)
    (near,) = found.neighborhood[edit.fact.id]
    assert (near.text(), near.target) == ("who won the battle of britain", "Britain")


def test_without_answers_the_guess_is_the_old_object(write):
    record = {k: v for k, v in RECORD.items() if k != "answers"}
    assert ZsRE(path=write([record])).pool(0).facts[0].target == "Parramatta River"


def test_an_edit_to_a_true_answer_is_no_edit(write):
    found = ZsRE(path=write([RECORD | {"alt": "Hunter"}])).pool(0)
    assert (len(found.facts), len(found.edits)) == (1, 0)
    assert found.dropped == {"edit: its new object is a true answer": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alt": ""}, "'alt' is empty"),
        ({"alt": "Parramatta River"}, "the new target is the old one"),
        ({"answers": "x" * 3, "loc": "who", "loc_ans": 3}, "'loc_ans' must be a text, not a number"),
        ({"answers": [""]}, "item 1 of 'answers'"),
    ],
)
def test_refused(write, change, message):
    path = write(json.dumps([RECORD, RECORD | change]), "zsre.json")
    with pytest.raises(UserError) as error:
        ZsRE(path=path).pool(0)
    assert message in str(error.value)
    assert f"{path}, record 2" in str(error.value)


def test_missing_key_names_the_nearest(write):
    record = {("sourc" if k == "src" else k): v for k, v in RECORD.items()}
    with pytest.raises(UserError, match=r"no key 'src' \(did you mean 'sourc'\?\)"):
        ZsRE(path=write([record])).pool(0)


def test_real_file(real):
    path = real("zsre/zsre_3k.json")
    found = ZsRE().pool(0)
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert len(found.facts) == len(raw) == 3000
    corrected = sum(r["alt"].strip() in [a.strip() for a in r["answers"]] for r in raw)
    assert corrected == 115
    assert len(found.edits) == 3000 - corrected
    assert [f.text() for f in found.facts] == [r["src"].strip() for r in raw]
    assert len(found.objects) == len({r["src"].replace(r["subject"], "{}") for r in raw})
