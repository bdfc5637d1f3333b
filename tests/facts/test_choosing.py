"""How edits are chosen: in turn from the relations, only to objects unknown to the base model, in groups."""

from collections import Counter

import pytest

from retention.facts.draw import draw
from retention.facts.jsonl import JsonLines
from retention.types import Edit, Fact, FactPool, UserError


def pool(sizes, together=None):
    """A pool with so many facts of each relation; new objects are new0, new1 ..."""
    facts = [
        Fact(id=f"{r}-{i}", subject=f"{r} {i}", relation=r, prompt="{} is", target=f"old {r}")
        for r, n in sizes.items()
        for i in range(n)
    ]
    edits = tuple(Edit(fact=f, target=f"new {f.id}", prompts=(f.prompt,)) for f in facts)
    return FactPool(facts=tuple(facts), edits=edits, together=together or {})


def drawn(source, seed=0, known=lambda question: True, **want):
    settings = JsonLines(**({"edited": 6, "intrinsic": 3, "neighbors": 0, "same_subject": 0} | want))
    return draw(source, settings, seed, lambda qs: [known(q) for q in qs], lambda asked: [None] * len(asked))


def test_stratified():
    source = pool({"a": 100, "b": 10, "c": 10})
    found = drawn(source, stratified=True)
    assert Counter(e.fact.relation for e in found.edits) == {"a": 2, "b": 2, "c": 2}
    intrinsic = [q.fact_id[0] for q in found.questions if q.group == "intrinsic"]
    assert sorted(intrinsic) == ["a", "b", "c"]
    assert found.edits == drawn(source, stratified=True).edits
    assert found.edits != drawn(source, seed=1, stratified=True).edits
    blind = Counter(e.fact.relation for seed in range(20) for e in drawn(source, seed=seed).edits)
    assert blind["a"] > 80  # of 120: five sixths of the candidates
    few = drawn(pool({"a": 10, "b": 1}), stratified=True)
    assert Counter(e.fact.relation for e in few.edits) == {"a": 5, "b": 1}


def test_neighbors_are_facts_that_the_base_model_knows():
    source, asked = pool({"a": 100}), []

    def known(question):
        if question.group == "neighbor":
            asked.append(question.text)
        return question.group != "neighbor" or question.text in even

    even = {f"a {i} is" for i in range(0, 100, 2)}
    found = drawn(source, edited=4, neighbors=2, known=known)
    of = Counter(q.edit_of for q in found.questions if q.group == "neighbor")
    assert {q.text for q in found.questions if q.group == "neighbor"} <= even
    assert set(of) <= {e.fact.id for e in found.edits}
    assert set(of.values()) <= {1, 2}
    assert found.neighbors == {"asked": len(asked), "known": len([text for text in asked if text in even])}
    assert found.dropped["neighbor candidate: not known to the base model"] == len(asked) - found.neighbors["known"]
    assert drawn(source, neighbors=2).neighbors == {"asked": 12, "known": 12}
    none = drawn(source, edited=4, neighbors=2, known=lambda q: q.group != "neighbor")
    assert none.neighbors == {"asked": 4 * 2 * 4, "known": 0}  # it does not read on for ever
    # Which neighbors are known moves no other group's draw.
    assert none.edits == found.edits


def test_unknown_targets():
    source = pool({"a": 80})
    given = {f"new a-{i}" for i in range(0, 80, 2)}
    found = drawn(source, unknown_targets=True, known=lambda q: q.answer in given or q.group == "intrinsic")
    assert len(found.edits) == 6
    assert not {e.target for e in found.edits} & given
    assert found.dropped["edit candidate: the base model gives its new object already"] > 0
    with pytest.raises(UserError, match="the source has 0"):
        drawn(source, unknown_targets=True)


def test_groups_are_drawn_whole():
    together = {f"a-{i}": f"group {i // 3}" for i in range(30)}
    source = pool({"a": 30, "b": 20}, together)
    for seed in range(10):
        found = drawn(source, seed=seed, edited=7, control=4)
        asked = {q.fact_id for q in found.questions if q.group == "control"}
        for ids in ({e.fact.id for e in found.edits}, asked):
            groups = Counter(together[i] for i in ids if i in together)
            assert set(groups.values()) <= {3}
        assert len(found.edits) == 7
        assert len(asked) == 4
    with pytest.raises(UserError, match="groups of edits that are only drawn whole"):
        drawn(pool({"a": 30}, together), edited=7)


def test_edits_of_one_subject_are_asked_by_their_new_objects_alone():
    facts = [Fact(id=f"f{i}", subject="Ann", relation=f"r{i}", prompt=f"{{}} r{i}", target="old") for i in range(3)]
    others = [Fact(id=f"o{i}", subject=f"s{i}", relation="r0", prompt="{} r0", target="old") for i in range(5)]
    edits = tuple(Edit(fact=f, target="new", prompts=(f.prompt,)) for f in facts[:2])
    source = FactPool(facts=(*facts, *others), edits=edits, together={"f0": "Ann", "f1": "Ann"})
    found = drawn(source, edited=2, same_subject=5, intrinsic=2)
    assert {q.fact_id for q in found.questions if q.group == "same_subject"} == {"f2"}
