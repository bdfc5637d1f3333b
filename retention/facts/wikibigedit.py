"""WikiBigEdit (Thede et al. 2025, arXiv:2503.05683): what changed in Wikidata between two dates, as questions.

A record: `tag` (new or update), `subject`, `update` (the question; `src` in older files), `ans` (`alt`), `rephrase`,
`personas` (the question in another voice), `loc` and `loc_ans`, `mhop` and `mhop_ans` (null in most), `relation`. The
old answer is not told, so every edit counts as an injection. One file is one timestep; its dates stand in its name.

Known facts are the locality questions: they name no subject and have a relation of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from retention.facts._read import Record
from retention.facts._source import FileFacts, Gathered, locality
from retention.types import Fact, FactPool, Hop


class WikiBigEdit(FileFacts):
    """Edits of one timestep of WikiBigEdit."""

    lacks: ClassVar[Mapping[str, str]] = {
        "reversed": "WikiBigEdit has no phrasing that ends in the subject; world, trex and verbalised have"
    }
    place: ClassVar[str] = "wikibigedit/wiki_big_edit_20240201_20240220.json"
    what: ClassVar[str] = "WikiBigEdit file"

    name: Literal["wikibigedit"] = "wikibigedit"
    tag: Literal["new", "update", "both"] = Field(
        "both", description="edits of facts that are new, of changed ones, or of both"
    )
    intrinsic_relations: Literal["as_edited", "any"] = Field(
        "any", description="known facts are its locality questions, of a relation of their own"
    )

    def gather(self, seed: int) -> FactPool:
        """All records of the tag. The seed is not used."""
        found = Gathered(self.strict)
        for n, record in enumerate(self.records()):
            self._add(record, f"wikibigedit-{n}", found)
        return found.pool()

    def _add(self, record: Record, id: str, found: Gathered) -> None:
        tag = record.text("tag")
        if self.tag != "both" and tag != self.tag:
            found.dropped[f"edit: tag {tag}"] += 1
            return
        subject, new = record.text("subject"), record.text("ans", "alt")
        phrasing = found.phrasing(record, record.text("update", "src"), subject, "edit")
        if phrasing is None:
            return
        again = [
            found.phrasing(record, record.optional_text(key), subject, what)
            for key, what in (("rephrase", "rephrasing"), ("personas", "question in another voice"))
        ]
        fact = Fact(
            id=id,
            subject=subject,
            relation=record.optional_text("relation"),
            prompt=phrasing,
            target="",
            paraphrases=tuple(dict.fromkeys(p for p in again if p is not None and p != phrasing)),
            tags=frozenset({"injection", f"tag:{tag}"}),
        )
        near = []
        question = record.optional_text("loc")
        if question is not None:
            near.append(locality(f"{id}-near-0", question, record.text("loc_ans"), "locality"))
            found.fact(near[0])
        found.edit(fact, new, near)
        hop = record.optional_text("mhop")
        if hop is not None:
            answer = record.text("mhop_ans")
            found.hops[id] = Hop(
                fact=Fact(id=f"{id}-hop", subject=hop, relation="mhop", prompt="{}", target=answer),
                through={new: answer},
            )
