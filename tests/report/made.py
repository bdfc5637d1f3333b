"""Studies that nobody ran, as a report opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from retention import statistics as st
from retention.report._read import Opened
from tests.analysis.made_up import tables

ODD: dict[str, dict[str, Any]] = {
    "usual": {},
    "one seed": {"seeds": (0,)},
    "all kept": {"kept": 1.0},
    "none kept": {"kept": 0.0},
    "nothing written": {"right_at_0": 0.0},
    "no intrinsic facts": {"groups": ("edited",)},
    "no edited facts": {"groups": ("intrinsic",)},
}
VERSIONS = {"versions": {"retention": "0.1.0"}, "device": "a processor", "threads": 1}


def opened(name: str = "made-up", *, text: str = "{} is at", **planted: Any) -> Opened:
    """A study with planted tables (`tests.analysis.made_up.tables`). text: of each question."""
    made = tables(**planted)
    rows = made["rows"].assign(target_rank=1, generated="x", state="ok")
    asked = rows[["base_id", "question_id", "fact_id", "group", "form"]].drop_duplicates()
    questions = asked.assign(text=text, answer="x", foil="y", edit_of=None).astype({"base_id": str})
    facts = made["facts"].assign(subject=made["facts"]["fact_id"], prompt=text, new_target=None)
    runs = made["runs"].assign(state="complete", why="")
    records = {
        "bases": dict.fromkeys(runs["base_id"].unique(), VERSIONS),
        "edits": {e: VERSIONS | {"seconds": 1.5} for e in runs["edit_id"].unique()},
        "runs": {r: VERSIONS | {"training": [{"seconds": 2.0}]} for r in runs["run_id"]},
    }
    return Opened(
        name=name, folder=Path("results") / name, question="Which is kept?", settings="question: Which is kept?\n",
        runs=runs, columns=st.cell_columns(rows), rows=rows, scores=made["scores"], facts=facts, questions=questions,
        records=records,
    )  # fmt: skip


def unread(study: Opened, **changes: Any) -> pd.DataFrame:
    """Its rows with columns replaced, as if probes had not read them."""
    assert study.rows is not None
    return study.rows.assign(**changes)
