"""analysis/recency.py on a study that nobody ran: late facts beside edits, and relearning."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import retention
from retention.types import UserError
from tests.analysis.made_up import tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    import recency

    def run(made: dict[str, pd.DataFrame]) -> Path:
        monkeypatch.setattr(retention, "load", lambda path, table="rows": made[table].copy())
        monkeypatch.setattr(sys, "argv", ["recency", str(tmp_path / "study"), "--out", str(tmp_path)])
        recency.main()
        return tmp_path

    yield run
    for name in [
        n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(ROOT / "analysis"))
    ]:
        del sys.modules[name]


def relearned(rows: pd.DataFrame) -> pd.DataFrame:
    """Forgotten edits come back at step 1, facts never edited do not."""
    first = rows[(rows["step"] == 0) & rows["group"].isin(["edited", "late"])]
    group = first["group"].astype(str).map({"edited": "forgotten", "late": "never_edited"})
    steps = [first.assign(group=group, step=s, all_correct=(group == "forgotten") & (s > 0)) for s in (0, 1, 2)]
    return pd.concat(steps, ignore_index=True)


def test_late_facts_and_relearning(call):
    made = tables(editors=("rome",), mitigations=("none",), groups=("edited", "intrinsic", "late"))
    out = call(made | {"relearn": relearned(made["rows"])})
    rows = made["rows"]
    by = rows[rows["step"].isin([0, 30])].pivot_table(
        index=["group", "run_id", "fact_id"], columns="step", values="all_correct", observed=True, aggfunc="first"
    )
    kept = by[by[0].astype(bool)][30].astype(float).groupby("group", observed=True).mean()
    line = pd.read_csv(out / "recency.csv").iloc[0]
    assert line["late"] == pytest.approx(kept["late"], abs=1e-5)
    assert line["difference"] == pytest.approx(kept["edited"] - kept["late"], abs=1e-5)
    assert line["seeds"] == 3
    again = pd.read_csv(out / "relearn.csv")
    assert np.allclose(again[["forgotten", "never_edited"]], [[0, 0], [1, 0], [1, 0]])
    assert "against facts never edited is higher in all 2 cells (+1.00 to +1.00)." in (out / "relearn.md").read_text()


def test_a_study_without_late_facts_is_refused(call):
    made = tables(editors=("rome",), mitigations=("none",))
    with pytest.raises(UserError, match="taught no late facts"):
        call(made)
