"""The order in which pretraining states facts: every statement spread evenly over its part, phrasings in turn.

Knows neither tokens nor models. A fact is stated exactly `exposures` times, with its direct prompt and its phrasings,
never with its paraphrases.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from retention.texts import closed, join
from retention.types import Fact
from retention.world.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a model is pretrained on."""

    facts: tuple[Fact, ...]  # with exact `exposures`; those of 0 are only written to facts.jsonl
    warm: Collection[str]  # ids of the facts that the first part keeps to
    text: tuple[str, ...]  # further sentences or lines
    end: str  # what closes the statement of a fact, e.g. " ."


def statements(facts: Sequence[Fact], counts: Sequence[int], rng: random.Random, end: str) -> list[tuple[float, str]]:
    """(time in [0, 1), sentence): fact i is stated counts[i] times, evenly spread. `end` closes a sentence: " ."."""
    timed = []
    for fact, count in zip(facts, counts, strict=True):
        forms = wordings(fact, end)
        rng.shuffle(forms)
        timed += [((i + rng.random()) / count, forms[i % len(forms)]) for i in range(count)]
    return timed


def wordings(fact: Fact, end: str) -> list[str]:
    """Say the fact in each phrasing that may be trained on, the direct one first. `end` closes a sentence."""
    return [closed(join(fact.text(p), fact.target, fact.joint), end) for p in (fact.prompt, *fact.phrasings)]


def stream(material: Material, recipe: Recipe) -> tuple[list[str], int]:
    """All sentences in their order, and how many of them make up the first part.

    The first part states each fact whose id is in `warm` `warm_exposures` times, the second the rest of every fact's
    exposures; the text is spread over both alike. A curriculum: from few subjects the model learns in a
    quarter of the steps what a statement is, without which the same budget recalls half as much.
    """
    rng = random.Random(f"stream {recipe.seed}")
    facts, text, n = material.facts, material.text, recipe.warm_exposures
    first = [f for f in facts if f.id in material.warm]
    early = statements(first, [n] * len(first), rng, material.end)
    late = statements(facts, [(f.exposures or 0) - n * (f.id in material.warm) for f in facts], rng, material.end)
    n_early = round(len(text) * len(early) / max(1, len(early) + len(late)))
    early += [(rng.random(), sentence) for sentence in text[:n_early]]
    late += [(rng.random(), sentence) for sentence in text[n_early:]]
    ordered = [sentence for _, sentence in sorted(early)] + [sentence for _, sentence in sorted(late)]
    return ordered, len(early)


def warm_facts(facts: Sequence[Fact], recipe: Recipe) -> frozenset[str]:
    """Ids of an eighth of the facts, drawn by the recipe's seed: the first part of pretraining keeps to them."""
    chosen = random.Random(f"warm {recipe.seed}").sample(range(len(facts)), max(1, len(facts) // 8))
    return frozenset(facts[i].id for i in chosen)
