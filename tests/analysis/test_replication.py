"""analysis/replication.py: ROUGE-1 by hand, and the table of each paper on a study that nobody ran."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest

import retention
from tests.analysis.made_up import tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    spec = importlib.util.spec_from_file_location("analysis_replication", ROOT / "analysis" / "replication.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_rouge(script):
    assert script.rouge1("Paris, France", "paris") == pytest.approx(2 * 1 / 3)
    assert script.rouge1("a a b", "a c") == pytest.approx(2 * 1 / 5)
    assert script.rouge1("", "") == 1.0
    assert script.rouge1("", "x") == script.rouge1("y", "x") == 0.0


def test_locality(script):
    rows = pd.DataFrame(
        [
            {"group": "neighbor", "form": "direct", "run_id": "r", "question_id": q, "step": s, "generated": text}
            for q, s, text in (("1", -1, "Rome"), ("1", 5, "Rome"), ("2", -1, "a b"), ("2", 5, "a c"), ("3", 5, "x"))
        ]
    )
    assert script.locality(rows, 5) == pytest.approx((1 + 0.5) / 2)
    assert script.locality(rows, 9) is None
    assert script.locality(rows.assign(group="intrinsic"), 5, "intrinsic") == pytest.approx((1 + 0.5) / 2)
    assert script.locality(rows, 5, "intrinsic") is None


@pytest.mark.parametrize("paper", ["wen2025", "cheng2025", "ge2024"])
def test_table(script, monkeypatch, tmp_path, capsys, paper):
    made = tables(editors=("rome",), mitigations=("none", "freeze"))
    made["rows"] = made["rows"].assign(generated=None)
    monkeypatch.setattr(retention, "load", lambda path, table="rows": made[table].copy())
    monkeypatch.setattr(sys, "argv", ["replication", str(tmp_path / "s"), "--paper", paper, "--out", str(tmp_path)])
    script.main()
    text = capsys.readouterr().out
    assert all(figure.what in text for figure in script.FIGURES[paper])
    table = pd.read_csv(tmp_path / "replication.csv")
    assert list(table["mitigations"]) == ["freeze", "none"]
    rows = made["rows"]
    start = rows[(rows["mitigations"] == "none") & (rows["group"] == "edited") & (rows["step"] == 0)]
    assert table["efficacy at 0"][1].startswith(f"{start['all_correct'].mean():.2f} ")
    assert ("edited, first token" in table) == (paper == "wen2025")
    if paper == "cheng2025":
        for said, criterion in (("by ES", "prefers_target"), ("by every token", "all_correct")):
            edits = rows[(rows["mitigations"] == "none") & (rows["group"] == "edited") & (rows["form"] == "direct")]
            wide = edits.pivot(index=["run_id", "question_id"], columns="step", values=criterion).astype(float)
            before, after = wide[0], wide[wide.columns.max()]
            assert table[f"edit flip ratio, {said}"][1] == pytest.approx(1 - after[before == 1].mean(), abs=0.0051)
            lost = 1 - after.sum() / before.sum()
            assert table[f"relative loss of efficacy, {said}"][1] == pytest.approx(lost, abs=0.0051)
