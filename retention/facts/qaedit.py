"""QAEdit (Yang et al. 2025, arXiv:2502.11177): questions of NQ, TriviaQA and SimpleQA as edits.

A record: `prompt` (the question), `subject`, `target` (also `target_new` or `answer`), `rephrase`, `locality` (a list
of `{loc, loc_ans}`). The paper edits what a model gets wrong: `unknown_targets: true` does. What a model says instead
is not in the data, so an edit has no old object. Known facts are the locality questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from retention.facts._source import FileFacts, Gathered, first_answer, locality
from retention.types import Fact, FactPool


class QAEdit(FileFacts):
    """Edits of QAEdit."""

    lacks: ClassVar[Mapping[str, str]] = {
        "two_hop": "QAEdit does not say what follows from its facts; world does, and mquake",
        "reversed": "QAEdit has no phrasing that ends in the subject; world, trex and verbalised have",
    }
    place: ClassVar[str] = "qaedit/qaedit.json"
    what: ClassVar[str] = "QAEdit file"

    name: Literal["qaedit"] = "qaedit"
    intrinsic_relations: Literal["as_edited", "any"] = Field(
        "any", description="known facts are its locality questions, of a relation of their own"
    )

    def gather(self, seed: int) -> FactPool:
        """All records. The seed is not used."""
        found = Gathered(self.strict)
        for n, record in enumerate(self.records()):
            id, subject = f"qaedit-{n}", record.text("subject")
            key = next((k for k in ("target", "target_new", "answer") if k in record.fields), "target")
            new = first_answer(record, key) or record.text(key)
            phrasing = found.phrasing(record, record.text("prompt"), subject, "edit")
            if phrasing is None:
                continue
            again = found.phrasing(record, record.optional_text("rephrase"), subject, "rephrasing")
            fact = Fact(
                id=id,
                subject=subject,
                relation=None,
                prompt=phrasing,
                target="",
                paraphrases=() if again in (None, phrasing) else (str(again),),
                tags=frozenset({"injection"}),
            )
            near = [
                locality(f"{id}-near-{i}", near.text("loc"), near.text("loc_ans"), "locality")
                for i, near in enumerate(record.records("locality"))
            ]
            for neighbor in near:
                found.fact(neighbor)
            found.edit(fact, new, near)
        return found.pool()
