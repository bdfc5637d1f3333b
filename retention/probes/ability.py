"""What a model can do apart from facts: loss and accuracy on rows of a task that it was not trained on.

Knows no task: a row is a prompt and its completion, or a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retention import half
from retention.probes._forward import max_positions, token_scores
from retention.probes._prepared import Prepared
from retention.probes._rows import Continuation
from retention.tokens import encode, encode_turns
from retention.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which tokens of a row training sees, and how many rows are read. By default all of both."""

    length: int | None = None  # tokens of a row at most
    end: bool = False  # the end of a longer row is trained on, not its start
    whole: bool = False  # a prompt is trained on as well as its completion
    tokens: int | None = None  # rows are read in their order until so many tokens count

    def __call__(self, ids: tuple[int, ...], start: int) -> tuple[tuple[int, ...], int]:
        """A row and where its completion begins, cut."""
        if self.length is None or len(ids) <= self.length:
            return ids, start
        if self.end:
            return ids[-self.length :], max(1, start - (len(ids) - self.length))
        return ids[: self.length], start


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Held-out loss and accuracy of one model on one task."""

    loss: float | None  # mean over all counted tokens, nats a token; None where `state` is not ok
    accuracy: float | None  # share of rows with every completion token the argmax (teacher-forced); None for texts
    n_rows: int  # rows that count
    n_tokens: int  # tokens that count: of the completion, or of the text but its first
    n_skipped: int  # rows that do not fit into the model's positions, or hold no token to count
    state: str = "ok"  # nan_logits: a logit is NaN or infinite; no_rows: every row was skipped


def heldout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokens_per_batch: int = 2048,
    prepared: Prepared | None = None,
    chat: bool = False,
    cut: Cut = Cut(),
) -> Heldout:
    """Read the rows, all {"prompt", "completion"} (as `retention.tokens.encode` puts them) or all {"text"}.

    Of a completion all tokens count that `cut` leaves, no end-of-text token is added; a text is cut at the model's
    positions, a completion that does not fit, or of which nothing is left, is skipped. Equal rows count as often as
    they occur. Deterministic; leaves the model, its modes and the RNG as they were. `prepared` as in
    `retention.probes.read_all`, and it may be the same one. Raises UserError for rows of another form.
    """
    limit = max_positions(model)
    asked = (Prepared() if prepared is None else prepared).get(
        "held-out", (tokenizer, tuple(rows), limit, chat, cut), lambda: _asked(tokenizer, rows, limit, chat, cut)
    )
    continuations, answers, skipped = asked.continuations, asked.answers, asked.skipped
    texts = {isinstance(row.get("text"), str) for row in rows}
    if len(texts) > 1:
        raise UserError('held-out rows: some hold "text" and others "prompt" and "completion"; give one form')
    if not continuations:
        return Heldout(loss=None, accuracy=None, n_rows=0, n_tokens=0, n_skipped=skipped, state="no_rows")
    with half.products(half.of_readings(), model):
        scores = token_scores(model, continuations, tokens_per_batch, prepared, "held-out rows")
    n_tokens = sum(len(score.logps) for score in scores)
    if not all(score.finite for score in scores):
        return Heldout(
            loss=None, accuracy=None, n_rows=len(scores), n_tokens=n_tokens, n_skipped=skipped, state="nan_logits"
        )
    right = sum(all(rank == 1 for rank in score.ranks[answer:]) for score, answer in zip(scores, answers, strict=True))
    return Heldout(
        loss=-math.fsum(score.logp for score in scores) / n_tokens,
        accuracy=None if texts == {True} else right / len(scores),
        n_rows=len(scores),
        n_tokens=n_tokens,
        n_skipped=skipped,
    )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is scored of the rows that are read."""

    continuations: tuple[Continuation, ...]
    answers: tuple[int, ...]  # how many of its tokens stand before the completion
    skipped: int  # rows before the last one of which nothing is


def _asked(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]], limit: int | None, chat: bool, cut: Cut
) -> _Asked:
    continuations: list[Continuation] = []
    answers: list[int] = []
    skipped = counted = 0
    for number, row in enumerate(rows):
        if cut.tokens is not None and counted >= cut.tokens:
            break
        if isinstance(row.get("text"), str):
            ids, start = cut(encode(tokenizer, row["text"]).ids, 1)
            ids = ids[:limit]
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            if chat and row.get("messages"):
                encoded = encode_turns(tokenizer, row["messages"], tools=row.get("tools"))
            else:
                encoded = encode(tokenizer, row["prompt"], row["completion"], joint=row.get("joint"), chat=chat)
            ids, start = cut(encoded.ids, encoded.answer_start)
        else:
            raise UserError(
                f'held-out row {number}: expected the texts "prompt" and "completion", or "text"; got {sorted(row)}'
            )
        if 1 <= start < len(ids) and (limit is None or len(ids) <= limit):
            first = 1 if cut.whole else start
            continuations.append(Continuation(ids=ids, start=first))
            answers.append(start - first)
            counted += len(ids) - first
        else:
            skipped += 1
    return _Asked(continuations=tuple(continuations), answers=tuple(answers), skipped=skipped)
