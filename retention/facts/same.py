"""Which facts are the same fact in other words, so that no question expects the old answer of what was edited.

Knows neither models nor how facts are drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from retention.texts import mentions, normalise
from retention.types import Edit, Fact


class Edited:
    """Facts that edits change, to be recognised in other words.

    Two facts of one subject are the same if they have one relation; where one of them names none, if their objects
    agree or a phrasing of one is the other's. A question that names no subject is about a subject that it mentions. And
    whatever the relations, no fact is asked for in words that an edit has. Case, punctuation and articles aside.
    """

    def __init__(self, edits: Iterable[Edit]) -> None:
        self._texts: dict[str, bool] = {}  # text of an edited fact -> whether one of these names no relation
        self._named: set[tuple[str, str]] = set()  # (subject, relation)
        self._by_object: dict[str, list[Fact]] = defaultdict(list)
        for edit in edits:
            fact = edit.fact
            relation = _relation(fact)
            for text in _texts(fact):
                self._texts[text] = self._texts.get(text, False) or relation is None
            if relation is not None:
                self._named.add((normalise(fact.subject), relation))
            if fact.target:
                self._by_object[normalise(fact.target)].append(fact)

    def has(self, fact: Fact) -> bool:
        """Tell whether the fact is one that is edited."""
        subject, relation = normalise(fact.subject), _relation(fact)
        if relation is not None and (subject, relation) in self._named:
            return True
        if normalise(fact.text()) in self._texts:
            return True
        if any(self._texts.get(text, False) if relation else text in self._texts for text in _texts(fact)):
            return True
        return any(
            (relation is None or _relation(other) is None) and _about(fact, normalise(other.subject))
            for other in self._by_object.get(normalise(fact.target), ())
        )


def _about(fact: Fact, subject: str) -> bool:
    own = normalise(fact.subject)
    return own == subject or (fact.prompt == "{}" and mentions(own, subject))


def _relation(fact: Fact) -> str | None:
    """Its relation; None for a locality question, which names the kind of question instead."""
    return None if "locality" in fact.tags else fact.relation


def _texts(fact: Fact) -> set[str]:
    return {normalise(fact.text(p)) for p in (fact.prompt, *fact.phrasings, *fact.paraphrases)}
