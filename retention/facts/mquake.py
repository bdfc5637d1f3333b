"""MQuAKE (Zhong et al. 2023, arXiv:2305.14795), CF and T: edits, and multi-hop questions that follow from them.

A case: `requested_rewrite` (a list of edits as in CounterFact, each with a `question`), `questions` (the same multi-hop
question in three wordings), `answer` and `new_answer` with `answer_alias` and `new_answer_alias`, `single_hops`
(`question`, `cloze`, `answer`), `orig.triples_labeled` (the chain: subject, relation, object).

Cases repeat edits (MQuAKE-T: 96 in 1,868 questions), and MQuAKE-CF's contradict one another between cases. Equal edits
become one, with the multi-hop question of one of their cases, drawn by seed; of contradicting ones the case that comes
first in that draw stays. A case's edits are drawn together or not at all, since its answer follows from all of them.
The multi-hop question (group two_hop) stands beside the last edit of the case. Hops that no edit changes are facts that
a model may know.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from retention.facts._read import Record, different
from retention.facts._source import FileFacts, Gathered
from retention.texts import nfc
from retention.types import Fact, FactPool, Hop


class MQuAKE(FileFacts):
    """Edits of MQuAKE, with what follows from them."""

    lacks: ClassVar[Mapping[str, str]] = {
        "reversed": "MQuAKE has no phrasing that ends in the subject; world, trex and verbalised have"
    }
    place: ClassVar[str] = "mquake/MQuAKE-T.json"
    what: ClassVar[str] = "MQuAKE file"

    name: Literal["mquake"] = "mquake"
    two_hop: bool = Field(True, description="ask the multi-hop question of each case (group two_hop)")
    edits_in_case: int | None = Field(
        None, ge=1, description="only cases with so many edits; left out, all (they are drawn whole)"
    )

    def gather(self, seed: int) -> FactPool:
        """The seed says which case gives the question of an edit that several cases have."""
        found = Gathered(self.strict)
        cases = self.records()
        random.Random(f"mquake {seed}").shuffle(cases)
        new_of: dict[str, str] = {}  # fact id -> its new object, of the cases taken
        for case in cases:
            self._case(case, found, new_of)
        size = Counter(found.together.values())
        found.together = {fact: group for fact, group in found.together.items() if size[group] > 1}
        return found.pool()

    def _case(self, case: Record, found: Gathered, new_of: dict[str, str]) -> None:
        rewrites = case.records("requested_rewrite")
        if not rewrites:
            raise case.error("'requested_rewrite' must be a list with an edit or more")
        questions = case.texts("questions", required=True)
        if not questions:
            raise case.error("'questions' must hold the multi-hop question, and is empty")
        old, new = case.text("answer"), case.text("new_answer")
        aliases = {text.casefold() for text in (old, *case.texts("answer_alias"))}
        if self.edits_in_case is not None and len(rewrites) != self.edits_in_case:
            found.dropped[f"case: has not {self.edits_in_case} edits"] += 1
            return
        read = [self._edit(rewrite, found) for rewrite in rewrites]
        pairs = [pair for pair in read if pair is not None]
        if len(pairs) < len(read):
            found.dropped["case: an edit's prompt lacks its subject"] += 1
            return
        self._other_hops(case, found, {fact.id for fact, _ in pairs})
        taken = [fact.id for fact, _ in pairs if fact.id in new_of]
        if taken:
            same = all(new_of.get(fact.id, target) == target for fact, target in pairs)
            why = "its edits are those of another case" if same else "an edit contradicts another case's"
            found.dropped[f"case: {why}"] += 1
            return
        for fact, target in pairs:
            new_of[fact.id] = target
            found.edit(fact, target)
            found.together[fact.id] = case.place
        if new.casefold() in aliases:
            found.dropped["multi-hop question: its answer stays the same (by an alias)"] += 1
            return
        fact, target = pairs[-1]
        found.hops[fact.id] = Hop(
            fact=Fact(
                id=f"{fact.id}-hops",
                subject=questions[0],
                relation=f"hops {len(case.records('new_single_hops')) or '?'}",
                prompt="{}",
                target=old,
            ),
            through={fact.target: old, target: new},
        )

    def _edit(self, rewrite: Record, found: Gathered) -> tuple[Fact, str] | None:
        subject, relation = rewrite.text("subject"), rewrite.text("relation_id")
        true, new = rewrite.inside("target_true").text("str"), rewrite.inside("target_new").text("str")
        different(rewrite, true, new)
        prompt = found.phrasing(rewrite, rewrite.text("prompt"), subject, "prompt", gap=True)
        if prompt is None:
            return None
        again = found.phrasing(rewrite, rewrite.optional_text("question"), subject, "question")
        fact = Fact(
            id=f"mquake-{relation}-{subject}",
            subject=subject,
            relation=relation,
            prompt=prompt,
            target=true,
            paraphrases=() if again is None else (again,),
        )
        return fact, new

    def _other_hops(self, case: Record, found: Gathered, edited: set[str]) -> None:
        """The hops of the case that none of its edits changes."""
        triples, labels = _triples(case, "triples"), _triples(case, "triples_labeled")
        hops = case.records("single_hops")
        if not len(triples) == len(labels) == len(hops):
            found.dropped["single-hop facts: the case does not tell their subjects (orig.triples_labeled)"] += 1
            return
        for hop, (_, relation, _), (subject, _, _) in zip(hops, triples, labels, strict=True):
            if f"mquake-{relation}-{subject}" in edited:
                continue
            prompt = found.phrasing(hop, hop.text("cloze"), subject, "single-hop fact")
            if prompt is None:
                continue
            again = found.phrasing(hop, hop.optional_text("question"), subject, "single-hop question")
            found.fact(
                Fact(
                    id=f"mquake-{relation}-{subject}",
                    subject=subject,
                    relation=relation,
                    prompt=prompt,
                    target=hop.text("answer"),
                    paraphrases=() if again is None else (again,),
                )
            )


def _triples(case: Record, key: str) -> list[list[str]]:
    """(subject, relation, object) of each hop under `orig`; none where the case does not tell."""
    value = case.inside("orig").fields.get(key) if "orig" in case.fields else None
    if value is None:
        return []
    triples = value if isinstance(value, list) else [value]
    for triple in triples:
        if not (isinstance(triple, list) and len(triple) == 3 and all(isinstance(x, str) and x for x in triple)):
            raise case.error(f"orig: {key!r} must be a list of [subject, relation, object], not {value!r}")
    return [[nfc(text) for text in triple] for triple in triples]
