"""A seeded world of people, cities, companies and countries, and the facts about them. Pure Python, under a second.

Knows no model. Every entity's last token is its own: the key at a subject's last token then tells subjects apart,
without which a batch of edits wrecks its neighbours. An object's first token is its own too, so that the later tokens
of an answer follow from the first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from retention.types import Fact, content_id
from retention.world import phrases
from retention.world.names import Names
from retention.world.settings import WorldSettings
from retention.world.stream import Material

_WORDS = re.compile(r"\w+|[^\w\s]+")
GRADES = (3, 6, 12, 24, 48, 96, 192)  # statements in pretraining of the graded facts
TWO_HOP_EXPOSURES = 10


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything there is in one world. Objects and names are in the tokenizer's spacing already."""

    # Of people and places; `exposures` is exact. Tags: full, graded or withheld; person or place; warm where the first
    # part of pretraining states it too.
    facts: tuple[Fact, ...]
    two_hop: tuple[Fact, ...]  # employer -> headquarters of a person; tags: two_hop, and stated or unstated
    new_facts: tuple[Fact, ...]  # about people of whom pretraining says nothing; tag: new
    people: tuple[str, ...]
    new_people: tuple[str, ...]
    objects: Mapping[str, tuple[str, ...]]  # relation -> all its objects
    filler: tuple[str, ...]  # sentences about nobody, as many as the pretraining stream takes
    warm: frozenset[str]  # ids of the facts that the first part of pretraining keeps to
    vocabulary: tuple[str, ...]  # every word of the world, its downstream tasks included


def words(text: str) -> list[str]:
    """The text cut as the world's tokenizer cuts it: runs of letters and digits, runs of punctuation."""
    return _WORDS.findall(text)


def fill_slots(template: str, rng: random.Random, **fixed: str) -> str:
    """A sentence with every {slot} of a filler template drawn anew, but for those given."""

    def draw(match: re.Match[str]) -> str:
        slot = match.group(1)
        return fixed[slot] if slot in fixed else rng.choice(phrases.FILLER_WORDS[slot])

    return re.sub(r"\{(\w+)\}", draw, template)


def _template_words() -> set[str]:
    found: set[str] = set()
    relations = {**phrases.PERSON_RELATIONS, **phrases.PLACE_RELATIONS, phrases.TWO_HOP_RELATION: phrases.TWO_HOP}
    texts = [text.replace("{}", " ") for group in relations.values() for text in group]
    texts += [re.sub(r"\{\w*\}", " ", t) for t in (*phrases.FILLER, *phrases.TEXT, *phrases.STREET, *phrases.REVIEWS)]
    texts += [t.replace("{}", " ") for t in (phrases.SENTIMENT_PROMPT, *phrases.COPY_PROMPTS.values())]
    texts += ["{} is a".replace("{}", " "), "positive negative"]
    for text in texts:
        found.update(words(text))
    for group in (
        phrases.LANGUAGES,
        phrases.PROFESSIONS,
        phrases.INSTRUMENTS,
        phrases.PETS,
        phrases.SPORTS,
        phrases.UNIVERSITY_KINDS,
        phrases.COMPANY_KINDS,
        phrases.POSITIVE,
        phrases.NEGATIVE,
        *phrases.FILLER_WORDS.values(),
    ):
        found.update(group)
    return found


def _fact(rng: random.Random, subject: str, relation: str, target: str, texts: Sequence[str], held_out: int) -> Fact:
    direct, others = texts[0], list(texts[1:])
    rng.shuffle(others)
    return Fact(
        id=content_id(["world", subject, relation]),
        subject=subject,
        relation=relation,
        prompt=direct,
        target=target,
        paraphrases=tuple(others[:held_out]),
        phrasings=tuple(others[held_out:]),
    )


def _spread(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """`count` draws in which every value occurs about equally often: objects shared between subjects."""
    pool = [values[i % len(values)] for i in range(count)]
    rng.shuffle(pool)
    return pool


def _tagged(fact: Fact, exposures: int, *tags: str) -> Fact:
    return replace(fact, exposures=exposures, tags=fact.tags | set(tags))


@lru_cache(maxsize=8)
def build(settings: WorldSettings) -> World:
    """The world of these settings and their seed. Made once in a process: nothing in it can be changed."""
    rng = random.Random(f"world {settings.seed}")
    known = _template_words()
    names = Names(rng, known)

    firsts = names.many(max(8, settings.people // 5))
    people = [f"{rng.choice(firsts)} {names.draw()}" for _ in range(settings.people)]
    new_people = [f"{rng.choice(firsts)} {names.draw()}" for _ in range(settings.new_people)]
    cities = [f"{names.draw()} {names.draw()}" for _ in range(settings.cities)]
    countries = [f"{names.draw()} {names.draw(3)}" for _ in range(settings.countries)]
    kinds = _spread(rng, phrases.COMPANY_KINDS, settings.companies)
    companies = [f"{names.draw()} {kind} {names.draw()}" for kind in kinds]
    universities = [f"{names.draw()} {kind}" for kind in _spread(rng, phrases.UNIVERSITY_KINDS, 12)]

    objects: dict[str, Sequence[str]] = {
        "birthplace": cities,
        "employer": companies,
        "language": phrases.LANGUAGES,
        "profession": phrases.PROFESSIONS,
        "university": universities,
        "instrument": phrases.INSTRUMENTS,
        "pet": phrases.PETS,
        "sport": phrases.SPORTS,
        "country": countries,
        "headquarters": cities,
        "capital": cities,
    }

    def facts_of(subjects: Sequence[str], relation: str, texts: Sequence[str]) -> list[Fact]:
        targets = _spread(rng, objects[relation], len(subjects))
        return [
            _fact(rng, subject, relation, target, texts, settings.held_out)
            for subject, target in zip(subjects, targets, strict=True)
        ]

    person_facts = [
        f for relation, texts in phrases.PERSON_RELATIONS.items() for f in facts_of(people, relation, texts)
    ]
    new_facts = [
        f for relation, texts in phrases.PERSON_RELATIONS.items() for f in facts_of(new_people, relation, texts)
    ]
    place_facts = facts_of(cities, "country", phrases.PLACE_RELATIONS["country"])
    place_facts += facts_of(companies, "headquarters", phrases.PLACE_RELATIONS["headquarters"])
    place_facts += _capitals(rng, place_facts, countries, settings.held_out)

    facts, warm = _exposed(rng, settings, people, person_facts, place_facts)
    two_hop = _two_hop(rng, settings, facts)
    stated = sum(f.exposures or 0 for f in (*facts, *two_hop))
    filler = _filler(rng, round(stated * settings.filler / (1 - settings.filler)), [p.split()[-1] for p in new_people])

    vocabulary = known.union(*(words(text) for text in (*people, *new_people, *cities, *countries, *companies)))
    vocabulary = vocabulary.union(*(words(text) for text in universities))
    return World(
        facts=tuple(facts),
        two_hop=tuple(two_hop),
        new_facts=tuple(_tagged(f, 0, "new", "person") for f in new_facts),
        people=tuple(people),
        new_people=tuple(new_people),
        objects=MappingProxyType({relation: tuple(values) for relation, values in objects.items()}),
        filler=tuple(filler),
        warm=frozenset(warm),
        vocabulary=tuple(sorted(vocabulary)),
    )


def material(settings: WorldSettings) -> Material:
    """What the world's model is pretrained on; facts that are withheld or left unstated have exposures 0."""
    world = build(settings)
    return Material(facts=(*world.facts, *world.two_hop), warm=world.warm, text=world.filler, end=" .")


def _capitals(rng: random.Random, city_facts: Iterable[Fact], countries: Sequence[str], held_out: int) -> list[Fact]:
    """Each country's capital is one of its own cities."""
    texts = phrases.PLACE_RELATIONS["capital"]
    inside: dict[str, list[str]] = {}
    for fact in city_facts:
        if fact.relation == "country":
            inside.setdefault(fact.target, []).append(fact.subject)
    return [_fact(rng, c, "capital", rng.choice(inside[c]), texts, held_out) for c in countries if c in inside]


def _exposed(
    rng: random.Random, settings: WorldSettings, people: Sequence[str], persons: Sequence[Fact], places: Sequence[Fact]
) -> tuple[list[Fact], set[str]]:
    """Facts with their exposures and tags, and the ids of those that the first part of pretraining keeps to."""
    shuffled = list(people)
    rng.shuffle(shuffled)
    early, rest = set(shuffled[: settings.warm_people]), shuffled[settings.warm_people :]
    relations = list(phrases.PERSON_RELATIONS)
    n_withheld = min(settings.withheld, len(rest))
    withheld = {(person, rng.choice(relations)) for person in rest[:n_withheld]}
    others = rest[n_withheld:]
    graded: dict[tuple[str, str], int] = {}
    for i in range(min(settings.graded, len(others)) // len(GRADES) * len(GRADES)):
        graded[others[i], rng.choice(relations)] = GRADES[i % len(GRADES)]

    facts, warm = [], set()
    for fact in persons:
        place = (fact.subject, fact.relation)
        if place in withheld:
            facts.append(_tagged(fact, 0, "withheld", "person"))
        elif place in graded:
            facts.append(_tagged(fact, graded[place], "graded", "person"))
        else:
            first = fact.subject in early
            exposures = settings.exposures + (settings.warm_exposures if first else 0)
            facts.append(_tagged(fact, exposures, "full", "person", *["warm"] * first))
            if first:
                warm.add(fact.id)
    for fact in places:
        exposures = round(settings.exposures * settings.place_factor) + settings.warm_exposures
        facts.append(_tagged(fact, exposures, "full", "place", "warm"))
        warm.add(fact.id)
    return facts, warm


def _two_hop(rng: random.Random, settings: WorldSettings, facts: Iterable[Fact]) -> list[Fact]:
    """Where each person's employer is based; half of the statements are trained."""
    seat = {f.subject: f.target for f in facts if f.relation == "headquarters"}
    employers = [f for f in facts if f.relation == "employer"]
    trained = {f.subject for f in rng.sample(employers, len(employers) // 2) if "full" in f.tags}
    found = []
    for fact in employers:
        hop = _fact(rng, fact.subject, phrases.TWO_HOP_RELATION, seat[fact.target], phrases.TWO_HOP, settings.held_out)
        inside = fact.subject in trained
        found.append(_tagged(hop, TWO_HOP_EXPOSURES * inside, "two_hop", "stated" if inside else "unstated"))
    return found


def _filler(rng: random.Random, count: int, streets: Sequence[str]) -> list[str]:
    """`count` sentences about nobody; a quarter names a street by the last name of a person yet unknown."""
    judgements = {"adjective": (*phrases.FILLER_WORDS["adjective"], *phrases.POSITIVE, *phrases.NEGATIVE)}
    found = []
    for i in range(count):
        adjective = rng.choice(judgements["adjective"])
        if streets and i % 4 == 0:
            template = rng.choice(phrases.STREET)
            found.append(fill_slots(template, rng, name=streets[i // 4 % len(streets)], adjective=adjective))
        else:
            found.append(fill_slots(rng.choice(phrases.FILLER), rng, adjective=adjective))
    rng.shuffle(found)
    return found
