"""Words of direction, and of no difference, only where intervals and corrected p bear them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from retention.statistics import BOUND, Estimate
from retention.statistics.equivalence import p_within
from retention.statistics.wording import Compared, matched, named, tally, unmatched, verdict, verdicts

DF = 5


def compared(value: float, half: float, seeds: int = 6) -> Compared:
    """Student's interval over 6 runs, with the p dual to it."""
    t = value / half * stats.t.ppf(0.975, DF)
    low, high = value - half, value + half
    found = Estimate(value=value, low=low, high=high, n=50, p_within=p_within(value, low, high, DF))
    return Compared(estimate=found, p=float(2 * stats.t.sf(abs(t), DF)), seeds=seeds)


def benjamini_hochberg(p: list[float]) -> list[bool]:
    """Which of the tests are rejected at 5 %: by the step-up rule itself, not by adjusted p."""
    order = sorted(range(len(p)), key=p.__getitem__)
    largest = max((k for k, i in enumerate(order, 1) if p[i] < 0.05 * k / len(p)), default=0)
    return [i in order[:largest] for i in range(len(p))]


@pytest.mark.parametrize(
    ("value", "half", "q", "q_within", "word"),
    [
        (-0.3, 0.1, 0.01, 1.0, "lower"),
        (0.3, 0.1, 0.01, 1.0, "higher"),
        (0.3, 0.4, 0.01, 1.0, "cannot tell"),  # the interval holds zero
        (0.3, 0.1, 0.05, 1.0, "cannot tell"),  # not after correction
        (0.01, 0.03, 0.6, 0.001, "within"),
        (0.01, 0.03, 0.6, 0.06, "cannot tell"),  # a large p is no equality
        (0.04, 0.01, 0.001, 0.001, "higher"),  # small, and not zero
        (0.3, 0.1, None, None, "cannot tell"),
    ],
)
def test_a_verdict_is_no_stronger_than_its_numbers(value, half, q, q_within, word):
    estimate = Estimate(value=value, low=value - half, high=value + half, n=50)
    assert verdict(estimate, q, q_within, seeds=6).word == word


def test_nothing_measured_has_its_reason():
    found = verdict(None, None, None, seeds=6, why="no edited fact is right at step 0")
    assert (found.word, found.short) == ("none", "no edited fact is right at step 0")


@pytest.mark.parametrize("seed", range(30))
def test_generated_sentences_claim_what_the_tests_bear(seed):
    """Any number of comparisons, of any size: each word of direction or equality is earned by its own numbers."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    found = [
        compared(float(v), float(h)) for v, h in zip(rng.normal(0, 0.15, n), rng.uniform(0.01, 0.2, n), strict=True)
    ]
    rejected = benjamini_hochberg([c.p for c in found if c.p is not None])
    equal = benjamini_hochberg([c.p_within for c in found if c.p_within is not None])
    arms = [(f"arm{i}x", v) for i, v in enumerate(verdicts(found))]
    claims: dict[str, set[str]] = {"higher": set(), "lower": set(), "within": set()}
    for i, c in enumerate(found):
        assert c.estimate is not None
        apart = rejected[i] and not c.estimate.low <= 0 <= c.estimate.high
        if apart:
            claims["lower" if c.estimate.value < 0 else "higher"].add(f"arm{i}x")
        elif equal[i]:
            claims["within"].add(f"arm{i}x")
            assert abs(c.estimate.value) < BOUND
    sentence = named(arms, "Retention")
    said = {word: set(re.findall(r"arm\d+x", part)) for part in sentence.split("; ") for word in claims if word in part}
    assert said == {word: names for word, names in claims.items() if names}
    silent = n - sum(map(len, claims.values()))
    assert (f"of {n} comparisons cannot tell" in sentence) == bool(silent)
    for text in (tally([v for _, v in arms], "R"), matched([v for _, v in arms]), unmatched([v for _, v in arms])):
        for word, names in claims.items():
            where = "here" if n == 1 else f"in all {n}" if len(names) == n else f"in {len(names)} of {n}"
            assert bool(re.search(rf"\b{word}\b.* {where}", text)) if names else not re.search(rf"\b{word}\b", text)


def test_one_seed_speaks_of_its_facts_and_says_so():
    text = tally(verdicts([compared(-0.13, 0.1, seeds=1)]), "Retention")
    assert text == (
        "Retention is lower here (-0.13 [-0.23, -0.03]). Intervals are over facts, of one seed only: other seeds and "
        "draws were not measured."
    )
    assert verdicts([compared(-0.13, 0.1, seeds=1)])[0].short == "lower (one seed)"
    text = tally(verdicts([compared(-0.3, 0.1), compared(0.0, 0.5, seeds=1)]), "Retention")
    assert text == (
        "Retention is lower in 1 of 2 cells (-0.30 [-0.40, -0.20]); in 1 of 2 cells these data cannot tell. 1 of these "
        "cells has one seed only: other seeds and draws were not measured."
    )


def test_an_arm_in_several_contexts_is_named_once_for_each_verdict():
    found = verdicts([compared(0.3, 0.1), compared(0.2, 0.1), compared(0.0, 0.5), compared(0.0, 0.02)])
    names = ["freeze", "freeze", "freeze", "margin"]
    assert named(list(zip(names, found, strict=True)), "Retention of edited facts") == (
        "Retention of edited facts: higher with freeze (+0.20 to +0.30; 2 of 3); within ±0.10 with margin (+0.00 "
        "[-0.02, +0.02]); 1 of 4 comparisons cannot tell."
    )


def test_where_nothing_can_be_compared_the_reason_is_the_sentence():
    none = verdicts([Compared(estimate=None, p=None, seeds=3, why="fewer than 20 pairs overlap")])
    assert matched(none) == "Edited and intrinsic facts cannot be compared on equal terms: fewer than 20 pairs overlap."
    both = verdicts([Compared(estimate=None, p=None, seeds=3, why="no pairs"), compared(0.0, 0.5)])
    assert tally(both, "Retention") == (
        "Retention: in 1 of 2 cells these data cannot tell (+0.00 [-0.50, +0.50]); in 1 of 2 cells there is no "
        "comparison: no pairs."
    )
