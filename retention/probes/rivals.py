"""The strongest rival of an answer: the object that the base model finds most likely besides it.

It is the foil of facts that have no old or new object of their own. Read once, from the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from retention.probes._forward import max_positions, token_scores
from retention.probes._rows import Continuation
from retention.tokens import encode
from retention.types import Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHORTLIST = 4  # objects that are scored in full: those whose first tokens are the most likely


def rivals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[tuple[Question, Sequence[str]]],
    *,
    tokens_per_batch: int = 2048,
    chat: bool = False,
) -> list[str | None]:
    """For each question and its objects: the object other than the answer with the largest log-probability a token.

    Only the few objects whose first tokens are the most likely are scored in full. None where there is no other object,
    or no text with an object fits into the model. chat: the texts are put as a user's turn.
    """
    limit = max_positions(model)
    candidates: list[dict[str, Continuation]] = []  # of each question: object -> text and object
    for question, objects in asked:
        candidates.append({})
        for name in dict.fromkeys(objects):
            if name == question.answer:
                continue
            encoded = encode(tokenizer, question.text, name, joint=question.joint, chat=chat)
            if 1 <= encoded.answer_start < len(encoded.ids) and (limit is None or len(encoded.ids) <= limit):
                candidates[-1][name] = Continuation(ids=encoded.ids, start=encoded.answer_start)

    def scores(wanted: Iterable[Continuation]) -> dict[Continuation, float]:
        distinct = list(dict.fromkeys(wanted))
        found = zip(distinct, token_scores(model, distinct, tokens_per_batch), strict=True)
        return {c: score.logp / (len(c.ids) - c.start) for c, score in found}

    def best(of: dict[str, Continuation], score: Callable[[Continuation], float]) -> list[str]:
        """The objects, the likeliest first; ties are broken by name, so that the choice is the same on every run."""
        return sorted(of, key=lambda name: (-score(of[name]), name))

    first = scores(_begun(c) for of in candidates for c in of.values())
    short = [{name: of[name] for name in best(of, lambda c: first[_begun(c)])[:SHORTLIST]} for of in candidates]
    full = scores(c for of in short for c in of.values())
    return [max(((full[c], name) for name, c in of.items()), default=(0.0, None))[1] for of in short]


def _begun(c: Continuation) -> Continuation:
    """The text with the first token of the object alone: objects that share it share its score."""
    return Continuation(ids=c.ids[: c.start + 1], start=c.start)
