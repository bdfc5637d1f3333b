"""The generate probe against decoding one at a time, how texts end, and how they are judged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.probes import Generate, Score
from retention.texts import normalise
from retention.types import Reading
from tests import tiny
from tests.probes.independent import alone, bpe, gpt2_for, question, some_questions

OTHERS = {
    "lfm2": ("Lfm2", {**tiny.GROUPED, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}


@torch.no_grad()
def decode_alone(model, tokenizer, text: str, new_tokens: int, stop=(".", "\n")) -> str:
    """Greedy continuation without a cache: the whole text again for every token."""
    ids, said = tokenizer(text).input_ids, []
    while len(said) < new_tokens:
        token = int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    words = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for mark in stop:
        words = words.split(mark)[0]
    return words.strip()


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equal_to_one_at_a_time(name):
    model, tokenizer = tiny.build(name)
    asked = some_questions(10)
    readings = Generate(max_new_tokens=7).read(model, tokenizer, asked, 4)
    for reading, one in zip(readings, asked, strict=True):
        assert reading.generated == decode_alone(model, tokenizer, one.text, 7)
        assert (reading.question_id, reading.step, reading.state) == (one.id, 4, "ok")
    assert len({reading.generated for reading in readings}) > 3


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 100_000])
def test_neither_batch_nor_order_nor_padding_side_matters(tokens_per_batch):
    model, _ = tiny.build("gpt2")
    tokenizer = tiny.tokenizer(padding_side="left")
    asked = some_questions(20)
    usual = Generate(max_new_tokens=9).read(model, tiny.tokenizer(), asked, 0)
    probe = Generate(max_new_tokens=9, tokens_per_batch=tokens_per_batch)
    assert probe.read(model, tokenizer, asked[::-1], 0) == usual[::-1]
    assert tokenizer.padding_side == "left"
    for reading, one in zip(usual, asked, strict=True):
        assert reading.generated == decode_alone(model, tokenizer, one.text, 9)


@pytest.mark.parametrize("name", ["lfm2", "bloom"])
def test_recurrent_layers_and_distance_biases(name, monkeypatch):
    """Padding or rows of unequal length would be wrong here; running in step is not."""
    monkeypatch.setattr(tiny, "ARCHITECTURES", OTHERS)
    model, tokenizer = tiny.build(name)
    asked = some_questions(8)
    for reading, one in zip(Generate(max_new_tokens=6).read(model, tokenizer, asked, 0), asked, strict=True):
        assert reading.generated == decode_alone(model, tokenizer, one.text, 6)
    for reading, one in zip(Score().read(model, tokenizer, asked, 0), asked, strict=True):
        expected = alone(model, tokenizer, one.text, one.answer)
        assert reading.logp_target == pytest.approx(expected["logp"], abs=1e-5)


@pytest.mark.parametrize("end", ["tokenizer", "generation_config"])
def test_ends_at_the_end_token(end):
    model, tokenizer = tiny.build("gpt2")
    one = question("The mother tongue of Anna", "piano violin flute drums guitar")
    (free,) = Generate(max_new_tokens=6, stop=()).read(model, tokenizer, [one], 0)
    words = free.generated.split()
    last = tokenizer.convert_tokens_to_ids(words[-1])
    if end == "tokenizer":
        tokenizer.eos_token = words[-1]
    else:
        model.generation_config.eos_token_id = [2, last]
    (cut,) = Generate(max_new_tokens=6, stop=()).read(model, tokenizer, [one], 0)
    assert cut.generated.split() == words[: words.index(words[-1])]


def test_stops_before_a_stop_string_and_saves_the_rest():
    model, tokenizer = tiny.build("llama")
    one = question("The mother tongue of Anna", "piano")
    probe = Generate(max_new_tokens=12, stop=())
    passes: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    (free,) = probe.read(model, tokenizer, [one], 0)
    words = free.generated.split()
    assert len(passes) == 12
    passes.clear()
    (cut,) = probe.model_copy(update={"stop": (words[2],)}).read(model, tokenizer, [one], 0)
    first = words.index(words[2])
    assert cut.generated.split() == words[:first]
    assert len(passes) == first + 1


def saying(text: str, tokenizer):
    """A model that says this text after a prompt of one token: each position holds one direction, read by the head."""
    model = gpt2_for(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        for place, token in enumerate([*tokenizer(text).input_ids, tokenizer.eos_token_id]):
            model.transformer.wpe.weight[place, place] = 1.0
            model.lm_head.weight[token, place] = 1.0
    return model


@pytest.mark.parametrize(
    ("said", "answer", "generated", "exact", "contains"),
    [
        (" Paris. It was", "Paris", "Paris", True, True),
        (" the PARIS", "Paris", "the PARIS", True, True),
        (" New Parish", "Paris", "New Parish", False, True),  # a plain substring, word borders or not
        (" Rome", "Paris", "Rome", False, False),
        (" St. Louis", "St. Louis", "St. Louis", True, True),  # the stop string belongs to the answer
        (" St. Louis", "Louis", "St", False, False),
        (" D.C, by", "D.C.", "D.C, by", False, True),
        ("\nParis", "Paris", "", False, False),
    ],
)
def test_judging(said, answer, generated, exact, contains):
    tokenizer = bpe(merges_over_spaces=False)
    (reading,) = Generate(max_new_tokens=20).read(saying(said, tokenizer), tokenizer, [question("Q", answer)], 0)
    assert (reading.generated, reading.gen_exact, reading.gen_contains) == (generated, exact, contains)


def test_default_length_is_the_longest_answer_and_four():
    model, tokenizer = tiny.build("gpt2")
    asked = [question("The capital of", "Northern Ireland"), question("Anna is in", "Rome")]
    for reading in Generate(stop=()).read(model, tokenizer, asked, 0):
        assert len(reading.generated.split()) == 6


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Beatles!", "beatles"),
        ("a New-York\tman", "newyork man"),
        ("The", "the"),
        ("A.", "a"),
        ("?!", "?!"),
        ("", ""),
        ("Übermut, an Idee", "übermut idee"),
    ],
)
def test_normalise(text, plain):
    assert normalise(text) == plain


@given(st.text(max_size=30))
def test_normalise_is_idempotent_and_never_empties_a_text(text):
    once = normalise(text)
    assert normalise(once) == once
    assert bool(once) == bool(text.split())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.sampled_from(tiny.WORDS), min_size=1, max_size=6), min_size=1, max_size=6))
def test_any_texts(words):
    asked = [question(" ".join(text), "Rome") for text in words]
    for reading, one in zip(Generate(max_new_tokens=5).read(*MODEL, asked, 0), asked, strict=True):
        assert reading.generated == decode_alone(*MODEL, one.text, 5)


MODEL = tiny.build("gpt_neox", num_hidden_layers=2)


def test_state_is_restored():
    model, tokenizer = tiny.build("gpt2")
    model.train()
    rng = torch.get_rng_state()
    configs = (model.config.to_dict(), model.generation_config.to_dict())
    Generate().read(model, tokenizer, some_questions(5), 0)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == configs


def test_nan_and_too_long():
    model, tokenizer = tiny.build("gpt2", n_positions=12)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[tokenizer.convert_tokens_to_ids("pilot")] = float("nan")
    asked = [question(text, "Rome") for text in ("Anna pilot in", "Anna is in", " ".join(["Anna"] * 8))]
    broken, good, long = Generate(max_new_tokens=4).read(model, tokenizer, asked, 0)
    assert broken == Reading(question_id=asked[0].id, step=0, state="nan_logits")
    assert long == Reading(question_id=asked[2].id, step=0, state="too_long")
    assert good.state == "ok"
    assert good.generated == decode_alone(model, tokenizer, "Anna is in", 4)
