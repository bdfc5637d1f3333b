"""Scores in bfloat16, and in float32 wherever the rounding could change what is right.

How large the rounding is, is measured on continuations that are read in both. Knows nothing of questions and facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retention import half
from retention.probes._forward import Scores, token_scores
from retention.probes._prepared import Prepared
from retention.probes._rows import Continuation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[Continuation, Continuation]  # of which the one with the larger mean log-probability is asked for
SAMPLE = 48  # continuations, spread evenly, that are always read in both
MARGIN = 2.0  # times the largest error seen: what is closer than that to a border is read again


@dataclass(frozen=True, kw_only=True)
class Found:
    """Scores of continuations, and which of them are float32's."""

    scores: Mapping[Continuation, Scores]
    exact: frozenset[Continuation]

    def precision(self, *parts: object) -> half.Kind:
        """The precision of what is computed from some continuations; anything else has none."""
        return "float32" if all(c in self.exact for c in parts if isinstance(c, Continuation)) else "bfloat16"


def scores_of(
    model: PreTrainedModel,
    wanted: Sequence[Continuation],
    pairs: Sequence[Pair],
    tokens_per_batch: int,
    prepared: Prepared | None = None,
    said: Sequence[Continuation] = (),
) -> Found:
    """`token_scores`, in the precision that `half.reading` asks for.

    said: continuations of which the most probable tokens are asked for.

    In bfloat16 the sign of each lead, and of each pair's difference of mean log-probabilities, is float32's, unless a
    rounding error is over twice as large as all that were seen; so are the most probable tokens of what is `said`.
    Other ranks than the first may differ.
    """
    wanted = tuple(wanted)
    if half.of_readings() == "float32":
        scores = token_scores(model, wanted, tokens_per_batch, prepared)
        return Found(scores=dict(zip(wanted, scores, strict=True)), exact=frozenset(wanted))
    with half.products("bfloat16", model):
        first = token_scores(model, wanted, tokens_per_batch, prepared, with_gaps=True)
    quick, spoken = dict(zip(wanted, first, strict=True)), frozenset(said)
    exact: dict[Continuation, Scores] = {}
    ask = {*wanted[:: max(1, len(wanted) // SAMPLE)], *(c for c in wanted if not quick[c].finite)}
    ask |= {c for pair in pairs if ask & {*pair} for c in pair}
    while ask:
        some = [c for c in wanted if c in ask]
        exact |= zip(some, token_scores(model, some, tokens_per_batch, with_gaps=True), strict=True)
        of_leads = MARGIN * max(_apart(quick[c], exact[c]) for c in exact)
        both = [pair for pair in pairs if pair[0] in exact and pair[1] in exact]
        of_pairs = MARGIN * max((abs(_ahead(quick, p) - _ahead(exact, p)) for p in both), default=0.0)
        ask = {c for c in wanted if c not in exact and _nearest(quick[c], c in spoken) <= of_leads}
        close = (p for p in pairs if abs(_ahead(quick, p)) <= of_pairs)
        ask |= {c for pair in close for c in pair if c not in exact}
    half.count(len(wanted), len(exact))
    return Found(scores=quick | exact, exact=frozenset(exact))


def _nearest(scores: Scores, said: bool) -> float:
    """How close a continuation is to being right where it is wrong, or to being said otherwise; nats."""
    return min([abs(lead) for lead in scores.leads] + (list(scores.gaps) if said else []))


def _apart(quick: Scores, exact: Scores) -> float:
    """The largest error of a lead, nats."""
    errors = [abs(a - b) for a, b in zip(quick.leads, exact.leads, strict=True)]
    for a, b, one, other in zip(quick.gaps, exact.gaps, quick.best, exact.best, strict=True):
        errors.append(abs(a - b) if one == other else a + b)  # another token is in front: this one has lost both
    return max((error for error in errors if not math.isnan(error)), default=0.0)  # others are read again in any case


def _ahead(scores: Mapping[Continuation, Scores], pair: Pair) -> float:
    """By how much the first of a pair is ahead of the second, nats a token."""
    first, second = (scores[c].logp / len(scores[c].logps) for c in pair)
    return first - second
