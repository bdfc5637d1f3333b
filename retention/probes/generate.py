"""The generate probe: what the model says after a question, greedily, and whether that is the answer.

Ends at ".", newline or end of text, as WILD does (Yang et al. 2025, arXiv 2502.11177), where "." means the full stop
of any script (。 । ۔ ...; Thai and Lao have none). Judged by normalised equality and by the substring test of Wen &
Zhang 2025 (arXiv 2507.14198). Knows no editor and no fine-tune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retention.probes._decode import Continued, Prompt, greedy
from retention.probes._forward import max_positions
from retention.probes._prepared import Asking, Encodings
from retention.texts import FULL_STOP, full_stops, normalise
from retention.types import Question, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPARE_TOKENS = 4  # beyond the longest answer: room for "the", a title, an end of sentence


class Generate(Asking):
    """Greedy decoding with a cache, all questions in step; each text and way of stopping is decoded once."""

    name: Literal["generate"] = "generate"
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens generated at most; left out: those of the longest answer among the questions, and 4 more",
    )
    stop: tuple[str, ...] = Field(
        (FULL_STOP, "\n"),
        description='strings that end a text; it is cut before the first. "." means the full stop of any script',
    )
    tokens_per_batch: int = Field(
        8192, ge=1, description="places in one batch, prompts and new tokens; bounds memory, does not change readings"
    )

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        questions: Sequence[Question],
        step: int,
    ) -> list[Reading]:
        """One reading for each question, in their order.

        `generated` is the text after the question up to the first stop string or end-of-text token, white space
        stripped. A stop string that occurs in the answer itself ("St. Louis") does not end a text shorter than the
        answer. `gen_exact`: equal to the answer after `normalise`; `gen_contains`: the normalised answer is a plain
        substring of it, word borders or not. `state` is too_long where question and new tokens exceed the model's
        positions, no_tokens for a text without tokens, nan_logits where a logit on the way is NaN or infinite.
        """
        asked = self.asked(
            questions, Encodings(tokenizer, self.chat), max_positions(model), end_tokens(model, tokenizer)
        )
        said = greedy(model, asked.prompts, self.tokens_per_batch)
        return [
            Reading(question_id=question.id, step=step, **measures)
            for question, measures in zip(questions, asked.measures(said), strict=True)
        ]

    def asked(
        self, questions: Sequence[Question], encodings: Encodings, limit: int | None, ends: frozenset[int]
    ) -> Asked:
        """What is to be continued. `limit`: positions that the model has; `ends`: tokens that end a text."""
        new_tokens = self.max_new_tokens or SPARE_TOKENS + max(
            (len(e.ids) - e.answer_start for e in (encodings(q.text, q.answer, q.joint) for q in questions)), default=0
        )
        words = _Words(encodings.tokenizer, ends)
        numbers: dict[_Asked, int | str] = {}
        prompts: list[Prompt] = []
        texts: list[_Asked] = []
        for question in questions:
            key = self._asked(question)
            if key in numbers:
                continue
            ids = encodings(question.text).ids
            if limit is not None and len(ids) + new_tokens > limit:
                numbers[key] = "too_long"
            elif not ids:
                numbers[key] = "no_tokens"
            else:
                numbers[key] = len(prompts)
                prompts.append(Prompt(ids=ids, max_new_tokens=new_tokens, done=partial(words.enough, key)))
                texts.append(key)
        return Asked(
            prompts=tuple(prompts),
            texts=tuple(texts),
            questions=tuple((numbers[self._asked(q)], normalise(q.answer)) for q in questions),
            words=words,
        )

    def _asked(self, question: Question) -> _Asked:
        """Where each stop string may first stand. The answer matters only if it holds one."""
        answer = question.answer.strip()
        held = {mark for _, mark in full_stops(answer)} - {*self.stop} if FULL_STOP in self.stop else ()
        starts = tuple((stop, len(answer) - 1 if stop in answer else 0) for stop in (*self.stop, *sorted(held)))
        return _Asked(text=question.text, stops=starts)


@dataclass(frozen=True)
class _Asked:
    """A text to continue, and the stop strings with the first character at which each counts.

    "." among them stands for the full stops of other scripts too, which count anywhere where they are not named.
    """

    text: str
    stops: tuple[tuple[str, int], ...]

    def cut(self, said: str) -> tuple[str, bool]:
        """What was said up to the first stop string, and whether there is one."""
        said = said.lstrip(" ")
        found = [at for stop, start in self.stops if (at := said.find(stop, start)) >= 0]
        named = {stop for stop, _ in self.stops}
        if FULL_STOP in named and not said.isascii():
            found += [at for at, mark in full_stops(said) if mark not in named]
        return (said[: min(found)], True) if found else (said, False)


class _Words:
    """New tokens as text. Each sequence is decoded once, however often it is said."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._known: dict[tuple[int, ...], str] = {}

    def _say(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self._known[key]

    def enough(self, asked: _Asked, ids: list[int]) -> bool:
        """Whether new tokens hold an end token or a stop string."""
        return ids[-1] in self._ends or asked.cut(self._say(ids))[1]

    def text(self, asked: _Asked, ids: Sequence[int]) -> str:
        """What was said up to the first stop string or end token, white space stripped."""
        return asked.cut(self._say(ids[:-1] if ids[-1] in self._ends else ids))[0].strip()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be continued, each text once, and which of these belongs to which question."""

    prompts: tuple[Prompt, ...]
    texts: tuple[_Asked, ...]  # of the prompts
    questions: tuple[tuple[int | str, str], ...]  # the number of its prompt, or why it has none; the answer, normalised
    words: _Words

    def measures(self, said: Sequence[Continued]) -> list[dict[str, Any]]:
        """The fields of a `Reading` for each question, from what was said after each prompt."""
        texts = [
            self.words.text(asked, out.ids) if out.finite else None for asked, out in zip(self.texts, said, strict=True)
        ]
        out: list[dict[str, Any]] = []
        for number, answer in self.questions:
            text = None if isinstance(number, str) else texts[number]
            if text is None:
                out.append({"state": number if isinstance(number, str) else "nan_logits"})
                continue
            words = normalise(text)
            out.append({"generated": text, "gen_exact": words == answer, "gen_contains": answer in words})
        return out


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text, by the tokenizer or by the model's own generation config."""
    config = getattr(model, "generation_config", None)
    ends = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    return frozenset(i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None)
