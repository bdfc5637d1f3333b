"""The score probe against an independent one-at-a-time computation, on every architecture; what it must not touch."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.probes import Score
from retention.probes import _forward as forward
from retention.types import Reading
from tests import tiny
from tests.probes.independent import alone, bpe, gpt2_for, question, some_questions

TOLERANCE = 1e-5  # nats


def expect(reading: Reading, model, tokenizer, asked) -> None:
    """The reading is what the independent computation gives."""
    target = alone(model, tokenizer, asked.text, asked.answer)
    assert reading.question_id == asked.id
    assert reading.state == "ok"
    assert reading.logp_target == pytest.approx(target["logp"], abs=TOLERANCE)
    assert reading.n_target_tokens == target["n"]
    assert reading.target_rank == target["rank"]
    assert reading.first_correct is target["first"]
    assert reading.all_correct is target["all"] is (target["lead"] >= 0)
    assert reading.lead == pytest.approx(target["lead"], abs=TOLERANCE)
    if asked.foil is None:
        assert (reading.logp_foil, reading.n_foil_tokens, reading.prefers_target) == (None, None, None)
        return
    foil = alone(model, tokenizer, asked.text, asked.foil)
    assert reading.logp_foil == pytest.approx(foil["logp"], abs=TOLERANCE)
    assert reading.n_foil_tokens == foil["n"]
    margin = target["logp"] / target["n"] - foil["logp"] / foil["n"]
    if abs(margin) > TOLERANCE:
        assert reading.prefers_target is (margin > 0)


def same(a: Reading, b: Reading) -> None:
    """Equal up to rounding."""
    for name, x in dataclasses.asdict(a).items():
        y = getattr(b, name)
        assert y == (pytest.approx(x, abs=TOLERANCE) if isinstance(x, float) else x), name


MORE = {"phi": ("Phi", tiny.COMMON), "olmo": ("Olmo", tiny.GROUPED), "gemma": ("Gemma", tiny.GROUPED)}
WIDE = {"sliding_window": 64}  # else the rows of these are never shared
CASES = [*((name, {}) for name in [*tiny.ARCHITECTURES, *MORE]), ("gemma2", WIDE), ("gemma3", WIDE)]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_equal_to_one_at_a_time(name, settings, monkeypatch):
    monkeypatch.setattr(tiny, "ARCHITECTURES", {**tiny.ARCHITECTURES, **MORE})
    model, tokenizer = tiny.build(name, **settings)
    asked = some_questions(24)
    for reading, one in zip(Score().read(model, tokenizer, asked, 3), asked, strict=True):
        expect(reading, model, tokenizer, one)
        assert reading.step == 3


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_the_lead_equals_that_of_a_whole_model_in_float64(name):
    model, tokenizer = tiny.build(name, **(WIDE if name == "gemma3" else {}))
    asked = some_questions(24, seed=3)
    readings = Score().read(model, tokenizer, asked, 0)
    model = model.double()
    for reading, one in zip(readings, asked, strict=True):
        assert reading.lead == pytest.approx(alone(model, tokenizer, one.text, one.answer)["lead"], abs=TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "falcon", "opt", "phi3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equal_under_both_attention_kernels(name, attention):
    model, tokenizer = tiny.build(name, **(WIDE if name == "gemma3" else {}))
    model.set_attn_implementation(attention)
    asked = some_questions(12, seed=1)
    for reading, one in zip(Score().read(model, tokenizer, asked, 0), asked, strict=True):
        expect(reading, model, tokenizer, one)


def test_the_listed_architectures_share_rows_and_others_do_not():
    models = {name: tiny.build(name)[0] for name in tiny.ARCHITECTURES}
    assert {name for name, model in models.items() if not forward._branches(model, 8)} == {"falcon_alibi"}
    assert {model.config.model_type for model in models.values()} | set(MORE) == forward.BRANCHING  # all are tested
    gemma = tiny.build("gemma2")[0]  # its window is 8 tokens
    assert not forward._branches(gemma, 9)


def test_soft_capped_logits_are_those_of_the_model():
    model, tokenizer = tiny.build("gemma2", final_logit_softcapping=0.5)
    asked = question("The mother tongue of Anna is", "French", "German")
    (reading,) = Score().read(model, tokenizer, [asked], 0)
    expect(reading, model, tokenizer, asked)
    spread = math.log(len(tokenizer))
    assert abs(reading.logp_target + spread) < 1.0  # |logit| < 0.5 leaves the distribution within 1 nat of uniform


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon_alibi"])
def test_neither_batch_nor_padding_side_nor_company_matters(name):
    model, tokenizer = tiny.build(name)
    asked = some_questions(40)
    usual = Score().read(model, tokenizer, asked, 0)
    left = tiny.tokenizer(padding_side="left")
    for reading, other in zip(usual, Score(tokens_per_batch=1).read(model, left, asked, 0), strict=True):
        same(reading, other)
    assert left.padding_side == "left"
    mixed = list(range(40))
    random.Random(5).shuffle(mixed)
    for i, other in zip(mixed[:9], Score().read(model, tokenizer, [asked[i] for i in mixed[:9]], 0), strict=True):
        same(usual[i], other)
    assert Score().read(model, tokenizer, asked, 0) == usual  # bit for bit, after all of that


def test_bos_shifts_nothing():
    model, with_bos = tiny.build("llama")
    asked = some_questions(10)
    for tokenizer in (with_bos, tiny.tokenizer(bos=False)):
        for reading, one in zip(Score().read(model, tokenizer, asked, 0), asked, strict=True):
            expect(reading, model, tokenizer, one)


@pytest.mark.parametrize("merges_over_spaces", [False, True])
def test_byte_level_and_merges_over_the_border(merges_over_spaces):
    tokenizer = bpe(merges_over_spaces=merges_over_spaces)
    model = gpt2_for(tokenizer)
    asked = [
        question("Anna Klein lives in", "Paris", "Lisbon"),
        question("The capital of Northern Ireland is", "New York", "Newport"),
        question("The mother tongue of Hugo Brandt is", "German", "Spanish"),
        question("her mother tongue is", "Spanish", "Span"),
    ]
    texts = [tokenizer(f"{one.text} {one.answer}", return_offsets_mapping=True)["offset_mapping"] for one in asked]
    straddles = [any(a < len(q.text) < b for a, b in spans) for q, spans in zip(asked, texts, strict=True)]
    assert any(straddles) is merges_over_spaces
    readings = Score().read(model, tokenizer, asked, 0)
    for reading, one in zip(readings, asked, strict=True):
        expect(reading, model, tokenizer, one)
    assert max(reading.n_target_tokens for reading in readings) > 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(tiny.WORDS[:6]), min_size=1, max_size=5)] * 3), max_size=8))
def test_any_questions(words):
    asked = [question(*(" ".join(part) for part in parts)) for parts in words]
    for reading, one in zip(Score(tokens_per_batch=40).read(*MODEL, asked, 0), asked, strict=True):
        expect(reading, *MODEL, one)


MODEL = tiny.build("qwen2", num_hidden_layers=2)


def test_state_is_restored():
    model, tokenizer = tiny.build("gpt2")
    model.train()
    model.transformer.h[1].eval()  # a part that somebody keeps in eval mode
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    rng = torch.get_rng_state()
    configs = (model.config.to_dict(), model.generation_config.to_dict())
    in_training = Score().read(model, tokenizer, some_questions(5), 0)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), rng)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == configs
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    model.eval()  # dropout was off while reading
    assert Score().read(model, tokenizer, some_questions(5), 0) == in_training


def test_training_goes_on_after_probing():
    model, tokenizer = tiny.build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    Score().read(model, tokenizer, some_questions(5), 0)
    ids = torch.tensor([tokenizer("The mother tongue of Anna is French").input_ids])
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_nan_in_one_question_stays_there():
    model, tokenizer = tiny.build("gpt2")
    asked = [*some_questions(8), question("The mother tongue of pilot is", "French", "German")]
    asked = [q for q in asked[:-1] if "pilot" not in f"{q.text} {q.answer} {q.foil}"] + asked[-1:]
    with torch.no_grad():  # GPT-2's head is the same matrix: untie it, so that only one input is broken
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[tokenizer.convert_tokens_to_ids("pilot")] = float("nan")
    *good, bad = Score().read(model, tokenizer, asked, 2)
    assert bad == Reading(question_id=asked[-1].id, step=2, state="nan_logits")
    for reading, one in zip(good, asked, strict=False):
        expect(reading, model, tokenizer, one)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_model_gives_readings_without_measures(value):
    model, tokenizer = tiny.build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    asked = some_questions(6)
    assert Score().read(model, tokenizer, asked, 7) == [
        Reading(question_id=one.id, step=7, state="nan_logits") for one in asked
    ]


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_too_long_and_too_short(name):
    model, _ = tiny.build(name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": 10})
    tokenizer = tiny.tokenizer(bos=False)
    fits = question(" ".join(["piano"] * 8), "New York")
    long = question(" ".join(["piano"] * 9), "New York", "Rome")
    empty = question("", "Rome", "Paris")
    readings = Score().read(model, tokenizer, [long, fits, empty], 0)
    assert readings[0] == Reading(question_id=long.id, step=0, state="too_long")
    assert readings[2] == Reading(question_id=empty.id, step=0, state="no_tokens")
    expect(readings[1], model, tokenizer, fits)


def test_ties_share_the_better_rank():
    model, tokenizer = tiny.build("llama", num_hidden_layers=1)
    with torch.no_grad():
        rows = tokenizer.convert_tokens_to_ids(["Rome", "Paris"])
        model.lm_head.weight[rows[0]] = model.lm_head.weight[rows[1]]
    readings = Score().read(model, tokenizer, [question("Anna is in", city) for city in ("Rome", "Paris")], 0)
    assert readings[0].target_rank == readings[1].target_rank
    assert readings[0].logp_target == readings[1].logp_target
    assert readings[0].lead == readings[1].lead <= 0


@pytest.mark.parametrize(("below", "right"), [(0.0, True), (1e-3, False)])
def test_a_tie_for_the_most_probable_token_is_correct(below, right):
    model, tokenizer = tiny.build("llama")
    asked = question("Anna is in", "Rome")
    with torch.no_grad():
        ids = torch.tensor([tokenizer(asked.text).input_ids])
        last = model.model(input_ids=ids).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("Rome")] = 2 * last
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("Paris")] = (2 + below) * last
    (reading,) = Score().read(model, tokenizer, [asked], 0)
    assert reading.lead == pytest.approx(alone(model, tokenizer, asked.text, "Rome")["lead"], abs=TOLERANCE)
    assert (reading.lead >= 0, reading.all_correct, reading.first_correct) == (right, right, right)
    assert (reading.lead == 0) is right
    beside = Score().read(model, tokenizer, [asked, question("Anna is in", "Paris", "Rome")], 0)
    assert beside[1].all_correct
    assert beside[1].lead == pytest.approx(-reading.lead, abs=TOLERANCE)


def test_the_lead_is_of_the_worst_token_and_not_of_the_first():
    """A long answer is right only where each token is: its lead is the smallest of theirs, whichever it is."""
    model, tokenizer = tiny.build("gpt2")
    asked = [question("The mother tongue of Anna is", " ".join(words)) for words in (("Rome",), ("Rome", "Paris"))]
    short, long = Score().read(model, tokenizer, asked, 0)
    second = alone(model, tokenizer, f"{asked[0].text} Rome", "Paris")["lead"]
    assert long.lead == pytest.approx(min(short.lead, second), abs=TOLERANCE)


def test_low_precision_is_read_in_float32():
    model, tokenizer = tiny.build("llama")
    model = model.to(torch.bfloat16)
    asked = some_questions(6)
    for reading, one in zip(Score().read(model, tokenizer, asked, 0), asked, strict=True):
        expected = alone(model, tokenizer, one.text, one.answer)
        assert reading.logp_target == pytest.approx(expected["logp"], abs=0.2)
        assert reading.lead == pytest.approx(expected["lead"], abs=0.2)


def test_no_questions():
    assert Score().read(*MODEL, [], 0) == []


def test_the_head_runs_only_where_it_is_needed():
    """The work that is saved: rows share what questions share, and no logits are made elsewhere."""
    model, tokenizer = tiny.build("gpt2")
    shapes: list[tuple[int, int]] = []
    model.transformer.wte.register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))
    heads: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, out: heads.append(out.numel() // out.shape[-1]))
    mlps: list[list[int]] = [[] for _ in model.transformer.h]
    for block, places in zip(model.transformer.h, mlps, strict=True):
        block.mlp.c_proj.register_forward_hook(lambda _, args, out, p=places: p.append(out.numel() // out.shape[-1]))
    asked = [question("The mother tongue of Anna is", city, "Rome") for city in ("Paris", "Berlin", "Madrid", "Oslo")]
    Score().read(model, tokenizer, asked, 0)
    assert shapes == [(1, 7)]  # <s> and six words, once
    assert heads == [1]
    assert [n for (n,) in mlps] == [7, 7, 7, 1]  # after the last attention, only the place that is read
