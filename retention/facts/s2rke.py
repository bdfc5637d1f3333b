"""S2RKE (Duan et al. 2025, arXiv:2502.06868): several relations of one subject, as edits.

A record is a subject: `subjectID`, `subject` {`name`}, `Star_Topology`: a list of {`requested_rewrite` {`prompt`,
`relation`, `target_true`, `target_new`}, `paraphrase_prompts`, `neighborhood_prompts`} (true answer: the old object).

With `edits_per_subject: 1` one relation of a subject is edited and its others are asked (group same_subject); with
more, so many relations of each subject are edited together, by which ROME and MEMIT are said to disturb one another.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from retention.facts._read import Record, different
from retention.facts._source import FileFacts, Gathered, locality
from retention.types import Fact, FactPool


class S2RKE(FileFacts):
    """Facts and edits of S2RKE."""

    lacks: ClassVar[Mapping[str, str]] = {
        "two_hop": "S2RKE does not say what follows from its facts; world does, and mquake",
        "reversed": "S2RKE has no phrasing that ends in the subject; world, trex and verbalised have",
    }
    place: ClassVar[str] = "s2rke/S2RKE.json"
    what: ClassVar[str] = "S2RKE file"

    name: Literal["s2rke"] = "s2rke"
    edits_per_subject: int = Field(1, ge=1, description="relations of one subject that are edited together")

    def gather(self, seed: int) -> FactPool:
        """All records. The seed says which relations of a subject are edited together."""
        found = Gathered(self.strict)
        for record in self.records():
            name = record.inside("subject").text("name")
            cases = record.records("Star_Topology")
            if not cases:
                raise record.error("'Star_Topology' must be a list with a fact or more")
            read = [self._fact(r, record.fields.get("subjectID", record.place), name, found) for r in cases]
            facts = [r for r in read if r is not None]
            chosen = random.Random(f"s2rke {seed} {name}").sample(facts, len(facts))
            size = self.edits_per_subject
            for i, (fact, new, near) in enumerate(chosen):
                if (size > 1 and i >= size) or len(chosen) < size:
                    found.fact(fact)
                    found.dropped[f"edit: beyond {size} of its subject, or its subject has fewer"] += 1
                    continue
                found.edit(fact, new, near)
                if size > 1:
                    found.together[fact.id] = f"{record.fields.get('subjectID', record.place)}"
        return found.pool()

    def _fact(
        self, case: Record, subject_id: object, name: str, found: Gathered
    ) -> tuple[Fact, str, list[Fact]] | None:
        rewrite = case.inside("requested_rewrite")
        relation = rewrite.text("relation").strip("<>")
        old, new = rewrite.text("target_true"), rewrite.text("target_new")
        different(rewrite, old, new)
        said = [found.phrasing(case, text, name, "rephrasing") for text in case.texts("paraphrase_prompts")]
        prompt = found.phrasing(rewrite, rewrite.text("prompt"), name, "prompt", gap=True)
        if prompt is None:
            return None
        fact = Fact(
            id=f"s2rke-{subject_id}-{relation}-{old}",
            subject=name,
            relation=relation,
            prompt=prompt,
            target=old,
            paraphrases=tuple(dict.fromkeys(p for p in said if p is not None and p != prompt)),
        )
        near = [
            locality(f"{fact.id}-near-{n}", text, old, relation)
            for n, text in enumerate(case.texts("neighborhood_prompts"))
        ]
        return fact, new, near
