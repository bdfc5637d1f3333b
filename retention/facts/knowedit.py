"""KnowEdit (Zhang et al. 2024, arXiv:2401.01286): wiki_recent, wiki_counterfact, ZsRE and WikiBio, told by their keys.

A record: `prompt`, `subject` (WikiBio: `text` and `concept`), `target_new` (WikiBio: `labels`; a text or a list),
`ground_truth` (a text, a list of aliases or a list of such lists; absent in wiki_recent, whose facts are new:
injections), `rephrase_prompt` or `rephrase`, `portability` ({kind: [{prompt, ground_truth}]}: Logical_Generalization,
Subject_Aliasing, reasoning) and `locality` ({Relation_Specificity, Forgetfulness: the same}).

The first reasoning question is what follows from the new object (group two_hop); other portability questions are
counted and left out: Subject_Aliasing names another subject, so no phrasing of the fact. Locality questions are
neighbors, and facts that a model may know. ConvSent and Sanitation edit no facts and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from retention.facts._read import Record
from retention.facts._source import FileFacts, Gathered, first_answer, locality
from retention.types import Fact, FactPool, Hop


class KnowEdit(FileFacts):
    """Edits of one of KnowEdit's sub-sets."""

    lacks: ClassVar[Mapping[str, str]] = {
        "reversed": "KnowEdit has no phrasing that ends in the subject; world, trex and verbalised have"
    }
    place: ClassVar[str] = "knowedit/wiki_counterfact_test_cf.json"
    what: ClassVar[str] = "KnowEdit file"

    name: Literal["knowedit"] = "knowedit"
    intrinsic_relations: Literal["as_edited", "any"] = Field(
        "any",
        description="KnowEdit names no relation: known facts are its locality questions, of relations of their own",
    )

    def gather(self, seed: int) -> FactPool:
        """All records. The seed is not used."""
        found = Gathered(self.strict)
        for n, record in enumerate(self.records()):
            self._add(record, f"knowedit-{n}", found)
        return found.pool()

    def _add(self, record: Record, id: str, found: Gathered) -> None:
        if "concept" in record.fields:  # WikiBio: a text about a person that goes on with `labels`
            subject, prompt, new = record.text("concept"), record.text("text"), record.text("labels")
        elif "subject" not in record.fields:
            raise record.error(
                "no 'subject' and no 'concept': it is none of wiki_recent, wiki_counterfact, ZsRE and WikiBio "
                "(ConvSent and Sanitation edit behaviour, not facts)"
            )
        else:
            subject, prompt = record.text("subject"), record.text("prompt", "src")
            target = first_answer(record, "target_new")
            new = record.text("target_new") if target is None else target
        old = first_answer(record, "ground_truth") or ""
        if old == new:
            found.dropped["edit: its new object is the old one"] += 1
            return
        phrasing = found.phrasing(record, prompt, subject, "edit")
        if phrasing is None:
            return
        rephrase = record.optional_text("rephrase_prompt") or record.optional_text("rephrase")
        said = found.phrasing(record, rephrase, subject, "rephrasing")
        asked = {kind.casefold(): pairs for kind, pairs in self._pairs(record, "portability", found).items()}
        fact = Fact(
            id=id,
            subject=subject,
            relation=None,
            prompt=phrasing,
            target=old,
            paraphrases=() if said is None else (said,),
            tags=frozenset() if old else frozenset({"injection"}),
        )
        near = [
            locality(f"{id}-near-{n}", question, answer, kind)
            for kind, pairs in self._pairs(record, "locality", found).items()
            for n, (question, answer) in enumerate(pairs)
        ]
        near = [fact for n, fact in enumerate(near) if fact.subject not in {f.subject for f in near[:n]}]
        for neighbor in near:
            found.fact(neighbor)
        found.edit(fact, new, near)
        for question, answer in asked.get("reasoning", [])[:1]:
            found.hops[id] = Hop(
                fact=Fact(id=f"{id}-hop", subject=question, relation="reasoning", prompt="{}", target=answer),
                through={new: answer},
            )
        found.dropped["portability question: beyond the first reasoning question of a record"] += max(
            0, sum(map(len, asked.values())) - (1 if asked.get("reasoning") else 0)
        )

    @staticmethod
    def _pairs(record: Record, key: str, found: Gathered) -> dict[str, list[tuple[str, str]]]:
        """kind -> (question, answer) of `portability` or `locality`; questions without an answer are counted."""
        if record.fields.get(key) is None:
            return {}
        inside = record.inside(key)
        pairs: dict[str, list[tuple[str, str]]] = {}
        for kind, given in inside.fields.items():
            if given is None:  # parquet fills in the kinds that a record lacks
                continue
            pairs[kind] = []
            for question in inside.records(kind):
                answer = first_answer(question, "ground_truth")
                if answer is None:
                    found.dropped[f"{key} question: it has no answer"] += 1
                else:
                    pairs[kind].append((question.text("prompt"), answer))
        return pairs
