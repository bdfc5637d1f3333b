"""What a report says, beyond what retention/statistics/wording.py decides (tests/statistics/test_wording.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd

from retention import statistics as st
from retention.report._cells import Arm
from retention.report._words import _arm_sentences, _cautions, finding, verdicts
from retention.statistics.equivalence import p_within


def estimate(value: float, half: float, p: float | None = None) -> st.Estimate:
    low, high = value - half, value + half
    return st.Estimate(value=value, low=low, high=high, n=50, p=p, p_within=p_within(value, low, high))


def cell(unmatched: st.Estimate | None, matched: st.Estimate | None, seeds: int = 6) -> Any:
    p = matched.p if matched else None
    fair = SimpleNamespace(
        unmatched=unmatched, matched=SimpleNamespace(difference=matched, p_t=p, p_facts=p),
        states={"unmatched": "no such facts", "matched": "fewer than 20 pairs overlap"},
    )  # fmt: skip
    rows = pd.DataFrame({"run_id": [], "state": []})
    return SimpleNamespace(fair=fair, seeds=seeds, runs=("a",) * seeds, rows=rows, kept=lambda _: estimate(0.8, 0.1))


def test_many_cells_are_corrected_for():
    apart, near = cell(estimate(0.2, 0.1, 0.04), None), cell(estimate(0.0, 0.3, 0.9), None)
    assert [v.word for v in verdicts([apart])[0]] == ["higher"]
    assert [v.word for v in verdicts([apart, near])[0]] == ["cannot tell"] * 2  # 0.04 of two is 0.08


def test_the_matched_difference_comes_first_and_the_unmatched_one_with_its_selection():
    cells = [cell(estimate(0.3, 0.1, 0.001), estimate(-0.2, 0.1, 0.001))]
    found = finding(cells, [], None, "all_correct", 0)
    assert found.headline == (
        "Matched on the lead at step 0, retention of edited facts against intrinsic ones is lower here (-0.20 [-0.30, "
        "-0.10])."
    )
    assert found.sentences[0] == "Retention at the last step: 0.80 of the edited facts and 0.80 of the intrinsic facts."
    assert found.sentences[1].startswith(
        "Unmatched, retention of edited facts is higher here (+0.30 [+0.20, +0.40]). Intrinsic facts are selected "
    )
    assert finding([cell(None, None)], [], None, "all_correct", 0).headline == (
        "Edited and intrinsic facts cannot be compared on equal terms: fewer than 20 pairs overlap."
    )
    one = finding([cell(estimate(0.3, 0.1, 0.001), estimate(0.0, 0.3, 0.9), seeds=1)], [], None, "all_correct", 0)
    assert one.headline.endswith(
        "against intrinsic ones: here these data cannot tell (+0.00 [-0.30, +0.30]). Intervals are over facts, of one "
        "seed only: other seeds and draws were not measured."
    )


def arm(name: str, value: float, half: float, p: float | None, seeds: int = 6) -> Arm:
    found: Any = SimpleNamespace(difference=estimate(value, half), runs=seeds, p_t=p, p_facts=p)
    return Arm(context={}, name=name, against="none", measure="edited", found=found, seeds=seeds, q=p, state="ok")


def test_arms_that_cannot_be_told_apart_are_not_named():
    arms = [arm("freeze", 0.3, 0.1, 0.001), arm("margin", 0.05, 0.2, 0.4), arm("reedit", -0.2, 0.1, 0.01)]
    (text,) = _arm_sentences(arms, "mitigations")
    assert text == (
        "Mitigations against none, in paired runs, retention of edited facts: higher with freeze (+0.30 [+0.20, "
        "+0.40]); lower with reedit (-0.20 [-0.30, -0.10]); 1 of 3 comparisons cannot tell."
    )
    (text,) = _arm_sentences([replace(a, seeds=1) for a in arms], "mitigations")
    assert text.endswith("Intervals are over facts, of one seed only: other seeds and draws were not measured.")
    assert _arm_sentences([], "mitigations") == []


def test_runs_that_diverged_are_reported():
    rows = pd.DataFrame({"run_id": ["a", "a", "b"], "state": ["ok", "nan_logits", "ok"]})
    cell: Any = SimpleNamespace(seeds=2, runs=("a", "b"), rows=rows)
    (line,) = (text for text in _cautions([cell], "all_correct", 0) if "finite" in text)
    assert line.startswith("1 run has readings that are not finite")
    fine: Any = SimpleNamespace(seeds=2, runs=("a", "b"), rows=rows.assign(state="ok"))
    assert not any("finite" in text for text in _cautions([fine], "all_correct", 0))
