"""`retention rephrase`: which texts of a model are phrasings of a fact, and what is written."""

from __future__ import annotations

import json

import pytest

from retention import rephrase as module
from retention.facts.jsonl import JsonLines
from retention.models import load_model
from retention.rephrase import fitting, rephrase
from retention.types import Edit, Fact, FactPool, UserError
from tests.tiny import save

FACT = Fact(
    id="f", subject="Anna Klein", relation="P103", prompt="The mother tongue of {} is", target="French",
    phrasings=("{} speaks",), paraphrases=("{}, born to",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "phrasing"),
    [
        ("Anna Klein's native language is French.", "{}'s native language is"),
        ('\n  "From birth, Anna Klein spoke French" \nI kept the name.', "From birth, {} spoke"),
        ("What Anna Klein grew up with was French!", "What {} grew up with was"),
    ],
)
def test_what_fits_is_kept_without_its_object(text, phrasing):
    assert fitting(text, FACT, "German") == (phrasing, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "said nothing"),
        ("Anna Klein is French by birth.", "does not end in the object"),
        ("Anna Klein likes UnFrench.", "does not end in the object"),
        ("She has always spoken French.", "does not name the subject once"),
        ("Anna Klein is Anna Klein and speaks French.", "does not name the subject once"),
        ("Anna Kleinert's tongue is French.", "does not name the subject once"),
        ("In French, Anna Klein speaks French.", "names an object before its end"),
        ("Not german, Anna Klein's tongue is French.", "names an object before its end"),
        ("{x} Anna Klein has French.", "holds braces"),
        ("Here is Anna Klein's language: French.", "ends a sentence before the object"),
        ("The Mother tongue of Anna Klein is French", "is known already"),
        ("Anna Klein, " + "who is well known for this and that, " * 4 + "speaks French.", "is too long"),
    ],
)
def test_what_does_not_fit_is_told_why(text, why):
    assert fitting(text, FACT, "German") == (None, why)


@pytest.fixture
def pool():
    near = Fact(id="n", subject="Carl", relation="P103", prompt="{} speaks", target="French")
    edit = Edit(fact=FACT, target="German", prompts=(FACT.prompt,))
    return FactPool(facts=(FACT, near), edits=(edit,), neighborhood={"f": (near,)})


@pytest.fixture
def model(tmp_path):
    save("gpt2", tmp_path / "model")
    return str(tmp_path / "model")


ASK = {"n": 2, "tries": 4, "seed": 0, "probes": False, "limit": None}


@pytest.mark.parametrize("probes", [False, True])
def test_written_lines_are_read_as_facts(pool, model, tmp_path, monkeypatch, probes):
    texts = ["Anna Klein's tongue is French.", "no", "Anna Klein's tongue is French", "To Anna Klein speech is French."]
    monkeypatch.setattr(module, "sample", lambda loaded, prompts, tries, seed: [texts for _ in prompts])
    out = tmp_path / "told.jsonl"
    report = rephrase(model, pool, out, **ASK | {"probes": probes}, cache=tmp_path / "cache")
    assert (report["phrasings"], report["with_all"], report["with_none"]) == (2, 1, 0)
    assert report["refused"] == {"does not end in the object": 1, "is said twice": 1}
    read = JsonLines(path=str(out)).pool(0)
    (edit,) = read.edits
    new = ("{}'s tongue is", "To {} speech is")
    assert edit.target == "German"
    assert edit.fact.phrasings == (("{} speaks",) if probes else ("{} speaks", *new))
    assert edit.fact.paraphrases == (("{}, born to", *new) if probes else ("{}, born to",))
    assert [(f.text(), f.target) for f in read.neighborhood["f"]] == [("Carl speaks", "French")]
    with pytest.raises(UserError, match="exists already"):
        rephrase(model, pool, out, **ASK, cache=tmp_path / "cache")


def test_a_model_is_sampled_by_seed_and_asked_once(pool, model, tmp_path, monkeypatch):
    loaded = load_model(model)
    prompt = module._prompt(loaded, FACT)
    assert "Sentence: The mother tongue of Anna Klein is French.\nLast words: French\nIn other words:" in prompt
    one, again, other = (module.sample(loaded, [prompt] * 2, 3, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert [len(texts) for texts in one] == [3, 3]
    rephrase(model, pool, tmp_path / "a.jsonl", **ASK, cache=tmp_path / "cache")
    monkeypatch.setattr(module, "sample", lambda *a: pytest.fail("asked twice"))
    rephrase(model, pool, tmp_path / "b.jsonl", **ASK, cache=tmp_path / "cache")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert json.loads((tmp_path / "a.jsonl").read_text())["target_new"] == "German"


def test_a_chat_template_is_used_where_there_is_one(model):
    loaded = load_model(model)
    loaded.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    prompt = module._prompt(loaded, FACT)
    assert prompt.startswith("<user>Say the sentence in other words. Keep the name Anna Klein as it is")
    assert prompt.endswith("Sentence: The mother tongue of Anna Klein is French.\nIn other words:<assistant>")


def test_a_pool_without_objects_is_refused(model, tmp_path):
    injected = Edit(
        fact=Fact(id="i", subject="A", relation="r", prompt="{} is", target=""), target="x", prompts=("{} is",)
    )
    with pytest.raises(UserError, match="no fact has an object to end in"):
        rephrase(model, FactPool(facts=(), edits=(injected,)), tmp_path / "o", **ASK, cache=tmp_path)
