"""Score and generate in one pass: the pass that scores the answers also checks whether the model would say them.

The answers are the first guesses of what is said, so what a model knows costs one more token a question; see `_drafts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retention.probes import generate as _generate
from retention.probes import score as _score
from retention.probes._drafts import Ids, checked, continuations_of, settle
from retention.probes._forward import max_positions
from retention.probes._prepared import Encodings, Prepared
from retention.probes._rows import Continuation
from retention.probes._twice import scores_of
from retention.types import Question, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that is asked about the questions, without the model's weights."""

    ids: tuple[str, ...]  # of the questions
    scored: _score.Asked
    continued: _generate.Asked | None
    guesses: tuple[Continuation, ...]  # the first for each prompt of `continued`
    rests: dict[Ids, Ids]  # further guesses, see `continuations_of`
    wanted: tuple[Continuation, ...]  # all that the first pass scores


def _plan(
    score: _score.Score,
    generate: _generate.Generate | None,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    limit: int | None,
    ends: frozenset[int],
) -> _Plan:
    encodings = Encodings(tokenizer, score.chat)
    scored = score.asked(questions, encodings, limit)
    continued, guesses, rests = None, [], {}
    if generate is not None:
        encodings = encodings if generate.chat == score.chat else Encodings(tokenizer, generate.chat)
        continued = generate.asked(questions, encodings, limit, ends)

        def tokens(question: Question, answer: str) -> Ids:
            """The answer's tokens after the text's; none where the two share a token."""
            before, whole = encodings(question.text).ids, encodings(question.text, answer, question.joint).ids
            return whole[len(before) :] if whole[: len(before)] == before else ()

        rests = continuations_of(
            tokens(q, answer) for q in questions for answer in (q.answer, q.foil) if answer is not None
        )
        first = {q.text: tokens(q, q.answer) for q in reversed(questions)}
        for prompt, text in zip(continued.prompts, continued.texts, strict=True):
            guesses.append(checked(prompt, (), first[text.text]))
    return _Plan(
        ids=tuple(question.id for question in questions),
        scored=scored,
        continued=continued,
        guesses=tuple(guesses),
        rests=rests,
        wanted=tuple(dict.fromkeys([*scored.continuations, *guesses])),
    )


def together(
    score: _score.Score,
    generate: _generate.Generate | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    step: int,
    prepared: Prepared,
) -> list[Reading]:
    """One reading for each question, in their order: what both probes read, each by itself, up to rounding."""
    limit, ends = max_positions(model), _generate.end_tokens(model, tokenizer)
    key = (score, generate, tokenizer, tuple(questions), limit, ends)
    plan = prepared.get("plan", key, lambda: _plan(score, generate, tokenizer, questions, limit, ends))
    read = scores_of(model, plan.wanted, plan.scored.rivals, score.tokens_per_batch, prepared, plan.guesses)
    found, scored = read.scores, plan.scored.measures(read)
    if generate is None or plan.continued is None:
        return [
            Reading(question_id=name, step=step, **measures) for name, measures in zip(plan.ids, scored, strict=True)
        ]
    said = settle(
        model,
        plan.continued.prompts,
        plan.guesses,
        found,
        plan.rests,
        tokens_per_batch=score.tokens_per_batch,
        greedy_tokens_per_batch=generate.tokens_per_batch,
    )
    return [
        Reading(
            question_id=name,
            step=step,
            **{**a, **b, "state": joined(a.get("state", "ok"), b.get("state", "ok"))},
        )
        for name, a, b in zip(plan.ids, scored, plan.continued.measures(said), strict=True)
    ]


def joined(a: str, b: str) -> str:
    """The state of a reading that two probes took: both states, where both say one."""
    return "+".join(dict.fromkeys(state for state in (a, b) if state != "ok")) or "ok"
