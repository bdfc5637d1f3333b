"""What users' files are really like, in every format: marks, line ends, arrays, and any value of any key."""

import copy
import json

import pytest

from retention.facts.chronoedit import ChronoEdit
from retention.facts.counterfact import CounterFact
from retention.facts.jsonl import JsonLines
from retention.facts.knowedit import KnowEdit
from retention.facts.mquake import MQuAKE
from retention.facts.popqa import PopQA
from retention.facts.qaedit import QAEdit
from retention.facts.s2rke import S2RKE
from retention.facts.wikibigedit import WikiBigEdit
from retention.facts.zsre import ZsRE
from retention.types import UserError
from tests.facts.test_counterfact import FLAT, NESTED
from tests.facts.test_readers import CASE, CHANGE, NEW, RECENT, TOPOLOGY, WIKI
from tests.facts.test_zsre import RECORD

KNOWN = RECENT | {
    "ground_truth": [["poet"]],
    "portability": {"Reasoning": [{"prompt": "Ann Lee works in the", "ground_truth": "town hall"}]},
}
RECORDS = {
    "counterfact, flat": (CounterFact, FLAT),
    "counterfact, nested": (CounterFact, NESTED),
    "multi_counterfact": (CounterFact, NESTED | {"neighborhood_prompts": [{"prompt": "A plays", "target": "x"}]}),
    "zsre": (ZsRE, RECORD),
    "mquake": (MQuAKE, CASE),
    "knowedit": (KnowEdit, KNOWN),
    "knowedit, wikibio": (KnowEdit, {"text": "Ann Lee was", "labels": "A poet.", "concept": "Ann", "locality": {}}),
    "wikibigedit": (WikiBigEdit, WIKI | {"mhop": "Which river has the city of Ann Lee?", "mhop_ans": "Tiber"}),
    "qaedit": (
        QAEdit,
        {"prompt": "who is Emma", "subject": "Emma", "target": "A", "locality": [{"loc": "b", "loc_ans": "c"}]},
    ),
    "s2rke": (S2RKE, TOPOLOGY),
    "chronoedit": (ChronoEdit, CHANGE),
    "chronoedit, injection": (ChronoEdit, NEW),
    "popqa": (
        PopQA,
        {"subj": "Ann", "prop": "job", "obj": "poet", "s_pop": 3, "question": "Ann?", "possible_answers": '["poet"]'},
    ),
    "jsonl": (
        JsonLines,
        {
            "subject": "Ann", "relation": "job", "object": "poet", "target_new": "judge", "prompt": "{} is a",
            "paraphrases": ["Ann, a"], "neighborhood": [{"prompt": "Bob is a", "object": "poet"}],
            "two_hop": {"relation": "place", "prompt": "Ann works in", "object": "Oslo", "object_new": "court"},
        },
    ),
}  # fmt: skip
formats = pytest.mark.parametrize("format", RECORDS)


def read(tmp_path, source, content):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return source(path=str(path)).pool(0)


@formats
def test_one_record_however_it_is_written(tmp_path, format):
    source, record = RECORDS[format]
    line = json.dumps(record, ensure_ascii=False)
    found = read(tmp_path, source, line)
    assert found.edits or source is PopQA  # whose one object has no other to be changed to
    for content in (
        b"\xef\xbb\xbf" + line.encode(),  # a byte order mark
        line.replace("\n", "") + "\r\n",
        "\n\n" + line + "\n \n",
        json.dumps([record]),  # one array, though the name says lines
        "\n" + json.dumps([record], indent=1),
    ):
        again = read(tmp_path, source, content)
        assert (again.edits, again.facts, again.neighborhood) == (found.edits, found.facts, found.neighborhood)


@formats
def test_names_of_any_script(tmp_path, format):
    """A subject of other letters, one with quotes and braces' neighbours in its text, an answer after a space."""
    source, record = RECORDS[format]
    subject = next(iter(read(tmp_path, source, json.dumps(record)).facts or [None])) if source is not S2RKE else None
    if subject is None or "locality" in subject.tags:
        return  # its subject stands beside other texts, or is one
    for name in ("Ünï Çödé", "毛泽东", 'O\'Neil "Bo" (actor)'):
        text = json.dumps(record, ensure_ascii=False).replace(
            subject.subject, json.dumps(name, ensure_ascii=False)[1:-1]
        )
        (first, *_) = read(tmp_path, source, text).facts
        assert first.subject == name
        assert name in first.text()


ODD = (None, 3, True, "", [], {}, [3], "  ", {"a": 1}, "x", [["x"]], "a {} b {}")


def places(value, path=()):
    """Every place in nested JSON."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


@formats
def test_any_value_of_any_key_is_read_or_refused_by_its_line(tmp_path, format):
    """Never another error than ours, and ours names the file and the line."""
    source, record = RECORDS[format]
    good = json.dumps(record)
    refused = []
    for path in places(record):
        for value in ("deleted", *ODD):
            changed = copy.deepcopy(record)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if value == "deleted":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            try:
                read(tmp_path, source, f"{good}\n\n{json.dumps(changed)}\n")
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 10
    assert [text for text in refused if f"{tmp_path / 'records.jsonl'}, line 3" not in text] == []
