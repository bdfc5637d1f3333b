"""`retention pretrain`: packed rows, the report, going on after a kill, and what is refused."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch

from retention.types import UserError
from retention.world import packed
from retention.world.factfile import gather_facts, read_passages
from retention.world.packed import labels_of, pack, positions, pretrain_files, product_ceiling, settings_of
from retention.world.settings import Pretraining
from retention.world.train import IGNORE, architecture, new_model

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima", "Japan": "Tokyo", "Egypt": "Cairo"}
TEMPLATES = [
    "The capital of {} is",
    "{} is governed from",
    "{}, whose capital is",
    "The capital city of {} is",
    "In {},",
]
PASSAGES = ["A river runs through the town.", *(f"It rains in May of {year}." for year in range(1900, 1940))]
SMALL = Pretraining(
    layers=1, width=16, heads=2, mlp=32, rows=4, context=32, vocabulary=400, exposures=6, warm_exposures=4,
    heldout_passages=8,
)  # fmt: skip


def _write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


@pytest.fixture
def facts(tmp_path):
    records = [{"subject": s, "relation": "capital", "object": o, "templates": TEMPLATES} for s, o in CAPITALS.items()]
    records[0] = {**records[0], "prompts": [t.replace("{}", "France") for t in TEMPLATES]}
    del records[0]["templates"]
    path = _write(tmp_path / "facts.jsonl", records)
    return gather_facts([str(path)], held_out=2, seed=0, exposures=6)


# ------------------------------------------------------------------------------------------------ rows


def test_documents_are_packed_whole():
    docs = [[1, *[10 + i] * (i % 9), 2] for i in range(200)]
    rows = pack(docs, 16, pad=0, multiple=8)
    assert rows.shape[1] == 16
    assert len(rows) % 8 == 0
    found = sorted(tuple(doc) for row in rows.tolist() if row[0] for doc in _split([t for t in row if t]))
    assert found == sorted(map(tuple, docs))
    used = sum(map(len, docs))
    assert math.ceil(used / 16) <= len(rows) < 1.1 * used / 16 + 8
    # About in their order: none is moved by more than the rows that were open together.
    first = [row[1] for row in rows.tolist() if row[0] and row[1] > 2]
    assert all(abs(a - b) < 150 for a, b in zip(first, sorted(first), strict=True))
    assert pack([], 16, pad=0).shape == (0, 16)


def _split(row):
    starts = [i for i, t in enumerate(row) if t == 1]
    return [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


def test_positions_and_labels_keep_documents_apart():
    ids = torch.tensor([[1, 7, 8, 2, 1, 9, 2, 0], [1, 5, 2, 1, 6, 6, 2, 0]])
    assert positions(ids, 1).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4]]
    x = IGNORE
    assert labels_of(ids, 1, 0).tolist() == [[7, 8, 2, x, 9, 2, x], [5, 2, x, 6, 6, 2, x]]


def test_a_packed_document_is_read_as_if_it_stood_alone(facts):
    from retention.world.tokenizer import bpe_tokenizer

    model = new_model(SMALL, bpe_tokenizer(PASSAGES, 300, 128)).eval()
    docs = [torch.tensor([1, *torch.randint(4, 200, (n,)).tolist(), 2]) for n in (5, 9, 3)]
    ids = torch.cat(docs)[None]
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions(ids, 1), use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=doc[None], use_cache=False).logits[0] for doc in docs])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ pretraining


def test_report_and_folder(facts, tmp_path):
    out = tmp_path / "out"
    report = pretrain_files(facts, PASSAGES, out, SMALL)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("The capital of Perú is")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "The capital of Perú is"
    known = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    assert {f["subject"]: f["object"] for f in known} == CAPITALS
    assert all(len(f["held_out"]) == 2 and f["templates"][0] == TEMPLATES[0] for f in known)
    assert all(sorted([*f["held_out"], *f["templates"]]) == sorted(TEMPLATES) for f in known)
    lines = (out / "corpus.txt").read_text().splitlines()
    assert "The capital of Peru is Lima." in lines
    unseen = [p for p in PASSAGES if p not in lines]  # so small a corpus holds every sentence that was trained on
    assert len(unseen) == report["heldout_passages"] == 8
    # The held-out loss, by another route: each passage alone.
    total, n = 0.0, 0
    for text in unseen:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(logp.gather(1, ids[0, 1:, None]).sum())
        n += ids.shape[1] - 1
    assert report["heldout_loss"] == pytest.approx(total / n, abs=0.03)  # there two or more share a document
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert report["products_per_second"] == pytest.approx(6 * weights * report["tokens_per_second"], rel=0.01)
    assert report["fraction_of_ceiling"] == pytest.approx(
        report["products_per_second"] / report["ceiling_per_second"], abs=1e-4
    )
    assert set(report["recall"]) == {"all"}
    assert not list(tmp_path.glob(".out*"))
    with pytest.raises(UserError, match="exists already"):
        pretrain_files(facts, PASSAGES, out, SMALL)


def test_interrupted_it_goes_on_to_the_same_weights(facts, tmp_path):
    often = SMALL.model_copy(update={"checkpoint_seconds": 1e-9})

    def stop(done, total):
        if done == total // 2 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_files(facts, PASSAGES, tmp_path / "cut", often, stop)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(UserError, match=r"\.cut\.part holds an interrupted pretraining of other facts, text or"):
        pretrain_files(facts, PASSAGES[:30], tmp_path / "cut", often)
    seen = []
    again = pretrain_files(facts, PASSAGES, tmp_path / "cut", SMALL, lambda done, total: seen.append((done, total)))
    assert seen[0][0] == seen[0][1] // 2 + 1  # what the last checkpoint holds is not done again
    whole = pretrain_files(facts, PASSAGES, tmp_path / "whole", SMALL)
    for name in ("model.safetensors", "tokenizer.json", "corpus.txt", "facts.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    timed = {"seconds", "tokens_per_second", "products_per_second", "ceiling_per_second", "fraction_of_ceiling"}
    same = [{k: v for k, v in report.items() if k not in timed} for report in (again, whole)]
    assert same[0] == same[1]
    assert not list(tmp_path.glob(".*"))


def test_without_text_there_is_no_held_out_loss(facts, tmp_path):
    report = pretrain_files(facts, (), tmp_path / "out", SMALL)
    assert report["heldout_loss"] is None
    assert report["heldout_passages"] == 0


def test_a_loss_that_is_no_number_ends_it(facts, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_loss_function", lambda *a: lambda ids: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(UserError, match="the loss is nan at step 1; lower matrix_lr and vector_lr"):
        pretrain_files(facts, PASSAGES, tmp_path / "out", SMALL)


def test_the_step_is_one_graph_for_torch_compile():
    """`compile` takes loss and model as a whole; the backend that generates no code gives the same gradient."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(architecture(SMALL, 300)).train()
    ids = torch.randint(4, 300, (4, 32))
    ids[:, 0] = ids[:, 10] = 1
    plain = packed._loss_function(model, 1, 0, SMALL)
    whole = torch.compile(plain, backend="aot_eager", dynamic=False, fullgraph=True)
    one, other = (torch.autograd.grad(loss(ids), list(model.parameters())) for loss in (plain, whole))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_ceiling_is_a_rate_of_this_machine():
    rate = product_ceiling("cpu", torch.float32, repeats=1)
    assert 1e8 < rate < 1e14


# ------------------------------------------------------------------------------------------------ what it reads


def test_passages_of_text_and_json_lines(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_bytes("\ufeffOne.\r\n\r\n Two\u2028parts. \n".encode())
    assert read_passages(plain) == ("One.", "Two\u2028parts.")
    packed_lines = tmp_path / "b.jsonl.xz"
    records = [{"id": 1, "text": "First.\n\nSecond."}, {"text": "Third."}]
    packed_lines.write_bytes(lzma.compress("\n".join(map(json.dumps, records)).encode()))
    assert read_passages(packed_lines) == ("First.", "Second.", "Third.")


def test_facts_of_several_places(facts, tmp_path):
    more = [{"subject": s, "relation": "capital", "object": "X", "prompt": "{} has"} for s in ("Peru", "Chad")]
    paths = [str(tmp_path / "facts.jsonl"), str(_write(tmp_path / "more.jsonl", more))]
    found = gather_facts(paths, held_out=2, seed=0, exposures=6)
    assert [f.subject for f in found] == [*CAPITALS, "Chad"]
    assert found[3].target == "Lima"  # the first stays
    assert len(gather_facts([f"{{name: jsonl, path: {paths[0]}}}"], held_out=2, seed=0, exposures=6)) == 6


@pytest.mark.parametrize(
    ("facts", "text", "message"),
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("trx", None, "unknown name 'trx'; did you mean 'trex'"),
        ("{name: trex, pth: x}", None, "facts.pth: unknown key; did you mean 'path'"),
        ("{name: world}", None, "is pretrained by `model: world` in a study"),
        ("[a]", None, "expected a file, a source's name or a mapping"),
        ("binary", None, "binary, line 1: not UTF-8 text"),
        (None, "none.txt", "no such file; expected plain text"),
        (None, "binary", "binary: not UTF-8 text"),
        (None, "lines.jsonl", "lines.jsonl, line 2: expected an object with a text under `text`"),
        (None, "cut.txt.xz", "cut.txt.xz: not a whole .xz file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, facts, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x80PK\x03")
    _write(tmp_path / "lines.jsonl", [{"text": "a"}, {"title": "b"}])
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(b"a" * 1000)[:40])
    with pytest.raises(UserError) as error:
        gather_facts([facts], held_out=2, seed=0, exposures=5) if facts else read_passages(tmp_path / text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["layer=3"], "pretrain: layer: unknown key; did you mean 'layers'?"),
        (["width=wide"], "pretrain: width: input should be a valid integer, got 'wide'"),
        (["device=tpu"], "pretrain: device: input should be 'cpu' or 'cuda', got 'tpu'"),
        (["layers=3,4"], "pretrain: one value each, no sweep: layers"),
        (["heads=5"], "width (192) must be divisible by heads (5)"),
        (["width=6", "heads=2"], "width (6) / heads (2) must be even"),
        (["context=3"], "pretrain: context: input should be greater than or equal to 8, got 3"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(UserError) as error:
        settings_of(given)
    assert message in str(error.value)


def test_no_gpu_is_said_before_work(facts, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="torch finds no GPU here"):
        pretrain_files(facts, PASSAGES, tmp_path / "out", SMALL.model_copy(update={"device": "cuda"}))
    assert settings_of(["layers=2", "device=cuda"]).layers == 2


@pytest.mark.gpu
def test_on_a_gpu(facts, tmp_path):
    there = SMALL.model_copy(update={"device": "cuda"})
    report = pretrain_files(facts, PASSAGES, tmp_path / "out", there)
    here = pretrain_files(facts, PASSAGES, tmp_path / "cpu", SMALL)
    assert report["heldout_loss"] == pytest.approx(here["heldout_loss"], abs=0.1)
    assert report["fraction_of_ceiling"] > 0
