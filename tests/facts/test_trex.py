"""T-REx with ParaRel phrasings: which patterns count, which facts are left out, held-out phrasings, the real folder."""

import json

import pytest

from retention.facts.trex import TRex, read_phrasings
from retention.types import UserError

PATTERNS = [
    "[X] was born in [Y].",
    "[X] is native to [Y] .",
    "[X],  born in [Y]",
    "The birthplace of [X] is [Y].",
    "[X] was born in [Y].",  # again
    "[X] is a [Y]-born person.",  # the object does not end it
    "[Y] is where [X] was born.",
    "[X] was born in[Y].",  # no word border
]
TRIPLES = [("Ann", "Oslo"), ("Bob", "Rome"), ("Cid", "Oslo"), ("Cid", "Rome"), ("Ann", "Oslo"), ("Dan", "Lima")]


@pytest.fixture
def folder(write, tmp_path):
    write([{"sub_label": s, "obj_label": o, "uuid": "u"} for s, o in TRIPLES], "trex_lms_vocab/P19.jsonl")
    write([{"pattern": p} for p in PATTERNS], "pattern_data/graphs_json/P19.jsonl")
    write([{"sub_label": "Ann", "obj_label": "chess"}], "trex_lms_vocab/P20.jsonl")
    write([{"pattern": "[X] plays [Y]"}], "pattern_data/graphs_json/P20.jsonl")
    write([{"sub_label": "Ann", "obj_label": "x"}], "trex_lms_vocab/P31.jsonl")  # no patterns, as in ParaRel
    return tmp_path


def test_phrasings_end_in_the_object(folder):
    assert read_phrasings(folder, "P19") == [
        "{} was born in",
        "{} is native to",
        "{}, born in",
        "The birthplace of {} is",
    ]


def test_facts_and_edits(folder):
    found = TRex(path=str(folder)).pool(0)
    assert [(f.subject, f.target) for f in found.facts] == [("Ann", "Oslo"), ("Bob", "Rome"), ("Dan", "Lima")]
    assert found.dropped == {"subject with several objects of one relation": 2}
    assert found.objects == {"P19": ("Lima", "Oslo", "Rome")}
    for edit in found.edits:
        assert edit.target in {"Lima", "Oslo", "Rome"} - {edit.fact.target}
    assert [f.relation for f in TRex(path=str(folder), min_phrasings=2, held_out=1).pool(0).facts] == ["P19"] * 3


def test_every_fact_holds_out_its_own_phrasings(folder):
    known = set(read_phrasings(folder, "P19"))
    splits = set()
    for seed in range(8):
        for edit in TRex(path=str(folder), held_out=2).pool(seed).edits:
            fact = edit.fact
            assert len(fact.paraphrases) == 2
            assert set(fact.paraphrases) | {fact.prompt, *fact.phrasings} == known
            assert edit.prompts == (fact.prompt,)  # further ones are the paraphrase mitigation's to add
            splits.add((fact.id, frozenset(fact.paraphrases)))
    assert len(splits) > 6  # not the same pair for every fact and seed
    assert TRex(path=str(folder)).pool(3) == TRex(path=str(folder)).pool(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relations": ["P91"]}, "no facts and phrasings of 'P91' (did you mean 'P19'?)"),
        ({"relations": ["P20"]}, "P20 has 1 phrasings that end in the object, fewer than facts.min_phrasings (4)"),
        ({"held_out": 4}, "held_out (4) must be below facts.min_phrasings (4)"),
    ],
)
def test_settings_refused(folder, settings, message):
    with pytest.raises(UserError) as error:
        TRex(path=str(folder), **settings).pool(0)
    assert message in str(error.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no folder trex_lms_vocab"):
        TRex(path=str(tmp_path)).pool(0)


def test_a_pattern_without_gap_is_refused(folder, write):
    path = write([{"pattern": "[X] was born."}], "pattern_data/graphs_json/P19.jsonl")
    with pytest.raises(UserError) as error:
        TRex(path=str(folder)).pool(0)
    assert f"{path}, line 1: the pattern must have one [X] and one [Y]" in str(error.value)


def test_real_folder(real):
    folder = real("trex_pararel")
    part = TRex()
    found = part.pool(0)
    # Counted apart: relations whose distinct patterns end in [Y] four times or more, and their lines.
    relations, lines = [], 0
    for file in sorted((folder / "pattern_data/graphs_json").glob("P*.jsonl")):
        patterns = {" ".join(json.loads(x)["pattern"].rstrip(" .").split()) for x in file.read_text().splitlines() if x}
        if sum(p.endswith(" [Y]") for p in patterns) >= 4:
            relations.append(file.stem)
            lines += sum(bool(x) for x in (folder / "trex_lms_vocab" / file.name).read_text().split("\n"))
    assert {f.relation for f in found.facts} == set(relations)
    assert len(relations) == len(found.objects) == 24
    assert lines == 16_760
    assert found.dropped == {"subject with several objects of one relation": 1457}
    assert len(found.facts) == 15_291  # 12 more lines say a fact a second time
    assert len({f.id for f in found.facts}) == len(found.facts)
    assert len(part.files()) == 48
    assert all(path.is_file() for path in part.files())
