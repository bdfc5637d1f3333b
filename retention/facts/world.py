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

from pydantic import Field

from retention.facts._part import FactsPart
from retention.types import Edit, Fact, FactPool
from retention.world import WorldModel, build


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
            if {wanted, "person"} <= fact.tags and "warm" not in fact.tags:
                editable.setdefault(fact.subject, []).append(fact)
        people = [person for person in made.people if person in editable]
        rng.shuffle(people)
        edits = [
            self._edit(rng, rng.choice(editable[person]), siblings.get(person, ()), made.objects)
            for person in people[: int(self.share * len(made.people))]
        ]
        return FactPool(facts=stated, edits=tuple(edits), objects=made.objects)

    def _edit(
        self, rng: random.Random, fact: Fact, siblings: Sequence[Fact], objects: Mapping[str, tuple[str, ...]]
    ) -> Edit:
        others = [other.prompt for other in siblings if other.relation != fact.relation]
        anchors = tuple(rng.sample(others, min(self.anchors, len(others)))) or ("{} is a",)
        target = fact.target
        if self.kind == "modification":
            target = rng.choice([o for o in objects[fact.relation] if o != fact.target])
        else:
            fact = replace(fact, target="")
        return Edit(fact=fact, target=target, prompts=(fact.prompt,), anchors=anchors)
