"""Questions, tokenizers and independent one-at-a-time computations for the probe tests."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from retention.types import Question
from tests import tiny

CORPUS = [
    "Anna Klein lives in Paris and plays the piano.",
    "The capital of Northern Ireland is New York.",
    "Berta Vogel was born in Lisbon; her mother tongue is Spanish",
    "The mother tongue of Hugo Brandt is German",
]


def bpe(*, merges_over_spaces: bool) -> Any:
    """A byte-level BPE as GPT-2's; or one that also merges over spaces, so that prompt and answer can share a token."""
    inner = Tokenizer(models.BPE())
    if merges_over_spaces:
        inner.pre_tokenizer = pre_tokenizers.Sequence([])
        alphabet = sorted({c for text in CORPUS for c in text})
        inner.decoder = decoders.Fuse()
        texts = CORPUS
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        texts = CORPUS
    trainer = trainers.BpeTrainer(
        vocab_size=320, max_token_length=6, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def gpt2_for(tokenizer: Any, positions: int = 128) -> Any:
    """A tiny GPT-2 with the tokenizer's vocabulary."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def question(text: str, answer: str, foil: str | None = None, fact: str = "f") -> Question:
    return Question(fact_id=fact, group="edited", form="direct", text=text, answer=answer, foil=foil)


def some_questions(n: int, seed: int = 0) -> list[Question]:
    """Texts of different length that share beginnings, and answers of one to four words, some beginning alike."""
    rng = random.Random(seed)
    asked = []
    for i in range(n):
        text = " ".join(["The", "mother", "tongue", *rng.choices(tiny.WORDS, k=rng.randrange(1, 9))])
        answer = " ".join(rng.choices(tiny.WORDS, k=rng.choice((1, 1, 2, 4))))
        foil = None if i % 7 == 3 else rng.choice((answer + " piano", " ".join(rng.choices(tiny.WORDS, k=2)), "Rome"))
        asked.append(question(text, answer, foil, fact=f"f{i}"))
    return asked


@torch.no_grad()
def alone(model: Any, tokenizer: Any, text: str, answer: str) -> dict[str, Any]:
    """One continuation by a whole plain forward in float64 after the logits; places found from the characters alone."""
    whole = tokenizer(text + " " + answer, return_offsets_mapping=True)
    ids = whole["input_ids"]
    start = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(text))
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logps, ranks, best, leads = [], [], [], []
    for place in range(start, len(ids)):
        row = logits[place - 1].tolist()
        top = max(row)
        logps.append(row[ids[place]] - top - math.log(sum(math.exp(x - top) for x in row)))
        ranks.append(1 + sum(x > row[ids[place]] for x in row))
        best.append(row.index(top) == ids[place])
        leads.append(row[ids[place]] - max(x for token, x in enumerate(row) if token != ids[place]))
    return {"logp": sum(logps), "n": len(logps), "rank": ranks[0], "first": best[0], "all": all(best)} | {
        "lead": min(leads)
    }
