"""PopQA (Mallen et al. 2023, arXiv:2212.10511): facts with the popularity of their subjects.

A record (test.tsv, or the Hub's): `subj`, `prop`, `obj`, `s_pop` (page views of the subject's article a month, which
becomes `Fact.popularity`), `question`, `possible_answers` (a JSON list, as text), and others. The data have no edits:
an edit's new object is another object of the relation, drawn by seed, that is no right answer.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping
from typing import ClassVar, Literal

from retention.facts._read import Record
from retention.facts._source import FileFacts, Gathered
from retention.texts import nfc
from retention.types import Fact, FactPool


class PopQA(FileFacts):
    """Facts of PopQA; every fact may be edited, to another object of its relation."""

    lacks: ClassVar[Mapping[str, str]] = {
        "two_hop": "PopQA does not say what follows from its facts; world does, and mquake",
        "reversed": "PopQA has no phrasing that ends in the subject; world, trex and verbalised have",
    }
    place: ClassVar[str] = "popqa/test.tsv"
    what: ClassVar[str] = "PopQA file"

    name: Literal["popqa"] = "popqa"

    def gather(self, seed: int) -> FactPool:
        """All records whose subject has one object of the relation. The seed says the new objects."""
        found = Gathered(self.strict)
        read = [self._read(record, n, found) for n, record in enumerate(self.records())]
        objects: dict[tuple[str, str], set[str]] = defaultdict(set)
        for fact, _ in (r for r in read if r is not None):
            objects[fact.subject, fact.kind].add(fact.target)
        kept: dict[tuple[str, str], tuple[Fact, set[str]]] = {}
        for fact, answers in (r for r in read if r is not None):
            if len(objects[fact.subject, fact.kind]) > 1:
                found.dropped["subject with several objects of one relation"] += 1
            elif kept.setdefault((fact.subject, fact.kind), (fact, answers))[0] is not fact:
                found.dropped["fact that is there already"] += 1
        of: dict[str, list[str]] = defaultdict(list)
        for fact, _ in kept.values():
            found.fact(fact)
            if fact.target not in of[fact.kind]:
                of[fact.kind].append(fact.target)
        for fact, answers in kept.values():
            others = [o for o in of[fact.kind] if o.casefold() not in answers]
            if others:
                found.edit(fact, random.Random(f"popqa {seed} {fact.id}").choice(others))
            else:
                found.dropped["edit: its relation has no other object"] += 1
        return found.pool()

    def _read(self, record: Record, n: int, found: Gathered) -> tuple[Fact, set[str]] | None:
        subject, target = record.text("subj"), record.text("obj")
        popularity = record.number("s_pop")
        if popularity is None:
            raise record.error("'s_pop' must be a number, the subject's page views, and is empty")
        prompt = found.phrasing(record, record.text("question"), subject, "question")
        if prompt is None:
            return None
        number = record.fields.get("id", n)
        fact = Fact(
            id=f"popqa-{number}",
            subject=subject,
            relation=record.text("prop"),
            prompt=prompt,
            target=target,
            popularity=popularity,
        )
        return fact, {target.casefold(), *(answer.casefold() for answer in _answers(record))}


def _answers(record: Record) -> list[str]:
    """`possible_answers`: a list, or one as JSON text."""
    value = record.fields.get("possible_answers", [])
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise record.error(f"'possible_answers' is no JSON list ({error.msg}): {value!r}") from None
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise record.error(f"'possible_answers' must be a list of texts, not {value!r}")
    return [nfc(answer) for answer in value]
