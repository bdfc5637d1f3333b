"""Conversations by a tokenizer's chat template: their text, their ids, and which of these the assistant says.

Knows the roles of messages and no template by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retention.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]  # role, content; also tool_calls, name and whatever else the template reads
ASSISTANT = "assistant"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in a template: the assistant says what is rendered within
STAND_IN = "\ue000"  # a private-use character, which no text has, in place of a message's content


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Token ids of a whole conversation, by the template."""

    ids: tuple[int, ...]
    said: tuple[bool, ...]  # of each token: whether the assistant says it, its end of turn included


def rendered(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, asks: bool = False, tools: Any = None
) -> str:
    """Render messages by the tokenizer's chat template; with `asks`, up to where the assistant's answer begins.

    Raises UserError where there is no template, or it refuses the messages.
    """
    _template(tokenizer, tools)
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=tools, tokenize=False, add_generation_prompt=asks
            )
        )
    except Exception as error:
        if type(error).__module__ != "jinja2.exceptions" and not isinstance(error, (TypeError, ValueError)):
            raise
        raise UserError(f"chat: the chat template refuses the messages: {error}") from None


def _template(tokenizer: PreTrainedTokenizerFast, tools: Any) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "chat: this model's tokenizer has no chat template; use a model that was trained to chat, or chat: false"
        )
    return str(tokenizer.get_chat_template(tools=tools))


def conversation(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, tools: Any = None) -> Conversation:
    """Encode a conversation as the template writes it, and find the tokens that the assistant says.

    By the template's own `{% generation %}` marks; without, by comparing the rendered conversation with its beginnings:
    the assistant says what follows the prompt for its answer, up to and with its end of turn. A token that straddles
    the border counts. Raises UserError where the template refuses the messages, leaves a text out, or writes a turn so
    differently within a conversation than at its end that it cannot be found.
    """
    text = rendered(tokenizer, messages, tools=tools)
    lost = next((what for what, times in Counter(_said(messages, tools)).items() if text.count(what) < times), None)
    if lost is not None:
        raise UserError(
            f"chat: the chat template leaves out {lost[:60]!r}: it expects contents of another form, or knows no tools"
        )
    if MARKS.search(_template(tokenizer, tools)):
        out: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=tools, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        return Conversation(ids=tuple(out["input_ids"]), said=tuple(map(bool, out["assistant_masks"])))
    spans = [
        _span(tokenizer, text, messages, number, tools)
        for number, message in enumerate(messages)
        if message.get("role") == ASSISTANT
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    said = tuple(any(b > start and a < end and b > a for start, end in spans) for a, b in encoded["offset_mapping"])
    return Conversation(ids=tuple(encoded["input_ids"]), said=said)


def _said(messages: Sequence[Message], tools: Any) -> Iterator[str]:
    """What must be found in the rendered conversation, as often as it comes.

    Templates strip texts, and may leave out what was thought before them.
    """
    for message in messages:
        content = message.get("content")
        if message.get("role") in ("system", "user", ASSISTANT) and isinstance(content, str):
            yield content.rpartition("</think>")[2].strip()
    for call in [*(tools or ()), *(call for message in messages for call in message.get("tool_calls") or ())]:
        yield str(call.get("function", call).get("name", ""))


def _span(
    tokenizer: PreTrainedTokenizerFast, text: str, messages: Sequence[Message], number: int, tools: Any
) -> tuple[int, int]:
    """Where in the rendered conversation one turn of the assistant begins and ends, in characters."""

    def shown(count: int, *, asks: bool = False, replaced: int | None = None) -> str:
        some = [dict(m) | ({"content": STAND_IN} if i == replaced else {}) for i, m in enumerate(messages[:count])]
        return rendered(tokenizer, some, asks=asks, tools=tools)

    before, asked, whole = shown(number), shown(number, asks=True), shown(number + 1)
    content = shared(shown(len(messages), replaced=number), text)
    if text.startswith(before) and text.startswith(whole):
        # Without a prompt for answers in the template, what stands before the text is nobody's.
        return content if asked == before else max(shared(asked, text), len(before)), len(whole)
    # The turn looks different at a conversation's end than within it (thoughts are left out of earlier turns). Find the
    # prompt for its answer behind its neighbor's text, and its end of turn before its other neighbor's.
    prompt = asked[shared(asked, before) :]
    at = text.rfind(prompt, 0, content + len(prompt)) if prompt else -1
    start = at + len(prompt) if at >= 0 else content
    if number + 1 == len(messages):
        return start, len(text)
    following = shared(shown(len(messages), replaced=number + 1), text)
    for end in _closings(tokenizer, shown, number, asked.removeprefix(before)):
        at = text.rfind(end, start, following) if end else -1
        if at >= 0:
            return start, at + len(end)
    raise UserError(
        "chat: this chat template ends a turn of the assistant otherwise within a conversation than at its end, so "
        "that its tokens cannot be found; use a template with {% generation %} marks, or conversations of one answer"
    )


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the beginning that two texts, or two lists of ids, have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _closings(tokenizer: PreTrainedTokenizerFast, shown: Callable[..., str], number: int, prompt: str) -> Iterator[str]:
    """What may follow a turn's text within a conversation: its end as the last turn, or before a further prompt."""
    last = shown(number + 1, replaced=number).rpartition(STAND_IN)[2]
    before_another = shown(number + 1, replaced=number, asks=True).rpartition(STAND_IN)[2].removesuffix(prompt)
    for closing in (last, last.removesuffix(str(tokenizer.eos_token)), before_another):
        yield from (closing, closing.lstrip())
