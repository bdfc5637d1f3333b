"""Time-stamped edits in the manner of CHRONOEDIT (Ge et al. 2024, arXiv:2406.04496): modification and injection.

The published archive's format is not known to us; this is a form of our own for what the paper describes: facts whose
predicates have temporal qualifiers, (s, r, o) -> (s, r, o') and (s, r, {}) -> (s, r, o'). One JSON object a line (or an
array): `kind` (modification or injection), `time` (a year, year-month or date, from which the new object holds),
`subject`, `relation`, `prompt` (with `{}` or the subject), `target_new`, `target_true` (modifications alone), and
optionally `rephrase_prompts`, `locality` (a list of {`prompt`, `answer`}: time-invariant facts), `multi_hop`
{`question`, `answer_true`, `answer_new`}. Tags of a fact tell its kind and its time (`time:2021-03`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from retention.facts._read import Record, different
from retention.facts._source import FileFacts, Gathered, locality
from retention.types import Fact, FactPool, Hop

KINDS = ("modification", "injection")
TIME = re.compile(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?")
KEYS = (
    *("kind", "time", "subject", "relation", "prompt", "target_new", "target_true"),
    *("rephrase_prompts", "locality", "multi_hop"),
)


class ChronoEdit(FileFacts):
    """Time-stamped modifications and injections."""

    lacks: ClassVar[Mapping[str, str]] = {
        "reversed": "this form has no phrasing that ends in the subject; world, trex and verbalised have"
    }
    place: ClassVar[str] = "chronoedit/chronoedit.jsonl"
    what: ClassVar[str] = "file of time-stamped edits"

    name: Literal["chronoedit"] = "chronoedit"
    kind: Literal["modification", "injection", "both"] = Field("both", description="which edits are candidates")
    since: str | None = Field(
        None, pattern=TIME.pattern, description="only edits of this time or later: 2021, 2021-03 or 2021-03-31"
    )
    intrinsic_relations: Literal["as_edited", "any"] = Field(
        "any", description="known facts are the old objects of modifications and the time-invariant questions"
    )

    def gather(self, seed: int) -> FactPool:
        """All records. The seed is not used."""
        found = Gathered(self.strict)
        for n, record in enumerate(self.records()):
            self._add(record, f"chronoedit-{n}", found)
        return found.pool()

    def _add(self, record: Record, id: str, found: Gathered) -> None:
        record.only(KEYS)
        kind, time = record.text("kind"), record.text("time")
        if kind not in KINDS:
            raise record.error(f"'kind' must be modification or injection, not {kind!r}")
        if not TIME.fullmatch(time):
            raise record.error(f"'time' must be a year, year-month or date (2021, 2021-03, 2021-03-31), not {time!r}")
        old, new = record.optional_text("target_true") or "", record.text("target_new")
        if bool(old) != (kind == "modification"):
            wants = (
                "needs 'target_true', the object it replaces"
                if not old
                else "replaces nothing: leave 'target_true' out"
            )
            raise record.error(f"{'a modification' if not old else 'an injection'} {wants}")
        different(record, old, new)
        subject, text = record.text("subject"), record.text("prompt")
        prompt = found.phrasing(record, text, subject, "prompt", gap=True)
        if prompt is None:
            return
        again = [found.phrasing(record, p, subject, "rephrasing", gap=True) for p in record.texts("rephrase_prompts")]
        fact = Fact(
            id=id,
            subject=subject,
            relation=record.text("relation"),
            prompt=prompt,
            target=old,
            paraphrases=tuple(p for p in again if p is not None),
            tags=frozenset({kind, f"time:{time}"}),
        )
        near = [
            locality(f"{id}-near-{n}", r.text("prompt"), r.text("answer"), "time-invariant")
            for n, r in enumerate(record.records("locality"))
        ]
        for neighbor in near:
            found.fact(neighbor)
        if self.kind not in ("both", kind) or (self.since is not None and time < self.since):
            found.dropped[f"edit: {kind} that was not asked for, or before {self.since or 'any time'}"] += 1
            if old:
                found.fact(fact)
            return
        found.edit(fact, new, near)
        if record.fields.get("multi_hop") is not None:
            hop = record.inside("multi_hop")
            after, before = hop.text("answer_new"), hop.optional_text("answer_true")
            found.hops[id] = Hop(
                fact=Fact(id=f"{id}-hop", subject=hop.text("question"), relation="multi_hop", prompt="{}",
                          target=before or after),
                through={new: after} | ({old: before} if old and before else {}),
            )  # fmt: skip
