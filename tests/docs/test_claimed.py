"""Claims in our texts: a word of direction needs numbers that bear it, and every number quoted is a stored one.

Paragraphs between a `finding` mark and its end are generated and are checked in tests/statistics/test_wording.py and
tests/analysis/test_figures.py. What is left is written by hand, and read here sentence by sentence.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
DIRECTION = re.compile(
    r"\b(more|less|fewer|most|least|better|worse|best|worst|higher|lower|larger|smaller|save[sd]?|saving|spare[sd]?|cost|costs|"
    r"harm|harms|hurts?|helps?|outlasts?|longer|faster|slower|fragile|protects?|preserves?|destroy(?:s|ed)?|erase[sd]?|"
    r"gone|nothing|comes? back|as well as|no difference|the same as)\b"
)
# What a sentence says about what was not shown, about how to read, or about a paper, is no claim of ours.
UNCLAIMED = re.compile(
    r"cannot tell|can they tell|not measured|not fair|\*(?:Lower|Higher|[Ww]ithin)|never read as|"
    r"The paper (?:finds|reports)"
)
ESTIMATE = re.compile(r"([+-]?\d\.\d\d) \[([+-]?\d\.\d\d), ([+-]?\d\.\d\d)\]")


def sentences(text: str) -> list[str]:
    """Those written by hand in a text of findings: no tables, code, headings or generated paragraphs."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- finding: [^>]*-->.*?<!-- end -->", "\n", text, flags=re.DOTALL)
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not p.lstrip().startswith(("|", "#", "<!--", "!["))]
    joined = [" ".join(p.split()) for p in paragraphs]
    return [s for p in joined for s in re.split(r"(?<=[.;:?])\s+(?=[A-Z*(`])", p) if s]


def texts() -> list[tuple[str, str]]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = readme[readme.index("\n## Results\n") : readme.index("\n## A study is a file\n")]
    return [("README.md", results), ("docs/findings.md", (ROOT / "docs/findings.md").read_text(encoding="utf-8"))]


def borne(sentence: str) -> bool:
    """Whether its numbers bear a sentence: differences (signed) exclude zero, shares come in pairs that are apart."""
    found = [(value, float(low), float(high)) for value, low, high in ESTIMATE.findall(sentence)]
    signed = [(low, high) for value, low, high in found if value[0] in "+-"]
    shares = [(low, high) for value, low, high in found if value[0] not in "+-"]
    pairs = list(zip(shares[::2], shares[1::2], strict=False))
    apart = all(a[1] < b[0] or b[1] < a[0] for a, b in pairs)
    return bool(found) and all(not low <= 0 <= high for low, high in signed) and apart and len(shares) % 2 == 0


@pytest.mark.parametrize(("name", "text"), texts(), ids=[name for name, _ in texts()])
def test_a_word_of_direction_has_numbers_that_bear_it(name, text):
    wrong = [s for s in sentences(text) if DIRECTION.search(s) and not UNCLAIMED.search(s) and not borne(s)]
    assert wrong == []


@pytest.mark.parametrize(
    ("sentence", "fine"),
    [
        ("Freezing costs nothing and saves edits (+0.17).", False),
        ("ROME edits are retained more, +0.15 [+0.04, +0.24].", True),
        ("They save +0.11 [-0.05, +0.16].", False),
        ("LoRA retains more, 0.50 [0.40, 0.60] against 0.02 [0.01, 0.07].", True),
        ("LoRA retains more, 0.50 [0.40, 0.60] against 0.45 [0.35, 0.55].", False),
        ("Edits are not the more fragile kind of knowledge.", False),
        ("Matched on them, the difference is gone.", False),
    ],
)
def test_what_counts_as_borne(sentence, fine):
    assert DIRECTION.search(sentence)
    assert borne(sentence) == fine


def stored() -> set[tuple[float, float, float]]:
    """Every estimate with its interval in a stored table, as it is shown: to two digits."""
    found = set()
    for path in RESULTS.glob("*/*.csv"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        for name in table.columns:
            parts = [name, f"{name}_low", f"{name}_high"]
            if set(parts) <= set(table.columns):
                numbers = table[parts][(table[parts] != "").all(axis=1)].astype(float)
                found |= {tuple(float(f"{x:.2f}") + 0.0 for x in row) for row in numbers.to_numpy()}
        for text in table.to_numpy().ravel():  # a replication's table holds them as texts
            found |= {tuple(map(float, one)) for one in ESTIMATE.findall(text)}
    return found  # type: ignore[return-value]


def test_every_estimate_that_is_quoted_is_a_stored_one():
    there = stored()
    assert len(there) > 500
    quoted = [(name, one) for name, text in texts() for s in sentences(text) for one in ESTIMATE.findall(s)]
    assert [(name, one) for name, one in quoted if tuple(map(float, one)) not in there] == []
