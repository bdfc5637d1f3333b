"""The score probe: log-probabilities, ranks and teacher-forced correctness of a question's answer and its foil.

Everything is read from one table of next-token log-probabilities, so that every class of fact meets the same criterion.
These readings contain CounterFact's ES, PS and NS (Meng et al. 2022, arXiv 2202.05262: target against foil) as
`prefers_target`, the first-token criterion of Wen & Zhang 2025 (arXiv 2507.14198) as `first_correct`, and the
teacher-forced exact match of the editing literature as `all_correct`. Knows no editor and no fine-tune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retention import half
from retention.probes._forward import Scores, max_positions
from retention.probes._prepared import Asking, Encodings
from retention.probes._rows import Continuation
from retention.probes._twice import Found, Pair, scores_of
from retention.types import Question, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Score(Asking):
    """Teacher-forced scoring. All questions are read together: their order and number do not change a reading."""

    name: Literal["score"] = "score"
    tokens_per_batch: int = Field(
        2048, ge=1, description="tokens in one forward pass, padding included; bounds memory, does not change readings"
    )

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        questions: Sequence[Question],
        step: int,
    ) -> list[Reading]:
        """One reading for each question, in their order.

        `logp_target` and `logp_foil` are sums over the answer's tokens in nats; a token that straddles the border of
        text and answer belongs to the answer. `lead` is the smallest, over the answer's tokens, of its logit minus the
        largest of any other token, which is the difference of their log-probabilities in nats. `all_correct` is
        lead >= 0: a token is correct when no other has a strictly larger logit, so a tie is correct, whichever of the
        two greedy decoding would choose.
        `state` is too_long where text and answer exceed the model's positions, no_tokens where the answer has no token
        or nothing stands before its first, nan_logits where a needed logit is NaN or infinite; all measures are then
        None. A token's log-probability is within 4e-5 nats of a float64 forward (see `token_scores`).
        """
        asked = self.asked(questions, Encodings(tokenizer, self.chat), max_positions(model))
        wanted = tuple(dict.fromkeys(asked.continuations))
        found = scores_of(model, wanted, asked.rivals, self.tokens_per_batch)
        return [
            Reading(question_id=question.id, step=step, **measures)
            for question, measures in zip(questions, asked.measures(found), strict=True)
        ]

    def asked(self, questions: Sequence[Question], encodings: Encodings, limit: int | None) -> Asked:
        """What is to be scored. `limit`: positions that the model has."""

        def ask(question: Question, answer: str) -> Continuation | str:
            encoded = encodings(question.text, answer, question.joint)
            if limit is not None and len(encoded.ids) > limit:
                return "too_long"
            if not 1 <= encoded.answer_start < len(encoded.ids):
                return "no_tokens"
            return Continuation(ids=encoded.ids, start=encoded.answer_start)

        return Asked(pairs=tuple((ask(q, q.answer), None if q.foil is None else ask(q, q.foil)) for q in questions))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be scored for each question: its answer and its foil, or why there is nothing to score."""

    pairs: tuple[tuple[Continuation | str, Continuation | str | None], ...]

    @property
    def continuations(self) -> list[Continuation]:
        """All that are to be scored, in the order of the questions."""
        return [c for pair in self.pairs for c in pair if isinstance(c, Continuation)]

    @property
    def rivals(self) -> list[Pair]:
        """Answers that are compared with a foil, and the foils."""
        return [(a, b) for a, b in self.pairs if isinstance(a, Continuation) and isinstance(b, Continuation)]

    def measures(self, found: Found) -> list[dict[str, Any]]:
        """The fields of a `Reading` for each question: its measures, or only its state."""
        scores = found.scores

        def of(part: Continuation | str | None) -> Scores | str | None:
            return scores[part] if isinstance(part, Continuation) else part

        return [_measures(of(answer), of(foil), found.precision(answer, foil)) for answer, foil in self.pairs]


def _measures(target: Scores | str | None, foil: Scores | str | None, precision: half.Kind) -> dict[str, Any]:
    """From the scores of an answer and a foil, or from why there are none."""
    for score in (target, foil):
        if isinstance(score, str):
            return {"state": score}
        if score is not None and not score.finite:
            return {"state": "nan_logits"}
    assert isinstance(target, Scores)
    assert not isinstance(foil, str)
    n = len(target.logps)
    return {
        "logp_target": target.logp,
        "logp_foil": None if foil is None else foil.logp,
        "precision": precision,
        "n_target_tokens": n,
        "n_foil_tokens": None if foil is None else len(foil.logps),
        "target_rank": target.ranks[0],
        "first_correct": target.ranks[0] == 1,
        "all_correct": min(target.leads) >= 0,
        "lead": min(target.leads),
        "prefers_target": None if foil is None else target.logp / n > foil.logp / len(foil.logps),
    }
