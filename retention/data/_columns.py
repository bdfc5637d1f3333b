"""From the columns of a record to a row: prompt, completion, rejected, or text. Knows no file and no settings."""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Sequence
from typing import Any

from retention.data._records import Record
from retention.types import UserError

ROLES = {"human": "user", "gpt": "assistant"}  # of the form {"from", "value"}
ANSWERING = "assistant"


Message = dict[str, Any]  # role and content, both texts, and what else a chat template reads


class BlankText(UserError):
    """A text that a row needs is empty or null."""


def cell(record: Record, key: str, expected: str) -> Any:
    """What stands under `key`. Raises UserError with the nearest key."""
    if not isinstance(record.fields, dict) or key not in record.fields:
        have = sorted(map(str, record.fields)) if isinstance(record.fields, dict) else []
        near = difflib.get_close_matches(key, have, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; its keys are {', '.join(have) or 'none'}"
        raise record.error(f"expected {expected} under {key!r}{hint}")
    return record.fields[key]


def text_of(record: Record, key: str, *, blank: bool = False) -> str:
    """The text under `key`, as it is; a whole number is written out. `blank` allows an empty text or null."""
    value = cell(record, key, "a text")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        if blank:
            return ""
        hint = "`skip_blank: true` leaves such rows out"
        raise BlankText(str(record.error(f"expected a text under {key!r}, which is empty; {hint}")))
    if not isinstance(value, str):
        raise record.error(f"expected a text under {key!r}, not {type(value).__name__} ({str(value)[:40]!r})")
    return value


def template_columns(template: str) -> list[str]:
    """Names of the columns in a template. Raises ValueError if it is no template, or names none."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template: {error}; braces that are text are doubled: {{{{ }}}}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or any(not name or spec or conversion for _, name, spec, conversion in parts if name is not None):
        raise ValueError(
            f"template: expected names of columns in braces, such as 'Question: {{question}}'; got {template!r}"
        )
    return names


def filled(record: Record, template: str) -> str:
    """The template with the record's texts put in. A line whose columns are all empty is left out of the prompt.

    Raises BlankText if all columns of the template are empty.
    """
    lines = []
    values = {name: text_of(record, name, blank=True) for name in template_columns(template)}
    if not any(values.values()):
        raise BlankText(
            str(record.error(f"the columns {', '.join(values)} are empty; `skip_blank: true` leaves such rows out"))
        )
    for line in template.split("\n"):
        parts = list(string.Formatter().parse(line))
        names = [name for _, name, _, _ in parts if name is not None]
        if not names or any(values[name] for name in names):
            lines.append("".join(before + (values[name] if name is not None else "") for before, name, _, _ in parts))
    return "\n".join(lines)


def turns_of(record: Record, key: str) -> list[Message]:
    """Read the messages under `key`: a list of {"role", "content"}, or of {"from", "value"}.

    A message keeps what else a chat template reads of it (tool_calls, name); one that calls tools may have no content.
    """
    value = cell(record, key, "a list of messages")
    turns = []
    for number, message in enumerate(value if isinstance(value, list) else [None], 1):
        turn = _turn(message)
        if turn is None:
            raise record.error(
                f'expected a list of {{"role", "content"}} under {key!r}; message {number} is {str(message)[:60]!r}'
            )
        turns.append(turn)
    return turns


def _turn(message: Any) -> Message | None:
    """One message, its role in chat templates' words; None for anything else."""
    if not isinstance(message, dict):
        return None
    if "from" in message and "role" not in message:
        role, content, more = message["from"], message.get("value"), {}
    else:
        role, content = message.get("role"), message.get("content")
        more = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    if content is None and more.get("tool_calls"):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": ROLES.get(role, role), "content": content, **more}


def tools_of(record: Record, key: str) -> list[Any]:
    """Read the tools that a conversation may call: a list, or a list as JSON; none where it is null."""
    value = cell(record, key, "a list of tools")
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise record.error(f"expected a list of tools, or a list as JSON, under {key!r}, not {str(value)[:40]!r}")
    return found


def chat(turns: Sequence[Message]) -> str:
    """Turns as plain text, one "role: content" after another, and the role that answers next.

    A prompt's form must not depend on the model that a study puts in, so no chat template enters here.
    """
    return "\n".join([f"{turn['role']}: {said(turn)}" for turn in turns] + [f"{ANSWERING}:"])


def said(turn: Message) -> str:
    """What a message says, as plain text: its content, and the tools that it calls as JSON."""
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join(part for part in (turn["content"], calls) if part)


def conversation(record: Record, key: str) -> tuple[str, str]:
    """Prompt and completion of a conversation: the last message of the assistant is what is to be said."""
    turns = answered(record, key)
    return chat(turns[:-1]), said(turns[-1])


def answered(record: Record, key: str) -> list[Message]:
    """A conversation's turns up to the assistant's last."""
    turns = turns_of(record, key)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == ANSWERING), default=None)
    if last is None:
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns)) or "none"
        raise record.error(f"no message of role {ANSWERING!r} under {key!r}; its roles are {roles}")
    if not said(turns[last]).strip():
        raise BlankText(
            str(record.error(f"the answer under {key!r} is empty; `skip_blank: true` leaves such rows out"))
        )
    return turns[: last + 1]


def conversed(record: Record, prompt: str | None, completion: str) -> list[Message] | None:
    """The whole conversation of a row whose prompt, or preferred answer, is a list of messages; None for texts."""
    asked = turns_of(record, prompt) if prompt is not None and isinstance(record.fields[prompt], list) else []
    answer = answered(record, completion) if isinstance(record.fields[completion], list) else None
    if answer is None:
        return [*asked, {"role": ANSWERING, "content": text_of(record, completion)}] if asked else None
    if asked and answer[: len(asked)] != asked:
        return [*asked, *answer]
    if not asked and prompt is not None and len(answer) == 1:
        return None  # a text, and its answer in the form of a message
    return answer


def answer_of(record: Record, key: str) -> str:
    """A completion: a text, or the last answer of a conversation."""
    value = cell(record, key, "a text")
    return conversation(record, key)[1] if isinstance(value, list) else text_of(record, key)


def prompt_of(record: Record, key: str) -> str:
    """A prompt: a text, or a conversation that is to be answered."""
    value = cell(record, key, "a text")
    return chat(turns_of(record, key)) if isinstance(value, list) else text_of(record, key)


def common_prompt(record: Record, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, preferred and rejected completion of two texts (or conversations) that begin alike.

    Of texts, the prompt ends at the last white space that both share: a word that both answers begin with counts to it.
    """
    if isinstance(cell(record, chosen, "a text"), list):
        ours, theirs = conversation(record, chosen), conversation(record, rejected)
        if ours[0] != theirs[0]:
            raise record.error(f"the conversations under {chosen!r} and {rejected!r} differ before their last answer")
        return ours[0], ours[1], theirs[1]
    one, other = text_of(record, chosen), text_of(record, rejected)
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    at = max(
        (i for i in range(length) if one[i].isspace() and one[i + 1 :].strip() and other[i + 1 :].strip()), default=0
    )
    prompt = one[:at].rstrip()
    if not prompt:
        raise record.error(f"{chosen!r} and {rejected!r} do not begin alike; name the column of the prompt: `prompt:`")
    return prompt, one[len(prompt) :], other[len(prompt) :]


def after(record: Record, text: str, mark: str) -> str:
    """What follows the last `mark` in a text, without white space around it: the answer that can be verified."""
    _, found, answer = text.rpartition(mark)
    if not found or not answer.strip():
        raise record.error(f"expected an answer after {mark!r} (answer_after) in {text[-60:]!r}")
    return answer.strip()
