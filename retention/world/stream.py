"""The order in which pretraining states facts: every statement spread evenly over its part, phrasings in turn.

Knows neither tokens nor models. A fact is stated exactly `exposures` times, with its direct prompt and its phrasings,
never with its paraphrases.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from retention.types import Fact


def statements(facts: Sequence[Fact], counts: Sequence[int], rng: random.Random, end: str) -> list[tuple[float, str]]:
    """(time in [0, 1), sentence): fact i is stated counts[i] times, evenly spread. `end` closes a sentence: " ."."""
    timed = []
    for fact, count in zip(facts, counts, strict=True):
        forms = [fact.prompt, *fact.phrasings]
        rng.shuffle(forms)
        for i in range(count):
            sentence = f"{fact.text(forms[i % len(forms)])} {fact.target}{end}"
            timed.append(((i + rng.random()) / count, sentence))
    return timed


def stream(
    facts: Sequence[Fact], warm: Collection[str], warm_exposures: int, filler: Sequence[str], *, seed: int, end: str
) -> tuple[list[str], int]:
    """All sentences in their order, and how many of them make up the first part.

    The first part states each fact whose id is in `warm` `warm_exposures` times; the rest of every fact's exposures and
    the filler follow, the filler spread over both parts alike. A curriculum: from few subjects the model learns in a
    quarter of the steps what a statement is, without which the same budget recalls half as much.
    """
    rng = random.Random(f"stream {seed}")
    first = [f for f in facts if f.id in warm]
    early = statements(first, [warm_exposures] * len(first), rng, end)
    late = statements(facts, [(f.exposures or 0) - warm_exposures * (f.id in warm) for f in facts], rng, end)
    n_early = round(len(filler) * len(early) / max(1, len(early) + len(late)))
    early += [(rng.random(), sentence) for sentence in filler[:n_early]]
    late += [(rng.random(), sentence) for sentence in filler[n_early:]]
    ordered = [sentence for _, sentence in sorted(early)] + [sentence for _, sentence in sorted(late)]
    return ordered, len(early)
