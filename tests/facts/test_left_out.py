"""Files as they come: phrasings without their subject, packed files, empty cells, and which source reads which file."""

import gzip
import json
import lzma
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest

from retention.data.files import read_lines
from retention.facts.chronoedit import ChronoEdit
from retention.facts.counterfact import CounterFact
from retention.facts.files import read_pool, source_of
from retention.facts.jsonl import JsonLines
from retention.facts.knowedit import KnowEdit
from retention.facts.mquake import MQuAKE
from retention.facts.popqa import PopQA
from retention.facts.qaedit import QAEdit
from retention.facts.s2rke import S2RKE
from retention.facts.wikibigedit import WikiBigEdit
from retention.facts.zsre import ZsRE
from retention.types import UserError
from retention.world.factfile import gather_facts
from tests.facts.test_counterfact import FLAT, NESTED
from tests.facts.test_readers import CASE, CHANGE, TOPOLOGY, WIKI
from tests.facts.test_zsre import RECORD

PLAIN = {"subject": "Ann", "relation": "born in", "object": "Oslo", "target_new": "Rome", "prompt": "{} was born in"}
QA = {"prompt": "who wrote Emma", "subject": "Emma", "target": "Jane Austen", "rephrase": "Emma is by whom?"}
KNOW = {
    "subject": "Tessa Varn",
    "prompt": "The country of Tessa Varn is",
    "target_new": "Chile",
    "ground_truth": ["Norway"],
    "rephrase_prompt": "Which country is Tessa Varn of?",
    "locality": {"Relation_Specificity": [{"prompt": "The gender of Tessa Varn is", "ground_truth": "female"}]},
}
POP = {"subj": "Ann", "prop": "country", "obj": "Norway", "s_pop": 3, "question": "Which country is Ann of?"}
# source, a record, and the record with a phrasing besides the direct one that lacks its subject
FORMS = {
    "plain": (JsonLines, PLAIN | {"paraphrases": ["{} comes from"]}, {"paraphrases": ["She comes from"]}),
    "flat": (CounterFact, FLAT, {"case_id": 5, "rephrase_prompt": "She is"}),
    "nested": (CounterFact, NESTED, {"case_id": 5, "paraphrase_prompts": ["He plays"]}),
    "zsre": (ZsRE, RECORD, {"rephrase": "Where is it?"}),
    "knowedit": (KnowEdit, KNOW, {"rephrase_prompt": "Which country is T. Varn of?"}),
    "qaedit": (QAEdit, QA, {"rephrase": "By whom is it?"}),
    "wikibigedit": (WikiBigEdit, WIKI, {"rephrase": "Where is she?"}),
    "chronoedit": (ChronoEdit, CHANGE, {"rephrase_prompts": ["Her team is"]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_phrasing_that_lacks_its_subject_is_omitted_and_counted(write, form):
    source, record, lacking = FORMS[form]
    whole, found = source(path=write([record])).pool(0), source(path=write([record | lacking])).pool(0)
    assert [e.target for e in found.edits] == [e.target for e in whole.edits] != []
    assert len(whole.edits[0].fact.paraphrases) > len(found.edits[0].fact.paraphrases)
    assert sum(n for reason, n in found.dropped.items() if "subject is not in it" in reason) >= 1
    with pytest.raises(UserError, match=r"line 1.*does not occur in its .*strict: true"):
        source(path=write([record | lacking]), strict=True).pool(0)


@pytest.mark.parametrize("form", FORMS)
def test_a_record_whose_direct_phrasing_lacks_its_subject_is_omitted_and_counted(write, form):
    source, record, _ = FORMS[form]
    if form == "nested":
        other = {"case_id": 5, "requested_rewrite": record["requested_rewrite"] | {"prompt": "She is of"}}
    else:
        key = next(k for k in ("src", "update", "prompt") if k in record)
        other = {"case_id": 5, key: "She is of"} if form == "flat" else {key: "She is of"}
    path = write([record, record | other])
    found = source(path=path).pool(0)
    assert len(found.edits) == 1
    assert sum(n for reason, n in found.dropped.items() if "subject is not in it" in reason) >= 1
    with pytest.raises(UserError, match=r"line [12].*: the subject .* does not occur"):
        source(path=path, strict=True).pool(0)


@pytest.mark.parametrize(
    ("source", "records"),
    [(source, [record]) for source, record, _ in FORMS.values()]
    + [
        (MQuAKE, [CASE]),
        (S2RKE, [TOPOLOGY]),
        (PopQA, [POP, POP | {"subj": "Bob", "obj": "Chile", "question": "Of Bob"}]),
    ],
)
def test_outside_a_study_a_file_is_read_as_in_one(write, source, records):
    path = write(records)
    assert source_of(Path(path)) is source
    assert read_pool(path) == source(path=path).pool(0)
    if source is not JsonLines:  # pretraining draws held-out phrasings of plain records itself
        assert gather_facts([path], held_out=1, seed=0, exposures=3) == read_pool(path).facts


def zst(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zst)])
def test_packed_files(tmp_path, ending, pack):
    text = (json.dumps(PLAIN) + "\n").encode()
    plain, packed = tmp_path / "facts.jsonl", tmp_path / f"facts.jsonl.{ending}"
    plain.write_bytes(text)
    packed.write_bytes(pack(text))
    assert read_pool(packed) == read_pool(plain)
    csv = tmp_path / f"facts.csv.{ending}"
    csv.write_bytes(pack(b"subject,relation,object,prompt\nAnn,r,Oslo,{} was born in\n"))
    assert read_pool(csv).facts[0].target == "Oslo"
    assert read_lines(packed) == [text.decode().strip()]
    for broken in (text, pack(text * 99)[:-9]):
        packed.write_bytes(broken)
        with pytest.raises(UserError, match=rf"facts.jsonl.{ending}.*not a whole .{ending} file"):
            read_pool(packed)


@pytest.mark.parametrize(("name", "tab"), [("facts.csv", ","), ("facts.tsv", "\t")])
def test_empty_cells_are_absent(write, name, tab):
    lines = [
        ["subject", "relation", "object", "target_true", "target_new", "prompt", "paraphrases", "exposures", "joint"],
        ["Ann", "born", "Oslo", "", "", "{} was born in", " ", "", ""],
        ["Bob", "", "", "Rome", "Oslo", "{} was born in", "{} is from", "12", "none"],
    ]
    found = read_pool(write("".join(tab.join(cells) + "\n" for cells in lines), name))
    ann, bob = found.facts
    assert (ann.target, ann.paraphrases, ann.exposures, ann.joint) == ("Oslo", (), None, None)
    assert (bob.target, bob.paraphrases, bob.exposures, bob.joint) == ("Rome", ("{} is from",), 12, "none")
    assert [e.target for e in found.edits] == ["Oslo"]
    with pytest.raises(UserError, match="line 2: 'subject' is empty"):
        read_pool(write(f"subject{tab}object{tab}prompt\n{tab}Oslo{tab}x\n", name))


@pytest.mark.parametrize("prompt", ["The type {} is", "The type std::array{} is"])
def test_a_subject_that_holds_braces_is_filled_as_written(write, prompt):
    record = PLAIN | {"subject": "std::array{}", "prompt": prompt, "paraphrases": ["What is std::array{}?"]}
    (fact,) = read_pool(write([record])).facts
    assert fact.text() == "The type std::array{} is"
    assert fact.text(fact.paraphrases[0]) == "What is std::array{}?"


def test_decomposed_files_match(write):
    record = RECORD | {"subject": "Zoë Brandt", "src": "Where is Zoë Brandt?", "rephrase": "The place of Zoë Brandt?"}
    decomposed = record | {"src": unicodedata.normalize("NFD", record["src"]), "alt": "Å"}
    (edit,) = ZsRE(path=write([decomposed])).pool(0).edits
    assert (edit.fact.prompt, edit.target) == ("Where is {}?", "Å")


def test_the_joint_is_set_per_source_and_per_fact(write):
    path = write([PLAIN | {"joint": "space"}, PLAIN | {"subject": "Bob", "neighborhood": [PLAIN | {"subject": "Cy"}]}])
    assert [f.joint for f in JsonLines(path=path).pool(0).facts] == ["space", None]
    found = JsonLines(path=path, joint="none").pool(0)
    assert [f.joint for f in found.facts] == [e.fact.joint for e in found.edits] == ["space", "none"]
    assert found.neighborhood["fact-1"][0].joint == "none"
    assert "joint" not in JsonLines(path=path).model_dump()  # keys of stored results stay
    assert "strict" not in JsonLines(path=path).model_dump()
