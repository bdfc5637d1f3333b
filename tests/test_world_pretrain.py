"""Pretraining from start to end on a very small world and on a hand-made file of facts."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch

from retention.cache_folders import sound
from retention.facts.files import read_pool
from retention.types import UserError
from retention.world import Recipe, WorldModel, settings
from retention.world.factfile import read_facts
from retention.world.muon import Muon, orthogonalised
from retention.world.settings import Pretraining
from retention.world.stream import Material, stream
from retention.world.train import batches, documents

SMALL = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "mlp": 64,
    "rows": 8,
    "exposures": 3,
    "warm_exposures": 2,
}
TINY = WorldModel(
    **SMALL, people=12, new_people=3, cities=6, companies=6, countries=3, warm_people=4, withheld=2, graded=0
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache):
    return TINY.folder(cache)


def test_the_folder_is_an_ordinary_model(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert tokenizer.is_fast
    ids = tokenizer("{} is a".replace("{}", "river"))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "river is a"
    assert len(tokenizer) == model.config.vocab_size


def test_corpus_holds_sentences_of_the_stream_in_the_vocabulary(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (folder / "corpus.txt").read_text().splitlines()
    assert len(lines) > 100
    assert all(line.endswith(" .") for line in lines)
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(lines)["input_ids"])


def test_report_and_facts_are_written(folder):
    report = json.loads((folder / "world.json").read_text())
    assert report["settings"] == TINY.model_dump()
    assert 0 <= report["recall"]["full"]["held_out"] <= 1
    assert report["cpu_seconds"] > 0
    facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]
    corpus = set((folder / "corpus.txt").read_text().splitlines())
    for fact in facts:
        assert not {f"{t.replace('{}', fact['subject'])} {fact['object']} ." for t in fact["held_out"]} & corpus


def test_training_learns(folder):
    """Below the loss of a uniform guess by far: the vocabulary has several hundred words."""
    assert json.loads((folder / "world.json").read_text())["final_loss"] < 5.0


def test_second_use_reads_the_cache(folder, cache):
    before = (folder / "world.json").stat().st_mtime_ns
    steps = []
    assert TINY.folder(cache, progress=lambda done, total: steps.append(done)) == folder
    assert steps == []
    assert (folder / "world.json").stat().st_mtime_ns == before


def test_bit_identical_twice_and_leaves_threads_and_rng_alone(folder, tmp_path):
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = TINY.folder(tmp_path)
    assert again.name == folder.name == TINY.key()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "corpus.txt", "facts.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_key_depends_on_the_settings_alone():
    assert TINY.key() == TINY.model_copy().key()
    assert TINY.key() != TINY.model_copy(update={"seed": 1}).key()
    assert TINY.key() != TINY.model_copy(update={"width": 64}).key()


def test_bfloat16_is_the_default_only_where_the_processor_has_it(monkeypatch):
    """Without it the same products take 40 times as long: two hours for the embedded world."""
    for native in (False, True):
        monkeypatch.setattr(settings, "native_bf16", lambda native=native: native)
        assert Recipe().bf16 is native
        assert WorldModel(name="world").bf16 is native
        assert Pretraining().bf16 is native
        assert Pretraining(device="cuda").bf16 is True
        assert Pretraining(device="cuda", bf16=False).bf16 is False


@pytest.mark.parametrize("shape", [(4, 7), (9, 3)])
def test_muon_is_torchs_in_bfloat16_and_keeps_to_float32(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}
    p, q, r = (torch.nn.Parameter(start.clone()) for _ in range(3))
    steppers = [
        torch.optim.Muon([p], nesterov=True, **made),
        Muon([q], dtype=torch.bfloat16, **made),
        Muon([r], dtype=torch.float32, **made),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for parameter, stepper in zip((p, q, r), steppers, strict=True):
            parameter.grad = gradient.clone()
            stepper.step()
    assert torch.equal(p, q)
    assert not torch.equal(p, r)
    assert torch.allclose(p, r, atol=2e-3)
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    found = orthogonalised(gradient, torch.float32).double()
    values = torch.diagonal(u.mT @ found @ v.mT)
    assert torch.allclose(u @ torch.diag(values) @ v, found, atol=1e-5)  # the same singular vectors
    assert ((values > 0.6) & (values < 1.3)).all()  # all of about one length


def test_an_interrupted_pretraining_leaves_nothing(tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TINY.folder(tmp_path, progress=stop)
    assert [p.name for p in tmp_path.rglob("*")] == ["worlds", f".{TINY.key()}.lock"]


def test_of_two_that_want_the_same_model_one_pretrains(tmp_path):
    """The second, which begins while the first trains, waits and finds it."""
    trained, threads = [], []

    def second():
        TINY.folder(tmp_path, progress=lambda done, total: trained.append(done))

    def start(done, total):
        if done == 1:
            threads.append(threading.Thread(target=second))
            threads[0].start()

    out = TINY.folder(tmp_path, progress=start)
    threads[0].join()
    assert trained == []
    assert sound(out)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "corpus.txt", "world.json", "made.json"])
def test_a_damaged_world_is_set_aside_and_pretrained_again(folder, tmp_path, caplog, name):
    out = TINY.place(tmp_path)
    shutil.copytree(folder, out)
    path = out / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    again = TINY.folder(tmp_path)
    assert again == out
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "not as it was written" in caplog.text
    assert len(list(out.parent.glob(".*.broken-*"))) == 1
    path.unlink()  # nor is one that lost a file, its marker too, pretrained more than once
    TINY.folder(tmp_path)
    steps: list[int] = []
    TINY.folder(tmp_path, progress=lambda done, total: steps.append(done))
    assert steps == []


def test_batches_keep_the_budget_and_every_sentence():
    recipe = Recipe(rows=4, context=16)
    sentences = [[10 + i] * (1 + i % 9) for i in range(60)]
    rows = documents(sentences, recipe, bos=1, eos=2)
    assert all(row[0] == 1 and row[-1] == 2 and len(row) <= recipe.context for row in rows)
    assert [t for row in rows for t in row[1:-1]] == [t for s in sentences for t in s]
    found = batches(rows, recipe, pad=0)
    assert all(b.numel() <= recipe.rows * recipe.context for b in found)
    assert sorted(tuple(t for t in row.tolist() if t) for b in found for row in b) == sorted(map(tuple, rows))


# ------------------------------------------------------------------------------------------------ files of facts

TEMPLATES = [
    "The capital of {} is",
    "{} is governed from",
    "{}, whose capital is",
    "The capital city of {} is",
    "In {},",
]


def _write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def test_facts_with_few_phrasings_keep_them_all(tmp_path):
    record = {"subject": "Peru", "relation": "capital", "object": "Lima", "templates": TEMPLATES[:3]}
    (fact,) = read_facts(_write(tmp_path / "f.jsonl", [record]), held_out=2, seed=0, exposures=5)
    assert fact.paraphrases == ()
    assert {fact.prompt, *fact.phrasings} == set(TEMPLATES[:3])


GOOD = {"subject": "Peru", "relation": "capital", "object": "Lima", "templates": ["The capital of {} is"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2, column 2: not JSON"),
        ("[1, 2]", "line 2: an object was expected"),
        ({**GOOD, "object": ""}, "line 2: 'object' is empty"),
        ({**GOOD, "object": "Cusco", "templates": []}, "line 2: no phrasing: give `prompt`"),
        ({"subject": "Peru", "relation": "c", "object": "L", "text": "x"}, "line 2: no key 'prompt' or 'prompts' or"),
        (GOOD, "line 2: .* stands in the file already"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = _write(tmp_path / "facts.jsonl", [GOOD, line])
    with pytest.raises(UserError, match=message) as error:
        read_facts(path, held_out=2, seed=0, exposures=5)
    assert str(path) in str(error.value)


def test_a_record_may_give_its_phrasings_as_everywhere_else(tmp_path):
    """`prompt` alone or before others, the subject as a gap or filled in, U+2028 in a text."""
    peru = {"subject": "Peru", "relation": "capital", "object": "Lima\u2028city"}
    alone = {**peru, "prompt": "The capital of Peru is"}
    first = {**peru, "subject": "Peru\u2028s", "prompt": TEMPLATES[1], "templates": TEMPLATES}
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in (alone, first)), encoding="utf-8")
    one, many = read_facts(path, held_out=2, seed=0, exposures=5)
    assert (one.prompt, one.phrasings, one.target) == ("The capital of {} is", (), "Lima\u2028city")
    assert many.prompt == TEMPLATES[1]
    assert sorted([many.prompt, *many.phrasings, *many.paraphrases]) == sorted(TEMPLATES)


def test_the_facts_that_are_written_can_be_read_as_facts(folder):
    written = [json.loads(line) for line in (folder / "facts.jsonl").read_text().split("\n") if line]
    facts = {fact.id: fact for fact in read_pool(folder / "facts.jsonl").facts}
    assert len(facts) == len(written)
    for record in written:
        fact = facts[record["id"]]
        assert (fact.prompt, *fact.phrasings) == tuple(record["templates"])
        assert list(fact.paraphrases) == record["held_out"] != []


def test_stated_counts_and_curriculum(tmp_path):
    facts = read_facts(_write(tmp_path / "f.jsonl", [GOOD]), held_out=2, seed=0, exposures=9)
    recipe = Recipe(**{**SMALL, "warm_exposures": 4})
    material = Material(facts=facts, warm=frozenset({facts[0].id}), text=("Hello.",) * 9, end=".")
    sentences, first = stream(material, recipe)
    assert sentences.count("The capital of Peru is Lima.") == 9
    assert first == 8
    assert sentences[:first].count("Hello.") == 4


@pytest.mark.long
def test_the_default_world_is_recalled(tmp_path):
    """The default's promise: 95 % of held-out phrasings, in two minutes of one core."""
    report = json.loads((WorldModel().folder(tmp_path) / "world.json").read_text())
    assert report["recall"]["full"]["held_out"] >= 0.95
    assert report["cpu_seconds"] <= 150  # 120 on a quiet machine
