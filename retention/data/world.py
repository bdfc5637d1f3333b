"""Downstream tasks in the embedded world's own words, of graded distance from its facts.

text: plain sentences about nobody (another style than pretraining's). copy: repeat or reverse a row of words.
sentiment: the label of a review. new_facts: questions about people of whom pretraining says nothing; the held-out rows
ask for the same facts in other phrasings. What is trained on is prompt + " " + completion; completions end with " .",
as every sentence of the world does. Beside each completion stands a wrong one, `rejected`, for objectives that prefer:
the row in the other order, the other label, another person's answer to the same question. Knows neither model nor
trainer.
"""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field

from retention.data._draw import Drawn, Row
from retention.types import Fact, Part, UserError
from retention.world import World, WorldModel, build, phrases
from retention.world.generate import fill_slots

OTHER_LABEL = {"positive": "negative", "negative": "positive"}


class WorldTask(Part):
    """Rows of one of the world's tasks."""

    name: Literal["world"] = "world"
    task: Literal["text", "copy", "sentiment", "new_facts"] = Field(
        default="new_facts", description="in growing nearness to the facts: copy, sentiment, text, new_facts"
    )
    rows: int = Field(default=1600, ge=1, description="rows to train on")
    heldout: int = Field(default=100, ge=1, description="rows never trained on, to measure whether the task is learned")
    people: int = Field(default=20, ge=1, description="new_facts: of how many new people (eight facts each)")

    def load(self, world: WorldModel, seed: int) -> Drawn:
        """Rows drawn by seed; no held-out row is among the trained ones.

        {"text"} or {"prompt", "completion", "rejected"}.
        """
        rng = random.Random(f"task {self.task} {seed}")
        if self.task == "new_facts":
            return self._new_facts(build(world), rng, random.Random(f"rejected {seed}"))
        make = {"text": _text, "copy": _copy, "sentiment": _sentiment}[self.task]
        held: dict[tuple[str, ...], Row] = {}
        while len(held) < self.heldout:
            row = make(rng)
            held[tuple(row.values())] = row
        train: list[Row] = []
        while len(train) < self.rows:
            row = make(rng)
            if tuple(row.values()) not in held:
                train.append(row)
        return Drawn(train=tuple(train), heldout=tuple(held.values()))

    def _new_facts(self, world: World, rng: random.Random, other: random.Random) -> Drawn:
        """`other` draws the rejected answers: apart, so that the rest is drawn as without them."""
        if self.people > len(world.new_people):
            raise UserError(
                f"data.people: {self.people} new people were asked for; this world has {len(world.new_people)} "
                f"(model.new_people). Ask for at most {len(world.new_people)}, or make a world with more."
            )
        chosen = set(rng.sample(world.new_people, self.people))
        facts = [fact for fact in world.new_facts if fact.subject in chosen]
        asked = [(fact, form) for fact in facts for form in fact.paraphrases]
        if self.heldout > len(asked):
            raise UserError(
                f"data.heldout: {self.heldout} held-out rows were asked for; {self.people} new people give "
                f"{len(asked)}. Ask for at most {len(asked)}, or raise data.people."
            )
        everything = [o for objects in world.objects.values() for o in objects]
        rivals = {
            # A relation with one object has no wrong answer of its own.
            (relation, target): [o for o in objects if o != target] or [o for o in everything if o != target]
            for relation, objects in world.objects.items()
            for target in objects
        }

        def row(fact: Fact, form: str) -> Row:
            return _answer(fact.text(form), fact.target, other.choice(rivals[fact.kind, fact.target]))

        stated = [(fact, form) for fact in facts for form in (fact.prompt, *fact.phrasings)]
        train: list[Row] = []
        while len(train) < self.rows:  # pass after pass, each in an order of its own
            rng.shuffle(stated)
            train += [row(*pair) for pair in stated[: self.rows - len(train)]]
        held = [row(*pair) for pair in rng.sample(asked, self.heldout)]
        return Drawn(train=tuple(train), heldout=tuple(held))


def _answer(prompt: str, answer: str, rejected: str) -> Row:
    return {"prompt": prompt, "completion": f"{answer} .", "rejected": f"{rejected} ."}


def _text(rng: random.Random) -> Row:
    return {"text": " ".join(fill_slots(rng.choice(phrases.TEXT), rng) for _ in range(rng.randint(1, 3)))}


def _copy(rng: random.Random) -> Row:
    kind = rng.choice(sorted(phrases.COPY_PROMPTS))
    nouns = rng.sample(phrases.FILLER_WORDS["noun"], rng.randint(2, 4))
    answer = nouns if kind == "copy" else nouns[::-1]
    return _answer(phrases.COPY_PROMPTS[kind].replace("{}", " ".join(nouns)), " ".join(answer), " ".join(answer[::-1]))


def _sentiment(rng: random.Random) -> Row:
    """Two sentences; a plain one and a judging one, in either order."""
    label, judgements = rng.choice([("positive", phrases.POSITIVE), ("negative", phrases.NEGATIVE)])
    sentences = [
        fill_slots(rng.choice(phrases.REVIEWS), rng, judgement=rng.choice(judgements)),
        fill_slots(rng.choice(phrases.FILLER), rng),
    ]
    rng.shuffle(sentences)
    return _answer(phrases.SENTIMENT_PROMPT.replace("{}", " ".join(sentences)), label, OTHER_LABEL[label])
