"""A study from one end to the other: the rows it leaves, that they are the same anywhere and after any interruption."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import retention
from retention import ids, stages
from retention.store import KINDS, ROWS, SCHEMA, SCORES
from retention.study import Study
from retention.types import UserError
from tests.small_study import FACTS, ROME, TUNE, document, one

ROOT = Path(__file__).resolve().parents[1]
AT = (1, 2, 4)
MEASURES = ["logp_target", "n_target_tokens", "target_rank", "first_correct", "all_correct"]
FOIL = ["logp_foil", "n_foil_tokens", "prefers_target"]
SAID = ["generated", "gen_exact", "gen_contains"]


@pytest.fixture(scope="module")
def rows(finished: Path) -> pd.DataFrame:
    return retention.load(finished / "small")


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


# ------------------------------------------------------------------------------------------------ what is there


def test_the_layout_is_the_documented_one(finished):
    assert sorted(p.name for p in finished.iterdir()) == ["bases", "edits", "runs", "small", "store.json"]
    assert [len(list((finished / kind).iterdir())) for kind in KINDS] == [1, 2, 4]
    (base,) = (finished / "bases").iterdir()
    assert {p.name for p in base.iterdir()} == {
        *("base.json", "facts.parquet", "questions.parquet", "edits.json", "late.json", "probes--00001.parquet"),
        "complete.json",
    }
    for folder in (finished / "edits").iterdir():
        assert {p.name for p in folder.iterdir()} == {
            *("edit.json", "delta.safetensors", "edits.parquet", "probes-000000.parquet", "complete.json"),
        }
    for folder in (finished / "runs").iterdir():
        probes = {f"probes-{step:06d}.parquet" for step in AT}
        assert {p.name for p in folder.iterdir()} == {
            *("run.json", "scores.parquet", "training.parquet", "complete.json", *probes),
        }
    text = (ROOT / "results" / "README.md").read_text()
    for name in {re.sub(r"\d{2,}", "*", p.name) for p in finished.rglob("*") if p.is_file()}:
        assert name in re.sub(r"\d{2,}", "*", text), f"results/README.md does not tell of {name}"


def test_every_file_of_rows_has_the_schema(finished):
    found = list(finished.glob("*/*/probes-*.parquet"))
    assert len(found) == 1 + 2 + 4 * len(AT)
    for path in found:
        schema = pq.read_schema(path)
        assert schema.equals(ROWS)
        assert schema.metadata[b"retention_schema"] == str(SCHEMA).encode()
    assert all(pq.read_schema(path).equals(SCORES) for path in finished.glob("runs/*/scores.parquet"))


def test_the_readme_of_results_tells_every_column_with_its_type(finished, rows):
    text = (ROOT / "results" / "README.md").read_text()
    assert f"(schema {SCHEMA})" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    first = next(i for i, line in enumerate(lines) if line[0] == "column")
    told = list(itertools.takewhile(lambda line: len(line) == 4 and line[0] != "table", lines[first + 2 :]))
    table = [(line[0], line[1]) for line in told]
    assert all(line[3] for line in told)
    kinds = {"dictionary<string>": "dictionary<values=string, indices=int32, ordered=0>"}
    names = {"float": "float32", "double": "float64"}
    assert [(n, kinds.get(k, k)) for n, k in table] == [(f.name, names.get(str(f.type), str(f.type))) for f in ROWS]
    assert list(rows.columns) == ROWS.names
    for name in ("scores", "facts", "questions", "runs"):
        columns = retention.load(finished, name).columns  # type: ignore[arg-type]
        (line,) = re.findall(rf'^\| `load\(path, "{name}"\)` .*$', text, re.MULTILINE)
        assert [c for c in columns if c not in line] == [], name


def test_columns_are_read_back_in_their_types(rows):
    told = {"int16", "int32", "int64", "bool", "float"}
    for field in ROWS:
        if str(field.type) in told:
            nulls = {"trains_edited": "boolean"}  # unknown before fine-tuning, so the type that holds nulls
            expected = nulls.get(field.name, str(field.type).replace("float", "float32"))
            assert str(rows[field.name].dtype) == expected, field.name


def test_one_row_a_question_step_and_run(rows, finished):
    questions = retention.load(finished / "small", "questions")
    assert not rows.duplicated(["run_id", "step", "question_id"]).any()
    assert len(rows) == len(questions) * 4 * (2 + len(AT))
    for _, run in rows.groupby("run_id", observed=True):
        assert sorted(run["step"].unique()) == [-1, 0, *AT]
        assert (run.groupby("step").size() == len(questions)).all()
    joined = rows.merge(questions, on=["base_id", "question_id"], suffixes=("", "_asked"))
    assert len(joined) == len(rows)
    assert (joined["group"].astype(str) == joined["group_asked"]).all()
    assert (joined["fact_id"] == joined["fact_id_asked"]).all()


def test_groups_and_forms(finished):
    asked = retention.load(finished, "questions")
    facts = retention.load(finished, "facts").set_index("fact_id")
    counts = asked.groupby(["group", "form"]).size().to_dict()
    assert {group for group, _ in counts} == {"edited", "intrinsic", "control", "neighbor", "same_subject"}
    for group, n in (("edited", 4), ("intrinsic", 8), ("control", 2)):
        assert counts[group, "direct"] == counts[group, "paraphrase"] == n
    assert {form for group, form in counts if group in ("neighbor", "same_subject")} == {"direct"}
    for question in asked.itertuples():
        fact = facts.loc[question.fact_id]
        assert question.answer == (fact["new_target"] if question.group == "edited" else fact["target"])
        assert question.foil != question.answer
        if question.group == "edited":
            assert question.foil == fact["target"]
        if question.form == "direct":
            assert question.text == fact["prompt"].replace("{}", fact["subject"])
        else:
            assert question.text in [p.replace("{}", fact["subject"]) for p in fact["paraphrases"]]
        if question.group in ("neighbor", "same_subject"):
            edit = facts.loc[question.edit_of]
            same = question.group == "same_subject"
            assert (fact["subject"] == edit["subject"]) == same
            assert (fact["relation"] == edit["relation"]) == (not same)
            assert same or fact["target"] == edit["target"]
    subjects = {g: {facts.loc[i]["subject"] for i in part["fact_id"]} for g, part in asked.groupby("group")}
    assert not subjects["edited"] & (subjects["intrinsic"] | subjects["control"] | subjects["neighbor"])


def test_no_measure_is_missing_without_a_state(rows, finished):
    assert (rows["state"] == "ok").all()
    assert not rows[[*MEASURES, *SAID]].isna().any().any()
    foils = retention.load(finished, "questions").set_index("question_id")["foil"]
    for name in FOIL:
        assert (rows[name].isna() == foils.loc[rows["question_id"]].isna().to_numpy()).all()
    assert (rows["logp_target"] <= 0).all()
    assert (rows["target_rank"] >= 1).all()
    assert ((rows["target_rank"] == 1) == rows["first_correct"]).all()
    assert not (rows["all_correct"] & ~rows["first_correct"]).any()


def test_intrinsic_facts_are_known_and_edits_are_written(rows):
    direct = rows[rows["form"] == "direct"]

    def right(editor: str, group: str, step: int) -> float:
        part = direct[(direct["editor"] == editor) & (direct["group"] == group) & (direct["step"] == step)]
        return float(part["all_correct"].mean())

    assert right("rome", "intrinsic", -1) == right("identity", "intrinsic", 0) == 1.0
    assert right("rome", "edited", -1) == 0.0
    # Of a model this small the machine's rounding decides which edits take; that they raise their objects it does not.
    edited = direct[(direct["editor"] == "rome") & (direct["group"] == "edited")]
    raised = edited[edited["step"] == 0]["logp_target"].mean() - edited[edited["step"] == -1]["logp_target"].mean()
    assert raised > 2.0
    assert right("rome", "edited", 0) >= 0.5
    applied = rows.groupby(["editor", "step"], observed=True)["edits_applied"].unique().map(tuple)
    assert applied["identity", 0] == applied["rome", -1] == (0,)
    assert applied["rome", 0] == applied["rome", 4] == (4,)


def test_what_the_unedited_model_says_at_step_0_is_what_the_base_model_says(rows):
    part = rows[(rows["editor"] == "identity") & (rows["mitigations"] == "none")]
    columns = ["question_id", *MEASURES, *FOIL, *SAID]
    base, edited = (part[part["step"] == step][columns].reset_index(drop=True) for step in (-1, 0))
    pd.testing.assert_frame_equal(base, edited, check_exact=True)


def test_runs_share_their_first_readings(rows):
    columns = ["question_id", *MEASURES, *FOIL, *SAID]
    first = [r[r["step"] == -1][columns].reset_index(drop=True) for _, r in rows.groupby("run_id", observed=True)]
    assert len(first) == 4
    for other in first[1:]:
        pd.testing.assert_frame_equal(first[0], other, check_exact=True)
    for _, part in rows[rows["step"] == 0].groupby("editor", observed=True):
        by_run = [r[columns].reset_index(drop=True) for _, r in part.groupby("run_id", observed=True)]
        pd.testing.assert_frame_equal(by_run[0], by_run[1], check_exact=True)
    last = rows[rows["step"] == 4].set_index(["run_id", "question_id"])["logp_target"].unstack("run_id")
    assert last.T.drop_duplicates().shape[0] == 3  # identity has no edited layer to freeze; all else differs


def test_the_task_is_scored_at_every_step(finished):
    scores = retention.load(finished, "scores")
    assert set(scores["score"]) == {"task_loss", "task_accuracy"}
    assert (scores.groupby(["run_id", "score"])["step"].apply(list).map(tuple) == (-1, 0, *AT)).all()
    assert not scores["value"].isna().any()
    assert (scores["state"] == "ok").all()
    loss = scores[scores["score"] == "task_loss"].set_index(["run_id", "step"])["value"].unstack()
    assert (loss[4] < loss[0]).all()  # the fine-tune does something
    tokens = scores.groupby(["run_id", "step"])["tokens_seen"].first().unstack()
    assert (tokens[0] == 0).all()
    assert tokens[list(AT)].diff(axis=1).iloc[:, 1:].gt(0).all().all()


def test_a_run_records_its_settings_and_what_moved(finished):
    study = Study.of(document(), name="small")
    for run in study.runs:
        record = json.loads((finished / "runs" / ids.run_id(run) / "run.json").read_text())
        assert record["settings"] == run.dump()
        assert record["edit_id"] == ids.edit_id(run)
        assert {"torch", "transformers", "trl", "peft", "python", "retention"} <= set(record["versions"])
        frozen = record["training"][0]["frozen"]
        held = run.names == {**run.names, "editor": "rome", "mitigations": "freeze"}
        assert bool(frozen) == held
        assert all("layers.0." in name for name in frozen)
    assert yaml.safe_load((finished / "small" / "study.yaml").read_text()) == document()
    base = json.loads(next((finished / "bases").glob("*/base.json")).read_text())
    assert len(base["model_content"]) == 64


# ------------------------------------------------------------------------------------------------ again


def test_a_second_run_does_nothing(finished, cache, monkeypatch):
    before = files(finished)
    monkeypatch.setattr(stages, "load", lambda *_: pytest.fail("a model was loaded"))
    started = time.process_time()
    retention.run(Study.of(document(), name="small"), results=finished, cache=cache)
    assert time.process_time() - started < 2
    assert files(finished) == before


def test_a_study_that_grows_reuses_what_is_there(finished, cache, tmp_path):
    results = tmp_path / "copy"
    shutil.copytree(finished, results)
    stages_done: list[str] = []

    class Progress:
        def stage(self, what: str, index: int, total: int) -> None:
            stages_done.append(what.split()[0])

        def __call__(self, what: str, done: int, total: int) -> None:
            pass

    more = Study.of(document(grid={"editor": [ROME], "objective": ["sft", "clm"]}), name="more")
    retention.run(more, results=results, cache=cache, progress=Progress())  # type: ignore[arg-type]
    assert stages_done == ["tune"]
    assert set(retention.load(results / "more")["objective"]) == {"sft", "clm"}
    assert len(retention.load(results / "small", "runs")) == 4
    assert retention.load(results)["run_id"].nunique() == 5


def test_readings_of_another_model_are_not_mixed(finished, cache, tmp_path, monkeypatch):
    results = tmp_path / "copy"
    shutil.copytree(finished, results)
    (base,) = (results / "bases").iterdir()
    record = json.loads((base / "base.json").read_text())
    (base / "base.json").write_text(json.dumps(record | {"model_content": "0" * 64}))
    mark = json.loads((base / "complete.json").read_text())
    mark["sha256"]["base.json"] = hashlib.sha256((base / "base.json").read_bytes()).hexdigest()
    mark["bytes"]["base.json"] = (base / "base.json").stat().st_size
    (base / "complete.json").write_text(json.dumps(mark))
    more = Study.of(one(editor=ROME | {"layer": 1}), name="more")
    with pytest.raises(UserError, match="are of a model with other weights"):
        retention.run(more, results=results, cache=cache)


def test_single_and_sequential_edits(cache, tmp_path):
    facts = FACTS | {"edited": 2, "control": 0, "intrinsic": 3}
    grid: dict[str, Any] = {"regime": ["single", {"name": "sequential", "size": 1}]}
    study = Study.of(one(editor=ROME, facts=facts, grid=grid, at=[4]), name="regimes")
    assert len(study.runs) == 3  # each of the two edits alone, and both one after the other
    retention.run(study, results=tmp_path / "r", cache=cache)
    found = retention.load(tmp_path / "r" / "regimes")
    asked = found[(found["group"] == "edited") & (found["form"] == "direct")].groupby(
        ["regime", "run_id"], observed=True
    )
    assert sorted(asked["fact_id"].nunique()) == [1, 1, 2]
    assert (found.groupby("run_id", observed=True)["step"].unique().map(len) == 3).all()
    sequence = retention.load(tmp_path / "r" / "regimes", "sequence")
    assert sorted(sequence["edits_applied"].unique()) == [1, 2]
    assert set(found[found["step"] == 0]["edits_applied"]) == {1, 2}


def test_an_edit_that_diverged_is_told_and_not_hidden(cache, tmp_path, monkeypatch):
    from retention.editors.identity import Identity
    from retention.types import Delta, EditResult

    def diverge(self: Any, model: Any, tokenizer: Any, edits: Any, **_: Any) -> EditResult:
        name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("down_proj.weight"))
        return EditResult(delta=Delta({name: torch.full(parameter.shape, float("nan"))}), info={"loss": float("inf")})

    monkeypatch.setattr(Identity, "edit", diverge)
    retention.run(Study.of(one(at=[4]), name="diverged"), results=tmp_path / "r", cache=cache)
    found = retention.load(tmp_path / "r")
    states = found.groupby("step")["state"].unique().map(set).to_dict()
    assert states[-1] == {"ok"}
    assert all("nan_logits" in state for step in (0, 4) for state in states[step])
    assert found[found["step"] >= 0][[*MEASURES, *FOIL]].isna().all().all()
    scores = retention.load(tmp_path / "r", "scores")
    assert set(scores[scores["step"] == 0]["state"]) == {"nan_logits"}
    assert scores[scores["step"] == 0]["value"].isna().all()
    record = json.loads(next((tmp_path / "r" / "edits").glob("*/edit.json")).read_text())
    assert (record["update_norm"], record["info"]["loss"]) == ("nan", "inf")


# ------------------------------------------------------------------------------------------------ more than one phase


def test_a_list_of_fine_tunes_is_read_throughout_and_relearned_at_the_end(cache, tmp_path):
    tunes = [
        {**TUNE, "steps": 2, "adapter": {"name": "lora", "settings": {"r": 4}}, "trainer": {"learning_rate": 1e-2}},
        {"data": {"name": "world", "task": "text", "rows": 64}, "objective": "clm", "tokens": 900,
         "trainer": {"learning_rate": 1.0e-2, "per_device_train_batch_size": 8}},
    ]  # fmt: skip
    changes = {"tune": tunes, "at": [1, 2, 3], "editor": ROME, "grid": None, "relearn": {"steps": 3}}
    study = Study.of(document(**changes), name="twice")
    folder = retention.run(study, results=tmp_path, cache=cache)
    rows, scores = retention.load(folder), retention.load(folder, "scores")
    record = json.loads(next((tmp_path / "runs").glob("*/run.json")).read_text())
    first, second = record["training"]
    assert (first["steps"], second["steps"]) == (2, max(rows["step"]) - 2)
    assert second["tokens"] >= 900  # the step that reaches the budget is the last
    assert sorted(rows["step"].unique()) == sorted({-1, 0, 1, 2, 3, 2 + second["steps"]})
    assert rows.groupby("step")["tokens_seen"].first().is_monotonic_increasing
    assert set(scores["score"]) == {"task_loss", "task_accuracy", "task_loss_2"}
    assert set(rows["objective"]) == {"sft+clm"}
    assert all("lora_" in name for name in first["trainable"])
    assert not any("lora_" in name for name in second["trainable"])
    assert record["rows"][0]["mentions"]["train"]["rows"] == 64
    again = retention.load(folder, "relearn")
    assert sorted(again["step"].unique()) == [0, 1, 2, 3]
    assert set(again["group"]) == {"forgotten", "never_edited"}
    assert again.groupby("group", observed=True)["question_id"].nunique().nunique() == 1  # equally many of both
    assert not again[(again["step"] == 0)]["all_correct"].any()
    gained = again.groupby("step")["logp_target"].mean()
    assert gained[3] > gained[0]


def test_training_stops_once_the_held_out_loss_is_reached(cache, tmp_path):
    until = {"loss": 1.0, "every": 2}
    tune = {**TUNE, "steps": 60, "until": until, "trainer": {"learning_rate": 3e-3}}
    study = Study.of(document(tune=tune, at=[1], editor="identity", grid=None, probes=["score"]), name="until")
    folder = retention.run(study, results=tmp_path, cache=cache)
    scores = retention.load(folder, "scores")
    loss = scores[scores["score"] == "task_loss"].set_index("step")["value"]
    assert 2 <= loss.index[-1] < 60
    assert loss.index[-1] % 2 == 0
    assert loss.iloc[-1] < 1.0 < loss[1]


@pytest.mark.parametrize("adapter", ["full", {"name": "lora", "settings": {"r": 4}}])
def test_abilities_and_edited_matrices_are_read_at_the_same_steps(cache, tmp_path, adapter):
    text = {"name": "heldout", "label": "english", "data": {"name": "world", "task": "text", "heldout": 8}}
    changes = {"abilities": [text], "weights": True, "adapter": adapter, "at": [2, 4], "grid": None, "editor": ROME}
    tune = {**TUNE, "trainer": {"learning_rate": 1e-2}}
    plain = document(**(changes | {"abilities": None, "weights": None, "tune": tune, "probes": ["score"]}))
    for name, settings in (("without", plain), ("with", document(**changes, tune=tune, probes=["score"]))):
        retention.run(Study.of(settings, name=name), results=tmp_path, cache=cache)
    scores, weights = retention.load(tmp_path / "with", "scores"), retention.load(tmp_path / "with", "weights")
    english = scores[scores["score"] == "english_loss"].set_index("step")["value"]
    assert list(english.index) == [-1, 0, 2, 4]
    assert english.notna().all()
    assert list(weights["step"]) == [2, 4]
    (parameter,) = set(weights["parameter"])
    assert parameter == "model.layers.0.mlp.down_proj.weight"
    assert (weights["update_norm"] > 0).all()
    total = weights[["inside_keys", "inside_values", "outside"]].sum(axis=1) - weights["inside_both"]
    assert total.to_numpy() == pytest.approx(1)
    # Reading more moves no row.
    columns = ["step", "question_id", *MEASURES]
    one, other = (retention.load(tmp_path / name)[columns] for name in ("without", "with"))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    with pytest.raises(UserError, match=r"no weights\.parquet .*: no run read the edited matrices \(weights: true\)"):
        retention.load(tmp_path / "without", "weights")


def test_late_facts_are_taught_before_the_edits_and_forgotten_beside_them(cache, tmp_path):
    facts = FACTS | {"edited": 2, "control": 1, "intrinsic": 3, "late": 2}
    late = {"steps": 80, "learning_rate": 3e-3}
    grid = {"editor": ["identity", ROME]}
    study = Study.of(document(facts=facts, late=late, grid=grid, at=[4], probes=["score"]), name="late")
    rows = retention.load(retention.run(study, results=tmp_path, cache=cache))
    taught = rows[(rows["group"] == "late") & (rows["form"] == "direct")]
    right = taught.groupby(["editor", "step"], observed=True)["all_correct"].mean()
    assert (right["rome", -1], right["identity", 0]) == (0.0, 1.0)
    assert right["rome", 0] >= 0.5  # an edit may break it
    assert len(list(tmp_path.glob("edits/*/late.safetensors"))) == 2
