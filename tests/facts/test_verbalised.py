"""Verbalised real facts: what is held out, whose neighbors are whose, and a model pretrained on them."""

import json
from pathlib import Path

import pytest
import torch

from retention.facts.verbalised import Source, Verbalised, leads, verbalise
from retention.types import UserError
from retention.world.facts_model import FactModel

BORN = ["[X] was born in [Y].", "[X] is native to [Y].", "[X], born in [Y]", "[X] comes from [Y] ."]
WORKS = ["[X] works for [Y].", "[X] is employed by [Y].", "[X], of [Y]", "[X] serves [Y].", "[X] is paid by [Y]."]
CITIES = ["Oslo", "Rome", "Lima"]
FIRMS = ["Acme", "Bell", "Corda"]


def record(n, subject, relation, prompt, true, new, **more):
    return {
        "case_id": n,
        "prompt": prompt.replace("{}", subject),
        "subject": subject,
        "target_new": new,
        "ground_truth": true,
        "relation_candidates": [relation],
        **more,
    }


@pytest.fixture
def files(write, tmp_path):
    """24 records of two relations, half with a true rephrasing, some unfit ones, and T-REx facts."""
    records = []
    for n in range(24):
        born = n % 2 == 0
        relation, objects = ("P19", CITIES) if born else ("P108", FIRMS)
        prompt = (
            ("{} was born in" if n % 4 else "{} is native to")
            if born
            else f"{{}} {('works for', 'is employed by')[n % 4 // 2]}"
        )
        true, new = objects[n // 2 % 3], objects[(n // 2 + 1) % 3]
        again = "{} is native to" if born and n % 4 else "{} was born in" if born else "{} is employed by"
        rephrase = f"It rained {n} days. {again}" if n % 4 < 2 else "Near {} people like"
        more = {
            "rephrase_prompt": rephrase.replace("{}", f"Person{n} Surname{n}"),
            "locality_prompt": prompt.replace("{}", f"Other{n} Else{n}"),
            "locality_ground_truth": true,
        }
        records.append(record(n, f"Person{n} Surname{n}", relation, prompt, true, new, **more))
    records.append(record(90, "Odd One", "P19", "{} was born in", "Oslo", "Rome") | {"relation_candidates": []})
    records.append(record(91, "Odd Two", "P19", "{} was born in", "Oslo", "Rome", relation_candidates=["P19", "P108"]))
    records.append(record(92, "Odd Three", "P20", "{} died in", "Oslo", "Rome"))
    trex = {
        "P19": [(f"Born{i} Trex{i}", CITIES[i % 3]) for i in range(12)] + [("Person0 Surname0", "Oslo")],
        "P108": [(f"Works{i} Trex{i}", FIRMS[i % 3]) for i in range(12)],
        "P20": [("Dead One", "Oslo")],
    }
    patterns = {"P19": BORN, "P108": WORKS, "P20": ["[X] died in [Y]."]}
    for relation, pairs in trex.items():
        write([{"sub_label": s, "obj_label": o} for s, o in pairs], f"trex/trex_lms_vocab/{relation}.jsonl")
        write([{"pattern": p} for p in patterns[relation]], f"trex/pattern_data/graphs_json/{relation}.jsonl")
    return {"counterfact": write(records, "cf.jsonl"), "trex": str(tmp_path / "trex")}


@pytest.fixture
def source(files):
    return Source(**files, records=20, candidates=10)


def test_kinds_of_facts(source):
    pool = verbalise(source)
    kinds = [next(iter(f.tags - {"locality"}), "locality") for f in pool.facts]
    assert kinds.count("candidate") == 10
    assert kinds.count("record") == 10
    assert kinds.count("locality") == 20
    assert kinds.count("trex") > 0
    assert {f.relation for f in pool.facts} == {"P19", "P108"}
    assert len({(f.subject, f.relation) for f in pool.facts}) == len(pool.facts)
    assert pool.dropped["record: no relation, several, or one with too few phrasings"] == 3
    assert {f.id for f in pool.facts if f.subject.startswith("Odd")} == set()


def check_held_out(pool, phrasings):
    """No text that probes read as a paraphrase is trained, for any fact; every fact keeps two phrasings to train on."""
    trained = {f.text(p) for f in pool.facts for p in (f.prompt, *f.phrasings)}
    for fact in pool.facts:
        assert len(fact.paraphrases) == 2
        assert len(fact.phrasings) >= 1
        for paraphrase in fact.paraphrases:
            assert fact.text(paraphrase) not in trained
        said = {p for p in phrasings[fact.relation] if any(q.endswith(p) for q in fact.paraphrases)}
        assert not said & set(fact.phrasings)


def test_held_out_phrasings_are_never_trained(source):
    pool = verbalise(source)
    known = {"P19": [p.split(" [Y]")[0].replace("[X]", "{}") for p in BORN]}
    known["P108"] = [p.split(" [Y]")[0].replace("[X]", "{}") for p in WORKS]
    check_held_out(pool, known)
    for edit in pool.edits:
        assert any(". " in p for p in edit.fact.paraphrases)  # CounterFact's own rephrasing
        assert edit.prompts == (edit.fact.prompt,)


def check_neighbors(pool):
    subjects = {f.subject for f in pool.facts if f.tags & {"candidate", "record"}}
    facts = set(pool.facts)
    for edit in pool.edits:
        for near in pool.neighborhood[edit.fact.id]:
            assert near in facts  # the model was taught it
            assert near.relation == edit.fact.relation
            assert near.subject not in subjects
            if "trex" in near.tags:
                assert near.target == edit.fact.target
    said = {(f.relation, f.target) for f in pool.facts}
    assert all((e.fact.relation, e.target) in said for e in pool.edits)


def test_neighbors_and_new_objects(source):
    pool = verbalise(source)
    check_neighbors(pool)
    assert sum("trex" in f.tags for near in pool.neighborhood.values() for f in near) == 2 * len(pool.neighborhood)
    for edit in pool.edits:
        assert set(edit.anchors) <= {p.split(" [Y]")[0].replace("[X]", "{}") for p in [*BORN, *WORKS]}
        assert not set(edit.anchors) & {edit.fact.prompt, *edit.fact.phrasings, *edit.fact.paraphrases}


def test_seeds(files, source):
    assert verbalise(source) == verbalise(source)
    assert {f.id for f in verbalise(source).facts} != {
        f.id for f in verbalise(Source(**files, records=20, candidates=10, seed=1)).facts
    }
    facts = Verbalised(source=source)
    assert facts.pool(0) == facts.pool(7)  # the draw's seed does not change what the model was taught


def test_only_facts_with_phrasings_enough_are_edited(source):
    """`phrasings`: what the mitigation paraphrase may write an edit with, besides its direct prompt."""
    pool = verbalise(source)
    sizes = sorted(len({*e.fact.phrasings} - {*e.prompts}) for e in pool.edits)
    assert sizes[0] < sizes[-1]
    found = Verbalised(source=source, phrasings=sizes[-1]).pool(0)
    assert found.edits == tuple(e for e in pool.edits if len({*e.fact.phrasings} - {*e.prompts}) == sizes[-1])
    assert found.facts == pool.facts  # the others may still be asked about
    assert found.dropped["edit: too few phrasings"] == len(pool.edits) - len(found.edits) > 0
    assert "phrasings" not in Verbalised(source=source).model_dump()  # stored keys stay


def test_leads_are_those_of_other_records(source):
    pool = verbalise(source)
    found = leads(source, pool.facts)
    taken = {f.id.removeprefix("counterfact-") for f in pool.facts}
    assert found == [f"It rained {n} days." for n in range(24) if n % 4 < 2 and str(n) not in taken]


def test_too_few_records(files):
    with pytest.raises(UserError, match=r"400 CounterFact facts \(record\) were asked for; the file has 12"):
        verbalise(Source(**files, records=410, candidates=10))


def test_files_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("RETENTION_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"no CounterFact file at .*put it there"):
        Verbalised().pool(0)
    with pytest.raises(UserError, match="no folder with T-REx facts"):
        FactModel().key()


SMALL = {"layers": 1, "width": 16, "heads": 2, "mlp": 32, "exposures": 2, "warm_exposures": 2, "vocabulary": 600}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # libraries' own, on first import
def test_model(source, tmp_path, files):
    model = FactModel(source=source, **SMALL)
    one, two = model.folder(tmp_path / "a"), model.folder(tmp_path / "b")
    assert one.name == two.name == model.key()
    for name in ("model.safetensors", "tokenizer.json", "corpus.txt", "facts.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    before = (one / "world.json").stat().st_mtime_ns
    assert model.folder(tmp_path / "a") == one
    assert (one / "world.json").stat().st_mtime_ns == before  # made once
    taught = [json.loads(line) for line in (one / "facts.jsonl").read_text().splitlines()]
    assert [t["id"] for t in taught] == [f.id for f in verbalise(source).facts]
    assert set(json.loads((one / "world.json").read_text())["recall"]) >= {"all", "candidate", "record", "trex"}
    # Every new object can be written without an unknown token, and is told back as it was.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(one)
    for edit in verbalise(source).edits:
        ids = tokenizer(edit.target, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).strip() == edit.target
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_that_knows_zsre_besides(source, tmp_path, write, monkeypatch):
    def records(n):
        one = {"src": "Where is Brook {} of all?", "pred": "Lee", "alt": "Po", "rephrase": "Of what is Brook {}?"}
        return [{"subject": f"Brook {i}"} | {k: v.replace("{}", str(i)) for k, v in one.items()} for i in range(n)]

    write(json.dumps(records(12)), "zsre/zsre_3k.json")
    monkeypatch.setenv("RETENTION_DATA", str(tmp_path))
    plain, model = FactModel(source=source, **SMALL), FactModel(source=source, zsre=8, **SMALL)
    assert plain.key() != model.key()
    assert "zsre" not in plain.model_dump()  # what was pretrained before keeps its key
    out = model.folder(tmp_path / "cache")
    taught = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    asked = [t for t in taught if t["tags"] == ["zsre"]]
    assert len(asked) == 8
    assert len(taught) == 8 + len(verbalise(source).facts)
    assert all(t["templates"] == ["Where is {} of all?"] and t["held_out"] == ["Of what is {}?"] for t in asked)
    assert "held_out" in json.loads((out / "world.json").read_text())["recall"]["zsre"]
    write(json.dumps(records(13)), "zsre/zsre_3k.json")
    assert model.key() != out.name
    with pytest.raises(UserError, match="zsre: 20 facts were asked for; the file has 13"):
        FactModel(source=source, zsre=20, **SMALL).folder(tmp_path / "cache")


def test_key_holds_what_the_files_hold(source, files):
    key = FactModel(source=source).key()
    moved = Path(files["counterfact"]).with_name("moved.jsonl")
    moved.write_bytes(Path(files["counterfact"]).read_bytes())
    assert FactModel(source=source.model_copy(update={"counterfact": str(moved)})).key() == key
    moved.write_bytes(moved.read_bytes() + b"\n")
    assert FactModel(source=source.model_copy(update={"counterfact": str(moved)})).key() != key
    assert FactModel(source=source, exposures=1).key() != key


def test_real_files(real):
    real("counterfact/counterfact_10k.jsonl")
    real("trex_pararel")
    from retention.facts.trex import read_phrasings, relations_of, trex_folder

    pool = verbalise(Source())
    tags = [next(iter(sorted(f.tags & {"candidate", "record", "trex"})), "locality") for f in pool.facts]
    assert (tags.count("candidate"), tags.count("record")) == (250, 750)
    assert tags.count("locality") == 852
    assert len(pool.facts) == 2352
    assert len(pool.edits) == 249
    folder = trex_folder(None)
    pararel = {r: read_phrasings(folder, r) for r in relations_of(folder)}
    assert all(len(pararel[f.relation]) >= 4 for f in pool.facts)
    check_held_out(pool, pararel)
    check_neighbors(pool)
    near = [f for edit in pool.edits for f in pool.neighborhood[edit.fact.id]]
    assert sum("locality" in f.tags for f in near) >= 240
    assert sum("trex" in f.tags for f in near) >= 460
