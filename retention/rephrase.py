"""Phrasings of facts by a local instruct model: what `retention rephrase` does.

The model is shown the whole sentence and asked to say it in other words that end in the same object; what ends in it,
and names the subject once, is kept without the object. So the object follows every phrasing by construction, and
nothing rests on the model's judgement of its own work. Written as JSON lines that `facts: {name: jsonl}` reads, to be
looked through by a person before they are used. Knows no editor and no probe.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention.models import Loaded, load_model
from retention.store import write_text
from retention.texts import closed, join, mentions, occurrences
from retention.types import Edit, Fact, FactPool, UserError, content_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1  # raised whenever equal arguments would give other phrasings
BATCH = 16  # facts asked about at once, and kept in the cache together
TEMPERATURE, TOP_P, NEW_TOKENS = 0.8, 0.95, 48
STOPS = ".!?。！？।۔"  # that end a sentence
LONGEST = 3  # times as many words as the direct sentence

ASKED = (
    "Say the sentence in other words. Keep the name {subject} as it is, say nothing else about it, and end with the "
    "same last words: {object}"
)
# For models without a chat template: two sentences about nobody, to be gone on from.
EXAMPLES = (
    ("The capital of Ruritania is Strelsau.", "Strelsau", "The city from which Ruritania is governed is Strelsau."),
    ("Rupert Hentzau plays the lute.", "the lute", "The instrument that Rupert Hentzau is known to play is the lute."),
)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the model said of one fact: phrasings that fit, in the order of the samples, and why others do not."""

    phrasings: tuple[str, ...]
    refused: dict[str, int]


def rephrase(
    name: str,
    pool: FactPool,
    out: Path,
    *,
    n: int,
    tries: int,
    seed: int,
    probes: bool,
    limit: int | None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask the model for phrasings of the pool's edits (or facts, where it has no edit) and write them with the facts.

    n: phrasings kept of each fact, at most; tries: samples of each. probes: they are to be asked (`paraphrases`), not
    written with (`prompts`). Equal arguments give equal files: what was sampled is kept in the cache by its content.
    Returns a report. Raises UserError for a folder in use or a pool without facts.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new file or remove it")
    edits = {edit.fact.id: edit for edit in pool.edits}
    facts = [edit.fact for edit in pool.edits] or list(pool.facts)
    facts = [fact for fact in facts if fact.target][:limit]
    if not facts:
        raise UserError("--facts: no fact has an object to end in")
    loaded = load_model(name)
    lines, refused, found = [], Counter[str](), []
    for at in range(0, len(facts), BATCH):
        some = facts[at : at + BATCH]
        told = _cached(loaded, some, edits, tries, seed, cache)
        for fact, answer in zip(some, told, strict=True):
            kept = answer.phrasings[:n]
            found.append(len(kept))
            refused.update(answer.refused)
            said = (
                replace(fact, paraphrases=(*fact.paraphrases, *kept))
                if probes
                else replace(fact, phrasings=(*fact.phrasings, *kept))
            )
            lines.append(json.dumps(record_of(said, edits.get(fact.id), pool), ensure_ascii=False))
        if progress is not None:
            progress(min(at + BATCH, len(facts)), len(facts))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(lines) + "\n")
    return {
        "facts": len(facts),
        "phrasings": sum(found),
        "with_all": sum(k == n for k in found),  # facts that have n of them
        "with_none": sum(k == 0 for k in found),
        "refused": dict(refused),
        "model": loaded.content,
        "prompt": ASKED,
        "settings": {"n": n, "tries": tries, "seed": seed, "temperature": TEMPERATURE, "top_p": TOP_P},
    }


def fitting(text: str, fact: Fact, new: str | None) -> tuple[str | None, str]:
    """(the phrasing in what the model said, "") or (None, why it is none). new: the object that an edit writes."""
    text = next((line.strip() for line in text.splitlines() if line.strip()), "")
    text = text.strip("\"'“”`*").rstrip(f" {STOPS}")
    if not text:
        return None, "said nothing"
    said = fact.target.rstrip(STOPS)
    start = text.removesuffix(said).rstrip()
    if text.split() != join(start, said, fact.joint).split():
        return None, "does not end in the object"
    if len(occurrences(start, fact.subject)) != 1:
        return None, "does not name the subject once"
    before, after = start.split(fact.subject, 1)
    phrasing = f"{before}{{}}{after}"
    if phrasing.count("{}") != 1 or "{" in before + after:
        return None, "holds braces"
    others = [fact.target, *([new] if new else [])]
    if any(mentions((before + after).lower(), word.lower()) for word in others):
        return None, "names an object before its end"
    if start.endswith((*STOPS, ":", ";")):
        return None, "ends a sentence before the object"
    if len(start.split()) > LONGEST * len(fact.text().split()):
        return None, "is too long"
    known = {p.casefold() for p in (fact.prompt, *fact.phrasings, *fact.paraphrases)}
    if phrasing.casefold() in known:
        return None, "is known already"
    return phrasing, ""


def record_of(fact: Fact, edit: Edit | None, pool: FactPool) -> dict[str, Any]:
    """A fact, its edit and its neighbors as a line that facts/jsonl.py reads."""
    near = [
        {"prompt": other.text(), "object": other.target} for other in pool.neighborhood.get(fact.id, ()) if other.target
    ]
    return {
        "id": fact.id,
        "subject": fact.subject,
        **({"relation": fact.relation} if fact.relation is not None else {}),
        "object": fact.target,
        **({"target_new": edit.target} if edit is not None else {}),
        **({"joint": fact.joint} if fact.joint is not None else {}),
        "prompts": [fact.prompt, *fact.phrasings],
        "paraphrases": list(fact.paraphrases),
        **({"neighborhood": near} if near else {}),
    }


def _cached(
    loaded: Loaded, facts: Sequence[Fact], edits: dict[str, Edit], tries: int, seed: int, cache: Path
) -> list[Told]:
    """What the model said of some facts, from the cache where it was asked the same before."""
    asked = [[f.subject, f.text(), f.target, f.phrasings, f.paraphrases] for f in facts]
    new = [edits[f.id].target if f.id in edits else None for f in facts]
    fixed = [VERSION, ASKED, EXAMPLES, TEMPERATURE, TOP_P, NEW_TOKENS, torch.__version__]
    key = content_id([fixed, loaded.content, asked, new, tries, seed], length=32)
    path = cache / f"rephrased-{key}.json"
    if path.is_file():
        return [
            Told(phrasings=tuple(t["phrasings"]), refused=t["refused"]) for t in json.loads(path.read_text("utf-8"))
        ]
    prompts = [_prompt(loaded, fact) for fact in facts]
    said = sample(loaded, prompts, tries, int(content_id([seed, asked], length=8), 16))
    told = [_told(*each) for each in zip(said, facts, new, strict=True)]
    cache.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([{"phrasings": t.phrasings, "refused": t.refused} for t in told], ensure_ascii=False))
    return told


def _told(texts: Sequence[str], fact: Fact, new: str | None) -> Told:
    found: dict[str, None] = {}
    refused: Counter[str] = Counter()
    for text in texts:
        phrasing, why = fitting(text, fact, new)
        if phrasing is None:
            refused[why] += 1
        elif phrasing in found:
            refused["is said twice"] += 1
        else:
            found[phrasing] = None
    return Told(phrasings=tuple(found), refused=dict(refused))


def _prompt(loaded: Loaded, fact: Fact) -> str:
    sentence = closed(join(fact.text(), fact.target, fact.joint))
    ask = ASKED.replace("{subject}", fact.subject).replace("{object}", fact.target)
    if loaded.tokenizer.chat_template:
        message = [{"role": "user", "content": f"{ask}.\n\nSentence: {sentence}\nIn other words:"}]
        return str(loaded.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    shown = "".join(f"Sentence: {s}\nLast words: {o}\nIn other words: {w}\n\n" for s, o, w in EXAMPLES)
    return f"{shown}Sentence: {sentence}\nLast words: {fact.target}\nIn other words:"


@torch.inference_mode()
def sample(loaded: Loaded, prompts: Sequence[str], tries: int, seed: int) -> list[list[str]]:
    """`tries` continuations of each prompt, drawn with a seed; torch's own random state stays as it was."""
    tokenizer, model = loaded.tokenizer, loaded.model
    templated = bool(tokenizer.chat_template)  # which writes its own special tokens
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prompt in prompts:  # one at a time: what is drawn for one does not hang on the others' lengths
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated)["input_ids"].to(model.device)
            ids = ids.expand(tries, -1)
            drawn = _generate(model, ids, pad)
            out.append(tokenizer.batch_decode(drawn[:, ids.shape[1] :], skip_special_tokens=True))
    return out


def _generate(model: PreTrainedModel, ids: torch.Tensor, pad: int | None) -> torch.Tensor:
    drawn = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0,
        max_new_tokens=NEW_TOKENS, pad_token_id=pad,
    )  # fmt: skip
    assert isinstance(drawn, torch.Tensor)
    return drawn
