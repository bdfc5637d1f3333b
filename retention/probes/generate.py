"""The generate probe: what the model says after a question, greedily, and whether that is the answer.

Ends at ".", newline or end of text, as WILD does (Yang et al. 2025, arXiv 2502.11177), and is judged by normalised
equality and by the substring test of Wen & Zhang 2025 (arXiv 2507.14198). Knows no editor and no fine-tune.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retention.probes._decode import Continued, Prompt, greedy
from retention.probes._forward import max_positions
from retention.tokens import encode
from retention.types import Part, Question, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPARE_TOKENS = 4  # beyond the longest answer: room for "the", a title, an end of sentence
ARTICLES = frozenset({"a", "an", "the"})


class Generate(Part):
    """Greedy decoding with a cache, all questions in step; each text and way of stopping is decoded once."""

    name: Literal["generate"] = "generate"
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens generated at most; left out: those of the longest answer among the questions, and 4 more",
    )
    stop: tuple[str, ...] = Field((".", "\n"), description="strings that end a text; it is cut before the first")
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
        new_tokens = self.max_new_tokens or _longest_answer(tokenizer, questions) + SPARE_TOKENS
        limit = max_positions(model)
        ends = _end_tokens(model, tokenizer)
        asked: dict[_Asked, Prompt | str] = {}
        for question in questions:
            key = self._asked(question)
            if key in asked:
                continue
            ids = encode(tokenizer, question.text).ids
            if limit is not None and len(ids) + new_tokens > limit:
                asked[key] = "too_long"
            elif not ids:
                asked[key] = "no_tokens"
            else:
                asked[key] = Prompt(ids=ids, max_new_tokens=new_tokens, done=_until(key, tokenizer, ends))
        wanted = {key: prompt for key, prompt in asked.items() if isinstance(prompt, Prompt)}
        said = dict(zip(wanted, greedy(model, list(wanted.values()), self.tokens_per_batch), strict=True))
        texts: dict[_Asked, str | None] = {}
        for key, continued in said.items():
            texts[key] = _text(key, tokenizer, continued, ends) if continued.finite else None
        readings = []
        for question in questions:
            key = self._asked(question)
            prompt, text = asked[key], texts.get(key)
            if text is None:
                state = prompt if isinstance(prompt, str) else "nan_logits"
                readings.append(Reading(question_id=question.id, step=step, state=state))
                continue
            said_words, answer_words = normalise(text), normalise(question.answer)
            readings.append(
                Reading(
                    question_id=question.id,
                    step=step,
                    generated=text,
                    gen_exact=said_words == answer_words,
                    gen_contains=answer_words in said_words,
                )
            )
        return readings

    def _asked(self, question: Question) -> _Asked:
        """Where each stop string may first stand. The answer matters only if it holds one."""
        answer = question.answer.strip()
        starts = tuple((stop, len(answer) - 1 if stop in answer else 0) for stop in self.stop)
        return _Asked(text=question.text, stops=starts)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A text to continue, and the stop strings with the first character at which each counts."""

    text: str
    stops: tuple[tuple[str, int], ...]

    def cut(self, said: str) -> tuple[str, bool]:
        """What was said up to the first stop string, and whether there is one."""
        said = said.lstrip(" ")
        found = [at for stop, start in self.stops if (at := said.find(stop, start)) >= 0]
        return (said[: min(found)], True) if found else (said, False)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces. A text that is only these keeps what makes it one."""
    letters = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    words = letters.split()
    kept = [word for word in words if word not in ARTICLES] or words or text.lower().split()
    return " ".join(kept)


def _longest_answer(tokenizer: Any, questions: Sequence[Question]) -> int:
    """Tokens of the longest answer after its text."""
    lengths = [0]
    for text, answer in dict.fromkeys((q.text, q.answer) for q in questions):
        encoded = encode(tokenizer, text, answer)
        lengths.append(len(encoded.ids) - encoded.answer_start)
    return max(lengths)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text, by the tokenizer or by the model's own generation config."""
    config = getattr(model, "generation_config", None)
    ends = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    return frozenset(i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None)


def _say(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _until(key: _Asked, tokenizer: Any, ends: frozenset[int]) -> Callable[[list[int]], bool]:
    """Whether new tokens hold an end token or a stop string."""
    return lambda ids: ids[-1] in ends or key.cut(_say(tokenizer, ids))[1]


def _text(key: _Asked, tokenizer: Any, continued: Continued, ends: frozenset[int]) -> str:
    ids = continued.ids[:-1] if continued.ids[-1] in ends else continued.ids
    return key.cut(_say(tokenizer, ids))[0].strip()
