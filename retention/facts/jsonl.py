"""Facts of one's own, one JSON object a line (or one JSON array of them).

Keys: `subject`, `object` (or `target_true`: the true object), and one of `prompt` (the direct phrasing),
`prompts` or `templates` (the first is the direct one; the others may be written with too). Optional: `target_new`
(makes the record an edit candidate), `paraphrases` or `held_out` (read by probes only), `neighborhood` (objects with
the same keys, or with `prompt` and `object` alone), `two_hop` (what follows from the fact: `relation`, `prompt`,
`object`, and `object_new`, what follows from `target_new`), `reversed` (a phrasing that ends in the subject, with one
`{}` for the object), `id`, `relation`, `exposures`, `popularity` (of the subject, a number), `tags`, `joint` (what
parts a phrasing from its answer: space or none), `source` (where the fact is from, for people). Any other phrasing has
one `{}` for the subject, or the subject itself.

The same files are what `retention pretrain --facts` reads, and the facts.jsonl that it writes is one of them.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast, get_args

from retention.facts._read import LeftOut, Record, different, one_gap
from retention.facts._source import FileFacts, Gathered
from retention.texts import Joint
from retention.types import Fact, FactPool, Hop

PLACE = "facts.jsonl"  # below $RETENTION_DATA
KEYS = (
    *("id", "subject", "relation", "object", "target_true", "target_new", "prompt", "prompts", "templates"),
    *("paraphrases", "held_out", "neighborhood", "two_hop", "reversed", "exposures", "popularity", "tags"),
    *("joint", "source"),
)


class JsonLines(FileFacts):
    """Facts of a file of one's own."""

    name: Literal["jsonl"] = "jsonl"
    place: ClassVar[str] = PLACE
    what: ClassVar[str] = "fact file"

    def gather(self, seed: int) -> FactPool:
        """All records; those with `target_new` are the edit candidates. The seed is not used."""
        found = Gathered(self.strict)
        seen: dict[str, str] = {}
        for n, record in enumerate(self.records()):
            fact = read_fact(record, f"fact-{n}", found.left)
            if fact is None:
                continue
            if fact.id in seen:
                raise record.error(f"its id {fact.id!r} is also that of {seen[fact.id]}")
            seen[fact.id] = record.place
            found.fact(fact)
            read = [_neighbor(r, fact, i, found.left) for i, r in enumerate(record.records("neighborhood"))]
            near = [f for f in read if f is not None]
            if near:
                found.neighborhood[fact.id] = tuple(near)
            if record.fields.get("reversed") is not None:
                found.reversals[fact.id] = one_gap(record, "reversed", record.text("reversed"), "object")
            hop = None if record.fields.get("two_hop") is None else _hop(record, fact, found.left)
            if hop is not None:
                found.hops[fact.id] = hop
                found.objects[hop.fact.kind].update(dict.fromkeys(hop.through.values()))
            new = record.optional_text("target_new")
            if new is not None:
                different(record, fact.target, new)
                found.edit(fact, new)
        return found.pool()


def read_fact(record: Record, default_id: str, left: LeftOut) -> Fact | None:
    """The fact of one record; None, and counted in `left`, where no phrasing names its subject.

    Raises UserError that names its place.
    """
    record.only(KEYS)
    subject = record.text("subject")
    phrasings = written(record, subject, left)
    exposures = record.number("exposures")
    if exposures is not None and not (exposures >= 0 and exposures.is_integer()):
        raise record.error(f"'exposures' must be a count, not {record.fields['exposures']!r}")
    said = [text for key in ("paraphrases", "held_out") for text in record.texts(key)]
    again = [left.phrasing(record, text, subject, "paraphrase", gap=True) for text in said]
    paraphrases = tuple(p for p in again if p is not None)
    both = set(phrasings) & set(paraphrases)
    if both:
        raise record.error(f"{min(both)!r} is written with and also among the paraphrases; probes must not read it")
    target = record.text("object", "target_true")
    if not phrasings:
        return None
    return Fact(
        id=record.optional_text("id") or default_id,
        subject=subject,
        relation=record.optional_text("relation"),
        prompt=phrasings[0],
        target=target,
        paraphrases=paraphrases,
        phrasings=phrasings[1:],
        exposures=None if exposures is None else int(exposures),
        tags=frozenset(record.texts("tags")),
        popularity=record.number("popularity"),
        joint=joint_of(record),
    )


def joint_of(record: Record) -> Joint | None:
    """What parts its phrasings from its object, where the record says so."""
    joint = record.optional_text("joint")
    if joint is not None and joint not in get_args(Joint):
        raise record.error(f"'joint' must be one of {', '.join(get_args(Joint))}, not {joint!r}")
    return cast("Joint | None", joint)


def written(record: Record, subject: str, left: LeftOut) -> tuple[str, ...]:
    """The direct phrasing, then the others that may be written with, each once.

    None of them, and counted in `left`, where the direct one lacks the subject. Raises UserError where none is given.
    """
    keys = ("prompt", "prompts", "templates")
    if not any(key in record.fields for key in keys):
        record.text(*keys)  # raises: says what is there instead
    said = [text for key in keys for text in record.texts(key)]
    if not said:
        raise record.error("no phrasing: give `prompt`, or a list `prompts` or `templates` that is not empty")
    direct, *others = (left.phrasing(record, text, subject, "prompt", gap=True) for text in said)
    return () if direct is None else tuple(dict.fromkeys([direct, *(p for p in others if p is not None)]))


def _hop(record: Record, fact: Fact, left: LeftOut) -> Hop | None:
    """What follows from the fact, and from its new object where that is given."""
    inside = record.inside("two_hop")
    inside.only(("relation", "prompt", "object", "object_new"))
    prompt = left.phrasing(inside, inside.text("prompt"), fact.subject, "two_hop prompt", gap=True)
    if prompt is None:
        return None
    consequence = Fact(
        id=f"{fact.id}-two-hop",
        subject=fact.subject,
        relation=inside.text("relation"),
        prompt=prompt,
        target=inside.text("object"),
        joint=fact.joint,
    )
    through = {fact.target: consequence.target}
    new, follows = record.optional_text("target_new"), inside.optional_text("object_new")
    if follows is not None:
        if new is None:
            raise inside.error("'object_new' says what follows from `target_new`, which this record does not have")
        through[new] = follows
    return Hop(fact=consequence, through=through)


def _neighbor(record: Record, fact: Fact, n: int, left: LeftOut) -> Fact | None:
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
            joint=fact.joint,
        )
    return read_fact(record, f"{fact.id}-near-{n}", left)
