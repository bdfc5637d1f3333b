"""Edits for the locate-then-edit tests, in the tiny tokenizer's words."""

from __future__ import annotations

from typing import Any

from retention.types import Edit, Fact


def edit(subject: str, prompt: str, target: str, others: tuple[str, ...] = (), **settings: Any) -> Edit:
    fact = Fact(id=f"{subject} {prompt}", subject=subject, relation="r", prompt=prompt, target="Rome")
    return Edit(fact=fact, target=target, prompts=(prompt, *others), **settings)


ONE_TOKEN = edit("Anna Klein", "{} was born in", "Oslo")
THREE_TOKENS = edit(
    "Dora Winter", "what language {} speaks ?", "Northern Ireland Danish", ("the mother tongue of {} is",)
)
FINAL_SUBJECT = edit("Carl", "the city of {}", "Paris")
OTHER_ANCHORS = edit("Emil Vogel", "the capital of the country where {} lives is", "New York",
                     anchors=("{} is a", "{} plays the", "the language of {} is"))  # fmt: skip
EDITS = [ONE_TOKEN, THREE_TOKENS, FINAL_SUBJECT, OTHER_ANCHORS]
PREFIXES = ("The city of Rome. ", "I was in the country. ", "Because Berta plays violin. ")
