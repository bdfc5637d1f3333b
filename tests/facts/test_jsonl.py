"""Fact files of one's own: the keys, what is refused, and finding and reading files (_read.py)."""

import json
from pathlib import Path

import pytest

from retention.facts._read import locate, phrasing_of, read_records
from retention.facts.jsonl import JsonLines
from retention.types import UserError

FACT = {"subject": "Ann", "relation": "born in", "object": "Oslo", "prompt": "{} was born in"}


def pool(path):
    return JsonLines(path=path).pool(0)


def test_the_least_record(write):
    found = pool(write([FACT]))
    (fact,) = found.facts
    assert (fact.id, fact.subject, fact.relation, fact.target) == ("fact-0", "Ann", "born in", "Oslo")
    assert (fact.prompt, fact.phrasings, fact.paraphrases) == ("{} was born in", (), ())
    assert found.edits == ()
    assert found.objects == {"born in": ("Oslo",)}


def test_the_full_record(write):
    full = {
        "id": "ann",
        "subject": "Ann",
        "relation": "born in",
        "target_true": "Oslo",
        "target_new": "Rome",
        "templates": ["{} was born in", "Ann's birthplace is", "{} was born in"],
        "paraphrases": ["{} comes from"],
        "exposures": 12,
        "tags": ["full"],
        "neighborhood": [FACT | {"subject": "Bob"}, {"prompt": "Where is Cid from?", "object": "Oslo"}],
    }
    found = pool(write([full]))
    (edit,) = found.edits
    assert edit.target == "Rome"
    assert edit.prompts == ("{} was born in",)
    fact = edit.fact
    assert (fact.prompt, fact.phrasings) == ("{} was born in", ("{}'s birthplace is",))
    assert (fact.id, fact.exposures, fact.tags, fact.paraphrases) == ("ann", 12, {"full"}, ("{} comes from",))
    assert [f.text() for f in found.neighborhood["ann"]] == ["Bob was born in", "Where is Cid from?"]
    assert found.objects == {"born in": ("Oslo", "Rome")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": "x"}, "unknown key 'subjects' (did you mean 'subject'?)"),
        ({"subject": ""}, "'subject' is empty"),
        ({"subject": None}, "'subject' is empty"),
        ({"object": "  "}, "'object' is empty"),
        ({"prompt": "{} and {}"}, "exactly one {} for the subject, not 2"),
        ({"prompt": None}, "no phrasing"),
        ({"prompt": ["{} was", 3]}, "item 2 of 'prompt' must be a text"),
        ({"target_new": "Oslo"}, "the new target is the old one"),
        ({"target_new": ""}, "'target_new' is empty"),
        ({"paraphrases": {"a": 1}}, "'paraphrases' must be a list of texts, not an object"),
        ({"held_out": ["Ann was born in"]}, "'{} was born in' is written with and also among the paraphrases"),
        ({"paraphrases": ["Ann was born in"]}, "'{} was born in' is written with and also among the paraphrases"),
        ({"exposures": -1}, "'exposures' must be a count, not -1"),
        ({"exposures": True}, "'exposures' must be a number, not True"),
        ({"popularity": "many"}, "'popularity' must be a number, not 'many'"),
        ({"joint": "tab"}, "'joint' must be one of space, none, not 'tab'"),
        ({"neighborhood": ["x"]}, "'neighborhood' must be a list of objects"),
        ({"neighborhood": [{"prompt": "x"}]}, "neighborhood[0]: no key 'object'"),
        ({"id": "fact-0"}, "its id 'fact-0' is also that of"),
    ],
)
def test_refused(write, change, message):
    path = write([FACT, FACT | change])
    with pytest.raises(UserError) as error:
        pool(path)
    assert message in str(error.value)
    assert f"{path}, line 2" in str(error.value)


@pytest.mark.parametrize("key", ["subject", "object", "prompt"])
def test_missing_key(write, key):
    with pytest.raises(UserError, match=f"line 1: no key '{key}'"):
        pool(write([{k: v for k, v in FACT.items() if k != key}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(FACT) + "\n\n{'subject': 1}\n", "line 3, column 2: not JSON"),
        ('[{"a": 1},\n {"b": }]', "line 2, column 8: not JSON"),
        ("[1]", "record 1: an object was expected, not a number (1)"),
        ('{"a": 1}\n"text"', 'line 2: an object was expected, not a text ("text")'),
        ("\n \n", "holds no records"),
        ('{\n "subject": "Ann"\n}', "one whole object a line was expected"),
    ],
)
def test_malformed_files(write, content, message):
    path = write(content)
    with pytest.raises(UserError) as error:
        pool(path)
    assert message in str(error.value)
    assert path in str(error.value)


def test_not_utf8(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_records(path)
    with pytest.raises(UserError, match="is a folder"):
        read_records(tmp_path)


def test_a_line_separator_inside_a_text_ends_no_line(write):
    (record,) = read_records(Path(write('{"a": "x\u2028y"}\n')))
    assert record.text("a") == "x\u2028y"


def test_locate(tmp_path, monkeypatch, write):
    path = write([FACT], "sub/facts.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETENTION_DATA", raising=False)
    assert locate("sub/facts.jsonl", "", "fact file").resolve() == (tmp_path / "sub/facts.jsonl").resolve()
    with pytest.raises(UserError, match=r"did you mean 'facts.jsonl'\?"):
        locate("sub/fact.jsonl", "", "fact file")
    with pytest.raises(UserError, match="set RETENTION_DATA to a folder that holds"):
        JsonLines().files()
    monkeypatch.setenv("RETENTION_DATA", str(tmp_path))
    with pytest.raises(UserError, match="put it there"):
        JsonLines().files()
    monkeypatch.setenv("RETENTION_DATA", str(tmp_path / "sub"))
    assert [str(p) for p in JsonLines().files()] == [path]


@pytest.mark.parametrize(
    ("text", "subject", "phrasing"),
    [
        ("Ann was born", "Ann", "{} was born"),
        ("Anna met Ann here", "Ann", "Anna met {} here"),
        ("Ann left. Ann was born", "Ann", "Ann left. {} was born"),
        ("Annals and Anna", "Ann", "Annals and {}a"),
        ("C++ and C++'s authors", "C++", "C++ and {}'s authors"),
        ("Bob", "Ann", None),
    ],
)
def test_phrasing_of(text, subject, phrasing):
    assert phrasing_of(text, subject) == phrasing
