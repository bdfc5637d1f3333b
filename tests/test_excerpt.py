"""An excerpt holds what a study's tables are computed from, and is read as the study itself."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import retention
from retention import excerpt
from retention.cli import app
from retention.types import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results")) / "small"


@pytest.fixture
def written(study: Path, tmp_path: Path) -> Path:
    elsewhere = tmp_path / "elsewhere" / "small"
    result = CliRunner().invoke(app, ["excerpt", str(study), "--out", str(elsewhere / "excerpt")])
    assert result.exit_code == 0, result.output
    return elsewhere


def test_it_is_read_as_the_study(study, written):
    rows, found = retention.load(study), retention.load(written)
    rows = rows[rows["step"] >= 0]
    by = ["run_id", "step", "question_id"]
    both = [table.sort_values(by).reset_index(drop=True) for table in (rows, found)]
    for name in (
        *excerpt.RIGHT,
        "group",
        "form",
        "fact_id",
        "editor",
        "mitigations",
        "seed",
        "base_id",
        "edit_id",
        "state",
    ):
        one, two = (table[name].astype(object).where(table[name].notna(), None).tolist() for table in both)
        assert one == two, name
    first = both[0]["step"] == 0
    for name in excerpt.START:
        assert both[1].loc[first, name].tolist() == pytest.approx(both[0].loc[first, name].tolist(), nan_ok=True)
        assert both[1].loc[~first, name].isna().all()
    assert "generated" not in found
    assert len(retention.load(written, "scores")) == len(retention.load(study, "scores"))
    assert retention.load(written, "runs")["complete"].all()


def test_every_script_computes_the_same_tables_from_it(study, written, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    before = set(sys.modules)
    opened = import_module("opened")
    made = []
    for folder in (study, written):
        out = tmp_path / f"tables of {folder.parent.name}"
        args = opened.parser("Compute.").parse_args([str(folder), "--out", str(out)])
        for name in ("summary", "forest", "forgetting_curves", "by_lead", "fates", "mitigations", "pareto", "survival"):
            import_module(name).compute(opened.opened(args))
        made.append({path.name: path.read_text() for path in sorted(out.glob("*.csv"))})
    for name in set(sys.modules) - before:  # other tests load these scripts for themselves
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "analysis")):
            monkeypatch.delitem(sys.modules, name)
    assert made[0] == made[1]
    assert len(made[0]) == 12


def test_a_study_that_was_run_here_is_read_from_its_rows(study, written):
    shutil.copytree(written / "excerpt", study / "excerpt")
    assert excerpt.at(study) is None
    assert "generated" in retention.load(study)
    assert excerpt.at(study / "excerpt") == study / "excerpt"


def test_what_is_damaged_or_absent_is_named(study, written):
    with pytest.raises(UserError, match="an excerpt, and without questions; it has facts, rows, runs, scores"):
        retention.load(written, "questions")
    with pytest.raises(UserError, match="`by` is for results folders"):
        retention.load(written, by="editor")
    file = written / "excerpt" / "scores.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"scores\.parquet: checksum mismatch"):
        retention.load(written, "scores")
    record = written / "excerpt" / "excerpt.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 1}))
    with pytest.raises(UserError, match="written with schema 1; this version reads schema 2"):
        retention.load(written)
    run = retention.load(study, "runs")["run_id"][0]
    (study.parent / "runs" / run / "complete.json").unlink()
    with pytest.raises(UserError, match="1 of 4 runs are not complete"):
        excerpt.write(study / "excerpt", {"runs": retention.load(study, "runs")})


def test_rows_that_runs_share_take_few_bytes(tmp_path):
    """100 runs of one edit, 200 questions, 5 checkpoints: two bytes a reading at most."""
    readings = pd.MultiIndex.from_product(
        [range(100), range(5), range(200)], names=["run", "step", "question"]
    ).to_frame(index=False)
    rows = pd.DataFrame(
        {
            "run_id": readings["run"].map("run {}".format), "edit_id": "e", "step": readings["step"], "group": "edited",
            "form": "direct", "fact_id": readings["question"].map("fact {}".format), "trains_edited": True,
            "question_id": readings["question"].map("question {}".format), "state": "ok",
            "lead": readings["question"].astype("float32") / 7, "n_target_tokens": 2,
        }
    )  # fmt: skip
    for i, name in enumerate(excerpt.RIGHT):
        rows[name] = (readings["run"] * 7 + readings["question"] * 3 + readings["step"] + i) % 5 > 0
    runs = pd.DataFrame({"run_id": rows["run_id"].unique(), "complete": True})
    out = excerpt.write(tmp_path / "excerpt", {"rows": rows, "runs": runs})
    assert sum(path.stat().st_size for path in out.iterdir()) < 2 * len(rows)
