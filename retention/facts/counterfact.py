"""CounterFact (Meng et al. 2022, arXiv:2202.05262) in its three forms, told apart by their keys.

- nested, the original: `requested_rewrite {prompt with {}, subject, target_new {str}, target_true {str}, relation_id}`,
  `paraphrase_prompts`, `neighborhood_prompts` (texts whose true answer is the record's own old object);
- multi_counterfact: the same, whose `neighborhood_prompts` may be objects `{prompt, target}`;
- flat: `prompt` with the subject filled in, `subject`, `target_new`, `ground_truth`, `rephrase_prompt`,
  `locality_prompt`, `locality_ground_truth`, `relation_candidates` (Wikidata ids; the first one counts).

No form names the subject of a neighborhood prompt. It is found by the phrasings that the file itself uses for the
relation, then for any relation (of the 10,000 flat records: 9,963 and 35); what no phrasing fits has its longest run of
capitalised words as subject, or the whole text where there is none.

Of the flat form's `rephrase_prompt`s only 18 % say the fact again. The others are CounterFact's generation prompts
("{} is known for"), whose right continuation is not the object. `restatements_only` leaves those out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from retention.facts._read import (
    LeftOut,
    Record,
    different,
    phrasing_of,
    read_records,
)
from retention.facts._source import FileFacts
from retention.facts.trex import PATTERNS, read_phrasings, relations_of, trex_folder
from retention.facts.trex import PLACE as TREX_PLACE
from retention.types import Edit, Fact, FactPool

PLACE = "counterfact/counterfact_10k.jsonl"  # below $RETENTION_DATA
UNKNOWN = "unknown"  # the relation of flat records without a candidate


@dataclass(frozen=True, kw_only=True)
class Case:
    """One record, whatever its form."""

    record: Record
    id: str
    subject: str
    relation: str
    candidates: tuple[str, ...]  # relations it may belong to; the first is `relation`
    prompt: str  # with `{}`
    true: str
    new: str
    rephrasings: tuple[str, ...]  # with `{}`
    near: tuple[tuple[str, str], ...]  # (text, answer)
    flat: bool


class CounterFact(FileFacts):
    """Facts and edits of CounterFact."""

    lacks: ClassVar[Mapping[str, str]] = {
        "two_hop": "CounterFact does not say what follows from its facts; world does, and jsonl with the key `two_hop`",
        "reversed": "CounterFact has no phrasing that ends in the subject; world, trex and verbalised have, and jsonl "
        "with the key `reversed`",
    }

    place: ClassVar[str] = PLACE
    what: ClassVar[str] = "CounterFact file"

    name: Literal["counterfact"] = "counterfact"
    restatements_only: bool = Field(
        True,
        description="flat form: keep a rephrasing only if it ends in a phrasing that the file uses as a prompt of the "
        "same relation; false keeps all (in a small file few phrasings are seen)",
    )

    phrasings: int = Field(
        0,
        ge=0,
        description="ParaRel phrasings of its relation that a fact must have to be edited: it may also be written with "
        "them (mitigation paraphrase), and no probe asks them",
    )
    trex: str | None = Field(
        None, description=f"for `phrasings`: folder of T-REx and ParaRel; left out, $RETENTION_DATA/{TREX_PLACE}"
    )

    def files(self) -> list[Path]:
        patterns = trex_folder(self.trex) / PATTERNS if self.phrasings else None
        return [*super().files(), *(sorted(patterns.glob("P*.jsonl")) if patterns else [])]

    def gather(self, seed: int) -> FactPool:
        """All records. The seed is not used: the data set itself says what is asked with which phrasing."""
        left = LeftOut(strict=self.strict)
        cases = cases_of(self.records(), left)
        known = Phrasings(cases)
        pararel = self._pararel({case.relation for case in cases})
        facts: list[Fact] = []
        edits: list[Edit] = []
        neighborhood: dict[str, tuple[Fact, ...]] = {}
        objects: dict[str, dict[str, None]] = defaultdict(dict)
        dropped = left.counts
        for case in cases:
            said_again = tuple(p for p in case.rephrasings if p != case.prompt)
            dropped["rephrasing that is the prompt itself"] += len(case.rephrasings) - len(said_again)
            if case.flat and self.restatements_only:
                others = [p for p in said_again if not known.restates(case.relation, p)]
                dropped["rephrasing that does not say the fact again (a generation prompt)"] += len(others)
                said_again = tuple(p for p in said_again if p not in others)
            fact = Fact(
                id=f"counterfact-{case.id}",
                subject=case.subject,
                relation=None if case.relation == UNKNOWN else case.relation,
                prompt=case.prompt,
                target=case.true,
                paraphrases=said_again,
                phrasings=tuple(p for p in pararel.get(case.relation, ()) if p not in (case.prompt, *said_again)),
            )
            facts.append(fact)
            if len(fact.phrasings) >= self.phrasings:
                edits.append(Edit(fact=fact, target=case.new, prompts=(fact.prompt,)))
            else:
                dropped["edit: its relation has too few ParaRel phrasings"] += 1
            objects[fact.kind].update({case.true: None, case.new: None})
            neighborhood[fact.id] = tuple(
                known.neighbor(f"{fact.id}-near-{n}", case.relation, text, answer)
                for n, (text, answer) in enumerate(case.near)
            )
        return FactPool(
            facts=tuple(facts),
            edits=tuple(edits),
            neighborhood=neighborhood,
            objects={relation: tuple(found) for relation, found in objects.items()},
            dropped={reason: n for reason, n in dropped.items() if n},
        )

    def _pararel(self, relations: set[str]) -> dict[str, list[str]]:
        """Phrasings of each relation that ParaRel has; none where they are not asked for."""
        if not self.phrasings:
            return {}
        folder = trex_folder(self.trex)
        return {relation: read_phrasings(folder, relation) for relation in relations & set(relations_of(folder))}


class Phrasings:
    """The phrasings that a file uses as prompts of each relation, to read subjects out of texts with."""

    def __init__(self, cases: list[Case]) -> None:
        found: dict[str, set[str]] = defaultdict(set)
        for case in cases:
            found[case.relation].add(case.prompt)
        # The longest first: "{}, a native speaker of" must be tried before "{}, a native".
        self._of = {relation: sorted(ps, key=lambda p: (-len(p), p)) for relation, ps in found.items()}
        self._all = sorted(set().union(*found.values()), key=lambda p: (-len(p), p))

    def restated(self, relation: str, phrasing: str) -> str | None:
        """The prompt of the relation that the phrasing ends in, with or without a sentence before it; None if none."""
        return next((known for known in self._of.get(relation, ()) if phrasing.endswith(known)), None)

    def restates(self, relation: str, phrasing: str) -> bool:
        """Whether the phrasing says the relation's fact again."""
        return self.restated(relation, phrasing) is not None

    def split(self, relation: str, text: str) -> tuple[str, str]:
        """(phrasing, subject) of a text about an unnamed subject, as the module's docstring says."""
        for known in (*self._of.get(relation, ()), *self._all):
            before, after = known.split("{}")
            if len(text) > len(known) - 2 and text.startswith(before) and text.endswith(after):
                return known, text[len(before) : len(text) - len(after)]
        word = r"[A-Z0-9](?:(?!['’]s\b)[\w'’.-])*"  # the possessive is no part of a name
        runs = re.findall(rf"(?<!\w){word}(?:\s+(?:(?:of|the|de|del|la|le|van|von|der|and|&)\s+)*{word})*", text)
        subject = max(runs, key=len, default=text)
        return phrasing_of(text, subject) or "{}", subject

    def neighbor(self, id: str, relation: str, text: str, answer: str) -> Fact:
        phrasing, subject = self.split(relation, text)
        return Fact(
            id=id,
            subject=subject,
            relation=None if relation == UNKNOWN else relation,
            prompt=phrasing,
            target=answer,
            tags=frozenset({"locality"}),
        )


def read_cases(path: Path) -> list[Case]:
    """`cases_of` the records of a file."""
    return cases_of(read_records(path), LeftOut())


def cases_of(records: Sequence[Record], left: LeftOut) -> list[Case]:
    """Every record whose prompt names its subject, its form told by its keys; `left` counts what is omitted.

    Raises UserError naming the file and the line or record.
    """
    read = [_nested(r, left) if "requested_rewrite" in r.fields else _flat(r, left) for r in records]
    cases = [case for case in read if case is not None]
    seen: dict[str, str] = {}
    for case in cases:
        if case.id in seen:
            raise case.record.error(f"its case_id {case.id} is also that of {seen[case.id]}")
        seen[case.id] = case.record.place
    return cases


def _case_id(record: Record) -> str:
    value = record.fields.get("case_id")
    if isinstance(value, bool) or not isinstance(value, int | str):
        record.text("case_id")  # raises: says what is there instead
    return str(value)


def _flat(record: Record, left: LeftOut) -> Case | None:
    if "prompt" not in record.fields and "subject" not in record.fields:
        raise record.error(
            "neither nested CounterFact (requested_rewrite, ...) nor flat (prompt, subject, target_new, "
            f"ground_truth, ...): it has {', '.join(map(str, record.fields)) or 'no keys'}"
        )
    subject = record.text("subject")
    true, new = record.text("ground_truth"), record.text("target_new")
    different(record, true, new)
    rephrase = record.optional_text("rephrase_prompt")
    near = record.optional_text("locality_prompt")
    candidates = record.texts("relation_candidates")
    prompt = left.phrasing(record, record.text("prompt"), subject, "prompt")
    again = left.phrasing(record, rephrase, subject, "rephrasing")
    if prompt is None:
        return None
    return Case(
        record=record,
        id=_case_id(record),
        subject=subject,
        relation=candidates[0] if candidates else UNKNOWN,
        candidates=candidates,
        prompt=prompt,
        true=true,
        new=new,
        rephrasings=() if again is None else (again,),
        near=() if near is None else ((near, record.text("locality_ground_truth")),),
        flat=True,
    )


def _nested(record: Record, left: LeftOut) -> Case | None:
    rewrite = record.inside("requested_rewrite")
    subject = rewrite.text("subject")
    true, new = rewrite.inside("target_true").text("str"), rewrite.inside("target_new").text("str")
    different(rewrite, true, new)
    relation = rewrite.text("relation_id")
    paraphrases = record.texts("paraphrase_prompts")
    value = record.fields.get("neighborhood_prompts")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        near = tuple((r.text("prompt"), _answer(r)) for r in record.records("neighborhood_prompts"))
    else:
        near = tuple((text, true) for text in record.texts("neighborhood_prompts"))
    prompt = left.phrasing(rewrite, rewrite.text("prompt"), subject, "prompt", gap=True)
    again = [left.phrasing(record, p, subject, "rephrasing") for p in paraphrases]
    if prompt is None:
        return None
    return Case(
        record=record,
        id=_case_id(record),
        subject=subject,
        relation=relation,
        candidates=(relation,),
        prompt=prompt,
        true=true,
        new=new,
        rephrasings=tuple(p for p in again if p is not None),
        near=near,
        flat=False,
    )


def _answer(record: Record) -> str:
    """The answer of a neighborhood prompt of multi_counterfact: `target`, a text or `{str}`."""
    return (
        record.inside("target").text("str") if isinstance(record.fields.get("target"), dict) else record.text("target")
    )
