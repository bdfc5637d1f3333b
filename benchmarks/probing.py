"""Probing speed: our packed scoring and batched decoding against one question at a time.

    python benchmarks/probing.py [--json] [--model smollm2|toy|DIR ...] [--edits 8]

toy: GPT-2's shape and random weights. Without --model: SmolLM2, if it was fetched, and the toy. The questions have
CounterFact's shape: for each edit one direct question, two paraphrases and ten neighbors, each with a target and a
foil. One thread; CPU seconds.

scoring: the plain way runs a whole forward with all logits for each question and each of its two answers.
generation: the plain way is transformers' `generate` (greedy, with its cache) one question at a time, its text cut at
the first stop string afterwards. In the made-up vocabulary every fourth word ends a sentence, so that texts end as
texts do. generation_lean: the same against a bare loop with a cache that also stops early, which leaves batching alone.
scoring_batched: padded batches of 16 rows of like length, logits of the answers only. generation_batched_over_a_run:
`generate` in such batches against what generating adds to scoring, at several checkpoints of a model that moves.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import machine
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from retention.hooks import cache_argument, cache_of
from retention.models import load_model
from retention.probes import Generate, Prepared, Score, read_all
from retention.tokens import encode
from retention.types import Question

PHRASINGS = (
    ("The mother tongue of {} is", "{} is a native speaker of", "Where {} is from, people speak the language of"),
    ("{} plays the instrument called", "The instrument that {} performs on is the", "{}, a master of the"),
    ("{} was founded in the city of", "The city where {} was started is", "{}, which was created in"),
    ("The capital of the country {} is", "{} is governed from the city of", "The seat of government of {} is in"),
    ("{} works in the field of", "The profession of {} is", "The occupation that {} is known for is"),
)
BATCH = 16  # rows of the batched ways
SYLLABLES = ("an", "bel", "cor", "dan", "el", "far", "gus", "hol", "in", "jor", "kel", "lem", "mar", "nor", "os", "pel")


def names(rng: random.Random, n: int, words: int) -> list[str]:
    """n names of so many words, two or three syllables each."""
    made = []
    for _ in range(n):
        parts = ["".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))).capitalize() for _ in range(words)]
        made.append(" ".join(parts))
    return made


def questions(edits: int, seed: int) -> list[Question]:
    """Thirteen questions an edit, in CounterFact's proportions: neighbors share the edit's old object and phrasings."""
    rng = random.Random(seed)
    objects = names(rng, 40, 1) + names(rng, 20, 2)
    asked = []
    for number in range(edits):
        direct, *others = rng.choice(PHRASINGS)
        subject = names(rng, 1, 2)[0]
        new, old = rng.sample(objects, 2)
        for form, phrasing in (("direct", direct), *(("paraphrase", other) for other in others)):
            text = phrasing.replace("{}", subject)
            if form == "paraphrase":  # CounterFact's stand behind a sentence about something else
                text = f"The report on {names(rng, 1, 1)[0]} was read to all who came. {text}"
            asked.append(Question(fact_id=f"e{number}", group="edited", form=form, text=text, answer=new, foil=old))
        for k, neighbor in enumerate(names(rng, 10, 2)):
            text = (direct if k % 2 else others[0]).replace("{}", neighbor)
            fact = f"n{number}-{k}"
            asked.append(Question(fact_id=fact, group="neighbor", form="direct", text=text, answer=old, foil=new))
    return asked


def tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of GPT-2's kind, trained on the texts, and made-up words up to the size of the vocabulary."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,  # few merges: names of several tokens, as rare names are
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    trained = json.loads(inner.to_str())["model"]
    pieces = trained["vocab"]
    for i in range(len(pieces), vocabulary):
        pieces[f"Ġword{i}{'.' if i % 4 == 0 else ''}"] = i
    inner = Tokenizer(models.BPE(vocab=pieces, merges=[tuple(merge) for merge in trained["merges"]]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def model_of(layers: int, width: int, vocabulary: int) -> Any:
    """GPT-2's shape, random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 64),
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.05,  # GPT-2's own 0.02 gives almost equal logits: decoding would be a lottery of rounding
    )
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def plain_scores(model: Any, words: Any, asked: Sequence[Question]) -> list[tuple[float, float]]:
    """Log-probabilities of target and foil, nats: one forward each, all logits."""
    out = []
    for question in asked:
        pair = []
        for answer in (question.answer, question.foil):
            encoded = encode(words, question.text, answer)
            ids = torch.tensor([encoded.ids])
            logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            places = torch.arange(encoded.answer_start, len(encoded.ids))
            pair.append(float(logps[places - 1, ids[0, places]].sum()))
        out.append((pair[0], pair[1]))
    return out


def said(words: Any, ids: Sequence[int]) -> str:
    """The text of new tokens up to the first stop string."""
    text = words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.split(".")[0].split("\n")[0].strip()


def plain_texts(model: Any, words: Any, asked: Sequence[Question], new_tokens: int) -> list[str]:
    """Greedy continuations by transformers' generate, one question at a time."""
    out = []
    for question in asked:
        ids = torch.tensor([encode(words, question.text).ids])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=words.eos_token_id,
        )
        out.append(said(words, made[0, ids.shape[1] :].tolist()))
    return out


@torch.no_grad()
def lean_texts(model: Any, words: Any, asked: Sequence[Question], new_tokens: int) -> tuple[list[str], int]:
    """The same by a bare loop with a cache and an early stop, and the number of its forwards."""
    out, forwards = [], 0
    for question in asked:
        ids = torch.tensor([encode(words, question.text).ids])
        cache, new = None, []
        while len(new) < new_tokens:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(cache))
            forwards += 1
            cache = cache_of(output)
            new.append(int(output.logits[0, -1].argmax()))
            text = words.decode(new, clean_up_tokenization_spaces=False)
            if new[-1] == words.eos_token_id or "." in text or "\n" in text:
                break
            ids = torch.tensor([[new[-1]]])
        out.append(said(words, new))
    return out, forwards


@torch.no_grad()
def batched_scores(model: Any, words: Any, asked: Sequence[Question]) -> list[float]:
    """Log-probabilities of target and foil in turn, nats: padded batches of rows of like length, answers' logits."""
    rows = [encode(words, q.text, answer) for q in asked for answer in (q.answer, q.foil)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    out = [0.0] * len(rows)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        width = max(len(rows[i].ids) for i in some)
        ids = torch.tensor([[*rows[i].ids, *[0] * (width - len(rows[i].ids))] for i in some])
        mask = torch.tensor([[1] * len(rows[i].ids) + [0] * (width - len(rows[i].ids)) for i in some])
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        at = [(b, p) for b, i in enumerate(some) for p in range(rows[i].answer_start, len(rows[i].ids))]
        row, place = torch.tensor(at).T
        logps = model.get_output_embeddings()(hidden[row, place - 1]).float().log_softmax(-1)
        each = logps[torch.arange(len(at)), ids[row, place]].tolist()
        for (b, _), value in zip(at, each, strict=True):
            out[some[b]] += value
    return out


def batched_texts(model: Any, words: Any, asked: Sequence[Question], new_tokens: int) -> list[str]:
    """Greedy continuations by transformers' generate, padded batches of prompts of like length."""
    prompts = [encode(words, q.text).ids for q in asked]
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))
    out = [""] * len(asked)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        width = max(len(prompts[i]) for i in some)
        ids = torch.tensor([[*[0] * (width - len(prompts[i])), *prompts[i]] for i in some])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in some])
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=words.eos_token_id
        )
        for i, row in zip(some, made[:, width:].tolist(), strict=True):
            out[i] = said(words, row)
    return out


@torch.no_grad()
def moved(model: Any, size: float) -> None:
    """Every matrix by noise of this share of its own size: what some steps of training do to it, about."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (size * parameter.std())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the CPU seconds it took."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def measured(model: Any, words: Any, asked: Sequence[Question], new_tokens: int, checkpoints: int) -> dict[str, Any]:
    """Our ways and the others on one model: ratios, CPU seconds, differences, sizes."""
    score, generate = Score(), Generate(max_new_tokens=new_tokens)
    score.read(model, words, asked[:2], 0)  # the first forwards pay for the allocator and the kernels
    generate.read(model, words, asked[:2], 0)
    plain_scores(model, words, asked[:2])
    plain_texts(model, words, asked[:1], 2)

    ours, our_score_s = timed(lambda: score.read(model, words, asked, 0))
    plain, plain_score_s = timed(lambda: plain_scores(model, words, asked))
    batched, batched_score_s = timed(lambda: batched_scores(model, words, asked))
    spoken, our_text_s = timed(lambda: generate.read(model, words, asked, 0))
    texts, plain_text_s = timed(lambda: plain_texts(model, words, asked, new_tokens))
    (lean, forwards), lean_text_s = timed(lambda: lean_texts(model, words, asked, new_tokens))
    several, several_s, together_s, prepared = [], 0.0, 0.0, Prepared()
    for _ in range(checkpoints):
        moved(model, 0.02)
        several, seconds = timed(lambda: batched_texts(model, words, asked, new_tokens))
        several_s += seconds
        both, seconds = timed(lambda: read_all((score, generate), model, words, asked, 0, prepared))
        together_s += seconds - timed(lambda: read_all((score,), model, words, asked, 0, prepared))[1]
    differs = sum(r.generated != text for r, text in zip(both, several, strict=True))

    flat = [value for pair in plain for value in pair]
    found = [value for r in ours for value in (r.logp_target, r.logp_foil)]
    n = len(asked)
    return {
        "ratio": {
            "scoring": plain_score_s / our_score_s,
            "scoring_batched": batched_score_s / our_score_s,
            "generation": plain_text_s / our_text_s,
            "generation_lean": lean_text_s / our_text_s,
            "generation_batched_over_a_run": several_s / together_s,
        },
        "max_difference": max(abs(a - b) for others in (flat, batched) for a, b in zip(found, others, strict=True)),
        "unequal_texts": sum(len({r.generated, *others}) > 1 for r, *others in zip(spoken, texts, lean, strict=True)),
        "unequal_texts_last_checkpoint": differs,
        "cpu_seconds": {
            "scoring": {"plain": plain_score_s, "batched": batched_score_s, "ours": our_score_s},
            "generation": {"plain": plain_text_s, "lean": lean_text_s, "ours": our_text_s},
            "generation_over_a_run": {"batched": several_s, "ours": together_s},
        },
        "sizes": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "questions": n,
            "checkpoints": checkpoints,
            "prompt_tokens": sum(len(encode(words, q.text).ids) for q in asked) / n,
            "target_tokens": sum(r.n_target_tokens or 0 for r in ours) / n,
            "new_tokens": new_tokens,
            "new_tokens_until_stop": forwards / n,
            "distinct_texts": len(set(texts)),
        },
        "machine": machine.about(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--model", action="append", help="toy, a fetched model or a folder; may be given several times")
    parser.add_argument("--layers", type=int, default=12, help="of the toy")
    parser.add_argument("--width", type=int, default=512, help="of the toy")
    parser.add_argument("--vocabulary", type=int, default=50257, help="of the toy")
    parser.add_argument("--edits", type=int, default=8, help="13 questions each")
    parser.add_argument("--new-tokens", type=int, default=20, help="generated a question, at most")
    parser.add_argument("--checkpoints", type=int, default=6, help="of the run over which texts are generated")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    asked = questions(args.edits, args.seed)
    results = {}
    for name, folder in machine.models(args.model).items():
        if folder is None:
            words = tokenizer([f"{q.text} {q.answer} {q.foil}" for q in asked], args.vocabulary)
            model = model_of(args.layers, args.width, args.vocabulary)
        else:
            loaded = load_model(folder, device="cpu")
            words, model = loaded.tokenizer, loaded.model
        results[name] = measured(model, words, asked, args.new_tokens, args.checkpoints)
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(f"{name}: {result['sizes']['questions']} questions; 1 thread, CPU seconds")
        for what, ratio in result["ratio"].items():
            print(f"{what:32} {ratio:6.1f} x")
        for part in sorted(result.keys() - {"ratio"}):
            print(part, json.dumps(result[part]))


if __name__ == "__main__":
    main()
