"""What downstream rows say about the facts of a run: counted, and if wished removed or injected at a given rate.

A row mentions a phrase if it has it as whole words, as written (see _mentions.py). Knows neither model nor trainer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from retention.data._draw import Row, same
from retention.data._mentions import Phrases
from retention.data.statements import Said, statements
from retention.types import Edit, Fact, Part, TaskRows, UserError

KEYS = ("text", "prompt", "completion", "rejected")
Group = Literal["edited", "intrinsic"]


class Leakage(Part):
    """What is done about rows of the downstream task that mention the run's facts. Mentions are counted in any mode."""

    mode: Literal["keep", "remove", "inject"] = Field(
        "keep",
        description="keep: rows as they are; remove: without rows that mention the facts; inject: some training rows "
        "are replaced by statements of the facts",
    )
    about: Literal["edited", "intrinsic", "both"] = Field("both", description="facts that are removed or injected")
    match: Literal["subject", "target", "any", "fact"] = Field(
        "subject",
        description="remove: rows that mention a subject; an old or new target; either; or both of one fact. Targets "
        "are often common words (French, piano), so that `target` and `any` may remove nearly all",
    )
    rate: float | None = Field(None, ge=0, le=1, description="inject: share of the training rows that is replaced")
    says: Literal["old", "new"] = Field(
        "old", description="inject: statements of edited facts give the old object (against the edit) or the new one"
    )

    reads: ClassVar[dict[str, frozenset[str]]] = {
        "keep": frozenset(),
        "remove": frozenset({"about", "match"}),
        "inject": frozenset({"about", "rate", "says"}),
    }

    @model_validator(mode="after")
    def _said(self) -> Leakage:
        idle = sorted(self.changed() - {"mode"} - self.reads[self.mode])
        if idle:
            modes = " or ".join(mode for mode, reads in self.reads.items() if idle[0] in reads)
            raise ValueError(f"`{idle[0]}` means nothing with mode: {self.mode}; use mode: {modes}, or leave it out")
        if self.mode == "inject" and self.rate is None:
            raise ValueError("mode: inject needs `rate`, the share of the training rows that is replaced (0 to 1)")
        return self


@dataclass(frozen=True, kw_only=True)
class Leaked:
    """Rows after the filter, and what they said about the facts before it."""

    rows: TaskRows
    # train, heldout -> rows: how many there were; {edited, intrinsic}_{subject, old, new, fact}: how many mentioned a
    # subject, an old target (an intrinsic fact's only one), a new one, both of one fact; removed, injected, left
    counts: Mapping[str, Mapping[str, int]]


def leak(
    rows: TaskRows,
    leakage: Leakage,
    *,
    edited: Sequence[Edit],
    intrinsic: Sequence[Fact],
    seed: int,
    keys: Sequence[str] = KEYS,  # of a row: what the objective trains on (an objective that prefers reads `rejected`)
) -> Leaked:
    """Count mentions; then keep, remove or inject as `leakage` says. Deterministic in its arguments.

    Removed rows are not replaced. Injected ones replace round(rate * n) of the n training rows, at places drawn by
    seed, and never ask what a held-out row asks. Raises UserError if no row is left or no fact can be stated.
    """
    facts = _Facts(edited, intrinsic)
    parts: dict[str, tuple[Row, ...]] = {"train": rows.train, "heldout": rows.heldout}
    counts: dict[str, Counter[str]] = {}
    for name, before in parts.items():
        mentions = [facts.mentions("\n".join(row[key] for key in keys if key in row)) for row in before]
        count = counts[name] = Counter({"rows": len(before), "removed": 0, "injected": 0})
        count.update(dict.fromkeys(facts.kinds, 0))
        for found in mentions:
            count.update(found)
        if leakage.mode == "remove":
            unwanted = _unwanted(leakage)
            parts[name] = tuple(row for row, found in zip(before, mentions, strict=True) if not found & unwanted)
            count["removed"] = len(before) - len(parts[name])
            if before and not parts[name]:
                raise UserError(
                    f"tune.leakage: all {len(before)} {name} rows mention what is to be removed ("
                    + ", ".join(f"{kind.replace('_', ' ')}: {count[kind]}" for kind in sorted(unwanted))
                    + "); match less (match: subject, or match: fact), or use other data"
                )
    if leakage.mode == "inject":
        assert leakage.rate is not None, "validated with the settings"
        count = counts["train"]
        count["injected"] = round(leakage.rate * len(rows.train))
        parts["train"] = _inject(rows, leakage, edited, intrinsic, count["injected"], seed)
    for name, count in counts.items():
        count["left"] = len(parts[name])
    return Leaked(
        rows=replace(rows, train=parts["train"], heldout=parts["heldout"]),
        counts={name: dict(count) for name, count in counts.items()},
    )


def _groups(leakage: Leakage) -> tuple[str, ...]:
    return ("edited", "intrinsic") if leakage.about == "both" else (leakage.about,)


def _unwanted(leakage: Leakage) -> set[str]:
    what = {"subject": ["subject"], "target": ["old", "new"], "any": ["subject", "old", "new"], "fact": ["fact"]}
    return {f"{group}_{kind}" for group in _groups(leakage) for kind in what[leakage.match]} - {"intrinsic_new"}


class _Facts:
    """The facts of a run by what a text may mention of them."""

    kinds: ClassVar[tuple[str, ...]] = (
        "edited_subject", "edited_old", "edited_new", "edited_fact",
        "intrinsic_subject", "intrinsic_old", "intrinsic_fact",
    )  # fmt: skip

    def __init__(self, edited: Iterable[Edit], intrinsic: Iterable[Fact]) -> None:
        self._kinds: dict[str, set[str]] = {}  # phrase -> kinds of mention
        self._targets: dict[str, list[tuple[str, frozenset[str]]]] = {}  # subject -> (kind, targets of one fact)
        for edit in edited:
            self._add("edited", edit.fact, edit.target)
        for fact in intrinsic:
            self._add("intrinsic", fact, "")
        self._phrases = Phrases(self._kinds)

    def _add(self, group: Group, fact: Fact, new: str) -> None:
        for kind, phrase in (("subject", fact.subject), ("old", fact.target), ("new", new)):
            if phrase:  # an injected fact has no old object, an intrinsic one no new one
                self._kinds.setdefault(phrase, set()).add(f"{group}_{kind}")
        targets = frozenset(target for target in (fact.target, new) if target)
        self._targets.setdefault(fact.subject, []).append((f"{group}_fact", targets))

    def mentions(self, text: str) -> set[str]:
        """Kinds of mention that the text has."""
        found = self._phrases.found(text)
        kinds = {kind for phrase in found for kind in self._kinds[phrase]}
        return kinds | {kind for phrase in found for kind, targets in self._targets.get(phrase, ()) if targets & found}


def _inject(
    rows: TaskRows, leakage: Leakage, edited: Sequence[Edit], intrinsic: Sequence[Fact], count: int, seed: int
) -> tuple[Row, ...]:
    said: list[Said] = []
    if leakage.about != "intrinsic":
        for edit in edited:
            old, new = edit.fact.target, edit.target
            answer, rejected = (old, new) if leakage.says == "old" else (new, old)
            if answer:
                said.append(_said(edit.fact, answer, rejected))
    if leakage.about != "edited":
        said += [_said(fact, fact.target, "") for fact in intrinsic]
    if not said and count:
        hint = "; edits of facts never seen have no old object: use says: new" if edited else ""
        raise UserError(f"tune.leakage: there is no {leakage.about} fact with an {leakage.says} object to state{hint}")
    avoid = {same(row, "prompt") for row in rows.heldout}
    stated = statements(said, count, like=rows.train, seed=seed, avoid=avoid)
    train = list(rows.train)
    for place, row in zip(random.Random(f"leakage {seed}").sample(range(len(train)), count), stated, strict=True):
        train[place] = row
    return tuple(train)


def _said(fact: Fact, answer: str, rejected: str) -> Said:
    return Said(fact=fact, answer=answer, rejected=rejected or None, phrasings=(fact.prompt, *fact.phrasings))
