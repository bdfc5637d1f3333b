"""The strongest rival of an answer: the object that the base model finds most likely besides it.

It is the foil of facts that have no old or new object of their own. Read once, from the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retention.probes._forward import max_positions, token_scores
from retention.probes._rows import Continuation
from retention.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHORTLIST = 4  # objects that are scored in full: those whose first tokens are the most likely


def rivals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[tuple[str, str, tuple[str, ...]]],
    *,
    tokens_per_batch: int = 2048,
    chat: bool = False,
) -> list[str | None]:
    """For each (text, answer, objects): the object other than the answer with the largest log-probability a token.

    Only the few objects whose first tokens are the most likely are scored in full. None where there is no other object,
    or no text with an object fits into the model. chat: the texts are put as a user's turn.
    """
    limit = max_positions(model)
    firsts: dict[tuple[str, str], Continuation] = {}
    for text, answer, objects in asked:
        for name in objects:
            if name == answer or (text, name) in firsts:
                continue
            encoded = encode(tokenizer, text, name, chat=chat)
            if 1 <= encoded.answer_start < len(encoded.ids) and (limit is None or len(encoded.ids) <= limit):
                firsts[text, name] = Continuation(ids=encoded.ids, start=encoded.answer_start)

    def scores(wanted: dict[tuple[str, str], Continuation]) -> dict[tuple[str, str], float]:
        distinct = list(dict.fromkeys(wanted.values()))
        found = dict(zip(distinct, token_scores(model, distinct, tokens_per_batch), strict=True))
        return {pair: found[c].logp / (len(c.ids) - c.start) for pair, c in wanted.items()}

    first = scores({pair: Continuation(ids=c.ids[: c.start + 1], start=c.start) for pair, c in firsts.items()})
    # Ties (objects that share a first token) are broken by name, so that the choice is the same on every run.
    short = {
        (text, answer): sorted((o for o in objects if (text, o) in first), key=lambda o: (-first[text, o], o))[
            :SHORTLIST
        ]
        for text, answer, objects in asked
    }
    full = scores({(text, o): firsts[text, o] for (text, _), few in short.items() for o in few})
    return [max(short[text, answer], key=lambda o: (full[text, o], o), default=None) for text, answer, _ in asked]
