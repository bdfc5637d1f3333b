"""Held-out loss and accuracy against a row-by-row computation."""

import pytest
import torch

from retention.probes import Generate
from retention.probes.ability import Cut, heldout
from retention.types import Question, UserError
from tests import tiny
from tests.probes.independent import alone, some_questions

ROWS = [{"prompt": q.text, "completion": q.answer} for q in some_questions(12)]


def test_completions():
    model, tokenizer = tiny.build("gpt2")
    rows = [*ROWS, ROWS[0]]
    read = heldout(model, tokenizer, rows)
    each = [alone(model, tokenizer, row["prompt"], row["completion"]) for row in rows]
    assert read.n_tokens == sum(one["n"] for one in each)
    assert read.loss == pytest.approx(-sum(one["logp"] for one in each) / read.n_tokens, abs=1e-6)
    assert read.accuracy == sum(one["all"] for one in each) / len(rows)
    assert (read.n_rows, read.n_skipped, read.state) == (13, 0, "ok")


def test_accuracy_counts_what_the_model_says():
    model, tokenizer = tiny.build("llama")
    text = "The mother tongue of Anna is"
    with torch.no_grad():
        ids = model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0, -1].argsort(descending=True)[:2]
    rows = [{"prompt": text, "completion": tokenizer.convert_ids_to_tokens(int(i))} for i in ids]
    assert heldout(model, tokenizer, rows).accuracy == 0.5


def test_texts():
    model, tokenizer = tiny.build("llama")
    rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in ROWS]
    read = heldout(model, tokenizer, rows, tokens_per_batch=30)
    total = tokens = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"]).input_ids])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total += float(loss) * (ids.numel() - 1)
        tokens += ids.numel() - 1
    assert read.loss == pytest.approx(total / tokens, abs=1e-5)
    assert (read.accuracy, read.n_rows, read.n_tokens) == (None, 12, tokens)


def test_rows_that_do_not_fit():
    model, tokenizer = tiny.build("gpt2", n_positions=8)
    long = " ".join(["piano"] * 9)
    read = heldout(model, tokenizer, [{"prompt": "Anna is", "completion": "Rome"}, {"prompt": long, "completion": "a"}])
    assert (read.n_rows, read.n_skipped, read.n_tokens) == (1, 1, 1)
    cut = heldout(model, tokenizer, [{"text": long}])
    assert (cut.n_rows, cut.n_tokens) == (1, 7)
    none = heldout(model, tokenizer, [{"prompt": long, "completion": "a"}])
    assert (none.loss, none.accuracy, none.state) == (None, None, "no_rows")


def test_broken_model():
    model, tokenizer = tiny.build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    read = heldout(model, tokenizer, ROWS)
    assert (read.loss, read.accuracy, read.state) == (None, None, "nan_logits")


@pytest.mark.parametrize("row", [{"prompt": "Anna is"}, {"question": "?"}, {"text": 3}])
def test_rows_of_another_form(row):
    with pytest.raises(UserError, match="held-out row 0: expected"):
        heldout(*tiny.build("gpt2"), [row])


def test_mixed_forms():
    with pytest.raises(UserError, match="give one form"):
        heldout(*tiny.build("gpt2"), [{"text": "Anna is in Rome"}, ROWS[0]])


# ------------------------------------------------------------------------------------------------ as training sees rows


def by_hand(model, ids, start):
    """Log-probabilities of a row's tokens from `start` on, by one plain forward."""
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(logps[i - 1, ids[i]]) for i in range(start, len(ids))]


LONG = {"prompt": "Anna is", "completion": "in Rome and Dora is in Wien and Keller lives in Rome"}


@pytest.mark.parametrize(
    ("cut", "kept", "start"),
    [
        (Cut(length=6), slice(None, 6), 3),
        (Cut(length=6, end=True), slice(-6, None), 1),
        (Cut(length=6, whole=True), slice(None, 6), 1),
        (Cut(whole=True), slice(None), 1),
    ],
    ids=["start", "end", "cut and whole", "whole"],
)
def test_a_row_is_read_as_training_cuts_it(cut, kept, start):
    model, words = tiny.build("llama")
    ids = words(LONG["prompt"] + " " + LONG["completion"])["input_ids"]
    assert len(ids) > 8
    read = heldout(model, words, [LONG], cut=cut)
    expected = by_hand(model, ids[kept], start)
    assert read.n_tokens == len(expected)
    assert read.loss == pytest.approx(-sum(expected) / len(expected), abs=1e-5)


def test_rows_are_read_until_enough_tokens_count():
    model, words = tiny.build("llama")
    rows = [{"text": "Anna is in Rome"}] * 5 + [{"text": LONG["completion"]}]
    each = len(words("Anna is in Rome")["input_ids"]) - 1
    read = heldout(model, words, rows, cut=Cut(tokens=2 * each + 1))
    assert (read.n_rows, read.n_tokens) == (3, 3 * each)
    assert heldout(model, words, rows, cut=Cut(tokens=10_000)).n_rows == 6


def test_the_accuracy_is_of_completions_though_prompts_are_trained_on():
    model, words = tiny.build("llama")
    question = Question(fact_id="a", group="edited", form="direct", text="Anna is", answer="x", foil=None)
    said = Generate(max_new_tokens=1).read(model, words, [question], 0)[0].generated
    row = {"prompt": "Anna is", "completion": said}
    assert heldout(model, words, [row], cut=Cut(whole=True)).accuracy == heldout(model, words, [row]).accuracy == 1.0


def test_a_completion_of_which_nothing_is_left_is_skipped():
    model, words = tiny.build("llama")
    read = heldout(model, words, [LONG, {"prompt": "Anna is", "completion": "in"}], cut=Cut(length=2))
    assert (read.state, read.n_rows, read.n_skipped) == ("no_rows", 0, 2)
