"""What a report says in words: never more than the interval, the seeds and the correction for many cells allow."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from retention import statistics as st
from retention.report._cells import Arm, adjusted
from retention.report._words import (
    LESS,
    MORE,
    NONE,
    ONE_SEED,
    UNSURE,
    Verdict,
    _arm_sentences,
    _cautions,
    _fair_sentence,
    _headline,
    verdict,
    verdicts,
)


def estimate(value: float, half: float, p: float | None = None) -> st.Estimate:
    return st.Estimate(value=value, low=value - half, high=value + half, n=50, p=p)


def said(*words: str) -> list[Verdict]:
    sizes = {LESS: -0.2, MORE: 0.1, UNSURE: 0.01, ONE_SEED: 0.05}
    return [
        Verdict(word=w, estimate=estimate(sizes[w], 0.02) if w in sizes else None, q=0.01, why="no such facts")
        for w in words
    ]


@pytest.mark.parametrize(
    ("found", "q", "seeds", "word"),
    [
        (estimate(-0.3, 0.1), 0.01, 6, LESS),
        (estimate(0.3, 0.1), 0.01, 6, MORE),
        (estimate(0.3, 0.4), 0.01, 6, UNSURE),  # spans zero
        (estimate(0.3, 0.1), 0.05, 6, UNSURE),  # not after correction
        (estimate(0.3, 0.1), None, 6, UNSURE),
        (estimate(0.3, 0.1), 0.01, 1, ONE_SEED),
        (None, None, 6, NONE),
    ],
)
def test_a_verdict_is_no_stronger_than_its_numbers(found, q, seeds, word):
    assert verdict(found, q, seeds, "why").word == word


def test_many_cells_are_corrected_for():
    assert adjusted([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.04, 0.04])
    states = {"unmatched": "ok", "matched": "none"}
    nothing = SimpleNamespace(difference=None, p_t=None)
    fair = SimpleNamespace(unmatched=estimate(0.2, 0.1, p=0.04), matched=nothing, states=states)
    one = SimpleNamespace(seeds=6, fair=fair)
    cells: list[Any] = [one]
    assert verdicts(cells)[0][0].word == MORE
    unclear = SimpleNamespace(
        seeds=6, fair=SimpleNamespace(**{**vars(one.fair), "unmatched": estimate(0.0, 0.1, p=0.9)})
    )
    assert [v.word for v in verdicts([*cells, unclear])[0]] == [UNSURE, UNSURE]  # 0.04 of two is 0.08


@pytest.mark.parametrize(
    ("words", "matched", "headline"),
    [
        ((LESS,), (LESS,), "Edited facts are kept less than intrinsic ones here (by 0.20)."),
        (
            (LESS, LESS, UNSURE), (LESS, UNSURE, UNSURE),
            "Edited facts are kept less than intrinsic ones in 2 of 3 cells (by 0.20); in 1 of 3 cells we cannot tell. "
            "Against intrinsic facts that start as firmly this holds in 1 of these 2 cells.",
        ),
        (
            (LESS, MORE), (UNSURE, NONE),
            "Edited facts are kept less than intrinsic ones in 1 of 2 cells (by 0.20) and more in 1 of 2 cells (by "
            "0.10). Against intrinsic facts that start as firmly this can no longer be told.",
        ),
        (
            (LESS,), (MORE,),
            "Edited facts are kept less than intrinsic ones here (by 0.20). Against intrinsic facts that start as "
            "firmly it is the other way round.",
        ),
        (
            (LESS, LESS), (MORE, LESS),
            "Edited facts are kept less than intrinsic ones in all 2 cells (by 0.20). Against intrinsic facts that "
            "start as firmly it is the other way round in 1 of these 2 cells and holds in 1.",
        ),
        (
            (UNSURE, NONE), (UNSURE, NONE),
            "We cannot tell edited from intrinsic facts by how well they are kept in any of the 2 cells.",
        ),
        ((NONE,), (NONE,), "Edited and intrinsic facts cannot be compared: no such facts."),
        (
            (ONE_SEED,), (ONE_SEED,),
            "One seed cannot tell whether edited facts are kept less or more than intrinsic ones (differences in this "
            "run: +0.05).",
        ),
    ],
)  # fmt: skip
def test_the_headline(words, matched, headline):
    assert _headline(said(*words), said(*matched)) == headline


def test_the_sentence_on_equal_terms():
    assert _fair_sentence(said(UNSURE, UNSURE)).endswith("we cannot tell in any of the 2 cells.")
    assert _fair_sentence(said(LESS, NONE)).endswith(
        "are kept less in 1 of 2 cells (by 0.20); in 1 of 2 cells no two facts match."
    )
    assert _fair_sentence(said(NONE)).endswith("no comparison, no such facts.")


def arm(name: str, value: float, half: float, q: float | None, seeds: int = 6) -> Arm:
    found: Any = SimpleNamespace(difference=estimate(value, half), runs=seeds, p_t=q)
    return Arm(context={}, name=name, against="none", measure="edited", found=found, seeds=seeds, q=q, state="ok")


def test_remedies_that_cannot_be_told_are_not_named_as_better():
    arms = [arm("freeze", 0.3, 0.1, 0.001), arm("margin", 0.05, 0.1, 0.4), arm("reedit", -0.2, 0.1, 0.01)]
    (text,) = _arm_sentences(arms, "mitigations")
    assert text == (
        "Mitigations, each run paired with the same one without: more edited facts are kept with freeze (+0.30); fewer "
        "edited facts are kept with reedit (-0.20); for 1 of 3 comparisons we cannot tell."
    )
    (text,) = _arm_sentences([replace(a, seeds=1) for a in arms], "mitigations")
    assert text == "With one seed a value of mitigations, we cannot tell what it does to edited facts."
    assert _arm_sentences([], "mitigations") == []


def test_runs_that_diverged_are_told_of():
    rows = pd.DataFrame({"run_id": ["a", "a", "b"], "state": ["ok", "nan_logits", "ok"]})
    cell: Any = SimpleNamespace(seeds=2, runs=("a", "b"), rows=rows)
    (line,) = (text for text in _cautions([cell], "all_correct", 0) if "finite" in text)
    assert line.startswith("1 run has readings that are not finite")
    fine: Any = SimpleNamespace(seeds=2, runs=("a", "b"), rows=rows.assign(state="ok"))
    assert not any("finite" in text for text in _cautions([fine], "all_correct", 0))
