"""What is the same each time that the same questions are put to a model: made once, kept by whoever asks again.

Nothing in it comes from the model's weights, so a reading does not depend on what was read before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from retention.texts import Joint
from retention.tokens import Encoded, encode
from retention.types import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

KEPT = 4  # things of one kind


class Prepared:
    """Token ids, rows and masks of the last few sets of questions and of held-out rows.

    Made by the caller before a fine-tune and passed along at each checkpoint. The tokenizer must stay as it is.
    """

    def __init__(self) -> None:
        self._made: dict[str, list[tuple[Any, Any]]] = {}

    def get(self, name: str, key: Any, make: Callable[[], T]) -> T:
        """What `make` gave for this key the last time; made anew if that is long ago."""
        kept = self._made.setdefault(name, [])
        for known, made in kept:
            if known == key:
                found: T = made
                return found
        new = make()
        kept.append((key, new))
        del kept[:-KEPT]
        return new


class Asking(Part):
    """How a probe puts its questions."""

    chat: bool = Field(
        False, description="as a user's turn in the tokenizer's chat template, the answer as the model's; else as text"
    )

    @model_serializer(mode="wrap")
    def _without_idle(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `chat` where it is off: it is younger than stored results, and keys stay."""
        found: dict[str, Any] = dump(self)
        return {k: v for k, v in found.items() if k != "chat" or v}


class Encodings:
    """Texts to token ids, each text once. chat: texts are a user's turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: bool = False) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self._known: dict[tuple[str, str | None, Joint | None], Encoded] = {}

    def __call__(self, text: str, answer: str | None = None, joint: Joint | None = None) -> Encoded:
        known = self._known.get((text, answer, joint))
        if known is None:
            known = encode(self.tokenizer, text, answer, joint=joint, chat=self.chat)
            self._known[text, answer, joint] = known
        return known
