"""Packing: whatever is put in can be read back from the rows, and nothing is computed twice that can be shared."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retention.probes._rows import Continuation, Row, batches, pack


def sequence(row: Row, place: int) -> tuple[int, ...]:
    """The tokens up to a place, from its parents."""
    ids: list[int] = []
    while place >= 0:
        ids.append(row.tokens[place])
        place = row.parents[place]
    return tuple(reversed(ids))


@st.composite
def continuations(draw):
    ids = draw(st.lists(st.integers(0, 3), min_size=2, max_size=9))
    return Continuation(ids=tuple(ids), start=draw(st.integers(1, len(ids) - 1)))


@given(st.lists(continuations(), max_size=12), st.booleans(), st.booleans())
def test_every_wanted_token_is_read_once_after_what_stands_before_it(wanted, branching, sharing):
    rows = pack(wanted, branching=branching, sharing=sharing)
    got = {}
    for row in rows:
        assert all(parent < place for place, parent in enumerate(row.parents))
        seen = row.visible(len(row) + 2)
        assert np.array_equal(seen[-2:], np.eye(len(row) + 2, dtype=bool)[-2:])
        for place in range(len(row)):
            ids = sequence(row, place)
            assert row.depths[place] == len(ids) - 1
            assert seen[place].sum() == len(ids)
            assert tuple(np.array(row.tokens)[np.flatnonzero(seen[place])]) == ids
        for read in row.reads:
            assert (read.continuation, read.offset) not in got
            got[read.continuation, read.offset] = (*sequence(row, read.place), read.token)
        if not branching:
            assert row.parents == list(range(-1, len(row) - 1))
    assert got == {(i, k): c.ids[: c.start + k + 1] for i, c in enumerate(wanted) for k in range(len(c.ids) - c.start)}


@given(st.lists(continuations(), max_size=12))
def test_short_sequences_share_every_common_beginning(wanted):
    beginnings = {c.ids[:n] for c in wanted for n in range(1, len(c.ids))}
    assert sum(map(len, pack(wanted, branching=True))) == len(beginnings)


@given(st.lists(continuations(), max_size=12), st.permutations(range(12)))
def test_order_does_not_matter(wanted, order):
    shuffled = [wanted[i] for i in order if i < len(wanted)]
    for branching in (False, True):
        a, b = (pack(given, branching=branching) for given in (wanted, shuffled))
        assert [(row.tokens, row.parents) for row in a] == [(row.tokens, row.parents) for row in b]


@given(st.lists(continuations(), max_size=12), st.integers(1, 60), st.integers(1, 30))
def test_batches_hold_all_rows_within_the_bounds(wanted, tokens, reads):
    rows = pack(wanted, branching=False, sharing=False)
    made = list(batches(rows, tokens=tokens, reads=reads))
    assert [row for batch in made for row in batch] == rows
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= tokens
        assert len(batch) == 1 or sum(len(row.reads) for row in batch) <= reads
