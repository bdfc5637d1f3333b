"""Facts and edits of the embedded world (retention/world). Knows the world that is generated, not the model.

Modification gives a person's fact of full exposure another object of its relation; injection writes a fact that
pretraining left out. One candidate edit per person, of at most a quarter of the people by default: with more, the tiny
model runs out of room before the editor does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator

from retention.facts._part import FactsPart
from retention.facts._read import nearest
from retention.types import Edit, Fact, FactPool, Hop
from retention.world import World, WorldModel, build, phrases


class WorldFacts(FactsPart):
    """Facts of the embedded world, of the study's own `model: {name: world}`."""

    name: Literal["world"] = "world"
    kind: Literal["modification", "injection"] = Field(
        default="modification", description="change facts the model knows, or write facts it has never seen"
    )
    share: float = Field(default=0.25, gt=0, le=1, description="largest share of the people with a candidate edit")
    anchors: int = Field(
        default=3, ge=0, le=7, description="other relations of the subject whose answers an editor is told to keep"
    )
    relations: tuple[str, ...] | None = Field(
        default=None,
        description="relations of people that edits are drawn from; left out, all. Of `employer` alone something "
        "follows that two_hop asks: where the employer has its seat",
    )

    @field_validator("relations")
    @classmethod
    def _of_people(cls, relations: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = list(phrases.PERSON_RELATIONS)
        for relation in relations or ():
            if relation not in known:
                raise ValueError(
                    f"people have no relation {relation!r}{nearest(relation, known)}; known are {', '.join(known)}"
                )
        if relations == ():
            raise ValueError(f"name at least one of {', '.join(known)}, or leave it out")
        return relations

    def pool(self, world: WorldModel, seed: int) -> FactPool:
        """The world's facts, and candidate edits drawn by seed: people, relation, new object and anchors.

        Edited facts were all stated equally often: the few people whom pretraining begins with are left alone.

        `facts` are those that pretraining stated, graded exposures included (their tags and `exposures` tell). Anchors
        are direct prompts of other relations of the same subject; a draw must not probe those.
        """
        made = build(world)
        rng = random.Random(f"world facts {self.kind} {seed}")
        stated = tuple(fact for fact in made.facts if fact.exposures)
        siblings: dict[str, list[Fact]] = {}
        for fact in stated:
            siblings.setdefault(fact.subject, []).append(fact)

        wanted = "full" if self.kind == "modification" else "withheld"
        editable: dict[str, list[Fact]] = {}
        for fact in made.facts:
            relation_fits = self.relations is None or fact.kind in self.relations
            if relation_fits and {wanted, "person"} <= fact.tags and "warm" not in fact.tags:
                editable.setdefault(fact.subject, []).append(fact)
        people = [person for person in made.people if person in editable]
        rng.shuffle(people)
        edits = [
            self._edit(rng, rng.choice(editable[person]), siblings.get(person, ()), made.objects)
            for person in people[: int(self.share * len(made.people))]
        ]
        return FactPool(
            facts=stated,
            edits=tuple(edits),
            objects={**made.objects, phrases.TWO_HOP_RELATION: made.objects["headquarters"]},
            hops=_hops(made),
            reversals={fact.id: phrases.REVERSED[fact.kind] for fact in made.facts},
            end=" .",
        )

    def _edit(
        self, rng: random.Random, fact: Fact, siblings: Sequence[Fact], objects: Mapping[str, tuple[str, ...]]
    ) -> Edit:
        others = [other.prompt for other in siblings if other.relation != fact.kind]
        anchors = tuple(rng.sample(others, min(self.anchors, len(others)))) or ("{} is a",)
        target = fact.target
        if self.kind == "modification":
            target = rng.choice([o for o in objects[fact.kind] if o != fact.target])
        else:
            fact = replace(fact, target="")
        return Edit(fact=fact, target=target, prompts=(fact.prompt,), anchors=anchors)


def _hops(made: World) -> dict[str, Hop]:
    """By the id of a person's employer: where that company has its seat."""
    seat = {fact.subject: fact.target for fact in made.facts if fact.kind == "headquarters"}
    of = {fact.subject: fact for fact in made.two_hop}
    return {fact.id: Hop(fact=of[fact.subject], through=seat) for fact in made.facts if fact.kind == "employer"}
