"""Where the subject, the target and what is to be kept lie in the rows that an edit is written with."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
from facts import EDITS, ONE_TOKEN, OTHER_ANCHORS, PREFIXES, THREE_TOKENS, edit
from hypothesis import given
from hypothesis import strategies as st

from retention.editors._rows import anchor_rows, batches, merged, statement_rows
from retention.types import UserError


def words(tokenizer: object, ids: tuple[int, ...]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))  # type: ignore[attr-defined]


@pytest.mark.parametrize("bos", [True, False])
def test_rows_hold_subject_and_target_in_place(bos: bool) -> None:
    tokenizer = tiny.tokenizer(bos=bos)
    rows = statement_rows(tokenizer, EDITS, PREFIXES)
    assert [sum(row.edit == i for row in rows) for i in range(4)] == [4, 5, 4, 4]
    for row in rows:
        tokens, made = words(tokenizer, row.ids), EDITS[row.edit]
        assert (tokens[0] == "<s>") == bos
        assert tokens[row.at] == made.fact.subject.split()[-1]
        answer = made.target.split()
        assert tokens[len(tokens) - len(answer) + 1 :] == answer[:-1]  # the last target token is not fed
        assert [p for p, _ in row.targets] == list(range(len(tokens) - len(answer), len(tokens)))
        assert words(tokenizer, tuple(token for _, token in row.targets)) == answer
    assert [row.direct for row in rows if row.edit == 1] == [True, False, False, False, False]
    assert [row.bare for row in rows if row.edit == 1] == [True, False, False, False, True]


def test_a_subject_that_occurs_twice_is_taken_where_the_prompt_puts_it() -> None:
    tokenizer = tiny.tokenizer(bos=False)
    twice = edit("Anna", "Anna and {} is in the city of", "Oslo")
    assert statement_rows(tokenizer, [twice], ())[0].at == 2
    again = edit("Anna", "{} is the mother of Anna in", "Oslo")
    assert statement_rows(tokenizer, [again], ())[0].at == 0


def test_braces_in_a_subject_or_a_target_are_text() -> None:
    tokenizer = tiny.tokenizer(bos=False)
    row = statement_rows(tokenizer, [edit("Anna {} Klein", "{} is in", "the {} city")], ())[0]
    assert words(tokenizer, row.ids[row.at :]) == ["Klein", "is", "in", "the", "<unk>"]


def test_anchors_are_read_where_they_are_answered() -> None:
    tokenizer = tiny.tokenizer(bos=False)
    rows = anchor_rows(tokenizer, [OTHER_ANCHORS])
    assert [words(tokenizer, row.ids) for row in rows] == [
        ["Emil", "Vogel"],  # "{} is a" is read at the subject, as published
        ["Emil", "Vogel", "plays", "the"],
        ["the", "language", "of", "Emil", "Vogel", "is"],
    ]
    assert [(row.at, row.keep) for row in rows] == [(1, (1,)), (1, (3,)), (4, (5,))]


def test_anchors_that_begin_a_row_are_read_off_it() -> None:
    tokenizer = tiny.tokenizer()
    rows = merged(
        statement_rows(tokenizer, [ONE_TOKEN, THREE_TOKENS], ()) + anchor_rows(tokenizer, [ONE_TOKEN, THREE_TOKENS])
    )
    assert [(row.edit, row.keep, bool(row.targets)) for row in rows] == [
        (0, (2,), True), (1, (), True), (1, (), True), (1, (2,), False),
    ]  # fmt: skip


def test_a_target_without_a_token_is_refused() -> None:
    with pytest.raises(UserError, match="target"):
        statement_rows(tiny.tokenizer(bos=False), [edit("Anna", "{} is", " ")], ())


def cost(lengths: list[int], groups: list[list[int]], overhead: float) -> float:
    return sum(len(group) * max(lengths[i] for i in group) + overhead for group in groups)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.floats(0, 100))
def test_batches_hold_every_row_once_and_no_other_cut_is_cheaper(lengths: list[int], overhead: float) -> None:
    groups = batches(lengths, overhead)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best = min(
        cost(lengths, [order[a:b] for a, b in pairwise([0, *cuts, len(order)])], overhead)
        for bits in range(2 ** (len(order) - 1))
        for cuts in [[i + 1 for i in range(len(order) - 1) if bits >> i & 1]]
    )
    assert cost(lengths, groups, overhead) <= best + 1e-6
