"""What is read back of a results folder: rows as they were written, and means over them that pandas finds too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

import retention
from retention.reading import load
from retention.store import KINDS, Keys, Store, write_readings, write_table
from retention.types import Question, Reading, UserError


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished study that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


# ------------------------------------------------------------------------------------------------ rows


def test_one_study_or_all(copy, monkeypatch):
    rows = load(copy / "small")
    pd.testing.assert_frame_equal(load(copy), rows)
    assert rows["run_id"].nunique() == 4
    monkeypatch.chdir(copy / "small")
    pd.testing.assert_frame_equal(load("."), rows)
    monkeypatch.chdir(copy)
    pd.testing.assert_frame_equal(load("small"), rows)
    assert retention.load is load


def test_a_study_that_is_not_there(copy, tmp_path):
    with pytest.raises(UserError, match=r"no study 'smal'; did you mean 'small'\?"):
        load(copy / "smal")
    with pytest.raises(UserError, match="no study 'quickstart'; there are: small"):
        load(copy / "quickstart")
    with pytest.raises(UserError, match="no results here"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no table 'score'; did you mean 'scores'\?; there are: rows, sequence, "):
        load(copy, "score")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no weights\.parquet with any run .*: no run read .* \(weights: true\)"):
        load(copy, "weights")
    Store(tmp_path / "empty", create=True)
    with pytest.raises(UserError, match="no study has been run here yet"):
        load(tmp_path / "empty")


def test_incomplete_runs_are_named_and_left_out(copy, capsys):
    runs = load(copy, "runs")
    assert runs["complete"].all()
    lost = runs["run_id"][0]
    (copy / "runs" / lost / "complete.json").unlink()
    runs = load(copy, "runs")
    assert list(runs[~runs["complete"]]["run_id"]) == [lost]
    for table in ("rows", "scores"):
        assert set(load(copy, table)["run_id"]) == set(runs["run_id"]) - {lost}  # type: ignore[arg-type]
    for run_id in runs["run_id"][1:]:
        (copy / "runs" / run_id / "complete.json").unlink()
    for table in ("rows", "scores", "facts", "questions"):
        with pytest.raises(UserError, match="no run is complete; `retention status` tells what is left"):
            load(copy, table)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no run"):
        load(copy, "sequence")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kinds", [("bases",), ("bases", "edits", "runs")])
def test_rows_written_before_the_lead_was_read(copy, kinds):
    """Files of an older version lack the column: it is null there, and the rest is as it was."""
    before, store = load(copy), Store(copy)
    for kind in kinds:
        for folder in (copy / kind).iterdir():
            for file in folder.glob("probes-*.parquet"):
                write_table(file, pq.read_table(file).drop_columns(["lead"]))
    for kind in KINDS:  # the checksums of what others were computed from are noted too
        for folder in (copy / kind).iterdir():
            (folder / "complete.json").unlink()
            store._mark(kind, folder)
    rows = load(copy)
    assert before["lead"].notna().all()
    assert (rows["lead"].isna() == ((rows["step"] < 0) | (len(kinds) == 3))).all()
    pd.testing.assert_frame_equal(rows.drop(columns="lead"), before.drop(columns="lead"))
    means = load(copy, by="step", measures=["lead", "all_correct"], given="all_correct")
    assert means["lead"].isna().tolist() == [step < 0 or len(kinds) == 3 for step in means["step"]]


def test_a_path_with_odd_characters(copy, tmp_path):
    odd = tmp_path / "it's an odd, [long] näme"
    shutil.copytree(copy, odd)
    pd.testing.assert_frame_equal(load(odd / "small"), load(copy / "small"))


def test_a_run_that_two_studies_share_is_one(copy):
    shutil.copytree(copy / "small", copy / "other")
    assert len(load(copy)) == len(load(copy / "other")) == len(load(copy / "small"))
    assert set(load(copy / "other", "runs")["study"]) == {"other"}


def test_facts_and_questions_join_the_rows(copy):
    rows, facts = load(copy), load(copy, "facts")
    joined = rows.merge(facts, on=["base_id", "fact_id"])
    assert len(joined) == len(rows)
    assert not facts.duplicated(["base_id", "fact_id"]).any()
    assert all(isinstance(text, str) for texts in facts["paraphrases"] for text in texts)
    assert {"full", "person", "place", "warm"} >= {tag for tags in facts["tags"] for tag in tags}
    assert (facts["exposures"] > 0).all()


# ------------------------------------------------------------------------------------------------ means


def by_pandas(rows: pd.DataFrame, by: list[str], measures: list[str], given: str | None) -> pd.DataFrame:
    if given:
        first = rows[rows["step"] == 0]
        right = set(first[first[given].fillna(False).astype(bool)][["run_id", "question_id"]].itertuples(index=False))
        rows = rows[[pair in right for pair in rows[["run_id", "question_id"]].itertuples(index=False)]]
    found = rows.astype(dict.fromkeys(measures, float)).groupby(by, observed=True)[measures].agg(["mean", "count"])
    found.columns = pd.Index([name if how == "mean" else f"{name}_n" for name, how in found.columns])
    return found.reset_index()


@pytest.mark.parametrize("given", [None, "all_correct", "gen_exact"])
@pytest.mark.parametrize(
    "by", [["editor", "mitigations", "group", "step"], ["run_id", "step"], ["form", "trains_edited"], ["seed"]]
)
def test_means_are_those_of_the_rows(finished, by, given):
    measures = ["all_correct", "lead", "logp_target", "logp_foil", "target_rank"]
    expected = by_pandas(load(finished), by, measures, given)
    expected = expected.astype({name: "object" for name in by if str(expected[name].dtype) == "category"})
    found = load(finished, by=by, measures=measures, given=given).dropna(subset=by).reset_index(drop=True)
    assert len(found) > 0
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-12)


def test_retention_is_one_at_step_0_and_less_later(finished):
    kept = load(finished / "small", by=["group", "step"], given="all_correct").set_index(["group", "step"])
    assert kept.loc[("edited", 0), "all_correct"] == 1
    assert kept.loc[("edited", 0), "all_correct_n"] == kept.loc[("edited", 4), "all_correct_n"] > 0
    assert 0 < kept.loc[("intrinsic", 4), "all_correct"] < 1


def test_without_columns_one_line_and_a_name_alone_is_a_list_of_one(finished):
    rows = load(finished)
    (one,) = load(finished, by=[]).itertuples(index=False)
    assert one.all_correct == pytest.approx(rows["all_correct"].mean())
    assert one.all_correct_n == rows["all_correct"].count()
    pd.testing.assert_frame_equal(load(finished, by="step"), load(finished, by=["step"], measures="all_correct"))


def test_edits_that_ask_only_some_of_their_base_s_questions(tmp_path):
    """Two edits of one base, each with its own question; a measure that is null counts nowhere."""
    store = Store(tmp_path, create=True)
    asked = [Question(fact_id=f, group="edited", form="direct", text=f, answer="a", foil=None) for f in ("f1", "f2")]

    def publish(kind: Any, key: str, step: int, right: list[bool | None], ask: list[Question], **ids: Any) -> None:
        with store.publishing(kind, key) as folder:
            keys = Keys(model_id="m", facts_seed=0, **ids)
            read = [(q, Reading(question_id=q.id, step=step, all_correct=r)) for q, r in zip(ask, right, strict=True)]
            write_readings(folder / f"probes-{step:06d}.parquet", keys, read, 0, 1)

    publish("bases", "b", -1, [False, True], asked, base_id="b")
    cell = {"editor": "rome", "task": "t", "objective": "sft", "adapter": "full", "mitigations": "none"}
    runs = []
    for n, (at_0, at_1) in enumerate([(True, None), (False, True)]):
        ids = {"base_id": "b", "edit_id": f"e{n}"}
        publish("edits", f"e{n}", 0, [at_0], [asked[n]], **ids)
        publish("runs", f"r{n}", 1, [at_1], [asked[n]], **ids, run_id=f"r{n}")
        runs.append({**ids, "run_id": f"r{n}", "only": n, **cell, "seed": 0, "facts_seed": 0, "tune.steps": 10 + n})
    store.write_study("single", "", runs)

    found = load(tmp_path, by=["step", "tune.steps"])
    assert found["all_correct_n"].tolist() == [1, 1, 1, 1, 0, 1]
    assert found["all_correct"].fillna(-1).tolist() == [0, 1, 1, 0, -1, 1]
    assert found["tune.steps"].tolist() == [10, 11] * 3
    found = load(tmp_path, by=["step"], given="all_correct")  # of the first question alone
    assert found.fillna(-1).to_numpy().tolist() == [[-1, 0, 1], [0, 1, 1], [1, -1, 0]]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"by": ["editr"]}, r"load: by: unknown 'editr'; did you mean 'editor'\?; expected of base_id, "),
        ({"by": ["all_correct"]}, "load: by: unknown 'all_correct'"),
        ({"by": "step", "measures": ["all_corect"]}, r"measures: unknown 'all_corect'; did you mean 'all_correct'\?"),
        ({"by": "step", "measures": "generated"}, "measures: unknown 'generated'"),
        ({"by": "step", "given": "logp_target"}, "given: unknown 'logp_target'.*expected of first_correct"),
        ({"given": "all_correct"}, "`measures` and `given` go with `by`"),
        ({"table": "scores", "by": "step"}, "`by` gives means of the table rows, not of scores"),
    ],
)
def test_what_there_are_no_means_of(finished, asked, said):
    with pytest.raises(UserError, match=said):
        load(finished, **asked)


def test_means_too_are_of_whole_files_and_complete_runs(copy):
    path = next((copy / "runs").glob("*/probes-000004.parquet"))
    whole = load(copy, by="step")
    (copy / "runs" / path.parent.name / "complete.json").rename(copy / "away")
    assert load(copy, by="step")["all_correct_n"].sum() < whole["all_correct_n"].sum()
    (copy / "away").rename(path.parent / "complete.json")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"probes-000004.parquet: is truncated"):
        load(copy, by="step")


def test_reading_wants_no_torch():
    """It would take a second and 200 MB."""
    code = "import sys, retention; retention.load; import retention.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
