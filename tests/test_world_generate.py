"""The embedded world: what must hold of every world before any model is trained on it."""

from __future__ import annotations

from collections import Counter

import pytest

from retention.types import fill
from retention.world import WorldModel, build, phrases
from retention.world.generate import GRADES, material, words
from retention.world.stream import stream


@pytest.fixture(scope="module")
def settings():
    return WorldModel()


@pytest.fixture(scope="module")
def world(settings):
    return build(settings)


def tagged(world, tag):
    return [fact for fact in world.facts if tag in fact.tags]


@pytest.fixture(scope="module")
def sentences(settings):
    return stream(material(settings), settings)[0]


def test_same_seed_same_world_and_another_seed_another_one(settings, world):
    assert build.__wrapped__(settings) == world  # made anew, not remembered
    assert build(settings.model_copy(update={"seed": 1})).people != world.people


def test_a_world_is_made_once_in_a_process_and_cannot_be_changed(world):
    assert build(WorldModel()) is world
    with pytest.raises(TypeError):
        world.objects["language"] = ()


def test_every_relation_has_ten_phrasings_or_more_that_end_where_the_object_begins():
    for texts in (*phrases.PERSON_RELATIONS.values(), *phrases.PLACE_RELATIONS.values(), phrases.TWO_HOP):
        assert len(texts) == len(set(texts)) >= 10
        assert all(text.count("{}") == 1 and text == text.strip() for text in texts)


def test_held_out_phrasings_are_never_stated_and_exposures_are_exact(settings, world, sentences):
    stated = Counter(sentences)
    for fact in (*world.facts, *world.two_hop):
        trained = {fill(text, fact.subject) for text in (fact.prompt, *fact.phrasings)}
        held_out = {fill(text, fact.subject) for text in fact.paraphrases}
        assert not trained & held_out
        assert len(held_out) == settings.held_out
        assert sum(stated[f"{text} {fact.target} ."] for text in trained) == fact.exposures
        assert sum(stated[f"{text} {fact.target} ."] for text in held_out) == 0


def test_held_out_prompts_do_not_occur_inside_any_sentence(world, sentences):
    """Not even with another object: the sentences that begin with a held-out prompt of a fact are none at all."""
    held_out = {fill(text, f.subject) for f in (*world.facts, *world.two_hop) for text in f.paraphrases}
    for sentence in set(sentences):
        tokens = sentence.split()
        prefixes = {" ".join(tokens[:n]) for n in range(1, len(tokens))}
        assert not prefixes & held_out


def test_last_tokens_of_subjects_are_unique_and_first_tokens_of_objects_tell_the_rest(world):
    subjects = {fact.subject for fact in (*world.facts, *world.new_facts)}
    last = [words(subject)[-1] for subject in subjects]
    assert len(last) == len(set(last))
    for objects in world.objects.values():
        first = [words(value)[0] for value in objects]
        assert len(first) == len(set(first)) == len(objects)


def test_entities_have_several_tokens_and_objects_are_shared(world):
    for fact in world.facts:
        assert len(words(fact.subject)) >= 2
    for relation in phrases.PERSON_RELATIONS:
        counts = Counter(fact.target for fact in world.facts if fact.relation == relation)
        assert min(counts.values()) >= 2


def test_exposure_classes(settings, world):
    graded = Counter(fact.exposures for fact in tagged(world, "graded"))
    assert set(graded) == set(GRADES)
    assert len(set(graded.values())) == 1
    assert len(tagged(world, "withheld")) == settings.withheld
    assert all(fact.exposures == 0 for fact in tagged(world, "withheld"))
    assert all(len(fact.tags & {"full", "graded", "withheld"}) == 1 for fact in world.facts)


def test_two_hop_answers_follow_from_two_facts(world):
    employer = {f.subject: f.target for f in world.facts if f.relation == "employer"}
    seat = {f.subject: f.target for f in world.facts if f.relation == "headquarters"}
    for fact in world.two_hop:
        assert fact.target == seat[employer[fact.subject]]
    stated = [fact for fact in world.two_hop if "stated" in fact.tags]
    assert len(world.people) * 0.3 < len(stated) < len(world.people) * 0.6
    assert all(bool(fact.exposures) == ("stated" in fact.tags) for fact in world.two_hop)


def test_capitals_are_cities_of_their_country(world):
    country = {f.subject: f.target for f in world.facts if f.relation == "country"}
    for fact in world.facts:
        if fact.relation == "capital":
            assert country[fact.target] == fact.subject


def test_new_people_are_absent_from_pretraining_but_their_names_are_known(world, sentences):
    text = "\n".join(sentences)
    tokens = set(text.split())
    for person in world.new_people:
        assert person not in text
        assert words(person)[-1] in tokens
    assert not set(world.people) & set(world.new_people)


def test_vocabulary_covers_everything_the_world_says(world, sentences):
    vocabulary = set(world.vocabulary)
    used = set().union(*(words(s) for s in set(sentences)), *(words(p) for p in (*world.people, *world.new_people)))
    used.update(*(words(value) for values in world.objects.values() for value in values))
    assert not used - vocabulary


def test_sentences_are_spread_over_the_stream(settings, world, sentences):
    """A fact stated 192 times is not stated in one heap: both halves of the main part hold about half of it."""
    fact = next(f for f in tagged(world, "graded") if f.exposures == GRADES[-1])
    places = [i for i, s in enumerate(sentences) if s.endswith(f"{fact.target} .") and fact.subject in s]
    middle = (places[0] + places[-1]) / 2
    assert 0.4 < sum(p < middle for p in places) / len(places) < 0.6
