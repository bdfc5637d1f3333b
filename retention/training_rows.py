"""A fine-tune's rows as its trainer gets them, and the count of what the tokens' limit cuts or leaves nothing of.

What is trained by next tokens (sft, clm) is encoded here, with labels; of other objectives' rows the lengths are
measured as their trainers measure them, so that none drops a row in silence. Knows no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retention.chats import ASSISTANT, Conversation, conversation, rendered, shared
from retention.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from retention.objectives import Objective

Columns = Mapping[str, Any]
ANSWERS = ("completion", "chosen", "rejected")  # columns that follow a prompt
IGNORED = -100  # label of a token that is not learned


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Rows of the trainer on their way into training; `rows` is the sum of `lost`, `empty` and `left`."""

    rows: int  # that the objective makes of the task's rows
    lost: int  # left out: the prompt fills max_length, so that nothing of the answer is left to learn
    empty: int  # left out: they hold no token to learn
    cut: int  # among `left`: shortened to max_length
    left: int  # trained on
    packs: int | None = None  # rows that the trainer has made of those left, several in one

    def refuse(self, share: float, limit: int | None) -> None:
        """Raise UserError where nothing, or less than `share` of the rows, is left to train on."""
        if self.left and self.left >= share * self.rows:
            return
        parts = {"a prompt that fills max_length": self.lost, "nothing to learn": self.empty}
        told = ", ".join(f"{n} have {what}" for what, n in parts.items() if n)
        raise UserError(
            f"tune.data: {self.left} of {self.rows} rows are left to train on ({told}); raise "
            f"tune.trainer.max_length (now {limit}), use shorter rows"
            + (f", or a lower tune.min_share (now {share:g})" if self.left else "")
        )

    def told(self, limit: int | None) -> str | None:
        """Say in one line what is lost or cut; None where every row is whole."""
        said = [
            text
            for n, text in (
                (self.lost, f"{self.lost} left out (the prompt fills max_length)"),
                (self.empty, f"{self.empty} left out (nothing to learn)"),
                (self.cut, f"{self.cut} cut off"),
            )
            if n
        ]
        return f"of {self.rows} rows {', '.join(said)}; tune.trainer.max_length is {limit}" if said else None


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """What the trainer's dataset is made of."""

    columns: list[dict[str, Any]]
    counts: RowCounts
    source: list[dict[str, Any]]  # the task's rows that they are made of


def turned(columns: Columns, row: Mapping[str, Any]) -> dict[str, Any]:
    """Put one of the trainer's rows into turns: the row's own messages, or its prompt as the user's.

    A conversation that is learned whole becomes `messages`; one that is compared keeps its prompt and its answers.
    """
    own = row.get("messages")
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    if "messages" in columns:
        return {**columns, **tools}
    if "prompt" not in columns:
        raise UserError("tune.chat: the data have plain text; use rows with prompts and completions, or with messages")
    earlier = list(own[:-1]) if own else [{"role": "user", "content": columns["prompt"].strip()}]
    said = {name: [{"role": ASSISTANT, "content": columns[name].strip()}] for name in ANSWERS if name in columns}
    if set(columns) == {"prompt", "completion"}:
        return {"messages": list(own) if own else [*earlier, *said["completion"]], **tools}
    if tools or any("tool_calls" in message for message in earlier):
        raise UserError("tune.chat: conversations with tools can be trained on by sft only")
    return {**columns, "prompt": earlier, **said}


def training_rows(
    rows: Sequence[Mapping[str, Any]],
    objective: Objective,
    tokenizer: PreTrainedTokenizerFast,
    arguments: Mapping[str, Any],
    *,
    chat: bool = False,
    positions: int | None = None,
) -> TrainingRows:
    """Make the trainer's rows of the task's, encoded where the trainer learns next tokens; count what is cut and lost.

    arguments: all of the trainer's, see `trainer_fields.arguments_of`. Plain texts end with the end-of-text token.
    positions: of the model. Raises UserError where a row lacks what the objective trains on, is longer than the model
    has positions, or is refused by the chat template.
    """
    if (arguments.get("max_length") or math.inf) <= tokenizer.model_max_length:
        # Rows are encoded whole before they are cut: transformers would say that the model cannot read them.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    made: list[dict[str, Any]] = []
    source: list[dict[str, Any]] = []
    tally = dict.fromkeys(("rows", "lost", "empty", "cut"), 0)
    fit = _learned if objective.learns_tokens else _compared
    for row in rows:
        objective.check(row)
        found = [
            fit(turned(columns, row) if chat else dict(columns), tokenizer, arguments)
            for columns in objective.columns(row)
        ]
        if positions is not None and (longest := max(one.length for one in found)) > positions:
            raise UserError(
                f"tune.data: a row takes {longest} tokens, and the model has {positions} positions; use "
                f"tune.trainer.max_length: {positions}, or shorter rows and answers"
            )
        for one in found:
            tally["rows"] += 1
            tally[one.state] = tally.get(one.state, 0) + 1
            if one.columns is not None:
                made.append(one.columns)
        source += [dict(row)] if any(one.columns is not None for one in found) else []
    counts = RowCounts(**{name: tally[name] for name in ("rows", "lost", "empty", "cut")}, left=len(made))
    return TrainingRows(columns=made, counts=counts, source=source)


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """A row of the trainer within the limit of tokens."""

    columns: dict[str, Any] | None  # None: left out
    state: str  # lost, empty, cut or whole
    length: int = 0  # tokens, where it was measured


def _learned(columns: Columns, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any]) -> _Fitted:
    """A row that is learned token by token: its ids, and as labels those of the tokens that are learned."""
    if "messages" in columns:
        found = conversation(tokenizer, columns["messages"], tools=columns.get("tools"))
    else:
        found = _plain(columns, tokenizer, arguments)
    every = not arguments["completion_only_loss"]
    labels = [i if every or said else IGNORED for i, said in zip(found.ids, found.said, strict=True)]
    ids, limit, state = list(found.ids), arguments.get("max_length"), "whole"
    goes_on = arguments.get("packing") and arguments["packing_strategy"] != "bfd"  # in the next row
    if limit is not None and len(ids) > limit and not goes_on:
        state = "cut"
        from_end = arguments.get("truncation_mode") == "keep_end" and not arguments.get("packing")
        ids, labels = (part[-limit:] if from_end else part[:limit] for part in (ids, labels))
    if all(label == IGNORED for label in labels[1:]):  # the first token is predicted from nothing
        return _Fitted(columns=None, state="lost" if state == "cut" else "empty")
    length = min(len(ids), limit) if limit is not None else len(ids)
    return _Fitted(columns={"input_ids": ids, "labels": labels}, state=state, length=length)


def _plain(columns: Columns, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any]) -> Conversation:
    """A text, or a prompt and its completion as one text, closed by the end-of-text token."""
    end = arguments.get("eos_token") or tokenizer.eos_token or ""
    prompt, text = columns.get("prompt"), columns.get("text")
    whole = text if text is not None else columns["prompt"] + columns["completion"]
    ids = tokenizer(whole if whole.endswith(end) else whole + end)["input_ids"]
    start = 0 if prompt is None else shared(tokenizer(prompt)["input_ids"], ids)
    return Conversation(ids=tuple(ids), said=tuple(i >= start for i in range(len(ids))))


def _compared(columns: Columns, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any]) -> _Fitted:
    """A row that its trainer encodes: a prompt with answers to compare, or one that answers are drawn to.

    Measured only: the trainer encodes it likewise.
    """
    limit, prompt = arguments.get("max_length"), columns["prompt"]
    turns = not isinstance(prompt, str)
    asked = rendered(tokenizer, prompt, asks=True) if turns else prompt
    wholes = [
        rendered(tokenizer, [*prompt, *columns[name]]) if turns else prompt + columns[name]
        for name in ANSWERS
        if name in columns
    ]

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=not turns)["input_ids"])

    if not wholes:  # answers are drawn, and no trainer cuts a prompt
        return _Fitted(
            columns=dict(columns), state="whole", length=len(encoded(asked)) + arguments["max_completion_length"]
        )
    ids = [encoded(whole) for whole in wholes]
    length = max(map(len, ids)) + (not turns)  # the end-of-text token
    state = "whole"
    if limit is not None and length > limit:
        prompt_length = min(shared(encoded(asked), each) for each in ids)
        if prompt_length >= limit and arguments.get("truncation_mode") != "keep_end":
            return _Fitted(columns=None, state="lost")
        state, length = "cut", limit
    return _Fitted(columns=dict(columns), state=state, length=length)
