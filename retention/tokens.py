"""Texts to token ids, with the places that editing and probing need: where an answer starts, where a subject ends.

All places come from the tokenizer's own character offsets of the whole string, so that BOS tokens, leading spaces and
merges across the border of prompt and answer cannot shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retention.chats import ASSISTANT, Message, rendered
from retention.texts import Joint, join
from retention.types import UserError, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of a prompt followed by an answer."""

    ids: tuple[int, ...]
    answer_start: int  # index of the first token that holds a character of the answer; len(ids) without an answer


def _encode(
    tokenizer: PreTrainedTokenizerFast, text: str, *, special: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer")
    out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids, offsets = list(out["input_ids"]), list(out["offset_mapping"])
    # A tokenizer that appends EOS would put it between the prompt and what the model should say next.
    while ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        if offsets[-1][0] != offsets[-1][1]:
            break
        ids.pop()
        offsets.pop()
    return ids, offsets


def turn(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The text as a user's turn in the tokenizer's chat template, up to where the model's answer begins.

    With the BOS token if the template writes one: it is to be encoded as it is, as trl does for training. Raises
    UserError if there is no template.
    """
    return rendered(tokenizer, [_user(text)], asks=True)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text.strip()}


def encode_turns(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, tools: Any = None, joint: Joint | None = None
) -> Encoded:
    """Encode a conversation up to the text of its last message, the answer, as the tokenizer's chat template writes it.

    The answer follows the white space, or none, that the template puts before replies; joined as elsewhere where it
    writes a reply otherwise than it asks for one.
    """
    answer = str(messages[-1].get("content") or "").strip()
    said = [*messages[:-1], {**messages[-1], "content": answer}]
    asked = rendered(tokenizer, said[:-1], asks=True, tools=tools)
    whole = rendered(tokenizer, said, tools=tools)
    gap, found, _ = whole.removeprefix(asked).partition(answer or "\n")
    text = asked + gap + answer if whole.startswith(asked) and found and not gap.strip() else join(asked, answer, joint)
    return _answered(tokenizer, text, len(asked), special=False)


def _answered(tokenizer: PreTrainedTokenizerFast, text: str, border: int, *, special: bool) -> Encoded:
    ids, offsets = _encode(tokenizer, text, special=special)
    start = next((i for i, (a, b) in enumerate(offsets) if b > border and b > a), len(ids))
    # A token that is only the space between the two belongs to the prompt's side of nothing: count it with the answer.
    return Encoded(ids=tuple(ids), answer_start=start)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    answer: str | None = None,
    *,
    joint: Joint | None = None,
    chat: bool = False,
) -> Encoded:
    """Encode `prompt`, or prompt and answer as one string. A token that straddles the border belongs to the answer.

    joint: what parts them; None: what their scripts want (`texts.join`).
    chat: the prompt is a user's turn, the answer the reply, as the tokenizer's chat template writes them.
    """
    if chat and answer is not None:
        return encode_turns(tokenizer, [_user(prompt), {"role": ASSISTANT, "content": answer}], joint=joint)
    if answer is None:
        ids, _ = _encode(tokenizer, turn(tokenizer, prompt) if chat else prompt, special=not chat)
        return Encoded(ids=tuple(ids), answer_start=len(ids))
    return _answered(tokenizer, join(prompt, answer, joint), len(prompt), special=True)


def subject_span(
    tokenizer: PreTrainedTokenizerFast,
    phrasing: str,
    subject: str,
    prefix: str = "",
    answer: str | None = None,
    joint: Joint | None = None,
) -> range:
    """Indices of the tokens that hold a character of the subject in prefix + phrasing with `{}` filled in.

    They are the same whatever follows, unless the subject's last characters merge with what comes after them, so
    callers give the `answer` (and its `joint`) that they will run. Raises UserError if the subject has no token.
    """
    before = phrasing.partition("{}")[0]
    text = prefix + fill(phrasing, subject)
    _, offsets = _encode(tokenizer, text if answer is None else join(text, answer, joint))
    first, last = len(prefix + before), len(prefix + before + subject)
    inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first and b > a]
    if not inside:
        raise UserError(f"the subject {subject!r} has no token in {text!r}")
    return range(inside[0], inside[-1] + 1)


def subject_last(
    tokenizer: PreTrainedTokenizerFast,
    phrasing: str,
    subject: str,
    prefix: str = "",
    answer: str | None = None,
    joint: Joint | None = None,
) -> int:
    """Index of the subject's last token; see `subject_span`."""
    return subject_span(tokenizer, phrasing, subject, prefix, answer, joint)[-1]
