"""Facts of one's own, one JSON object a line (or one JSON array of them).

Keys: `subject`, `relation`, `object` (or `target_true`: the true object), and one of `prompt` (the direct phrasing),
`prompts` or `templates` (the first is the direct one; the others may be written with too). Optional: `target_new`
(makes the record an edit candidate), `paraphrases` or `held_out` (read by probes only), `neighborhood` (objects with
the same keys, or with `prompt` and `object` alone), `two_hop` (what follows from the fact: `relation`, `prompt`,
`object`, and `object_new`, what follows from `target_new`), `reversed` (a phrasing that ends in the subject, with one
`{}` for the object), `id`, `exposures`, `popularity` (of
the subject, a number), `tags`, `source` (where the fact is from, for people). Any other phrasing has one `{}` for the
subject, or the subject itself.

The same files are what `retention pretrain --facts` reads, and the facts.jsonl that it writes is one of them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar, Literal

from retention.facts._read import Record, different, one_gap, phrasing_of
from retention.facts._source import FileFacts
from retention.types import Edit, Fact, FactPool, Hop

PLACE = "facts.jsonl"  # below $RETENTION_DATA
KEYS = (
    *("id", "subject", "relation", "object", "target_true", "target_new", "prompt", "prompts", "templates"),
    *("paraphrases", "held_out", "neighborhood", "two_hop", "reversed", "exposures", "popularity", "tags", "source"),
)


class JsonLines(FileFacts):
    """Facts of a file of one's own."""

    name: Literal["jsonl"] = "jsonl"
    place: ClassVar[str] = PLACE
    what: ClassVar[str] = "fact file"

    def pool(self, seed: int) -> FactPool:
        """All records; those with `target_new` are the edit candidates. The seed is not used."""
        facts: list[Fact] = []
        edits: list[Edit] = []
        neighborhood: dict[str, tuple[Fact, ...]] = {}
        objects: dict[str, dict[str, None]] = defaultdict(dict)
        hops: dict[str, Hop] = {}
        reversals: dict[str, str] = {}
        seen: dict[str, str] = {}
        for n, record in enumerate(self.records()):
            fact = read_fact(record, f"fact-{n}")
            if fact.id in seen:
                raise record.error(f"its id {fact.id!r} is also that of {seen[fact.id]}")
            seen[fact.id] = record.place
            facts.append(fact)
            objects[fact.relation][fact.target] = None
            near = tuple(_neighbor(r, fact, i) for i, r in enumerate(record.records("neighborhood")))
            if near:
                neighborhood[fact.id] = near
            if record.fields.get("reversed") is not None:
                reversals[fact.id] = one_gap(record, "reversed", record.text("reversed"), "object")
            if record.fields.get("two_hop") is not None:
                hops[fact.id] = hop = _hop(record, fact)
                objects[hop.fact.relation].update(dict.fromkeys(hop.through.values()))
            new = record.optional_text("target_new")
            if new is not None:
                different(record, fact.target, new)
                edits.append(Edit(fact=fact, target=new, prompts=(fact.prompt,)))
                objects[fact.relation][new] = None
        return FactPool(
            facts=tuple(facts),
            edits=tuple(edits),
            neighborhood=neighborhood,
            objects={relation: tuple(found) for relation, found in objects.items()},
            hops=hops,
            reversals=reversals,
        )


def read_fact(record: Record, default_id: str) -> Fact:
    """The fact of one record. Raises UserError that names its place."""
    record.only(KEYS)
    subject = record.text("subject")
    phrasings = written(record, subject)
    exposures = record.fields.get("exposures")
    if exposures is not None and (isinstance(exposures, bool) or not isinstance(exposures, int) or exposures < 0):
        raise record.error(f"'exposures' must be a count, not {exposures!r}")
    unseen = ("paraphrases", "held_out")
    popularity = record.fields.get("popularity")
    if popularity is not None and (isinstance(popularity, bool) or not isinstance(popularity, int | float)):
        raise record.error(f"'popularity' must be a number, not {popularity!r}")
    paraphrases = tuple(_phrasing(record, key, text, subject) for key in unseen for text in record.texts(key))
    both = set(phrasings) & set(paraphrases)
    if both:
        raise record.error(f"{min(both)!r} is written with and also among the paraphrases; probes must not read it")
    return Fact(
        id=record.optional_text("id") or default_id,
        subject=subject,
        relation=record.text("relation"),
        prompt=phrasings[0],
        target=record.text("object", "target_true"),
        paraphrases=paraphrases,
        phrasings=phrasings[1:],
        exposures=exposures,
        tags=frozenset(record.texts("tags")),
        popularity=popularity,
    )


def written(record: Record, subject: str) -> tuple[str, ...]:
    """The direct phrasing, then the others that may be written with, each once. Raises UserError for none."""
    keys = ("prompt", "prompts", "templates")
    if not any(key in record.fields for key in keys):
        record.text(*keys)  # raises: says what is there instead
    found = [_phrasing(record, key, text, subject) for key in keys for text in record.texts(key)]
    if not found:
        raise record.error("no phrasing: give `prompt`, or a list `prompts` or `templates` that is not empty")
    return tuple(dict.fromkeys(found))


def _phrasing(record: Record, key: str, text: str, subject: str) -> str:
    if "{}" in text:
        return one_gap(record, key, text)
    phrasing = phrasing_of(text, subject)
    if phrasing is None:
        raise record.error(f"the subject {subject!r} does not occur in its {key} {text!r}; write it there, or {{}}")
    return phrasing


def _hop(record: Record, fact: Fact) -> Hop:
    """What follows from the fact, and from its new object where that is given."""
    inside = record.inside("two_hop")
    inside.only(("relation", "prompt", "object", "object_new"))
    consequence = Fact(
        id=f"{fact.id}-two-hop",
        subject=fact.subject,
        relation=inside.text("relation"),
        prompt=_phrasing(inside, "prompt", inside.text("prompt"), fact.subject),
        target=inside.text("object"),
    )
    through = {fact.target: consequence.target}
    new, follows = record.optional_text("target_new"), inside.optional_text("object_new")
    if follows is not None:
        if new is None:
            raise inside.error("'object_new' says what follows from `target_new`, which this record does not have")
        through[new] = follows
    return Hop(fact=consequence, through=through)


def _neighbor(record: Record, fact: Fact, n: int) -> Fact:
    """A neighbor: a whole fact, or a prompt and its answer (then the whole prompt stands for the subject)."""
    if "subject" not in record.fields:
        record.only(("prompt", "object"))
        return Fact(
            id=f"{fact.id}-near-{n}",
            subject=record.text("prompt"),
            relation=fact.relation,
            prompt="{}",
            target=record.text("object"),
            tags=frozenset({"locality"}),
        )
    return read_fact(record, f"{fact.id}-near-{n}")
