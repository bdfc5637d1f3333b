"""Any data set becomes rows: every form, every kind of file, and what is said when it does not fit."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from retention.data import AnyData, files_of, rows_of
from retention.data.dataset import DataSet
from retention.data.jsonl import JsonLines
from retention.types import UserError
from retention.world import WorldModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FEW = {"heldout": 1, "rows": 1000}


def written(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def all_rows(data, seed=0):
    drawn = data.load(seed)
    return [*drawn.heldout, *drawn.train]


def one_row(tmp_path, record, **settings):
    """The row of a record, beside another of the same form."""
    path = written(tmp_path / "one.jsonl", [record, record])
    (record,) = DataSet(path=path, **settings)._rows(DataSet(path=path)._records(path, "train")[:1], {})
    return record


# ------------------------------------------------------------------------------------------------ files

RECORDS = [{"q": f"Is {i}, or “{i}”,\nright?", "a": f"answer {i}"} for i in range(7)]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import csv

    written(tmp_path / "rows.jsonl", RECORDS)
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(RECORDS), encoding="utf-8")
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["a", "q"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(RECORDS)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "rows.parquet")
    made = {}
    for file in sorted(tmp_path.iterdir()):
        data = DataSet(path=str(file), prompt="q", completion="a", rows=4, heldout=2)
        assert files_of(data) == [file]
        made[file.name] = rows_of(data, WorldModel(), 5)
    assert len(made) == 5
    assert all(drawn == made["rows.jsonl"] for drawn in made.values())
    drawn = made["rows.jsonl"]
    assert (len(drawn.train), len(drawn.heldout), drawn.dropped) == (4, 2, {})
    asked = {r["q"]: r["a"] for r in RECORDS}
    assert all(asked[row["prompt"]] == row["completion"] for row in (*drawn.train, *drawn.heldout))
    assert DataSet(path=str(file), prompt="q", completion="a", rows=4, heldout=2).load(6) != drawn


def test_jsonl_is_the_same_part_under_another_name(tmp_path):
    path = written(tmp_path / "rows.jsonl", RECORDS)
    settings = {"path": path, "prompt": "q", "completion": "a", **FEW}
    read = TypeAdapter(AnyData).validate_python
    old, new = read({"name": "jsonl", **settings}), read({"name": "dataset", **settings})
    assert isinstance(old, JsonLines)
    assert isinstance(new, DataSet)
    assert old.load(3) == new.load(3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "a.jsonl: line 2: not JSON"),
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": "b"}\n\n{"promt": "a", "completion": "b"}',
            "a.jsonl: line 3: expected a text under 'prompt'; did you mean 'promt'?",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": null}',
            "line 1: expected a text under 'completion', which is empty",
        ),
        ("a.jsonl", b'{"prompt": "a", "completion": " "}', "`skip_blank: true` leaves such rows out"),
        ("a.jsonl", b'{"prompt": "a", "completion": 1.5}', "a text under 'completion', not float ('1.5')"),
        ("a.jsonl", b'{"prompt": "a", "completion": true}', "a text under 'completion', not bool"),
        (
            "a.json",
            b'[{"prompt": "a", "completion": "b"}, 3]',
            "record 2: expected a text under 'prompt'; its keys are none",
        ),
        ("a.json", b"[1", "line 1: not JSON"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}', "has 1 rows; 1 are to be held out and some trained on"),
        ("a.jsonl", b"\xe9\n", "not UTF-8 text"),
        ("a.csv", b'prompt,completion\n"a\nb",c\nd\n', "a.csv: line 4: has 1 cells; the first line names 2"),
        (
            "a.csv",
            b"prompt;completion\na;b\n",
            "line 2: expected a text under 'prompt'; its keys are prompt;completion",
        ),
        ("a.csv", b'prompt,completion\n"a\nb",\n', "line 2: expected a text under 'completion', which is empty"),
        ("a.parquet", b"hello", "a.parquet: not a parquet file"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        DataSet(path=str(tmp_path / name), heldout=1).load(0)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"tune.data: {tmp_path}/{name}")


def test_wrong_rows_of_a_parquet_file_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 2: expected a text under 'completion', which is empty"):
        DataSet(path=str(path), heldout=1).load(0)
    with pytest.raises(UserError, match=r"row 1: expected a text under 'answer'; its keys are completion, prompt"):
        DataSet(path=str(path), completion="answer", heldout=1).load(0)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETENTION_DATA", raising=False)
    with pytest.raises(
        UserError, match=r"no such file: own/er.*; for a dataset on the Hub give its commit as `revision`"
    ):
        DataSet(path="own/er").files()
    with pytest.raises(UserError, match=r"no such file: rows\.jsonl; set RETENTION_DATA .* give its place$"):
        DataSet(path="rows.jsonl").load(0)


# ------------------------------------------------------------------------------------------------ forms


def test_plain_text_and_blank_rows(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"t": t} for t in ("one", "", "two", None, "three", " \n")])
    with pytest.raises(UserError, match="line 2"):
        DataSet(path=path, text="t", **FEW).load(0)
    data = DataSet(path=path, text="t", skip_blank=True, **FEW)
    assert sorted(row["text"] for row in all_rows(data)) == ["one", "three", "two"]
    assert data.load(0).dropped == {"blank": 3}


def test_templates(tmp_path):
    template = "Do {this} {{now}}:\n{instruction}\n{input}\n\nAnswer:"
    record = {"instruction": "Sort {these}", "input": "b a", "this": "it", "output": "a b"}
    row = one_row(tmp_path, record, template=template, completion="output")
    assert row == {"prompt": "Do it {now}:\nSort {these}\nb a\n\nAnswer:", "completion": "a b"}
    row = one_row(tmp_path, record | {"input": ""}, template=template, completion="output")
    assert row["prompt"] == "Do it {now}:\nSort {these}\n\nAnswer:"
    with pytest.raises(UserError, match=r"line 1: expected a text under 'imput'; did you mean 'input'\?"):
        one_row(tmp_path, record, template="{instruction}\n{imput}", completion="output")
    with pytest.raises(UserError, match="the columns input are empty"):
        one_row(tmp_path, record | {"input": ""}, template="Say: {input}", completion="output")
    numbers = one_row(tmp_path, {"a": 2, "b": 3, "sum": 5}, template="{a} + {b} =", completion="sum")
    assert numbers == {"prompt": "2 + 3 =", "completion": "5"}


def test_the_answer_that_can_be_verified(tmp_path):
    record = {"prompt": "6 * 7?", "completion": "#### is a mark.\nSo\n#### 42 \n"}
    assert one_row(tmp_path, record, answer_after="####")["completion"] == "42"
    assert one_row(tmp_path, record)["completion"] == record["completion"]
    with pytest.raises(UserError, match=r"line 1: expected an answer after '##### ' \(answer_after\) in '.*42"):
        one_row(tmp_path, record, answer_after="##### ")
    record |= {"no": "So #### 41"}
    assert one_row(tmp_path, record, answer_after="####", rejected="no")["rejected"] == "41"


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]
CHAT_PROMPT = "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Who?\nassistant:"


def test_conversations(tmp_path):
    expected = {"prompt": CHAT_PROMPT, "completion": "Me.", "messages": CHAT}
    assert one_row(tmp_path, {"messages": CHAT}, messages="messages") == expected
    more = [*CHAT, {"role": "user", "content": "Bye"}]
    assert one_row(tmp_path, {"messages": more}, messages="messages") == expected
    names = {"user": "human", "assistant": "gpt"}
    other = [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT]
    assert one_row(tmp_path, {"conversations": other}, messages="conversations") == expected
    verified = [*CHAT[:-1], {"role": "assistant", "content": "5"}]  # what is learned is what is verified
    counted = [*CHAT[:-1], {"role": "assistant", "content": "2 + 3 #### 5"}]
    found = one_row(tmp_path, {"messages": counted}, messages="messages", answer_after="####")
    assert found == {"prompt": CHAT_PROMPT, "completion": "5", "messages": verified}
    with pytest.raises(UserError, match="no message of role 'assistant' under 'messages'; its roles are system, user"):
        one_row(tmp_path, {"messages": CHAT[:2]}, messages="messages")
    with pytest.raises(UserError, match=r"expected a list of .* under 'messages'; message 2 is .*'rol'"):
        one_row(tmp_path, {"messages": [CHAT[0], {"rol": "user"}]}, messages="messages")
    with pytest.raises(UserError, match="message 1 is 'None'"):
        one_row(tmp_path, {"messages": "Hi"}, messages="messages")
    with pytest.raises(UserError, match="did you mean 'message'"):
        one_row(tmp_path, {"message": CHAT}, messages="messages")


def test_a_conversation_from_parquet_reads_as_from_json(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"m": CHAT}, {"m": CHAT[:3]}]), tmp_path / "a.parquet")
    rows = all_rows(DataSet(path=str(tmp_path / "a.parquet"), messages="m", **FEW))
    assert {row["prompt"] for row in rows} == {CHAT_PROMPT, "system: Be brief.\nuser: Hi\nassistant:"}


def test_preferences(tmp_path):
    settings = {"completion": "chosen", "rejected": "rejected"}
    explicit = {"prompt": "Q: hi A:", "chosen": "yes", "rejected": "no"}
    assert one_row(tmp_path, explicit, **settings) == {"prompt": "Q: hi A:", "completion": "yes", "rejected": "no"}
    turns = {"prompt": CHAT[:2], "chosen": CHAT[2:3], "rejected": [{"role": "assistant", "content": "Go"}]}
    row = one_row(tmp_path, turns, **settings)
    expected = {"prompt": "system: Be brief.\nuser: Hi\nassistant:", "completion": "Hello", "rejected": "Go"}
    assert row == {**expected, "messages": CHAT[:3]}
    implicit = {"chosen": CHAT, "rejected": [*CHAT[:-1], {"role": "assistant", "content": "You."}]}
    row = one_row(tmp_path, implicit, prompt=None, **settings)
    assert row == {"prompt": CHAT_PROMPT, "completion": "Me.", "rejected": "You.", "messages": CHAT}
    row = one_row(tmp_path, {"chosen": "Q: a ", "rejected": "Q: a b"}, prompt=None, **settings)
    assert row == {"prompt": "Q:", "completion": " a ", "rejected": " a b"}
    with pytest.raises(UserError, match="differ before their last answer"):
        one_row(tmp_path, {"chosen": CHAT, "rejected": CHAT[:3]}, prompt=None, **settings)
    with pytest.raises(UserError, match="'chosen' and 'rejected' do not begin alike; name the column of the prompt"):
        one_row(tmp_path, {"chosen": "yes sir", "rejected": "no sir"}, prompt=None, **settings)


@settings(deadline=None)  # the machine may be busy
@given(
    prompt=st.lists(st.sampled_from(["Q:", "who", "is", "A:"]), min_size=1, max_size=5),
    answers=st.lists(st.lists(st.sampled_from(["a", "ab", "b"]), min_size=1, max_size=4), min_size=2, max_size=2),
)
def test_the_common_beginning_is_the_prompt(prompt, answers):
    from retention.data._columns import common_prompt
    from retention.data._records import Record

    one, other = (" ".join([*prompt, *answer]) for answer in answers)
    found = common_prompt(Record(place="here", fields={"c": one, "r": other}), "c", "r")
    shared = prompt + [a for a, b in zip(*answers, strict=False) if a == b]
    assert (found[0] + found[1], found[0] + found[2]) == (one, other)
    assert found[1].strip()
    assert found[2].strip()
    if answers[0][0] != answers[1][0]:
        assert found[0].split() == prompt
    assert found[0].split()[: len(prompt)] == prompt or len(shared) > len(prompt)


def test_preferences_that_prefer_nothing_are_left_out(tmp_path):
    records = [{"prompt": f"q {i}", "completion": "yes", "rejected": "no" if i % 3 else "yes "} for i in range(9)]
    drawn = DataSet(path=written(tmp_path / "a.jsonl", records), rejected="rejected", **FEW).load(0)
    assert len(drawn.train) == 5
    assert drawn.dropped == {"rejected_equals_completion": 3}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text": "t", "prompt": "p"}, "give `text`, or `prompt`, not both"),
        ({"text": "t", "answer_after": "####"}, "give `text`, or `answer_after`, not both"),
        (
            {"messages": "m", "rejected": "r", "completion": "c"},
            "give `messages`, or `completion`, `rejected`, not both",
        ),
        ({"template": "{q}", "prompt": "q"}, "give `template`, or `prompt`, not both"),
        ({"template": "Question:"}, "expected names of columns in braces"),
        ({"template": "{q:>3}"}, "expected names of columns in braces"),
        ({"template": "{} A:"}, "expected names of columns in braces"),
        ({"template": "{q"}, "braces that are text are doubled"),
        ({"prompt": None}, "give `rejected`, or name a prompt"),
        ({"answer_after": ""}, "at least 1 character"),
        ({"split": "test"}, "split is of a dataset on the Hub: give its commit as `revision`"),
        ({"config": "main"}, "config is of a dataset on the Hub"),
        ({"revision": "main"}, "expected a commit, 40 hexadecimal digits, got 'main': a branch or tag may move"),
        ({"revision": COMMIT, "path": "a/b/c"}, "a name on the Hub is expected, OWNER/NAME; got 'a/b/c'"),
        ({"rows": 0}, "greater than or equal to 1"),
        ({"apart": "rows"}, "'prompt' or 'text'"),
        ({"promt": "q"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_meant(settings, said):
    with pytest.raises(ValidationError) as caught:
        DataSet(**{"path": "a.jsonl", **settings})
    assert said in str(caught.value)
