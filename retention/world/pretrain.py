"""Pretrain a tiny model on stated facts and write it as an ordinary Hugging Face folder.

The folder: config.json, model.safetensors (float32), tokenizer files, corpus.txt (sentences of the pretraining stream,
one a line, for the covariance of keys), facts.jsonl (every fact, its trained and its held-out phrasings) and, written
last, world.json (settings, recall on held-out phrasings, CPU seconds). Knows the world only by the facts it is given.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retention.types import Fact
from retention.world.settings import Recipe
from retention.world.stream import Material, stream
from retention.world.train import Progress, batches, documents, new_model, one_thread, recall, train

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REPORT = "world.json"
CORPUS_SENTENCES = 6000  # about 60,000 tokens


def pretrain(
    material: Material,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    recipe: Recipe,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pretrain on the material and fill the folder `out`; returns what world.json says.

    Deterministic: equal arguments give bit-identical weights. One thread; torch's threads and RNG stay as they were.
    """
    with one_thread():
        started = time.process_time()
        sentences, n_first = stream(material, recipe)
        ids = tokenizer(sentences, add_special_tokens=False)["input_ids"]
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        assert isinstance(bos, int)
        assert isinstance(eos, int)
        assert isinstance(pad, int)
        data = []
        for part in (ids[:n_first], ids[n_first:]):
            data += batches(documents(part, recipe, bos, eos), recipe, pad)
        model = new_model(recipe, tokenizer)
        loss = train(model, data, recipe, pad, progress)
        trained = time.process_time() - started
        report = {
            "recall": recall_by_class(model, tokenizer, material.facts),
            "steps": len(data),
            "tokens": sum(map(len, ids)),
            "sentences": len(sentences),
            "final_loss": loss,  # nats a token
            "parameters": sum(p.numel() for p in model.parameters()),
            "cpu_seconds": round(trained, 1),
            "settings": dict(settings if settings is not None else recipe.model_dump()),
        }
    write_model(out, model, tokenizer, sentences, material.facts, recipe.seed, report)
    return report


def write_model(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[str],
    facts: Sequence[Fact],
    seed: int,
    report: Mapping[str, Any],
) -> None:
    """Fill a folder with the model, its tokenizer, some of its texts, its facts and the report."""
    with _quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chosen = random.Random(f"corpus {seed}").sample(sentences, min(CORPUS_SENTENCES, len(sentences)))
    (folder / "corpus.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    lines = [json.dumps(fact_record(fact), ensure_ascii=False) for fact in facts]
    (folder / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fact_record(fact: Fact) -> dict[str, Any]:
    """A line of facts.jsonl: `templates` were trained (the first is the direct one), `held_out` never."""
    return {
        "id": fact.id,
        "subject": fact.subject,
        **({"relation": fact.relation} if fact.relation is not None else {}),
        "object": fact.target,
        "templates": [fact.prompt, *fact.phrasings],
        "held_out": list(fact.paraphrases),
        "exposures": fact.exposures,
        "tags": sorted(fact.tags),
        **({"joint": fact.joint} if fact.joint is not None else {}),
    }


def recall_by_class(model: Any, tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact]) -> dict[str, Any]:
    """Share of held-out phrasings (and of direct prompts) answered right, overall and by class of facts.

    Classes: each tag, and the graded facts by their exposures. Facts without held-out phrasings count as `direct`.
    """
    questions = [(fact, form, fact.text(form)) for fact in facts for form in (fact.prompt, *fact.paraphrases)]
    right = recall(model, tokenizer, [(text, fact.target, fact.joint) for fact, _, text in questions])
    groups: dict[str, dict[str, list[bool]]] = {}
    for (fact, form, _), correct in zip(questions, right, strict=True):
        names = {"all", *fact.tags} | ({f"graded_{fact.exposures}"} if "graded" in fact.tags else set())
        if not fact.exposures:
            names.discard("all")
        for name in names:
            kind = "direct" if form == fact.prompt else "held_out"
            groups.setdefault(name, {}).setdefault(kind, []).append(correct)
    return {
        name: {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(kinds.items())}
        for name, kinds in sorted(groups.items())
    }
