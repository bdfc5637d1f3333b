"""What sources that read records share: where the records lie (a file, or the Hub at a commit), and gathering a pool.

Knows no data set: what the keys mean is each source's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from retention.facts._part import FactsPart
from retention.facts._read import LeftOut, Record, locate, read_hub, read_records
from retention.records import check_pin
from retention.texts import Joint, nfc
from retention.types import Edit, Fact, FactPool, Hop


class FileFacts(FactsPart):
    """Settings of a source whose records lie in one file or Hub dataset. The seed of a draw never moves the records."""

    place: ClassVar[str]  # where the file is looked for below $RETENTION_DATA
    what: ClassVar[str]  # what the file is, for messages

    path: str | None = Field(
        None,
        description="the file; left out, the source's own place below $RETENTION_DATA; with `revision`: a Hub name",
    )
    revision: str | None = Field(None, description="commit of a dataset on the Hub, 40 hexadecimal digits")
    config: str | None = Field(None, description="Hub: configuration of the dataset")
    split: str | None = Field(None, description="Hub: split; left out: train")
    file: str | None = Field(None, description="Hub: this data file of the dataset alone")
    strict: bool = Field(
        False,
        description="refuse a record with a phrasing that lacks its subject; false omits the phrasing (the record, if "
        "it is the direct one) and counts it",
    )
    joint: Joint | None = Field(
        None,
        description="what parts a phrasing from its answer: space or none; default: none where neither side's script "
        "puts spaces between words or the phrasing ends in an opening mark, else a space",
    )

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.revision is None:
            clash = [name for name in ("config", "split", "file") if getattr(self, name) is not None]
            if clash:
                raise ValueError(
                    f"{clash[0]} is of a dataset on the Hub: give its commit as `revision`, or leave {clash[0]} out"
                )
        elif self.path is None:
            raise ValueError("revision: is of a dataset on the Hub: give its name as `path`, OWNER/NAME")
        else:
            check_pin(self.path, self.revision)
        return self

    def pool(self, seed: int) -> FactPool:
        """What the source offers. The seed draws what the data set leaves open; it never moves the records."""
        found = self.gather(seed)
        if self.joint is None:
            return found
        joint: Joint = self.joint

        def joined(fact: Fact) -> Fact:
            return replace(fact, joint=fact.joint or joint)

        return replace(
            found,
            facts=tuple(map(joined, found.facts)),
            edits=tuple(replace(e, fact=joined(e.fact)) for e in found.edits),
            neighborhood={id: tuple(map(joined, near)) for id, near in found.neighborhood.items()},
            hops={id: replace(hop, fact=joined(hop.fact)) for id, hop in found.hops.items()},
        )

    def gather(self, seed: int) -> FactPool:
        """The pool as the records have it. Raises UserError naming the file and the line or record."""
        raise TypeError(f"{type(self).__name__} must say what its records mean")

    def files(self) -> list[Path]:
        """The file that is read; none for the Hub, whose commit is among the settings."""
        return [] if self.revision is not None else [locate(self.path, self.place, self.what)]

    def records(self) -> list[Record]:
        """Every record. Raises UserError naming the file (or dataset) and the line or record."""
        if self.revision is not None:
            assert self.path is not None, "validated with the settings"
            return read_hub(self.path, self.config, self.split or "train", self.revision, self.file)
        return read_records(self.files()[0])


class Gathered:
    """A pool in the making: facts by id, edits, what stands beside them, and what was left out and why."""

    def __init__(self, strict: bool = False) -> None:
        self.facts: dict[str, Fact] = {}
        self.edits: dict[str, Edit] = {}  # fact id -> its edit
        self.neighborhood: dict[str, tuple[Fact, ...]] = {}
        self.objects: dict[str, dict[str, None]] = defaultdict(dict)
        self.hops: dict[str, Hop] = {}
        self.together: dict[str, str] = {}
        self.reversals: dict[str, str] = {}
        self.left = LeftOut(strict=strict)
        self.phrasing, self.dropped = self.left.phrasing, self.left.counts

    def fact(self, fact: Fact) -> None:
        """A true fact that a model may know. Of facts with one id the first stays."""
        self.facts.setdefault(fact.id, fact)
        self.objects[fact.kind][fact.target] = None

    def edit(self, fact: Fact, new: str, near: Sequence[Fact] = ()) -> None:
        """A candidate edit. A fact without an old object (an injection) is an edit alone, and no fact to be known."""
        if fact.target:
            self.fact(fact)
        self.edits[fact.id] = Edit(fact=fact, target=new, prompts=(fact.prompt,))
        self.objects[fact.kind][new] = None
        if near:
            self.neighborhood[fact.id] = tuple(near)

    def pool(self) -> FactPool:
        return FactPool(
            facts=tuple(self.facts.values()),
            edits=tuple(self.edits.values()),
            neighborhood=self.neighborhood,
            objects={relation: tuple(found) for relation, found in self.objects.items()},
            dropped={reason: n for reason, n in self.dropped.items() if n},
            hops=self.hops,
            reversals=self.reversals,
            together=self.together,
        )


def locality(id: str, question: str, answer: str, relation: str) -> Fact:
    """A question that an edit shall leave alone and that names no subject: the whole question stands for it."""
    return Fact(
        id=id, subject=question, relation=relation, prompt="{}", target=answer, tags=frozenset({"locality"})
    )  # fmt: skip


def first_answer(record: Record, key: str) -> str | None:
    """The answer under `key`: a text, or the first of a list, or of the first list in it; None where there is none.

    Lists hold aliases (["Rome", "Roma"]), lists in them one of these for every right answer. Raises UserError else.
    """
    value = record.fields.get(key)
    while isinstance(value, list) and value:
        value = value[0]
    if value is None or value == []:
        return None
    if not isinstance(value, str):
        raise record.error(f"{key!r} must be a text, or a list of texts, not {value!r}")
    return nfc(value.strip()) or None
