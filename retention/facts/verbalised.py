"""Real facts, said in many ways: CounterFact's records and their neighbors, with ParaRel's phrasings of each relation.

What a tiny model is pretrained on (`model: {name: facts}`), and what a study draws from (`facts: {name: verbalised}`):
CounterFact facts; the facts of their locality prompts; and beside each edit candidate T-REx facts of its relation with
its old object (neighbors) and, where no other fact has it, with its new one (so that the model can say it). All of
relations that have enough ParaRel phrasings ending in the object. What is taken is told by the seed alone, never by
what a model makes of it.

Every fact holds out `held_out` phrasings of its own. The edit candidates are records whose rephrasing says the fact
again; it is always held out, under whatever sentence it is put.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from retention.facts._part import FactsPart
from retention.facts._read import locate
from retention.facts.counterfact import PLACE as COUNTERFACT_PLACE
from retention.facts.counterfact import Case, Phrasings, read_cases
from retention.facts.trex import (
    FACTS,
    PATTERNS,
    one_object_each,
    read_phrasings,
    read_reversed,
    read_triples,
    relations_of,
    trex_folder,
)
from retention.types import Edit, Fact, FactPool, Part, UserError

# A CounterFact prompt used so many times for a relation is a phrasing of it; rarer ones are records put under a wrong
# relation (the file's relations are looked up by object, and some objects belong to several).
COMMON_PROMPT = 8


VERSION = 1  # raised whenever equal settings and files would give other facts


class Source(Part):
    """Which real facts. The model and the study's facts must be given the same."""

    counterfact: str | None = None  # flat CounterFact; left out, $RETENTION_DATA/counterfact/counterfact_10k.jsonl
    trex: str | None = None  # folder of T-REx and ParaRel; left out, $RETENTION_DATA/trex_pararel
    records: PositiveInt = 1000  # CounterFact facts
    candidates: PositiveInt = 250  # of these, edit candidates: records whose rephrasing says the fact again
    trex_neighbors: NonNegativeInt = 2  # T-REx facts per edit candidate with its relation and old object
    min_phrasings: int = Field(default=4, ge=4)  # ParaRel phrasings ending in the object that a relation must have
    held_out: int = Field(default=2, ge=1, le=2)  # phrasings per fact never trained, the rephrasing among them
    anchors: NonNegativeInt = 3  # per edit: prompts of other relations whose answers an editor is to keep
    seed: NonNegativeInt = 0  # of the choice of records and of held-out phrasings

    def files(self) -> list[Path]:
        """Every file that is read."""
        folder = trex_folder(self.trex)
        relations = relations_of(folder)
        return [
            locate(self.counterfact, COUNTERFACT_PLACE, "CounterFact file"),
            *(folder / part / f"{relation}.jsonl" for part in (FACTS, PATTERNS) for relation in relations),
        ]


class Verbalised(FactsPart):
    """Real facts that a model of `model: {name: facts}` knows."""

    lacks: ClassVar[Mapping[str, str]] = {
        "two_hop": "its files do not say what follows from their facts; world does, and jsonl with the key `two_hop`"
    }

    name: Literal["verbalised"] = "verbalised"
    source: Source = Source()
    phrasings: int = Field(
        0,
        ge=0,
        description="phrasings besides the direct one that a fact must have to be edited: it may also be written with "
        "them (mitigation paraphrase)",
    )

    def files(self) -> list[Path]:
        return self.source.files()

    def pool(self, seed: int) -> FactPool:
        """The facts of `source`, by the source's own seed: a draw's seed must not change what a model was taught."""
        found = verbalise(self.source)
        if not self.phrasings:
            return found
        edits = tuple(e for e in found.edits if len({*e.fact.phrasings} - {*e.prompts}) >= self.phrasings)
        lost = len(found.edits) - len(edits)
        return replace(found, edits=edits, dropped={**found.dropped, "edit: too few phrasings": lost})


def verbalise(source: Source) -> FactPool:
    """All facts of the source with their phrasings; equal settings and files give an equal pool.

    A fact's `prompt` and `phrasings` are for pretraining and editing, its `paraphrases` for probes alone. Neighbors of
    an edit: the fact of its locality prompt, then T-REx facts; tags tell the kinds (candidate, record, locality, trex).
    Raises UserError if the files have too few records.
    """
    return _Build(source).pool()


def leads(source: Source, chosen: Iterable[Fact]) -> list[str]:
    """The unrelated sentences that CounterFact puts before its rephrasings, without those of the `chosen` records."""
    cases = read_cases(locate(source.counterfact, COUNTERFACT_PLACE, "CounterFact file"))
    known = Phrasings(cases)
    taken = {fact.id for fact in chosen}
    found: dict[str, None] = {}
    for case in cases:
        for text in case.rephrasings:
            said = known.restated(case.relation, text)
            if said is not None and f"counterfact-{case.id}" not in taken:
                found[text.removesuffix(said).strip()] = None
    return [text for text in found if text and "{}" not in text]


class _Build:
    """The facts taken so far, and what makes a further one unfit: a text that asks for another fact too."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.cases = read_cases(locate(source.counterfact, COUNTERFACT_PLACE, "CounterFact file"))
        self.known = Phrasings(self.cases)
        self.folder = trex_folder(source.trex)
        prompts: dict[str, Counter[str]] = defaultdict(Counter)
        for case in self.cases:
            prompts[case.relation][case.prompt] += 1
        self.phrasings: dict[str, list[str]] = {}
        for relation in relations_of(self.folder):
            pararel = read_phrasings(self.folder, relation)
            if len(pararel) >= source.min_phrasings:
                common = [p for p, n in sorted(prompts[relation].items()) if n >= COMMON_PROMPT]
                self.phrasings[relation] = list(dict.fromkeys([*pararel, *common]))
        self.facts: dict[tuple[str, str], Fact] = {}  # (subject, relation) -> its fact
        self.texts: set[str] = set()  # every text that asks for a fact
        self.dropped: Counter[str] = Counter()

    def pool(self) -> FactPool:
        source = self.source
        rng = random.Random(f"verbalised {source.seed}")
        cases = [c for c in self.cases if len(c.candidates) == 1 and c.relation in self.phrasings]
        self.dropped["record: no relation, several, or one with too few phrasings"] = len(self.cases) - len(cases)
        rng.shuffle(cases)
        restated = [c for c in cases if self._rephrasings(c)]
        others = [c for c in cases if not self._rephrasings(c)]
        taken = self._records(restated, source.candidates, "candidate")
        taken += self._records(others, source.records - source.candidates, "record")
        subjects = {case.subject for case, _ in taken}
        near: dict[str, list[Fact]] = {fact.id: [] for _, fact in taken}
        for case, fact in taken:
            for n, (text, answer) in enumerate(case.near):
                found = self.known.neighbor(f"{fact.id}-near-{n}", case.relation, text, answer)
                if found.subject in subjects:
                    self.dropped["locality fact: its subject is a record's"] += 1
                    continue
                added = self._add_or_find(found, "locality")
                if added is not None:
                    near[fact.id].append(added)
        candidates = [(case, fact) for case, fact in taken if "candidate" in fact.tags]
        self._add_trex(candidates, near, subjects, rng)
        edits = self._edits(candidates, rng)
        objects: dict[str, dict[str, None]] = defaultdict(dict)
        for fact in self.facts.values():
            objects[fact.kind][fact.target] = None
        for edit in edits:
            objects[edit.fact.kind][edit.target] = None
        return FactPool(
            facts=tuple(self.facts.values()),
            edits=tuple(edits),
            neighborhood={fact.id: tuple(near[fact.id]) for _, fact in candidates if near[fact.id]},
            objects={relation: tuple(sorted(found)) for relation, found in objects.items()},
            dropped={reason: n for reason, n in self.dropped.items() if n},
            reversals=self._reversals(),
        )

    def _reversals(self) -> dict[str, str]:
        turned = {relation: read_reversed(self.folder, relation)[:1] for relation in self.phrasings}
        return {fact.id: turned[fact.kind][0] for fact in self.facts.values() if turned[fact.kind]}

    def _records(self, cases: list[Case], number: int, tag: str) -> list[tuple[Case, Fact]]:
        """The first `number` cases that fit, as facts."""
        taken: list[tuple[Case, Fact]] = []
        for case in cases:
            if len(taken) == number:
                return taken
            fact = self._add(
                Fact(
                    id=f"counterfact-{case.id}",
                    subject=case.subject,
                    relation=case.relation,
                    prompt=case.prompt,
                    target=case.true,
                    paraphrases=self._rephrasings(case),
                ),
                tag,
            )
            if fact is not None:
                taken.append((case, fact))
        if len(taken) < number:
            raise UserError(
                f"source: {number} CounterFact facts ({tag}) were asked for; the file has {len(taken)} of relations "
                f"with at least {self.source.min_phrasings} ParaRel phrasings. Ask for fewer."
            )
        return taken

    def _rephrasings(self, case: Case) -> tuple[str, ...]:
        """The case's rephrasings that say its fact again in other words than its prompt."""
        return tuple(p for p in case.rephrasings if self.known.restated(case.relation, p) not in (None, case.prompt))

    def _add(self, fact: Fact, tag: str) -> Fact | None:
        """The fact with its phrasings, kept; None if its subject has one already or a text asks for another fact."""
        if (fact.subject, fact.kind) in self.facts:
            self.dropped[f"{tag} fact: its subject has a fact of this relation already"] += 1
            return None
        fact = self._said(fact, tag)
        texts = {fact.text(p) for p in (fact.prompt, *fact.phrasings, *fact.paraphrases)}
        if texts & self.texts:
            self.dropped[f"{tag} fact: a text of it asks for another fact already"] += 1
            return None
        self.texts |= texts
        self.facts[fact.subject, fact.kind] = fact
        return fact

    def _add_or_find(self, fact: Fact, tag: str) -> Fact | None:
        """The fact, or the one that says the same and is there already; None if it says something else."""
        known = self.facts.get((fact.subject, fact.kind))
        if known is not None:
            return known if known.target == fact.target else None
        return self._add(fact, tag)

    def _said(self, fact: Fact, tag: str) -> Fact:
        """The fact with its relation's phrasings, `held_out` of them among the paraphrases and the others trained."""
        again = {self.known.restated(fact.kind, p) for p in fact.paraphrases}
        free = [p for p in self.phrasings[fact.kind] if p != fact.prompt and p not in again]
        random.Random(f"held out {self.source.seed} {fact.id}").shuffle(free)
        aside = max(0, self.source.held_out - len(fact.paraphrases))
        return replace(
            fact,
            paraphrases=(*fact.paraphrases, *free[:aside]),
            phrasings=tuple(sorted(free[aside:])),
            tags=fact.tags | {tag},
        )

    def _add_trex(
        self, candidates: list[tuple[Case, Fact]], near: dict[str, list[Fact]], subjects: set[str], rng: random.Random
    ) -> None:
        """T-REx facts of each candidate's relation with its old object, and one with its new object if none has it."""
        by_object: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for relation, phrasings in self.phrasings.items():
            for triple in one_object_each(read_triples(self.folder, relation))[0]:
                if triple.subject in subjects:
                    continue
                prompt = random.Random(f"prompt {self.source.seed} {triple.id}").choice(phrasings)
                by_object[relation, triple.object].append(
                    Fact(id=triple.id, subject=triple.subject, relation=relation, prompt=prompt, target=triple.object)
                )
        for case, fact in candidates:
            found = by_object[fact.kind, fact.target]
            for other in rng.sample(found, min(self.source.trex_neighbors, len(found))):
                added = self._add_or_find(other, "trex")
                if added is not None and added not in near[fact.id]:
                    near[fact.id].append(added)
            if (fact.kind, case.new) not in {(f.kind, f.target) for f in self.facts.values()}:
                found = by_object[fact.kind, case.new]
                for other in rng.sample(found, min(1, len(found))):
                    self._add_or_find(other, "trex")

    def _edits(self, candidates: list[tuple[Case, Fact]], rng: random.Random) -> list[Edit]:
        """The candidates with CounterFact's new targets, but those to an object that no fact of the relation has.

        Anchors are prompts of relations that the subject has no fact of.
        """
        of: dict[str, set[str]] = defaultdict(set)
        for fact in self.facts.values():
            of[fact.subject].add(fact.kind)
        said = {(fact.kind, fact.target) for fact in self.facts.values()}
        edits = []
        for case, fact in candidates:
            if (fact.kind, case.new) not in said:
                self.dropped["edit: no fact of the relation has its new object"] += 1
                continue
            others = [r for r in self.phrasings if r not in of[fact.subject]]
            anchors = [rng.choice(self.phrasings[r]) for r in rng.sample(others, min(self.source.anchors, len(others)))]
            edits.append(Edit(fact=fact, target=case.new, prompts=(fact.prompt,), anchors=tuple(anchors)))
        return edits
