"""GSM8K, instructions with preferences, and WikiText-2 as they are published; skipped where they are not."""

from __future__ import annotations

import json
from pathlib import Path

from retention.data.dataset import DataSet
from retention.data.text import Text


def test_gsm8k(real):
    common = {
        "path": str(real("gsm8k/train.jsonl")),
        "template": "Question: {question}\nAnswer:",
        "completion": "answer",
    }
    short = DataSet(**common, answer_after="####", rows=10_000).load(0)
    assert (len(short.heldout), len(short.train)) == (100, 7373)
    assert all(set(row["completion"]) <= set("-0123456789,.") for row in short.train)
    long = DataSet(**common, rows=10_000).load(0)
    assert [row["prompt"] for row in long.train] == [row["prompt"] for row in short.train]
    for answer, reasoning in zip(short.train, long.train, strict=True):
        assert reasoning["completion"].endswith(f"#### {answer['completion']}")


def test_instructions_and_preferences(real):
    path = str(real("instruct/instruction_preference_1100.json"))
    template = "{instruction}\n{input}\nAnswer:"
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    ties = sum(r["chosen"] == r["rejected"] for r in records)
    assert ties == 6
    plain = DataSet(path=path, template=template, completion="output").load(0)
    lost = plain.dropped["equal_to_heldout"]  # instructions that occur twice
    assert 0 < lost < 25
    assert len(plain.train) + len(plain.heldout) + lost == len(records)
    assert not {r["prompt"] for r in plain.train} & {r["prompt"] for r in plain.heldout}
    asked = {(f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"]) + "\nAnswer:" for r in records}
    assert {row["prompt"] for row in plain.train} < asked
    drawn = DataSet(path=path, template=template, completion="chosen", rejected="rejected").load(0)
    assert drawn.dropped["rejected_equals_completion"] == ties
    assert all(row["completion"] != row["rejected"] for row in (*drawn.train, *drawn.heldout))


def test_wikitext(real):
    drawn = Text(path=str(real("wikitext-2/wiki.valid.raw")), rows=10**6).load(0)
    assert not {r["text"] for r in drawn.train} & {r["text"] for r in drawn.heldout}
    assert len(drawn.train) > 1000
